"""The products of LoRA adapters on a GPU: each with the casts and the addition around it in one launch.

`down` multiplies rows `[rows, columns]` by a factor `[rank, columns]`, and `up` multiplies back. A has that shape. B is
transposed: `up` reads it as it is, and can write a copy `[rank, columns]` for a later `down`, in the backward pass.
Factors stay in the dtype that training keeps them in. Autograd does not see these functions.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from halfbyte import _native
from halfbyte.backends.cuda_memory import ALIGNMENT, NAMES
from halfbyte.ops._torch_internals import current_stream

_COLUMNS = 8
"""What columns are a multiple of."""


@functools.lru_cache(maxsize=64)
def _ranks(device: int) -> int:
    """The largest rank that the device has kernels for, or 0."""
    return _native.cuda_lora_ranks(device)


def takes(A: Tensor, B: Tensor, low: torch.dtype) -> bool:
    """Whether there are kernels for the adapter `[rank, in_features]`, `[out_features, rank]`, multiplied in `low`."""
    if not A.is_cuda or low is torch.float32:
        return False
    rank, columns = A.shape
    return (
        rank % 2 == 0
        and 0 < rank <= _ranks(A.get_device())
        and columns % _COLUMNS == 0
        and B.shape[0] % _COLUMNS == 0
        and columns > 0
        and B.shape[0] > 0
        and A.dtype in (torch.float32, low)
        and B.dtype in (torch.float32, low)
        and A.is_contiguous()
        and B.is_contiguous()
    )


def down(x: Tensor, factor: Tensor, low: torch.dtype) -> tuple[Tensor, Tensor]:
    """The product of `x` with a factor, in the dtype `low`.

    Args:
        x: Float `[..., columns]`; its rows are counted through.
        factor: Float32 or `low` `[rank, columns]`, contiguous.
        low: float16 or bfloat16.

    Returns:
        `x` in `low`, contiguous; and the product `[rows, rank]`.
    """
    if x.dtype is not low and x.dtype is not torch.float32:
        x = x.detach().to(low)
    x, factor = _aligned(x), _aligned(factor)
    rank, columns = factor.shape
    rows = x.numel() // columns
    h = x.new_empty(rows, rank, dtype=low)
    cast, place = x, 0
    x_is_float = x.dtype is not low
    if x_is_float:
        cast = torch.empty_like(x, dtype=low)
        place = cast.data_ptr()
    device = x.get_device()
    _native.cuda_lora_down(
        device, current_stream(device), NAMES[low], x.data_ptr(), x_is_float, factor.data_ptr(),
        factor.dtype is not low, place, h.data_ptr(), rows, columns, rank,
    )  # fmt: skip
    return cast, h


def up(
    y: Tensor,
    h: Tensor,
    factor: Tensor,
    transposed: bool,
    scaling: float,
    dtype: torch.dtype,
    turned: Tensor | None = None,
) -> Tensor:
    """`y + scaling · h @ factor` in `dtype`; `y` is overwritten where it can hold that.

    Args:
        y: Float32 or the dtype of `h` `[..., columns]`.
        h: float16 or bfloat16 `[rows, rank]`, contiguous.
        factor: Float32 or the dtype of `h` `[rank, columns]`, or with `transposed` `[columns, rank]`, contiguous.
        transposed: How the factor lies.
        scaling: The adapter's.
        dtype: Float32, or that of `h`; float32 where `y` is.
        turned: Of the dtype of `h` `[rank, columns]`: becomes the factor, as `down` takes it.
    """
    y = _aligned(y)
    out = y if y.dtype is dtype else torch.empty_like(y, dtype=dtype)
    _add(y, h, factor, transposed, scaling, out, turned)
    return out


def product(h: Tensor, factor: Tensor, transposed: bool, scaling: float, dtype: torch.dtype) -> Tensor:
    """`scaling · h @ factor` in `dtype`; as `up`."""
    out = h.new_empty(h.shape[0], factor.shape[0 if transposed else 1], dtype=dtype)
    _add(None, h, factor, transposed, scaling, out, None)
    return out


def _add(
    y: Tensor | None,
    h: Tensor,
    factor: Tensor,
    transposed: bool,
    scaling: float,
    out: Tensor,
    turned: Tensor | None,
) -> None:
    rows, rank = h.shape
    columns = factor.shape[0 if transposed else 1]
    device, low = h.get_device(), h.dtype
    _native.cuda_lora_up(
        device, current_stream(device), NAMES[low], 0 if y is None else y.data_ptr(),
        y is not None and y.dtype is not low, h.data_ptr(), factor.data_ptr(), factor.dtype is not low, transposed,
        scaling, out.data_ptr(), out.dtype is not low, 0 if turned is None else turned.data_ptr(), rows, columns, rank,
    )  # fmt: skip


def _aligned(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x.clone() if x.data_ptr() % ALIGNMENT else x
