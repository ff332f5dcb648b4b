"""Launches of the products with packed weights, and what must come of them."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

import native
import numpy as np
import reference
from harness import (
    Argument,
    Buffer,
    Case,
    Launch,
    Library,
    int32,
    int64,
    pointers,
    run_both_ways,
    tensor_map,
)
from launches import Check, Described, Scales, bits, ceil_div, filled, near, size_argument, type_argument


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

    def with_gradient(self, identity: bool = False) -> Product:
        """The same with a gradient of y in the place of x, and without a bias; of an identity n rows."""
        n, m = self.weights.shape[0], self.x.shape[0]
        values = np.random.default_rng([n, m]).standard_normal((m, n), np.float32)
        if identity:
            values = np.eye(n, dtype=np.float32)
        return replace(self, x=native.from_float32(values, self.dtype), bias=None)

    def result(self, weights: np.ndarray, roundings: float) -> Callable[[np.ndarray], str]:
        """Compares with the product by `weights`; a sum may have been rounded to float32 that often in turn."""
        n, k = weights.shape
        with np.errstate(invalid="ignore"):
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
        y = Buffer(filled(self.x.shape[0] * self.weights.shape[0], self.x.dtype).reshape(self.x.shape[0], -1))
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
        size_argument(product.blocksize), type_argument(product.quant_type),
    ]  # fmt: skip
    launch = Launch(kernel, ceil_div(m * n, source.constants["WARPS"]), source.threads[kernel], arguments)
    # A product and a sum for each value of a lane, then five sums, the scale's and the bias.
    wanted = product.result(product.weights, 2 * ceil_div(k, 32) + 8)
    return Check(f"{kernel}, {m} x {n} x {k}", Case([launch]), [(y, wanted)])


def gemv(source: Described, rows: int, k: int, stride: int, dtype: str, blocksize: int, shift: int = 0) -> Check:
    """A vector and random codes of a random table; rows are `stride` bytes apart, the codes `shift` bytes off."""
    random = np.random.default_rng([rows, k, stride, blocksize])
    x = native.from_float32(random.standard_normal(k, np.float32), dtype)
    table = random.standard_normal(16, np.float32)
    packed = random.integers(0, 256, (rows - 1) * stride + ceil_div(k, 2), np.uint8)
    absmax = random.uniform(0.5, 1.5, ceil_div((rows - 1) * stride * 2 + k, blocksize)).astype(np.float32)
    kernel, y = f"gemv_4bit_{dtype}", Buffer(filled(rows, x.dtype))
    inputs = [pointers(b) for b in (Buffer(x), Buffer(packed, shift), Buffer(absmax), Buffer(table), y)]
    arguments = [*inputs, int64(rows), int64(k), int64(stride), size_argument(blocksize)]
    launch = Launch(kernel, ceil_div(rows, source.constants["WARPS"]), source.threads[kernel], arguments)

    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
    at = np.arange(rows)[:, None] * 2 * stride + np.arange(k)
    weights = table[codes[at]].astype(np.float64) * absmax[at // blocksize]
    values = native.to_float32(x, dtype).astype(np.float64)
    exact, size = weights @ values, np.abs(weights) @ np.abs(values)
    # Of each lane: a product and a sum for each value, or eight and their scale; then five sums.
    bound = (2 * ceil_div(k, 32) + 24) * 2.0**-24 * size
    wanted = near(exact, bound + native.EPSILON[dtype] * (np.abs(exact) + bound) + 1e-30, dtype)
    return Check(f"{kernel}, {rows} x {k}, {stride} bytes apart", Case([launch]), [(y, wanted)])


def small_m_sm80(source: Described, product: Product, rows: int, slots: int, per_pass: int) -> Check:
    """By matrix units: at most 16 rows of x. `rows`, `slots` and `per_pass` are the members of the kernel's plan."""
    (m, _), constants = product.x.shape, source.constants
    partial = per_pass * slots * m * constants["ROWS"] * 4
    shared = constants["MAP_BYTES"] + partial + constants["LANE_TABLE_BYTES"]
    return _small_m(source, "gemm_4bit_small_m_sm80", product, (rows, slots, per_pass), slots, shared)


