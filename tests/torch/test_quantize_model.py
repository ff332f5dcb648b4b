"""`quantize_model` and `dequantize_model`: what comes along, what is refused, how much memory it takes."""

from __future__ import annotations

import copy
import logging
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import halfbyte  # noqa: E402  (needs torch)
import tiny_models  # noqa: E402
from halfbyte.nn import Linear4bit, Params4bit  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import prune  # noqa: E402
from torch_models import NF4, mlp, packed  # noqa: E402

pytestmark = pytest.mark.usefixtures("quiet_transformers")

# ---- what comes along ------------------------------------------------------------------------------------------------


def test_quantize_model_shared_layer_stays_one_object() -> None:
    layer = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(nn.Linear(32, 32), layer)})
    halfbyte.quantize_model(model, NF4)
    assert model["a"] is model["b"][1]
    assert isinstance(model["a"], Linear4bit)
    halfbyte.dequantize_model(model)
    assert model["a"] is model["b"][1]
    assert type(model["a"]) is nn.Linear
    kept = halfbyte.quantize_model(copy.deepcopy(model), NF4, skip=["b.1"])
    assert packed(kept) == {"b.0": "nf4"}
    with pytest.raises(ValueError, match=r"'a' and 'b\.1' are one layer"):
        halfbyte.quantize_model(model, NF4, rules=["^a=nf4", r"b\.1=fp4"])
    assert packed(model) == {}


def test_quantize_model_hooks_attributes_flags_and_the_bias_come_along() -> None:
    model = mlp().eval()
    layer = model[0]
    layer.bias.requires_grad_(False)
    layer.note = "kept"
    layer.register_buffer("scale", torch.ones(3))
    bias, calls = layer.bias, []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: calls.append(("before", type(module)))),
        layer.register_forward_hook(lambda module, args, output: calls.append(("after", type(module)))),
        layer.register_full_backward_hook(lambda module, gi, go: calls.append(("backward", type(module)))),
        layer.register_state_dict_post_hook(lambda module, *rest: calls.append(("saved", type(module)))),
        layer.register_load_state_dict_pre_hook(lambda module, *rest: calls.append(("loading", type(module)))),
    ]
    halfbyte.quantize_model(model, NF4)
    new = model[0]
    del layer
    assert new.bias is bias
    assert not new.bias.requires_grad
    assert not new.weight.requires_grad
    assert model[2].bias.requires_grad
    assert not new.training
    assert new.note == "kept"
    assert "0.scale" in model.state_dict()
    model(torch.randn(2, 64, requires_grad=True)).sum().backward()
    model.load_state_dict(model.state_dict())
    assert {kind for kind, _ in calls} == {"before", "after", "backward", "saved", "loading"}
    assert {cls for _, cls in calls} == {Linear4bit}
    calls.clear()
    halfbyte.dequantize_model(model)
    assert model[0].note == "kept"
    assert not model[0].training
    model(torch.randn(2, 64))
    assert {cls for _, cls in calls} == {nn.Linear}
    calls.clear()
    for handle in handles:
        handle.remove()
    model(torch.randn(2, 64))
    assert calls == []


def test_quantize_model_there_and_back() -> None:
    model = mlp(dtype=torch.bfloat16)
    model[2].weight.requires_grad_(False)
    before = copy.deepcopy(model)
    halfbyte.quantize_model(model, NF4)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    y = model(x)
    assert y.dtype == torch.bfloat16
    halfbyte.dequantize_model(model)
    torch.testing.assert_close(model(x), y, atol=0.02, rtol=0.02)
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        assert (old.shape, old.dtype, old.requires_grad) == (new.shape, new.dtype, new.requires_grad)
    assert repr(model) == repr(before)
    # Quantizing what was quantized changes nothing.
    weight = model[0].weight.detach().clone()
    halfbyte.dequantize_model(halfbyte.quantize_model(model, NF4))
    torch.testing.assert_close(model[0].weight.detach(), weight, atol=1e-3, rtol=0.02)
    wide = halfbyte.dequantize_model(halfbyte.quantize_model(model, NF4), torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert wide(x.float()).dtype == torch.float32


def test_quantize_model_model_itself_may_be_the_layer() -> None:
    layer = halfbyte.quantize_model(nn.Linear(32, 8), NF4)
    assert isinstance(layer, Linear4bit)
    assert type(halfbyte.dequantize_model(layer)) is nn.Linear


def test_quantize_model_config_sets_type_storage_scales_and_compute_dtype() -> None:
    for nested in (False, True):
        config = halfbyte.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype="float16",
            bnb_4bit_use_double_quant=nested,
            bnb_4bit_quant_storage=torch.bfloat16,
        )
        model = halfbyte.quantize_model(mlp(), config)
        assert model[0].compute_dtype == torch.float16
        assert model[0].weight.dtype == torch.bfloat16
        assert model[0].weight.quant_state.nested is nested
        assert model[0].weight.quant_type == "fp4"
    model = halfbyte.quantize_model(mlp())
    assert model[0].compute_dtype is None
    assert model[0].weight.quant_type == "nf4"
    assert model[0].weight.quant_state.nested
    # A default that nobody chose is not taken for a choice.
    assert halfbyte.quantize_model(mlp(), NF4)[0].compute_dtype is None
    assert halfbyte.quantize_model(mlp(), halfbyte.BitsAndBytesConfig(load_in_4bit=True))[0].compute_dtype is None
    chosen = halfbyte.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="float32")
    assert halfbyte.quantize_model(mlp(), chosen)[0].compute_dtype is torch.float32


