"""The products of experts by warpgroups (kernels/experts/tile_sm90a) as cases with their expected results."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import native
import numpy as np
import reference
from experts import ACTIVATIONS, Choices, activated
from harness import Argument, Buffer, Case, Launch, int32, pointers, tensor_map
from launches import Check, Described, Scales, bits, filled, near


def permuted(rows: np.ndarray) -> np.ndarray:
    """Columns in the order that the products want: of 64, word 8t + c of two columns at place t of piece c."""
    words = rows.reshape(*rows.shape[:-1], rows.shape[-1] // 64, 4, 8, 2)
    return np.ascontiguousarray(words.swapaxes(-2, -3)).reshape(rows.shape)


@dataclass(frozen=True)
class Matrix:
    """A quantized weight, its values in x's type, and its rounded codebook values with scales that are not rounded."""

    packed: native.Bytes
    scales: Scales
    dense: np.ndarray
    scaled: np.ndarray


@dataclass(frozen=True)
class Tokens:
    """Rows of x of each expert, and the experts' weights `[projections][experts]` of `[n][k]`, quantized."""

    dtype: str
    quant_type: str
    blocksize: int
    counts: tuple[int, ...]
    x: np.ndarray
    weights: list[list[Matrix]]
    bias: np.ndarray | None

    @classmethod
    def random(
        cls, counts: Sequence[int], n: int, k: int, dtype: str, quant_type: str = "nf4", blocksize: int = 64, *,
        gated: bool = False, nested: bool = False, bias: bool = False, identity: bool = False, beyond: int = 0,
    ) -> Tokens:  # fmt: skip
        """`identity`: each expert's tokens are the first rows of one. `beyond`: rows of x that no expert has."""
        random = np.random.default_rng([n, k, len(counts), blocksize])
        rows = random.standard_normal((sum(counts) + beyond, k), np.float32)
        if identity:
            for begin, count in zip(np.cumsum([0, *counts]), counts, strict=False):
                rows[begin : begin + count] = np.eye(count, k, dtype=np.float32)
        weights = [
            [_matrix(random, n, k, dtype, quant_type, blocksize, nested) for _ in counts] for _ in range(1 + gated)
        ]
        added = None
        if bias:
            values = random.standard_normal((len(counts), (1 + gated) * n), np.float32)
            added = native.from_float32(values, dtype).reshape(values.shape)
        x = native.from_float32(rows, dtype).reshape(rows.shape)
        return cls(dtype, quant_type, blocksize, tuple(counts), x, weights, added)

    @property
    def offsets(self) -> np.ndarray:
        """Where each expert's rows begin, and the end of all."""
        return np.cumsum([0, *self.counts], dtype=np.int32)


def _matrix(
    random: np.random.Generator, n: int, k: int, dtype: str, quant_type: str, blocksize: int, nested: bool
) -> Matrix:
    w = random.standard_normal(n * k, np.float32) / np.float32(np.sqrt(k))
    packed, absmax = native.quantize(w, "f32", quant_type, blocksize)
    scales = Scales.nested(absmax) if nested else Scales.plain(absmax)
    dense = native.dequantize(packed, scales.absmax, n * k, dtype, quant_type, blocksize)
    unscaled = native.dequantize(packed, np.ones_like(scales.absmax), n * k, dtype, quant_type, blocksize)
    by = np.repeat(scales.absmax.astype(np.float64), blocksize)[: n * k]
    scaled = native.to_float32(unscaled, dtype).astype(np.float64) * by
    return Matrix(packed, scales, dense.reshape(n, k), scaled.reshape(n, k))


@dataclass(frozen=True)
class Tile:
    """How a launch divides its work, and where y goes: rows in an order, with so many columns more."""

    tokens: int
    blocks: int = 3
    activation: str = "none"
    ordered: bool = False
    more: int = 0
    shift: int = 0
    permutes: bool = False
    shares: bool = False

    @property
    def block_sums(self) -> bool:
        """Whether scales are for the sums of a block."""
        return self.tokens <= 64


def tile_shared(tokens: int) -> int:
    """The dynamic shared memory of a block, as rust/cuda/src/experts/tile.rs has it."""
    x, stages = (8, 3) if tokens <= 32 else (4, 2)
    codes = stages * (256 * 128 + 256 * 4 * 4)
    return x * 128 * tokens + 65536 + codes + 2 * 8192 + 8 * tokens + 1024 + 2 * (stages + x) * 8


