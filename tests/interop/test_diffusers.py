"""diffusers' `from_pretrained` with halfbyte's config: loaded, saved, loaded again, dequantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import halfbyte  # noqa: E402
from halfbyte.nn import Linear4bit, Linear8bitLt  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

CONFIGS = {
    4: halfbyte.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    8: halfbyte.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0),
}


@pytest.fixture(scope="module")
def diffusers() -> Any:
    """The library, which takes seconds to import: not while tests are collected."""
    return pytest.importorskip("diffusers")


def packed(model: torch.nn.Module, bits: int) -> dict[str, torch.Tensor]:
    cls = {4: Linear4bit, 8: Linear8bitLt}[bits]
    return {name: m.weight.data for name, m in model.named_modules() if isinstance(m, cls)}


@pytest.mark.parametrize("bits", CONFIGS)
@pytest.mark.parametrize("size", ["10GB", "20KB"])
def test_diffusers_loads_saves_and_dequantizes(diffusers: Any, tmp_path: Path, bits: int, size: str) -> None:
    torch.manual_seed(0)
    dense = diffusers.Transformer2DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=32, num_layers=1, norm_num_groups=8
    )
    dense.save_pretrained(tmp_path / "dense")
    config = CONFIGS[bits]
    # Without a dtype, diffusers loads quantized models in float16.
    how = {"quantization_config": config, "torch_dtype": torch.float32}
    model = diffusers.Transformer2DModel.from_pretrained(tmp_path / "dense", **how)
    found = packed(model, bits)
    assert getattr(model, f"is_loaded_in_{bits}bit")
    linear = {name for name, m in dense.named_modules() if type(m) is torch.nn.Linear}
    assert linear
    assert found.keys() == linear
    model.save_pretrained(tmp_path / "packed", max_shard_size=size)
    again = diffusers.Transformer2DModel.from_pretrained(tmp_path / "packed", **how)
    assert packed(again, bits).keys() == linear
    assert all(torch.equal(value, found[name]) for name, value in packed(again, bits).items())
    x = torch.randn(1, 32, 4, 4)
    with torch.no_grad():
        expected = model(x, return_dict=False)[0]
        torch.testing.assert_close(again(x, return_dict=False)[0], expected)
        # 8-bit layers quantize their inputs too.
        close = {4: {"rtol": 1e-4, "atol": 1e-4}, 8: {"rtol": 0.0, "atol": 0.02}}[bits]
        torch.testing.assert_close(again.dequantize()(x, return_dict=False)[0], expected, **close)


def test_diffusers_8bit_names_weights_that_are_not_finite(diffusers: Any, tmp_path: Path) -> None:
    dense = diffusers.Transformer2DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=32, num_layers=1, norm_num_groups=8
    )
    with torch.no_grad():
        dense.transformer_blocks[0].attn1.to_q.weight[2, 3] = float("inf")
    dense.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn1\.to_q\.weight: .*contains inf at \[2, 3\]"):
        diffusers.Transformer2DModel.from_pretrained(tmp_path, quantization_config=CONFIGS[8])


@pytest.mark.parametrize("how", ["loaded", "quantized"])
def test_diffusers_saves_the_compute_dtype_that_was_used(diffusers: Any, how: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = halfbyte.BitsAndBytesConfig(load_in_4bit=True)
    dense = diffusers.Transformer2DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=32, num_layers=1, norm_num_groups=8
    ).to(torch.bfloat16)
    if how == "loaded":
        dense.save_pretrained(tmp_path / "dense")
        load = diffusers.Transformer2DModel.from_pretrained
        model = load(tmp_path / "dense", quantization_config=config, torch_dtype=torch.bfloat16)
    else:
        model = halfbyte.quantize_model(dense, config)
    model.save_pretrained(tmp_path / "packed")
    again = diffusers.Transformer2DModel.from_pretrained(
        tmp_path / "packed", quantization_config=config, torch_dtype=torch.bfloat16
    )
    layers = [m for m in again.modules() if isinstance(m, Linear4bit)]
    assert {layer.compute_dtype for layer in layers} == {torch.bfloat16}
    x = torch.randn(1, 32, 4, 4, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(again(x, return_dict=False)[0], model(x, return_dict=False)[0])


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", ["10GB", "10KB"])
def test_diffusers_reads_codes_stored_as_floats(
    diffusers: Any, tmp_path: Path, storage: torch.dtype, size: str
) -> None:
    # diffusers casts what looks like floats to the dtype of the model, which is another one.
    torch.manual_seed(0)
    dense = diffusers.Transformer2DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=32, num_layers=1, norm_num_groups=8
    )
    dense.save_pretrained(tmp_path / "dense")
    config = halfbyte.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=storage)
    how = {"quantization_config": config, "torch_dtype": torch.float16}
    model = diffusers.Transformer2DModel.from_pretrained(tmp_path / "dense", **how)
    model.save_pretrained(tmp_path / "packed", max_shard_size=size)
    found = packed(diffusers.Transformer2DModel.from_pretrained(tmp_path / "packed", **how), 4)
    assert {value.dtype for value in found.values()} == {storage}
    for name, value in packed(model, 4).items():
        assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), name


@pytest.mark.parametrize("lost", ["", ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4"])
def test_diffusers_names_a_packed_weight_that_lacks_a_part(diffusers: Any, tmp_path: Path, lost: str) -> None:
    dense = diffusers.Transformer2DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=32, num_layers=1, norm_num_groups=8
    )
    model = halfbyte.quantize_model(dense, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, progress=False)
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    weight = next(name.removesuffix(".absmax") for name in tensors if name.endswith("to_q.weight.absmax"))
    del tensors[weight + lost]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{weight}: is packed, but the checkpoint lacks {weight}{lost}"):
        diffusers.Transformer2DModel.from_pretrained(tmp_path, quantization_config=CONFIGS[4])
