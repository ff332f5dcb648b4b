"""The kernels for CUDA tensors: check, allocate, hand addresses to the compiled core, which launches on torch's stream.

Nothing here waits for the GPU, and no address outlives the call that took it: memory belongs to torch's allocator, and
what is freed early is reused in the order of the stream, as with torch's own operations. So everything can be captured
in a CUDA graph. The outputs are allocated here; a tensor that a kernel reads is made contiguous first.

Here are the 4-bit kernels. Those of 8 bits are in `halfbyte.backends.cuda_8bit`, and have their names here too.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from math import gcd, lcm, prod

import torch
from torch import Tensor

from halfbyte import _native
from halfbyte.backends.cuda_8bit import (
    dequantize_blockwise,
    dequantize_rows,
    int8_matmul,
    int8_scaled_mm,
    linear_8bit,
    linear_8bit_backward,
    quantize_blockwise,
    quantize_rows,
    quantize_rows_outliers,
)
from halfbyte.backends.cuda_memory import ALIGNMENT, NAMES, here, raw, raw_bytes, raw_scales
from halfbyte.ops._torch_internals import current_stream
from halfbyte.ops.checks import (
    NESTED_BLOCKSIZE,
    blocks_of,
    check_compress,
    check_embedding,
    check_expand,
    check_float,
    check_product,
    check_quantize,
    check_weight,
    packed_bytes,
)
from halfbyte.ops.packed import PackedWeight, packed_weight, plain_weight

__all__ = [
    "compress_absmax",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_rows",
    "dynamic_map",
    "embedding_4bit",
    "expand_absmax",
    "int8_matmul",
    "int8_scaled_mm",
    "linear_4bit",
    "linear_4bit_backward",
    "linear_8bit",
    "linear_8bit_backward",
    "quant_map",
    "quantize_4bit",
    "quantize_4bit_nested",
    "quantize_blockwise",
    "quantize_rows",
    "quantize_rows_outliers",
]

_logger = logging.getLogger(__name__)

_FUSED_LAUNCHES = (2, 4)
"""Up to so many launches of the fused product are faster than a dense copy of the weight: of a weight that fills the
GPU only once or twice, and of a larger one."""

_FUSED_ROWS = 1024
"""More rows than this go by way of a dense copy, whatever the weight."""

_LARGE = 2**25
"""Values of such a larger weight."""

_PLAIN_ROWS, _PLAIN_ROWS_32 = 1, 3
"""Up to so many rows the plain product, which takes everything, is faster than a dense copy of the weight: of 16 bits,
and of 32."""

_DENSE_BYTES = 2**29
"""Of a dense copy at most, however large the weight is. Parts that fit into the second-level cache are no faster:
products with so few of the weight's rows do not fill the GPU."""

_DENSE_ROWS = 256
"""Rows of the weight in each part are a multiple of this, as the matrix units want it."""

# ---- 4 bits ----------------------------------------------------------------------------------------------------------


