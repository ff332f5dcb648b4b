"""What `backends.cuda` does around its kernels: on CPU tensors, with the core's CPU functions in their place."""

from __future__ import annotations

import itertools
import logging

import halfbyte.functional as F
import pytest
import torch
import torch_reference as ref
from cuda_stand_in import StandIn
from halfbyte.backends import cpu as _cpu
from halfbyte.backends import cuda as _cuda
from halfbyte.backends import cuda_8bit, cuda_memory
from halfbyte.codebooks import quant_map
from halfbyte.ops.packed import packed_weight

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
TINY = 2.0**-24  # half a step of float16 below its normal numbers, twice


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The stand-in, in the core's place."""
    stand_in = StandIn()
    for module in (_cuda, cuda_8bit):
        monkeypatch.setattr(module, "_native", stand_in)
    for module in (_cuda, cuda_8bit, cuda_memory):
        monkeypatch.setattr(module, "current_stream", lambda device: 0)
    _cuda._kernel.cache_clear()
    _cuda._linear.cache_clear()
    cuda_8bit._kernel_8bit.cache_clear()
    yield stand_in
    _cuda._kernel.cache_clear()
    _cuda._linear.cache_clear()
    cuda_8bit._kernel_8bit.cache_clear()


def weight(n, k, dtype=torch.float32, *, nested=False, quant_type="nf4", blocksize=64, storage=torch.uint8):
    """The arguments of an operation that a packed weight makes, and its dense values in float64."""
    values = torch.randn(n, k, dtype=dtype) * torch.rand(n, 1, dtype=dtype)
    packed, state = F.quantize_4bit(
        values, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested, quant_storage=storage
    )
    return (packed, *state.scales()), state.weight(), F.dequantize_4bit(packed, state)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_quantize_and_back(native, dtype, nested):
    for shape, blocksize in itertools.product([(64, 64), (7, 65), (1, 1), (3, 0), ()], [32, 64, 4096]):
        values = torch.randn(shape, dtype=dtype)
        for ours, theirs in zip(
            _cuda.quantize_4bit(values, blocksize, "nf4"), _cpu.quantize_4bit(values, blocksize, "nf4"), strict=True
        ):
            assert torch.equal(ours, theirs)
        packed, absmax = _cuda.quantize_4bit(values, blocksize, "nf4")
        scales = _cuda.compress_absmax(absmax) if nested else (absmax, None, None)
        if nested:
            for ours, theirs in zip(scales, _cpu.compress_absmax(absmax), strict=True):
                assert torch.equal(ours, theirs)
            at_once = _cuda.quantize_4bit_nested(values, blocksize, "nf4")
            for ours, theirs in zip(at_once, (packed, *scales), strict=True):
                assert torch.equal(ours, theirs)
            assert torch.equal(_cuda.expand_absmax(*scales), _cpu.expand_absmax(*scales))
        arguments = packed_weight(packed, *scales, values.shape, blocksize, "nf4"), dtype
        assert torch.equal(_cuda.dequantize_4bit(*arguments), _cpu.dequantize_4bit(*arguments))
        out = torch.full_like(values, torch.nan)
        assert _cuda.dequantize_4bit(*arguments, out) is out
        assert torch.equal(out, _cpu.dequantize_4bit(*arguments))
        if values.dim() == 2:
            out = torch.empty(shape[::-1], dtype=dtype).t()
            assert torch.equal(_cuda.dequantize_4bit(*arguments, out), _cpu.dequantize_4bit(*arguments))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("part", [(1, 1), (5000, 1), (5000, 16), (2**30, 256)], ids=str)
def test_products(native, monkeypatch, dtype, nested, part):
    """Every number of rows on every path, weights cut to parts of every size."""
    monkeypatch.setattr(_cuda, "_DENSE_BYTES", part[0])
    monkeypatch.setattr(_cuda, "_DENSE_ROWS", part[1])
    for (n, k), blocksize in itertools.product([(96, 128), (7, 65), (129, 64)], [32, 64, 256]):
        tensors, how, dense = weight(n, k, dtype, nested=nested, blocksize=blocksize)
        for m in (1, 4, 5, 16, 33, 101):
            x = torch.randn(m, k, dtype=dtype)
            bias = torch.randn(n) if m % 2 else None
            y = _cuda.linear_4bit(x, packed_weight(*tensors, *how), bias)
            assert (y.shape, y.dtype) == ((m, n), dtype)
            bound = 2 * ref.product_bound(x, dense, bias) + TINY
            assert ((y.double() - ref.linear(x, dense, bias)).abs() <= bound).all(), (n, k, blocksize, m)
            grad = torch.randn(m, n, dtype=dtype)
            g = _cuda.linear_4bit_backward(grad, packed_weight(*tensors, *how))
            bound = 2 * ref.product_bound(grad, dense.T, None) + TINY
            assert ((g.double() - ref.linear(grad, dense.T, None)).abs() <= bound).all(), (n, k, blocksize, m)


