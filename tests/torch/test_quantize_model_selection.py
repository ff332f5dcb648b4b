"""`quantize_model`: which layers it converts."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import halfbyte  # noqa: E402  (needs torch)
import tiny_models  # noqa: E402
from halfbyte.models import select as _choice  # noqa: E402
from halfbyte.offline.transformers_selection import converted_modules, skeleton  # noqa: E402
from safetensors import safe_open  # noqa: E402
from torch import nn  # noqa: E402
from torch_models import NF4, mlp, packed  # noqa: E402

pytestmark = pytest.mark.usefixtures("quiet_transformers")


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
