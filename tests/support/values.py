"""Inputs that kernels are tried on."""

from __future__ import annotations

import launches
import native
import numpy as np
import reference


def normal(n: int, dtype: str, seed: int = 0) -> np.ndarray:
    """Normal values."""
    return native.from_float32(np.random.default_rng([n, seed]).standard_normal(n, np.float32), dtype)


def patterns(dtype: str) -> np.ndarray:
    """All 65,536 values of a 16-bit type, NaN and infinities too: neighbours are close to one another."""
    return np.arange(65536, dtype=np.uint16).view(native.STORED[dtype])


def mixed(dtype: str) -> np.ndarray:
    """The same, in an order in which a block has values of all sizes."""
    return np.random.default_rng(5).permutation(patterns(dtype))


def scaled_patterns(dtype: str) -> np.ndarray:
    """Every finite value of a 16-bit type as one of a block of 32 whose largest has a similar size: all codes occur."""
    bits = np.arange(65536, dtype=np.uint16)
    finite = bits[np.isfinite(native.to_float32(bits.view(native.STORED[dtype]), dtype))]
    by_size = finite[np.argsort(finite & 0x7FFF, kind="stable")]
    # Neighbours of a block are far apart enough to reach from the largest to a tenth of it.
    step = by_size.size // 32
    return by_size[: step * 32].reshape(32, step).T.reshape(-1).view(native.STORED[dtype])


def awkward(n: int, dtype: str, seed: int = 0) -> np.ndarray:
    """Stretches of zeros, denormals, the largest values, NaN and infinities between normal ones."""
    random = np.random.default_rng([n, seed, 9])
    values = random.standard_normal(n).astype(np.float32)
    tiny, huge = {"f32": (1e-40, 3.4e38), "bf16": (1e-40, 3.38e38), "f16": (6e-8, 65504.0)}[dtype]
    kinds = np.repeat(random.integers(0, 12, n // 40 + 1), 40)[:n]
    values[kinds == 1] = 0.0
    values[kinds == 2] = -0.0
    values[kinds == 3] *= np.float32(tiny)
    values[kinds == 4] *= np.float32(tiny * 100)
    large = np.clip(values[kinds == 5], -1, 1)
    values[kinds == 5] = large * np.float32(huge)
    for kind, special in ((6, np.nan), (7, np.inf), (8, -np.inf)):
        values[(kinds == kind) & (random.random(n) < 0.1)] = special
    return native.from_float32(values, dtype)


def at_thresholds(quant_type: str, blocksize: int) -> np.ndarray:
    """Float32 within some steps of the places where codes change, in blocks of all sizes from 2^-149 to 2^127."""
    levels = reference.THRESHOLDS[quant_type]
    levels = np.concatenate([levels, -levels])
    random = np.random.default_rng(blocksize)
    blocks = []
    for exponent in np.concatenate([np.arange(-149, 128, 7), np.arange(-128, -120), [126, 127]]):
        mantissa = np.float32(random.uniform(1, 2)) if exponent > -126 else np.float32(1)
        largest = np.ldexp(mantissa, int(exponent)).astype(np.float32)
        block = (random.choice(levels, blocksize) * largest).astype(np.float32)
        steps = random.integers(-3, 4, blocksize)
        block = (block.view(np.int32) + np.where(block == 0, 0, steps)).astype(np.int32).view(np.float32)
        block = np.clip(block, -largest, largest)
        block[random.integers(blocksize)] = largest
        blocks.append(block)
    return np.concatenate(blocks)


def codes(n: int, seed: int = 0) -> native.Bytes:
    """Packed codes of `n` values, the last nibble of an odd number included."""
    return np.random.default_rng([n, seed, 3]).integers(0, 256, -(-n // 2), np.uint8)


def table(rows: int, columns: int, quant_type: str, blocksize: int, nested: bool, seed: int = 0) -> launches.Table:
    """Random codes, with scales of all sizes where they are not nested."""
    blocks = -(-rows * columns // blocksize)
    absmax = np.abs(normal(blocks, "f32", seed)) if nested else scales(blocks, seed)
    kind = launches.Scales.nested if nested else launches.Scales.plain
    return launches.Table((rows, columns), quant_type, blocksize, codes(rows * columns, seed), kind(absmax))


def scales(count: int, seed: int = 0) -> native.Array:
    """Positive scales of all sizes, with NaN, infinity, zero and denormals among them."""
    random = np.random.default_rng([count, seed, 4])
    values = np.exp2(random.uniform(-20, 10, count)).astype(np.float32)
    for special in (np.nan, np.inf, 0.0, 1e-42, 3e38):
        values[random.random(count) < 0.02] = special
    return values


def maps() -> dict[str, native.Array]:
    """Maps of 256 ascending values: the dynamic one, evenly spaced ones, and some with all that the search may meet."""
    random = np.random.default_rng(11)
    dynamic = np.array(native.dynamic_map(), np.float32)
    crowded = np.sort(np.concatenate([np.linspace(0.5, 0.5001, 200), random.uniform(-1, 1, 56)])).astype(np.float32)
    sizes = np.exp2(random.uniform(-149, 127, 256)).astype(np.float32) * random.choice([-1, 1], 256)
    return {
        "dynamic": dynamic,
        "linear": np.linspace(-1, 1, 256, dtype=np.float32),
        "unsigned": np.linspace(0, 1, 256, dtype=np.float32),
        "padded": np.sort(np.concatenate([np.linspace(-1, 1, 16), np.zeros(240)])).astype(np.float32),
        "crowded": crowded,
        "sizes": np.sort(sizes).astype(np.float32),
        "symmetric": np.sort(np.concatenate([dynamic[:128], -dynamic[:128]])).astype(np.float32),
    }


def at_boundaries(map_: native.Array, blocksize: int) -> native.Array:
    """Float32 within some steps of the map's values and of the middles between them, in blocks of several scales."""
    with np.errstate(over="ignore"):
        middles = (map_[:-1] + map_[1:]) * np.float32(0.5)
    points = np.concatenate([map_, middles, np.exp2(np.arange(-24, 1)), np.arange(64, 129) / 128]).astype(np.float32)
    points = np.concatenate([points, -points])
    points = np.unique(points[np.abs(points) <= 1])
    steps = (points.view(np.int32)[:, None] + np.arange(-2, 3, dtype=np.int32)).view(np.float32).reshape(-1)
    near = steps[np.abs(steps) <= 1]
    per_block = max(blocksize - 1, 1)
    near = np.concatenate([near, np.zeros(-near.size % per_block, np.float32)]).reshape(-1, per_block)
    blocks = np.concatenate([np.ones((len(near), 1), np.float32), near], axis=1)
    with np.errstate(under="ignore"):
        return np.concatenate([(blocks * np.float32(s)).reshape(-1) for s in (1.0, 0.3, 2.0**-140)])