def test_quantize_model_swapped_models_can_be_copied_pickled_saved_and_trained() -> None:
    model = halfbyte.quantize_model(mlp(), NF4)
    x = torch.randn(4, 64)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert type(halfbyte.dequantize_model(other)[0]) is nn.Linear
    fresh = halfbyte.quantize_model(mlp(), NF4)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(x), model(x))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(5):
        loss = (model(x) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_quantize_model_fast_paths_of_torch_do_not_read_packed_weights() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    halfbyte.quantize_model(model, NF4)
    assert len(packed(model)) == 4
    x = torch.randn(2, 5, 32)
    with torch.inference_mode():
        y = model(x)
        halfbyte.dequantize_model(model)
        torch.testing.assert_close(y, model(x), atol=1e-4, rtol=1e-4)


def test_quantize_model_accelerate_hooks_stay() -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class Counting(hooks.ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            assert isinstance(module, Linear4bit)
            return args, kwargs

    model = mlp()
    counting, align = Counting(), hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
    hooks.add_hook_to_module(model[0], counting)
    hooks.add_hook_to_module(model[2], align)
    halfbyte.quantize_model(model, NF4)
    x = torch.randn(2, 64)
    y = model(x)
    assert counting.calls == 1
    assert model[2]._hf_hook is align
    hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(x), y)
    assert counting.calls == 1


# PEFT asks for an attribute that transformers has renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_quantize_model_lora_trains_over_a_swapped_model_and_merges() -> None:
    """PEFT takes its path for 4-bit layers, which quantizes the sum anew."""
    peft = pytest.importorskip("peft")
    model = halfbyte.quantize_model(tiny_models.build("LlamaForCausalLM", torch.float32), NF4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    ids = torch.arange(16).reshape(2, 8)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    losses = []
    for _ in range(3):
        loss = adapted(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in adapted.get_base_model().named_parameters():
        if name.replace(".base_layer", "") in before:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")]), name
    with pytest.raises(ValueError, match="PEFT adapter"):
        halfbyte.quantize_model(adapted, NF4)
    with pytest.warns(UserWarning, match="Merge lora module to 4-bit linear"):
        merged = adapted.merge_and_unload()
    assert isinstance(merged.model.layers[0].self_attn.q_proj, Linear4bit)
    assert torch.isfinite(merged(ids).logits).all()


def test_quantize_model_one_line_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="halfbyte"):
        halfbyte.quantize_model(tiny_models.build("LlamaForCausalLM"))
    lines = [record.getMessage() for record in caplog.records if record.name == "halfbyte.models.quantize"]
    assert len(lines) == 1
    assert re.fullmatch(
        r"quantized 14 of 15 linear layers to nf4, 4\.1\d\d bits per weight: 214 kB before, \d+ kB after", lines[0]
    )


def test_quantize_model_experts_that_stay_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_models.build("MixtralForCausalLM")
    for module in model.modules():
        # As if they were held in a way that is not known.
        module.__dict__.pop("is_transposed", None)
    halfbyte.quantize_model(model, NF4)
    assert "4 fused expert weights" in caplog.text


def test_quantize_model_progress_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, int, str]] = []
    halfbyte.quantize_model(mlp(), NF4, progress=lambda *state: seen.append(state))
    assert seen == [(0, 2, "0"), (1, 2, "2"), (2, 2, "")]
    halfbyte.quantize_model(mlp(), NF4, progress=True)
    assert capfd.readouterr() == ("", "")


