"""The products of more than a few rows on compute capability 7.5 (gemm_4bit_tile_sm75) on the processor."""

from __future__ import annotations

from dataclasses import replace

import launches_gemm
import native
import numpy as np
import pytest
from harness import Case, KernelError, library, run_both_ways
from launches import Scales
from launches_gemm import Product

TOKENS = (32, 64)
# Rows of x, N, K, the block size, and the parts of K: tails of each, one k-tile and more, a short last part.
SHAPES = [
    (1, 128, 64, 64, 1),
    (33, 129, 320, 64, 1),
    (64, 100, 512, 256, 2),
    (65, 7, 640, 64, 4),
    (97, 40, 192, 4096, 1),
    (20, 200, 448, 128, 3),
]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("nested", [False, True])
def test_tile_sm75(nested: bool, tokens: int) -> None:
    """Within the bound of the kernel's arithmetic, and the same bits in both orders of threads and blocks."""
    source = library("gemm_4bit_tile_sm75")
    for i, (m, n, k, blocksize, parts) in enumerate(SHAPES):
        product = Product.random(m, n, k, "f16", ("nf4", "fp4")[(i + nested) % 2], blocksize, nested, bias=i % 3 != 0)
        check = launches_gemm.tile_sm75(source, product, tokens, parts)
        check.against(run_both_ways(source, check.case))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_tile_sm75_identity_gives_each_value_times_its_scale(quant_type: str, nested: bool) -> None:
    """Bit for bit: each value at its place, whatever the block size."""
    source = library("gemm_4bit_tile_sm75")
    for i, (n, k, blocksize, parts) in enumerate(
        [(130, 128, 64, 2), (129, 192, 64, 1), (40, 320, 128, 2), (7, 64, 4096, 1)]
    ):
        product = Product.identity(n, k, "f16", quant_type, blocksize, nested)
        check = launches_gemm.tile_sm75(source, product, TOKENS[(i + nested) % 2], parts, exact=True)
        check.against(run_both_ways(source, check.case))


def test_tile_sm75_scales_of_any_alignment() -> None:
    source = library("gemm_4bit_tile_sm75")
    product = Product.random(9, 20, 192, "f16", "nf4", 64)
    for shift in (0, 4):
        check = launches_gemm.tile_sm75(source, product, 32, scale_shift=shift)
        check.against(run_both_ways(source, check.case))


def test_tile_sm75_waits_only_for_blocks_that_start_before() -> None:
    """The other way round, a device with room for few blocks would wait for ever."""
    source = library("gemm_4bit_tile_sm75")
    product = Product.random(5, 8, 128, "f16", "nf4", 64)
    check = launches_gemm.tile_sm75(source, product, 32, 2)
    (launch,) = check.case.launches
    with pytest.raises(KernelError, match="waits for a signal"):
        source.run(Case([replace(launch, in_order=False)]), highest_first=True)


@pytest.mark.parametrize("tokens", TOKENS)
def test_tile_sm75_writes_only_what_is_there(tokens: int) -> None:
    """Neither rows of y beyond M nor columns beyond N: a run for part of the blocks leaves the others alone."""
    source = library("gemm_4bit_tile_sm75")
    product = Product.random(tokens + 1, 140, 64, "f16", "fp4", 64, bias=True)
    check = launches_gemm.tile_sm75(source, product, tokens)
    (launch,), ((y, _),) = check.case.launches, check.wanted
    index = next(k for k, buffer in enumerate(check.case.buffers) if buffer is y)
    found = source.run(Case([replace(launch, window=(0, 1))]))[index]
    whole = source.run(check.case)[index]
    inside = np.zeros(found.shape, bool)
    inside[:tokens, :128] = True
    assert np.array_equal(found[inside], whole[inside])
    assert np.array_equal(found[~inside], y.data[~inside])


def test_tile_sm75_scale_that_is_not_finite_stays_in_its_row() -> None:
    """NaN and infinity reach the outputs of their row of W, and no other."""
    source = library("gemm_4bit_tile_sm75")
    product = Product.random(3, 6, 256, "f16", "nf4", 64)
    absmax = product.scales.absmax.copy()
    absmax[4 * 2], absmax[4 * 5 + 1] = np.nan, np.inf
    check = launches_gemm.tile_sm75(source, replace(product, scales=Scales.plain(absmax)), 32, 2)
    found = run_both_ways(source, check.case)
    y = found[next(k for k, buffer in enumerate(check.case.buffers) if buffer is check.wanted[0][0])]
    values = native.to_float32(y, "f16")
    assert np.isnan(values[:, 2]).all()
    assert not np.isfinite(values[:, 5]).any()
    assert np.isfinite(values[:, [0, 1, 3, 4]]).all()
