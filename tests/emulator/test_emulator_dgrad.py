"""Gradients of x by warpgroups (gemm_4bit_dgrad_sm90a) on the processor: bounds, bits, and any order of threads."""

from __future__ import annotations

import itertools
from dataclasses import replace

import build_emulator
import launches_gemm
import native
import numpy as np
import pytest
from harness import Case, built, library, run_both_ways
from launches import Scales
from launches_gemm import Product
from thorough import thorough

SOURCE = "gemm_4bit_dgrad_sm90a"
TOKENS = (64, 128, 256)
# Rows of dy, N, K, the block size, and the parts of N: tails of each, one unit of N and several, the last one short.
SHAPES = [
    (1, 256, 128, 64, 1),
    (33, 288, 160, 32, 1),
    (64, 8, 96, 256, 1),
    (65, 544, 32, 1024, 2),
    (100, 520, 256, 64, 2),
    (128, 72, 192, 4096, 1),
    (129, 320, 224, 512, 2),
    (200, 648, 64, 2048, 3),
    (257, 1024, 384, 64, 4),
]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", thorough(["bf16", "f16"], quick=("bf16",)))
def test_dgrad(dtype: str, tokens: int) -> None:
    """Within the bound of the kernel's arithmetic, and the same bits in both orders of threads, blocks and copies."""
    source = library(SOURCE)
    for i, (m, n, k, blocksize, parts) in enumerate(SHAPES):
        nested = (i + tokens // 64) % 2 == 1
        product = Product.random(m, n, k, dtype, ("nf4", "fp4")[i % 2], blocksize, nested).with_gradient()
        check = launches_gemm.dgrad_sm90a(source, product, tokens, parts)
        check.against(run_both_ways(source, check.case))


@pytest.mark.parametrize("tokens", TOKENS)
def test_dgrad_in_parts_through_memory(tokens: int) -> None:
    """Blocks that share a tile without being a cluster: two, more, parts of different length, tails."""
    source = library(SOURCE)
    shapes = [(5, 768, 160, 64, 6), (tokens + 3, 1288, 96, 32, 8), (tokens, 1024, 64, 128, 4), (9, 512, 128, 64, 2)]
    for i, (m, n, k, blocksize, ranges) in enumerate(shapes):
        product = Product.random(m, n, k, "bf16", ("nf4", "fp4")[i % 2], blocksize, i % 2 == 1).with_gradient()
        check = launches_gemm.dgrad_sm90a(source, product, tokens, ranges=ranges)
        check.against(run_both_ways(source, check.case))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_dgrad_of_an_identity_is_the_dequantized_weight(dtype: str, quant_type: str, nested: bool) -> None:
    """Bit for bit, but for the sign of zeros: unpacked as dequantizing does it, each value at its place."""
    source = library(SOURCE)
    for i, (n, k, blocksize, parts) in enumerate([(136, 288, 32, 1), (64, 256, 64, 1), (544, 96, 128, 2)]):
        product = Product.random(1, n, k, dtype, quant_type, blocksize, nested).with_gradient(identity=True)
        check = launches_gemm.dgrad_sm90a(source, product, TOKENS[(i + nested) % 3], parts, exact=True)
        check.against(run_both_ways(source, check.case))


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_dgrad_of_block_sizes_that_rows_end_inside_of(blocksize: int) -> None:
    source = library(SOURCE)
    for nested, k in itertools.product((False, True), (288, 256)):
        product = Product.random(1, 72, k, "bf16", "nf4", blocksize, nested).with_gradient(identity=True)
        check = launches_gemm.dgrad_sm90a(source, product, 256, exact=True)
        check.against(run_both_ways(source, check.case))


@pytest.mark.parametrize("tokens", TOKENS)
def test_dgrad_writes_what_is_there(tokens: int) -> None:
    """Neither rows of dx beyond M nor columns beyond K: a run for part of the blocks leaves the others alone."""
    source = library(SOURCE)
    product = Product.random(tokens + 1, 64, 160, "f16", "fp4", 64).with_gradient()
    check = launches_gemm.dgrad_sm90a(source, product, tokens)
    (launch,), ((dx, _),) = check.case.launches, check.wanted
    index = next(k for k, buffer in enumerate(check.case.buffers) if buffer is dx)
    found = source.run(Case([replace(launch, window=(0, 1))]))[index]
    whole = source.run(check.case)[index]
    inside = np.zeros(found.shape, bool)
    inside[:tokens, :128] = True
    assert np.array_equal(found[inside], whole[inside])
    assert np.array_equal(found[~inside], dx.data[~inside])


@pytest.mark.parametrize("highest_first", [False, True])
def test_dgrad_reads_what_is_there(highest_first: bool) -> None:
    """Each access to shared memory is known: none is made while a copy is on its way there or a product reads it."""
    source = built(build_emulator.source_of(SOURCE), "stores")
    for (dtype, tokens), parts in zip(
        itertools.product(("bf16", "f16"), TOKENS), itertools.cycle((1, 2, 3)), strict=False
    ):
        product = Product.random(tokens // 2 + 1, 648, 160, dtype, "nf4", 64, nested=parts == 2).with_gradient()
        check = launches_gemm.dgrad_sm90a(source, product, tokens, parts)
        check.against(source.run(check.case, highest_first))
        check = launches_gemm.dgrad_sm90a(source, product, tokens, ranges=4 * -(-product.x.shape[0] // tokens))
        check.against(source.run(check.case, highest_first))


def test_dgrad_with_a_scale_that_is_not_finite() -> None:
    """NaN and infinity reach the gradients of their columns, and no other; also those of the last row of W."""
    source = library(SOURCE)
    product = Product.random(3, 40, 256, "bf16", "nf4", 64).with_gradient()
    absmax = product.scales.absmax.copy()
    absmax[4 * 2], absmax[4 * 39 + 3] = np.nan, np.inf
    product = replace(product, scales=Scales.plain(absmax))
    check = launches_gemm.dgrad_sm90a(source, product, 64)
    found = run_both_ways(source, check.case)
    dx = found[next(k for k, buffer in enumerate(check.case.buffers) if buffer is check.wanted[0][0])]
    values = native.to_float32(dx, "bf16")
    assert np.isnan(values[:, :64]).all()
    assert np.isfinite(values[:, 64:192]).all()
    # Zero times infinity is NaN; anything else is infinite.
    zeros = product.weights[39, 192:] == 0
    assert np.isnan(values[:, 192:][:, zeros]).all()
    assert np.isinf(values[:, 192:][:, ~zeros]).all()
