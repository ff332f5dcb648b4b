"""LLM.int8() in numpy, and its kernels as cases: see `launches`."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

import native
import numpy as np
from harness import Argument, Buffer, Case, Launch, int32, int64, pointers
from launches import Check, Described, bits, near

KINDS = {"bf16": 0, "f16": 1, "f32": 2, "i32": 3}
UNIT = np.float32(1 / 127)
PITCH = 16


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _filled(shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(b"\xa7" * size, dtype).reshape(shape).copy()


def rounded(values: native.Array) -> native.Array:
    """To 11 significant bits, ties to even; the exponent is float32's."""
    raw = values.view(np.uint32)
    even = (raw + np.uint32(0xFFF) + (raw >> 13 & 1)) & np.uint32(0xFFFFE000)
    return np.where((raw & 0x7F800000) == 0x7F800000, raw, even).astype(np.uint32).view(np.float32)


@dataclass(frozen=True)
class Codes:
    """Activations [rows][columns] as codes, and which columns have outliers."""

    codes: np.ndarray
    scales: native.Array
    outliers: np.ndarray

    @staticmethod
    def of(x: np.ndarray, dtype: str, threshold: float, exact: bool = False) -> Codes:
        """What the kernels must give; a threshold of 0 is none."""
        values = native.to_float32(x, dtype)
        if not exact:
            values = rounded(values)
        found = np.abs(values) >= threshold if threshold > 0 else np.zeros(x.shape, bool)
        codes, scales = native.quantize_rows(np.where(found, np.float32(0), values), "f32")
        columns = found.any(0)
        codes[:, columns] = 0
        return Codes(codes, scales, columns)

    def padded(self) -> np.ndarray:
        """The codes as the kernels lay them out."""
        return np.pad(self.codes, ((0, 0), (0, -self.codes.shape[1] % PITCH)))


PANEL_COLUMNS, PANEL_UNIT = 256, 16


def mask_words(columns: int) -> int:
    """Words of a mask, which are read four at a time."""
    return _ceil(columns, 128) * 4


def masks_of(flags: np.ndarray) -> np.ndarray:
    """Rows of flags [rows][columns] as masks."""
    rows, columns = flags.shape
    padded = np.zeros((rows, mask_words(columns) * 32), bool)
    padded[:, :columns] = flags
    return np.packbits(padded, axis=1, bitorder="little").view(np.uint32)