def _wanted(job: Tokens, plan: Tile, order: np.ndarray, exact: bool) -> Callable[[np.ndarray], str]:
    n, k = job.weights[0][0].dense.shape
    x = native.to_float32(job.x, job.dtype).astype(np.float64)
    end = int(job.offsets[-1])
    y, bound = np.zeros((end, n)), np.zeros((end, n))
    for expert, (begin, count) in enumerate(zip(job.offsets, job.counts, strict=False)):
        rows = x[begin : begin + count]
        products, sizes = [], []
        for projection, matrices in enumerate(job.weights):
            matrix = matrices[expert]
            w = matrix.scaled if plan.block_sums else native.to_float32(matrix.dense, job.dtype).astype(np.float64)
            added = np.zeros(n)
            if job.bias is not None:
                bias = native.to_float32(job.bias, job.dtype).astype(np.float64)
                added = bias[expert, projection * n : (projection + 1) * n]
            products.append(rows @ w.T + added)
            sizes.append(
                (np.abs(rows) @ np.abs(w).T + np.abs(added))
                * (k / 16 + 2 * k / 64 + 3 + plan.blocks * plan.shares)
                * 2.0**-24
            )
        gate, up = products[0], products[-1] if len(products) == 2 else np.ones_like(products[0])
        made = activated(plan.activation, gate, up)
        y[begin : begin + count] = made
        # A sigmoid's gates grow by 1.13 at most, a square's by twice the root; steps of float32.
        steep = 1.2 + 2 * np.abs(gate) * (plan.activation == "relu2")
        size = np.abs(activated(plan.activation, np.abs(gate), np.ones_like(gate)))
        grown = sizes[0] * steep * (np.abs(up) + 1) + (sizes[-1] * size if len(products) == 2 else 0)
        bound[begin : begin + count] = grown + (np.abs(made) + np.abs(gate) * (np.abs(up) + 1)) * 2.0**-21
    if exact:
        expected = native.from_float32(y.astype(np.float32) + np.float32(0), job.dtype).reshape(y.shape)
        check = bits(expected, job.dtype)
    else:
        check = near(y, bound + native.EPSILON[job.dtype] * (np.abs(y) + bound) + 1e-7, job.dtype)

    def compare(found: np.ndarray) -> str:
        rest = found.copy()
        rest[order[:end], :n] = filled(1, found.dtype)[0]
        if not (rest == filled(1, found.dtype)[0]).all():
            return "what is not the kernel's to write was written"
        rows = np.ascontiguousarray(found[order[:end], :n])
        if plan.permutes:
            # Back: from places to words.
            words = rows.reshape(end, -1, 8, 4, 2).swapaxes(-2, -3)
            rows = np.ascontiguousarray(words).reshape(end, n)
        return "" if end == 0 else check(rows)

    return compare


def _workspace(plan: Tile, rows: int) -> Argument:
    """Sums and signals of blocks; what is there before is of no account."""
    if not plan.shares:
        return Argument(bytes(24))
    sums = Buffer(np.full((plan.blocks, rows * plan.tokens), np.nan, np.float32))
    signals = Buffer(np.random.default_rng(plan.blocks).integers(1, 1 << 60, 2 * plan.blocks, np.uint64))
    return Argument(struct.pack("<3Q", 0, 0, 1 << 63 | plan.blocks), ((0, sums), (8, signals)))


