"""Quantize and dequantize tensors blockwise, to 4 and 8 bits.

Names, arguments and bytes match `bitsandbytes.functional`: each library reads what the other wrote.

>>> import torch
>>> from halfbyte.functional import dequantize_4bit, quantize_4bit
>>> weight = torch.randn(48, 96, dtype=torch.bfloat16)
>>> packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
>>> packed.shape, packed.dtype
(torch.Size([2304, 1]), torch.uint8)
>>> again = dequantize_4bit(packed, state)
>>> again.shape, again.dtype
(torch.Size([48, 96]), torch.bfloat16)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbyte.codebooks import (
    create_dynamic_map,
    create_fp8_map,
    create_linear_map,
    create_normal_map,
    dynamic_map,
    get_4bit_type,
    quant_map,
)
from halfbyte.ops import dispatch
from halfbyte.ops.autograd import matmul_4bit
from halfbyte.ops.checks import (
    NESTED_BLOCKSIZE,
    check_blocksize_8bit,
    check_code,
    check_float,
    check_out,
    check_storage,
    check_tensor,
)
from halfbyte.ops.int8 import (
    int8_double_quant,
    int8_linear_matmul,
    int8_mixed_scaled_mm,
    int8_mm_dequant,
    int8_scaled_mm,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
)
from halfbyte.ops.packed import PackedWeight, packed_weight, plain_weight
from halfbyte.state import QuantState

__all__ = [
    "QuantState",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "gemv_4bit",
    "get_4bit_type",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mixed_scaled_mm",
    "int8_mm_dequant",
    "int8_scaled_mm",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "matmul_4bit",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
]


# ---- 4 bits ----------------------------------------------------------------------------------------------------------


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """Quantize a tensor blockwise to 4-bit codes, with one scale per block.

    Args:
        A: float16, bfloat16 or float32, any shape and strides, read in row-major order as `n` values.
        absmax: Where to write the scales: float32 `[ceil(n / blocksize)]`, or uint8 with `compress_statistics`.
        out: Where to write the codes: of the shape and dtype of the first result.
        blocksize: 32, 64 (the default), 128, 256, 512, 1024, 2048 or 4096 consecutive values; the last block may be
            short.
        compress_statistics: Quantize the scales too, to 8 bits in blocks of 256.
        quant_type: "nf4" or "fp4".
        quant_storage: The dtype as which the codes' bytes are viewed: uint8, int8, float16, bfloat16, float32 or
            float64.

    Returns:
        The codes, two to a byte, `[ceil(n / 2) bytes, 1]` (whole elements of `quant_storage`: the bytes past the last
        code are 0), and the state that `dequantize_4bit` needs. No gradient flows through either.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: `blocksize` or `quant_type` is not supported, or `out` or `absmax` has another shape or device.

    A block that contains NaN or Inf dequantizes to NaN. On the CPU this is logged; on a GPU that would synchronize.

    >>> packed, state = quantize_4bit(torch.randn(3, 5), quant_type="nf4", quant_storage=torch.float32)
    >>> packed.shape, state.absmax.shape
    (torch.Size([2, 1]), torch.Size([1]))
    """
    blocksize = 64 if blocksize is None else blocksize
    check_storage(quant_storage)
    check_tensor("A", A)
    A = A.detach() if A.requires_grad else A
    if compress_statistics:
        packed, scales, absmax2, offset = dispatch.call("quantize_4bit_nested", A, blocksize, quant_type)
    else:
        packed, scales = dispatch.call("quantize_4bit", A, blocksize, quant_type)
    # Without a device it is the CPU's, and no time goes into asking for kernels of another.
    code = quant_map(quant_type, None if A.is_cpu else A.device)
    state = QuantState(scales, A.shape, code, blocksize, quant_type, A.dtype)
    if compress_statistics:
        state.offset, state.nested = offset, True
        state.state2 = QuantState(absmax2, code=dynamic_map(A.device), blocksize=NESTED_BLOCKSIZE, dtype=torch.float32)
    if quant_storage is not torch.uint8:
        packed = _view_as(packed, quant_storage)
    if absmax is not None:
        state.absmax = _write("absmax", absmax, state.absmax)
    return packed if out is None else _write("out", out, packed), state


def quantize_nf4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """`quantize_4bit` with the quantiles of the normal distribution (NF4, arXiv 2305.14314)."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def quantize_fp4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """`quantize_4bit` with 4-bit floating-point values (FP4)."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def dequantize_4bit(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:
    """Read a tensor back that `quantize_4bit` packed.

    Args:
        A: The codes, viewed as any storage dtype; `[k, 1]`, or `[1, k]` for the transposed result.
        quant_state: Their state. Without it, `absmax` and `out` say what it would.
        absmax: float32 scales; ignored when `quant_state` is given.
        out: Where to write the result; without a `quant_state`, its shape and dtype are the result's.
        blocksize: As it was quantized with, default 64; ignored when `quant_state` is given.
        quant_type: As it was quantized with; ignored when `quant_state` is given.

    Returns:
        The tensor, of the shape and dtype that the state names.

    Raises:
        TypeError: A wrong type or dtype. The message names the argument and the legal ones.
        ValueError: Codes, scales and state that do not fit each other.
    """
    if quant_state is None:
        if absmax is None or out is None:
            missing = " and ".join(name for name, value in (("absmax", absmax), ("out", out)) if value is None)
            raise ValueError(f"{missing} must be given when quant_state is None, got None")
        quant_state = QuantState(absmax, out.shape, None, 64 if blocksize is None else blocksize, quant_type, out.dtype)
    elif not isinstance(quant_state, QuantState):
        raise TypeError(f"quant_state must be a QuantState from quantize_4bit, got {type(quant_state).__name__}")
    check_tensor("A", A)
    dtype = quant_state.dtype
    if dtype is None:
        raise ValueError("quant_state.dtype must be the dtype to dequantize to, got None")
    check_float("quant_state.dtype", dtype)
    weight = _packed_weight(A, quant_state)
    shape = weight.packing.shape
    if out is None:
        result: Tensor = dispatch.call("dequantize_4bit", weight, dtype)
    else:
        check_out(out, shape, dtype, A.device)
        direct = dispatch.kernels_of(A, None, weight, out)
        if direct is None:
            result = out.copy_(dispatch.call("dequantize_4bit", weight, dtype))
        else:
            result = direct.dequantize_4bit(plain_weight(weight), dtype, out)
            _tell_autograd(out)
    # Codes that come transposed are those of a weight that is wanted transposed.
    sizes = A.shape
    transposed = len(sizes) == 2 and sizes[0] == 1 and sizes[1] > 1 and len(shape) == 2
    return result.t() if transposed else result


