"""The CUDA sources of quantize, dequantize and nested scales, on the processor: the compiled core's bits."""

from __future__ import annotations

import itertools
import mmap

import launches
import native
import numpy as np
import pytest
import values
from halfbyte import _native
from harness import Buffer, Launch, int32, int64, library, pointers, run_both_ways
from native import BLOCK_SIZES, QUANT_TYPES, STORED
from thorough import thorough

DTYPES = tuple(STORED)
# Around a thread's eight values, a block's and a warp's, and around what a block of threads takes in a step and in all.
SIZES = (1, 2, 7, 8, 9, 31, 33, 255, 256, 257, 4095, 4097, 8191, 8192, 8193, 16383, 16384, 16385, 20000, 37001)


def check(name: str, found: launches.Check) -> None:
    found.against(run_both_ways(library(name), found.case))


@pytest.mark.parametrize("blocksize", thorough(BLOCK_SIZES, quick=(32, 64, 4096)))
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize(dtype: str, quant_type: str, blocksize: int) -> None:
    source = library("quantize_blockwise4")
    item = STORED[dtype].itemsize
    for k, n in enumerate(SIZES):
        data = values.normal(n, dtype, k) if k % 2 == 0 else values.awkward(n, dtype, k)
        # Aligned, then only to elements; packed codes to anything.
        for shifts in ((0, 0), (item * (1 + k % 7), k % 4)):
            check("quantize_blockwise4", launches.quantize(source, data, dtype, quant_type, blocksize, shifts))


@pytest.mark.parametrize("slow", [False, True], ids=["fast", "reference"])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_quantize_every_16_bit_value(dtype: str, quant_type: str, slow: bool) -> None:
    source = library("quantize_blockwise4")
    for data, blocksize in itertools.product(
        (values.patterns(dtype), values.mixed(dtype), values.scaled_patterns(dtype)), BLOCK_SIZES
    ):
        check("quantize_blockwise4", launches.quantize(source, data, dtype, quant_type, blocksize, slow=slow))


