"""`halfbyte.integrations.peft.fuse`: PEFT's layers compute the same as before, in fewer operations."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import halfbyte  # noqa: E402
import transformers  # noqa: E402
from compilers import needs_compiler  # noqa: E402
from halfbyte.integrations import peft as integration  # noqa: E402
from halfbyte.integrations.peft import fuse, unfuse  # noqa: E402
from halfbyte.nn import lora  # noqa: E402
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit  # noqa: E402
from torch import nn  # noqa: E402

IDS = torch.arange(48).reshape(2, 24) % 96
LAYERS = 14

pytestmark = pytest.mark.filterwarnings(
    # PEFT's own, about merging; and its use of what transformers deprecates.
    "ignore:Merge lora module to 4-bit linear:UserWarning",
    "ignore:Unmerge lora module to 4-bit linear:UserWarning",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning",
)


@pytest.fixture(autouse=True)
def logs_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said once is said once a test."""
    from halfbyte.integrations.peft import layers

    monkeypatch.setattr(integration, "_said", set())
    monkeypatch.setattr(layers, "_said", set())


def base_model(dtype: Any = torch.float32, **kwargs: Any) -> Any:
    """A tiny Llama in 4 bits."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=96,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    how = halfbyte.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, **kwargs
    )
    return halfbyte.quantize_model(model, how)


def lora_config(**kwargs: Any) -> Any:
    given = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{**given, "init_lora_weights": False, **kwargs})


def adapted(dtype: Any = torch.float32, prepare: bool = True, config: Any = None, **kwargs: Any) -> Any:
    """That model with adapters that are not zero, prepared as QLoRA does, or left in `dtype`."""
    model = base_model(dtype)
    if prepare:
        checkpointing = kwargs.pop("checkpointing", None)
        model = peft.prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=checkpointing is not None,
            gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"},
        )
    model.config.use_cache = False
    torch.manual_seed(1)
    return peft.get_peft_model(model, config or lora_config(**kwargs)).train()


def first(model: Any) -> Any:
    return model.base_model.model.model.layers[0].self_attn.q_proj


def loss_of(model: Any, autocast: bool = False, seed: int = 5) -> Any:
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return model(input_ids=IDS, labels=IDS).loss


def gradients(model: Any, autocast: bool = False) -> tuple[float, dict[str, Any]]:
    """The loss, and all gradients by name."""
    model.zero_grad()
    loss = loss_of(model, autocast)
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def logits(model: Any) -> Any:
    return model.eval()(IDS).logits


def difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest relative one of all gradients."""
    assert a.keys() == b.keys()
    assert a
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in a)


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


# ---- what PEFT does with its layers ----------------------------------------------------------------------------------


def test_unfuse_restores_class_state_and_numbers() -> None:
    model = adapted()
    before = gradients(model)
    classes = [type(module) for module in model.modules()]
    objects = dict(model.state_dict(keep_vars=True))
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    report = fuse(model)
    assert report == integration.FuseReport(LAYERS, {})
    assert isinstance(first(model), PeftLinear4bit)
    assert type(first(model)) is not PeftLinear4bit
    assert fuse(model) == report
    state = model.state_dict(keep_vars=True)
    assert list(state) == list(objects)
    assert all(state[name] is objects[name] for name in state if "lora_" in name)
    assert unfuse(model) == LAYERS
    assert [type(module) for module in model.modules()] == classes
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert unfuse(model) == 0
    after = gradients(model)
    assert before[0] == after[0]
    assert all(torch.equal(after[1][name], grad) for name, grad in before[1].items())


def test_fuse_with_several_adapters() -> None:
    model = adapted()
    fuse(model)
    model.add_adapter("other", lora_config(r=8, lora_alpha=4))
    model.base_model.set_adapter(["default", "other"])
    found = gradients(model)
    assert len(found[1]) == 4 * LAYERS
    unfuse(model)
    expected = gradients(model)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert difference(found[1], expected[1]) < 2e-6
    fuse(model)
    for names in ("other", "default", ["other"]):
        model.base_model.set_adapter(names)
        found = gradients(model)
        assert len(found[1]) == 2 * LAYERS
        unfuse(model)
        assert found[0] == pytest.approx(gradients(model)[0], rel=1e-6)
        fuse(model)
    model.set_adapter("default")
    expected = logits(model)
    model.delete_adapter("other")
    assert torch.equal(logits(model), expected)


def test_fuse_leaves_disabled_merged_and_mixed_calls_to_peft() -> None:
    model = adapted()
    model.add_adapter("other", lora_config())
    model.eval()
    batch = {"input_ids": IDS, "adapter_names": ["other", "__base__"]}
    with torch.no_grad():
        expected = model(**batch).logits
        fuse(model)
        assert torch.equal(model(**batch).logits, expected)
        with model.disable_adapter():
            base = model(IDS).logits
        assert torch.equal(base[1], expected[1])
    with_adapter = logits(model)
    assert not torch.allclose(with_adapter, base)
    model.merge_adapter()
    merged = logits(model)
    assert not torch.equal(merged, base)
    unfuse(model)
    assert torch.equal(logits(model), merged)
    fuse(model)
    model.unmerge_adapter()
    assert first(model).merged_adapters == []


