"""Quantized checkpoints loaded in another dtype than they were saved in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import tiny_models  # noqa: E402  (needs torch)
from halfbyte import BitsAndBytesConfig, quantize_checkpoint  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402

IDS = torch.arange(8)[None]


def config(bits: int) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)


def saved(name: str, bits: int, folder: Path) -> tuple[Any, Path]:
    """The class of a model, and a folder with it in bfloat16 and packed."""
    cls = getattr(transformers, name)
    tiny_models.build(name, torch.bfloat16).save_pretrained(folder / "dense")
    cls.from_pretrained(folder / "dense", quantization_config=config(bits)).save_pretrained(folder / "packed")
    return cls, folder / "packed"


def dtypes(model: nn.Module) -> set[torch.dtype]:
    """Of all parameters that are not packed."""
    return {p.dtype for p in model.parameters() if p.dtype.is_floating_point}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "Qwen2ForCausalLM"])
def test_loaded_dtype_is_that_of_all_that_is_not_packed(
    name: str, dtype: torch.dtype, bits: int, tmp_path: Path
) -> None:
    """Weights kept that of the file, and biases did not: norms with both failed."""
    cls, folder = saved(name, bits, tmp_path)
    model = cls.from_pretrained(folder, dtype=dtype, quantization_config=config(bits)).eval()
    assert dtypes(model) == {dtype}
    same = cls.from_pretrained(folder, quantization_config=config(bits)).eval()
    assert dtypes(same) == {torch.bfloat16}
    with torch.no_grad():
        y = model(IDS).logits
        torch.testing.assert_close(y, same(IDS).logits.to(dtype), rtol=0, atol=0.05)
    assert y.dtype is dtype


@pytest.mark.parametrize("bits", [4, 8])
def test_loaded_dtype_leaves_what_is_kept_in_float32(bits: int, tmp_path: Path) -> None:
    cls, folder = saved("T5ForConditionalGeneration", bits, tmp_path)
    model = cls.from_pretrained(folder, dtype=torch.float16, quantization_config=config(bits))
    kept = [p.dtype for n, p in model.named_parameters() if n.endswith(".wo.weight")]
    assert set(kept) == {torch.float32}


def test_loaded_dtype_of_a_layer_that_was_kept_in_another(tmp_path: Path) -> None:
    cls, folder = saved("MixtralForCausalLM", 4, tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    # transformers 5.0 casts no tensor of a quantized checkpoint that it renames.
    renamed = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 8)
    odd = [name for name in tensors if name.endswith(("layernorm.weight", *([".gate.weight"] if renamed else [])))]
    assert odd
    save_file({n: v.double() if n in odd else v for n, v in tensors.items()}, file, metadata={"format": "pt"})
    model = cls.from_pretrained(folder, quantization_config=config(4)).eval()
    assert dtypes(model) == {torch.bfloat16}
    with torch.no_grad():
        assert model(IDS).logits.dtype is torch.bfloat16


@pytest.mark.parametrize("bits", [4, 8])
def test_loaded_dtype_of_a_checkpoint_whose_config_names_none(bits: int, tmp_path: Path) -> None:
    """A loader takes that of the first float tensor in the file, which may be the float32 of scales."""
    tiny_models.build("GPT2LMHeadModel", torch.bfloat16).save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense/config.json"
    said = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({k: v for k, v in said.items() if k not in ("dtype", "torch_dtype")}), encoding="utf-8")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "packed", config(bits), progress=None)
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "packed", quantization_config=config(bits))
    assert dtypes(model) == {torch.bfloat16}
