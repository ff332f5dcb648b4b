"""Kernels of the package as cases with their expected results, for any way to run them.

Each function takes the runner's description (`constants` and `threads` of kernels), because the sources alone say how
many values a block of threads takes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import native
import numpy as np
import reference
from harness import Argument, Buffer, Case, Launch, int32, int64, pointers, tensor_map


class Described(Protocol):
    """What is known of a built source."""

    threads: dict[str, int]
    constants: dict[str, int]


@dataclass(frozen=True)
class Check:
    """A case, and for some of its buffers what must be in them: a function that gives the difference, or nothing."""

    name: str
    case: Case
    wanted: list[tuple[Buffer, Callable[[np.ndarray], str]]]

    def against(self, results: list[np.ndarray]) -> None:
        """Fail if a result is not as expected."""
        for buffer, compare in self.wanted:
            index = next(k for k, other in enumerate(self.case.buffers) if other is buffer)
            difference = compare(results[index])
            assert not difference, f"{self.name}: {difference}"


def bits(expected: np.ndarray, dtype: str | None = None) -> Callable[[np.ndarray], str]:
    """The same bits, or NaN for NaN."""

    def compare(found: np.ndarray) -> str:
        if native.same_bits(found, expected, dtype):
            return ""
        differ = np.flatnonzero(found.view(f"u{found.itemsize}") != expected.view(f"u{expected.itemsize}"))
        first = differ[:8]
        return f"{differ.size} of {expected.size} differ, at {first}: {found[first]}, expected {expected[first]}"

    return compare


def near(expected: np.ndarray, bound: np.ndarray, dtype: str) -> Callable[[np.ndarray], str]:
    """Within a bound for each element."""

    def compare(found: np.ndarray) -> str:
        error = np.abs(native.to_float32(found, dtype).astype(np.float64) - expected)
        worst = np.unravel_index(np.argmax(error - bound), error.shape)
        if np.all(error <= bound):
            return ""
        return f"{found[worst]} at {worst}, {expected[worst]} expected: {error[worst] / bound[worst]:.2f} of the bound"

    return compare


def _filled(size: int, dtype: np.dtype | type) -> np.ndarray:
    """What an output is before: nothing that a kernel would write by chance."""
    return np.frombuffer(b"\xa7" * (size * np.dtype(dtype).itemsize), dtype).copy()


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _shift(blocksize: int) -> Argument:
    return int32(int(math.log2(blocksize)))


def _type(quant_type: str) -> Argument:
    return int32({"nf4": 0, "fp4": 1}[quant_type])


def quantize(
    source: Described,
    values: np.ndarray,
    dtype: str,
    quant_type: str,
    blocksize: int,
    shifts: tuple[int, int] = (0, 0),
    slow: bool = False,
) -> Check:
    """`shifts`: those of input and packed codes, in bytes. `slow`: the kernel that is the definition."""
    kernel = f"quantize_blockwise4_{'reference_' if slow else ''}{dtype}_{quant_type}"
    n, threads = values.size, source.threads[kernel]
    packed, absmax = native.quantize(values, dtype, quant_type, blocksize)
    per_block = threads * blocksize if slow else source.constants["TILE"]
    x, p, a = (
        Buffer(values, shifts[0]),
        Buffer(_filled(packed.size, np.uint8), shifts[1]),
        Buffer(_filled(absmax.size, "f4")),
    )
    wanted = [(p, bits(packed)), (a, bits(absmax))]
    sums = []
    if not slow:
        # Where tiles have whole groups of scales, the kernel writes their sums.
        added = group_sums(absmax)
        s = Buffer(_filled(added.size, "f8")) if blocksize * GROUP <= per_block else None
        sums = [pointers(s)]
        if s is not None:
            wanted.append((s, bits(added)))
    arguments = [pointers(x), pointers(p), pointers(a), *sums, int64(n), _shift(blocksize)]
    launch = Launch(kernel, _ceil(n, per_block), threads, arguments)
    name = f"{kernel}, {n} values in blocks of {blocksize}, shifts {shifts}"
    return Check(name, Case([launch]), wanted)


GROUP = 256
"""Scales that are added together, and that share a second scale."""


def group_sums(absmax: native.Array) -> np.ndarray:
    """The float64 sums of groups of 256 scales, each by a binary tree."""
    x = np.pad(absmax.astype(np.float64), (0, -absmax.size % GROUP)).reshape(-1, GROUP)
    with np.errstate(invalid="ignore"):
        while x.shape[1] > 1:
            half = x.shape[1] // 2
            x = x[:, :half] + x[:, half:]
    return x[:, 0].copy()


@dataclass(frozen=True)
class Scales:
    """Scales of a tensor: plain, or (`codes`) nested."""

    absmax: native.Array
    codes: native.Bytes | None = None
    absmax2: native.Array | None = None
    offset: np.float32 | None = None

    @staticmethod
    def plain(absmax: native.Array) -> Scales:
        """As they are."""
        return Scales(absmax)

    @staticmethod
    def nested(absmax: native.Array) -> Scales:
        """Quantized: `absmax` is then what they are read as."""
        codes, absmax2, offset = native.compress(absmax)
        return Scales(native.expand(codes, absmax2, offset), codes, absmax2, offset)

    @property
    def suffix(self) -> str:
        """Of the kernels' names."""
        return "" if self.codes is None else "_nested"

    def argument(self, shift: int = 0) -> Argument:
        """The struct that kernels take; what they have no business with is null. Plain scales are `shift` bytes off."""
        if self.codes is None or self.absmax2 is None or self.offset is None:
            return pointers(Buffer(self.absmax, shift), None, None, None)
        offset = np.array([self.offset], np.float32)
        return pointers(None, Buffer(self.codes), Buffer(self.absmax2), Buffer(offset))


