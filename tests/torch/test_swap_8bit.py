"""`quantize_model`, `dequantize_model` and `load_quantized` in 8 bits (LLM.int8()), alone and beside 4 bits."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import halfbyte  # noqa: E402  (needs torch)
import tiny_models  # noqa: E402
from halfbyte.models.quantize import dequantize_model  # noqa: E402
from halfbyte.nn import Embedding8bit, Linear4bit, Linear8bitLt  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402

INT8 = {"load_in_8bit": True}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Any:
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


def mlp(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96, **options), nn.GELU(), nn.Linear(96, 32, **options))


def empty(make: Any, *arguments: Any) -> Any:
    with torch.device("meta"):
        return make(*arguments)


def packed8(model: nn.Module) -> list[str]:
    """Paths of the 8-bit layers."""
    return [name for name, m in model.named_modules() if isinstance(m, Linear8bitLt)]


# ---- quantize_model, dequantize_model --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantize_model_8bit_there_and_back(dtype: torch.dtype) -> None:
    dense = mlp(dtype=dtype)
    model = halfbyte.quantize_model(copy.deepcopy(dense), {**INT8, "llm_int8_threshold": 3.0})
    assert packed8(model) == ["0", "2"]
    for layer, old in ((model[0], dense[0]), (model[2], dense[2])):
        codes, scales, _ = halfbyte.functional.int8_vectorwise_quant(old.weight.detach().half())
        assert torch.equal(layer.weight.data, codes)
        assert torch.equal(layer.weight.SCB, scales)
        assert layer.state.threshold == 3.0
        assert not layer.weight.requires_grad
        assert torch.equal(layer.bias, old.bias)
    x = torch.randn(5, 64, dtype=dtype)
    torch.testing.assert_close(model(x), dense(x), rtol=0, atol=0.05)
    back = dequantize_model(model)
    assert type(back[0]) is nn.Linear
    assert back[0].weight.dtype is dtype
    assert back[0].weight.requires_grad
    torch.testing.assert_close(back(x), dense(x), rtol=0, atol=0.05)


def test_dequantize_model_8bit_dtype_of_layers_without_bias() -> None:
    model = halfbyte.quantize_model(mlp(bias=False, dtype=torch.bfloat16), INT8)
    assert dequantize_model(copy.deepcopy(model))[0].weight.dtype is torch.bfloat16
    assert dequantize_model(model, torch.float16)[0].weight.dtype is torch.float16


def test_quantize_model_8bit_keeps_float_weights_that_are_trained() -> None:
    dense = mlp()
    model = halfbyte.quantize_model(copy.deepcopy(dense), {**INT8, "llm_int8_has_fp16_weight": True})
    assert packed8(model) == ["0", "2"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(8, 64)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    optimizer.step()
    assert not torch.equal(model[0].weight, dense[0].weight)
    trained = model[0].weight.detach().clone()
    assert torch.equal(dequantize_model(model)[0].weight, trained)


def test_quantize_model_8bit_conv1d_and_tells_transformers(tmp_path: Path) -> None:
    model = halfbyte.quantize_model(tiny_models.build("GPT2LMHeadModel", torch.float32), INT8)
    assert len(packed8(model)) == 8
    assert model.is_loaded_in_8bit
    assert not hasattr(model, "is_loaded_in_4bit")
    assert model.config.quantization_config.load_in_8bit
    ids = torch.arange(8)[None]
    with torch.no_grad():
        want = model(ids).logits
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert (written["load_in_8bit"], written["load_in_4bit"], written["llm_int8_threshold"]) == (True, False, 6.0)
    blank = empty(transformers.GPT2LMHeadModel, tiny_models.tiny_config("GPT2LMHeadModel"))
    again = halfbyte.load_quantized(blank, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, want)
        dense = again.dequantize()
        assert type(dense.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
        torch.testing.assert_close(dense(ids).logits, want, rtol=0, atol=0.05)


def test_quantize_model_8bit_from_a_checkpoint(tmp_path: Path) -> None:
    for name in ("LlamaForCausalLM", "GPT2LMHeadModel"):
        folder = tiny_models.save(name, tmp_path / name)
        cls = getattr(transformers, name)
        model = halfbyte.quantize_model(empty(cls, tiny_models.tiny_config(name)), INT8, checkpoint=folder)
        want = halfbyte.quantize_model(cls.from_pretrained(folder), INT8)
        ours, theirs = model.state_dict(), want.state_dict()
        assert set(ours) == set(theirs)
        assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 7e4])
def test_quantize_model_8bit_names_weights_that_are_not_finite_before_anything_changes(value: float) -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[1, 7] = value
    with pytest.raises(ValueError, match=r"^2\.weight: contains .* at \[1, 7\]; legal are finite values"):
        halfbyte.quantize_model(model, INT8)
    assert packed8(model) == []
    assert packed8(halfbyte.quantize_model(model, INT8, skip=["2"])) == ["0"]


def test_quantize_model_8bit_weight_of_a_checkpoint_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[1, 7] = float("nan")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    model = empty(mlp)
    with pytest.raises(ValueError, match=r"model\.safetensors: 2\.weight: contains nan at \[1, 7\]; legal are finite"):
        halfbyte.quantize_model(model, INT8, checkpoint=tmp_path)
    assert packed8(model) == []
    assert all(p.is_meta for p in model.parameters())
    assert packed8(halfbyte.quantize_model(model, INT8, checkpoint=tmp_path, skip=["2"])) == ["0"]


def test_quantize_model_a_second_call_packs_the_rest_in_another_way() -> None:
    model = halfbyte.quantize_model(mlp(), INT8, skip=["2"])
    first = model[0]
    halfbyte.quantize_model(model, NF4)
    assert model[0] is first
    assert isinstance(model[2], Linear4bit)
    with pytest.raises(ValueError, match="2 layers are packed already"):
        halfbyte.quantize_model(model, INT8)
    dense = dequantize_model(model)
    assert type(dense[0]) is type(dense[2]) is nn.Linear


def test_quantize_model_rule_makes_one_layer_8_bits(tmp_path: Path) -> None:
    model = tiny_models.build("LlamaForCausalLM", torch.float32)
    halfbyte.quantize_model(model, NF4, rules=[r"\.mlp\.down_proj\.=int8"])
    assert packed8(model) == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert sum(isinstance(m, Linear4bit) for m in model.modules()) == 12
    assert model.is_loaded_in_4bit
    assert model.is_loaded_in_8bit
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert (written["load_in_4bit"], written["load_in_8bit"]) == (True, True)
    blank = empty(transformers.LlamaForCausalLM, tiny_models.tiny_config("LlamaForCausalLM"))
    again = halfbyte.load_quantized(blank, tmp_path).eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_quantize_model_8bit_with_a_rule_for_4_bits_says_which(tmp_path: Path) -> None:
    model = tiny_models.build("LlamaForCausalLM", torch.float32)
    halfbyte.quantize_model(model, INT8, rules=[r"\.q_proj\.=fp4", r"\.mlp\.=nf4"]).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert (written["load_in_4bit"], written["load_in_8bit"], written["bnb_4bit_quant_type"]) == (True, True, "nf4")


# ---- load_quantized --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of a small plain module, one layer of 8 bits and one of 4."""
    model = halfbyte.quantize_model(halfbyte.quantize_model(mlp(), INT8, skip=["2"]), NF4)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def test_load_quantized_takes_both_kinds_from_one_checkpoint(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        model = halfbyte.load_quantized(empty(mlp), folder)
    assert "loaded 1 4-bit and 1 8-bit layers" in caplog.text
    assert (type(model[0]), type(model[2])) == (Linear8bitLt, Linear4bit)
    assert model[0].state.threshold == 6.0
    want = halfbyte.quantize_model(halfbyte.quantize_model(mlp(), INT8, skip=["2"]), NF4)
    x = torch.randn(3, 64)
    assert torch.equal(model(x), want(x))
    # Into a model that has them already.
    assert torch.equal(halfbyte.load_quantized(want, folder)(x), model(x))
    saved = load_file(folder / "model.safetensors")
    assert model.state_dict().keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_load_quantized_takes_the_threshold_of_the_config(folder: Path) -> None:
    saved = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 1.5}
    (folder / "config.json").write_text(json.dumps({"quantization_config": saved}), encoding="utf-8")
    assert halfbyte.load_quantized(empty(mlp), folder)[0].state.threshold == 1.5


