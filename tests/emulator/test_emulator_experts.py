"""The CUDA sources of experts on the processor: slots to experts, the products, and the sum."""

from __future__ import annotations

import experts
import numpy as np
import pytest
from experts import Choices, Plan, Product
from harness import library, run_both_ways
from launches import Check
from thorough import thorough


def check(name: str, found: Check) -> None:
    found.against(run_both_ways(library(name), found.case))


@pytest.mark.parametrize("columns", [8, 16])
def test_route(columns: int) -> None:
    """Few slots and many, experts without any, one with all, ids of no expert, and none but these."""
    random = np.random.default_rng(1)
    source = library("experts_route")
    for choices in (
        Choices.of_counts([1]),
        Choices.of_counts([0, 3, 0, 1], 2),
        Choices.of_counts([0, 1, 9, 40], none=[4, -1, 1 << 40]),
        Choices.of_counts([0, 0], none=[2, 2, 7]),
        Choices.of_counts([1000] + [0] * 511),
        Choices(random.integers(0, 129, (300, 8)), 128),
        Choices(np.minimum(random.geometric(0.2, (700, 4)) - 1, 60), 60),
        Choices(np.argsort(random.random((40, 512)))[:, :6], 512),
    ):
        check("experts_route", experts.route(source, choices, columns))


SKEWED = Choices.of_counts([0, 1, 9, 40], 2, none=[4, -1])
EVEN = Choices.of_counts([1, 2, 0, 3, 1, 1, 2, 2], 4)

# Choices, n, k, block size and plan: rows and K of one block, of parts that differ in length, of several k-tiles;
# blocks of threads with several segments, one, and none; passes of one tile for each group, of fewer, and of all;
# units of several tiles.
SHAPES = [
    (EVEN, 64, 64, 64, Plan(3, 1, 16, 4)),
    (SKEWED, 64, 192, 64, Plan(5, 2, 8, 2)),
    (SKEWED, 128, 320, 128, Plan(7, 4, 4, 4)),
    (EVEN, 192, 704, 64, Plan(4, 8, 6, 2)),
    (EVEN, 64, 1088, 4096, Plan(90, 4, 2, 2)),
    (SKEWED, 192, 1088, 64, Plan(1, 1, 2, 2)),
]


@pytest.mark.parametrize("case", thorough(range(len(SHAPES)), quick=[0, 1]))
def test_products(case: int) -> None:
    """Both types and codebooks, plain and nested; blocks that sort slots themselves, and that find them sorted."""
    choices, n, k, blocksize, plan = SHAPES[case]
    source = library("experts_few")
    plan = Plan(plan.grid, plan.k_slices, plan.per_pass, plan.unit, routes=case % 2 == 0)
    for i, dtype in enumerate(("bf16", "f16")):
        for nested in (False, True):
            quant_type = ("nf4", "fp4")[(i + nested + case) % 2]
            gathers = (i + case) % 2 == 0
            product = Product.random(
                choices, n, k, dtype, quant_type, blocksize, gathers=gathers, nested=nested, bias=nested
            )
            check("experts_few", experts.few(source, product, plan))


@pytest.mark.parametrize("activation", thorough(experts.ACTIVATIONS, quick=["silu"]))
def test_gate_and_up(activation: str) -> None:
    """Every activation, with a bias and without; the rows of gate and up of a pass meet."""
    source = library("experts_few")
    for i, (choices, n, k, blocksize, plan) in enumerate(SHAPES[:4]):
        plan = Plan(plan.grid, plan.k_slices, plan.per_pass, plan.unit, routes=i % 2 == 1)
        dtype = ("bf16", "f16")[i % 2]
        product = Product.random(
            choices, n, k, dtype, "nf4", blocksize, projections=2, nested=i % 3 == 1, bias=i % 2 == 0
        )
        check("experts_few", experts.few(source, product, plan, activation))


def test_one_projection_with_an_activation() -> None:
    product = Product.random(EVEN, 128, 192, "bf16", bias=True)
    check("experts_few", experts.few(library("experts_few"), product, Plan(3, 2, 8, 8), "relu2"))


def test_more_segments_than_are_known_at_a_time() -> None:
    """One block of threads has all of 40 experts, in batches; and one finds many chunks of one expert."""
    source = library("experts_few")
    many = Choices.of_counts([1] * 40, 2)
    one = Choices.of_counts([200, 0, 56])
    for choices, routes in ((many, True), (many, False), (one, False)):
        product = Product.random(choices, 64, 128, "bf16", projections=2)
        check("experts_few", experts.few(source, product, Plan(1, 2, 8, 4, routes=routes), "silu"))


def test_no_expert_at_all() -> None:
    product = Product.random(Choices.of_counts([0, 0], none=[2, 5]), 64, 64, "f16")
    for routes in (False, True):
        check("experts_few", experts.few(library("experts_few"), product, Plan(2, 1, 16, 4, routes=routes)))


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_sum(dtype: str) -> None:
    """More choices than are loaded at once; slots of no expert, of which the rows are NaN."""
    source = library("experts_sum")
    random = np.random.default_rng(3)
    for tokens, top_k, columns in ((1, 1, 64), (1, 8, 2048), (5, 3, 192), (7, 11, 64), (3, 16, 1088)):
        for most in (8, 10):
            choices = Choices(random.integers(0, most, (tokens, top_k)), 8)
            check("experts_sum", experts.total(source, choices, columns, dtype, wide=most == 8))


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("nested", [False, True])
def test_dequantize(dtype: str, nested: bool) -> None:
    """Matrices of one tile, of several and of a part of one; experts without slots at both ends and between."""
    source = library("experts_dequantize")
    for counts, values, blocksize in (
        ([3, 0, 1, 0], 64 * 64, 64),
        ([0, 2, 0, 0, 5], 64 * 320, 128),
        ([1], 192 * 64, 4096),
        ([0, 0], 4096, 32),
    ):
        quant_type = "fp4" if len(counts) == 5 else "nf4"
        check("experts_dequantize", experts.dequantize(source, counts, values, dtype, quant_type, blocksize, nested))