def panel_of(x: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """X of the first columns of a list, filled with zeros up to a unit; what is behind means nothing."""
    panel = _filled((len(x), PANEL_COLUMNS), x.dtype)
    panel[:, : min(_ceil(len(columns), PANEL_UNIT) * PANEL_UNIT, PANEL_COLUMNS)] = 0
    some = columns[:PANEL_COLUMNS]
    panel[:, : len(some)] = x[:, some]
    return panel


def taken_out(source: Described, x: np.ndarray, dtype: str, threshold: float, grid: int = 2, shift: int = 0) -> Check:
    """Codes for products that take columns with outliers out of W, and what is found of those."""
    rows, columns = x.shape
    values = np.abs(rounded(native.to_float32(x, dtype)))
    outliers = values >= threshold
    wanted = Codes.of(x, dtype, threshold)
    padded, words = wanted.padded(), mask_words(columns)
    c, s = Buffer(_filled(padded.shape, np.int8)), Buffer(_filled((rows,), np.float32))
    masks, mask = Buffer(_filled((grid, words), np.uint32)), Buffer(_filled((1, words), np.uint32))
    count, listed = Buffer(_filled((1,), np.int32)), Buffer(_filled((columns,), np.int32))
    panel = Buffer(_filled((rows, PANEL_COLUMNS), x.dtype))
    inputs = pointers(Buffer(x, shift))
    first = [
        inputs, pointers(c), pointers(s), pointers(masks), int64(rows), int64(columns), int64(padded.shape[1]),
        _float(threshold),
    ]  # fmt: skip
    second = [
        inputs, pointers(masks), int32(grid), pointers(count, listed, mask), pointers(panel), int64(rows),
        int32(columns),
    ]  # fmt: skip
    kernel = f"int8_panel_{8 * x.dtype.itemsize}"
    launched = [
        Launch(f"int8_activations_{dtype}", grid, source.constants["THREADS"], first, shared=words * 4),
        Launch(kernel, grid, source.threads[kernel], second, shared=words * 4),
    ]
    teams = source.constants["WARPS"] if columns <= source.constants["WARP_ROW"] else 1
    block = np.arange(rows) // teams % grid
    meant = np.ones(padded.shape, bool)
    meant[:, :columns] &= ~outliers.any(0)
    exact, found = bits(padded[meant]), np.flatnonzero(outliers.any(0)).astype(np.int32)
    copied = panel_of(x, found)
    width = min(_ceil(found.size, PANEL_UNIT) * PANEL_UNIT, PANEL_COLUMNS)
    same = bits(copied[:, :width].copy())
    expected = [
        (c, lambda got: exact(got[meant])), (s, bits(wanted.scales)),
        (masks, bits(masks_of(np.array([outliers[block == k].any(0) for k in range(grid)])))),
        (mask, bits(masks_of(outliers.any(0)[None]))),
        (count, bits(np.array([found.size], np.int32))), (listed, _begins(found)),
        (panel, lambda got: same(got[:, :width].copy())),
    ]  # fmt: skip
    return Check(f"{dtype} {x.shape} below {threshold}, grid {grid}", Case(launched), expected)


def activations(
    source: Described, x: np.ndarray, dtype: str, threshold: float, grid: int = 2, shift: int = 0, exact: bool = False
) -> Check:
    """`grid`: blocks of threads that share the rows; `shift`: that of the input, in bytes."""
    (rows, columns), threads = x.shape, source.constants["THREADS"]
    wanted = Codes.of(x, dtype, threshold, exact)
    padded = wanted.padded()
    pitch = columns if exact else padded.shape[1]
    c, s = Buffer(_filled((rows, pitch), np.int8)), Buffer(_filled((rows,), np.float32))
    expected = [(c, bits(wanted.codes if exact else padded)), (s, bits(wanted.scales))]
    inputs = pointers(Buffer(x, shift))
    words = mask_words(columns)
    name = f"{dtype} activations {x.shape} below {threshold}, grid {grid}"
    if threshold == 0:
        arguments = [
            inputs,
            pointers(c),
            pointers(s),
            pointers(None),
            int64(rows),
            int64(columns),
            int64(pitch),
            _float(0),
        ]
        launch = Launch(f"int8_activations_{dtype}", grid, threads, arguments)
        return Check(name, Case([launch]), expected)
    groups = min(grid, rows)
    masks = Buffer(_filled((groups, words), np.uint32))
    count, listed = Buffer(_filled((1,), np.int32)), Buffer(_filled((columns,), np.int32))
    flags = Buffer(_filled((columns,), np.uint8)) if exact else None
    first = [inputs, pointers(s), pointers(masks), int64(rows), int64(columns), _float(threshold), int32(exact)]
    second = [
        inputs, pointers(s), pointers(masks), int64(groups), pointers(c), pointers(count, listed, flags),
        int64(rows), int64(columns), int64(pitch), int32(exact),
    ]  # fmt: skip
    panels = _ceil(columns, source.constants["PANEL"])
    launched = [
        Launch(f"int8_outliers_{dtype}", groups, threads, first, shared=words * 4),
        Launch(f"int8_codes_{dtype}", panels * grid + 1, threads, second),
    ]
    found = np.flatnonzero(wanted.outliers).astype(np.int32)
    expected += [(count, bits(np.array([found.size], np.int32))), (listed, _begins(found))]
    if flags is not None:
        expected.append((flags, bits(wanted.outliers.astype(np.uint8))))
    return Check(name, Case(launched), expected)


def _float(value: float) -> Argument:
    return Argument(struct.pack("<f", value))


def _begins(expected: np.ndarray) -> Callable[[np.ndarray], str]:
    # What is behind means nothing.
    return lambda found: bits(expected)(found[: expected.size].copy())


@dataclass(frozen=True)
class Product:
    """x[m][k] in codes, W[n][k] in codes with scales, perhaps a bias; `dtype` is that of the result."""

    dtype: str
    x: np.ndarray
    of_x: Codes
    codes: np.ndarray
    scales: native.Array
    bias: np.ndarray | None = None
    bias_dtype: str = "f32"

    @staticmethod
    def random(
        m: int, n: int, k: int, dtype: str, outliers: float = 0.0, bias: str | None = None, largest: bool = False
    ) -> Product:
        """Normal values, of which a part, columns some way apart, is large; or codes as large as can be."""
        random = np.random.default_rng([m, n, k])
        values = random.standard_normal((m, k), np.float32)
        if outliers:
            columns = random.random(k) < outliers
            columns[random.integers(k)] = True
            values[random.integers(m), columns] = 30
            values[:, columns] *= 1.5
        kind = "f32" if dtype == "i32" else dtype
        x = native.from_float32(values, kind)
        codes = random.integers(-127, 128, (n, k)).astype(np.int8)
        of_x = Codes.of(x, kind, 6.0 if outliers else 0.0)
        if largest:
            codes[:] = 127
            codes[1::2] = -127
            of_x = replace(of_x, codes=np.full((m, k), 127, np.int8))
        scales = np.abs(random.standard_normal(n, np.float32)) + np.float32(0.1)
        added = native.from_float32(random.standard_normal(n, np.float32), bias) if bias else None
        return Product(dtype, x, of_x, codes, scales, added, bias or "f32")

    @property
    def sums(self) -> np.ndarray:
        """Exact."""
        return (self.of_x.codes.astype(np.int64) @ self.codes.astype(np.int64).T).astype(np.int32)

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """The result and by how much it may differ: not at all without outliers."""
        if self.dtype == "i32":
            return self.sums, np.zeros(self.sums.shape)
        v = self.sums.astype(np.float32) * (self.of_x.scales[:, None] * UNIT)
        slack = np.zeros(v.shape)
        columns = self.of_x.outliers
        if columns.any():
            part = native.to_float32(self.x, self.dtype)[:, columns]
            codes = self.codes[:, columns].astype(np.float32)
            v = v + (part.astype(np.float64) @ codes.T.astype(np.float64)).astype(np.float32)
            slack = (np.abs(part).astype(np.float64) @ np.abs(codes).T + np.abs(v)) * (columns.sum() + 2) * 2.0**-24
        v = v * (self.scales * UNIT)
        if self.bias is not None:
            v = v + native.to_float32(self.bias, self.bias_dtype)
        slack = slack * (self.scales * UNIT) + np.where(slack > 0, np.abs(v), 0) * 2 * native.EPSILON[self.dtype]
        return v, slack

    def arguments(self, shift: int = 0, pitch: int | None = None) -> tuple[list[Argument], Buffer, list]:
        """x, its pitch, W and the epilogue; the result, and what must be in it."""
        m, k = self.of_x.codes.shape
        n = self.codes.shape[0]
        padded = self.of_x.padded() if pitch is None else np.pad(self.of_x.codes, ((0, 0), (0, pitch - k)))
        stored = np.dtype(np.int32) if self.dtype == "i32" else native.STORED[self.dtype]
        y = Buffer(_filled((m, n), stored))
        v, slack = self.expected()
        if self.dtype == "i32":
            check = bits(v)
        elif slack.any():
            check = near(v.astype(np.float64), slack, self.dtype)
        else:
            check = bits(native.from_float32(v, self.dtype), self.dtype)
        scales = (None, None) if self.dtype == "i32" else (Buffer(self.of_x.scales), Buffer(self.scales))
        bias = None if self.bias is None else Buffer(self.bias)
        found = np.flatnonzero(self.of_x.outliers).astype(np.int32)
        outliers = (None, None, None)
        if found.size:
            listed = np.concatenate([found, np.full(k - found.size, 1 << 30, np.int32)])
            outliers = (Buffer(np.array([found.size], np.int32)), Buffer(listed), Buffer(self.x))
        places = pointers(*scales, bias, y, *outliers, None, None)
        kinds = struct.pack("<2I", KINDS[self.dtype], KINDS[self.bias_dtype])
        epilogue = Argument(places.data + kinds, places.addresses)
        a, b = Buffer(padded, shift), Buffer(self.codes, shift)
        return [pointers(a), int64(padded.shape[1]), pointers(b), epilogue], y, [(y, check)]


@dataclass(frozen=True)
class Plan:
    """`ProductPlan`: rows of W for a block of threads, slots of K, stages, columns with outliers that have room."""

    rows: int
    slots: int
    stages: int
    kept: int
    ahead: int = 0


def product(source: Described, product: Product, plan: Plan) -> Check:
    """The kernels for few rows."""
    m, k = product.of_x.codes.shape
    n = product.codes.shape[0]
    constants = source.constants
    most = next(most for most in (8, 16, 32, 64) if m <= most)
    kernel = f"int8_product_{most}"
    chunks = _ceil(k, plan.slots * constants["SLOT"])
    numbers = (plan.rows, plan.slots.bit_length() - 1, chunks, plan.stages, plan.kept, plan.ahead)
    groups = constants["WARPS"] // plan.slots
    tiles = _ceil(plan.rows, constants["ROWS"] * groups) * groups
    shared = tiles * (most // 8 * constants["SUMS"] * 4 + plan.kept * constants["ROWS"])
    shared += plan.kept * 4 * (1 + most)
    shared += plan.stages * constants["WARPS"] * constants["STAGE_BYTES"]
    arguments, _, wanted = product.arguments()
    arguments += [int32(m), int32(n), int32(k), Argument(struct.pack("<6i", *numbers))]
    launch = Launch(kernel, _ceil(n, plan.rows), source.threads[kernel], arguments, shared=shared)
    return Check(f"{kernel} of {m} x {n} x {k}, {product.dtype}, {plan}", Case([launch]), wanted)


def plain(source: Described, product: Product, shift: int = 0, pitch: int | None = None) -> Check:
    """The kernel that takes anything."""
    m, k = product.of_x.codes.shape
    n = product.codes.shape[0]
    arguments, _, wanted = product.arguments(shift, pitch or k)
    arguments += [int64(m), int64(n), int64(k)]
    tile = source.constants["TILE"]
    launch = Launch("int8_plain", _ceil(n, tile) * _ceil(m, tile), source.threads["int8_plain"], arguments)
    return Check(f"int8_plain of {m} x {n} x {k}, {product.dtype}, shift {shift}", Case([launch]), wanted)