# ---- what is refused -------------------------------------------------------------------------------------------------


def same(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    return set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)


def weight_norm(model: nn.Sequential) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[2])


def replace_forward(model: nn.Sequential) -> None:
    model[2].forward = lambda x: x


def share(model: nn.Sequential) -> None:
    model[2].weight = nn.Parameter(torch.empty(32, 96, device="meta"))


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda model: nn.utils.parametrizations.weight_norm(model[2]), "2: its weight is parametrized"),
        (lambda model: nn.utils.parametrizations.spectral_norm(model[2]), "2: its weight is parametrized"),
        (weight_norm, "2: its weight is no parameter"),
        (lambda model: prune.l1_unstructured(model[2], "weight", 0.5), "2: its weight is no parameter"),
        (lambda model: setattr(model, "2", nn.LazyLinear(4)), "2: its weight has no shape"),
        (replace_forward, "2: its forward was replaced"),
        (share, "2: its weight is on the meta device"),
    ],
)
def test_quantize_model_layers_that_cannot_be_converted_are_named_before_anything_changes(
    spoil: Any, text: str
) -> None:
    model = mlp()
    spoil(model)
    with pytest.raises(ValueError, match=re.escape(text)) as caught:
        halfbyte.quantize_model(model, NF4)
    assert "skip=['2']" in str(caught.value)
    assert packed(model) == {}
    assert packed(halfbyte.quantize_model(model, NF4, skip=["2"])) == {"0": "nf4"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"config": {}}, "must have load_in_4bit=True or load_in_8bit=True, got False for both"),
        ({"config": {"load_in_8bit": True, "llm_int8_threshold": -1.0}}, "llm_int8_threshold must be a number"),
        ({"config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf3"}}, "nf3"),
        ({"config": {"load_in_4bit": True, "quant": 1}}, "quant"),
        ({"config": NF4, "rules": ["0"]}, "REGEX=nf4"),
        ({"config": NF4, "rules": ["(=keep"]}, "regular expression"),
        ({"config": NF4, "rules": ["1=int4"]}, "int4"),
        ({"config": NF4, "rules": [r"\.bias$=nf4"]}, r"0.bias (not the weight"),
        ({"config": NF4, "skip": ["("]}, "skip must be"),
        ({"config": NF4, "skip": "0"}, "list of module names"),
        ({"config": NF4, "skip": ["0", "2"]}, "0 stays (skip list (0))"),
        ({"config": NF4, "rules": [".=keep"]}, "no linear layer to quantize"),
        ({"config": NF4, "device": "meta"}, "device must be a device with storage"),
        ({"config": NF4, "device": "gpu"}, "such as 'cpu' or 'cuda', got 'gpu'"),
    ],
)
def test_quantize_model_bad_arguments_change_nothing(arguments: dict[str, Any], text: str) -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=re.escape(text)):
        halfbyte.quantize_model(model, **arguments)
    assert same(model, before)


def test_quantize_model_bad_types() -> None:
    for arguments in (
        {"config": 4},
        {"config": NF4, "progress": "yes"},
        {"config": NF4, "subclasses": [int]},
        {"config": NF4, "device": 3.5},
    ):
        with pytest.raises(TypeError):
            halfbyte.quantize_model(mlp(), **arguments)
    with pytest.raises(TypeError, match="model"):
        halfbyte.quantize_model([mlp()], NF4)  # type: ignore[type-var]


def test_quantize_model_model_without_linear_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match="no linear layer"):
        halfbyte.quantize_model(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), NF4)
    with pytest.raises(ValueError, match="8 FalconLinear"):
        halfbyte.quantize_model(tiny_models.build("FalconForCausalLM"), NF4)
    with pytest.raises(ValueError, match="model must have a 4-bit layer or an 8-bit one, got Sequential"):
        halfbyte.dequantize_model(mlp())


def test_quantize_model_second_call_goes_on_or_is_an_error() -> None:
    model = halfbyte.quantize_model(mlp(), NF4, skip=["2"])
    first = model[0]
    halfbyte.quantize_model(model, NF4, rules=["2=fp4"])
    assert model[0] is first
    assert packed(model) == {"0": "nf4", "2": "fp4"}
    with pytest.raises(ValueError, match="2 layers are packed already"):
        halfbyte.quantize_model(model, NF4)