def dequantize(
    source: Described,
    packed: native.Bytes,
    scales: Scales,
    n: int,
    dtype: str,
    quant_type: str,
    blocksize: int,
    shifts: tuple[int, int] = (0, 0),
    slow: bool = False,
) -> Check:
    """`shifts`: those of packed codes and output, in bytes."""
    kernel = f"dequantize_blockwise4_{'reference_' if slow else ''}{dtype}{scales.suffix}"
    threads = source.threads[kernel]
    wanted = native.dequantize(packed, scales.absmax, n, dtype, quant_type, blocksize)
    out = Buffer(_filled(n, wanted.dtype), shifts[1])
    arguments = [
        pointers(Buffer(packed, shifts[0])), scales.argument(), pointers(out),
        int64(n), _shift(blocksize), _type(quant_type),
    ]  # fmt: skip
    launch = Launch(kernel, _ceil(n, threads if slow else source.constants["TILE"]), threads, arguments)
    name = f"{kernel}, {n} {quant_type} values in blocks of {blocksize}, shifts {shifts}"
    return Check(name, Case([launch]), [(out, bits(wanted, dtype))])


def compress(
    source: Described, absmax: native.Array, levels: int = 1, grid: int | None = None, shifts: tuple[int, int] = (0, 0)
) -> Check:
    """Nested quantization of scales. `levels`: how often sums are added up before the last kernel.

    `grid`: blocks of threads at most in that one; `shifts`: those of scales and codes, in bytes.
    """
    codes, absmax2, offset = native.compress(absmax)
    group, warps, threads = source.constants["GROUP"], source.constants["WARPS"], source.constants["THREADS"]
    x, n = Buffer(absmax, shifts[0]), absmax.size
    launches, values, count = [], x, n
    for level in range(levels):
        sums = Buffer(_filled(_ceil(count, group), "f8"))
        kernel = "quantize_absmax_sums" if level == 0 else "quantize_absmax_sums_of_sums"
        arguments = [pointers(values), pointers(sums), int64(count)]
        launches.append(Launch(kernel, _ceil(count, group * warps), threads, arguments))
        values, count = sums, sums.data.size
    c, a, o = Buffer(_filled(n, np.uint8), shifts[1]), Buffer(_filled(absmax2.size, "f4")), Buffer(_filled(1, "f4"))
    arguments = [pointers(x), pointers(values), int64(count), pointers(c), pointers(a), pointers(o), int64(n)]
    blocks = max(1, min(_ceil(n, group * warps), grid or n))
    launches.append(Launch("quantize_absmax", blocks, threads, arguments))
    wanted = [(c, bits(codes)), (a, bits(absmax2)), (o, bits(np.array([offset], np.float32)))]
    name = f"quantize_absmax, {n} scales, {levels} levels, {blocks} blocks, shifts {shifts}"
    return Check(name, Case(launches), wanted)


