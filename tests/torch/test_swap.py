"""`quantize_model` and `dequantize_model`: which layers, what comes along, what stays, what is refused."""

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
from halfbyte.models import select as _choice  # noqa: E402
from halfbyte.nn import Linear4bit, Params4bit  # noqa: E402
from halfbyte.offline.transformers_selection import converted_modules, skeleton  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import prune  # noqa: E402

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Any:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()
    transformers.logging.set_verbosity_warning()


def packed(model: nn.Module) -> dict[str, str]:
    """Path and type of every 4-bit layer."""
    return {name: m.weight.quant_type for name, m in model.named_modules() if isinstance(m, Linear4bit)}


def mlp(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96, **options), nn.GELU(), nn.Linear(96, 32, **options))


class Tied(nn.Module):
    """A language model in five lines, which transformers has never seen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 64)
        self.body = mlp()
        self.up = nn.Linear(32, 64)
        self.lm_head = nn.Linear(64, 40, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.up(self.body(self.embed(x))))


# ---- which layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_quantize_model_choice_is_that_of_transformers(name: str) -> None:
    model = skeleton(getattr(transformers, name), tiny_models.tiny_config(name))
    choice = _choice.choose(model, "nf4", meta=True)
    assert {layer.names[0] for layer in choice.layers} == converted_modules(model)
    assert _choice.skip_list(model, choice) is None


@pytest.mark.parametrize("name", [name for name in tiny_models.MODELS if name != "FalconForCausalLM"])
def test_quantize_model_skip_list_makes_a_loader_choose_the_same(name: str) -> None:
    model = skeleton(getattr(transformers, name), tiny_models.tiny_config(name))
    first = min(converted_modules(model))
    for options in ({"rules": [f"^{re.escape(first)}$=keep"]}, {"skip": [first.rpartition(".")[2]]}):
        choice = _choice.choose(model, "nf4", meta=True, **options)
        chosen = {layer.names[0] for layer in choice.layers}
        assert first not in chosen
        listed = _choice.skip_list(model, choice)
        assert listed is not None
        assert converted_modules(model, listed, replace=True) == chosen


RULES = [
    [r"layers\.0\.=keep"],
    ["q_proj=fp4", "proj=nf4"],
    [r"^model\.layers\.1\.mlp\.\w+$=fp4"],
    [r"\.weight$=fp4", ".=keep"],
    [r"(?i)Q_PROJ|V_PROJ=keep"],
    [r"lm_head=nf4"],
    [r"down_proj.weight\z=keep", r"[[:digit:]]\.self_attn=fp4"],
]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("skip", [[], ["up_proj"], [r".*\.1\."]])
def test_quantize_model_rules_and_skip_names_mean_what_they_mean_offline(
    rules: list[str], skip: list[str], tmp_path: Path
) -> None:
    """The same bytes as `halfbyte quantize` with the same options: the whole path of both, on every choice."""
    source, output = tiny_models.save("LlamaForCausalLM", tmp_path / "source"), tmp_path / "output"
    model = transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    if rules == RULES[0] and skip == [r".*\.1\."]:
        with pytest.raises(halfbyte.CheckpointError, match="no weight to quantize"):
            halfbyte.quantize_checkpoint(source, output, config=NF4, rules=rules, skip=skip, progress=None)
        with pytest.raises(ValueError, match="no linear layer to quantize"):
            halfbyte.quantize_model(model, NF4, rules=rules, skip=skip)
        return
    halfbyte.quantize_checkpoint(source, output, config=NF4, rules=rules, skip=skip, progress=None)
    halfbyte.quantize_model(model, NF4, rules=rules, skip=skip)
    state = model.state_dict()
    with safe_open(output / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(state)
        for name in file.keys():  # noqa: SIM118  (not a dict)
            stored = file.get_tensor(name)
            if "bitsandbytes__" in name:
                continue  # JSON, whose keys may come in any order
            assert stored.dtype == state[name].dtype, name
            assert torch.equal(stored, state[name]), name


def test_quantize_model_conv1d_is_transposed_as_offline(tmp_path: Path) -> None:
    source = tiny_models.save("GPT2LMHeadModel", tmp_path / "source")
    halfbyte.quantize_checkpoint(source, tmp_path / "output", config=NF4, progress=None)
    model = transformers.GPT2LMHeadModel.from_pretrained(source, dtype=torch.bfloat16)
    dense = copy.deepcopy(model)
    halfbyte.quantize_model(model, NF4)
    state = model.state_dict()
    with safe_open(tmp_path / "output" / "model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if name.endswith("c_attn.weight")]  # noqa: SIM118
        assert names
        for name in names:
            assert torch.equal(file.get_tensor(name), state[name])
            assert torch.equal(file.get_tensor(f"{name}.absmax"), state[f"{name}.absmax"])
    layer = model.transformer.h[0].attn.c_attn
    assert (layer.in_features, layer.out_features) == (64, 192)
    back = halfbyte.dequantize_model(model)
    kinds = {name: type(module) for name, module in dense.named_modules()}
    assert {name: type(module) for name, module in back.named_modules()} == kinds
    conv = back.transformer.h[0].attn.c_attn
    assert conv.weight.shape == (64, 192)
    assert conv.weight.is_contiguous()
    assert (conv.nx, conv.nf) == (64, 192)
    torch.testing.assert_close(conv.weight, dense.transformer.h[0].attn.c_attn.weight, atol=0.02, rtol=0)
    ids = torch.arange(8)[None]
    assert back(ids).logits.isfinite().all()


def test_quantize_model_plain_models_keep_tied_weights_and_output_embeddings() -> None:
    model = halfbyte.quantize_model(Tied(), NF4)
    assert packed(model) == {"body.0": "nf4", "body.2": "nf4", "up": "nf4"}
    assert model.lm_head.weight is model.embed.weight
    untied = Tied()
    untied.lm_head = nn.Linear(64, 40, bias=False)
    assert "lm_head" not in packed(halfbyte.quantize_model(untied, NF4))
    assert packed(halfbyte.quantize_model(untied, NF4, rules=["lm_head=fp4"]))["lm_head"] == "fp4"
    with pytest.raises(ValueError, match=r"lm_head.*tied weight"):
        halfbyte.quantize_model(Tied(), NF4, rules=["lm_head=nf4"])


def test_quantize_model_weights_that_share_memory_are_tied() -> None:
    model = mlp()
    model.append(nn.Linear(96, 32))
    model[3].weight = nn.Parameter(model[2].weight.data)
    assert packed(halfbyte.quantize_model(model, NF4)) == {"0": "nf4"}
    fused = torch.randn(64, 32)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[0].weight, model[1].weight = nn.Parameter(fused[:32]), nn.Parameter(fused[32:])
    assert packed(halfbyte.quantize_model(model, NF4)) == {"0": "nf4", "1": "nf4"}


def test_quantize_model_transformers_model_inside_another_module_keeps_its_defaults() -> None:
    model = nn.ModuleDict({"lm": tiny_models.build("T5ForConditionalGeneration"), "head": nn.Linear(64, 4)})
    names = packed(halfbyte.quantize_model(model, NF4))
    inner = skeleton(transformers.T5ForConditionalGeneration, tiny_models.tiny_config("T5ForConditionalGeneration"))
    assert set(names) == {f"lm.{name}" for name in converted_modules(inner)} | {"head"}


def test_quantize_model_skip_names_add_to_the_defaults_from_both_places() -> None:
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["q_proj"])
    model = halfbyte.quantize_model(tiny_models.build("LlamaForCausalLM"), config, skip=["model.layers.1"])
    names = packed(model)
    assert set(names) == {
        f"model.layers.0.{name}"
        for name in ("self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
    } | {"model.layers.0.mlp.down_proj"}
    assert set(names.values()) == {"fp4"}
    assert config.llm_int8_skip_modules == ["q_proj"]
    assert "lm_head" in model.config.quantization_config.llm_int8_skip_modules


def test_quantize_model_other_dtypes_stay() -> None:
    model = mlp()
    model[0].to(torch.float64)
    assert packed(halfbyte.quantize_model(model, NF4)) == {"2": "nf4"}
    with pytest.raises(ValueError, match="float64"):
        halfbyte.quantize_model(nn.Sequential(nn.Linear(8, 8).double()), NF4, rules=["0=nf4"])


class Own(nn.Linear):
    """A subclass that computes the same."""


class Scaled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_quantize_model_subclasses_are_converted_only_when_asked(caplog: pytest.LogCaptureFixture) -> None:
    def model() -> nn.ModuleList:
        return nn.ModuleList([nn.Linear(8, 8), Own(8, 8), Scaled(8, 8), nn.MultiheadAttention(8, 2)])

    assert set(packed(halfbyte.quantize_model(model(), NF4))) == {"0"}
    assert "1 Own, 1 Scaled" in caplog.text
    assert set(packed(halfbyte.quantize_model(model(), NF4, subclasses=True))) == {"0", "1"}
    every = halfbyte.quantize_model(model(), NF4, subclasses=(Own, Scaled))
    assert set(packed(every)) == {"0", "1", "2"}
    back = halfbyte.dequantize_model(every)
    assert [type(module) for module in back[:3]] == [nn.Linear, Own, Scaled]
    assert back[2](torch.randn(2, 8)).shape == (2, 8)
    with pytest.raises(TypeError, match=r"subclasses must be .*Conv2d"):
        halfbyte.quantize_model(model(), NF4, subclasses=[nn.Conv2d])
    falcon = halfbyte.quantize_model(
        tiny_models.build("FalconForCausalLM"), NF4,
        subclasses=transformers.models.falcon.modeling_falcon.FalconLinear,
    )  # fmt: skip
    assert len(packed(falcon)) == 8


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
    halfbyte.quantize_model(tiny_models.build("MixtralForCausalLM"), NF4)
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
        ({"config": NF4, "skip": ["("]}, "skip is"),
        ({"config": NF4, "skip": "0"}, "list of module names"),
        ({"config": NF4, "skip": ["0", "2"]}, "0 stays (skip list (0))"),
        ({"config": NF4, "rules": [".=keep"]}, "no linear layer to quantize"),
        ({"config": NF4, "device": "meta"}, "device must be a device with storage"),
    ],
)
def test_quantize_model_bad_arguments_change_nothing(arguments: dict[str, Any], text: str) -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=re.escape(text)):
        halfbyte.quantize_model(model, **arguments)
    assert same(model, before)


def test_quantize_model_bad_types() -> None:
    for arguments in ({"config": 4}, {"config": NF4, "progress": "yes"}, {"config": NF4, "subclasses": [int]}):
        with pytest.raises(TypeError):
            halfbyte.quantize_model(mlp(), **arguments)
    with pytest.raises(TypeError, match="model"):
        halfbyte.quantize_model([mlp()], NF4)  # type: ignore[type-var]


def test_quantize_model_model_without_linear_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match="no linear layer"):
        halfbyte.quantize_model(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), NF4)
    with pytest.raises(ValueError, match="8 FalconLinear"):
        halfbyte.quantize_model(tiny_models.build("FalconForCausalLM"), NF4)
    with pytest.raises(ValueError, match="model must have a 4-bit layer, got Sequential"):
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
import json, resource, sys, torch, halfbyte
from torch import nn

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


# ---- names that other libraries give ---------------------------------------------------------------------------------


class Embedder(nn.Module):
    _keep_in_fp32_modules = ("time_embedder",)

    def __init__(self) -> None:
        super().__init__()
        self.condition = nn.ModuleDict({"time_embedder": mlp(), "time_embedders": nn.Linear(64, 64)})
        self.proj = nn.Linear(64, 64)


def test_quantize_model_float32_keys_match_any_component_outside_of_transformers() -> None:
    assert set(packed(halfbyte.quantize_model(Embedder()))) == {"condition.time_embedders", "proj"}


def test_quantize_model_skip_list_holds_with_and_without_the_base_models_prefix() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=96
    )
    model = halfbyte.quantize_model(transformers.LlamaForCausalLM(config), rules=[r"layers\.0\.=keep"])
    assert {"model.layers.0", "layers.0", "lm_head"} <= set(model.config.quantization_config.llm_int8_skip_modules)


def test_quantize_model_short_skip_name_never_keeps_a_packed_layer() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.quantizers.quantizers_utils import should_convert_module

    class Base(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig
        base_model_prefix = "model"

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.proj = nn.Linear(64, 64)
            self.block = nn.ModuleDict({"proj": nn.Linear(64, 64), "q": nn.Linear(64, 64)})

    class Head(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig
        base_model_prefix = "model"

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = Base(config)
            self.head = nn.Linear(64, 64)

    model = halfbyte.quantize_model(Head(transformers.PretrainedConfig()), rules=[r"^model\.proj\.=keep"])
    listed = model.config.quantization_config.llm_int8_skip_modules
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name in layers if should_convert_module(name, listed)} == set(packed(model))
    assert "model.block.proj" in packed(model)


def test_quantize_model_skip_names_that_hit_nothing_are_told(caplog: pytest.LogCaptureFixture) -> None:
    halfbyte.quantize_model(mlp(), skip=["0", "nowhere"])
    assert "the skip name 'nowhere' matches no module" in caplog.text
    assert "'0' matches" not in caplog.text
