"""The CUDA sources of LLM.int8() on the processor: exact sums, and without outliers the bits that everybody has."""

from __future__ import annotations

import int8
import launches
import native
import numpy as np
import pytest
import values
from harness import library, run_both_ways
from int8 import Plan, Product
from native import STORED

DTYPES = tuple(STORED)


def check(name: str, found: launches.Check) -> None:
    found.against(run_both_ways(library(name), found.case))


# Rows for a warp, for a block of threads, and longer than it has registers for; columns that end anywhere; some panels.
ROWS = [(1, 1), (70, 3), (33, 8), (9, 255), (20, 256), (9, 1024), (3, 1032), (2, 8192), (3, 8200), (2, 20001)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(dtype: str) -> None:
    source = library("int8_activations")
    for k, (rows, columns) in enumerate(ROWS):
        for data in (values.normal(rows * columns, dtype, k), values.awkward(rows * columns, dtype, k)):
            x = data.reshape(rows, columns)
            check("int8_activations", int8.activations(source, x, dtype, 0, 1 + k % 3))
            check("int8_activations", int8.activations(source, x, dtype, 0, 1 + k % 3, STORED[dtype].itemsize))


@pytest.mark.parametrize("exact", [False, True], ids=["rounded", "exact"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_with_outliers(dtype: str, exact: bool) -> None:
    """None, few, and all of the columns; infinities are outliers, NaN is none; any number of groups."""
    source = library("int8_activations")
    for k, (rows, columns) in enumerate(ROWS):
        for data, threshold in (
            (values.normal(rows * columns, dtype, k), 2.5),
            (values.normal(rows * columns, dtype, k), 1e30),
            (values.normal(rows * columns, dtype, k), 1e-30),
            (values.awkward(rows * columns, dtype, k), 6.0),
        ):
            x = data.reshape(rows, columns)
            shift = k % 2 * STORED[dtype].itemsize
            check("int8_activations", int8.activations(source, x, dtype, threshold, 1 + k % 4, shift, exact))


@pytest.mark.parametrize("dtype", DTYPES)
def test_outliers_of_activations_are_found(dtype: str) -> None:
    """None, few, and more than are copied; codes of the other columns."""
    source = library("int8_activations")
    for k, (rows, columns) in enumerate(ROWS):
        for data, threshold in (
            (values.normal(rows * columns, dtype, k), 2.5),
            (values.normal(rows * columns, dtype, k), 1e30),
            (values.awkward(rows * columns, dtype, k), 6.0),
        ):
            shift = k % 2 * STORED[dtype].itemsize
            x = data.reshape(rows, columns)
            check("int8_activations", int8.taken_out(source, x, dtype, threshold, 1 + k % 4, shift))


def test_codes_beside_ties() -> None:
    """Quotients half-way between codes and next to that, where a quicker division must not be trusted; any scale."""
    source = library("int8_activations")
    for scale in (1.0, 127.0, 3.0, 1e-35, 1e-39, 1e33, 3e38, 2.0**-100, 2.0**100):
        halves = (np.arange(-127, 127, dtype=np.float64) + 0.5) * (scale / 127)
        near = np.float32(halves[:, None] * (1 + np.arange(-4, 5) * 2.0**-23)).ravel()
        x = np.append(near, np.float32(scale))[None]
        check("int8_activations", int8.activations(source, x, "f32", np.inf, 1, exact=True))
        check("int8_activations", int8.activations(source, x, "f32", 0, 1))


def test_activations_are_rounded_as_float16_has_them() -> None:
    """Of float32: ties to even, carries into the exponent, what float16 has no range for; the threshold after that."""
    random = np.random.default_rng(5)
    raw = random.integers(0, 1 << 32, (6, 3000), np.uint32)
    raw[1] = raw[1] & 0xFFFFE000 | 0x1000
    raw[2] |= 0x7FF000
    raw[3] = raw[3] & 0x807FFFFF | 0x7F000000
    raw[4] = raw[4] & 0x807FFFFF | 0x00800000
    raw[5] = np.float32(6).view(np.uint32) - np.arange(3000, dtype=np.uint32)
    x = raw.view(np.float32)
    source = library("int8_activations")
    assert int8.rounded(x[5])[1] == 6
    for threshold in (0, 6.0):
        check("int8_activations", int8.activations(source, x, "f32", threshold))
    halves = native.to_float32(native.from_float32(values.normal(5000, "f32"), "f16"), "f16")
    assert np.array_equal(int8.rounded(halves), halves)
    sixteen = int8.rounded(values.normal(5000, "f32"))
    assert np.array_equal(sixteen, values.normal(5000, "f32").astype(np.float16).astype(np.float32))


# N, K and the plan: fewer rows than a tile, rows that end inside of one; K of one piece, of parts that differ in
# length, of slots that have nothing, of one round and several, the last of them of fewer chunks; stages for one turn to
# many.
PRODUCTS = [
    (5, 16, Plan(5, 1, 1, 32)),
    (16, 64, Plan(16, 1, 2, 0)),
    (40, 272, Plan(24, 2, 6, 32)),
    (70, 320, Plan(40, 2, 4, 64, ahead=5)),
    (33, 1040, Plan(33, 8, 2, 32)),
    (50, 2064, Plan(50, 8, 4, 32, ahead=5)),
    (19, 4096, Plan(10, 8, 1, 32)),
    (150, 1280, Plan(150, 1, 3, 64)),
    (21, 8720, Plan(21, 8, 4, 96, ahead=5)),
]


@pytest.mark.parametrize(("n", "k", "plan"), PRODUCTS)
@pytest.mark.parametrize("m", [1, 8, 9, 21, 40, 64])
def test_product(m: int, n: int, k: int, plan: Plan) -> None:
    """Every type, with and without bias and outliers, of which more than there is room for."""
    source = library("int8_product")
    for i, dtype in enumerate((*DTYPES, "i32")):
        outliers = 0.0 if dtype == "i32" or (m + i) % 2 else (0.01, 0.3)[i % 2]
        bias = None if dtype == "i32" else (None, "f32", dtype)[(m + n + i) % 3]
        check("int8_product", int8.product(source, Product.random(m, n, k, dtype, outliers, bias), plan))


def test_products_of_the_largest_codes() -> None:
    for k in (8192, 133_136):
        product = Product.random(3, 18, k, "i32", largest=True)
        check("int8_product", int8.product(library("int8_product"), product, Plan(18, 8, 2, 0)))
        check("int8_plain", int8.plain(library("int8_plain"), product))


@pytest.mark.parametrize("dtype", [*DTYPES, "i32"])
def test_plain_product(dtype: str) -> None:
    source = library("int8_plain")
    shapes = [(1, 1, 1), (1, 9, 31), (3, 70, 65), (33, 5, 100), (40, 40, 129), (2, 33, 0)]
    for i, (m, n, k) in enumerate(shapes):
        outliers = 0.1 if dtype != "i32" and k and i % 2 else 0.0
        bias = None if dtype == "i32" else (None, "f16", dtype)[i % 3]
        product = Product.random(m, n, k, dtype, outliers, bias)
        check("int8_plain", int8.plain(source, product, shift=i % 4, pitch=k + i % 3))
