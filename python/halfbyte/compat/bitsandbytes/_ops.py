"""`torch.ops.bitsandbytes`: schemas of bitsandbytes, computed by halfbyte's operations.

Defined when the layer is loaded, which it is only where bitsandbytes itself is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake, register_kernel

from halfbyte.functional import get_4bit_type, quantize_4bit, quantize_blockwise

from . import _ops_int8, _ops_optim  # noqa: F401  they define the rest
from ._define import check_4bit, check_blocksize, check_float, check_out, define
from ._missing import missing_attribute

__all__ = ["register_fake", "register_kernel"]

_halfbyte = torch.ops.halfbyte


# ---- 4 bits ----------------------------------------------------------------------------------------------------------


def _fake_quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> Any:
    check_4bit(blocksize, quant_type)
    check_float("A", A.dtype)
    n = A.numel()
    size = 2 * quant_storage.itemsize
    return A.new_empty((-(-n // size), 1), dtype=quant_storage), A.new_empty(-(-n // blocksize), dtype=torch.float32)


@define(
    "quantize_4bit",
    "(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)",
    _fake_quantize_4bit,
)
def _quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    check_4bit(blocksize, quant_type)
    check_float("A", A.dtype)
    packed, state = quantize_4bit(A, blocksize=blocksize, quant_type=quant_type, quant_storage=quant_storage)
    return packed, state.absmax


def _fake_dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    check_4bit(blocksize, quant_type, absmax)
    check_float("dtype", dtype)
    return A.new_empty(shape, dtype=dtype)


@define(
    "dequantize_4bit",
    "(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype) -> Tensor",
    _fake_dequantize_4bit,
)
def _dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    check_4bit(blocksize, quant_type, absmax)
    check_float("dtype", dtype)
    result: Tensor = _halfbyte.dequantize_4bit(A, absmax, None, None, shape, dtype, blocksize, quant_type)
    return result


def _fake_dequantize_4bit_out(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype, out: Tensor
) -> None:
    check_4bit(blocksize, quant_type, absmax)
    check_float("dtype", dtype)
    check_out(out, shape, dtype, A.device)


@define(
    "dequantize_4bit.out",
    "(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype, Tensor! out) -> ()",
    _fake_dequantize_4bit_out,
)
def _dequantize_4bit_out(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype, out: Tensor
) -> None:
    check_out(out, shape, dtype, A.device)
    out.copy_(_dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype))


def _fake_gemm(A: Tensor, shapeB: Sequence[int], blocksize: int) -> Tensor:
    check_blocksize(blocksize)
    torch._check(len(shapeB) == 2, lambda: f"shapeB must be [out, in], got {list(shapeB)}")
    torch._check(A.shape[-1] == shapeB[1], lambda: f"A must have {shapeB[1]} columns, got {A.shape[-1]}")
    check_float("A", A.dtype)
    return A.new_empty((*A.shape[:-1], shapeB[0]))


def _fake_gemv_4bit(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int
) -> Tensor:
    return _fake_gemm(A, shapeB, blocksize)


def _quant_type(code: Tensor) -> str:
    """Which codebook the 16 values are: the operation is given no name."""
    for quant_type in ("nf4", "fp4"):
        if code.shape == (16,) and torch.allclose(code.cpu().float(), get_4bit_type(quant_type, "cpu"), atol=1e-6):
            return quant_type
    raise ValueError("code must be the 16 values of nf4 or of fp4")


@define(
    "gemv_4bit",
    "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize) -> Tensor",
    _fake_gemv_4bit,
)
def _gemv_4bit(A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    _fake_gemm(A, shapeB, blocksize)
    quant_type = _quant_type(code)
    if A.device.type == "cpu":
        # As bitsandbytes computes it there, to the bit: the sums of the fused product are added in another order.
        return torch.nn.functional.linear(A, _dequantize_4bit(B, absmax, blocksize, quant_type, shapeB, A.dtype))
    return _product(A, B, shapeB, absmax, None, None, None, blocksize, quant_type)


def _fake_gemv_4bit_out(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int, out: Tensor
) -> None:
    check_out(out, (*A.shape[:-1], shapeB[0]), A.dtype, A.device)


@define(
    "gemv_4bit.out",
    "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize, Tensor! out) -> ()",
    _fake_gemv_4bit_out,
)
def _gemv_4bit_out(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int, out: Tensor
) -> None:
    check_out(out, (*A.shape[:-1], shapeB[0]), A.dtype, A.device)
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
    check_4bit(blocksize, quant_type, absmax)
    if absmax_8bit is not None:
        torch._check(absmax_code is not None, lambda: "absmax_code required when absmax_8bit is provided")
        torch._check(absmax_offset is not None, lambda: "absmax_offset required when absmax_8bit is provided")
    if bias is not None:
        torch._check(bias.dtype is A.dtype, lambda: f"bias must be {A.dtype}, as A, got {bias.dtype}")
    return _fake_gemm(A, shapeB, blocksize)


@define(
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
    check_float("A", A.dtype)
    return torch.empty_like(A, dtype=torch.uint8), A.new_empty(-(-A.numel() // blocksize), dtype=torch.float32)


@define("quantize_blockwise", "(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)", _fake_quantize_blockwise)
def _quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    _fake_quantize_blockwise(A, code, blocksize)
    codes, state = quantize_blockwise(A, code=code, blocksize=blocksize)
    return codes, state.absmax


def _fake_dequantize_blockwise(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    torch._check(blocksize > 0, lambda: f"blocksize must be positive, got {blocksize}")
    torch._check(A.dtype is torch.uint8, lambda: f"A must be uint8, got {A.dtype}")
    check_float("dtype", dtype)
    return torch.empty_like(A, dtype=dtype)


@define(
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
    check_out(out, A.shape, dtype, A.device)


@define(
    "dequantize_blockwise.out",
    "(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype, Tensor! out) -> ()",
    _fake_dequantize_blockwise_out,
)
def _dequantize_blockwise_out(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, out: Tensor
) -> None:
    check_out(out, A.shape, dtype, A.device)
    out.copy_(_dequantize_blockwise(A, absmax, code, blocksize, dtype))


__getattr__ = missing_attribute(__name__)
