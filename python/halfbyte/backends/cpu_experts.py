"""The experts of a layer on the CPU: check, allocate, hand addresses to the compiled core."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from halfbyte import _native
from halfbyte.backends import experts_torch
from halfbyte.backends.cpu import _NAMES, _follow_threads, _kernel_of_kind, readable
from halfbyte.ops.checks_experts import check_experts, check_gradient


@functools.lru_cache(maxsize=256)
def _kernel(*kind: Any) -> Any:
    return _native.CpuExperts(*kind)


def takes(dtype: torch.dtype, **kind: Any) -> bool:
    """Whether experts of this kind are taken: all are."""
    return dtype in _NAMES


def experts_4bit(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    table: Tensor,
    maps: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    intermediate: int,
    blocksize: int,
    quant_type: str,
    nested: bool,
    activation: str,
) -> Tensor:
    """See `halfbyte.ops.experts`."""
    check_experts(x, ids, weights, table, maps, up_bias, down_bias, intermediate, blocksize, quant_type, activation)
    tokens, hidden = x.shape
    projections, experts, _ = table.shape
    kernel = _kernel(
        _NAMES[x.dtype], experts, hidden, intermediate, projections == 3, quant_type, blocksize, nested
    )  # fmt: skip
    x, ids, weights, table = readable(x), readable(ids), readable(weights), readable(table)
    up_bias = None if up_bias is None else readable(up_bias)
    down_bias = None if down_bias is None else readable(down_bias)
    y = x.new_empty(tokens, hidden)
    kernel.forward(
        tokens,
        ids.shape[1],
        x.data_ptr(),
        ids.data_ptr(),
        weights.data_ptr(),
        _NAMES[weights.dtype],
        table.data_ptr(),
        0 if up_bias is None else up_bias.data_ptr(),
        0 if down_bias is None else down_bias.data_ptr(),
        activation,
        y.data_ptr(),
        _follow_threads(),
    )
    return y


class Products:
    """Products with the packed matrices of a table, expert by expert, by the kernels of single layers."""

    low = torch.float32
    """Few CPUs multiply 16-bit numbers."""

    def __init__(
        self,
        slots: experts_torch.Slots,
        table: Tensor,
        hidden: int,
        intermediate: int,
        blocksize: int,
        quant_type: str,
        nested: bool,
        dtype: torch.dtype,
    ) -> None:
        """For sorted slots."""
        self.slots = slots
        self.gated = table.shape[0] == 3
        self._addresses: list[list[list[int]]] = table.tolist()
        shapes = [(intermediate, hidden)] * (table.shape[0] - 1) + [(hidden, intermediate)]
        self._shapes = shapes
        self._kernels = [
            _kernel_of_kind(_NAMES[dtype], *shape, quant_type, blocksize, nested, None) for shape in shapes
        ]

    def forward(self, rows: Tensor, projection: int) -> Tensor:
        """`rows @ W.T` with each row's expert's matrix."""
        (out, _), kernel = self._shapes[projection], self._kernels[projection]
        y = rows.new_empty(rows.shape[0], out)
        for expert, there in self.slots.bounds():
            codes, absmax, absmax2, offset = self._addresses[projection][expert]
            kernel.forward(
                there.stop - there.start, rows[there].data_ptr(), codes, absmax, absmax2, offset, 0,
                y[there].data_ptr(), _follow_threads(),
            )  # fmt: skip
        return y

    def backward(self, grads: Tensor, projection: int) -> Tensor:
        """`grads @ W`."""
        (_, columns), kernel = self._shapes[projection], self._kernels[projection]
        y = grads.new_empty(grads.shape[0], columns)
        for expert, there in self.slots.bounds():
            codes, absmax, absmax2, offset = self._addresses[projection][expert]
            kernel.backward(
                there.stop - there.start, grads[there].data_ptr(), codes, absmax, absmax2, offset, y[there].data_ptr(),
                _follow_threads(),
            )  # fmt: skip
        return y

    def grouped(self, rows: Tensor, stack: Tensor) -> Tensor:
        """`rows @ stack[expert]`."""
        return experts_torch.grouped_one_by_one(self.slots, rows, stack)

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        """`a.T @ b` of the rows of each expert."""
        return experts_torch.outer_one_by_one(self.slots, a, b)


def products(
    x: Tensor,
    slots: experts_torch.Slots,
    table: Tensor,
    intermediate: int,
    blocksize: int,
    quant_type: str,
    nested: bool,
) -> Products:
    """Products with the packed matrices of a table, for activations like `x`."""
    return Products(slots, table, x.shape[1], intermediate, blocksize, quant_type, nested, x.dtype)


def experts_4bit_backward(
    grad: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    table: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    intermediate: int,
    blocksize: int,
    quant_type: str,
    nested: bool,
    activation: str,
    to_x: bool,
    to_weights: bool,
) -> tuple[Tensor, Tensor]:
    """See `halfbyte.ops.experts`."""
    check_experts(x, ids, weights, table, None, up_bias, down_bias, intermediate, blocksize, quant_type, activation)
    check_gradient(grad, x)
    slots = experts_torch.Slots(ids, table.shape[1])
    by = products(x, slots, table, intermediate, blocksize, quant_type, nested)
    return experts_torch.backward(by, slots, grad, x, weights, up_bias, down_bias, activation, to_x, to_weights)
