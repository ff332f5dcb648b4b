"""The CUDA sources of 8-bit codes, of rows, of embeddings and of expanded scales, on the processor: the core's bits."""

from __future__ import annotations

import itertools

import launches
import native
import numpy as np
import pytest
import values
from harness import Buffer, Launch, int64, library, pointers, run_both_ways
from native import BLOCK_SIZES, QUANT_TYPES, STORED
from test_emulator_blockwise import Sparse
from thorough import thorough

DTYPES = tuple(STORED)
MAPS = values.maps()
# Around what a thread, a warp and a block of threads take at a time.
SIZES = (1, 2, 7, 8, 9, 31, 33, 255, 257, 4095, 4096, 4097, 8193, 12500, 16385)
# No block size of the format: of one value, of a thread's share, of about a warp's or a block's, of everything.
ODD_SIZES = (1, 7, 24, 100, 1025, 4095, 8192, 1 << 31, (1 << 40) + 1)


def check(name: str, found: launches.Check) -> None:
    found.against(run_both_ways(library(name), found.case))


@pytest.mark.parametrize("slow", [False, True], ids=["fast", "reference"])
@pytest.mark.parametrize("n", SIZES)
def test_expand(n: int, slow: bool) -> None:
    absmax = np.exp2(np.random.default_rng(n).normal(-5, 2, n)).astype(np.float32)
    for shifts in ((0, 0), (1, 0), (0, 4), (4, 16)):
        check("dequantize_absmax", launches.expand(library("dequantize_absmax"), absmax, shifts, slow))


# Rows and columns: rows of one value, rows that begin in the low nibble, in the middle of a block and of a word; rows
# for the fast path, of less than a word's codes to more than a block of threads reads; no rows.
TABLES = [
    (9, 1),
    (50, 3),
    (5, 37),
    (31, 4),
    (40, 8),
    (11, 24),
    (7, 64),
    (3, 1000),
    (5, 4104),
    (2, 8200),
    (2, 12345),
    (0, 16),
]