@pytest.mark.parametrize("slow", [False, True], ids=["fast", "reference"])
@pytest.mark.parametrize("blocksize", BLOCK_SIZES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_quantize_where_codes_change(quant_type: str, blocksize: int, slow: bool) -> None:
    data = values.at_thresholds(quant_type, blocksize)
    check(
        "quantize_blockwise4",
        launches.quantize(library("quantize_blockwise4"), data, "f32", quant_type, blocksize, slow=slow),
    )


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("blocksize", thorough(BLOCK_SIZES, quick=(32, 64, 4096)))
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize(dtype: str, quant_type: str, blocksize: int, nested: bool) -> None:
    source = library("dequantize_blockwise4")
    item = STORED[dtype].itemsize
    for k, n in enumerate(SIZES):
        packed, absmax = values.codes(n, k), values.scales(-(-n // blocksize), k)
        if nested:
            scales = launches.Scales.nested(np.abs(np.nan_to_num(absmax, posinf=1, nan=2)).clip(0, 1000))
        else:
            scales = launches.Scales.plain(absmax)
        for shifts in ((0, 0), (k % 4, item * (k % 8)), (4 * (k % 5), 16)):
            found = launches.dequantize(
                source, packed, scales, n, dtype, quant_type, blocksize, shifts, slow=k % 5 == 4
            )
            check("dequantize_blockwise4", found)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_rounds_every_code_at_every_scale(dtype: str, quant_type: str) -> None:
    """Scales of all exponents: results are normal, denormal, zero and infinite in every type."""
    exponents = np.repeat(np.arange(1, 255, dtype=np.uint32), 8)
    mantissas = np.random.default_rng(6).integers(0, 1 << 23, exponents.size, np.uint32)
    absmax = (exponents << np.uint32(23) | mantissas).view(np.float32)
    packed = np.tile(np.array([0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF] * 2, np.uint8), absmax.size)
    scales = launches.Scales.plain(absmax)
    for slow in (False, True):
        found = launches.dequantize(
            library("dequantize_blockwise4"), packed, scales, absmax.size * 32, dtype, quant_type, 32, slow=slow
        )
        check("dequantize_blockwise4", found)


@pytest.mark.parametrize("n", [1, 2, 31, 255, 256, 257, 2047, 2048, 2049, 70001])
def test_nested_scales(n: int) -> None:
    source = library("quantize_absmax")
    absmax = np.exp2(np.random.default_rng(n).normal(-5, 2, n)).astype(np.float32)
    for levels in (1, 2, 3):
        check("quantize_absmax", launches.compress(source, absmax, levels))
    # More than one group for a warp, and no alignment beyond that of elements.
    check("quantize_absmax", launches.compress(source, absmax, grid=2))
    for shifts in ((4, 0), (0, 1), (12, 3)):
        check("quantize_absmax", launches.compress(source, absmax, shifts=shifts))
    check("quantize_absmax", launches.compress_slowly(source, absmax))


def test_nested_scales_of_nothing() -> None:
    """Their mean is 0."""
    check("quantize_absmax", launches.compress(library("quantize_absmax"), np.zeros(0, np.float32), levels=0))


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-40, 3e38])
def test_nested_scales_that_are_all_the_same(value: float) -> None:
    """Nothing is left when their mean is taken off, or very little."""
    absmax = np.full(600, value, np.float32)
    check("quantize_absmax", launches.compress(library("quantize_absmax"), absmax))
    check("quantize_absmax", launches.compress_slowly(library("quantize_absmax"), absmax))


def test_nested_scales_with_nan_and_infinity() -> None:
    absmax = np.linspace(0.5, 2, 700, dtype=np.float32)
    for special in (np.nan, np.inf, -np.inf):
        absmax[300] = special
        check("quantize_absmax", launches.compress(library("quantize_absmax"), absmax))
        check("quantize_absmax", launches.compress_slowly(library("quantize_absmax"), absmax))


def test_nested_scales_between_codes() -> None:
    """Scales in the middle between two values of the map, next to it, or next to where a cell of the look-up begins."""
    map_ = np.array(_native.dynamic_map(), np.float32)
    middles = ((map_[:-1] + map_[1:]) * np.float32(0.5)).astype(np.float32)
    around = [np.nextafter(middles, np.float32(-2)), middles, np.nextafter(middles, np.float32(2))]
    cells = np.arange(0x34000000, 0x3F800000, 1 << 17, dtype=np.uint32)
    half = np.concatenate([*around, map_, (cells - 1).view(np.float32), cells.view(np.float32)])
    # Each group has the scale 1, and half of it mirrors the other, so that the mean is 0.
    rows = np.concatenate([half, np.zeros(-len(half) % 127, np.float32)]).reshape(-1, 127)
    rows = np.concatenate([rows, np.ones((len(rows), 1), np.float32)], axis=1)
    absmax = np.concatenate([rows, -rows], axis=1).reshape(-1)
    assert native.compress(absmax)[2] == 0
    check("quantize_absmax", launches.compress(library("quantize_absmax"), absmax))
    check("quantize_absmax", launches.compress_slowly(library("quantize_absmax"), absmax))


class Sparse:
    """Zeros without end: only pages that are written take memory."""

    def __init__(self, nbytes: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self.array = np.frombuffer(mmap.mmap(-1, nbytes, flags=flags), np.uint8)
        # What a launch refers to; the memory is not to be copied.
        self.buffer = Buffer(np.zeros(0, np.uint8))


def test_more_values_than_32_bits_count() -> None:
    """The last blocks of threads of 2^32 + 5000 values: offsets and indices of more than 32 bits."""
    n, blocksize, tail = (1 << 32) + 5000, 64, 3 * 16384 + 5000
    per_group = blocksize * launches.GROUP
    data = values.normal(tail, "bf16")
    packed, absmax = native.quantize(data, "bf16", "nf4", blocksize)
    sums = launches.group_sums(absmax)
    try:
        memory = [Sparse(size) for size in (2 * n, n // 2, 4 * -(-n // blocksize), 2 * n, 8 * -(-n // per_group))]
    except OSError as error:
        pytest.skip(f"18 GiB of addresses cannot be had: {error}")
    x, p, a, y, s = (m.buffer for m in memory)
    memory[0].array[-2 * tail :] = data.view(np.uint8)
    addresses = {id(m.buffer): m.array.ctypes.data for m in memory}

    source = library("quantize_blockwise4")
    per_block, threads = source.constants["TILE"], source.threads["quantize_blockwise4_bf16_nf4"]
    blocks = -(-n // per_block)
    arguments = [pointers(x), pointers(p), pointers(a), pointers(s), int64(n), int32(6)]
    window = (blocks - 4, 4)
    source.launch(Launch("quantize_blockwise4_bf16_nf4", blocks, threads, arguments, window=window), addresses)
    assert native.same_bits(memory[1].array[-packed.size :], packed)
    assert native.same_bits(memory[2].array[-absmax.nbytes :].view(np.float32), absmax)
    assert native.same_bits(memory[4].array[-sums.nbytes :].view(np.float64), sums)
    assert not memory[1].array[: 1 << 20].any(), "the beginning is written to"

    source = library("dequantize_blockwise4")
    threads = source.threads["dequantize_blockwise4_bf16"]
    blocks, last = -(-n // source.constants["TILE"]), -(-tail // source.constants["TILE"])
    arguments = [pointers(p), pointers(a, None, None, None), pointers(y), int64(n), int32(6), int32(0)]
    window = (blocks - last, last)
    source.launch(Launch("dequantize_blockwise4_bf16", blocks, threads, arguments, window=window), addresses)
    wanted = native.dequantize(packed, absmax, tail, "bf16", "nf4", blocksize)
    assert native.same_bits(memory[3].array[-2 * tail :].view(np.uint16), wanted)
    assert not memory[3].array[: 1 << 20].any(), "the beginning is written to"