def compress_slowly(source: Described, absmax: native.Array) -> Check:
    """The definition of the last kernel, given the offset."""
    codes, absmax2, offset = native.compress(absmax)
    threads, n = source.constants["THREADS"], absmax.size
    o = Buffer(np.array([offset], np.float32))
    c, a = Buffer(_filled(n, np.uint8)), Buffer(_filled(absmax2.size, "f4"))
    arguments = [pointers(Buffer(absmax)), pointers(o), pointers(c), pointers(a), int64(n)]
    launch = Launch("quantize_absmax_reference", _ceil(absmax2.size, threads), threads, arguments)
    return Check(f"quantize_absmax_reference, {n} scales", Case([launch]), [(c, bits(codes)), (a, bits(absmax2))])


def expand(source: Described, absmax: native.Array, shifts: tuple[int, int] = (0, 0), slow: bool = False) -> Check:
    """Nested scales as float32; `absmax` is what they are made from. `shifts`: those of codes and output, in bytes."""
    scales = Scales.nested(absmax)
    assert scales.codes is not None
    assert scales.absmax2 is not None
    kernel, n = f"dequantize_absmax{'_reference' if slow else ''}", absmax.size
    threads = source.threads[kernel]
    out = Buffer(_filled(n, "f4"), shifts[1])
    offset = Buffer(np.array([scales.offset], np.float32))
    arguments = [
        pointers(Buffer(scales.codes, shifts[0])), pointers(Buffer(scales.absmax2)), pointers(offset),
        pointers(out), int64(n),
    ]  # fmt: skip
    launch = Launch(kernel, _ceil(n, threads if slow else source.constants["TILE"]), threads, arguments)
    return Check(f"{kernel}, {n} scales, shifts {shifts}", Case([launch]), [(out, bits(scales.absmax))])


@dataclass(frozen=True)
class Table:
    """A quantized matrix, and what it is dequantized to in each type."""

    shape: tuple[int, int]
    quant_type: str
    blocksize: int
    packed: native.Bytes
    scales: Scales

    def rows(self, indices: np.ndarray, dtype: str) -> np.ndarray:
        """Its rows; NaN for those that it lacks."""
        rows, columns = self.shape
        values = native.dequantize(
            self.packed, self.scales.absmax, rows * columns, dtype, self.quant_type, self.blocksize
        ).reshape(rows, columns)
        there = (indices >= 0) & (indices < rows)
        found = values[np.where(there, indices, 0)] if rows else np.zeros((indices.size, columns), values.dtype)
        found[~there] = native.from_float32(np.array([np.nan], np.float32), dtype)
        return found


def embedding(
    source: Described,
    table: Table,
    indices: np.ndarray,
    dtype: str,
    shifts: tuple[int, int] = (0, 0),
    slow: bool = False,
) -> Check:
    """Rows of a table. `shifts`: those of packed codes and output, in bytes."""
    kernel = f"embedding_4bit_{'reference_' if slow else ''}{dtype}{table.scales.suffix}"
    threads, (rows, columns) = source.threads[kernel], table.shape
    wanted = table.rows(indices, dtype)
    out = Buffer(_filled(wanted.size, wanted.dtype).reshape(wanted.shape), shifts[1])
    which = pointers(Buffer(indices))
    size_and_rows = indices.itemsize.to_bytes(8, "little") + rows.to_bytes(8, "little")
    arguments = [
        Argument(which.data + size_and_rows, which.addresses), pointers(Buffer(table.packed, shifts[0])),
        table.scales.argument(), pointers(out), int64(wanted.size), int32(columns),
        _shift(table.blocksize), _type(table.quant_type),
    ]  # fmt: skip
    launch = Launch(kernel, _ceil(wanted.size, threads if slow else source.constants["TILE"]), threads, arguments)
    name = f"{kernel}, {indices.size} {indices.dtype} of {rows} x {columns} in {table.blocksize}, shifts {shifts}"
    return Check(name, Case([launch]), [(out, bits(wanted, dtype))])


