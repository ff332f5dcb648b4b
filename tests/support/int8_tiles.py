"""The product of LLM.int8() by warpgroups (kernels/int8/int8_tile_sm90a.cuh) as cases with their expected results."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import native
import numpy as np
from harness import Argument, Buffer, Case, Launch, int32, pointers, tensor_map
from int8 import PANEL_COLUMNS, masks_of, panel_of
from launches import Check, Described, bits, near

KINDS = {"bf16": 0, "f16": 1, "f32": 2, "i32": 3}
INVERSE_127 = np.float32(1) / np.float32(127)
# The distance of neighbours in [1, 2), and a sum's error for each of its roundings.
EPSILON = {"bf16": 2.0**-7, "f16": 2.0**-10, "f32": 2.0**-23}


@dataclass(frozen=True)
class Codes:
    """Both operands in int8; `columns` of x are outliers, whose codes are 0 and whose values are in `x`."""

    a: np.ndarray
    w: np.ndarray
    row_scales: np.ndarray
    column_scales: np.ndarray
    bias: np.ndarray | None
    bias_dtype: str
    dtype: str
    x: np.ndarray
    columns: np.ndarray

    @classmethod
    def random(
        cls, m: int, n: int, k: int, dtype: str, outliers: int = 0, bias: str | None = None, seed: int = 1
    ) -> Codes:
        """`bias`: its type. Some codes of each row are the extremes."""
        random = np.random.default_rng([seed, m, n, k])
        a, w = (random.integers(-127, 128, (rows, k)).astype(np.int8) for rows in (m, n))
        a[:, 0], w[:, 0], a[0], w[0] = -127, 127, 127, 127
        columns = np.sort(random.permutation(k)[:outliers]).astype(np.int32)
        a[:, columns] = 0
        x = random.standard_normal((m, k)).astype(np.float32) * 8
        values = x if dtype in ("f32", "i32") else native.from_float32(x, dtype).reshape(m, k)
        biases = None if bias is None else native.from_float32(random.standard_normal(n).astype(np.float32), bias)
        scales = [random.uniform(0.5, 2, size).astype(np.float32) for size in (m, n)]
        return cls(a, w, *scales, biases, bias or "f32", dtype, values, columns)

    @property
    def sums(self) -> np.ndarray:
        """Exact: a float64 has room for them."""
        return (self.a.astype(np.float64) @ self.w.astype(np.float64).T).astype(np.int32)

    def wanted(self) -> np.ndarray:
        """What y has to be, bit for bit, when no column is an outlier: each step in float32, and rounded once."""
        if self.dtype == "i32":
            return self.sums
        y = self.sums.astype(np.float32) * (self.row_scales * INVERSE_127)[:, None]
        y = y * (self.column_scales * INVERSE_127)
        if self.bias is not None:
            y = y + native.to_float32(self.bias, self.bias_dtype)
        return native.from_float32(y, self.dtype).reshape(y.shape)

    def near(self) -> tuple[np.ndarray, np.ndarray]:
        """What y has to be with outliers, and by how much it may differ."""
        x = native.to_float32(self.x, self.dtype).astype(np.float64)[:, self.columns]
        w = self.w[:, self.columns].astype(np.float64)
        begin = self.sums * (self.row_scales * INVERSE_127).astype(np.float64)[:, None]
        by = (self.column_scales * INVERSE_127).astype(np.float64)
        bias = 0 if self.bias is None else native.to_float32(self.bias, self.bias_dtype).astype(np.float64)
        y = (begin + x @ w.T) * by + bias
        size = (np.abs(begin) + np.abs(x) @ np.abs(w).T) * by
        steps = 3 * (len(self.columns) / 16 + 2)
        return y, size * steps * 2.0**-23 + np.abs(y) * EPSILON[self.dtype]


@dataclass(frozen=True)
class Tile:
    """How a launch divides its work. `listed`: whether there may be outliers; `shift`: of y, in bytes."""

    tokens: int
    parts: int = 1
    sharing: int = 1
    workers: int = 1000
    listed: bool = True
    shift: int = 0


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def tile_shared(tokens: int) -> int:
    """The dynamic shared memory of a block, as rust/cuda/src/int8/tile.rs has it."""
    stages = 4 if tokens > 128 else 6 if tokens > 64 else 8
    return stages * (16384 + 128 * tokens) + 2 * min(tokens, 128) * 128 + 8 * tokens + 8 * (3 * stages + 2)


def tile(source: Described, codes: Codes, plan: Tile) -> Check:
    """A launch."""
    (m, k), n, constants = codes.a.shape, codes.w.shape[0], source.constants
    rows, step = constants["ROWS"], constants["STEP"]
    assert k % 16 == 0, "rows have to be multiples of 16 bytes"
    steps = _ceil(k, step)
    of_part = _ceil(steps, plan.parts)
    assert of_part * (plan.parts - 1) < steps, "a part of K with nothing"
    token_tiles = _ceil(m, plan.tokens)
    tiles = token_tiles * _ceil(_ceil(n, rows), plan.sharing)
    workers = tiles if plan.parts > 1 else min(plan.workers, tiles)
    raw = codes.dtype == "i32"
    wanted = codes.wanted()
    y = Buffer(np.frombuffer(b"\xa7" * wanted.nbytes, wanted.dtype).copy().reshape(m, n), plan.shift)
    listed = plan.listed and not raw
    # Codes of outliers mean nothing; behind the last of them the list has anything.
    meant = codes.a.copy()
    meant[:, codes.columns if listed else []] = 99
    w, a = Buffer(codes.w), Buffer(meant)
    columns = np.full(k, 2**30, np.int32)
    columns[: len(codes.columns)] = codes.columns
    found = np.zeros((1, k), bool)
    found[0, codes.columns] = True
    panel = Buffer(panel_of(codes.x, codes.columns))
    # Of anything where there is none of 16-bit values.
    sixteen = listed and codes.dtype in ("bf16", "f16")
    panel_map = (panel, 2, (PANEL_COLUMNS, m), (2 * PANEL_COLUMNS,), (constants["CHUNK"], plan.tokens), 0)
    epilogue = pointers(
        None if raw else Buffer(codes.row_scales),
        None if raw else Buffer(codes.column_scales),
        None if raw or codes.bias is None else Buffer(codes.bias),
        y,
        Buffer(np.array([len(codes.columns)], np.int32)) if listed else None,
        Buffer(columns) if listed else None,
        Buffer(codes.x) if listed else None,
        Buffer(masks_of(found)) if listed else None,
        panel if listed else None,
    )
    kinds = struct.pack("<2I", KINDS[codes.dtype], KINDS[codes.bias_dtype])
    arguments = [
        tensor_map(w, 1, (k, n), (k,), (step, rows), 128),
        tensor_map(a, 1, (k, m), (k,), (step, plan.tokens // plan.sharing), 128),
        tensor_map(*panel_map) if sixteen else tensor_map(w, 1, (k, n), (k,), (step, rows), 128),
        pointers(w),
        Argument(epilogue.data + kinds, epilogue.addresses),
        int32(m), int32(n), int32(k),
        Argument(struct.pack("<6i", token_tiles, tiles, workers, of_part, plan.parts, plan.sharing)),
    ]  # fmt: skip
    cluster = plan.parts * plan.sharing
    kernel = f"int8_tile_sm90a_{plan.tokens}"
    launch = Launch(
        kernel, workers * cluster, source.threads[kernel], arguments, tile_shared(plan.tokens), cluster=cluster
    )
    name = f"{kernel}, {m} x {n} x {k}, {codes.dtype}, {len(codes.columns)} outliers, {plan}"
    if len(codes.columns) > 0 and not raw:
        return Check(name, Case([launch]), [(y, near(*codes.near(), codes.dtype))])
    return Check(name, Case([launch]), [(y, bits(wanted, None if raw else codes.dtype))])