def test_load_quantized_embedding_of_8_bits(tmp_path: Path) -> None:
    table = nn.Embedding(40, 64, padding_idx=3)
    made = Embedding8bit(40, 64)
    made.load_state_dict(table.state_dict())
    save_file({f"0.{name}": value for name, value in made.state_dict().items()}, tmp_path / "model.safetensors")
    model = halfbyte.load_quantized(nn.Sequential(empty(nn.Embedding, 40, 64)), tmp_path)
    assert isinstance(model[0], Embedding8bit)
    rows = torch.arange(40)
    torch.testing.assert_close(model(rows), table(rows), rtol=0, atol=0.05)
    assert type(dequantize_model(model)[0]) is nn.Embedding


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda s: s.pop("0.SCB"),
            "model.safetensors: 0.weight_format is a part of a packed weight, but the checkpoint lacks 0.SCB; it",
        ),
        (lambda s: (s.pop("0.SCB"), s.pop("0.weight_format")), "0.weight is torch.int8, but its scales 0.SCB are"),
        (
            lambda s: s.pop("0.weight"),
            "but the checkpoint lacks 0.weight; it is incomplete: save, or download, it again",
        ),
        (
            lambda s: s.update({"0.SCB": torch.ones(95)}),
            "0.weight: SCB must have one scale per row, shape [96], got [95]",
        ),
        (lambda s: s.update({"0.SCB": torch.ones(96, 1)}), "shape [96], got [96, 1]"),
        (lambda s: s.update({"0.SCB": torch.ones(96).double()}), "SCB must be torch.float32, got torch.float64"),
        (lambda s: s.update({"0.weight": s["0.weight"].half()}), "weight must be torch.int8"),
        (
            lambda s: s.update({"0.weight": s["0.weight"][:, :-1].clone()}),
            "holds [96, 63], 0 of the model has [96, 64]",
        ),
        (lambda s: s.update({"0.weight_format": torch.tensor(1)}), "weight_format must be 0 (rows), got 1"),
        (lambda s: s.update({"0.weight.absmax": torch.ones(96)}), "0.weight: has the parts of 4 bits and of 8 bits"),
        (
            lambda s: s.update({"7.SCB": torch.ones(9), "7.weight_format": torch.tensor(0).byte()}),
            " is a part of a packed weight, but the checkpoint lacks 7.weight; it is incomplete",
        ),
    ],
)
def test_load_quantized_8bit_that_does_not_fit_changes_nothing(change: Any, text: str, folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    model = empty(mlp)
    with pytest.raises(halfbyte.CheckpointError) as caught:
        halfbyte.load_quantized(model, folder)
    assert text in str(caught.value)
    assert str(folder) in str(caught.value)
    assert all(p.is_meta for p in model.parameters())
    assert packed8(model) == []


def test_load_quantized_8bit_unpacks_layers_whose_class_reads_the_weight(tmp_path: Path) -> None:
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(input, self.weight * 2, self.bias)

    layer = Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu")
    save_file({f"0.{name}": value for name, value in layer.state_dict().items()}, tmp_path / "model.safetensors")
    model = halfbyte.load_quantized(nn.Sequential(empty(Scaled, 64, 32)), tmp_path)
    assert type(model[0]) is Scaled
    assert torch.equal(model[0].weight, layer.dequantize())