def dequantize_8bit(
    source: Described,
    codes: native.Bytes,
    absmax: native.Array,
    map_: native.Array,
    dtype: str,
    blocksize: int,
    shifts: tuple[int, int] = (0, 0),
    slow: bool = False,
) -> Check:
    """`shifts`: those of codes and output, in bytes."""
    kernel, n = f"dequantize_blockwise8_{'reference_' if slow else ''}{dtype}", codes.size
    threads = source.threads[kernel]
    wanted = native.dequantize_blockwise(codes, absmax, map_, dtype, blocksize)
    out = Buffer(_filled(n, wanted.dtype), shifts[1])
    arguments = [
        pointers(Buffer(codes, shifts[0])), pointers(Buffer(absmax)), pointers(Buffer(map_)), pointers(out),
        int64(n), int64(blocksize),
    ]  # fmt: skip
    per_block = threads if slow else source.constants["TILE_BYTES"] // wanted.itemsize
    launch = Launch(kernel, _ceil(n, per_block), threads, arguments)
    name = f"{kernel}, {n} values in blocks of {blocksize}, shifts {shifts}"
    return Check(name, Case([launch]), [(out, bits(wanted, dtype))])


def quantize_8bit(
    source: Described,
    values: np.ndarray,
    dtype: str,
    map_: native.Array,
    blocksize: int,
    shifts: tuple[int, int] = (0, 0),
    slow: bool = False,
    grid: int = 2,
) -> Check:
    """`shifts`: those of input and codes, in bytes. `grid`: blocks of threads that share the work."""
    any_size = blocksize not in native.BLOCK_SIZES
    kernel = f"quantize_blockwise8_{'reference_' if slow else 'any_' if any_size else ''}{dtype}"
    n, threads = values.size, source.threads[kernel]
    codes, absmax = native.quantize_blockwise(values, dtype, map_, blocksize)
    x, c, a = (
        Buffer(values, shifts[0]),
        Buffer(_filled(n, np.uint8), shifts[1]),
        Buffer(_filled(absmax.size, "f4")),
    )
    size = int64(blocksize) if slow or any_size else _shift(blocksize)
    arguments = [pointers(x), pointers(Buffer(map_)), pointers(c), pointers(a), int64(n), size]
    launch = Launch(kernel, _ceil(absmax.size, threads) if slow else grid, threads, arguments)
    name = f"{kernel}, {n} values in blocks of {blocksize}, shifts {shifts}"
    return Check(name, Case([launch]), [(a, bits(absmax)), (c, bits(codes))])


def quantize_rows(
    source: Described,
    values: np.ndarray,
    dtype: str,
    shifts: tuple[int, int] = (0, 0),
    slow: bool = False,
    grid: int = 2,
) -> Check:
    """The rows of a matrix. `shifts`: those of input and codes, in bytes. `grid`: as for `quantize_8bit`."""
    kernel = f"quantize_int8_rowwise_{'reference_' if slow else ''}{dtype}"
    (rows, columns), threads = values.shape, source.threads[kernel]
    codes, scales = native.quantize_rows(values, dtype)
    c, s = Buffer(_filled(codes.size, np.int8).reshape(codes.shape), shifts[1]), Buffer(_filled(rows, "f4"))
    arguments = [pointers(Buffer(values, shifts[0])), pointers(c), pointers(s), int64(rows), int64(columns)]
    launch = Launch(kernel, _ceil(rows, threads) if slow else grid, threads, arguments)
    name = f"{kernel}, {rows} x {columns}, shifts {shifts}"
    return Check(name, Case([launch]), [(s, bits(scales)), (c, bits(codes))])


