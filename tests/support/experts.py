"""The kernels of experts as cases with their expected results: see `launches`."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import native
import numpy as np
import reference
from harness import Argument, Buffer, Case, Launch, int32, int64, pointers
from launches import Check, Described, Scales, bits, ceil_div, filled, near

ACTIVATIONS = {"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu2": 4, "clamped_swiglu": 5}


def activated(name: str, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """The definition, in the precision of its arguments."""
    if name == "silu":
        return gate / (1 + np.exp(-gate)) * up
    if name == "gelu":
        erf = np.vectorize(math.erf, otypes=[np.float64])
        return 0.5 * gate * (1 + erf(gate / np.sqrt(2))) * up
    if name == "gelu_tanh":
        return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
    if name == "relu2":
        return np.maximum(gate, 0) ** 2 * up
    if name == "clamped_swiglu":
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
        return gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
    return gate


@dataclass(frozen=True)
class Choices:
    """Which expert each slot has; `ids` [tokens][top_k]."""

    ids: np.ndarray
    experts: int

    @staticmethod
    def of_counts(counts: Sequence[int], top_k: int = 1, none: Sequence[int] = ()) -> Choices:
        """Slots in any order, `counts[e]` of expert e, and those of no expert."""
        ids = np.array([*np.repeat(np.arange(len(counts)), counts), *none], np.int64)
        random = np.random.default_rng([len(ids), top_k])
        return Choices(random.permutation(ids).reshape(-1, top_k), len(counts))

    @property
    def of_slots(self) -> np.ndarray:
        """The expert of each slot; the number of experts for none."""
        ids = self.ids.reshape(-1)
        return np.where((ids >= 0) & (ids < self.experts), ids, self.experts)

    @property
    def order(self) -> np.ndarray:
        """Slots sorted by expert."""
        return np.argsort(self.of_slots, kind="stable").astype(np.int32)

    @property
    def offsets(self) -> np.ndarray:
        """Where an expert's slots begin in the order."""
        return np.searchsorted(np.sort(self.of_slots), np.arange(self.experts + 1)).astype(np.int32)

    def chunks(self, columns: int) -> np.ndarray:
        """Of at most so many slots."""
        found = [
            (expert, first, min(columns, end - first), 0)
            for expert, (begin, end) in enumerate(zip(self.offsets[:-1], self.offsets[1:], strict=True))
            for first in range(begin, end, columns)
        ]
        return np.array(found, np.int32).reshape(-1, 4)


def _begins(expected: np.ndarray) -> Callable[[np.ndarray], str]:
    # What is behind means nothing.
    return lambda found: bits(expected)(found.reshape(-1)[: expected.size].copy())


