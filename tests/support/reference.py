"""The arithmetic of the format in plain numpy: slow, and independent of the compiled core.

Values are numpy arrays; bfloat16, which numpy lacks, is `uint16` bits with the dtype name "bfloat16" beside it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

F32 = np.float32
Array = NDArray[np.float32]
Bytes = NDArray[np.uint8]

NF4 = """
    -1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
    -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
    0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0
"""
NF4_THRESHOLDS = """
    -0.8480964004993439 -0.6106329262256622 -0.4599952697753906 -0.33967943489551544 -0.23460740596055984
    -0.13791173323988914 -0.045525018125772476 0.03979014977812767 0.1202552504837513 0.2035212516784668
    0.2920137718319893 0.3893125355243683 0.5016634166240692 0.6427869200706482 0.8614784181118011
"""
FP4_THRESHOLDS = "0.00260417 0.0859375 0.20833333 0.29166667 0.4166667 0.583333 0.8333333"
FP4_CODE_OF_RANK = [0, 1, 6, 7, 4, 5, 2, 3]


def nearest_float32(decimal: str) -> np.float32:
    """The float32 nearest to a decimal figure.

    `np.float32("0.1202552504837513")` rounds twice, by way of float64, and misses by one bit where the float64 is a
    tie: here the distances are compared exactly.
    """
    exact = Fraction(decimal)
    middle = F32(decimal)
    around = [np.nextafter(middle, F32(-np.inf)), middle, np.nextafter(middle, F32(np.inf))]
    return min(around, key=lambda v: abs(Fraction(float(v)) - exact))


def table(decimals: str) -> Array:
    """A table of float32 from decimal figures."""
    return np.array([nearest_float32(d) for d in decimals.split()], dtype=F32)


CODEBOOKS: dict[str, Array] = {
    "nf4": table(NF4),
    "fp4": np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3], dtype=F32) / F32(12),
}
THRESHOLDS: dict[str, Array] = {"nf4": table(NF4_THRESHOLDS), "fp4": table(FP4_THRESHOLDS)}


def bfloat16_to_float32(bits: NDArray[np.uint16]) -> Array:
    """The float32 that bfloat16 bits stand for; exact."""
    return (bits.astype(np.uint32) << 16).view(F32)


def float32_to_bfloat16(values: Array) -> NDArray[np.uint16]:
    """Bits of the nearest bfloat16, ties to even. NaN stays NaN."""
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), (bits >> 16).astype(np.uint16) | np.uint16(0x40), rounded)


def to_float32(values: NDArray[np.generic], dtype: str) -> Array:
    """Values of `dtype` ("float32", "float16", or "bfloat16" as uint16 bits) as float32, flat."""
    flat = values.reshape(-1)
    return bfloat16_to_float32(flat.view(np.uint16)) if dtype == "bfloat16" else flat.astype(F32)


def from_float32(values: Array, dtype: str) -> NDArray[np.generic]:
    """The nearest values of `dtype`, ties to even; bfloat16 as uint16 bits."""
    if dtype == "bfloat16":
        return float32_to_bfloat16(values)
    with np.errstate(over="ignore"):
        return values.astype(dtype)


def blocks_of(values: Array, blocksize: int) -> Array:
    """Rows of `blocksize` values, the last filled up with zeros."""
    rows = -(-len(values) // blocksize)
    return np.pad(values, (0, rows * blocksize - len(values))).reshape(rows, blocksize)


def scaled_blocks(values: Array, blocksize: int) -> tuple[Array, Array]:
    """Every block times its reciprocal scale, and the scales: the largest magnitudes, NaN not counting."""
    rows = blocks_of(values, blocksize)
    absmax = np.fmax.reduce(np.abs(rows), axis=1, initial=F32(0)).astype(F32)
    with np.errstate(all="ignore"):
        return rows * (F32(1) / absmax)[:, None], absmax


def codes_4bit(scaled: Array, quant_type: str) -> Bytes:
    """The 4-bit code of every scaled value."""
    with np.errstate(invalid="ignore"):
        if quant_type == "nf4":
            return (scaled[..., None] > THRESHOLDS["nf4"]).sum(-1).astype(np.uint8)
        rank = (np.abs(scaled)[..., None] > THRESHOLDS["fp4"]).sum(-1)
        return (np.array(FP4_CODE_OF_RANK)[rank] + 8 * (scaled < 0)).astype(np.uint8)


def quantize_4bit(values: Array, quant_type: str, blocksize: int) -> tuple[Bytes, Array]:
    """Packed codes `[ceil(n / 2)]` and scales `[ceil(n / blocksize)]` of `n` values."""
    scaled, absmax = scaled_blocks(values, blocksize)
    codes = codes_4bit(scaled, quant_type).reshape(-1)[: len(values) + len(values) % 2]
    return codes[::2] << 4 | codes[1::2], absmax


def dequantize_4bit(
    packed: Bytes, absmax: Array, n: int, quant_type: str, blocksize: int, dtype: str
) -> NDArray[np.generic]:
    """The `n` values that packed codes stand for, in `dtype`."""
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:n]
    with np.errstate(all="ignore"):
        values = CODEBOOKS[quant_type][codes] * np.repeat(absmax, blocksize)[:n]
    return from_float32(values, dtype)


def dynamic_map() -> Array:
    """The signed 8-bit dynamic map with seven exponent bits (arXiv 2110.02861), ascending."""
    values = [F32(0), F32(1)]
    for decade in range(7):
        parts = 2**decade
        step = np.float64((F32(1) - F32(0.1)) / F32(parts))
        points = [
            F32(np.float64(F32(0.1)) + step * i) if i < (parts + 1) // 2 else F32(1 - step * (parts - i))
            for i in range(parts + 1)
        ]
        for low, high in itertools.pairwise(points):
            value = F32(10.0 ** (decade - 6)) * ((low + high) / F32(2))
            values += [value, -value]
    return np.array(sorted(values), dtype=F32)


def code_8bit(map_: Array, x: np.float32) -> int:
    """The code of one scaled value: seven halvings that end on an even code, then the nearer neighbour."""
    pivot, lower, upper = 127, 0, 255
    for step in (64, 32, 16, 8, 4, 2, 1):
        if x > map_[pivot]:
            lower, pivot = pivot, pivot + step
        else:
            upper, pivot = pivot, pivot - step
    if x > map_[pivot]:
        return upper if x > (map_[upper] + map_[pivot]) * F32(0.5) else pivot
    return lower if x < (map_[lower] + map_[pivot]) * F32(0.5) else pivot


def quantize_8bit(values: Array, map_: Array, blocksize: int) -> tuple[Bytes, Array]:
    """Codes `[n]` and scales `[ceil(n / blocksize)]` of `n` values."""
    scaled, absmax = scaled_blocks(values, blocksize)
    codes = [code_8bit(map_, x) for x in scaled.reshape(-1)[: len(values)]]
    return np.array(codes, dtype=np.uint8), absmax


def dequantize_8bit(codes: Bytes, absmax: Array, map_: Array, blocksize: int) -> Array:
    """The values that 8-bit codes stand for."""
    with np.errstate(all="ignore"):
        return map_[codes] * np.repeat(absmax, blocksize)[: len(codes)]


def tree_mean(values: Array) -> np.float32:
    """The mean by float64 sums over a binary tree in groups of 256."""
    sums = values.astype(np.float64)
    while True:
        groups = np.pad(sums, (0, -len(sums) % 256)).reshape(-1, 256)
        while groups.shape[1] > 1:
            half = groups.shape[1] // 2
            groups = groups[:, :half] + groups[:, half:]
        sums = groups[:, 0]
        if len(sums) == 1:
            return F32(sums[0] / len(values))


@dataclass
class Nested:
    """Doubly quantized scales."""

    codes: Bytes
    absmax: Array
    offset: np.float32


def compress_absmax(absmax: Array) -> Nested:
    """Quantize scales to 8 bits in blocks of 256, centred on their mean."""
    offset = tree_mean(absmax)
    codes, absmax2 = quantize_8bit(absmax - offset, dynamic_map(), 256)
    return Nested(codes, absmax2, offset)


def expand_absmax(nested: Nested) -> Array:
    """Read doubly quantized scales: a float32 product, then a float32 sum."""
    return dequantize_8bit(nested.codes, nested.absmax, dynamic_map(), 256) + nested.offset
