"""The CUDA sources on the processor with AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

Buffers have their exact size: a read behind the end, which may do no harm elsewhere, is found here; as is what no
barrier orders, whatever the results.
"""

from __future__ import annotations

from collections.abc import Iterator

import build_host
import launches
import native
import numpy as np
import pytest
import values
from harness import program
from launches import Check, Described, Product, Scales
from native import QUANT_TYPES, STORED


def of_quantize(source: Described) -> Iterator[Check]:
    """Every kernel; a ragged end, an odd number, nothing aligned; a block of values on many warps."""
    for dtype in STORED:
        item = STORED[dtype].itemsize
        for quant_type in QUANT_TYPES:
            for n, blocksize, shifts in (
                (8192 + 77, 64, (0, 0)),
                (333, 4096, (item, 3)),
                (4097, 512, (0, 0)),
                (1, 32, (0, 1)),
            ):
                yield launches.quantize(source, values.awkward(n, dtype), dtype, quant_type, blocksize, shifts)
            yield launches.quantize(source, values.normal(999, dtype), dtype, quant_type, 64, (item, 1), slow=True)


def of_dequantize(source: Described) -> Iterator[Check]:
    """Every kernel, with the same in mind."""
    for dtype in STORED:
        item = STORED[dtype].itemsize
        for nested in (False, True):
            for n, blocksize, shifts in (
                (8192 + 77, 64, (0, 0)),
                (333, 4096, (3, item)),
                (2049, 32, (4, 16)),
                (1, 32, (0, 0)),
            ):
                absmax = np.abs(values.normal(-(-n // blocksize), "f32"))
                scales = Scales.nested(absmax) if nested else Scales.plain(absmax)
                for slow in (False, True):
                    yield launches.dequantize(source, values.codes(n), scales, n, dtype, "nf4", blocksize, shifts, slow)


def of_nested(source: Described) -> Iterator[Check]:
    """A warp that has nothing to do, a group that is not full, more levels than needed, sums of two warps."""
    for n, levels in ((1, 1), (256, 1), (2500, 2), (70001, 1)):
        yield launches.compress(source, np.abs(values.normal(n, "f32")), levels)


def of_product(source: Described) -> Iterator[Check]:
    """Every kernel."""
    for k, dtype in enumerate(STORED):
        for nested in (False, True):
            product = Product.random(3, 7, 65, dtype, QUANT_TYPES[k % 2], 32, nested=nested, bias=nested)
            yield launches.plain_product(source, product, shift=1)


def of_decode(source: Described) -> Iterator[Check]:
    """Every kernel: parts of K for several warps, and enough of it for one warp to use each place twice."""
    for dtype in ("bf16", "f16"):
        for nested in (False, True):
            for m in (3, 11):
                for k, plan in ((320, (21, 4, 1)), (1088, (37, 1, 3))):
                    product = Product.random(m, 37, k, dtype, "nf4", 64, nested=nested, bias=nested)
                    yield launches.decode(source, product, *plan)


def of_decode_ring(source: Described) -> Iterator[Check]:
    """The same by way of shared memory: scales one by one and four at a time, one round of chunks and two."""
    for dtype in ("bf16", "f16"):
        for nested in (False, True):
            for m in (3, 11):
                for k, plan in ((320, (21, 4, 1)), (1088, (37, 1, 3)), (2304, (37, 4, 2))):
                    product = Product.random(m, 37, k, dtype, "nf4", 64, nested=nested, bias=nested)
                    yield launches.decode_ring(source, product, *plan)


def of_floor(source: Described) -> Iterator[Check]:
    """Shares of different sizes, and none; the one sum that is written."""
    words = np.random.default_rng(8).integers(0, 1 << 32, (2600, 4), np.uint32)
    for count, out_count, grid in ((2600, 3000, 3), (5, 2, 3), (1, 700, 1)):
        yield launches.floor(source, words[:count], out_count, grid)
    yield launches.floor_read(source, words, 2, 7)
    magic = np.array([[0, 0, 0x9E3779B9, 0]], np.uint32)
    yield launches.floor_read(source, magic, 1, 0x9E3779B9)


FAMILIES = {
    "quantize": of_quantize,
    "dequantize": of_dequantize,
    "nested": of_nested,
    "product": of_product,
    "decode": of_decode,
    "decode_ring": of_decode_ring,
    "floor": of_floor,
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("mode", "highest_first"), [("asan", False), ("asan", True), ("tsan", False)])
def test_no_sanitizer_complains(name: str, mode: str, highest_first: bool) -> None:
    source = program(name, mode)
    checks = list(FAMILIES[name](source))
    for check, results in zip(checks, source.run_all([c.case for c in checks], highest_first), strict=True):
        check.against(results)


def test_every_kernel_is_run() -> None:
    for name, cases in FAMILIES.items():
        source = program(name, "asan")
        run = {launch.kernel for check in cases(source) for launch in check.case.launches}
        assert run == set(source.threads), name


def test_every_source_is_here() -> None:
    assert {path.stem for path in build_host.KERNELS.glob("*.cu")} == set(FAMILIES)


def test_what_is_compared_is_not_empty() -> None:
    """The comparison itself: one wrong bit is a difference, NaN for NaN is none."""
    ones = np.ones(4, np.float32)
    other = ones.copy()
    other[2] = np.nextafter(np.float32(1), np.float32(2))
    assert launches.bits(ones)(other)
    nans = np.array([0x7FC00000, 0x7FFFFFFF], np.uint32).view(np.float32)
    assert not launches.bits(nans)(nans[::-1].copy())
    assert not native.same_bits(ones, np.full(4, np.nan, np.float32))