def dequantize_rows(
    source: Described,
    codes: np.ndarray,
    scales: native.Array,
    dtype: str,
    shifts: tuple[int, int] = (0, 0),
    slow: bool = False,
) -> Check:
    """The way back. `shifts`: those of codes and output, in bytes."""
    kernel = f"dequantize_int8_rowwise_{'reference_' if slow else ''}{dtype}"
    wanted, threads = native.dequantize_rows(codes, scales, dtype), source.threads[kernel]
    out = Buffer(_filled(wanted.size, wanted.dtype).reshape(wanted.shape), shifts[1])
    arguments = [
        pointers(Buffer(codes, shifts[0])), pointers(Buffer(scales)), pointers(out),
        int64(codes.size), int64(codes.shape[1]),
    ]  # fmt: skip
    per_block = threads if slow else source.constants["TILE_BYTES"] // wanted.itemsize
    launch = Launch(kernel, _ceil(codes.size, per_block), threads, arguments)
    return Check(f"{kernel}, {codes.shape}, shifts {shifts}", Case([launch]), [(out, bits(wanted, dtype))])


@dataclass(frozen=True)
class Product:
    """x[M][K], a quantized W[N][K] and perhaps a bias, and the product in float64 with the error that is allowed."""

    dtype: str
    quant_type: str
    blocksize: int
    x: np.ndarray
    packed: native.Bytes
    scales: Scales
    bias: np.ndarray | None
    weights: np.ndarray  # [N][K] codes' values

    @staticmethod
    def identity(n: int, k: int, dtype: str, quant_type: str, blocksize: int, nested: bool = False) -> Product:
        """Of which the result is the weight."""
        product = Product.random(1, n, k, dtype, quant_type, blocksize, nested)
        return replace(product, x=native.from_float32(np.eye(k, dtype=np.float32), dtype))

    @staticmethod
    def random(
        m: int, n: int, k: int, dtype: str, quant_type: str, blocksize: int, nested: bool = False, bias: bool = False
    ) -> Product:
        """Of normal values."""
        random = np.random.default_rng([m, n, k, blocksize])
        x = native.from_float32(random.standard_normal((m, k), np.float32), dtype)
        w = random.standard_normal(n * k, np.float32)
        packed, absmax = native.quantize(w, "f32", quant_type, blocksize)
        codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: n * k]
        added = native.from_float32(random.standard_normal(n, np.float32), dtype) if bias else None
        return Product(
            dtype,
            quant_type,
            blocksize,
            x,
            packed,
            Scales.nested(absmax) if nested else Scales.plain(absmax),
            added,
            reference.CODEBOOKS[quant_type][codes].reshape(n, k),
        )

    def result(self, weights: np.ndarray, roundings: float) -> Callable[[np.ndarray], str]:
        """Compares with the product by `weights`; a sum may have been rounded to float32 that often in turn."""
        n, k = weights.shape
        scaled = weights.astype(np.float64) * np.repeat(self.scales.absmax, self.blocksize)[: n * k].reshape(n, k)
        return self.result_of(scaled, roundings)

    def result_of(self, scaled: np.ndarray, roundings: float) -> Callable[[np.ndarray], str]:
        """The same with weights that have their scales."""
        scaled = scaled.astype(np.float64)
        x = native.to_float32(self.x, self.dtype).astype(np.float64)
        with np.errstate(invalid="ignore"):
            y = x @ scaled.T
        size = np.abs(x) @ np.abs(scaled).T
        if self.bias is not None:
            added = native.to_float32(self.bias, self.dtype).astype(np.float64)
            y, size = y + added, size + np.abs(added)
        bound = roundings * 2.0**-24 * size
        return near(y, bound + native.EPSILON[self.dtype] * (np.abs(y) + bound) + 1e-30, self.dtype)

    def buffers(self, shift: int = 0, scale_shift: int = 0) -> tuple[Argument, Argument, Argument, Argument, Buffer]:
        """The arguments that products share; the packed codes are `shift` bytes off, plain scales `scale_shift`."""
        y = Buffer(_filled(self.x.shape[0] * self.weights.shape[0], self.x.dtype).reshape(self.x.shape[0], -1))
        bias = pointers(None if self.bias is None else Buffer(self.bias))
        return (
            pointers(Buffer(self.x)),
            pointers(Buffer(self.packed, shift)),
            self.scales.argument(scale_shift),
            bias,
            y,
        )


