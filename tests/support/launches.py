"""Kernels of the package as cases with their expected results, for any way to run them.

Each function takes the runner's description (`constants` and `threads` of kernels), because the sources alone say how
many values a block of threads takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import native
import numpy as np
from harness import Argument, Buffer, Case, Launch, int32, int64, pointers


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


def filled(size: int, dtype: np.dtype | type) -> np.ndarray:
    """What an output is before: nothing that a kernel would write by chance."""
    return np.frombuffer(b"\xa7" * (size * np.dtype(dtype).itemsize), dtype).copy()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def size_argument(blocksize: int) -> Argument:
    return int32(int(math.log2(blocksize)))


def type_argument(quant_type: str) -> Argument:
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
        Buffer(filled(packed.size, np.uint8), shifts[1]),
        Buffer(filled(absmax.size, "f4")),
    )
    wanted = [(p, bits(packed)), (a, bits(absmax))]
    sums = []
    if not slow:
        # Where tiles have whole groups of scales, the kernel writes their sums.
        added = group_sums(absmax)
        s = Buffer(filled(added.size, "f8")) if blocksize * GROUP <= per_block else None
        sums = [pointers(s)]
        if s is not None:
            wanted.append((s, bits(added)))
    arguments = [pointers(x), pointers(p), pointers(a), *sums, int64(n), size_argument(blocksize)]
    launch = Launch(kernel, ceil_div(n, per_block), threads, arguments)
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
    out = Buffer(filled(n, wanted.dtype), shifts[1])
    arguments = [
        pointers(Buffer(packed, shifts[0])), scales.argument(), pointers(out),
        int64(n), size_argument(blocksize), type_argument(quant_type),
    ]  # fmt: skip
    launch = Launch(kernel, ceil_div(n, threads if slow else source.constants["TILE"]), threads, arguments)
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
        sums = Buffer(filled(ceil_div(count, group), "f8"))
        kernel = "quantize_absmax_sums" if level == 0 else "quantize_absmax_sums_of_sums"
        arguments = [pointers(values), pointers(sums), int64(count)]
        launches.append(Launch(kernel, ceil_div(count, group * warps), threads, arguments))
        values, count = sums, sums.data.size
    c, a, o = Buffer(filled(n, np.uint8), shifts[1]), Buffer(filled(absmax2.size, "f4")), Buffer(filled(1, "f4"))
    arguments = [pointers(x), pointers(values), int64(count), pointers(c), pointers(a), pointers(o), int64(n)]
    blocks = max(1, min(ceil_div(n, group * warps), grid or n))
    launches.append(Launch("quantize_absmax", blocks, threads, arguments))
    wanted = [(c, bits(codes)), (a, bits(absmax2)), (o, bits(np.array([offset], np.float32)))]
    name = f"quantize_absmax, {n} scales, {levels} levels, {blocks} blocks, shifts {shifts}"
    return Check(name, Case(launches), wanted)


def compress_slowly(source: Described, absmax: native.Array) -> Check:
    """The definition of the last kernel, given the offset."""
    codes, absmax2, offset = native.compress(absmax)
    threads, n = source.constants["THREADS"], absmax.size
    o = Buffer(np.array([offset], np.float32))
    c, a = Buffer(filled(n, np.uint8)), Buffer(filled(absmax2.size, "f4"))
    arguments = [pointers(Buffer(absmax)), pointers(o), pointers(c), pointers(a), int64(n)]
    launch = Launch("quantize_absmax_reference", ceil_div(absmax2.size, threads), threads, arguments)
    return Check(f"quantize_absmax_reference, {n} scales", Case([launch]), [(c, bits(codes)), (a, bits(absmax2))])


def expand(source: Described, absmax: native.Array, shifts: tuple[int, int] = (0, 0), slow: bool = False) -> Check:
    """Nested scales as float32; `absmax` is what they are made from. `shifts`: those of codes and output, in bytes."""
    scales = Scales.nested(absmax)
    assert scales.codes is not None
    assert scales.absmax2 is not None
    kernel, n = f"dequantize_absmax{'_reference' if slow else ''}", absmax.size
    threads = source.threads[kernel]
    out = Buffer(filled(n, "f4"), shifts[1])
    offset = Buffer(np.array([scales.offset], np.float32))
    arguments = [
        pointers(Buffer(scales.codes, shifts[0])), pointers(Buffer(scales.absmax2)), pointers(offset),
        pointers(out), int64(n),
    ]  # fmt: skip
    launch = Launch(kernel, ceil_div(n, threads if slow else source.constants["TILE"]), threads, arguments)
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
    out = Buffer(filled(wanted.size, wanted.dtype).reshape(wanted.shape), shifts[1])
    which = pointers(Buffer(indices))
    size_and_rows = indices.itemsize.to_bytes(8, "little") + rows.to_bytes(8, "little")
    arguments = [
        Argument(which.data + size_and_rows, which.addresses), pointers(Buffer(table.packed, shifts[0])),
        table.scales.argument(), pointers(out), int64(wanted.size), int32(columns),
        size_argument(table.blocksize), type_argument(table.quant_type),
    ]  # fmt: skip
    launch = Launch(kernel, ceil_div(wanted.size, threads if slow else source.constants["TILE"]), threads, arguments)
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
    out = Buffer(filled(n, wanted.dtype), shifts[1])
    arguments = [
        pointers(Buffer(codes, shifts[0])), pointers(Buffer(absmax)), pointers(Buffer(map_)), pointers(out),
        int64(n), int64(blocksize),
    ]  # fmt: skip
    per_block = threads if slow else source.constants["TILE_BYTES"] // wanted.itemsize
    launch = Launch(kernel, ceil_div(n, per_block), threads, arguments)
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
        Buffer(filled(n, np.uint8), shifts[1]),
        Buffer(filled(absmax.size, "f4")),
    )
    size = int64(blocksize) if slow or any_size else size_argument(blocksize)
    arguments = [pointers(x), pointers(Buffer(map_)), pointers(c), pointers(a), int64(n), size]
    launch = Launch(kernel, ceil_div(absmax.size, threads) if slow else grid, threads, arguments)
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
    c, s = Buffer(filled(codes.size, np.int8).reshape(codes.shape), shifts[1]), Buffer(filled(rows, "f4"))
    arguments = [pointers(Buffer(values, shifts[0])), pointers(c), pointers(s), int64(rows), int64(columns)]
    launch = Launch(kernel, ceil_div(rows, threads) if slow else grid, threads, arguments)
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
    out = Buffer(filled(wanted.size, wanted.dtype).reshape(wanted.shape), shifts[1])
    arguments = [
        pointers(Buffer(codes, shifts[0])), pointers(Buffer(scales)), pointers(out),
        int64(codes.size), int64(codes.shape[1]),
    ]  # fmt: skip
    per_block = threads if slow else source.constants["TILE_BYTES"] // wanted.itemsize
    launch = Launch(kernel, ceil_div(codes.size, per_block), threads, arguments)
    return Check(f"{kernel}, {codes.shape}, shifts {shifts}", Case([launch]), [(out, bits(wanted, dtype))])