def test_fuse_then_merge_and_unload() -> None:
    results = []
    for fused in (False, True):
        model = adapted()
        if fused:
            fuse(model)
        merged = model.merge_and_unload()
        assert not any(isinstance(module, PeftLinear4bit) for module in merged.modules())
        results.append(logits(merged))
    assert torch.equal(*results)
    model = adapted()
    with model.disable_adapter():
        expected = logits(model)
    fuse(model)
    assert torch.equal(logits(model.unload()), expected)


# Older releases of PEFT look for the config of the base, which is in no folder.
@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_fuse_then_save_and_load_the_adapter(tmp_path: Path) -> None:
    model = adapted()
    plain = peft.get_peft_model_state_dict(model)
    fuse(model)
    state = peft.get_peft_model_state_dict(model)
    assert list(state) == list(plain)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base_model(), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    assert fuse(again).fused == LAYERS
    assert torch.equal(logits(again), logits(model))


def test_fuse_survives_deepcopy_and_pickle() -> None:
    model = adapted()
    fuse(model)
    expected = gradients(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(first(copied)) is type(first(model))
        found = gradients(copied)
        assert found[0] == expected[0]
        assert all(torch.equal(found[1][name], grad) for name, grad in expected[1].items())
        assert unfuse(copied) == LAYERS
        assert type(first(model)) is not PeftLinear4bit
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    model.load_state_dict(torch.load(buffer))


@needs_compiler
def test_fuse_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    model = adapted()
    expected = gradients(model)
    fuse(model)
    plain = model.forward
    model.forward = torch.compile(plain, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of the compiler, about what transformers' code does.
        found = gradients(model)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert difference(found[1], expected[1]) < 1e-4
    torch._dynamo.reset()


# ---- what is left to PEFT --------------------------------------------------------------------------------------------


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("halfbyte.integrations.peft")]


def test_fuse_leaves_dora_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    model = adapted(use_dora=True)
    expected = gradients(model)
    report = fuse(model)
    assert report.fused == 0
    assert sum(report.left.values()) == LAYERS
    (reason,) = report.left
    assert "DoraLinearVariant" in reason
    fuse(model)
    assert len(messages(caplog)) == 1
    assert reason in messages(caplog)[0]
    found = gradients(model)
    assert all(torch.equal(found[1][name], grad) for name, grad in expected[1].items())


def test_fuse_leaves_an_active_dora_adapter_at_the_call(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    model = adapted(lora_dropout=0.5)
    model.add_adapter("dora", lora_config(use_dora=True))
    model.base_model.set_adapter(["default", "dora"])
    expected = gradients(model)
    assert fuse(model) == integration.FuseReport(LAYERS, {})
    found = gradients(model)
    # Nothing was dropped before it was known that PEFT computes.
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], grad) for name, grad in expected[1].items())
    assert len(messages(caplog)) == 1
    assert "DoraLinearVariant" in messages(caplog)[0]


def test_fuse_leaves_adapters_with_a_bias() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, that such adapters cannot be merged.
        model = adapted(lora_bias=True)
    (reason,) = fuse(model).left
    assert "lora_bias" in reason


def test_fuse_leaves_other_layers_of_peft() -> None:
    model = adapted(config=lora_config(target_modules=["q_proj", "lm_head", "embed_tokens"]))
    report = fuse(model)
    assert report.fused == 2
    assert sorted(report.left.values()) == [1, 1]
    assert all("it is not PEFT's LoRA layer for 4-bit weights" in reason for reason in report.left)
    assert any("torch.nn.modules.linear.Linear" in reason for reason in report.left)


def test_fuse_leaves_layers_of_bitsandbytes() -> None:
    import bitsandbytes

    base = bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu")
    assert not isinstance(base, halfbyte.nn.Linear4bit)
    model = nn.ModuleDict({"layer": PeftLinear4bit(base, "default", config=peft.LoraConfig(), r=4)})
    report = fuse(model)
    assert report.fused == 0
    assert "the base layer is not halfbyte's Linear4bit" in next(iter(report.left))


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default"])
def test_fuse_runs_hooks_of_parts(part: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    model = adapted()
    expected = logits(model)
    fuse(model)
    calls = []
    handle = first(model).get_submodule(part).register_forward_hook(lambda *given: calls.append(given))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == 1
    assert len(messages(caplog)) == 1
    assert "hooks" in messages(caplog)[0]
    handle.remove()
    logits(model)
    assert len(calls) == 1


def test_fuse_beside_accelerates_hooks() -> None:
    """Those of a layer that stays where it is change nothing; those of an offloaded one bring its weight."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = adapted()
    expected = logits(model)
    base = first(model).base_layer
    for hook, fused in (
        (AlignDevicesHook(execution_device="cpu"), True),
        (AlignDevicesHook(io_same_device=True), False),
    ):
        add_hook_to_module(base, hook)
        report = fuse(model)
        assert (report.fused == LAYERS) == fused, report
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
        unfuse(model)


def test_fuse_refuses_what_has_no_adapters() -> None:
    with pytest.raises(ValueError, match="model must have LoRA layers of PEFT, got LlamaForCausalLM without any"):
        fuse(base_model())
    for function in (fuse, unfuse):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
            function("model")


def test_fuse_of_a_part_of_a_model() -> None:
    model = adapted()
    assert fuse(model.base_model.model.model.layers[0]).fused == LAYERS // 2
    assert unfuse(model) == LAYERS // 2
