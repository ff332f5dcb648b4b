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
from halfbyte.ops._torch_internals import current_stream
from halfbyte.ops.checks_experts import check_experts

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


def tensor_maps(device: int, projections: Sequence[Sequence[Tensor]], shapes: Sequence[tuple[int, int]]) -> Any:
    """What the kernel for many tokens reads codes by, uint8 `[projections, experts, 128]`; None where it has no use."""
    make = getattr(_native, "cuda_expert_maps", None)
    if make is None or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    made = [
        make(device, [codes.data_ptr() for codes in all_codes], *shape)
        for all_codes, shape in zip(projections, shapes, strict=True)
    ]
    maps = torch.frombuffer(bytearray(b"".join(made)), dtype=torch.uint8)
    return maps.view(len(projections), -1, 128).to(torch.device("cuda", device))


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
    x, ids, weights, table = x.contiguous(), ids.contiguous(), weights.contiguous(), table.contiguous()
    up_bias = None if up_bias is None else up_bias.contiguous()
    down_bias = None if down_bias is None else down_bias.contiguous()
    y = x.new_empty(tokens, hidden)
    together = tokens
    while together > 1 and not kernel.takes(together, k):
        together = (together + 1) // 2
    workspace = x.new_empty(kernel.workspace(together, k), dtype=torch.uint8)
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