def small_m_sm75(source: Described, product: Product, rows: int, slots: int, per_pass: int) -> Check:
    """The same on compute capability 7.5, where no table takes shared memory."""
    (m, _), constants = product.x.shape, source.constants
    shared = constants["MAP_BYTES"] + per_pass * slots * m * constants["ROWS"] * 4
    return _small_m(source, "gemm_4bit_small_m_sm75", product, (rows, slots, per_pass), slots, shared)


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
        return ceil_div(self.k // 64, self.slots * self.slot)

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
        per_pass = ceil_div(rows, constants["ROWS"] * (constants["WARPS"] // slots))
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


def one_row_sm90(
    source: Described, product: Product, rows: int, slots: int, per_pass: int, scale_shift: int = 0
) -> Check:
    """The same for one row of x, any K."""
    constants = source.constants
    k_tiles = ceil_div(product.x.shape[1] // 64, slots * 8)
    # What is before the table, as the kernel says; see `small_m_sm90`.
    x = k_tiles * slots * 1024 if k_tiles > 1 else 0
    assert x + per_pass * constants["WARPS"] * constants["ONE_ROW_SUMS"] * 4 <= 2**16 - 2048, "no room"
    shared = 2 * constants["LANE_TABLE_BYTES"] - 1024 + constants["WARPS"] * 3 * constants["ROWS"] * 8 * 32
    plan = (rows, int(math.log2(slots)), k_tiles, per_pass, 0, rows % 3)
    return _small_m(source, "gemm_4bit_small_m_sm90_one", product, plan, slots * k_tiles + 4, shared, scale_shift)


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
    columns = "" if family.endswith("_one") else f"_{8 if m <= 8 else 16 if m <= 16 else 32}"
    kernel = f"{family}_{product.dtype}{columns}{product.scales.suffix}"
    x, packed, scales, bias, y = product.buffers(scale_shift=scale_shift)
    arguments = [
        x, packed, scales, bias, pointers(y), int32(m), int32(n), int32(k),
        size_argument(product.blocksize), type_argument(product.quant_type),
        Argument(struct.pack(f"<{len(plan)}i", *plan)),
    ]  # fmt: skip
    launch = Launch(kernel, ceil_div(n, plan[0]), source.threads[kernel], arguments, shared)
    # Weights are rounded to x's type before they are scaled. The sums of a block are rounded once for each product of
    # matrices, then the blocks' and the parts' are added.
    table = native.to_float32(native.from_float32(product.weights, product.dtype), product.dtype)
    wanted = product.result(table, 8 + 2 * k / 64 + parts)
    name = f"{kernel}, {m} x {n} x {k}, {product.quant_type} in {product.blocksize}, plan {plan}"
    return Check(name, Case([launch]), [(y, wanted)])


def floor(source: Described, words: np.ndarray, out_count: int, grid: int) -> Check:
    """Traffic alone: every thread reads its part of the 16-byte `words`, [count][4], and writes what they mix to."""
    threads = source.constants["THREADS"]
    out = Buffer(filled(out_count * 4, np.uint32).reshape(-1, 4))
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
    """How gemm_4bit_tile_sm90a divides a product: rows of x in a tile, and parts of K, or ranges of all tiles.

    `range_unit`: of the columns of a range, in SCALES_K. `block_sums`: gemm_4bit_block_sums_sm90a does. `scale_shift`
    is in bytes.
    """

    tokens: int
    parts: int = 1
    scale_shift: int = 0
    ranges: int = 0
    range_unit: int = 1
    block_sums: bool = False

    @property
    def source(self) -> str:
        """The name of the kernel's source."""
        return f"gemm_4bit_{'block_sums' if self.block_sums else 'tile'}_sm90a"


def tile_shared(tokens: int, dgrad: bool = False) -> int:
    """The dynamic shared memory of a block of the kernel for products or gradients, as rust/cuda/src/gemm has it."""
    x, codes = 4 if tokens > 64 else 8, 3 if tokens > 128 else 4
    # y and planes, or a table and scales.
    scales, of_stage, other = (4, 8192, tokens * 128) if tokens > 128 and not dgrad else (2, 4096, 65536)
    barriers = 2 * (codes + x + scales) + (tokens <= 128 and not dgrad)
    return x * tokens * 128 + other + codes * 8192 + scales * of_stage + 1024 + barriers * 8


def _workspace(plan: Tile, rows: int) -> Argument:
    """Sums and signals of ranges; what is there before is of no account."""
    if not plan.ranges:
        return Argument(bytes(24))
    sums = Buffer(np.full((plan.ranges, rows * plan.tokens), np.nan, np.float32))
    signals = Buffer(np.random.default_rng(plan.ranges).integers(1, 1 << 60, plan.ranges, np.uint64))
    token = 1 << 63 | plan.ranges
    return Argument(struct.pack("<3Q", 0, 0, token), ((0, sums), (8, signals)))


def tile_sm90a(source: Described, product: Product, plan: Tile, exact: bool = False) -> Check:
    """By warpgroups. `exact`: x is an identity, and y has to be the dequantized weight."""
    (m, k), n, constants = product.x.shape, product.weights.shape[0], source.constants
    rows, step, unit = constants["ROWS"], constants["K_TILE"], constants["SCALES_K"]
    kernel = f"{plan.source}_{product.dtype}_{plan.tokens}"
    units, tiles = ceil_div(k, unit), ceil_div(m, plan.tokens)
    of_part = ceil_div(units, plan.parts)
    assert of_part * (plan.parts - 1) < units, "a part of K with nothing"
    y = Buffer(filled(m * n, product.x.dtype).reshape(m, n))
    codebook = reference.CODEBOOKS[product.quant_type].astype(np.float32)
    arguments = [
        tensor_map(Buffer(product.x), 2, (k, m), (2 * k,), (step, plan.tokens), 128),
        tensor_map(Buffer(product.packed), 1, (k // 2, n), (k // 2,), (constants["CODES_ROW_BYTES"], rows), 64),
        product.scales.argument(plan.scale_shift), Argument(codebook.tobytes()),
        pointers(None if product.bias is None else Buffer(product.bias)), pointers(y),
        int32(m), int32(n), int32(k), size_argument(product.blocksize),
        Argument(struct.pack("<5i", tiles, of_part, plan.parts, plan.ranges, plan.range_unit)),
        _workspace(plan, rows),
    ]  # fmt: skip
    blocks = plan.ranges or tiles * ceil_div(n, rows) * plan.parts
    assert plan.ranges <= units // plan.range_unit * tiles * ceil_div(n, rows), "a range with nothing"
    assert units % plan.range_unit == 0, "a range that ends inside of a tile's last unit"
    launch = Launch(
        kernel, blocks, source.threads[kernel], arguments, tile_shared(plan.tokens),
        cluster=plan.parts, in_order=plan.ranges > 0,
    )  # fmt: skip
    name = f"{kernel}, {m} x {n} x {k}, {product.quant_type} in {product.blocksize}, {plan}"
    if plan.block_sums:
        # Weights are rounded to x's type before they are scaled, and the sums of a k-tile are added to the others.
        table = native.to_float32(native.from_float32(product.weights, product.dtype), product.dtype)
        wanted = product.result(table, 2 + k / 16 + 2 * k / 64 + max(plan.parts, units))
    else:
        wanted = _of_dequantized(product, 2 + k / 16 + max(plan.parts, units), exact)
    return Check(name, Case([launch]), [(y, wanted)])


def dgrad_sm90a(
    source: Described, product: Product, tokens: int, parts: int = 1, ranges: int = 0, exact: bool = False
) -> Check:
    """The gradient of x by warpgroups: of the product `x` is that of y, [M][N].

    `tokens` of its rows are in a tile, and N is divided in parts, or all tiles in ranges. `exact`: it is an identity,
    and the result has to be the dequantized weight.
    """
    (m, n), k, constants = product.x.shape, product.weights.shape[1], source.constants
    columns, step, unit = constants["ROWS"], constants["K_TILE"], constants["SCALES_K"]
    kernel = f"gemm_4bit_dgrad_sm90a_{product.dtype}_{tokens}"
    units, token_tiles = ceil_div(n, unit), ceil_div(m, tokens)
    of_part, tiles = ceil_div(units, parts), token_tiles * ceil_div(k, columns)
    assert of_part * (parts - 1) < units, "a part of N with nothing"
    dx = Buffer(filled(m * k, product.x.dtype).reshape(m, k))
    codebook = reference.CODEBOOKS[product.quant_type].astype(np.float32)
    arguments = [
        tensor_map(Buffer(product.x), 2, (n, m), (2 * n,), (step, tokens), 128),
        tensor_map(Buffer(product.packed), 1, (k // 2, n), (k // 2,), (constants["CODES_ROW_BYTES"], columns), 64),
        product.scales.argument(0), Argument(codebook.tobytes()), pointers(dx), int32(m), int32(n), int32(k),
        size_argument(product.blocksize), Argument(struct.pack("<5i", token_tiles, of_part, parts, ranges, 1)),
        _workspace(Tile(tokens, ranges=ranges), columns),
    ]  # fmt: skip
    assert ranges % tiles == 0, "a range of more than one tile"
    launch = Launch(
        kernel, ranges or tiles * parts, source.threads[kernel], arguments, tile_shared(tokens, dgrad=True),
        cluster=parts, in_order=ranges > 0,
    )  # fmt: skip
    name = f"{kernel}, {m} x {n} x {k}, {product.quant_type} in {product.blocksize}, {parts} parts, {ranges} ranges"
    return Check(
        name, Case([launch]), [(dx, _of_dequantized(product, 2 + n / 16 + max(parts, units), exact, dgrad=True))]
    )


def _of_dequantized(
    product: Product, roundings: float, exact: bool, dgrad: bool = False
) -> Callable[[np.ndarray], str]:
    """Compares with the product by the dequantized weight, for `dgrad` by that transposed.

    `exact`: x is an identity, and that weight is wanted.
    """
    n, k = product.weights.shape
    if exact:
        scales = product.scales.absmax
        dense = native.dequantize(product.packed, scales, n * k, product.dtype, product.quant_type, product.blocksize)
        # A sum of zeros is +0, if not all of them are -0.
        dense[native.to_float32(dense, product.dtype) == 0] = 0
        dense = dense.reshape(n, k)
        return bits(dense if dgrad else dense.T.copy(), product.dtype)
    # A weight is its value times its scale, rounded to x's type; a sum is rounded once for each product of matrices,
    # and once for each part and the bias.
    with np.errstate(invalid="ignore"):
        scaled = product.weights * np.repeat(product.scales.absmax, product.blocksize)[: n * k].reshape(n, k)
    rounded = native.to_float32(native.from_float32(scaled.astype(np.float32), product.dtype), product.dtype)
    return product.result_of(rounded.T if dgrad else rounded, roundings)


def tile_sm80(
    source: Described, product: Product, tokens: int, parts: int = 1, scale_shift: int = 0, exact: bool = False
) -> Check:
    """By mma.sync, more than a few rows of x: `tokens` of them in a tile, and parts of K; `exact` as above."""
    constants = source.constants
    stages = 3 if tokens > 64 else 4
    shared = stages * (tokens * 128 + constants["ROWS"] * 32) + 2 * constants["W_BYTES"] + 1024
    kernel = f"gemm_4bit_tile_sm80_{product.dtype}_{tokens}"
    wanted = _of_dequantized(product, 2 + product.x.shape[1] / 16 + parts, exact)
    return _tile(source, kernel, product, tokens, parts, scale_shift, shared, wanted)


def tile_sm75(
    source: Described, product: Product, tokens: int, parts: int = 1, scale_shift: int = 0, exact: bool = False
) -> Check:
    """The same on compute capability 7.5, where scales are for sums; `exact`: each value times its scale."""
    kernel = f"gemm_4bit_tile_sm75_{product.dtype}_{tokens}{product.scales.suffix}"
    shared = tokens * (source.constants["ROWS"] * 2 + 16) + 1024
    n, k = product.weights.shape
    # As in `_small_m`.
    table = native.to_float32(native.from_float32(product.weights, product.dtype), product.dtype)
    wanted = product.result(table, 2 + k / 16 + 2 * k / 64 + parts)
    if exact:
        scales = np.repeat(product.scales.absmax, product.blocksize)[: n * k].reshape(n, k)
        # A sum of zeros is +0.
        wanted = bits(native.from_float32((table * scales).T + np.float32(0), product.dtype), product.dtype)
    return _tile(source, kernel, product, tokens, parts, scale_shift, shared, wanted)


def odd_scales_stay(source: Library, dtype: str, launch_of: Callable[[Product], Check]) -> None:
    """NaN and infinity reach the outputs of their row of W, and no other."""
    product = Product.random(3, 6, 256, dtype, "nf4", 64)
    absmax = product.scales.absmax.copy()
    absmax[4 * 2], absmax[4 * 5 + 1] = np.nan, np.inf
    check = launch_of(replace(product, scales=Scales.plain(absmax)))
    found = run_both_ways(source, check.case)
    y = found[next(k for k, buffer in enumerate(check.case.buffers) if buffer is check.wanted[0][0])]
    values = native.to_float32(y, dtype)
    assert np.isnan(values[:, 2]).all()
    assert not np.isfinite(values[:, 5]).any()
    assert np.isfinite(values[:, [0, 1, 3, 4]]).all()


def _tile(
    source: Described,
    kernel: str,
    product: Product,
    tokens: int,
    parts: int,
    scale_shift: int,
    shared: int,
    wanted: Callable[[np.ndarray], str],
) -> Check:
    (m, k), n, constants = product.x.shape, product.weights.shape[0], source.constants
    rows, k_tiles = constants["ROWS"], k // constants["K_TILE"]
    token_tiles, of_part = ceil_div(m, tokens), ceil_div(k_tiles, parts)
    tiles = token_tiles * ceil_div(n, rows)
    assert of_part * (parts - 1) < k_tiles, "a part of K with nothing"
    x, packed, scales, bias, y = product.buffers(scale_shift=scale_shift)
    codebook = reference.CODEBOOKS[product.quant_type].astype(np.float32)
    if parts > 1:
        count = tiles * (parts - 1)
        sums = Buffer(np.full((count, rows * tokens), np.nan, np.float32))
        signals = Buffer(np.random.default_rng(count).integers(1, 1 << 60, count, np.uint64))
        workspace = Argument(struct.pack("<3Q", 0, 0, 1 << 63 | count), ((0, sums), (8, signals)))
    else:
        workspace = Argument(bytes(24))
    arguments = [
        x, packed, scales, Argument(codebook.tobytes()), bias, pointers(y), int32(m), int32(n), int32(k),
        size_argument(product.blocksize), Argument(struct.pack("<3i", token_tiles, of_part, parts)), workspace,
    ]  # fmt: skip
    launch = Launch(kernel, tiles * parts, source.threads[kernel], arguments, shared, in_order=parts > 1)
    name = f"{kernel}, {m} x {n} x {k}, {product.quant_type} in {product.blocksize}, {parts} parts"
    return Check(name, Case([launch]), [(y, wanted)])
