"""`torch.ops.bitsandbytes`: schemas of bitsandbytes, computed by halfbyte's operations.

Defined when the layer is loaded, which it is only where bitsandbytes itself is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._missing import missing_attribute

_Function = TypeVar("_Function", bound=Callable[..., Any])
_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_halfbyte = torch.ops.halfbyte


def _define(name: str, schema: str, fake: Callable[..., Any]) -> Callable[[_Function], _Function]:
    """Define an operation that one function computes on every device."""
    torch.library.define(f"bitsandbytes::{name}", schema)

    def register(function: _Function) -> _Function:
        torch.library.impl(f"bitsandbytes::{name}", "default", function)
        torch.library.register_fake(f"bitsandbytes::{name}", fake)
        return function

    return register


def _check(blocksize: int, quant_type: str, absmax: Tensor | None = None) -> None:
    torch._check(blocksize in _BLOCKSIZES, lambda: f"invalid blocksize {blocksize}")
    torch._check(quant_type in ("nf4", "fp4"), lambda: f"quant_type must be 'nf4' or 'fp4', got {quant_type!r}")
    if absmax is not None:
        torch._check(absmax.dtype is torch.float32, lambda: f"absmax must be float32, got {absmax.dtype}")


def _check_float(argument: str, dtype: torch.dtype) -> None:
    torch._check(dtype in _FLOATS, lambda: f"{argument} must be float16, bfloat16 or float32, got {dtype}")


def _check_out(out: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    torch._check(tuple(out.shape) == tuple(shape), lambda: f"out must have shape {shape}, got {out.shape}")
    torch._check(out.dtype is dtype, lambda: f"out must be {dtype}, got {out.dtype}")
    torch._check(out.device == device, lambda: f"out must be on {device}, got {out.device}")


# ---- 4 bits ----------------------------------------------------------------------------------------------------------


def _fake_quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> Any:
    _check(blocksize, quant_type)
    _check_float("A", A.dtype)
    n = A.numel()
    size = 2 * quant_storage.itemsize
    return A.new_empty((-(-n // size), 1), dtype=quant_storage), A.new_empty(-(-n // blocksize), dtype=torch.float32)


@_define(
    "quantize_4bit",
    "(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)",
    _fake_quantize_4bit,
)
def _quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    from .functional import quantize_4bit

    _check(blocksize, quant_type)
    _check_float("A", A.dtype)
    packed, state = quantize_4bit(A, blocksize=blocksize, quant_type=quant_type, quant_storage=quant_storage)
    return packed, state.absmax


def _fake_dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    _check(blocksize, quant_type, absmax)
    _check_float("dtype", dtype)
    return A.new_empty(shape, dtype=dtype)


@_define(
    "dequantize_4bit",
    "(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype) -> Tensor",
    _fake_dequantize_4bit,
)
def _dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    _check(blocksize, quant_type, absmax)
    _check_float("dtype", dtype)
    result: Tensor = _halfbyte.dequantize_4bit(A, absmax, None, None, shape, dtype, blocksize, quant_type)
    return result


def _fake_dequantize_4bit_out(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype, out: Tensor
) -> None:
    _check(blocksize, quant_type, absmax)
    _check_float("dtype", dtype)
    _check_out(out, shape, dtype, A.device)


@_define(
    "dequantize_4bit.out",
    "(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype, Tensor! out) -> ()",
    _fake_dequantize_4bit_out,
)
def _dequantize_4bit_out(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype, out: Tensor
) -> None:
    _check_out(out, shape, dtype, A.device)
    out.copy_(_dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype))


def _fake_gemm(A: Tensor, shapeB: Sequence[int], blocksize: int) -> Tensor:
    torch._check(blocksize in _BLOCKSIZES, lambda: f"invalid blocksize {blocksize}")
    torch._check(len(shapeB) == 2, lambda: f"shapeB must be [out, in], got {list(shapeB)}")
    torch._check(A.shape[-1] == shapeB[1], lambda: f"A must have {shapeB[1]} columns, got {A.shape[-1]}")
    _check_float("A", A.dtype)
    return A.new_empty((*A.shape[:-1], shapeB[0]))


def _fake_gemv_4bit(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int
) -> Tensor:
    return _fake_gemm(A, shapeB, blocksize)


def _quant_type(code: Tensor) -> str:
    """Which codebook the 16 values are: the operation is given no name."""
    from .functional import get_4bit_type

    for quant_type in ("nf4", "fp4"):
        if code.shape == (16,) and torch.allclose(code.cpu().float(), get_4bit_type(quant_type, "cpu"), atol=1e-6):
            return quant_type
    raise ValueError("code must be the 16 values of nf4 or of fp4")


@_define(
    "gemv_4bit",
    "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize) -> Tensor",
    _fake_gemv_4bit,
)
def _gemv_4bit(A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    _fake_gemm(A, shapeB, blocksize)
    return _product(A, B, shapeB, absmax, None, None, None, blocksize, _quant_type(code))


def _fake_gemv_4bit_out(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int, out: Tensor
) -> None:
    _check_out(out, (*A.shape[:-1], shapeB[0]), A.dtype, A.device)


@_define(
    "gemv_4bit.out",
    "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize, Tensor! out) -> ()",
    _fake_gemv_4bit_out,
)
def _gemv_4bit_out(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int, out: Tensor
) -> None:
    _check_out(out, (*A.shape[:-1], shapeB[0]), A.dtype, A.device)
    out.copy_(_gemv_4bit(A, B, shapeB, absmax, code, blocksize))


def _fake_gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    _check(blocksize, quant_type, absmax)
    if absmax_8bit is not None:
        torch._check(absmax_code is not None, lambda: "absmax_code required when absmax_8bit is provided")
        torch._check(absmax_offset is not None, lambda: "absmax_offset required when absmax_8bit is provided")
    if bias is not None:
        torch._check(bias.dtype is A.dtype, lambda: f"bias must be {A.dtype}, as A, got {bias.dtype}")
    return _fake_gemm(A, shapeB, blocksize)


@_define(
    "gemm_4bit",
    "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, Tensor? bias=None, "
    "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor",
    _fake_gemm_4bit,
)
def _gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    _fake_gemm_4bit(A, B, shapeB, absmax, blocksize, quant_type, bias, absmax_8bit, absmax_code, absmax_offset)
    if absmax_8bit is None:
        return _product(A, B, shapeB, absmax, None, None, bias, blocksize, quant_type)
    # Nested: `absmax` has the scales of the scales.
    return _product(A, B, shapeB, absmax_8bit, absmax, absmax_offset, bias, blocksize, quant_type)


def _product(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    blocksize: int,
    quant_type: str,
) -> Tensor:
    result: Tensor = _halfbyte.linear_4bit(A, B, absmax, absmax2, offset, bias, shapeB, blocksize, quant_type)
    return result


# ---- 8 bits ----------------------------------------------------------------------------------------------------------


def _fake_quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> Any:
    torch._check(blocksize > 0, lambda: f"blocksize must be positive, got {blocksize}")
    _check_float("A", A.dtype)
    return torch.empty_like(A, dtype=torch.uint8), A.new_empty(-(-A.numel() // blocksize), dtype=torch.float32)


@_define("quantize_blockwise", "(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)", _fake_quantize_blockwise)
def _quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    from .functional import quantize_blockwise

    _fake_quantize_blockwise(A, code, blocksize)
    codes, state = quantize_blockwise(A, code=code, blocksize=blocksize)
    return codes, state.absmax


def _fake_dequantize_blockwise(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    torch._check(blocksize > 0, lambda: f"blocksize must be positive, got {blocksize}")
    torch._check(A.dtype is torch.uint8, lambda: f"A must be uint8, got {A.dtype}")
    _check_float("dtype", dtype)
    return torch.empty_like(A, dtype=dtype)


@_define(
    "dequantize_blockwise",
    "(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor",
    _fake_dequantize_blockwise,
)
def _dequantize_blockwise(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    _fake_dequantize_blockwise(A, absmax, code, blocksize, dtype)
    result: Tensor = _halfbyte.dequantize_blockwise(A, absmax, code, blocksize, dtype)
    return result


def _fake_dequantize_blockwise_out(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, out: Tensor
) -> None:
    _check_out(out, A.shape, dtype, A.device)


@_define(
    "dequantize_blockwise.out",
    "(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype, Tensor! out) -> ()",
    _fake_dequantize_blockwise_out,
)
def _dequantize_blockwise_out(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, out: Tensor
) -> None:
    _check_out(out, A.shape, dtype, A.device)
    out.copy_(_dequantize_blockwise(A, absmax, code, blocksize, dtype))


# ---- rows of LLM.int8() ----------------------------------------------------------------------------------------------


def _fake_int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> Any:
    codes = torch.empty_like(A, dtype=torch.int8)
    scales = A.new_empty(A.numel() // A.shape[-1], dtype=torch.float32)
    if threshold == 0.0:
        return codes, scales, None
    return codes, scales, A.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


@_define(
    "int8_vectorwise_quant",
    "(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor?)",
    _fake_int8_vectorwise_quant,
)
def _int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    from .functional import int8_vectorwise_quant

    return int8_vectorwise_quant(A, threshold)


def _fake_int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    torch._check(A.dtype is torch.int8, lambda: f"A must be int8, got {A.dtype}")
    return torch.empty_like(A, dtype=torch.float32)


@_define("int8_vectorwise_dequant", "(Tensor A, Tensor stats) -> Tensor", _fake_int8_vectorwise_dequant)
def _int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    from .functional import int8_vectorwise_dequant

    return int8_vectorwise_dequant(A, stats)


__getattr__ = missing_attribute(__name__)
