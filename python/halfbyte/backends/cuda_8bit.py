"""The 8-bit kernels for CUDA tensors: blockwise codes and LLM.int8(). As in `halfbyte.backends.cuda`, nothing waits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from halfbyte import _native
from halfbyte.backends.cuda_memory import ALIGNMENT, NAMES, here, raw, raw_or_none
from halfbyte.ops._torch_internals import current_stream
from halfbyte.ops.checks import (
    blocks_of,
    check_dequantize_blockwise,
    check_dequantize_rows,
    check_quantize_blockwise,
    check_quantize_rows,
)
from halfbyte.ops.checks_8bit import (
    check_int8_matmul,
    check_int8_scaled_mm,
    check_linear_8bit,
    check_linear_8bit_backward,
    check_quantize_rows_outliers,
)

# ---- blockwise -------------------------------------------------------------------------------------------------------


def quantize_blockwise(input: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """8-bit codes like `input`, and scales float32 [blocks].

    That `code` ascends is not looked at: to raise for it, the call would have to wait for the GPU.
    """
    check_quantize_blockwise(input, code, blocksize)
    input, code = input.contiguous(), code.contiguous()
    codes = input.new_empty(input.shape, dtype=torch.uint8)
    absmax = input.new_empty(blocks_of(input.numel(), blocksize), dtype=torch.float32)
    _native.cuda_quantize_8bit(*here(input), raw(input), raw(code), raw(codes), raw(absmax), blocksize)
    return codes, absmax


def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """The way back of `quantize_blockwise`: `codes.shape`, `dtype`; into `out` where given (checked by the caller)."""
    check_dequantize_blockwise(codes, absmax, code, blocksize, dtype)
    codes, absmax, code = codes.contiguous(), absmax.contiguous(), code.contiguous()
    result = out if out is not None and out.is_contiguous() else codes.new_empty(codes.shape, dtype=dtype)
    _native.cuda_dequantize_8bit(*here(codes), raw(codes), raw(absmax), raw(code), raw(result), blocksize)
    return result if out is None or out is result else out.copy_(result)


def quantize_rows(input: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit codes int8 like `input`, and the largest magnitude of each row, float32 [rows]."""
    check_quantize_rows(input)
    input = input.contiguous()
    rows, columns = prod(input.shape[:-1]), input.shape[-1]
    codes = input.new_empty(input.shape, dtype=torch.int8)
    scales = input.new_empty(rows, dtype=torch.float32)
    _native.cuda_quantize_rows(*here(input), raw(input), raw(codes), raw(scales), rows, columns)
    return codes, scales


