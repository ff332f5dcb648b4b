"""The product of LLM.int8() by warpgroups (kernels/int8/int8_tile_sm90a.cuh) on the processor: bits, and any order."""

from __future__ import annotations

from dataclasses import replace

import build_emulator
import numpy as np
import pytest
from harness import Case, Library, built, library, run_both_ways
from int8_tiles import Codes, Tile, tile
from thorough import thorough

TOKENS = (64, 128, 256)
DTYPES = ("bf16", "f16", "f32")
# M, N, K: one tile of one step; tails of each; several tiles, the last one nearly empty.
SHAPES = [(64, 128, 128), (1, 7, 16), (65, 129, 144), (200, 264, 400), (257, 300, 272)]
# Blocks that share rows of x, or a tile, with tails of K for the last one.
CLUSTERS = [Tile(64, sharing=2), Tile(64, parts=2), Tile(64, parts=3), Tile(128, parts=4), Tile(256, sharing=2)]


def source() -> Library:
    return library("int8_tile_sm90a")


@pytest.mark.parametrize("tokens", TOKENS)
def test_sums_are_exact(tokens: int) -> None:
    for m, n, k in SHAPES:
        check = tile(source(), Codes.random(m, n, k, "i32"), Tile(tokens))
        check.against(run_both_ways(source(), check.case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_what_is_made_of_them_has_the_bits_of_float32_steps(tokens: int, dtype: str) -> None:
    """With a list of outliers that is empty, and without one; with each type of bias, and without."""
    for i, (m, n, k) in enumerate(SHAPES):
        codes = Codes.random(m, n, k, dtype, bias=(None, "f32", "bf16", "f16")[i % 4])
        check = tile(source(), codes, Tile(tokens, listed=i % 2 == 0))
        check.against(run_both_ways(source(), check.case))


def test_a_negative_zero_stays_one_without_a_bias() -> None:
    """A sum of a few units times scales that make it vanish: adding 0 would make +0 of -0."""
    codes = Codes.random(3, 5, 16, "f32")
    codes = replace(codes, a=np.full_like(codes.a, -1), w=np.ones_like(codes.w), row_scales=np.full(3, 1e-40, "f4"))
    codes = replace(codes, column_scales=np.full(5, 1e-40, np.float32))
    assert np.signbit(codes.wanted()).all()
    assert not codes.wanted().any()
    check = tile(source(), codes, Tile(64))
    check.against(run_both_ways(source(), check.case))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("sharing", [1, 2])
@pytest.mark.parametrize("tokens", thorough(TOKENS, quick=TOKENS[:1]))
def test_a_block_goes_from_tile_to_tile(tokens: int, sharing: int, workers: int) -> None:
    """Fewer steps than stages, so that copies are tiles ahead, and more."""
    for k, dtype, outliers in ((16, "f16", 0), (272, "i32", 0), (272, "bf16", 3), (1168, "bf16", 0)):
        codes = Codes.random(2 * tokens + 3, 400, k, dtype, outliers)
        check = tile(source(), codes, Tile(tokens, sharing=sharing, workers=workers))
        check.against(run_both_ways(source(), check.case))


@pytest.mark.parametrize("plan", CLUSTERS, ids=str)
def test_blocks_of_a_cluster(plan: Tile) -> None:
    for m, n, dtype, outliers in ((plan.tokens, 128, "i32", 0), (plan.tokens + 9, 300, "bf16", 0), (7, 130, "f32", 17)):
        check = tile(source(), Codes.random(m, n, 1424, dtype, outliers), plan)
        check.against(run_both_ways(source(), check.case))


@pytest.mark.parametrize("outliers", [1, 15, 16, 17, 150, 272])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outliers(dtype: str, outliers: int) -> None:
    """Less than a product takes, more, more than are gathered at once, and all columns."""
    tokens = TOKENS[outliers % 3]
    codes = Codes.random(tokens + 5, 140, 272, dtype, outliers, bias="bf16" if outliers % 2 else None)
    check = tile(source(), codes, Tile(tokens))
    check.against(run_both_ways(source(), check.case))


@pytest.mark.parametrize("tokens", TOKENS)
def test_outliers_of_float32_are_not_rounded(tokens: int) -> None:
    """One column, a code of 127 and scales that cancel: y has all 24 bits of x, and what is not finite."""
    codes = Codes.random(6, 9, 16, "f32", 1)
    x = codes.x.copy()
    x[:, codes.columns[0]] = [1 + 2**-23, -16777215.0, 3.0e38, 2.0**-100 * (1 + 2**-23), np.inf, np.nan]
    w = np.zeros_like(codes.w)
    w[:, codes.columns[0]] = 1
    codes = replace(codes, a=np.zeros_like(codes.a), x=x, w=w, column_scales=np.full(9, 127, np.float32))
    check = tile(source(), codes, Tile(tokens))
    (y,) = (result for result in run_both_ways(source(), check.case) if result.shape == (6, 9))
    by = np.float32(127) * (np.float32(1) / np.float32(127))
    expected = np.repeat(x[:, codes.columns] * by, 9, axis=1)
    assert np.array_equal(y[:4], expected[:4])
    assert np.isposinf(y[4]).all()
    assert np.isnan(y[5]).all()


@pytest.mark.parametrize("dtype", [*DTYPES, "i32"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_what_is_not_there_is_not_written(tokens: int, dtype: str) -> None:
    """A run of the first block of two, whose tile is not whole, leaves the others' part of y alone."""
    codes = Codes.random(tokens + 1, 140, 32, dtype)
    check = tile(source(), codes, Tile(tokens))
    (launch,), ((y, _),) = check.case.launches, check.wanted
    index = next(k for k, buffer in enumerate(check.case.buffers) if buffer is y)
    first = source().run(Case([replace(launch, window=(0, 1))]))[index]
    whole = source().run(check.case)[index]
    inside = np.zeros(first.shape, bool)
    inside[:tokens, :128] = True
    assert np.array_equal(first[inside], whole[inside])
    assert np.array_equal(first[~inside], y.data[~inside])


def test_y_of_any_alignment() -> None:
    codes = Codes.random(9, 24, 32, "bf16")
    for shift in (0, 2, 8):
        check = tile(source(), codes, Tile(64, shift=shift))
        check.against(run_both_ways(source(), check.case))


@pytest.mark.parametrize("highest_first", thorough([False, True], quick=[False]))
def test_copies_and_matrix_units_read_what_is_there(highest_first: bool) -> None:
    """Each access to shared memory is known: none is made while a copy is on its way there or a product reads it."""
    watched = built(build_emulator.source_of("int8_tile_sm90a"), "stores")
    for i, plan in enumerate([*CLUSTERS, *map(Tile, TOKENS), Tile(64, workers=1)]):
        codes = Codes.random(plan.tokens + 3, 300, 1168, (*DTYPES, "i32")[i % 4], outliers=(i % 3) * 9)
        check = tile(watched, codes, plan)
        check.against(watched.run(check.case, highest_first))