def dequantize_nf4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """`dequantize_4bit` of NF4 codes."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def dequantize_fp4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """`dequantize_4bit` of FP4 codes."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> Tensor:
    """`matmul_4bit` under the name and with the arguments that it has for single rows; any number of rows will do.

    `transposed_A` and `transposed_B` are accepted for their callers' sake: what is transposed is seen from the shapes.
    """
    if state is None:
        raise ValueError("state must be a QuantState from quantize_4bit, got None")
    return matmul_4bit(A, B, state, out=out)


# ---- 8 bits ----------------------------------------------------------------------------------------------------------


def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[Tensor, QuantState]:
    """Quantize a tensor blockwise to 8-bit codes, with one scale per block.

    Args:
        A: float16, bfloat16 or float32, of any shape and strides.
        code: The values, float32, up to 256; default the signed dynamic map. 256 that ascend are the fast case.
        absmax: Where to write the scales: float32 `[ceil(n / blocksize)]`, or uint8 when `nested`.
        out: Where to write the codes: uint8, shaped as `A`.
        blocksize: Consecutive values per scale, default 4096.
        nested: Quantize the scales too.

    Returns:
        The codes, uint8, shaped as `A`, and the state that `dequantize_blockwise` needs.

    Raises:
        TypeError: A wrong type or dtype. The message names the argument and the legal ones.
        ValueError: A wrong `blocksize` or `code`, an `out` or `absmax` of another shape or device. A `code` of 256 on a
            GPU is not looked at, which would mean to wait: if it does not ascend, codes mean nothing.
    """
    check_tensor("A", A)
    check_float("A", A.dtype)
    check_blocksize_8bit(blocksize)
    A = A.detach() if A.requires_grad else A
    order = None
    if code is None:
        code = dynamic_map(A.device)
    else:
        check_tensor("code", code)
        unsorted = (
            code.device.type == "cpu" and bool(dispatch.kernels(code)) and not bool((code[1:] >= code[:-1]).all())
        )
        code = code.to(device=A.device, dtype=torch.float32, copy=True)
        if unsorted or 0 < code.numel() < 256:
            order = code.flatten().argsort(stable=True)
            ascending = code.flatten()[order]
    if order is None:
        check_code(code, A.device)
        codes, scales = dispatch.call("quantize_blockwise", A, code, blocksize)
    else:
        # Padded with its largest value; what is found there, or in order, is then named as in `code`.
        missing = 256 - ascending.numel()
        full = torch.cat([ascending, ascending[-1:].expand(missing)]) if missing > 0 else ascending
        check_code(full, A.device)
        codes, scales = dispatch.call("quantize_blockwise", A, full, blocksize)
        named = torch.cat([order, order[-1:].expand(missing)]) if missing > 0 else order
        codes = named.to(torch.uint8)[codes.int()]
    state = QuantState(scales, code=code, blocksize=blocksize, dtype=A.dtype)
    if nested:
        # In float64, where the order of summation cannot show.
        state.offset = scales.to(torch.float64).mean().to(torch.float32)
        state.absmax, state.state2 = quantize_blockwise(scales - state.offset, blocksize=blocksize)
        state.nested = True
    if absmax is not None:
        state.absmax = _write("absmax", absmax, state.absmax)
    return codes if out is None else _write("out", out, codes), state