def route(source: Described, choices: Choices, columns: int) -> Check:
    """Slots to experts by one block of threads."""
    slots, experts = choices.ids.size, choices.experts
    chunks = choices.chunks(columns)
    offsets, order = Buffer(filled(experts + 1, np.int32)), Buffer(filled(slots, np.int32))
    count, listed = Buffer(filled(1, np.int32)), Buffer(filled(4 * (min(experts, slots) + slots // columns), np.int32))
    arguments = [
        pointers(Buffer(choices.ids)), int32(slots), int32(experts), int32(columns),
        pointers(offsets), pointers(order), pointers(count), pointers(listed),
    ]  # fmt: skip
    shared = source.constants["WARPS"] * (experts + 1) * 4
    launch = Launch("experts_route", 1, source.threads["experts_route"], arguments, shared)
    wanted = [
        (offsets, bits(choices.offsets)),
        (order, bits(choices.order)),
        (count, bits(np.array([len(chunks)], np.int32))),
        (listed, _begins(chunks.reshape(-1))),
    ]
    return Check(f"experts_route, {slots} slots, {experts} experts, {columns}", Case([launch]), wanted)


@dataclass(frozen=True)
class Matrix:
    """A quantized weight, and its codes' values [n][k] in x's type."""

    packed: native.Bytes
    scales: Scales
    table: np.ndarray

    def dense(self, blocksize: int) -> np.ndarray:
        """As the kernel has them."""
        n, k = self.table.shape
        return self.table * np.repeat(self.scales.absmax.astype(np.float64), blocksize)[: n * k].reshape(n, k)

    @property
    def addresses(self) -> list[Buffer | None]:
        """A row of the table of addresses."""
        scales = self.scales
        if scales.codes is None or scales.absmax2 is None:
            return [Buffer(self.packed), Buffer(scales.absmax), None, None]
        offset = np.array([scales.offset], np.float32)
        return [Buffer(self.packed), Buffer(scales.codes), Buffer(scales.absmax2), Buffer(offset)]


@dataclass(frozen=True)
class Plan:
    """How a launch divides the work, and how many blocks of threads share it."""

    grid: int
    k_slices: int
    per_pass: int
    unit: int
    routes: bool = True
    """Whether blocks sort slots themselves."""


@dataclass(frozen=True)
class Product:
    """Rows of x of each expert, and the experts' weights `[projections][experts]`, each [n][k]."""

    dtype: str
    quant_type: str
    blocksize: int
    choices: Choices
    weights: list[list[Matrix]]
    x: np.ndarray
    bias: np.ndarray | None
    gathers: bool

    @staticmethod
    def random(
        choices: Choices,
        n: int,
        k: int,
        dtype: str,
        quant_type: str = "nf4",
        blocksize: int = 64,
        *,
        projections: int = 1,
        gathers: bool = True,
        nested: bool = False,
        bias: bool = False,
    ) -> Product:
        """Of normal values."""
        random = np.random.default_rng([n, k, blocksize, choices.ids.size])

        def matrix() -> Matrix:
            packed, absmax = native.quantize(random.standard_normal(n * k, np.float32), "f32", quant_type, blocksize)
            codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
            values = reference.CODEBOOKS[quant_type][codes].astype(np.float32)
            table = native.to_float32(native.from_float32(values, dtype), dtype).astype(np.float64).reshape(n, k)
            return Matrix(packed, Scales.nested(absmax) if nested else Scales.plain(absmax), table)

        weights = [[matrix() for _ in range(choices.experts)] for _ in range(projections)]
        rows = choices.ids.shape[0] if gathers else choices.ids.size
        # So small that activations are not at their ends.
        x = native.from_float32(random.standard_normal((rows, k), np.float32) / np.float32(math.sqrt(k)), dtype)
        added = None
        if bias:
            added = native.from_float32(random.standard_normal((choices.experts, projections * n), np.float32), dtype)
        return Product(dtype, quant_type, blocksize, choices, weights, x, added, gathers)

    def expected(self, activation: str, k_slices: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows as the kernel lays them out, by how much they may differ, and which are written."""
        order, of_slots = self.choices.order, self.choices.of_slots
        n, k = self.weights[0][0].table.shape
        joins = activation != "none"
        width = n if joins else n * len(self.weights)
        y, bound = np.zeros((order.size, width)), np.zeros((order.size, width))
        written = np.zeros(order.size, bool)
        x = native.to_float32(self.x, self.dtype).astype(np.float64)
        dense = [[matrix.dense(self.blocksize) for matrix in matrices] for matrices in self.weights]
        # The sums of a block are rounded once for each product of matrices, then blocks and k-slices are added.
        roundings = (10 + 2 * k / 64 + k_slices) * 2.0**-24
        for place, slot in enumerate(order):
            expert = of_slots[slot]
            if expert == self.choices.experts:
                continue
            row = x[slot // self.choices.ids.shape[1] if self.gathers else place]
            sums, errors = [], []
            for p, matrices in enumerate(dense):
                added = 0.0
                if self.bias is not None:
                    added = native.to_float32(self.bias[expert, p * n : (p + 1) * n].copy(), self.dtype)
                sums.append(matrices[expert] @ row + added)
                errors.append(roundings * (np.abs(matrices[expert]) @ np.abs(row) + np.abs(added)))
            to = place if self.gathers else slot
            written[to] = True
            if joins:
                gate, up = sums[0], sums[1] if len(sums) > 1 else np.ones(n)
                by_up = errors[1] if len(sums) > 1 else np.zeros(n)
                y[to] = activated(activation, gate, up)
                steps = [activated(activation, gate + d * errors[0], up + d * by_up) for d in (-1, 1)]
                steps += [activated(activation, gate + d * errors[0], up - d * by_up) for d in (-1, 1)]
                bound[to] = np.max(np.abs(np.array(steps) - y[to]), axis=0) * 1.5
                bound[to] += 2.0**-21 * (np.abs(y[to]) + np.abs(gate) * (np.abs(up) + 1))
            else:
                y[to], bound[to] = np.concatenate(sums), np.concatenate(errors)
        bound += native.EPSILON[self.dtype] * (np.abs(y) + bound) + 1e-7
        return y, bound, written


def _of_rows(written: np.ndarray, y: np.ndarray, bound: np.ndarray, dtype: str) -> Callable[[np.ndarray], str]:
    def compare(found: np.ndarray) -> str:
        untouched = found[~written]
        if untouched.size and not (untouched.view(np.uint8) == 0xA7).all():
            return "rows of no expert are written"
        if not written.any():
            return ""
        return near(y[written], bound[written], dtype)(found[written])

    return compare


def few(source: Described, product: Product, plan: Plan, activation: str = "none") -> Check:
    """A launch of experts_few."""
    constants, choices = source.constants, product.choices
    n, k = product.weights[0][0].table.shape
    columns = constants["COLUMNS"]
    projections = len(product.weights)
    rows = [matrix.addresses for matrices in product.weights for matrix in matrices]
    table = Buffer(
        np.zeros((len(rows), 4), np.int64),
        addresses=[(8 * (4 * i + j), b) for i, row in enumerate(rows) for j, b in enumerate(row) if b is not None],
    )
    y, bound, written = product.expected(activation, plan.k_slices)
    out = Buffer(filled(y.size, np.uint16).view(product.x.dtype).reshape(y.shape))
    chunks = choices.chunks(columns)
    routed: list[Buffer | None] = [None, None, None]
    if not plan.routes:
        # Behind the chunks is what would be found to be too much.
        listed = np.concatenate([chunks.reshape(-1), np.full(4, -1, np.int32)])
        routed = [Buffer(choices.order), Buffer(listed), Buffer(np.array([len(chunks)], np.int32))]
    bias = None if product.bias is None else Buffer(product.bias)
    numbers = (
        choices.ids.size, choices.ids.shape[1], choices.experts, n, k, projections, int(product.gathers),
        ACTIVATIONS[activation], int(math.log2(product.blocksize)), ("nf4", "fp4").index(product.quant_type),
        plan.k_slices, plan.per_pass, plan.unit, 4096,
    )  # fmt: skip
    first = pointers(table, Buffer(product.x), bias, out, Buffer(choices.ids), *routed)
    job = Argument(first.data + struct.pack("<14i", *numbers), first.addresses)
    partial = 2 * plan.per_pass * plan.k_slices * columns * 64
    shared = constants["LANE_TABLE_BYTES"] + constants["MAP_BYTES"] + constants["ROUTE_BYTES"] + constants["PART_BYTES"]
    shared += constants["SEGMENTS"] * (constants["SEGMENT_BYTES"] + 4 * columns) + partial
    suffix = product.weights[0][0].scales.suffix
    kernel = f"experts_few_{product.dtype}{suffix}"
    launch = Launch(kernel, plan.grid, source.threads[kernel], [job], shared)
    name = f"{kernel}, {choices.ids.shape} of {choices.experts}, {n} x {k} x {projections}, {activation}, {plan}"
    return Check(name, Case([launch]), [(out, _of_rows(written, y, bound, product.dtype))])


def total(source: Described, choices: Choices, columns: int, dtype: str, wide: bool) -> Check:
    """The weighted sum of each token's slots, in their order."""
    random = np.random.default_rng([choices.ids.size, columns])
    tokens, top_k = choices.ids.shape
    out = native.from_float32(random.standard_normal((tokens * top_k, columns), np.float32), dtype)
    none = choices.of_slots == choices.experts
    # What no kernel wrote.
    out[none] = native.from_float32(np.full(columns, np.nan, np.float32), dtype)
    kind = "f32" if wide else dtype
    weights = native.from_float32(random.random((tokens, top_k), np.float32), kind)
    exact = np.zeros((tokens, columns), np.float32)
    values, factors = native.to_float32(out, dtype), native.to_float32(weights, kind)
    for token in range(tokens):
        for j in range(top_k):
            if not none[token * top_k + j]:
                # One rounding, as of a fused operation: a product of these has no more bits than float64.
                product = factors[token, j].astype(np.float64) * values[token * top_k + j]
                exact[token] = (exact[token] + product).astype(np.float32)
    y = Buffer(filled(tokens * columns, out.dtype).reshape(tokens, columns))
    arguments = [
        pointers(Buffer(out)), pointers(Buffer(choices.ids)), pointers(Buffer(weights)), int32(wide), pointers(y),
        int64(tokens), int32(top_k), int32(choices.experts), int32(columns),
    ]  # fmt: skip
    kernel, constants = f"experts_sum_{dtype}", source.constants
    grid = ceil_div(tokens * columns // constants["PER_THREAD"], constants["THREADS"])
    launch = Launch(kernel, grid, source.threads[kernel], arguments)
    wanted = bits(native.from_float32(exact, dtype))
    return Check(f"{kernel}, {tokens} x {top_k} x {columns}", Case([launch]), [(y, wanted)])


def dequantize(
    source: Described, counts: Sequence[int], values: int, dtype: str, quant_type: str, blocksize: int, nested: bool
) -> Check:
    """A matrix of each expert that has slots, beside what the core makes of it; others are not written."""
    random = np.random.default_rng([values, blocksize, *counts])
    rows, expected = [], []
    for count in counts:
        packed, absmax = native.quantize(random.standard_normal(values, np.float32), "f32", quant_type, blocksize)
        scales = Scales.nested(absmax) if nested else Scales.plain(absmax)
        rows.append(Matrix(packed, scales, np.empty(0)).addresses)
        made = native.dequantize(packed, scales.absmax, values, dtype, quant_type, blocksize)
        expected.append(made if count else filled(values, made.dtype))
    table = Buffer(
        np.zeros((len(rows), 4), np.int64),
        addresses=[(8 * (4 * i + j), b) for i, row in enumerate(rows) for j, b in enumerate(row) if b is not None],
    )
    wanted = np.concatenate(expected)
    out = Buffer(filled(wanted.size, wanted.dtype))
    tiles = ceil_div(values, source.constants["TILE"])
    arguments = [
        pointers(table), pointers(Buffer(np.cumsum(counts).astype(np.int32))), pointers(out), int64(values),
        int32(tiles), int32(int(math.log2(blocksize))), int32(("nf4", "fp4").index(quant_type)),
    ]  # fmt: skip
    kernel = f"experts_dequantize_{dtype}{'_nested' if nested else ''}"
    launch = Launch(kernel, len(counts) * tiles, source.threads[kernel], arguments)
    name = f"{kernel}, {counts} slots, {values} values of {quant_type} in blocks of {blocksize}"
    return Check(name, Case([launch]), [(out, bits(wanted))])
