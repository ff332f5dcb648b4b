"""What the CUDA kernels are told about tensors: addresses, lengths and dtypes, a device and its stream."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.ops._torch_internals import current_stream
from halfbyte.ops.checks import packed_bytes

Raw = tuple[int, int, str]
RawScales = tuple[Raw, Raw | None, Raw | None]

NAMES = {
    torch.uint8: "uint8",
    torch.int8: "int8",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}

ALIGNMENT = 16
"""In bytes, of what the fast products read."""


def raw(tensor: Tensor) -> Raw:
    """Address, count and dtype of a contiguous tensor. The caller keeps the tensor alive during the call."""
    return tensor.data_ptr(), tensor.numel(), NAMES[tensor.dtype]


def raw_or_none(tensor: Tensor | None) -> Raw | None:
    """The same, for a tensor that may be left out."""
    return None if tensor is None else raw(tensor)


def raw_bytes(packed: Tensor, n: int) -> Raw:
    """The bytes of `n` packed values, whatever dtype they are viewed as; padding is left out."""
    return packed.data_ptr(), packed_bytes(n), "uint8"


def here(tensor: Tensor) -> tuple[int, int]:
    """The device of a tensor, and torch's current stream there."""
    index = tensor.get_device()
    return index, current_stream(index)


def raw_scales(absmax: Tensor, absmax2: Tensor | None, offset: Tensor | None) -> tuple[RawScales, tuple[Tensor, ...]]:
    """The scales as the core takes them, and what must be kept alive meanwhile."""
    absmax = absmax.contiguous()
    if absmax2 is None or offset is None:
        return (raw(absmax), None, None), (absmax,)
    absmax2 = absmax2.contiguous()
    return (raw(absmax), raw(absmax2), raw(offset)), (absmax, absmax2)