def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> Tensor:
    """Read a tensor back that `quantize_blockwise` quantized.

    Args:
        A: The codes, uint8, of any shape and strides.
        quant_state: Their state. Without it, `absmax`, `code` and `blocksize` say what it would.
        absmax: float32 scales; ignored when `quant_state` is given.
        code: The values, up to 256, default the signed dynamic map; ignored when `quant_state` is given.
        out: Where to write the result.
        blocksize: As it was quantized with; ignored when `quant_state` is given.
        nested: Accepted for its callers' sake: the state knows.

    Returns:
        The tensor, shaped as `A`, in the state's dtype; float32 without a state.
    """
    if quant_state is None:
        if absmax is None:
            raise ValueError("absmax must be given when quant_state is None, got None")
        quant_state = QuantState(absmax, code=code, blocksize=blocksize, dtype=torch.float32)
    check_tensor("A", A)
    dtype = quant_state.dtype or torch.float32
    values = dynamic_map(A.device) if quant_state.code is None else quant_state.code.to(A.device, torch.float32)
    if 0 < values.numel() < 256:
        values = torch.cat([values.flatten(), values.new_zeros(256 - values.numel())])
    scales = quant_state.absmax
    if quant_state.nested and quant_state.offset is not None:
        scales = dequantize_blockwise(scales, quant_state.state2) + quant_state.offset
    arguments = A, scales, values, quant_state.blocksize, dtype
    if out is None:
        result: Tensor = dispatch.call("dequantize_blockwise", *arguments)
        return result
    check_out(out, A.shape, dtype, A.device)
    direct = dispatch.kernels(A, None, scales, values, out)
    if direct is None:
        return out.copy_(dispatch.call("dequantize_blockwise", *arguments))
    result = direct.dequantize_blockwise(*arguments, out)
    _tell_autograd(out)
    return result


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _packed_weight(codes: Tensor, state: QuantState) -> PackedWeight:
    """`state.packed(codes)`; scales are expanded first where they are nested in another way than the format's."""
    second, offset = state.state2, state.offset
    if state.nested and second is not None and offset is not None and second.blocksize != NESTED_BLOCKSIZE:
        return packed_weight(codes, dequantize_blockwise(state.absmax, second) + offset, None, None, *state.weight())
    return state.packed(codes)


def _tell_autograd(out: Tensor | None) -> None:
    """That native code wrote to a tensor: what was saved of it for a backward pass is no longer there."""
    if out is not None and not out.is_inference():
        torch.autograd.graph.increment_version(out)


def _view_as(packed: Tensor, quant_storage: torch.dtype) -> Tensor:
    """Bytes `[k, 1]` viewed as `quant_storage`, padded with zeros to whole elements."""
    padding = -packed.shape[0] % quant_storage.itemsize
    if padding:
        packed = torch.nn.functional.pad(packed, (0, 0, 0, padding))
    return packed.view(-1).view(quant_storage).view(-1, 1)


def _write(argument: str, out: Any, result: Tensor) -> Tensor:
    """Copy a result to where the caller wants it. Floating storage is copied as the bytes that it is."""
    check_tensor(argument, out)
    if out.dtype != result.dtype or out.shape != result.shape or out.device != result.device:
        kind = TypeError if out.dtype != result.dtype else ValueError
        raise kind(
            f"{argument}: is {out.dtype} {list(out.shape)} on {out.device}, "
            f"expected {result.dtype} {list(result.shape)} on {result.device}"
        )
    written: Tensor = out.copy_(result)
    return written
