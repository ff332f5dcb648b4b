"""What the engine computes for lanes and threads together, compared with numpy."""

from __future__ import annotations

import build_emulator
import native
import numpy as np
import pytest
from harness import Buffer, Case, KernelError, Launch, built, pointers

SOURCE = build_emulator.HERE / "tests" / "collectives.cu"
WAYS = [("library", False), ("library", True), ("asan", False), ("tsan", False)]


def by_half(values: np.ndarray) -> np.ndarray:
    """A result for each half of each warp, given to its lanes."""
    return np.repeat(values, 16)


@pytest.mark.parametrize(("mode", "highest_first"), WAYS)
def test_collectives(mode: str, highest_first: bool) -> None:
    x = np.random.default_rng(2).integers(0, 200, 64, np.uint32)
    out = np.zeros((64, 16), np.uint32)
    case = Case([Launch("collect", 1, 64, [pointers(Buffer(x)), pointers(Buffer(out))])])
    _, found = built(SOURCE, mode).run(case, highest_first)

    thread = np.arange(64)
    lane, warp = thread % 32, thread // 32 * 32
    halves = x.reshape(4, 16)
    powers = 1 << np.arange(16, dtype=np.uint32)
    votes = ((halves % 3 == 0) * powers).sum(1).astype(np.uint32) << np.tile(np.array([0, 16], np.uint32), 2)
    warps = x.reshape(2, 32)
    matches = (warps[:, :, None] % 4 == warps[:, None, :] % 4) @ (1 << np.arange(32, dtype=np.uint64))
    expected = [
        x[thread // 8 * 8 + (thread + 5) % 8],
        x[np.where(lane >= 3, thread - 3, thread)],
        x[np.where(thread % 16 + 2 < 16, np.minimum(thread + 2, 63), thread)],
        x[warp + (lane ^ 9)],
        by_half(votes),
        by_half((halves % 50 == 0).any(1)),
        by_half((halves % 50 != 0).all(1)),
        matches.reshape(-1),
        by_half(halves.sum(1)),
        np.repeat(warps.min(1), 32),
        np.repeat(warps.max(1), 32),
        np.repeat(np.bitwise_xor.reduce(warps, axis=1), 32),
        np.full(64, (x % 3 == 0).sum()),
        np.zeros(64),
        np.ones(64),
        4 * x[warp + (lane ^ 16)] + 1,
    ]
    for k, wanted in enumerate(expected):
        assert np.array_equal(found[:, k], np.asarray(wanted).astype(np.uint32)), k


@pytest.mark.parametrize(("mode", "highest_first"), WAYS)
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_a_tile_of_the_matrix_units(dtype: str, mode: str, highest_first: bool) -> None:
    random = np.random.default_rng(3)
    a = native.from_float32(random.standard_normal((16, 16), np.float32), dtype)
    b = native.from_float32(random.standard_normal((16, 8), np.float32), dtype)
    d = np.zeros((16, 8), np.float32)
    arguments = [pointers(Buffer(a)), pointers(Buffer(b)), pointers(Buffer(d))]
    found = built(SOURCE, mode).run(Case([Launch(f"multiply_{dtype}", 1, 32, arguments)]), highest_first)[2]
    exact = native.to_float32(a, dtype).astype(np.float64) @ native.to_float32(b, dtype).astype(np.float64)
    assert np.allclose(found, exact, rtol=2.0**-23, atol=1e-12)


@pytest.mark.parametrize(("mode", "highest_first"), WAYS)
def test_a_tile_of_integers(mode: str, highest_first: bool) -> None:
    """Every sum is exact, the lowest code too, and one that leaves int32 comes in again on the other side."""
    random = np.random.default_rng(4)
    a = random.integers(-128, 128, (16, 32)).astype(np.int8)
    b = random.integers(-128, 128, (8, 32)).astype(np.int8)
    a[0], b[0] = -128, -128
    d = random.integers(-(1 << 31), 1 << 31, (16, 8)).astype(np.int32)
    d[0, 0] = (1 << 31) - 1
    arguments = [pointers(Buffer(a)), pointers(Buffer(b)), pointers(Buffer(d))]
    found = built(SOURCE, mode).run(Case([Launch("multiply_s8", 1, 32, arguments)]), highest_first)[2]
    exact = d.astype(np.int64) + a.astype(np.int64) @ b.T.astype(np.int64)
    assert exact.max() > np.iinfo(np.int32).max
    assert np.array_equal(found, exact.astype(np.int32))


def test_launches_that_no_driver_would_take_are_refused() -> None:
    library = built(SOURCE, "library")
    x, out = Buffer(np.zeros(64, np.uint32)), Buffer(np.zeros(64 * 16, np.uint32))
    both = [pointers(x), pointers(out)]
    for launch, words in (
        (Launch("missing", 1, 64, both), "no such kernel"),
        (Launch("collect", 1, 65, both), "65 threads, where 1 to 64 can be"),
        (Launch("collect", 0, 64, both), "a grid that no device takes"),
        (Launch("collect", 1, 64, both[:1]), "1 arguments for 2"),
        (Launch("collect", 1, 64, [pointers(x), pointers(out, out)]), "argument 1 has 16 bytes, its parameter 8"),
        (Launch("collect", 1, 64, both, shared=1 << 20), "more shared memory"),
        (Launch("collect", 2, 64, both, window=(1, 2)), "blocks that the grid lacks"),
    ):
        with pytest.raises(KernelError, match=words):
            library.run(Case([launch]))
