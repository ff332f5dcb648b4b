"""Defining operations in torch's namespace `bitsandbytes`, and what their fake kernels check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])
_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def define(name: str, schema: str, fake: Callable[..., Any]) -> Callable[[_Function], _Function]:
    """Define an operation that one function computes on every device."""
    torch.library.define(f"bitsandbytes::{name}", schema)

    def register(function: _Function) -> _Function:
        torch.library.impl(f"bitsandbytes::{name}", "default", function)
        torch.library.register_fake(f"bitsandbytes::{name}", fake)
        return function

    return register


def check_blocksize(blocksize: int) -> None:
    """Of 4-bit codes."""
    torch._check(blocksize in _BLOCKSIZES, lambda: f"blocksize must be one of {_BLOCKSIZES}, got {blocksize}")


def check_4bit(blocksize: int, quant_type: str, absmax: Tensor | None = None) -> None:
    """The arguments of every 4-bit operation."""
    check_blocksize(blocksize)
    torch._check(quant_type in ("nf4", "fp4"), lambda: f"quant_type must be 'nf4' or 'fp4', got {quant_type!r}")
    if absmax is not None:
        check_dtype("absmax", absmax, torch.float32)


def check_dtype(argument: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Of a tensor that has to have one."""
    torch._check(tensor.dtype is dtype, lambda: f"{argument} must be {dtype}, got {tensor.dtype}")


def check_float(argument: str, dtype: torch.dtype) -> None:
    """Of values."""
    torch._check(dtype in _FLOATS, lambda: f"{argument} must be float16, bfloat16 or float32, got {dtype}")


def check_out(out: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """Of an output that the caller gives."""
    torch._check(tuple(out.shape) == tuple(shape), lambda: f"out must have shape {list(shape)}, got {list(out.shape)}")
    check_dtype("out", out, dtype)
    torch._check(out.device == device, lambda: f"out must be on {device}, got {out.device}")