def test_quantize_model_interrupted_run_says_how_far_it_came_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_models.build("LlamaForCausalLM", torch.float32)
    want = halfbyte.quantize_model(copy.deepcopy(model), NF4)

    def stop(done: int, total: int, name: str) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        halfbyte.quantize_model(model, NF4, progress=stop)
    assert "after 5 of 14 layers" in caplog.text
    if sys.version_info >= (3, 11):
        assert "after 5 of 14 layers" in caught.value.__notes__[0]
    assert len(packed(model)) == 5
    ids = torch.arange(8)[None]
    assert model(ids).logits.isfinite().all()
    halfbyte.quantize_model(model, NF4)
    assert torch.equal(model(ids).logits, want(ids).logits)


# ---- memory and checkpoints ------------------------------------------------------------------------------------------


def test_quantize_model_from_the_meta_device_and_a_checkpoint(tmp_path: Path) -> None:
    """Weights that a loader renames, splits and ties, quantized as they are read."""
    for name in ("LlamaForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM", "ViTForImageClassification",
                 "LlavaForConditionalGeneration", "T5ForConditionalGeneration", "NomicBertModel"):  # fmt: skip
        folder = tiny_models.save(name, tmp_path / name)
        cls = getattr(transformers, name)
        with torch.device("meta"):
            empty = cls(tiny_models.tiny_config(name))
        model = halfbyte.quantize_model(empty, NF4, checkpoint=folder)
        want = halfbyte.quantize_model(cls.from_pretrained(folder), NF4)
        ours, theirs = model.state_dict(), want.state_dict()
        assert set(ours) == set(theirs)
        assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []
        for (key, a), (_, b) in zip(model.named_buffers(), want.named_buffers(), strict=True):
            assert torch.equal(a, b), key


def test_quantize_model_checkpoint_that_lacks_something_changes_nothing(tmp_path: Path) -> None:
    state = mlp().state_dict()
    del state["2.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = mlp()
    with pytest.raises(halfbyte.CheckpointError, match=r"lacks 2\.bias"):
        halfbyte.quantize_model(model, NF4, checkpoint=tmp_path)
    assert packed(model) == {}
    assert all(p.is_meta for p in model.parameters())


PEAK = """
import json, resource, sys, torch, halfbyte  # noqa: E402
from torch import nn  # noqa: E402

folder, how = sys.argv[1:]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
sizes = [(1024, 4096), (4096, 1024)] * 6
halfbyte.quantize_model(nn.Sequential(nn.Linear(64, 64)), progress=False)  # loads everything once
if how == "save":
    from safetensors.torch import save_file
    model = nn.Sequential(*(nn.Linear(a, b, dtype=torch.bfloat16) for a, b in sizes))
    save_file(model.state_dict(), folder + "/model.safetensors")
    sys.exit()
with torch.device("meta"):
    model = nn.Sequential(*(nn.Linear(a, b, dtype=torch.bfloat16) for a, b in sizes))
before = peak()
model = halfbyte.quantize_model(model, checkpoint=folder, progress=False)
print(json.dumps([peak() - before, sum(2 * a * b for a, b in sizes)]))
"""


@pytest.mark.slow
def test_quantize_model_peak_is_the_4_bit_model_and_one_weight(tmp_path: Path) -> None:
    import json

    def run(how: str) -> str:
        code = textwrap.dedent(PEAK)
        return subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), how], check=True, capture_output=True, text=True
        ).stdout

    run("save")
    grown, dense = json.loads(run("load"))
    # 96 MiB in 16 bits, 25 in 4; one weight is 8 MiB. Twice that for buffers of the allocator.
    assert dense == 96 * 2**20
    assert grown < dense * 4.2 / 16 + 16 * 2**20


def test_quantize_model_dense_weights_are_let_go_one_by_one() -> None:
    import weakref

    model = mlp()
    alive = [weakref.ref(model[i].weight) for i in (0, 2)]
    seen = []
    halfbyte.quantize_model(model, NF4, progress=lambda *state: seen.append([ref() is not None for ref in alive]))
    assert seen == [[True, True], [False, True], [False, False]]
    assert isinstance(model[0].weight, Params4bit)
