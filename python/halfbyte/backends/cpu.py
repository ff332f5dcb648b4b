"""The kernels for CPU tensors: check, allocate, hand addresses to the compiled core.

Nothing else in the package turns a tensor into an address. A tensor that native code reads is made contiguous and
aligned first (offsets into a storage are part of its address), one that it writes is allocated here or checked by the
caller.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from halfbyte import _native
from halfbyte.ops._torch_internals import disable_modes
from halfbyte.ops.checks import (
    BLOCK_SIZES,
    NESTED_BLOCKSIZE,
    blocks_of,
    check_compress,
    check_dequantize_blockwise,
    check_dequantize_rows,
    check_embedding,
    check_expand,
    check_float,
    check_product,
    check_quantize,
    check_quantize_blockwise,
    check_quantize_rows,
    check_weight,
    packed_bytes,
)
from halfbyte.ops.checks_8bit import (
    check_int8_matmul,
    check_int8_scaled_mm,
    check_linear_8bit,
    check_linear_8bit_backward,
    check_quantize_rows_outliers,
)
from halfbyte.ops.packed import PackedWeight, packed_weight, plain_weight

_logger = logging.getLogger(__name__)

Raw = tuple[int, int, str]

_NAMES = {
    torch.uint8: "uint8",
    torch.int8: "int8",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
}


# To make others from: for a new tensor, to name its dtype costs as much as all the rest. Ordinary CPU tensors, in
# whatever modes torch is at the moment.
with torch.inference_mode(False), disable_modes():
    _EMPTY = {dtype: torch.empty(0, dtype=dtype, device="cpu") for dtype in _NAMES}


def _raw(tensor: Tensor) -> Raw:
    """Address, count and dtype of a contiguous tensor. The caller keeps the tensor alive during the native call."""
    return tensor.data_ptr(), tensor.numel(), _NAMES[tensor.dtype]


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied if its address does not suit its dtype, as in a mapped file with a header of odd length."""
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def readable(tensor: Tensor) -> Tensor:
    """The tensor as native code reads it: contiguous and aligned."""
    return aligned(tensor.contiguous())


_native.read_tensors_of(Tensor)

_get_num_threads = torch.get_num_threads


def _follow_threads() -> int:
    """Give the core as many threads as torch uses, and return their number."""
    threads = _get_num_threads()
    _native.follow_threads(threads)
    return threads