def test_which_kernel_is_taken(native, monkeypatch):
    tensors, how, _ = weight(96, 128, torch.bfloat16)
    odd, odd_how, _ = weight(96, 65, torch.bfloat16)

    def calls(x, tensors=tensors, how=how):
        native.calls.clear()
        native.rows.clear()
        _cuda.linear_4bit(x, packed_weight(*tensors, *how), None)
        return native.calls, native.rows

    for m in (1, 17, 64):
        assert calls(torch.randn(m, 128, dtype=torch.bfloat16)) == (["product"], [m])
    assert calls(torch.randn(65, 128, dtype=torch.bfloat16))[0] == ["dequantize"]
    monkeypatch.setattr(_cuda, "_LARGE", 96 * 128)
    _cuda._kernel.cache_clear()
    assert calls(torch.randn(128, 128, dtype=torch.bfloat16)) == (["product"], [128])
    assert calls(torch.randn(129, 128, dtype=torch.bfloat16))[0] == ["dequantize"]
    # More rows are for a kernel where that pays.
    native.paying = {200, 1024, 1025}
    for m, way in ((200, "product"), (201, "dequantize"), (1024, "product"), (1025, "dequantize")):
        assert calls(torch.randn(m, 128, dtype=torch.bfloat16))[0] == [way], m
    # Rows are those of the matrix that leading dimensions make.
    assert calls(torch.randn(2, 3, 128, dtype=torch.bfloat16))[1] == [6]
    assert calls(torch.randn(0, 128, dtype=torch.bfloat16))[0] == []
    # What the fused product does not take: few rows go to the plain one, more to a dense product.
    assert calls(torch.randn(1, 65, dtype=torch.bfloat16), odd, odd_how)[0] == ["product"]
    assert calls(torch.randn(2, 65, dtype=torch.bfloat16), odd, odd_how)[0] == ["dequantize"]
    assert calls(torch.randn(3, 128))[0] == ["product"]
    assert calls(torch.randn(4, 128))[0] == ["dequantize"]
    shifted = (torch.nn.functional.pad(tensors[0].view(-1), (1, 0))[1:].view(-1, 1), *tensors[1:])
    for m in (8, 200):
        assert calls(torch.randn(m, 128, dtype=torch.bfloat16), shifted)[0] == ["dequantize"]


@pytest.mark.parametrize("nested", [False, True])
def test_which_way_a_gradient_is_made(native, nested):
    """By the kernel where that pays and the codes are aligned, whatever the layout of the gradient of y."""
    tensors, how, dense = weight(96, 128, torch.bfloat16, nested=nested)
    native.paying = {6, 20}
    shifted = (torch.nn.functional.pad(tensors[0].view(-1), (1, 0))[1:].view(-1, 1), *tensors[1:])
    for of_weight, dy, way in (
        (tensors, torch.randn(20, 96, dtype=torch.bfloat16), "dgrad"),
        (tensors, torch.randn(2, 3, 96, dtype=torch.bfloat16), "dgrad"),
        (tensors, torch.randn(96, 20, dtype=torch.bfloat16).t(), "dgrad"),
        (tensors, torch.randn(20 * 96 + 1, dtype=torch.bfloat16)[1:].view(20, 96), "dgrad"),
        (tensors, torch.randn(21, 96, dtype=torch.bfloat16), "dequantize"),
        (shifted, torch.randn(20, 96, dtype=torch.bfloat16), "dequantize"),
    ):
        native.calls.clear()
        dx = _cuda.linear_4bit_backward(dy, packed_weight(*of_weight, *how))
        assert native.calls == [way]
        expected = ref.linear(dy, dense.T, None)
        assert dx.shape == (*dy.shape[:-1], 128)
        assert ((dx.double() - expected).abs() <= 2 * ref.product_bound(dy, dense.T, None)).all()


def test_inputs_of_any_layout(native):
    tensors, how, dense = weight(96, 128, torch.bfloat16)
    wide = torch.randn(3, 300, dtype=torch.bfloat16)
    for x in (
        wide[:, 1:129],
        wide[:, ::2][:, :128],
        wide.view(-1)[1:129].view(1, 128),
        torch.randn(128, 3).t().bfloat16(),
    ):
        expected = ref.linear(x, dense, None)
        y = _cuda.linear_4bit(x, packed_weight(*tensors, *how), None)
        assert ((y.double() - expected).abs() <= 2 * ref.product_bound(x, dense, None)).all()


def test_a_slow_way_is_said_once(native, caplog):
    tensors, how, _ = weight(96, 65, torch.bfloat16)
    x = torch.randn(1, 65, dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING, logger="halfbyte"):
        for _ in range(3):
            _cuda.linear_4bit(x, packed_weight(*tensors, *how), None)
    (record,) = caplog.records
    assert "in_features is no multiple of 64" in record.getMessage()
    assert "[96, 65]" in record.getMessage()
    caplog.clear()
    native.capability = (7, 5)
    _cuda._kernel.cache_clear()
    tensors, how, _ = weight(64, 64, torch.bfloat16)
    with caplog.at_level(logging.WARNING, logger="halfbyte"):
        _cuda.linear_4bit(torch.randn(1, 64, dtype=torch.bfloat16), packed_weight(*tensors, *how), None)
    assert "compute capability 7.5" in caplog.text
    caplog.clear()
    tensors, how, _ = weight(64, 64, torch.float16)
    with caplog.at_level(logging.WARNING, logger="halfbyte"):
        _cuda.linear_4bit(torch.randn(1, 64, dtype=torch.float16), packed_weight(*tensors, *how), None)
    assert not caplog.records


