"""8-bit rows on the processor: against golden vectors of bitsandbytes on CUDA, and numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import reference
from halfbyte import _native
from safetensors import safe_open

GOLDEN = Path(__file__).parent / "golden" / "int8.safetensors"
STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def raw(array: np.ndarray, dtype: str | None = None) -> tuple[int, int, str]:
    """What the compiled core takes for an array."""
    return array.ctypes.data, array.size, dtype or array.dtype.name


def quantize_rows(matrix: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    codes, scales = np.full(matrix.shape, 99, np.int8), np.full(len(matrix), np.nan, np.float32)
    _native.quantize_rows(raw(matrix, dtype), raw(codes), raw(scales), *matrix.shape)
    return codes, scales


def dequantize_rows(codes: np.ndarray, scales: np.ndarray, dtype: str) -> np.ndarray:
    out = np.full(codes.shape, 0x7E00, STORED[dtype])
    _native.dequantize_rows(raw(codes), raw(scales), raw(out, dtype), *codes.shape)
    return out


def as_defined(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By the words: float32 product, float32 quotient, the nearest integer, ties to even."""
    scales = np.fmax.reduce(np.abs(values), axis=1, initial=0.0).astype(np.float32)
    with np.errstate(all="ignore"):
        quotient = values * np.float32(127) / scales[:, None]
    return np.nan_to_num(np.rint(quotient)).astype(np.int8), scales


@pytest.mark.parametrize("name", ["r0", "r1", "r2"])
def test_golden_rows(name: str) -> None:
    with safe_open(GOLDEN, "pt") as file:
        matrix, codes, scales, back = (
            file.get_tensor(f"{name}.{part}") for part in ("input", "CB", "SCB", "dequantized")
        )
    found, found_scales = np.empty(matrix.shape, np.int8), np.empty(len(matrix), np.float32)
    dtype = str(matrix.dtype).removeprefix("torch.")
    _native.quantize_rows((matrix.data_ptr(), matrix.numel(), dtype), raw(found), raw(found_scales), *matrix.shape)
    np.testing.assert_array_equal(found, codes.numpy())
    np.testing.assert_array_equal(found_scales, scales.numpy())
    np.testing.assert_array_equal(dequantize_rows(found, found_scales, "float32"), back.numpy())


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("shape", [(1, 1), (3, 255), (7, 256), (400, 300), (2, 70_000), (0, 5), (5, 0)])
def test_rows(shape: tuple[int, int], dtype: str) -> None:
    values = np.random.default_rng(shape).standard_normal(shape, np.float32)
    values[1:2] = 0
    values.reshape(-1)[::97] = np.nan
    matrix = reference.from_float32(values, dtype).reshape(shape)
    wide = np.asarray(reference.to_float32(matrix, dtype)).reshape(shape)
    codes, scales = quantize_rows(matrix, dtype)
    expected, expected_scales = as_defined(wide)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(scales, expected_scales)
    back = codes.astype(np.float32) * scales[:, None] * np.float32(1 / np.float32(127))
    found = dequantize_rows(codes, scales, dtype)
    np.testing.assert_array_equal(found, reference.from_float32(back, dtype).reshape(shape))


def test_rows_whose_product_with_127_would_overflow() -> None:
    largest = np.finfo(np.float32).max
    codes, scales = quantize_rows(np.array([[largest, largest / 2, -largest / 127, 1.0]], np.float32), "float32")
    assert scales[0] == largest
    assert codes.tolist() == [[127, 64, -1, 0]]


def test_any_number_of_threads() -> None:
    matrix = np.random.default_rng(1).standard_normal((700, 401), np.float32)
    before = _native.get_threads()
    try:
        results = []
        for threads in (1, 3):
            _native.set_threads(threads)
            results.append(quantize_rows(matrix, "float32"))
    finally:
        _native.set_threads(before)
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_wrong_arguments() -> None:
    matrix, codes, scales = np.ones((2, 3), np.float32), np.ones((2, 3), np.int8), np.ones(2, np.float32)
    call = _native.quantize_rows
    with pytest.raises(ValueError, match=r"codes must be 6 elements long \(rows x columns\), got 5"):
        call(raw(matrix), raw(codes.reshape(-1)[:5]), raw(scales), 2, 3)
    with pytest.raises(ValueError, match=r"input must be 9 elements long.*, got 6"):
        call(raw(matrix), raw(codes), raw(scales), 3, 3)
    with pytest.raises(ValueError, match=r"scales must be 3 elements long \(one scale per row\), got 2"):
        call(raw(matrix), raw(codes), raw(scales), 3, 2)
    with pytest.raises(ValueError, match=r"codes must be of dtype .*, got uint8"):
        call(raw(matrix), raw(codes, "uint8"), raw(scales), 2, 3)
    with pytest.raises(ValueError, match=r"input must be of dtype .*, got int8"):
        call(raw(codes), raw(codes), raw(scales), 2, 3)
    with pytest.raises(ValueError, match="scales must be memory of its own, got the memory of input"):
        call(raw(matrix), raw(codes), (matrix.ctypes.data, 2, "float32"), 2, 3)
    with pytest.raises(ValueError, match="out must be memory of its own, got the memory of codes"):
        _native.dequantize_rows(raw(codes), raw(scales), (codes.ctypes.data // 4 * 4, 1, "float32"), 2, 3)