def tile(source: Described, job: Tokens, plan: Tile, exact: bool = False) -> Check:
    """A launch. `exact`: each product is one value, and y has to have its bits."""
    slots, k = job.x.shape
    n, experts = job.weights[0][0].dense.shape[0], len(job.counts)
    gated, constants = len(job.weights) == 2, source.constants
    kernel = f"experts_tile_sm90a_{job.dtype}_{plan.tokens}"
    order = np.arange(slots, dtype=np.int32)
    if plan.ordered:
        order = np.random.default_rng(slots).permutation(slots).astype(np.int32)
    matrices = [matrix for projection in job.weights for matrix in projection]
    # A projection before those of this product, with nothing in it.
    first = 1
    table = np.zeros((first + len(job.weights), experts, 4), np.uint64)
    maps = np.zeros((first + len(job.weights), experts, 256), np.uint8)
    in_table, in_maps = [], []
    copies = job.blocksize == 64 and matrices[0].scales.codes is None and k % constants["SCALES_K"] == 0
    for at, matrix in enumerate(matrices, first * experts):
        codes = Buffer(matrix.packed)
        box = (constants["BOX_BYTES"], constants["QUARTER_ROWS"])
        entry = tensor_map(codes, 1, (k // 2, n), (k // 2,), box, 128)
        maps.reshape(-1, 256)[at, :128] = np.frombuffer(entry.data, np.uint8)
        in_maps.append((256 * at, codes))
        absmax, nested, absmax2, offset = (address for _, address in _scales(matrix.scales))
        if copies:
            assert absmax is not None
            box = (constants["SCALES_K_TILES"], constants["QUARTER_ROWS"])
            entry = tensor_map(absmax, 4, (k // 64, n), (k // 16,), box, 0)
            maps.reshape(-1, 256)[at, 128:] = np.frombuffer(entry.data, np.uint8)
            in_maps.append((256 * at + 128, absmax))
        parts = (codes, *((nested, absmax2, offset) if absmax is None else (absmax, None, None)))
        in_table += [(32 * at + 8 * i, part) for i, part in enumerate(parts) if part is not None]
    columns, step = n + plan.more, min(constants["STEP_TOKENS"], plan.tokens)
    y = Buffer(filled(slots * columns, job.x.dtype).reshape(slots, columns), plan.shift)
    product = [
        pointers(Buffer(job.offsets), Buffer(order) if plan.ordered else None, Buffer(table, 0, tuple(in_table)),
                 Buffer(maps, 0, tuple(in_maps))),
        Argument(struct.pack("<13i4x", experts, first if gated else -1, first + gated, n, k,
                             job.blocksize.bit_length() - 1, int(matrices[0].scales.codes is not None),
                             ACTIVATIONS[plan.activation], columns, (1 + gated) * n, copies, plan.shares,
                             plan.permutes)),
    ]  # fmt: skip
    arguments = [
        tensor_map(Buffer(permuted(job.x)), 2, (k, slots), (2 * k,), (constants["K_TILE"], step), 128),
        Argument(b"".join(part.data for part in product), product[0].addresses),
        Argument(reference.CODEBOOKS[job.quant_type].astype(np.float32).tobytes()),
        pointers(None if job.bias is None else Buffer(job.bias)),
        pointers(y),
        _workspace(plan, constants["QUARTERS"] * constants["QUARTER_ROWS"]),
    ]
    launch = Launch(
        kernel, plan.blocks, source.threads[kernel], arguments, tile_shared(plan.tokens), in_order=plan.shares
    )
    name = f"{kernel}, {job.counts} x {n} x {k}, {job.quant_type} in {job.blocksize}, {plan}"
    return Check(name, Case([launch]), [(y, _wanted(job, plan, order, exact))])


def _scales(scales: Scales) -> list[tuple[int, Buffer | None]]:
    """The members of `Scales` in a kernel's argument, in order."""
    found = dict(scales.argument().addresses)
    return [(at, found.get(at)) for at in (0, 8, 16, 24)]


def gather(source: Described, tokens: int, top_k: int, columns: int, missing: int, *, ordered: bool = True) -> Check:
    """Rows of x in an order of slots, or in their own, of which the last `missing` have no expert."""
    random = np.random.default_rng([tokens, columns])
    slots = tokens * top_k
    x = random.integers(0, 1 << 16, (tokens, columns), np.uint16)
    order = random.permutation(slots).astype(np.int32) if ordered else np.arange(slots, dtype=np.int32)
    wanted = np.resize(filled(1, np.uint16), (slots, columns))
    out = Buffer(wanted.copy())
    wanted[: slots - missing] = permuted(x[order[: slots - missing] // top_k])
    count = Buffer(np.array([slots - missing], np.int32))
    inputs = [pointers(buffer) for buffer in (Buffer(x), Buffer(order) if ordered else None, count, out)]
    blocks = -(-slots // source.constants["WARPS"])
    arguments = [*inputs, int32(top_k), int32(columns // 8)]
    launch = Launch("experts_gather", blocks, source.threads["experts_gather"], arguments)
    name = f"experts_gather, {tokens} x {columns}, {top_k} each"
    return Check(name, Case([launch]), [(out, bits(wanted))])


def gather_few(source: Described, choices: Choices, columns: int) -> Check:
    """Few slots sorted, and the rows of x in that order; those of slots without an expert stay as they are."""
    tokens, top_k = choices.ids.shape
    random = np.random.default_rng([tokens, columns])
    x = random.integers(0, 1 << 16, (tokens, columns), np.uint16)
    wanted = np.resize(filled(1, np.uint16), (tokens * top_k, columns))
    out = Buffer(wanted.copy())
    there = choices.offsets[-1]
    wanted[:there] = permuted(x[choices.order[:there] // top_k])
    offsets, order = (Buffer(np.full_like(of, -7)) for of in (choices.offsets, choices.order))
    arguments = [
        pointers(Buffer(x)), pointers(Buffer(choices.ids.reshape(-1))), int32(tokens * top_k), int32(choices.experts),
        pointers(offsets), pointers(order), pointers(out), int32(top_k), int32(columns // 8),
    ]  # fmt: skip
    blocks = -(-tokens * top_k // source.constants["WARPS"])
    launch = Launch("experts_gather_few", blocks, source.threads["experts_gather_few"], arguments)
    results = [(offsets, bits(choices.offsets)), (order, bits(choices.order)), (out, bits(wanted))]
    return Check(f"experts_gather_few, {choices.ids.shape} of {choices.experts}", Case([launch]), results)
