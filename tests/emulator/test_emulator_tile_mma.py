"""The products of more than a few rows by mma.sync (gemm_4bit_tile_sm80 and gemm_4bit_tile_sm75) on the processor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import launches_gemm
import numpy as np
import pytest
from harness import Case, KernelError, library, run_both_ways
from launches_gemm import Check, Product

TOKENS_SM80 = (64, 128)
# Rows of x, N, K, the block size, and the parts of K: tails of each, one k-tile, as many as stages and more, and a last
# part that is short.
SHAPES_SM80 = [
    (1, 128, 64, 64, 1),
    (33, 129, 320, 32, 1),
    (64, 100, 512, 256, 2),
    (65, 7, 640, 64, 4),
    (129, 40, 192, 4096, 1),
    (150, 200, 448, 128, 3),
]


@pytest.mark.parametrize("tokens", TOKENS_SM80)
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_tile_sm80(dtype: str, tokens: int) -> None:
    """Within the bound of the kernel's arithmetic, and the same bits in both orders of threads, blocks and copies."""
    source = library("gemm_4bit_tile_sm80")
    for i, (m, n, k, blocksize, parts) in enumerate(SHAPES_SM80):
        nested, bias = (i + tokens // 64) % 2 == 1, i % 3 != 0
        product = Product.random(m, n, k, dtype, ("nf4", "fp4")[i % 2], blocksize, nested, bias)
        check = launches_gemm.tile_sm80(source, product, tokens, parts)
        check.against(run_both_ways(source, check.case))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_tile_sm80_identity_gives_the_dequantized_weight(dtype: str, quant_type: str, nested: bool) -> None:
    """Bit for bit, but for the sign of zeros: each value at its place, whatever the block size."""
    source = library("gemm_4bit_tile_sm80")
    for i, (n, k, blocksize, parts) in enumerate(
        [(130, 128, 32, 2), (129, 192, 64, 1), (40, 320, 128, 2), (7, 64, 4096, 1)]
    ):
        product = Product.identity(n, k, dtype, quant_type, blocksize, nested)
        check = launches_gemm.tile_sm80(source, product, TOKENS_SM80[(i + nested) % 2], parts, exact=True)
        check.against(run_both_ways(source, check.case))


TOKENS_SM75 = (32, 64)
# Rows of x, N, K, the block size, and the parts of K: tails of each, one k-tile and more, a short last part.
SHAPES_SM75 = [
    (1, 128, 64, 64, 1),
    (33, 129, 320, 64, 1),
    (64, 100, 512, 256, 2),
    (65, 7, 640, 64, 4),
    (97, 40, 192, 4096, 1),
    (20, 200, 448, 128, 3),
]


@pytest.mark.parametrize("tokens", TOKENS_SM75)
@pytest.mark.parametrize("nested", [False, True])
def test_tile_sm75(nested: bool, tokens: int) -> None:
    """Within the bound of the kernel's arithmetic, and the same bits in both orders of threads and blocks."""
    source = library("gemm_4bit_tile_sm75")
    for i, (m, n, k, blocksize, parts) in enumerate(SHAPES_SM75):
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
        check = launches_gemm.tile_sm75(source, product, TOKENS_SM75[(i + nested) % 2], parts, exact=True)
        check.against(run_both_ways(source, check.case))


# ---- both ------------------------------------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize(
    ("name", "launch_of", "dtype", "tokens"),
    [
        pytest.param("gemm_4bit_tile_sm80", launches_gemm.tile_sm80, "bf16", 64, id="sm80"),
        pytest.param("gemm_4bit_tile_sm75", launches_gemm.tile_sm75, "f16", 32, id="sm75"),
    ],
)
Launcher = Callable[..., Check]


@BOTH
def test_tile_scales_of_any_alignment(name: str, launch_of: Launcher, dtype: str, tokens: int) -> None:
    source = library(name)
    product = Product.random(9, 20, 192, dtype, "nf4", 64)
    for shift in (0, 4):
        check = launch_of(source, product, tokens, scale_shift=shift)
        check.against(run_both_ways(source, check.case))


@BOTH
def test_tile_waits_only_for_blocks_that_start_before(name: str, launch_of: Launcher, dtype: str, tokens: int) -> None:
    """The other way round, a device with room for few blocks would wait for ever."""
    source = library(name)
    product = Product.random(5, 8, 128, dtype, "nf4", 64)
    check = launch_of(source, product, tokens, 2)
    (launch,) = check.case.launches
    with pytest.raises(KernelError, match="waits for a signal"):
        source.run(Case([replace(launch, in_order=False)]), highest_first=True)


@BOTH
@pytest.mark.parametrize("times", [1, 2])
def test_tile_writes_only_what_is_there(name: str, launch_of: Launcher, dtype: str, tokens: int, times: int) -> None:
    """Neither rows of y beyond M nor columns beyond N: a run for part of the blocks leaves the others alone."""
    source, tokens = library(name), tokens * times
    product = Product.random(tokens + 1, 140, 64, "f16", "fp4", 64, bias=True)
    check = launch_of(source, product, tokens)
    (launch,), ((y, _),) = check.case.launches, check.wanted
    index = next(k for k, buffer in enumerate(check.case.buffers) if buffer is y)
    found = source.run(Case([replace(launch, window=(0, 1))]))[index]
    whole = source.run(check.case)[index]
    inside = np.zeros(found.shape, bool)
    inside[:tokens, :128] = True
    assert np.array_equal(found[inside], whole[inside])
    assert np.array_equal(found[~inside], y.data[~inside])


@BOTH
def test_tile_odd_scale_stays_in_its_row(name: str, launch_of: Launcher, dtype: str, tokens: int) -> None:
    source = library(name)
    launches_gemm.odd_scales_stay(source, dtype, lambda product: launch_of(source, product, tokens, 2))
