"""`halfbyte.functional`, 8 bits: blocks and rows."""

from __future__ import annotations

import pytest
import torch
from functional_cases import FLOATS, GOLDEN
from halfbyte import functional as F
from halfbyte.state import QuantState
from safetensors import safe_open

# ---- 8 bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("blocksize", [64, 256, 4096, 100, 16384])
def test_blockwise_8bit(blocksize, dtype, nested):
    tensor = torch.randn(30, 701, dtype=dtype)
    codes, state = F.quantize_blockwise(tensor, blocksize=blocksize, nested=nested)
    assert codes.shape == tensor.shape
    assert codes.dtype == torch.uint8
    again = F.dequantize_blockwise(codes, state)
    assert again.dtype == dtype
    error = (again - tensor).abs().float()
    assert error.mean() < 0.02
    read = QuantState.from_dict(state.as_dict())
    assert torch.equal(F.dequantize_blockwise(codes, read), again)
    if not nested:
        same = F.dequantize_blockwise(codes, absmax=state.absmax, blocksize=blocksize)
        assert same.dtype == torch.float32
        assert torch.equal(same.to(dtype), again)


def test_blockwise_8bit_of_less_than_a_block():
    tensor, blocksize = torch.randn(3, 70), 10**12
    codes, state = F.quantize_blockwise(tensor, blocksize=blocksize)
    expected, _ = F.quantize_blockwise(tensor, blocksize=tensor.numel())
    assert state.absmax.tolist() == [tensor.abs().max().item()]
    assert torch.equal(codes, expected)
    values = F.dequantize_blockwise(codes, state)
    assert torch.equal(values, F.dequantize_blockwise(codes, absmax=state.absmax, blocksize=tensor.numel()))


@pytest.mark.parametrize("count", [1, 2, 16, 255, 256])
@pytest.mark.parametrize("shuffled", [False, True])
def test_blockwise_8bit_codes_of_any_map_are_the_nearest(count, shuffled):
    code = torch.linspace(-1, 1, count)
    if shuffled:
        code = code[torch.randperm(count)]
    tensor = torch.cat([torch.ones(1), torch.rand(999) * 2 - 1])
    codes, state = F.quantize_blockwise(tensor, code=code, blocksize=1000)
    assert codes.dtype == torch.uint8
    assert codes.int().max() < count
    assert torch.equal(state.code, code)
    distance = (tensor[:, None] - code[None]).abs()
    torch.testing.assert_close(distance.gather(1, codes.long()[:, None])[:, 0], distance.min(1).values)
    assert torch.equal(F.dequantize_blockwise(codes, state), code[codes.long()])
    assert torch.equal(F.dequantize_blockwise(codes, absmax=state.absmax, code=code), code[codes.long()])


def test_blockwise_8bit_codes_are_the_nearest():
    tensor = torch.cat([torch.ones(1), torch.rand(4000) * 2 - 1, torch.zeros(7)])
    for code in (F.create_dynamic_map(), F.create_dynamic_map(signed=False), F.create_linear_map(),
                 F.create_fp8_map()):  # fmt: skip
        exact = (tensor[:, None] - code[None]).abs().min(1).values
        for blocksize in (4096, 5000):
            codes, state = F.quantize_blockwise(tensor, code=code, blocksize=blocksize)
            assert state.absmax.tolist() == [1.0]
            found = (F.dequantize_blockwise(codes, state) - tensor).abs()
            assert (found <= exact + 1e-7).all()


def test_other_block_sizes_use_the_same_arithmetic():
    tensor = torch.randn(96, 64)
    native, _ = F.quantize_blockwise(tensor, blocksize=64)
    # Blocks of 96 that hold 64 values and zeros have the same scales.
    wide, state = F.quantize_blockwise(torch.nn.functional.pad(tensor, (0, 32)), blocksize=96)
    assert torch.equal(wide[:, :64], native)
    assert len(state.absmax) == 96


def test_blockwise_8bit_writes_where_asked():
    tensor = torch.randn(10, 30)
    codes, state = F.quantize_blockwise(tensor, blocksize=64)
    out, absmax = torch.empty(10, 30, dtype=torch.uint8), torch.empty_like(state.absmax)
    same, other = F.quantize_blockwise(tensor, absmax=absmax, out=out, blocksize=64)
    assert same is out
    assert other.absmax is absmax
    assert torch.equal(out, codes)
    values = torch.empty(30, 10).t()
    assert F.dequantize_blockwise(codes, state, out=values) is values
    assert torch.equal(values, F.dequantize_blockwise(codes, state))


# ---- rows of LLM.int8() ----------------------------------------------------------------------------------------------


def test_golden_rows():
    with safe_open(GOLDEN.with_name("int8.safetensors"), "pt") as file:
        names = {name.partition(".")[0] for name in file.keys() if name.startswith("r")}  # noqa: SIM118
        assert names
        for name in names:
            values, codes, scales, dense = (
                file.get_tensor(f"{name}.{part}") for part in ("input", "CB", "SCB", "dequantized")
            )
            ours, stats, columns = F.int8_vectorwise_quant(values)
            assert torch.equal(ours, codes)
            assert torch.equal(stats, scales.view(-1))
            assert columns is None
            again = F.int8_vectorwise_dequant(codes, scales.view(-1))
            assert torch.equal(again.to(dense.dtype), dense)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_outlier_columns(dtype):
    values = torch.randn(2, 4, 50).to(dtype)
    values[0, 1, 7], values[1, 3, 40] = 8.0, -9.0
    codes, scales, columns = F.int8_vectorwise_quant(values, threshold=6.0)
    assert columns.tolist() == [7, 40]
    assert not codes[..., [7, 40]].any()
    kept = values.masked_fill(values.abs() >= 6, 0).float()
    assert torch.equal(scales, kept.abs().amax(-1).view(-1))
    expected = (kept * 127 / scales.view(2, 4, 1)).round().to(torch.int8)
    expected[..., [7, 40]] = 0
    assert torch.equal(codes, expected)
    assert values[0, 1, 7] == 8.0
    again = F.int8_vectorwise_dequant(codes, scales.half())
    torch.testing.assert_close(again.view(-1, 50), codes.view(-1, 50) * (scales.half().float()[:, None] / 127))
    assert F.int8_vectorwise_quant(values, threshold=20.0)[2].tolist() == []
    assert F.int8_vectorwise_quant(values[0, 1], threshold=6.0)[2].tolist() == [7]
    assert F.int8_vectorwise_quant(values[:, :, :0], threshold=6.0)[0].shape == (2, 4, 0)
    strided = values.transpose(0, 2)
    for a, b in zip(F.int8_vectorwise_quant(strided), F.int8_vectorwise_quant(strided.contiguous()), strict=True):
        assert a is b is None or torch.equal(a, b)


def test_what_rows_refuse():
    with pytest.raises(TypeError, match=r"A: dtype torch.int64 is not one of torch.float16"):
        F.int8_vectorwise_quant(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"A: shape \[\] has no rows"):
        F.int8_vectorwise_quant(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"threshold must be a number of at least 0 .* got -1"):
        F.int8_vectorwise_quant(torch.ones(2, 2), threshold=-1)
    codes, scales, _ = F.int8_vectorwise_quant(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"stats: 1 scales do not fit; A \[2, 2\] has 2 rows"):
        F.int8_vectorwise_dequant(codes, scales[:1])
    with pytest.raises(TypeError, match=r"A: dtype torch.uint8 is not torch.int8"):
        F.int8_vectorwise_dequant(codes.view(torch.uint8), scales)