def quantize_4bit(input: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    """Codes uint8 [ceil(n / 2), 1] and scales float32 [blocks] of `input`."""
    check_quantize(input, blocksize, quant_type)
    input = input.contiguous()
    n = input.numel()
    packed = input.new_empty((packed_bytes(n), 1), dtype=torch.uint8)
    absmax = input.new_empty(blocks_of(n, blocksize), dtype=torch.float32)
    _native.cuda_quantize_4bit(*here(input), raw(input), raw(packed), raw(absmax), quant_type, blocksize)
    return packed, absmax


def quantize_4bit_nested(input: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes of `input`, and what `compress_absmax` makes of its scales; faster than the two by themselves."""
    check_quantize(input, blocksize, quant_type)
    input = input.contiguous()
    n = input.numel()
    blocks = blocks_of(n, blocksize)
    packed = input.new_empty((packed_bytes(n), 1), dtype=torch.uint8)
    absmax = input.new_empty(blocks, dtype=torch.float32)
    codes = packed.new_empty(blocks)
    absmax2 = absmax.new_empty(blocks_of(blocks, NESTED_BLOCKSIZE))
    offset = absmax.new_empty(())
    workspace = absmax.new_empty(_native.cuda_compress_workspace(blocks), dtype=torch.float64)
    _native.cuda_quantize_4bit_nested(
        *here(input),
        raw(input),
        raw(packed),
        raw(absmax),
        raw(codes),
        raw(absmax2),
        raw(offset),
        raw(workspace),
        quant_type,
        blocksize,
    )
    return packed, codes, absmax2, offset


def compress_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 scales to 8 bits: codes uint8 [n], their scales float32 [ceil(n / 256)], and the offset float32 []."""
    check_compress(absmax)
    absmax = absmax.contiguous()
    n = absmax.numel()
    codes = absmax.new_empty(n, dtype=torch.uint8)
    absmax2 = absmax.new_empty(blocks_of(n, NESTED_BLOCKSIZE))
    offset = absmax.new_empty(())
    workspace = absmax.new_empty(_native.cuda_compress_workspace(n), dtype=torch.float64)
    _native.cuda_compress_absmax(*here(absmax), raw(absmax), raw(codes), raw(absmax2), raw(offset), raw(workspace))
    return codes, absmax2, offset


def expand_absmax(codes: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
    """The way back of `compress_absmax`: float32 [n]."""
    check_expand(codes, absmax2, offset)
    codes, absmax2 = codes.contiguous(), absmax2.contiguous()
    absmax = absmax2.new_empty(codes.numel())
    _native.cuda_expand_absmax(*here(codes), raw(codes), raw(absmax2), raw(offset), raw(absmax))
    return absmax


def dequantize_4bit(weight: PackedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The values of a packed tensor in `dtype`; into `out` where given (checked by the caller)."""
    check_weight(weight)
    check_float("dtype", dtype)
    packed, (absmax, absmax2, offset, shape, blocksize, quant_type, _) = weight
    result = out if out is not None and out.is_contiguous() else packed.new_empty(shape, dtype=dtype)
    packed = packed.contiguous()
    (first, second, third), _kept = raw_scales(absmax, absmax2, offset)
    n = result.numel()
    _native.cuda_dequantize_4bit(
        *here(packed), raw_bytes(packed, n), first, second, third, raw(result), quant_type, blocksize
    )
    return result if out is None or out is result else out.copy_(result)


def embedding_4bit(indices: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Rows of the packed matrix [rows, dim]: `[*indices.shape, dim]`.

    A row that does not exist is NaN: to raise for it, the call would have to wait for the GPU.
    """
    check_weight(weight)
    check_embedding(indices, weight, dtype)
    packed, (absmax, absmax2, offset, (rows, dim), blocksize, quant_type, _) = weight
    indices, packed = indices.contiguous(), packed.contiguous()
    (first, second, third), _kept = raw_scales(absmax, absmax2, offset)
    out = packed.new_empty((*indices.shape, dim), dtype=dtype)
    _native.cuda_embedding_4bit(
        *here(packed),
        raw(indices),
        raw_bytes(packed, rows * dim),
        first,
        second,
        third,
        raw(out),
        rows,
        dim,
        quant_type,
        blocksize,
    )
    return out


# ---- products --------------------------------------------------------------------------------------------------------


def _slow(device: int, dtype: torch.dtype, k: int, blocksize: int) -> str | None:
    """Why the fused product does not take such a weight, or None."""
    _, (major, minor), _, _ = _native.cuda_device(device)
    if dtype is torch.float32:
        return "the matrix units have no float32"
    if major < 8 and dtype is not torch.float16:
        return f"the matrix units of compute capability {major}.{minor} have no bfloat16, those of 8.0 and later do"
    if k % 64 or k == 0:
        return "in_features is no multiple of 64"
    return f"the block size is {blocksize}, less than 64" if blocksize < 64 else None


_MaybeBytes = Callable[[int], int | None]


@functools.lru_cache(maxsize=4096)
def _linear(
    device: int, dtype: torch.dtype, n: int, k: int, quant_type: str, blocksize: int, nested: bool
) -> tuple[_native.CudaLinear, _MaybeBytes, _MaybeBytes]:
    """Products with weights of this kind.

    Returns:
        Their launcher; and functions that give, for a number of rows, the bytes of the workspace that a product and a
        gradient want, or None when dequantize + matmul is faster. What they give is computed once.
    """
    kernel = _native.CudaLinear(device, NAMES[dtype], n, k, quant_type, blocksize, nested)
    remember = functools.lru_cache(maxsize=1024)
    return kernel, remember(kernel.workspace), remember(kernel.dgrad_workspace)


@functools.lru_cache(maxsize=4096)
def _kernel(
    device: int, dtype: torch.dtype, n: int, k: int, quant_type: str, blocksize: int, nested: bool
) -> tuple[Callable[..., None], int, _MaybeBytes]:
    """Choose the kernel for weights of this kind.

    Returns:
        The launcher; the number of rows up to which it is faster than dequantize + matmul (0 when no small-batch kernel
        takes the weight, which is logged once); and a function that gives, for more rows, the bytes of the workspace
        that the launcher wants, or None when dequantize + matmul is faster.
    """
    reason = _slow(device, dtype, k, blocksize)
    kernel, workspace_of, _ = _linear(device, dtype, n, k, quant_type, blocksize, nested)
    if reason is not None and dtype is not torch.float32 and workspace_of(1) is None:
        _logger.warning(
            "no fused 4-bit GEMM for weight %s in %s (%s); falling back to dequantize + matmul", [n, k], dtype, reason
        )
    most = 0 if reason is not None else kernel.rows_at_once * _FUSED_LAUNCHES[n * k >= _LARGE]
    return kernel.launch, min(most, kernel.rows_without_workspace), workspace_of


@functools.lru_cache(maxsize=4096)
def _say_unaligned(n: int, k: int) -> None:
    """Once: the fused product takes such a weight, but not where it lies."""
    _logger.warning(
        "no fused 4-bit GEMM for weight %s (codes not aligned to %d bytes); falling back to dequantize + matmul",
        [n, k], ALIGNMENT,
    )  # fmt: skip


class _Weight:
    """A packed weight `[n, k]`, checked and contiguous, to be made dense part by part."""

    def __init__(self, weight: PackedWeight) -> None:
        packed, (absmax, absmax2, offset, (self.n, self.k), self.blocksize, self.quant_type, _) = weight
        self.packed = packed.contiguous()
        self.scales, self._kept = raw_scales(absmax, absmax2, offset)
        self.here = here(packed)

    def dense(self, begin: int, end: int, out: Tensor) -> None:
        """Rows `begin` to `end` of the weight to `out`; `begin` is one of `parts`."""
        first, count = begin * self.k, (end - begin) * self.k
        block, blocks = first // self.blocksize, blocks_of(count, self.blocksize)
        absmax, absmax2, offset = self.scales
        address, _, dtype = absmax
        absmax = (address + block * (4 if dtype == "float32" else 1), blocks, dtype)
        if absmax2 is not None:
            address, _, dtype = absmax2
            absmax2 = (address + block // NESTED_BLOCKSIZE * 4, blocks_of(blocks, NESTED_BLOCKSIZE), dtype)
        packed = (self.packed.data_ptr() + first // 2, packed_bytes(count), "uint8")
        _native.cuda_dequantize_4bit(
            *self.here, packed, absmax, absmax2, offset, raw(out), self.quant_type, self.blocksize
        )

    def parts(self, itemsize: int) -> list[tuple[int, int]]:
        """Parts of the rows, begin and end, whose dense copies are of at most `_DENSE_BYTES` where that can be.

        Each begins with a whole group of scales that share one, so that it can be dequantized by itself.
        """
        if self.n * self.k * itemsize <= _DENSE_BYTES:
            return [(0, self.n)]
        group = self.blocksize * (1 if self.scales[1] is None else NESTED_BLOCKSIZE)
        unit = lcm(group // gcd(group, self.k), _DENSE_ROWS)
        parts = blocks_of(self.n * self.k * itemsize, _DENSE_BYTES)
        # Of equal size, but for the last.
        step = blocks_of(blocks_of(self.n, parts), unit) * unit
        return [(begin, min(begin + step, self.n)) for begin in range(0, self.n, step)]


def linear_4bit(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """`x @ W.T + bias` with the packed `W` [out_features, in_features]; computed in the dtype of `x`.

    Up to some hundred rows go to kernels that read the packed weight; for more it is dequantized, part by part, into
    memory that torch's matrix product reads.
    """
    weight = plain_weight(weight)
    check_weight(weight)
    check_product(x, "x", bias, weight, 1)
    packed, (absmax, absmax2, offset, (n, k), blocksize, quant_type, _) = weight
    dtype = x.dtype
    if x.dim() == 2:
        m = x.shape[0]
        # Numbers are parsed faster than a tuple of them.
        out = x.new_empty(m, n)
    else:
        out = x.new_empty((*x.shape[:-1], n))
        m = x.numel() // k if k else prod(x.shape[:-1])
    if m == 0 or n == 0:
        return out
    x, packed, absmax = x.contiguous(), packed.contiguous(), absmax.contiguous()
    if bias is not None:
        bias = (bias if bias.dtype is dtype else bias.to(dtype)).contiguous()
    if m <= _FUSED_ROWS or k == 0:
        device = x.get_device()
        launch, most, workspace_of = _kernel(device, dtype, n, k, quant_type, blocksize, absmax2 is not None)
        codes = packed.data_ptr()
        workspace = 0 if m <= most else workspace_of(m)
        fused = workspace is not None
        if fused and codes % ALIGNMENT:
            _say_unaligned(n, k)
            fused = False
        if fused or m <= (_PLAIN_ROWS_32 if dtype is torch.float32 else _PLAIN_ROWS) or k == 0:
            if absmax2 is None or offset is None:
                scales = absmax.data_ptr(), 0, 0
            else:
                absmax2 = absmax2.contiguous()
                scales = absmax.data_ptr(), absmax2.data_ptr(), offset.data_ptr()
            rows, shift, result = x.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr()
            if rows % ALIGNMENT:
                x = x.clone()
                rows = x.data_ptr()
            scratch = x.new_empty(workspace, dtype=torch.uint8) if workspace else None
            place = 0 if scratch is None else scratch.data_ptr()
            launch(current_stream(device), m, rows, codes, *scales, shift, result, place)
            return out
    unpacked = _Weight(weight)
    x, into = x.view(m, k), out.view(m, n)
    parts = unpacked.parts(dtype.itemsize)
    buffer = x.new_empty(parts[0][1], k)
    # With `out`, the matrix products stay in this dtype whatever autocast wants.
    for begin, end in parts:
        dense, columns = buffer, into
        if len(parts) > 1:
            dense, columns = buffer[: end - begin], into[:, begin:end]
        unpacked.dense(begin, end, dense)
        if bias is None:
            torch.mm(x, dense.t(), out=columns)
        else:
            torch.addmm(bias[begin:end], x, dense.t(), out=columns)
    return out


def linear_4bit_backward(grad: Tensor, weight: PackedWeight) -> Tensor:
    """`grad @ W` with the packed `W` [out_features, in_features]; computed in the dtype of `grad`.

    By a kernel that reads the packed weight, or by a dense copy of it where that is faster.
    """
    check_weight(weight)
    check_product(grad, "grad", None, weight, 0)
    packed, (absmax, absmax2, offset, (n, k), blocksize, quant_type, _) = weight
    out = grad.new_empty((*grad.shape[:-1], k))
    m = grad.numel() // n if n else prod(grad.shape[:-1])
    if m == 0 or k == 0 or n == 0:
        return out.zero_()
    grad = grad.contiguous()
    device, codes = grad.get_device(), packed.contiguous()
    kernel, _, workspace_of = _linear(device, grad.dtype, n, k, quant_type, blocksize, absmax2 is not None)
    workspace = workspace_of(m)
    if workspace is not None:
        if codes.data_ptr() % ALIGNMENT:
            _say_unaligned(n, k)
        else:
            absmax = absmax.contiguous()
            if absmax2 is None or offset is None:
                scales = absmax.data_ptr(), 0, 0
            else:
                absmax2 = absmax2.contiguous()
                scales = absmax.data_ptr(), absmax2.data_ptr(), offset.data_ptr()
            if grad.data_ptr() % ALIGNMENT:
                grad = grad.clone()
            scratch = grad.new_empty(workspace, dtype=torch.uint8) if workspace else None
            place = 0 if scratch is None else scratch.data_ptr()
            kernel.dgrad(current_stream(device), m, grad.data_ptr(), codes.data_ptr(), *scales, out.data_ptr(), place)
            return out
    grad = grad.view(m, n)
    unpacked = _Weight(weight)
    parts = unpacked.parts(grad.element_size())
    buffer = grad.new_empty(parts[0][1], k)
    if len(parts) == 1:
        unpacked.dense(0, n, buffer)
        torch.mm(grad, buffer, out=out.view(m, k))
        return out
    # Parts are summed up in float32: in the dtype of `grad` each would be rounded on top of the sum of all before.
    total = grad.new_zeros((m, k), dtype=torch.float32)
    part = grad.new_empty(m, k)
    for begin, end in parts:
        dense = buffer[: end - begin]
        unpacked.dense(begin, end, dense)
        total += torch.mm(grad[:, begin:end], dense, out=part)
    return out.copy_(total.view(out.shape))


# ---- tables ----------------------------------------------------------------------------------------------------------


def quant_map(quant_type: str, device: torch.device) -> Tensor:
    """The sixteen values of `quant_type`, float32 [16], made on the device: no copy from the host that waits for it."""
    # Two codes to a byte: 0x01, 0x23, ... 0xef.
    packed = torch.arange(0x01, 0x100, 0x22, dtype=torch.uint8, device=device)
    one = packed.new_ones(1, dtype=torch.float32)
    values = dequantize_4bit(packed_weight(packed, one, None, None, (16,), 32, quant_type), torch.float32)
    # FP4 has two zeros; in the map, both are positive.
    return values.add_(0.0) if quant_type == "fp4" else values


def dynamic_map(device: torch.device) -> Tensor:
    """The 256 values of the signed 8-bit dynamic map, float32, ascending, made on the device."""
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    one = codes.new_ones(1, dtype=torch.float32)
    return expand_absmax(codes, one, torch.zeros_like(one))