def dequantize_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The way back of `quantize_rows`: `codes.shape`, `dtype`."""
    check_dequantize_rows(codes, scales, dtype)
    codes, scales = codes.contiguous(), scales.contiguous()
    out = codes.new_empty(codes.shape, dtype=dtype)
    _native.cuda_dequantize_rows(*here(codes), raw(codes), raw(scales), raw(out), scales.numel(), codes.shape[-1])
    return out


# ---- LLM.int8() ------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _kernel_8bit(device: int, n: int, k: int) -> tuple[Callable[..., str], Callable[[int], int]]:
    """The launcher of products with 8-bit weights of this shape, and the bytes of its workspace."""
    kernel = _native.CudaLinear8(device, n, k)
    return kernel.launch, kernel.workspace


def _aligned(codes: Tensor) -> Tensor:
    """Contiguous codes where the fast kernels take them."""
    codes = codes.contiguous()
    return codes.clone() if codes.data_ptr() % ALIGNMENT else codes


def quantize_rows_outliers(input: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_rows` that leaves outliers out: codes, scales, and which columns have an outlier, bool [columns].

    A value of a magnitude of at least `threshold` does not count for the scale of its row, and its column has codes 0.
    """
    check_quantize_rows_outliers(input, threshold)
    input = input.contiguous()
    rows, columns = prod(input.shape[:-1]), input.shape[-1]
    codes = input.new_empty(input.shape, dtype=torch.int8)
    scales = input.new_empty(rows, dtype=torch.float32)
    outliers = input.new_zeros(columns, dtype=torch.uint8)
    if rows > 0:
        device, stream = here(input)
        workspace = codes.new_empty(_native.cuda_int8_workspace(device, rows, columns), dtype=torch.uint8)
        _native.cuda_quantize_rows_outliers(
            device,
            stream,
            raw(input),
            raw(codes),
            raw(scales),
            raw(outliers),
            raw(workspace),
            rows,
            columns,
            threshold,
        )
    return codes, scales, outliers.view(torch.bool)


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.T` of codes int8 [..., k] and [n, k]: int32 [..., n], exact."""
    check_int8_matmul(a, b)
    out = a.new_empty((*a.shape[:-1], b.shape[0]), dtype=torch.int32)
    _multiply_codes(a, b, None, None, None, out)
    return out


def int8_scaled_mm(
    a: Tensor, b: Tensor, row_scales: Tensor, column_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`int8_matmul`, scaled to what the codes stand for, plus bias: `dtype`."""
    check_int8_scaled_mm(a, b, row_scales, column_scales, bias, dtype)
    out = a.new_empty((*a.shape[:-1], b.shape[0]), dtype=dtype)
    _multiply_codes(a, b, row_scales.contiguous(), column_scales.contiguous(), bias, out)
    return out


def _multiply_codes(
    a: Tensor, b: Tensor, row_scales: Tensor | None, column_scales: Tensor | None, bias: Tensor | None, out: Tensor
) -> None:
    m, (n, k) = prod(a.shape[:-1]), b.shape
    if m == 0 or n == 0:
        return
    a, b = _aligned(a), _aligned(b)
    bias = None if bias is None else bias.contiguous()
    _native.cuda_int8_matmul(
        *here(a), raw(a), raw(b), raw_or_none(row_scales), raw_or_none(column_scales), raw_or_none(bias),
        raw(out), m, n, k,
    )  # fmt: skip


def linear_8bit(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """`x @ W.T + bias` with the rows `W` [out_features, in_features] in codes and scales; in the dtype of `x`.

    The rows of `x`, rounded to float16's precision, are quantized too; columns with an outlier, where `threshold` is
    not 0, are multiplied as they are.
    """
    check_linear_8bit(x, codes, scales, bias, threshold)
    n, k = codes.shape
    if x.dim() == 2:
        m = x.shape[0]
        out = x.new_empty(m, n)
    else:
        out = x.new_empty((*x.shape[:-1], n))
        m = x.numel() // k if k else prod(x.shape[:-1])
    if m == 0 or n == 0:
        return out
    x, codes, scales = x.contiguous(), _aligned(codes), scales.contiguous()
    shift, kind = 0, "float32"
    if bias is not None:
        bias = bias.contiguous()
        shift, kind = bias.data_ptr(), NAMES[bias.dtype]
    device = x.get_device()
    launch, bytes_of = _kernel_8bit(device, n, k)
    workspace = x.new_empty(bytes_of(m), dtype=torch.uint8)
    launch(
        current_stream(device),
        m,
        NAMES[x.dtype],
        x.data_ptr(),
        codes.data_ptr(),
        scales.data_ptr(),
        shift,
        kind,
        threshold,
        workspace.data_ptr(),
        out.data_ptr(),
    )
    return out


def linear_8bit_backward(grad: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """`grad @ W` with the rows `W` [out_features, in_features] in codes and scales; in the dtype of `grad`."""
    check_linear_8bit_backward(grad, codes, scales)
    n, k = codes.shape
    out = grad.new_empty((*grad.shape[:-1], k))
    m = grad.numel() // n if n else prod(grad.shape[:-1])
    if m == 0 or k == 0 or n == 0:
        return out.zero_()
    # With `out`, the matrix product stays in this dtype whatever autocast wants.
    dense = dequantize_rows(codes, scales, grad.dtype)
    torch.mm(grad.contiguous().view(m, n), dense, out=out.view(m, k))
    return out
