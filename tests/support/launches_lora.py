"""Launches of the products of LoRA adapters, and what must come of them."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import native
import numpy as np
from harness import Argument, Buffer, Case, Launch, int32, int64, pointers
from launches import Check, Described, bits, ceil_div, filled, near


@dataclass(frozen=True)
class Shape:
    """Rows, columns and ranks; types of what is multiplied and of two operands of kernels: "bf16", "f16" or "f32"."""

    rows: int
    columns: int
    rank: int
    dtype: str
    first: str
    second: str


def _values(seed: list[int], shape: tuple[int, int], dtype: str) -> np.ndarray:
    return native.from_float32(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def _type(dtype: str) -> np.dtype:
    return native.from_float32(np.zeros(1, np.float32), dtype).dtype


def _rounded(values: np.ndarray, dtype: str, to: str) -> np.ndarray:
    """To a type and back, in float32."""
    return native.to_float32(native.from_float32(native.to_float32(values, dtype), to), to)


def _factor(values: Buffer, dtype: str, rank: int, columns: int, transposed: bool) -> Argument:
    strides = (1, rank) if transposed else (columns, 1)
    return Argument(struct.pack("<Q4i", 0, *strides, rank, dtype == "f32"), ((0, values),))


def down(source: Described, shape: Shape, row_tiles: int = 1) -> Check:
    """Rows of `first` times a factor of `second`, by a kernel with so many tiles of rows."""
    rows, columns, rank, dtype = shape.rows, shape.columns, shape.rank, shape.dtype
    x = _values([rows, columns], (rows, columns), shape.first)
    factor = _values([columns, rank], (rank, columns), shape.second)
    ranks = next(tiles for tiles in (2, 4, 8) if tiles * source.constants["RANKS"] >= rank)
    kernel = f"lora_down_{dtype}_{shape.first}_{shape.second}_{ranks}_{row_tiles}"
    h = Buffer(filled(rows * rank, _type(dtype)).reshape(rows, rank))
    cast = Buffer(filled(rows * columns, _type(dtype)).reshape(rows, columns))
    blocks = ceil_div(rows, source.constants["ROWS"] * row_tiles)
    arguments = [
        pointers(Buffer(x)), _factor(Buffer(factor), shape.second, rank, columns, False),
        pointers(cast), pointers(h), int64(rows), int32(columns),
    ]  # fmt: skip
    launch = Launch(kernel, blocks, source.threads[kernel], arguments)
    a = _rounded(x, shape.first, dtype).astype(np.float64)
    b = _rounded(factor, shape.second, dtype).astype(np.float64)
    exact, size = a @ b.T, np.abs(a) @ np.abs(b).T
    bound = (columns / 16 + 16) * 2.0**-24 * size
    wanted = [(h, near(exact, bound + native.EPSILON[dtype] * (np.abs(exact) + bound) + 1e-30, dtype))]
    # Of 16-bit values there is no copy.
    copy = native.from_float32(native.to_float32(x, shape.first), dtype) if shape.first == "f32" else cast.data.copy()
    return Check(f"{kernel}, {shape}", Case([launch]), [*wanted, (cast, bits(copy))])


def up(
    source: Described, shape: Shape, transposed: bool, rows_of_block: int, factor_type: str, zeros: bool = False
) -> Check:
    """A product added to `first`, or to `zeros`, as `second`; and the factor the other way round."""
    rows, columns, rank, dtype = shape.rows, shape.columns, shape.rank, shape.dtype
    y = _values([rows, columns], (rows, columns), shape.first)
    h = _values([rows, rank], (rows, rank), dtype)
    factor = _values([columns, rank], (columns, rank) if transposed else (rank, columns), factor_type)
    steps = next(steps for steps in (1, 2, 4) if steps * source.constants["RANKS"] >= rank)
    kernel = f"lora_up_{dtype}_{shape.first}_{shape.second}_{steps}"
    out = Buffer(filled(rows * columns, _type(shape.second)).reshape(rows, columns))
    turned = Buffer(filled(rank * columns, _type(dtype)).reshape(rank, columns))
    twice = 1 if shape.second == "f32" or rank > 32 else 2
    across = ceil_div(columns, source.constants["WARPS"] * source.constants["COLUMNS"] * twice)
    scaling = 0.75
    arguments = [
        pointers(None if zeros else Buffer(y)), pointers(Buffer(h)),
        _factor(Buffer(factor), factor_type, rank, columns, transposed), Argument(struct.pack("<f", scaling)),
        pointers(out), pointers(turned), int64(rows), int32(columns), int32(rows_of_block),
    ]  # fmt: skip
    launch = Launch(kernel, ceil_div(rows, rows_of_block) * across, source.threads[kernel], arguments)
    a = native.to_float32(h, dtype).astype(np.float64)
    b = _rounded(factor, factor_type, dtype)
    b = b.T.copy() if transposed else b
    added = 0 * native.to_float32(y, shape.first) if zeros else native.to_float32(y, shape.first)
    exact = added.astype(np.float64) + scaling * (a @ b.astype(np.float64))
    size = np.abs(added) + scaling * (np.abs(a) @ np.abs(b))
    bound = (rank / 16 + 4) * 2.0**-24 * size
    rounding = 2.0**-24 if shape.second == "f32" else native.EPSILON[dtype]
    wanted = near(exact, bound + rounding * (np.abs(exact) + bound) + 1e-30, shape.second)
    return Check(
        f"{kernel}, {shape}, {factor_type}",
        Case([launch]),
        [(out, wanted), (turned, bits(native.from_float32(b, dtype)))],
    )
