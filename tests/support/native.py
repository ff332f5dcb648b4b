"""The compiled core on numpy arrays: what kernels are compared with. bfloat16 is `uint16` bits."""

from __future__ import annotations

import numpy as np
import reference
from halfbyte import _native
from numpy.typing import NDArray

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANT_TYPES = ("nf4", "fp4")
# By the names that kernels have.
DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
STORED = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(np.uint16)}
EPSILON = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}
"""The largest relative error of a rounding to each."""

Array = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def _raw(array: np.ndarray, dtype: str | None = None) -> tuple[int, int, str]:
    return array.ctypes.data, array.size, dtype or array.dtype.name


def quantize(values: np.ndarray, dtype: str, quant_type: str, blocksize: int) -> tuple[Bytes, Array]:
    """Packed codes and scales of values in `dtype`, "f32", "f16" or "bf16"."""
    packed = np.zeros(-(-values.size // 2), np.uint8)
    absmax = np.zeros(-(-values.size // blocksize), np.float32)
    _native.quantize_4bit(_raw(values, DTYPES[dtype]), _raw(packed), _raw(absmax), quant_type, blocksize)
    return packed, absmax


def dequantize(packed: Bytes, absmax: Array, n: int, dtype: str, quant_type: str, blocksize: int) -> np.ndarray:
    """The `n` values of packed codes, in `dtype`."""
    out = np.zeros(n, STORED[dtype])
    _native.dequantize_4bit(_raw(packed), _raw(absmax), _raw(out, DTYPES[dtype]), quant_type, blocksize)
    return out


def compress(absmax: Array) -> tuple[Bytes, Array, np.float32]:
    """Codes, second scales and offset of scales."""
    codes = np.zeros(absmax.size, np.uint8)
    absmax2 = np.zeros(-(-absmax.size // 256), np.float32)
    offset = _native.compress_absmax(_raw(absmax), _raw(codes), _raw(absmax2))
    return codes, absmax2, np.float32(offset)


def expand(codes: Bytes, absmax2: Array, offset: np.float32) -> Array:
    """The scales that codes stand for."""
    out = np.zeros(codes.size, np.float32)
    _native.expand_absmax(_raw(codes), _raw(absmax2), float(offset), _raw(out))
    return out


def dynamic_map() -> list[float]:
    """The values of the signed dynamic map."""
    return _native.dynamic_map()


def quantize_blockwise(values: np.ndarray, dtype: str, map_: Array, blocksize: int) -> tuple[Bytes, Array]:
    """8-bit codes and scales, for any block size: what the tensor operation gives on the processor."""
    import torch
    from halfbyte.backends import cpu as _cpu

    stored = torch.from_numpy(values.view(np.int16) if dtype == "bf16" else values)
    tensor = stored.view(torch.bfloat16) if dtype == "bf16" else stored
    # It fills up the last block with zeros: one much longer than the values has the same result as a shorter one.
    blocksize = min(blocksize, 2 * values.size + 1) if blocksize > 8192 else blocksize
    codes, absmax = _cpu.quantize_blockwise(tensor, torch.from_numpy(map_), blocksize)
    return codes.numpy(), absmax.numpy()


def dequantize_blockwise(codes: Bytes, absmax: Array, map_: Array, dtype: str, blocksize: int) -> np.ndarray:
    """The values of 8-bit codes, in `dtype`."""
    scales = np.repeat(absmax, min(blocksize, max(codes.size, 1)))[: codes.size]
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        return from_float32(map_[codes] * scales, dtype)


def quantize_rows(values: np.ndarray, dtype: str) -> tuple[NDArray[np.int8], Array]:
    """Codes and scales of the rows of a matrix."""
    rows, columns = values.shape
    codes, scales = np.zeros((rows, columns), np.int8), np.zeros(rows, np.float32)
    _native.quantize_rows(_raw(values, DTYPES[dtype]), _raw(codes), _raw(scales), rows, columns)
    return codes, scales


def dequantize_rows(codes: NDArray[np.int8], scales: Array, dtype: str) -> np.ndarray:
    """The values of codes of rows, in `dtype`."""
    out = np.zeros(codes.shape, STORED[dtype])
    _native.dequantize_rows(_raw(codes), _raw(scales), _raw(out, DTYPES[dtype]), *codes.shape)
    return out


def from_float32(values: Array, dtype: str) -> np.ndarray:
    """Rounded to `dtype`, to the nearest, ties to even."""
    with np.errstate(over="ignore"):
        return np.asarray(reference.from_float32(values, DTYPES[dtype]))


def to_float32(values: np.ndarray, dtype: str) -> Array:
    """What values in `dtype` are as float32; exact."""
    return np.asarray(reference.to_float32(values, DTYPES[dtype])).reshape(values.shape)


def same_bits(a: np.ndarray, b: np.ndarray, dtype: str | None = None) -> bool:
    """Equal as bits, NaN being equal to any NaN. `dtype` is needed for bfloat16."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    equal = a.view(f"u{a.itemsize}") == b.view(f"u{b.itemsize}")
    if a.dtype.kind == "f":
        equal |= np.isnan(a) & np.isnan(b)
    elif dtype == "bf16":
        equal |= np.isnan(to_float32(a, dtype)) & np.isnan(to_float32(b, dtype))
    return bool(equal.all())
