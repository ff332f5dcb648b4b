"""A source whose stored dtypes are not the one that its config.json names: cast as transformers casts while loading."""

from __future__ import annotations

import json
from pathlib import Path

import halfbyte
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM


def write_source(folder: Path, stored: torch.dtype, named: str, norms: torch.dtype | None = None) -> None:
    """A tiny Llama stored in one dtype, its norms perhaps in another, with a config.json that names a third."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=256
    )
    LlamaForCausalLM(config).to(stored).save_pretrained(folder)
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**facts, "dtype": named}))
    if norms is not None:
        file = folder / "model.safetensors"
        tensors = {name: t.to(norms) if "norm" in name else t for name, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("stored", "named", "norms"),
    [
        (torch.bfloat16, "bfloat16", torch.float32),
        (torch.float32, "bfloat16", None),
        (torch.bfloat16, "float32", None),
        (torch.float32, "float16", None),
        (torch.float16, "bfloat16", None),
    ],
    ids=str,
)
def test_weights_are_cast_as_a_loader_casts_them(tmp_path, stored, named, norms):
    source, ours, theirs = tmp_path / "source", tmp_path / "ours", tmp_path / "theirs"
    write_source(source, stored, named, norms)
    config = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": named,
    }
    halfbyte.quantize_checkpoint(source, ours, config)
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitsAndBytesConfig(**config), device_map="cpu"
    )
    model.save_pretrained(theirs)
    expected, found = load_file(theirs / "model.safetensors"), load_file(ours / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    # Runs, which takes one dtype throughout; and a fresh quantization finds the same.
    tokens = torch.arange(8)[None]
    logits = [AutoModelForCausalLM.from_pretrained(f, device_map="cpu")(tokens).logits for f in (ours, theirs)]
    assert torch.equal(*logits)
    assert halfbyte.verify_checkpoint(source, ours).ok


def test_another_dtype_may_be_asked_for(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    write_source(source, torch.float32, "float32")
    halfbyte.quantize_checkpoint(source, out, dtype=torch.bfloat16)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    tensors = load_file(out / "model.safetensors")
    assert tensors["model.norm.weight"].dtype == torch.bfloat16
    plan = halfbyte.plan_checkpoint(source, dtype="bfloat16")
    reasons = {t.name: t.reason for t in plan.tensors}
    assert reasons["model.norm.weight"].endswith("float32 becomes bfloat16")
    with pytest.raises(ValueError, match="dtype must be one of bfloat16, float16, float32, got 'float64'"):
        halfbyte.quantize_checkpoint(source, tmp_path / "no", dtype="float64")


def test_values_too_large_for_the_dtype_are_named(tmp_path):
    source = tmp_path / "source"
    write_source(source, torch.float32, "float16")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 70000.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(halfbyte.CheckpointError, match=r"up_proj\.weight.*element 389"):
        halfbyte.quantize_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