def simt(source: Described, product: Product, shift: int = 0) -> Check:
    """By a warp for each element, in float32."""
    (m, k), n = product.x.shape, product.weights.shape[0]
    kernel = f"gemm_4bit_simt_{product.dtype}{product.scales.suffix}"
    x, packed, scales, bias, y = product.buffers(shift)
    arguments = [
        x, packed, scales, bias, pointers(y), int64(m), int64(n), int64(k),
        _shift(product.blocksize), _type(product.quant_type),
    ]  # fmt: skip
    launch = Launch(kernel, _ceil(m * n, source.constants["WARPS"]), source.threads[kernel], arguments)
    # A product and a sum for each value of a lane, then five sums, the scale's and the bias.
    wanted = product.result(product.weights, 2 * _ceil(k, 32) + 8)
    return Check(f"{kernel}, {m} x {n} x {k}", Case([launch]), [(y, wanted)])


def gemv(source: Described, rows: int, k: int, stride: int, dtype: str, blocksize: int, shift: int = 0) -> Check:
    """A vector and random codes of a random table; rows are `stride` bytes apart, the codes `shift` bytes off."""
    random = np.random.default_rng([rows, k, stride, blocksize])
    x = native.from_float32(random.standard_normal(k, np.float32), dtype)
    table = random.standard_normal(16, np.float32)
    packed = random.integers(0, 256, (rows - 1) * stride + _ceil(k, 2), np.uint8)
    absmax = random.uniform(0.5, 1.5, _ceil((rows - 1) * stride * 2 + k, blocksize)).astype(np.float32)
    kernel, y = f"gemv_4bit_{dtype}", Buffer(_filled(rows, x.dtype))
    inputs = [pointers(b) for b in (Buffer(x), Buffer(packed, shift), Buffer(absmax), Buffer(table), y)]
    arguments = [*inputs, int64(rows), int64(k), int64(stride), _shift(blocksize)]
    launch = Launch(kernel, _ceil(rows, source.constants["WARPS"]), source.threads[kernel], arguments)

    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
    at = np.arange(rows)[:, None] * 2 * stride + np.arange(k)
    weights = table[codes[at]].astype(np.float64) * absmax[at // blocksize]
    values = native.to_float32(x, dtype).astype(np.float64)
    exact, size = weights @ values, np.abs(weights) @ np.abs(values)
    # Of each lane: a product and a sum for each value, or eight and their scale; then five sums.
    bound = (2 * _ceil(k, 32) + 24) * 2.0**-24 * size
    wanted = near(exact, bound + native.EPSILON[dtype] * (np.abs(exact) + bound) + 1e-30, dtype)
    return Check(f"{kernel}, {rows} x {k}, {stride} bytes apart", Case([launch]), [(y, wanted)])


def small_m_sm80(source: Described, product: Product, rows: int, slots: int, per_pass: int) -> Check:
    """By matrix units: at most 16 rows of x. `rows`, `slots` and `per_pass` are the members of the kernel's plan."""
    (m, _), constants = product.x.shape, source.constants
    partial = per_pass * slots * m * constants["ROWS"] * 4
    shared = constants["MAP_BYTES"] + partial + constants["LANE_TABLE_BYTES"]
    return _small_m(source, "gemm_4bit_small_m_sm80", product, (rows, slots, per_pass), slots, shared)


@dataclass(frozen=True)
class Ring:
    """What the kernels of gemm_4bit_small_m_sm90 for some columns make of K, with so many slots."""

    columns: int
    k: int
    slots: int

    @property
    def slot(self) -> int:
        """Blocks of a slot."""
        return 4 if self.columns > 16 else 8

    @property
    def chunks(self) -> int:
        """Of K."""
        return _ceil(self.k // 64, self.slots * self.slot)

    @property
    def long(self) -> bool:
        """Whether it takes a kernel for several rounds."""
        return self.columns > 16 or self.chunks > (1 if self.columns > 8 else 2)

    @property
    def family(self) -> str:
        """The source that has the kernel."""
        return f"gemm_4bit_small_m_sm90{'_long' if self.long else ''}"


def small_m_sm90(
    source: Described, product: Product, rows: int, slots: int, per_pass: int, scale_shift: int = 0, sharing: int = 1
) -> Check:
    """The same, packed codes by way of shared memory and up to 32 rows of x; `source` is that of `Ring.family`.

    `per_pass`, in steps, is for one round, and `sharing`, of how many warps at least have a place for their sums
    together, for several. Scales are `scale_shift` bytes off.
    """
    constants = source.constants
    columns, k = product.x.shape
    ring = Ring(columns, k, slots)
    if ring.long:
        per_pass = _ceil(rows, constants["ROWS"] * (constants["WARPS"] // slots))
    # The table begins at a multiple of its size; 1 KB of shared memory is the system's. 64 KB are on the way.
    stage = constants["WARPS"] * constants["ROWS"] * ring.slot * constants["BLOCK_BYTES"]
    shared = 2 * constants["LANE_TABLE_BYTES"] - 1024 + 2**16 + (stage if ring.long else 0)
    # What is before the table, as the kernel says.
    warps, fragments = constants["WARPS"], 1 if columns <= 8 else 2 if columns <= 16 else 4
    sharing = min(sharing, slots) if ring.long else 1
    while per_pass * (warps * 8 + warps * fragments * constants["SUMS"] * 4 // sharing) > 2**16 - 2048:
        sharing *= 2
    assert sharing <= (slots if ring.long else 1), "no room for the sums"
    plan = (rows, int(math.log2(slots)), ring.chunks, per_pass, int(math.log2(sharing)), columns % 3)
    return _small_m(source, ring.family, product, plan, slots * ring.chunks, shared, scale_shift)


def _small_m(
    source: Described,
    family: str,
    product: Product,
    plan: tuple[int, ...],
    parts: int,
    shared: int,
    scale_shift: int = 0,
) -> Check:
    (m, k), n = product.x.shape, product.weights.shape[0]
    kernel = f"{family}_{product.dtype}_{8 if m <= 8 else 16 if m <= 16 else 32}{product.scales.suffix}"
    x, packed, scales, bias, y = product.buffers(scale_shift=scale_shift)
    arguments = [
        x, packed, scales, bias, pointers(y), int32(m), int32(n), int32(k),
        _shift(product.blocksize), _type(product.quant_type), Argument(struct.pack(f"<{len(plan)}i", *plan)),
    ]  # fmt: skip
    launch = Launch(kernel, _ceil(n, plan[0]), source.threads[kernel], arguments, shared)
    # Weights are rounded to x's type before they are scaled. The sums of a block are rounded once for each product of
    # matrices, then the blocks' and the parts' are added.
    table = native.to_float32(native.from_float32(product.weights, product.dtype), product.dtype)
    wanted = product.result(table, 8 + 2 * k / 64 + parts)
    name = f"{kernel}, {m} x {n} x {k}, {product.quant_type} in {product.blocksize}, plan {plan}"
    return Check(name, Case([launch]), [(y, wanted)])


def floor(source: Described, words: np.ndarray, out_count: int, grid: int) -> Check:
    """Traffic alone: every thread reads its part of the 16-byte `words`, [count][4], and writes what they mix to."""
    threads = source.constants["THREADS"]
    out = Buffer(_filled(out_count * 4, np.uint32).reshape(-1, 4))
    wanted = np.zeros((out_count, 4), np.uint32)
    for block in range(grid):
        begin, end = (len(words) * b // grid for b in (block, block + 1))
        rows = np.bitwise_xor.reduce(words[begin:end], axis=1)
        rows = np.pad(rows, (0, -len(rows) % threads)).reshape(-1, threads)
        mixed = np.bitwise_xor.reduce(rows, axis=0)
        begin, end = (out_count * b // grid for b in (block, block + 1))
        wanted[begin:end] = np.resize(mixed, end - begin)[:, None]
    arguments = [pointers(Buffer(words)), int64(len(words)), pointers(out), int64(out_count)]
    return Check("floor_traffic", Case([Launch("floor_traffic", grid, threads, arguments)]), [(out, bits(wanted))])


def floor_read(source: Described, words: np.ndarray, grid: int, wanted: int) -> Check:
    """Reading alone: nothing is written, but for one sum that the test can bring about."""
    sink = Buffer(np.array([7], np.uint32))
    arguments = [pointers(Buffer(words)), int64(len(words)), pointers(sink)]
    launch = Launch("floor_read", grid, source.constants["THREADS"], arguments)
    return Check("floor_read", Case([launch]), [(sink, bits(np.array([wanted], np.uint32)))])


@dataclass(frozen=True)
class Tile:
    """How gemm_4bit_tile_sm90a divides a product: rows of x in a tile, parts of K; `scale_shift` is in bytes."""

    tokens: int
    parts: int = 1
    scale_shift: int = 0


def tile_shared(tokens: int) -> int:
    """The dynamic shared memory of a block, as rust/cuda/src/gemm/tile.rs has it."""
    codes, x, scales = (3 if tokens > 128 else 6), (4 if tokens > 64 else 8), 2
    return x * tokens * 128 + 65536 + codes * 8192 + scales * 4096 + 1024 + 2 * (codes + x + scales) * 8


def tile_sm90a(source: Described, product: Product, plan: Tile, exact: bool = False) -> Check:
    """By warpgroups. `exact`: x is an identity, and y has to be the dequantized weight."""
    (m, k), n, constants = product.x.shape, product.weights.shape[0], source.constants
    rows, step, unit = constants["ROWS"], constants["K_TILE"], constants["SCALES_K"]
    kernel = f"gemm_4bit_tile_sm90a_{product.dtype}_{plan.tokens}"
    units, tiles = _ceil(k, unit), _ceil(m, plan.tokens)
    of_part = _ceil(units, plan.parts)
    assert of_part * (plan.parts - 1) < units, "a part of K with nothing"
    y = Buffer(_filled(m * n, product.x.dtype).reshape(m, n))
    codebook = reference.CODEBOOKS[product.quant_type].astype(np.float32)
    arguments = [
        tensor_map(Buffer(product.x), 2, (k, m), (2 * k,), (step, plan.tokens), 128),
        tensor_map(Buffer(product.packed), 1, (k // 2, n), (k // 2,), (constants["CODES_ROW_BYTES"], rows), 64),
        product.scales.argument(plan.scale_shift), Argument(codebook.tobytes()),
        pointers(None if product.bias is None else Buffer(product.bias)), pointers(y),
        int32(m), int32(n), int32(k), _shift(product.blocksize),
        Argument(struct.pack("<3i", tiles, of_part, plan.parts)),
    ]  # fmt: skip
    blocks = tiles * _ceil(n, rows) * plan.parts
    launch = Launch(kernel, blocks, source.threads[kernel], arguments, tile_shared(plan.tokens), cluster=plan.parts)
    name = f"{kernel}, {m} x {n} x {k}, {product.quant_type} in {product.blocksize}, {plan}"
    if exact:
        scales = product.scales.absmax
        dense = native.dequantize(product.packed, scales, n * k, product.dtype, product.quant_type, product.blocksize)
        # A sum of zeros is +0, if not all of them are -0.
        dense[native.to_float32(dense, product.dtype) == 0] = 0
        return Check(name, Case([launch]), [(y, bits(dense.reshape(n, k).T.copy(), product.dtype))])
    # A weight is its value times its scale, rounded to x's type; a sum is rounded once for each product of matrices,
    # and once for each part and the bias.
    with np.errstate(invalid="ignore"):
        scaled = product.weights * np.repeat(product.scales.absmax, product.blocksize)[: n * k].reshape(n, k)
    rounded = native.to_float32(native.from_float32(scaled.astype(np.float32), product.dtype), product.dtype)
    return Check(name, Case([launch]), [(y, product.result_of(rounded, 2 + k / 16 + plan.parts))])