@pytest.mark.parametrize("nested", [False, True])
def test_embedding(native, nested):
    tensors, how, dense = weight(40, 33, nested=nested, storage=torch.bfloat16)
    for indices in (torch.randint(0, 40, (3, 4)), torch.tensor([], dtype=torch.int64), torch.tensor(7).int()):
        y = _cuda.embedding_4bit(indices, packed_weight(*tensors, *how), torch.float32)
        assert torch.equal(y, dense[indices.long()])
    y = _cuda.embedding_4bit(torch.tensor([0, 40, -1]), packed_weight(*tensors, *how), torch.float16)
    assert y.isnan().any(1).tolist() == [False, True, True]


def test_8_bits(native):
    values, code = torch.randn(5, 77, dtype=torch.bfloat16), F.create_dynamic_map()
    ours, theirs = _cuda.quantize_blockwise(values, code, 64), _cpu.quantize_blockwise(values, code, 64)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    for out in (None, torch.empty(77, 5, dtype=torch.bfloat16).t(), torch.empty(5, 77, dtype=torch.bfloat16)):
        back = _cuda.dequantize_blockwise(*ours, code, 64, torch.bfloat16, out)
        assert torch.equal(back, _cpu.dequantize_blockwise(*ours, code, 64, torch.bfloat16))


def test_rows(native):
    for shape in ((5, 77), (3, 0), (2, 3, 4)):
        ours, theirs = (module.quantize_rows(values) for values in (torch.randn(shape),) for module in (_cuda, _cpu))
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(_cuda.dequantize_rows(*ours, torch.float16), _cpu.dequantize_rows(*ours, torch.float16))


def test_maps_are_made_by_kernels(native):
    for quant_type in ("nf4", "fp4"):
        ours, theirs = _cuda.quant_map(quant_type, torch.device("cpu")), quant_map(quant_type)
        assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
    ours, theirs = _cuda.dynamic_map(torch.device("cpu")), F.create_dynamic_map()
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


def test_arguments_are_checked(native):
    tensors, how, _ = weight(16, 32)
    with pytest.raises(ValueError, match=r"x: shape .* does not end with in_features, 32"):
        _cuda.linear_4bit(torch.randn(3, 31), packed_weight(*tensors, *how), None)
    with pytest.raises(ValueError, match="absmax: is on meta"):
        _cuda.dequantize_4bit(packed_weight(tensors[0], tensors[1].to("meta"), None, None, *how), torch.float32)
    assert native.calls == []


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_int8(native, dtype):
    """Leading dimensions, strides and alignments, nothing at all; a bias of another type."""
    memory = torch.zeros(5 * 48 + 1, dtype=torch.int8)
    codes = memory[1:].view(5, 48).copy_(torch.randint(-127, 128, (5, 48)))
    scales = torch.rand(5) + 0.1
    x = torch.randn(2, 3, 96)[..., ::2].to(dtype)
    x[0, 1, 5] = 30
    for bias, threshold in ((None, 0.0), (torch.randn(5), 6.0), (torch.randn(5, dtype=torch.float16), 0.0)):
        ours = _cuda.linear_8bit(x, codes, scales, bias, threshold)
        assert torch.equal(ours, _cpu.linear_8bit(x, codes, scales, bias, threshold))
    assert native.rows == [6] * 3
    for theirs, ours in zip(_cpu.quantize_rows_outliers(x, 6.0), _cuda.quantize_rows_outliers(x, 6.0), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype is theirs.dtype
    a, row_scales = _cpu.quantize_rows(x)
    assert torch.equal(_cuda.int8_matmul(a, codes), _cpu.int8_matmul(a, codes))
    arguments = a, codes, row_scales, scales, torch.randn(5), dtype
    assert torch.equal(_cuda.int8_scaled_mm(*arguments), _cpu.int8_scaled_mm(*arguments))
    native.calls.clear()
    assert _cuda.linear_8bit(x[:0], codes, scales, None, 6.0).shape == (0, 3, 5)
    assert _cuda.linear_8bit(x, codes[:0], scales[:0], None, 0.0).shape == (2, 3, 0)
    assert _cuda.int8_matmul(a, codes[:0]).shape == (2, 3, 0)
    assert not _cuda.quantize_rows_outliers(x[:0], 6.0)[2].any()
    assert native.calls == []


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_int8_backward(native, dtype):
    codes, scales = torch.randint(-127, 128, (7, 20), dtype=torch.int8), torch.rand(7)
    grad = torch.randn(2, 3, 7).to(dtype)
    dense = _cpu.dequantize_rows(codes, scales, dtype)
    assert torch.equal(_cuda.linear_8bit_backward(grad, codes, scales), grad @ dense)
    assert native.calls == ["dequantize rows"]
    assert not _cuda.linear_8bit_backward(grad[..., :0], codes[:0], scales[:0]).any()