@pytest.mark.parametrize("slow", [False, True], ids=["fast", "reference"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(dtype: str, nested: bool, slow: bool) -> None:
    source = library("embedding_4bit")
    item = STORED[dtype].itemsize
    kinds = itertools.cycle(itertools.product((np.int64, np.int32), QUANT_TYPES))
    for k, ((rows, columns), blocksize) in enumerate(zip(TABLES, itertools.cycle(BLOCK_SIZES), strict=False)):
        kind, quant_type = next(kinds)
        table = values.table(rows, columns, quant_type, blocksize, nested, k)
        count = 1 + 9000 // columns if columns < 1000 else 5
        indices = np.random.default_rng(k).integers(0, max(rows, 1), count).astype(kind)
        for shifts in ((0, 0), (k % 4, item * (k % 8)), (4, 16)):
            check("embedding_4bit", launches.embedding(source, table, indices, dtype, shifts, slow))


@pytest.mark.parametrize("slow", [False, True], ids=["fast", "reference"])
@pytest.mark.parametrize("columns", [8, 7, 2056])
@pytest.mark.parametrize("kind", [np.int64, np.int32])
def test_embedding_of_indices_that_are_no_rows(kind: type, columns: int, slow: bool) -> None:
    """NaN for them, and their neighbours as ever."""
    limits = np.iinfo(kind)
    for dtype, nested in itertools.product(DTYPES, (False, True)):
        table = values.table(6, columns, "nf4", 32, nested)
        indices = np.array([0, -1, 5, 6, limits.max, 3, limits.min, 3, 1 << 20], kind)
        found = launches.embedding(library("embedding_4bit"), table, indices, dtype, slow=slow)
        check("embedding_4bit", found)


def test_embedding_of_no_indices() -> None:
    """Nothing is launched then; what is expected of no rows and of no columns is nothing too."""
    table = values.table(4, 8, "fp4", 64, False)
    assert table.rows(np.zeros(0, np.int64), "f32").shape == (0, 8)


@pytest.mark.parametrize("slow", [False, True], ids=["fast", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_8bit(dtype: str, slow: bool) -> None:
    source = library("dequantize_blockwise8")
    item = STORED[dtype].itemsize
    for k, (blocksize, n) in enumerate(itertools.product((*BLOCK_SIZES, *ODD_SIZES), (1, 9, 4097, 33000))):
        if slow and n > 5000:
            continue
        codes = values.codes(2 * n, k)
        absmax, map_ = values.scales(-(-n // blocksize), k), list(MAPS.values())[k % len(MAPS)]
        for shifts in ((0, 0), (k % 8, item * (k % 8))):
            check(
                "dequantize_blockwise8",
                launches.dequantize_8bit(source, codes, absmax, map_, dtype, blocksize, shifts, slow),
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_8bit_rounds_every_code_at_every_scale(dtype: str) -> None:
    exponents = np.repeat(np.arange(0, 256, dtype=np.uint32), 3)
    mantissas = np.random.default_rng(6).integers(0, 1 << 23, exponents.size, np.uint32)
    absmax = (exponents << np.uint32(23) | mantissas).view(np.float32)
    codes = np.tile(np.arange(256, dtype=np.uint8), absmax.size)
    check(
        "dequantize_blockwise8",
        launches.dequantize_8bit(library("dequantize_blockwise8"), codes, absmax, MAPS["dynamic"], dtype, 256),
    )


@pytest.mark.parametrize("blocksize", thorough([*BLOCK_SIZES, *ODD_SIZES], quick=(64, 100, 4096)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_8bit(dtype: str, blocksize: int) -> None:
    source = library("quantize_blockwise8")
    item = STORED[dtype].itemsize
    for k, n in enumerate((1, 9, 257, 4096, 4097, 12500)):
        data = values.normal(n, dtype, k) if k % 2 == 0 else values.awkward(n, dtype, k)
        map_ = list(MAPS.values())[(k + blocksize) % len(MAPS)]
        # Aligned, then only to elements; every block of threads has one tile or two.
        shifts = (0, 0) if k < 3 else (item * (k % 3), k % 2)
        check(
            "quantize_blockwise8", launches.quantize_8bit(source, data, dtype, map_, blocksize, shifts, grid=1 + k % 3)
        )


@pytest.mark.parametrize("blocksize", [1, 32, 100, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_8bit_as_defined(dtype: str, blocksize: int) -> None:
    data = values.awkward(300, dtype)
    for map_ in MAPS.values():
        check(
            "quantize_blockwise8",
            launches.quantize_8bit(library("quantize_blockwise8"), data, dtype, map_, blocksize, slow=True),
        )


@pytest.mark.parametrize("blocksize", [64, 4096, 96, 1500])
@pytest.mark.parametrize("name", MAPS)
def test_quantize_8bit_where_codes_change(name: str, blocksize: int) -> None:
    """Ties, and the float32 next to them; edges of cells."""
    data = values.at_boundaries(MAPS[name], blocksize)
    check(
        "quantize_blockwise8",
        launches.quantize_8bit(library("quantize_blockwise8"), data, "f32", MAPS[name], blocksize),
    )


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_quantize_8bit_every_16_bit_value(dtype: str) -> None:
    source = library("quantize_blockwise8")
    for data, blocksize in itertools.product(
        (values.patterns(dtype), values.mixed(dtype), values.scaled_patterns(dtype)), (64, 4096, 320)
    ):
        check("quantize_blockwise8", launches.quantize_8bit(source, data, dtype, MAPS["dynamic"], blocksize))


# Rows for a warp, for a block of threads, and longer than it has registers for; aligned and not.
ROWS = [
    (1, 1),
    (70, 3),
    (33, 8),
    (9, 255),
    (20, 256),
    (5, 1000),
    (9, 1024),
    (3, 1025),
    (3, 1032),
    (2, 8192),
    (3, 8200),
    (2, 20001),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(dtype: str) -> None:
    source = library("int8_rowwise")
    item = STORED[dtype].itemsize
    for k, (rows, columns) in enumerate(ROWS):
        for data in (values.normal(rows * columns, dtype, k), values.awkward(rows * columns, dtype, k)):
            matrix = data.reshape(rows, columns)
            for shifts in ((0, 0), (item * (1 + k % 7), 1 + k % 7)):
                check("int8_rowwise", launches.quantize_rows(source, matrix, dtype, shifts, grid=1 + k % 3))
            check("int8_rowwise", launches.quantize_rows(source, matrix, dtype, slow=True))
        codes = values.codes(2 * rows * columns, k).view(np.int8).reshape(rows, columns)
        for shifts, slow in (((0, 0), False), ((1 + k % 7, item), False), ((0, 0), True)):
            check("int8_rowwise", launches.dequantize_rows(source, codes, values.scales(rows, k), dtype, shifts, slow))


@pytest.mark.parametrize("slow", [False, True], ids=["fast", "reference"])
def test_rows_where_codes_change(slow: bool) -> None:
    """Products and quotients within some steps of a half, in rows of all sizes; the largest ones are divided first."""
    random = np.random.default_rng(3)
    rows = []
    for exponent in (*range(-149, 128, 9), 119, 120, 121, 126, 127):
        scale = np.float32(np.ldexp(random.uniform(1, 2), exponent)) if exponent > -126 else np.float32(2.0**exponent)
        halves = (random.integers(-127, 127, 500) + np.float32(0.5)) / np.float32(127)
        row = (halves.astype(np.float32) * scale).astype(np.float32)
        row = (
            (row.view(np.int32) + np.where(row == 0, 0, random.integers(-2, 3, 500))).astype(np.int32).view(np.float32)
        )
        row = np.clip(row, -scale, scale)
        row[random.integers(500)] = scale
        rows.append(row)
    check("int8_rowwise", launches.quantize_rows(library("int8_rowwise"), np.array(rows), "f32", slow=slow))


def test_bytes_of_more_values_than_32_bits_count() -> None:
    """The last blocks of threads of 2^32 + 5000 values: offsets and indices of more than 32 bits."""
    n, blocksize, tail = (1 << 32) + 5000, 100, 3 * 16384 + 5000
    first = n - tail
    codes, map_ = values.codes(2 * tail), MAPS["dynamic"]
    # Scales of the blocks that the tail touches.
    before = first // blocksize
    absmax = np.abs(values.normal(-(-n // blocksize) - before, "f32"))
    try:
        memory = [Sparse(size) for size in (n, 4 * -(-n // blocksize), 2 * n)]
    except OSError as error:
        pytest.skip(f"13 GiB of addresses cannot be had: {error}")
    c, a, y = (m.buffer for m in memory)
    m = Buffer(map_)
    memory[0].array[-tail:] = codes
    memory[1].array[-absmax.nbytes :] = absmax.view(np.uint8)
    addresses = {id(s.buffer): s.array.ctypes.data for s in memory} | {id(m): map_.ctypes.data}

    source = library("dequantize_blockwise8")
    blocks = -(-n // (source.constants["TILE_BYTES"] // 2))
    arguments = [*map(pointers, (c, a, m, y)), int64(n), int64(blocksize)]
    kernel, window = "dequantize_blockwise8_bf16", (blocks - 3, 3)
    source.launch(Launch(kernel, blocks, source.threads[kernel], arguments, window=window), addresses)
    scales = np.repeat(absmax, blocksize)[first - before * blocksize :][:tail]
    wanted = native.from_float32(map_[codes] * scales, "bf16")
    done = 2 * 16384
    assert native.same_bits(memory[2].array[-2 * done :].view(np.uint16), wanted[-done:])
    assert not memory[2].array[: 1 << 20].any(), "the beginning is written to"
