"""Inputs that kernels are tried on."""

from __future__ import annotations

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


def scales(count: int, seed: int = 0) -> native.Array:
    """Positive scales of all sizes, with NaN, infinity, zero and denormals among them."""
    random = np.random.default_rng([count, seed, 4])
    values = np.exp2(random.uniform(-20, 10, count)).astype(np.float32)
    for special in (np.nan, np.inf, 0.0, 1e-42, 3e38):
        values[random.random(count) < 0.02] = special
    return values
