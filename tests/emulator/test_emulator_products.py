"""The CUDA sources of products with quantized weights, on the processor: within the bound of their arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import launches_gemm
import native
import numpy as np
import pytest
from harness import library, run_both_ways
from launches_gemm import Product
from thorough import thorough


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_simt(dtype: str, quant_type: str) -> None:
    """Any shape, alignment and block size; blocks run on across rows."""
    source = library("gemm_4bit_simt")
    shapes = [(1, 1, 1), (1, 9, 31), (3, 7, 65), (2, 5, 100), (5, 3, 129), (1, 16, 512)]
    for k, (shape, blocksize) in enumerate(zip(shapes, itertools.cycle((32, 64, 4096)), strict=False)):
        product = Product.random(*shape, dtype, quant_type, blocksize, nested=k % 2 == 1, bias=k % 3 == 1)
        check = launches_gemm.simt(source, product, shift=k % 4)
        check.against(run_both_ways(source, check.case))


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_gemv(dtype: str) -> None:
    """By words and by single codes: K that ends inside of a word, strides and alignments that have no words."""
    source = library("gemv_4bit")
    for rows, k, stride, blocksize, shift in (
        (1, 1, 1, 32, 0), (9, 64, 32, 64, 0), (3, 300, 152, 64, 0), (2, 700, 352, 4096, 0), (5, 64, 32, 32, 1),
        (17, 99, 50, 128, 2), (8, 1030, 516, 256, 4),
    ):  # fmt: skip
        check = launches_gemm.gemv(source, rows, k, stride, dtype, blocksize, shift)
        check.against(run_both_ways(source, check.case))


# N, K, the block size and the plan: fewer rows than a tile, rows that end inside of one; K of one block, of parts that
# differ in length, of several chunks; one pass and several, of as many tiles as they allow or fewer.
SM80 = [
    (5, 64, 64, (5, 1, 1)),
    (16, 128, 64, (16, 2, 1)),
    (40, 192, 128, (24, 1, 2)),
    (70, 320, 64, (40, 4, 1)),
    (33, 640, 4096, (33, 8, 3)),
    (50, 1088, 256, (50, 1, 4)),
]


def small_products(m: int, n: int, k: int, blocksize: int) -> Iterator[Product]:
    """Both types and codebooks, with and without what is optional."""
    for j, (dtype, quant_type) in enumerate(itertools.product(("bf16", "f16"), ("nf4", "fp4"))):
        yield Product.random(m, n, k, dtype, quant_type, blocksize, nested=(j + m) % 2 == 1, bias=(j + n) % 3 == 0)


@pytest.mark.parametrize(("n", "k", "blocksize", "plan"), SM80)
@pytest.mark.parametrize("m", [1, 3, 8, 9, 16])
def test_small_m_sm80(m: int, n: int, k: int, blocksize: int, plan: tuple[int, int, int]) -> None:
    source = library("gemm_4bit_small_m_sm80")
    for product in small_products(m, n, k, blocksize):
        check = launches_gemm.small_m_sm80(source, product, *plan)
        check.against(run_both_ways(source, check.case))


@pytest.mark.parametrize(("n", "k", "blocksize", "plan"), SM80)
@pytest.mark.parametrize("m", [1, 3, 8, 9, 16])
def test_small_m_sm75(m: int, n: int, k: int, blocksize: int, plan: tuple[int, int, int]) -> None:
    source = library("gemm_4bit_small_m_sm75")
    for product in small_products(m, n, k, blocksize):
        if product.dtype == "f16":
            check = launches_gemm.small_m_sm75(source, product, *plan)
            check.against(run_both_ways(source, check.case))


def test_small_m_sm75_scale_that_is_not_finite_stays_in_its_row() -> None:
    source = library("gemm_4bit_small_m_sm75")
    launches_gemm.odd_scales_stay(source, "f16", lambda p: launches_gemm.small_m_sm75(source, p, 6, 2, 1))


# Besides: four scales of a slot that lie together, a slot of which four or eight blocks are not there, slots that have
# nothing; a last pass of fewer steps; one chunk, two, of which the second has slots with nothing, several rounds, and
# of these the last of one chunk instead of two.
SM90 = [
    *SM80,
    (20, 1024, 64, (20, 4, 2)),
    (70, 512, 64, (70, 2, 1)),
    (70, 768, 64, (70, 4, 1)),
    (33, 2048, 64, (17, 4, 1)),
    (19, 2304, 64, (19, 4, 2)),
    (3, 2816, 64, (2, 4, 1)),
    (18, 1024, 128, (18, 4, 3)),
    (50, 1280, 64, (50, 8, 3)),
    (36, 4096, 64, (36, 8, 2)),
    (90, 2880, 64, (90, 2, 3)),
    (36, 8192, 64, (36, 8, 3)),
    (18, 9216, 64, (18, 8, 1)),
]


@pytest.mark.parametrize(("n", "k", "blocksize", "plan"), SM90)
@pytest.mark.parametrize("m", thorough([1, 3, 8, 9, 16, 17, 32], quick=(1, 9, 32)))
def test_small_m_sm90(m: int, n: int, k: int, blocksize: int, plan: tuple[int, int, int]) -> None:
    rows, slots, per_pass = plan
    source = library(launches_gemm.Ring(m, k, slots).family)
    for i, product in enumerate(small_products(m, n, k, blocksize)):
        check = launches_gemm.small_m_sm90(source, product, rows, slots, per_pass, sharing=(4, 1, 2, 8)[i])
        check.against(run_both_ways(source, check.case))


# One k-tile, with k-slices that have nothing; several, of which the last leaves some nothing; one warp for all of K.
ONE_ROW = [*SM90, (20, 576, 64, (20, 1, 1)), (40, 3584, 64, (32, 4, 1)), (35, 1152, 64, (35, 1, 2))]


@pytest.mark.parametrize(("n", "k", "blocksize", "plan"), ONE_ROW)
def test_one_row_sm90(n: int, k: int, blocksize: int, plan: tuple[int, int, int]) -> None:
    source = library("gemm_4bit_small_m_sm90_one")
    for i, product in enumerate(small_products(1, n, k, blocksize)):
        check = launches_gemm.one_row_sm90(source, product, *plan, scale_shift=4 * (i % 2))
        check.against(run_both_ways(source, check.case))


@pytest.mark.parametrize("k", [320, 4160])
def test_one_row_sm90_of_which_some_values_are_infinite(k: int) -> None:
    """What the matrix units make of other blocks' values is thrown away: a row is infinite, none is NaN."""
    source = library("gemm_4bit_small_m_sm90_one")
    product = Product.random(1, 20, k, "bf16", "nf4", 64)
    # The codes' value there is no zero.
    at = next(i for i in range(k) if (product.weights[:, i] != 0).all())
    x = native.to_float32(product.x, "bf16")
    x[0, at] = np.inf
    product = replace(product, x=native.from_float32(x, "bf16"))
    check = launches_gemm.one_row_sm90(source, product, 20, 4, 1)
    y = run_both_ways(source, check.case)[-1]
    wanted = np.where(product.weights[:, at] > 0, np.inf, -np.inf)
    assert np.array_equal(native.to_float32(y, "bf16")[0], wanted)


def test_small_m_sm90_with_as_many_steps_as_a_large_weight_has() -> None:
    source = library("gemm_4bit_small_m_sm90_long")
    product = Product.random(3, 20, 8256, "bf16", "nf4", 64)
    check = launches_gemm.small_m_sm90(source, product, 1760, 8, 1, sharing=8)
    check.against(run_both_ways(source, check.case))


@pytest.mark.parametrize("k", [576, 1024, 9216])
def test_small_m_sm90_takes_scales_of_any_alignment(k: int) -> None:
    for m in (5, 20):
        source = library(launches_gemm.Ring(m, k, 4).family)
        product = Product.random(m, 20, k, "bf16", "nf4", 64)
        check = launches_gemm.small_m_sm90(source, product, 20, 4, 2, scale_shift=4)
        check.against(run_both_ways(source, check.case))
