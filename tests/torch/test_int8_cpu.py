"""LLM.int8() on the CPU: the compiled kernels against the same arithmetic in torch's operations, and golden vectors."""

from __future__ import annotations

from pathlib import Path

import halfbyte.functional  # noqa: F401 - the operations are registered
import pytest
import torch
from halfbyte import _native
from halfbyte.backends import int8_torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent.parent / "golden" / "int8.safetensors"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SHAPES = ((1, 1, 1), (1, 70, 129), (3, 5, 64), (17, 33, 100), (40, 50, 2051), (2, 3, 0), (0, 4, 8), (4, 0, 8))

ops = torch.ops.halfbyte


def codes_of(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def activations(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """With some columns of outliers, one row of zeros, and values that need float16's rounding."""
    x = torch.randn(m, k) * 2
    x[:, 3::41] *= 9
    x[1:2] = 0
    return x.to(dtype)


def in_torch(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, threshold: float
) -> torch.Tensor:
    """The layer, as words put it."""
    wide, extra, columns = int8_torch.rounded(x), None, None
    if threshold > 0:
        found, columns = int8_torch.outliers(wide, threshold)
        extra = int8_torch.outlier_product(x, codes, columns)
        a, rows = ops.quantize_rows(wide.masked_fill(found, 0.0))
        a = a.masked_fill(columns, 0)
    else:
        a, rows = ops.quantize_rows(wide)
    return int8_torch.epilogue(int8_torch.matmul(a, codes), rows, scales, bias, x.dtype, extra, columns)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_products_of_codes_are_exact(m: int, n: int, k: int) -> None:
    a, b = codes_of(m, k), codes_of(n, k)
    expected = (a.long() @ b.long().T).to(torch.int32)
    assert torch.equal(ops.int8_matmul(a, b), expected)
    assert torch.equal(ops.int8_matmul(a.view(m, 1, k), b), expected.view(m, 1, n))
    assert torch.equal(ops.int8_matmul(a.T.contiguous().T, b.T.contiguous().T), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_scaled_products_have_the_bits_of_the_definition(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    a, b, rows, columns = codes_of(m, k), codes_of(n, k), torch.rand(m), torch.rand(n)
    for bias in (None, torch.randn(n).to(torch.bfloat16)):
        expected = int8_torch.epilogue(int8_torch.matmul(a, b), rows, columns, bias, dtype)
        assert torch.equal(ops.int8_scaled_mm(a, b, rows, columns, bias, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_layers_have_the_bits_of_the_definition(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, codes, scales = activations(m, k, dtype), codes_of(n, k), torch.rand(n)
    for bias in (None, torch.randn(n).to(dtype)):
        expected = in_torch(x, codes, scales, bias, 0.0)
        assert torch.equal(ops.linear_8bit(x, codes, scales, bias, 0.0), expected)
        assert torch.equal(ops.linear_8bit(x.view(1, m, k), codes, scales, bias, 0.0), expected.view(1, m, n))
        assert torch.equal(ops.linear_8bit(x.T.contiguous().T, codes, scales, bias, 0.0), expected)
        # The sum of the outliers' products is in another order.
        expected = in_torch(x, codes, scales, bias, 6.0)
        found = ops.linear_8bit(x, codes, scales, bias, 6.0)
        torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
        # Where nothing is one, it is as if there were no threshold.
        assert torch.equal(ops.linear_8bit(x, codes, scales, bias, 1e6), ops.linear_8bit(x, codes, scales, bias, 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_outliers_are_kept_apart(dtype: torch.dtype) -> None:
    x = activations(6, 130, dtype)
    found, columns = int8_torch.outliers(x.float(), 6.0)
    expected, scales = ops.quantize_rows(x.float().masked_fill(found, 0.0))
    assert columns.any()
    assert not columns.all()
    for given in (x, x.T.contiguous().T, x.view(2, 3, 130)):
        codes, found_scales, found_columns = ops.quantize_rows_outliers(given, 6.0)
        assert codes.shape == given.shape
        assert found_columns.dtype is torch.bool
        assert torch.equal(codes.view(6, 130), expected.masked_fill(columns, 0))
        assert torch.equal(found_scales, scales)
        assert torch.equal(found_columns, columns)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_gradients_are_products_with_the_rounded_weight(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    grad, codes, scales = torch.randn(m, n).to(dtype), codes_of(n, k), torch.rand(n)
    exact = grad.double() @ ops.dequantize_rows(codes, scales, dtype).double()
    found = ops.linear_8bit_backward(grad, codes, scales)
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-4)
    assert torch.equal(ops.linear_8bit_backward(grad.view(1, m, n), codes, scales), found.view(1, m, k))


def test_the_number_of_threads_does_not_matter() -> None:
    x, codes, scales = activations(30, 2000, torch.bfloat16), codes_of(300, 2000), torch.rand(300)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([ops.linear_8bit(x[:m], codes, scales, None, t) for m in (1, 30) for t in (0.0, 6.0)])
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_golden_layers(threshold: float) -> None:
    golden = load_file(GOLDEN)
    name = f"l8.{threshold:.1f}"
    x, y, codes, scales, bias = (golden[f"{name}.{part}"] for part in ("x", "y", "sd.weight", "sd.SCB", "sd.bias"))
    found = ops.linear_8bit(x, codes, scales, bias, threshold)
    # bitsandbytes rounds to float16 more than once on its way.
    torch.testing.assert_close(found, y, rtol=2**-9, atol=2**-9)


def test_a_path_of_this_machine_is_in_use() -> None:
    assert _native.int8_path() in ("scalar", "avx2", "avx512", "vnni", "amx")


def test_wrong_calls_of_the_core() -> None:
    codes, scales, x, out = codes_of(2, 4), torch.ones(2), torch.ones(3, 4), torch.empty(3, 2)
    layer = _native.CpuLinear8bit("float32", 2, 4)
    addresses = x.data_ptr(), codes.data_ptr(), scales.data_ptr(), 0
    layer.forward(3, *addresses, 0.0, out.data_ptr(), 1)
    assert out.isfinite().all()
    with pytest.raises(ValueError, match=r"threshold must be a number of at least 0 .*, got -1"):
        layer.forward(3, *addresses, -1.0, out.data_ptr(), 1)
    with pytest.raises(ValueError, match=r"out must .*"):
        layer.forward(3, *addresses, 0.0, x.data_ptr(), 1)
    with pytest.raises(ValueError, match=r"codes must .*null address"):
        layer.forward(3, x.data_ptr(), 0, scales.data_ptr(), 0, 0.0, out.data_ptr(), 1)
    with pytest.raises(ValueError, match=r'dtype must be one of .*, got "int8"'):
        _native.CpuLinear8bit("int8", 2, 4)
    long, sums = torch.zeros(2, 133145, dtype=torch.int8), torch.empty(2, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"k must be at most 133144 columns, .*, got 133145"):
        _native.int8_matmul(2, 2, 133145, long.data_ptr(), long.data_ptr(), sums.data_ptr(), 1)
