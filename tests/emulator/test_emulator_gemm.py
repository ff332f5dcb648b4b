"""The products of warpgroups (gemm_4bit_tile_sm90a, and gemm_4bit_block_sums_sm90a) on the processor.

Bounds, bits, and any order of threads.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import build_emulator
import launches_gemm
import native
import numpy as np
import pytest
from harness import Case, KernelError, built, library, run_both_ways
from launches import Scales
from launches_gemm import Product, Tile
from thorough import thorough

TOKENS = (64, 96, 128, 192, 256)
BLOCK_SUMS = (32, 48, 64)
# Of blocks that a k-tile of a row is within.
BLOCK_SUMS_SHAPES = [
    (1, 128, 256, 64, 1),
    (33, 129, 320, 64, 1),
    (17, 100, 64, 256, 1),
    (64, 7, 576, 1024, 2),
    (100, 256, 2112, 64, 2),
    (32, 33, 128, 4096, 1),
    (20, 65, 768, 2048, 3),
    (49, 40, 1024, 64, 4),
]
# Rows of x, N, K, the block size, and the parts of K: tails of each, one unit of K and several, the last one short.
SHAPES = [
    (1, 128, 256, 64, 1),
    (33, 129, 288, 32, 1),
    (64, 100, 32, 256, 1),
    (65, 7, 544, 1024, 2),
    (100, 256, 512, 64, 2),
    (128, 33, 96, 4096, 1),
    (129, 200, 320, 512, 2),
    (200, 65, 768, 2048, 3),
    (257, 40, 1024, 64, 4),
]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", thorough(["bf16", "f16"], quick=("bf16",)))
def test_products(dtype: str, tokens: int) -> None:
    """Within the bound of the kernel's arithmetic, and the same bits in both orders of threads, blocks and copies."""
    source = library("gemm_4bit_tile_sm90a")
    for i, (m, n, k, blocksize, parts) in enumerate(SHAPES):
        nested, bias = (i + tokens // 64) % 2 == 1, i % 3 != 0
        product = Product.random(m, n, k, dtype, ("nf4", "fp4")[i % 2], blocksize, nested, bias)
        check = launches_gemm.tile_sm90a(source, product, Tile(tokens, parts))
        check.against(run_both_ways(source, check.case))


@pytest.mark.parametrize("tokens", BLOCK_SUMS)
@pytest.mark.parametrize("dtype", thorough(["bf16", "f16"], quick=("bf16",)))
def test_products_with_scales_for_sums(dtype: str, tokens: int) -> None:
    """The same where scales are for the sums of a block: every number of stages in a round, and several rounds."""
    for i, (m, n, k, blocksize, parts) in enumerate(BLOCK_SUMS_SHAPES):
        nested, bias = (i + tokens // 16) % 2 == 1, i % 3 != 0
        product = Product.random(m, n, k, dtype, ("nf4", "fp4")[i % 2], blocksize, nested, bias)
        plan = Tile(tokens, parts, block_sums=True)
        source = library(plan.source)
        check = launches_gemm.tile_sm90a(source, product, plan)
        check.against(run_both_ways(source, check.case))


def check_ranges(dtype: str, plan: Tile, shapes: list[tuple[int, int, int, int, int]]) -> None:
    """Products of m, n, k and a block size, in so many ranges."""
    source = library(plan.source)
    for i, (m, n, k, blocksize, ranges) in enumerate(shapes):
        nested, bias = i % 2 == 1, i % 3 != 0
        product = Product.random(m, n, k, dtype, ("nf4", "fp4")[i % 2], blocksize, nested, bias)
        check = launches_gemm.tile_sm90a(source, product, replace(plan, ranges=ranges))
        check.against(run_both_ways(source, check.case))


@pytest.mark.parametrize("tokens", [192, 256])
@pytest.mark.parametrize("dtype", thorough(["bf16", "f16"], quick=("bf16",)))
def test_ranges(dtype: str, tokens: int) -> None:
    """Blocks that share tiles: each whole, in two, among several; ranges that end with a tile, and inside of one."""
    shapes = [(5, 130, 768, 64, 2), (tokens + 3, 200, 544, 32, 5), (tokens, 100, 1024, 128, 4), (9, 300, 256, 64, 2)]
    check_ranges(dtype, Tile(tokens), shapes)


@pytest.mark.parametrize("tokens", [64, 96, 128])
@pytest.mark.parametrize("dtype", thorough(["bf16", "f16"], quick=("bf16",)))
def test_parts_through_memory(dtype: str, tokens: int) -> None:
    """Blocks that share a tile without being a cluster: two, more, parts of different length, tails."""
    shapes = [(5, 130, 768, 64, 6), (tokens + 3, 100, 1312, 32, 8), (tokens, 40, 1024, 128, 4), (9, 128, 512, 64, 2)]
    check_ranges(dtype, Tile(tokens), shapes)


@pytest.mark.parametrize("tokens", BLOCK_SUMS)
@pytest.mark.parametrize("dtype", thorough(["bf16", "f16"], quick=("bf16",)))
def test_parts_with_scales_for_sums(dtype: str, tokens: int) -> None:
    shapes = [(5, 130, 768, 64, 6), (tokens + 3, 100, 1344, 64, 8), (tokens, 40, 1024, 128, 4), (9, 128, 512, 64, 2)]
    check_ranges(dtype, Tile(tokens, block_sums=True), shapes)


@pytest.mark.parametrize(
    "plan", [*(Tile(tokens) for tokens in (64, 96, 128)), *(Tile(t, block_sums=True) for t in BLOCK_SUMS)]
)
@pytest.mark.parametrize("dtype", thorough(["bf16", "f16"], quick=("bf16",)))
def test_ranges_of_two_teams(dtype: str, plan: Tile) -> None:
    """Blocks with whole tiles, with parts of two, with a whole one between, and several that share one."""
    shapes = [
        (9, 130, 512, 64, 1), (5, 300, 1024, 128, 2), (plan.tokens + 3, 200, 1536, 64, 5), (7, 257, 2048, 4096, 7),
    ]  # fmt: skip
    check_ranges(dtype, replace(plan, range_unit=2), shapes)


def test_a_block_that_is_waited_for_comes_first() -> None:
    """The other way round, a device with room for few blocks would wait for ever."""
    source = library("gemm_4bit_tile_sm90a")
    product = Product.random(5, 8, 768, "bf16", "nf4", 64)
    check = launches_gemm.tile_sm90a(source, product, Tile(192, ranges=2))
    (launch,) = check.case.launches
    with pytest.raises(KernelError, match="waits for a signal"):
        source.run(Case([replace(launch, in_order=False)]), highest_first=True)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_an_identity_gives_the_dequantized_weight(dtype: str, quant_type: str, nested: bool) -> None:
    """Bit for bit, but for the sign of zeros: unpacked as dequantizing does it, each value at its place."""
    source = library("gemm_4bit_tile_sm90a")
    for i, (n, k, blocksize, parts) in enumerate([(129, 288, 32, 1), (64, 256, 64, 1), (40, 544, 128, 2)]):
        product = Product.identity(n, k, dtype, quant_type, blocksize, nested)
        check = launches_gemm.tile_sm90a(source, product, Tile(TOKENS[(i + nested) % 5], parts), exact=True)
        check.against(run_both_ways(source, check.case))


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_block_sizes_that_rows_end_inside_of(blocksize: int) -> None:
    source = library("gemm_4bit_tile_sm90a")
    for nested in (False, True):
        product = Product.identity(5, 288, "bf16", "nf4", blocksize, nested)
        check = launches_gemm.tile_sm90a(source, product, Tile(256), exact=True)
        check.against(run_both_ways(source, check.case))


def test_scales_of_any_alignment() -> None:
    source = library("gemm_4bit_tile_sm90a")
    product = Product.random(9, 20, 512, "bf16", "nf4", 64)
    aligned, shifted = (launches_gemm.tile_sm90a(source, product, Tile(64, scale_shift=shift)) for shift in (0, 4))
    for check in (aligned, shifted):
        check.against(run_both_ways(source, check.case))


@pytest.mark.parametrize(
    "plan", [*map(Tile, TOKENS), *(Tile(tokens, block_sums=True) for tokens in BLOCK_SUMS)], ids=str
)
def test_what_is_not_there_is_not_written(plan: Tile) -> None:
    """Neither rows of y beyond M nor columns beyond N: a run for part of the blocks leaves the others alone."""
    source, tokens = library(plan.source), plan.tokens
    product = Product.random(tokens + 1, 140, 64, "f16", "fp4", 64, bias=True)
    check = launches_gemm.tile_sm90a(source, product, plan)
    (launch,), ((y, _),) = check.case.launches, check.wanted
    index = next(k for k, buffer in enumerate(check.case.buffers) if buffer is y)
    first = replace(launch, window=(0, 1))
    found = source.run(Case([first]))[index]
    whole = source.run(check.case)[index]
    inside = np.zeros(found.shape, bool)
    inside[:tokens, :128] = True
    assert np.array_equal(found[inside], whole[inside])
    assert np.array_equal(found[~inside], y.data[~inside])


@pytest.mark.parametrize("highest_first", [False, True])
def test_copies_and_matrix_units_read_what_is_there(highest_first: bool) -> None:
    """Each access to shared memory is known: none is made while a copy is on its way there or a product reads it."""
    source = built(build_emulator.source_of("gemm_4bit_tile_sm90a"), "stores")
    for (dtype, tokens), parts in zip(
        itertools.product(("bf16", "f16"), TOKENS), itertools.cycle((1, 2, 3)), strict=False
    ):
        product = Product.random(tokens // 2 + 1, 130, 768, dtype, "nf4", 64, nested=parts == 2)
        check = launches_gemm.tile_sm90a(source, product, Tile(tokens, parts))
        check.against(source.run(check.case, highest_first))
    for tokens in TOKENS:
        product = Product.random(tokens // 2 + 1, 130, 768, "bf16", "nf4", 64)
        check = launches_gemm.tile_sm90a(source, product, Tile(tokens, ranges=4))
        check.against(source.run(check.case, highest_first))
    for tokens in BLOCK_SUMS:
        for how in (Tile(tokens, 2, block_sums=True), Tile(tokens, ranges=4, block_sums=True)):
            source = built(build_emulator.source_of(how.source), "stores")
            product = Product.random(tokens // 2 + 1, 130, 1344, "bf16", "nf4", 64, nested=how.parts == 2)
            check = launches_gemm.tile_sm90a(source, product, how)
            check.against(source.run(check.case, highest_first))


@pytest.mark.parametrize("plan", [Tile(128), Tile(32, block_sums=True)], ids=str)
def test_a_scale_that_is_not_finite_stays_in_its_row(plan: Tile) -> None:
    """NaN and infinity reach the outputs of their row of W, and no other."""
    source = library(plan.source)
    product = Product.random(3, 6, 256, "bf16", "nf4", 64)
    absmax = product.scales.absmax.copy()
    absmax[4 * 2], absmax[4 * 5 + 1] = np.nan, np.inf
    product = replace(product, scales=Scales.plain(absmax))
    check = launches_gemm.tile_sm90a(source, product, plan)
    found = run_both_ways(source, check.case)
    y = found[next(k for k, buffer in enumerate(check.case.buffers) if buffer is check.wanted[0][0])]
    values = native.to_float32(y, "bf16")
    assert np.isnan(values[:, 2]).all()
    assert not np.isfinite(values[:, 5]).any()
    assert np.isfinite(values[:, [0, 1, 3, 4]]).all()
