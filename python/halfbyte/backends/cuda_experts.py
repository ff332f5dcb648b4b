"""The experts of a layer on a GPU: check, allocate, hand addresses to the compiled core.

It launches on torch's stream. Nothing waits for the GPU, and memory belongs to torch's allocator.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte import _native
from halfbyte.backends import experts_torch
from halfbyte.backends.expert_stage import reading
from halfbyte.ops._torch_internals import current_stream, grouped_mm
from halfbyte.ops.checks_experts import check_experts, check_gradient

_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}

_TAKEN = (torch.float16, torch.bfloat16)
"""Activations that there are kernels for."""


@functools.lru_cache(maxsize=256)
def _kernel(*kind: Any) -> Any:
    return _native.CudaExperts(*kind)


def takes(
    dtype: torch.dtype,
    device: int,
    experts: int,
    hidden: int,
    intermediate: int,
    gated: bool,
    quant_type: str,
    blocksize: int,
    nested: bool,
) -> bool:
    """Whether there are kernels for experts of this kind on this device."""
    if dtype not in _TAKEN or not hasattr(_native, "CudaExperts") or torch.version.hip is not None:
        return False
    kernel = _kernel(device, _NAMES[dtype], experts, hidden, intermediate, gated, quant_type, blocksize, nested)
    return bool(kernel.takes(1, 1))


def tensor_maps(
    device: int,
    codes: Sequence[Sequence[int]],
    scales: Sequence[Sequence[int]] | None,
    shapes: Sequence[tuple[int, int]],
) -> Any:
    """What the kernel for many tokens reads by, uint8 `[projections, experts, 256]`; None where it has no use.

    `codes` and `scales` are addresses of each projection's experts; `scales` is None where they are not float32 of
    blocks of 64.
    """
    make = getattr(_native, "cuda_expert_maps", None)
    if make is None or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    made = [
        make(device, list(of), None if scales is None else list(scales[i]), *shapes[i]) for i, of in enumerate(codes)
    ]
    maps = torch.frombuffer(bytearray(b"".join(made)), dtype=torch.uint8)
    return maps.view(len(codes), -1, 256).to(torch.device("cuda", device))


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
    k = ids.shape[1]
    if tokens == 0 or k == 0:
        return torch.zeros_like(x)
    projections, experts, _ = table.shape
    device = x.get_device()
    kernel = _kernel(
        device, _NAMES[x.dtype], experts, hidden, intermediate, projections == 3, quant_type, blocksize, nested
    )  # fmt: skip
    x, ids, weights = x.contiguous(), ids.contiguous(), weights.contiguous()
    up_bias = None if up_bias is None else up_bias.contiguous()
    down_bias = None if down_bias is None else down_bias.contiguous()
    y = x.new_empty(tokens, hidden)
    together = tokens
    while together > 1 and not kernel.takes(together, k):
        together = (together + 1) // 2
    workspace = x.new_empty(kernel.workspace(together, k), dtype=torch.uint8)
    with reading(table, maps, tokens * k) as (table, maps):
        table = table.contiguous()
        for first in range(0, tokens, together):
            count = min(together, tokens - first)
            kernel.launch(
                current_stream(device),
                count,
                k,
                x.data_ptr() + first * hidden * x.element_size(),
                ids.data_ptr() + first * k * ids.element_size(),
                weights.data_ptr() + first * k * weights.element_size(),
                _NAMES[weights.dtype],
                table.data_ptr(),
                0 if maps is None else maps.data_ptr(),
                0 if up_bias is None else up_bias.data_ptr(),
                0 if down_bias is None else down_bias.data_ptr(),
                activation,
                workspace.data_ptr(),
                y.data_ptr() + first * hidden * y.element_size(),
            )
    return y


@functools.lru_cache(maxsize=64)
def multiplies_groups(device: int, dtype: torch.dtype) -> bool:
    """Whether torch multiplies groups of rows in one launch here; other dtypes and devices it has the host wait for."""
    if grouped_mm is None or dtype is not torch.bfloat16:
        return False
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0) and major != 10:
        return False
    rows = torch.zeros(16, 16, dtype=dtype, device=f"cuda:{device}")
    ends = torch.full((1,), 16, dtype=torch.int32, device=rows.device)
    try:
        grouped_mm(rows, rows.view(1, 16, 16), offs=ends)
        grouped_mm(rows.t(), rows, offs=ends)
    except (RuntimeError, TypeError, ValueError):
        # Not all builds have these products.
        return False
    return True


class Products:
    """Products with the packed matrices of a table.

    The matrices of a projection are dequantized in one launch to a stack, of which there is one at a time, and
    multiplied by torch: in one launch where that can do so, else one by one, for which the host waits once.
    """

    def __init__(
        self, slots: experts_torch.Slots, table: Tensor, kernel: Any, dtype: torch.dtype, hidden: int, intermediate: int
    ) -> None:
        """For sorted slots."""
        self.slots = slots
        self.gated = table.shape[0] == 3
        self.low = dtype
        self._table, self._kernel = table, kernel
        self._shapes = [(intermediate, hidden)] * (table.shape[0] - 1) + [(hidden, intermediate)]
        self._stack: tuple[int, Tensor] | None = None

    def forward(self, rows: Tensor, projection: int) -> Tensor:
        """`rows @ W.T` with each row's expert's matrix."""
        return self.grouped(rows, self._values(rows, projection).transpose(1, 2))

    def backward(self, grads: Tensor, projection: int) -> Tensor:
        """`grads @ W`."""
        return self.grouped(grads, self._values(grads, projection))

    def grouped(self, rows: Tensor, stack: Tensor) -> Tensor:
        """`rows @ stack[expert]`."""
        together = multiplies_groups(rows.get_device(), rows.dtype)
        how = experts_torch.grouped_together if together else experts_torch.grouped_one_by_one
        return how(self.slots, rows, stack)

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        """`a.T @ b` of the rows of each expert."""
        together = multiplies_groups(a.get_device(), a.dtype)
        how = experts_torch.outer_together if together else experts_torch.outer_one_by_one
        return how(self.slots, a, b)

    def _values(self, like: Tensor, projection: int) -> Tensor:
        """The matrices of a projection, of those experts that have slots."""
        if self._stack is not None and self._stack[0] == projection:
            return self._stack[1]
        # Its memory may be that of the next.
        self._stack = None
        stack = like.new_empty(self._table.shape[1], *self._shapes[projection])
        stream = current_stream(like.get_device())
        self._kernel.dequantize(
            stream, self._table.data_ptr(), projection, self.slots.ends.data_ptr(), stack.data_ptr()
        )
        self._stack = projection, stack
        return stack


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
    count, experts, _ = table.shape
    hidden = x.shape[1]
    kernel = _kernel(
        x.get_device(), _NAMES[x.dtype], experts, hidden, intermediate, count == 3, quant_type, blocksize, nested
    )  # fmt: skip
    return Products(slots, table.contiguous(), kernel, x.dtype, hidden, intermediate)


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
    with reading(table, None, ids.numel()) as (table, _):
        by = products(x, slots, table, intermediate, blocksize, quant_type, nested)
        return experts_torch.backward(by, slots, grad, x, weights, up_bias, down_bias, activation, to_x, to_weights)
