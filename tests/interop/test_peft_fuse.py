"""`halfbyte.integrations.peft.fuse`: PEFT's layers compute the same as before, in fewer operations."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from halfbyte.integrations.peft import fuse, unfuse  # noqa: E402
from halfbyte.nn import lora  # noqa: E402
from peft_models import IDS, LAYERS, MARKS, adapted, difference, first, gradients, loss_of  # noqa: E402

pytestmark = MARKS


# ---- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "not reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_fuse_gives_the_loss_and_gradients_of_peft(dropout: float, checkpointing: str | None) -> None:
    model = adapted(lora_dropout=dropout, checkpointing=checkpointing)
    loss, expected = gradients(model)
    assert fuse(model).fused == LAYERS
    fused_loss, found = gradients(model)
    # The same seed drops the same inputs.
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    assert len(found) == 2 * LAYERS
    assert all(grad.dtype is torch.float32 for grad in found.values())
    assert difference(found, expected) < 2e-6


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(
    ("dtype", "prepare", "autocast"),
    [(torch.bfloat16, False, False), (torch.bfloat16, True, True), (torch.float32, False, True)],
)
def test_fuse_in_bfloat16_is_as_near_to_float32_as_peft(
    monkeypatch: pytest.MonkeyPatch, device: str, dropout: float, dtype: Any, prepare: bool, autocast: bool
) -> None:
    if device == "gpu":
        monkeypatch.setattr(lora, "_low_dtype", lambda x, compute: compute)
    model = adapted(dtype, prepare, lora_dropout=dropout)
    theirs = gradients(model, autocast)
    assert fuse(model).fused == LAYERS
    ours = gradients(model, autocast)
    unfuse(model)
    exact = gradients(model.float())
    assert abs(ours[0] - exact[0]) < 5e-3
    # Without autocast, PEFT computes adapters in float32, and a GPU's products here are of bfloat16 still.
    assert difference(ours[1], exact[1]) < 1.5 * difference(theirs[1], exact[1])


@pytest.mark.slow
@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-5), (True, 2e-3)])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_fuse_gives_equal_losses_over_50_steps(
    monkeypatch: pytest.MonkeyPatch, autocast: bool, tolerance: float, device: str
) -> None:
    if device == "gpu":
        monkeypatch.setattr(lora, "_low_dtype", lambda x, compute: compute)
    losses = []
    for fused in (False, True):
        model = adapted(init_lora_weights=True)
        if fused:
            assert fuse(model).fused == LAYERS
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses.append([])
        for step in range(50):
            loss = loss_of(model, autocast, step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(loss.detach()))
    theirs, ours = losses
    assert theirs[-1] < 0.75 * theirs[0]
    assert max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True)) < tolerance


def test_fuse_keeps_the_dtype_of_the_input() -> None:
    model = adapted()
    fuse(model)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(3, 64).to(dtype)
        assert first(model)(x).dtype is dtype
        with torch.autocast("cpu", torch.bfloat16):
            assert first(model)(x).dtype is dtype


def test_fuse_float16_with_a_gradient_scaler() -> None:
    """AMP: scaled gradients are those of the unfused model."""
    found = []
    for fused in (False, True):
        model = adapted()
        if fused:
            fuse(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        with torch.autocast("cpu", torch.float16):
            loss = model(input_ids=IDS, labels=IDS).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 256.0
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert difference(found[1], found[0]) < 0.02


# ---- fewer operations ------------------------------------------------------------------------------------------------

# Views and allocations, and what contains other operations.
_NO_KERNEL = {
    *("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::resize_"),
    *("aten::view", "aten::_unsafe_view", "aten::reshape", "aten::t", "aten::transpose", "aten::as_strided"),
    *("aten::expand", "aten::flatten", "aten::detach", "aten::resolve_conj", "aten::resolve_neg", "aten::lift_fresh"),
    *("aten::result_type", "aten::to", "aten::_to_copy"),
}


def operations(layer: Any, x: Any, autocast: bool) -> Counter[str]:
    """Operations of torch in forward and backward, less those that compute nothing; the packed product is none."""
    from torch.profiler import ProfilerActivity, profile

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x)
        y.backward(grad)

    grad = torch.ones_like(layer(x))
    step()
    layer.zero_grad()
    x.grad = None
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    found: Counter[str] = Counter()
    for event in profiled.events():
        parents = [event]
        while parents[-1].cpu_parent is not None:
            parents.append(parents[-1].cpu_parent)
        inside_wide = any(parent.name.startswith("wide:") for parent in parents)
        inner = [child for child in event.cpu_children if child.name.startswith("aten::")]
        if event.name.startswith("wide:"):
            found["wide_addmm"] += int(event.name[5:])
        elif event.name.startswith("aten::") and event.name not in _NO_KERNEL and not inside_wide:
            # A sum of two dtypes casts before or after it adds.
            found[event.name] += event.name == "aten::add_" or all(child.name in _NO_KERNEL for child in inner)
    return found


def wide_addmm(total: Any, a: Any, b: Any, beta: int, alpha: float) -> Any:
    """What a GPU has in one call: a cast of the sum, if there is one, and a product."""
    with torch.profiler.record_function("wide:2" if beta else "wide:1"):
        product = alpha * (a.float() @ b.float())
        return product + total.float() if beta else product


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize(
    ("dtype", "autocast", "theirs", "ours"),
    [
        # A float32 stream under autocast; the same with 16-bit inputs, as of the output projection; without autocast.
        (torch.float32, True, 25, {"cpu": 10, "gpu": 12}),
        (torch.bfloat16, True, 21, {"cpu": 14, "gpu": 8}),
        (torch.bfloat16, False, 17, {"cpu": 14, "gpu": 8}),
    ],
)
def test_fuse_runs_fewer_operations(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: Any, autocast: bool, theirs: int, ours: dict[str, int]
) -> None:
    """Beside the two packed products, for one layer forward and backward."""
    if device == "gpu":
        monkeypatch.setattr(lora, "_low_dtype", lambda x, compute: compute)
        monkeypatch.setattr(lora, "_widens", lambda a: a.dtype is not torch.float32)
        monkeypatch.setattr(lora, "_wide_addmm", wide_addmm)
    model = adapted()
    layer = first(model)
    x = torch.randn(4, 8, 64).to(dtype).requires_grad_()
    before = operations(layer, x, autocast)
    assert sum(before.values()) == theirs
    fuse(model)
    after = operations(layer, x, autocast)
    assert sum(after.values()) == ours[device], after


def test_fuse_keeps_less_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without checkpointing, under autocast, as on a GPU: bytes of distinct storages."""
    monkeypatch.setattr(lora, "_low_dtype", lambda x, compute: compute)
    kept = []
    for fused in (False, True):
        model = adapted()
        if fused:
            fuse(model)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        found: dict[int, int] = {}

        def pack(tensor: Any, own: Any = own, found: Any = found) -> Any:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss_of(model, autocast=True)
        kept.append(sum(found.values()))
    assert kept[1] < 0.95 * kept[0], kept