def quantize_4bit(input: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    """Codes uint8 [ceil(n / 2), 1] and scales float32 [blocks] of `input`."""
    check_quantize(input, blocksize, quant_type)
    input = readable(input)
    n = input.numel()
    size, blocks = packed_bytes(n), blocks_of(n, blocksize)
    packed = _EMPTY[torch.uint8].new_empty(size, 1)
    absmax = _EMPTY[torch.float32].new_empty(blocks)
    _follow_threads()
    codes, scales = (packed.data_ptr(), size, "uint8"), (absmax.data_ptr(), blocks, "float32")
    if not _native.quantize_4bit(_raw(input), codes, scales, quant_type, blocksize):
        _logger.warning(
            "input of shape %s contains NaN or Inf; NaN gets code 0, blocks with Inf dequantize to NaN or Inf",
            list(input.shape),
        )
    return packed, absmax


def quantize_4bit_nested(input: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes of `input`, and what `compress_absmax` makes of its scales."""
    packed, absmax = quantize_4bit(input, blocksize, quant_type)
    return packed, *compress_absmax(absmax)


def compress_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 scales to 8 bits: codes uint8 [n], their scales float32 [ceil(n / 256)], and the offset float32 []."""
    check_compress(absmax)
    absmax = readable(absmax)
    n = absmax.numel()
    codes = absmax.new_empty(n, dtype=torch.uint8)
    absmax2 = absmax.new_empty(blocks_of(n, NESTED_BLOCKSIZE))
    offset = _native.compress_absmax(_raw(absmax), _raw(codes), _raw(absmax2))
    return codes, absmax2, absmax.new_tensor(offset)


def expand_absmax(codes: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
    """The way back of `compress_absmax`: float32 [n]."""
    check_expand(codes, absmax2, offset)
    codes, absmax2 = readable(codes), readable(absmax2)
    absmax = absmax2.new_empty(codes.numel())
    _native.expand_absmax(_raw(codes), _raw(absmax2), offset.item(), _raw(absmax))
    return absmax


def _plain_absmax(absmax: Tensor, absmax2: Tensor | None, offset: Tensor | None) -> Tensor:
    """Float32 scales, as native code reads them."""
    if absmax2 is None or offset is None:
        return readable(absmax)
    return expand_absmax(absmax, absmax2, offset)


def dequantize_4bit(weight: PackedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The values of a packed tensor in `dtype`; into `out` where given (checked by the caller)."""
    check_weight(weight)
    check_float("dtype", dtype)
    packed, (absmax, absmax2, offset, shape, blocksize, quant_type, _) = weight
    if out is not None and out.is_contiguous() and out.data_ptr() % out.element_size() == 0:
        result = out
    elif len(shape) == 2:
        # Numbers are parsed faster than a tuple of them.
        result = _EMPTY[dtype].new_empty(shape[0], shape[1])
    else:
        result = _EMPTY[dtype].new_empty(shape)
    packed = readable(packed)
    absmax = _plain_absmax(absmax, absmax2, offset)
    _follow_threads()
    n = result.numel()
    # Whatever dtype the codes are viewed as; padding is left out.
    codes, scales = (packed.data_ptr(), packed_bytes(n), "uint8"), (absmax.data_ptr(), absmax.numel(), "float32")
    _native.dequantize_4bit(codes, scales, (result.data_ptr(), n, _NAMES[dtype]), quant_type, blocksize)
    return result if out is None or out is result else out.copy_(result)


def _kernel(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> _native.CpuLinear:
    """Products with weights of this kind: forward and backward."""
    _, (_, absmax2, _, (n, k), blocksize, quant_type, _) = weight
    bias_name = None if bias is None else _NAMES[bias.dtype]
    return _kernel_of_kind(_NAMES[x.dtype], n, k, quant_type, blocksize, absmax2 is not None, bias_name)


_kernel_of_kind = functools.lru_cache(maxsize=4096)(_native.CpuLinear)


def linear_4bit(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """`x @ W.T + bias` with the packed `W` [out_features, in_features]; computed in the dtype of `x`."""
    weight = plain_weight(weight)
    check_weight(weight)
    check_product(x, "x", bias, weight, 1)
    kernel = _kernel(x, weight, bias)
    memo = weight.packing.memo
    if memo is not None:
        # It takes the next product, unless a tensor of that has to be made readable, or is wrong.
        memo.linear = kernel
    x, codes = readable(x), readable(weight.codes)
    absmax, absmax2, offset = _scales(weight)
    bias = None if bias is None else readable(bias)
    out = _for_rows(x, weight.packing.shape[0])
    kernel.forward(
        prod(x.shape[:-1]),
        x.data_ptr(),
        codes.data_ptr(),
        absmax.data_ptr(),
        _address(absmax2),
        _address(offset),
        _address(bias),
        out.data_ptr(),
        _follow_threads(),
    )
    return out


def linear_4bit_backward(grad: Tensor, weight: PackedWeight) -> Tensor:
    """`grad @ W` with the packed `W` [out_features, in_features]; computed in the dtype of `grad`."""
    check_weight(weight)
    check_product(grad, "grad", None, weight, 0)
    grad, codes = readable(grad), readable(weight.codes)
    absmax, absmax2, offset = _scales(weight)
    out = _for_rows(grad, weight.packing.shape[1])
    _kernel(grad, weight, None).backward(
        prod(grad.shape[:-1]),
        grad.data_ptr(),
        codes.data_ptr(),
        absmax.data_ptr(),
        _address(absmax2),
        _address(offset),
        out.data_ptr(),
        _follow_threads(),
    )
    return out


def _for_rows(x: Tensor, columns: int) -> Tensor:
    """Memory for a result with a row for each of `x`."""
    sizes = x.shape
    # Numbers are parsed faster than a tuple of them.
    return x.new_empty(sizes[0], columns) if len(sizes) == 2 else x.new_empty((*sizes[:-1], columns))


def _scales(weight: PackedWeight) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The scales, as native code reads them."""
    absmax, absmax2, offset, *_ = weight.packing
    if absmax2 is None or offset is None:
        return readable(absmax), None, None
    return readable(absmax), readable(absmax2), readable(offset)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def embedding_4bit(indices: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Rows of the packed matrix [rows, dim]: `[*indices.shape, dim]`.

    Only the blocks that the rows asked for touch are dequantized.
    """
    check_weight(weight)
    check_embedding(indices, weight, dtype)
    packed, (absmax, absmax2, offset, (rows, dim), blocksize, quant_type, _) = weight
    flat = indices.reshape(-1).to(torch.int64)
    if flat.numel() == 0:
        return torch.empty((*indices.shape, dim), dtype=dtype)
    low, high = (int(i) for i in torch.aminmax(flat))
    if low < 0 or high >= rows:
        raise IndexError(f"indices must be from 0 to {rows - 1}, got {low if low < 0 else high}")
    if dim == 0:
        return torch.empty((*indices.shape, dim), dtype=dtype)
    data = packed.contiguous().view(torch.uint8).reshape(-1)
    absmax = _plain_absmax(absmax, absmax2, offset)
    if dim % blocksize == 0:
        data = data[: packed_bytes(rows * dim)].view(rows, dim // 2).index_select(0, flat)
        scales = absmax.view(rows, dim // blocksize).index_select(0, flat)
        wide = (flat.numel(), dim)
        values = dequantize_4bit(packed_weight(data, scales, None, None, wide, blocksize, quant_type), dtype)
    else:
        # Blocks run on across rows. For each row: as many whole blocks as it can touch, then the values that are its
        # own. What lies beyond the last block is read from the last one, and is nobody's own.
        width = (dim + blocksize - 2) // blocksize + 1
        first = flat * dim // blocksize
        byte = (first * (blocksize // 2))[:, None] + torch.arange(width * blocksize // 2)
        block = first[:, None] + torch.arange(width)
        data, scales = data[byte.clamp_(max=data.numel() - 1)], absmax[block.clamp_(max=absmax.numel() - 1)]
        wide = (flat.numel(), width * blocksize)
        values = dequantize_4bit(packed_weight(data, scales, None, None, wide, blocksize, quant_type), dtype)
        values = values.gather(1, (flat * dim - first * blocksize)[:, None] + torch.arange(dim))
    return values.view(*indices.shape, dim)


def _boundaries(code: Tensor) -> Tensor:
    """Above which values each next code begins: the midpoints, moved so that ties go to the even code."""
    lower, upper = code[:-1], code[1:]
    if not bool((lower <= upper).all()) or not bool(code.isfinite().all()):
        raise ValueError("code must be 256 finite values in ascending order, got others")
    middle = (lower + upper) * 0.5
    odd = torch.arange(255) % 2 == 1
    return torch.where(odd & (middle > lower), torch.nextafter(middle, torch.tensor(-torch.inf)), middle)


def quantize_blockwise(input: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """8-bit codes like `input`, and scales float32 [blocks]."""
    check_quantize_blockwise(input, code, blocksize)
    values = readable(input.to(torch.float32))
    n = values.numel()
    codes = torch.empty(input.shape, dtype=torch.uint8)
    absmax = torch.empty(blocks_of(n, blocksize), dtype=torch.float32)
    code = readable(code)
    _follow_threads()
    if blocksize in BLOCK_SIZES:
        _native.quantize_8bit(_raw(values), _raw(code), _raw(codes), _raw(absmax), blocksize)
        return codes, absmax
    # The core knows the block sizes of the format; the others are for callers of this function alone. Blocks are filled
    # up: so none is larger than all values.
    blocksize = min(blocksize, max(n, 1))
    padded = torch.nn.functional.pad(values.reshape(-1), (0, -n % blocksize)).view(-1, blocksize)
    torch.amax(padded.abs(), 1, out=absmax)
    scaled = (padded * (1.0 / absmax)[:, None]).view(-1)[:n]
    codes.view(-1).copy_(torch.bucketize(scaled, _boundaries(code)).masked_fill_(scaled.isnan(), 0))
    return codes, absmax


def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """The way back of `quantize_blockwise`: `codes.shape`, `dtype`; into `out` where given (checked by the caller)."""
    check_dequantize_blockwise(codes, absmax, code, blocksize, dtype)
    values = torch.empty(codes.shape, dtype=torch.float32)
    _follow_threads()
    if blocksize in BLOCK_SIZES:
        codes, absmax, code = readable(codes), readable(absmax), readable(code)
        _native.dequantize_8bit(_raw(codes), _raw(absmax), _raw(code), _raw(values), blocksize)
    else:
        scales = (
            absmax.reshape(-1)
            .repeat_interleave(min(blocksize, max(codes.numel(), 1)))[: codes.numel()]
            .view(codes.shape)
        )
        torch.mul(code[codes.long()], scales, out=values)
    return values.to(dtype) if out is None else out.copy_(values)


def quantize_rows(input: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit codes int8 like `input`, and the largest magnitude of each row, float32 [rows]."""
    check_quantize_rows(input)
    input = readable(input)
    rows, columns = prod(input.shape[:-1]), input.shape[-1]
    codes = input.new_empty(input.shape, dtype=torch.int8)
    scales = input.new_empty(rows, dtype=torch.float32)
    _follow_threads()
    _native.quantize_rows(_raw(input), _raw(codes), _raw(scales), rows, columns)
    return codes, scales


def dequantize_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The way back of `quantize_rows`: `codes.shape`, `dtype`."""
    check_dequantize_rows(codes, scales, dtype)
    codes, scales = readable(codes), readable(scales)
    out = codes.new_empty(codes.shape, dtype=dtype)
    _follow_threads()
    _native.dequantize_rows(_raw(codes), _raw(scales), _raw(out), scales.numel(), codes.shape[-1])
    return out


# ---- LLM.int8() ------------------------------------------------------------------------------------------------------


def quantize_rows_outliers(input: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_rows` that leaves outliers out: codes, scales, and which columns have an outlier, bool [columns].

    A value of a magnitude of at least `threshold` does not count for the scale of its row, and its column has codes 0.
    """
    check_quantize_rows_outliers(input, threshold)
    input = readable(input)
    rows, columns = prod(input.shape[:-1]), input.shape[-1]
    codes = input.new_empty(input.shape, dtype=torch.int8)
    scales = input.new_empty(rows, dtype=torch.float32)
    outliers = input.new_empty(columns, dtype=torch.bool)
    _follow_threads()
    marks = outliers.data_ptr(), columns, "uint8"
    _native.quantize_rows_outliers(_raw(input), _raw(codes), _raw(scales), marks, rows, columns, threshold)
    return codes, scales, outliers


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.T` of codes int8 [..., k] and [n, k]: int32 [..., n], exact."""
    check_int8_matmul(a, b)
    a, b = readable(a), readable(b)
    rows, (n, k) = prod(a.shape[:-1]), b.shape
    out = a.new_empty((*a.shape[:-1], n), dtype=torch.int32)
    _native.int8_matmul(rows, n, k, a.data_ptr(), b.data_ptr(), out.data_ptr(), _follow_threads())
    return out


def int8_scaled_mm(
    a: Tensor, b: Tensor, row_scales: Tensor, column_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`int8_matmul`, scaled to what the codes stand for, plus bias: `dtype`."""
    check_int8_scaled_mm(a, b, row_scales, column_scales, bias, dtype)
    a, b, row_scales, column_scales = (
        readable(a),
        readable(b),
        readable(row_scales),
        readable(column_scales),
    )
    bias = None if bias is None else readable(bias)
    shape = prod(a.shape[:-1]), b.shape[0], b.shape[1]
    out = a.new_empty((*a.shape[:-1], shape[1]), dtype=dtype)
    _native.int8_scaled_mm(
        shape,
        a.data_ptr(),
        b.data_ptr(),
        _raw(row_scales),
        _raw(column_scales),
        None if bias is None else _raw(bias),
        _raw(out),
        _follow_threads(),
    )
    return out


@functools.lru_cache(maxsize=4096)
def _kernel_8bit(
    dtype: torch.dtype, n: int, k: int, bias: torch.dtype | None
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Products with 8-bit weights of this shape: forward and backward."""
    kernel = _native.CpuLinear8bit(_NAMES[dtype], n, k, None if bias is None else _NAMES[bias])
    return kernel.forward, kernel.backward


def linear_8bit(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """`x @ W.T + bias` with the rows `W` [out_features, in_features] in codes and scales; in the dtype of `x`.

    The rows of `x`, rounded to float16's precision, are quantized too; columns with an outlier, where `threshold` is
    not 0, are multiplied as they are.
    """
    check_linear_8bit(x, codes, scales, bias, threshold)
    n, k = codes.shape
    forward, _ = _kernel_8bit(x.dtype, n, k, None if bias is None else bias.dtype)
    x, codes, scales = readable(x), readable(codes), readable(scales)
    sizes = x.shape
    if len(sizes) == 2:
        m = sizes[0]
        # Numbers are parsed faster than a tuple of them.
        out = x.new_empty(m, n)
    else:
        m = prod(sizes[:-1])
        out = x.new_empty((*sizes[:-1], n))
    shift = 0
    if bias is not None:
        bias = readable(bias)
        shift = bias.data_ptr()
    forward(
        m,
        x.data_ptr(),
        codes.data_ptr(),
        scales.data_ptr(),
        shift,
        threshold,
        out.data_ptr(),
        _follow_threads(),
    )
    return out


def linear_8bit_backward(grad: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """`grad @ W` with the rows `W` [out_features, in_features] in codes and scales; in the dtype of `grad`."""
    check_linear_8bit_backward(grad, codes, scales)
    n, k = codes.shape
    grad, codes, scales = readable(grad), readable(codes), readable(scales)
    out = grad.new_empty((*grad.shape[:-1], k))
    _, backward = _kernel_8bit(grad.dtype, n, k, None)
    backward(
        prod(grad.shape[:-1]),
        grad.data_ptr(),
        codes.data_ptr(),
        scales.data_ptr(),
        out.data_ptr(),
        _follow_threads(),
    )
    return out
