"""The arithmetic of LLM.int8() in torch's own operations, for devices and calls without kernels for it.

Sums of codes are exact, the rest is float32 in a fixed order; nothing here waits for a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.ops._torch_internals import any_autocast

# Of so many products of codes, each at most 128 * 128, a float32 sum is exact in whatever order.
_EXACT = 1024

_UNIT = 1.0 / 127.0


def rounded(x: Tensor) -> Tensor:
    """Activations as float32 values of float16's precision, 11 significant bits, and of float32's range."""
    if x.dtype is not torch.float32:
        return x.to(torch.float32)
    bits = x.contiguous().view(torch.int32)
    even = (bits + (0x0FFF + ((bits >> 13) & 1))) & ~0x1FFF
    return torch.where(x.isfinite(), even.view(torch.float32), x)


def outliers(x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Which float32 values of `[rows, columns]` are outliers, and which columns have one."""
    found = x.abs() >= threshold
    return found, found.any(0)


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in their own dtype, whatever `torch.autocast` says."""
    if not any_autocast():
        return a @ b
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.T` of int8 matrices, int32."""
    b = b.detach()  # A parameter that holds codes does not cast them.
    m, k, n = a.shape[0], a.shape[1], b.shape[0]
    if 0 in (m, k, n):
        return a.new_zeros((m, n), dtype=torch.int32)
    if a.is_cuda:
        # cuBLAS takes more than 16 rows, and multiples of 8: zeros add nothing.
        rows = max(24, -(-m // 8) * 8)
        a = torch.nn.functional.pad(a, (0, -k % 8, 0, rows - m))
        b = torch.nn.functional.pad(b, (0, -k % 8, 0, -n % 8))
        return torch._int_mm(a.contiguous(), b.contiguous().t())[:m, :n].contiguous()
    # torch's own integer product saturates on processors without VNNI.
    total = a.new_zeros((m, n), dtype=torch.int32)
    for start in range(0, k, _EXACT):
        part = slice(start, start + _EXACT)
        total += product(a[:, part].float(), b[:, part].float().t()).to(torch.int32)
    return total


def epilogue(
    total: Tensor,
    row_scales: Tensor,
    column_scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    extra: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """Sums as what they stand for; `extra` is that of the outlier columns, which counts where there is one."""
    value = total.to(torch.float32) * (row_scales.view(-1, 1) * _UNIT)
    if extra is not None and columns is not None:
        value = torch.where(columns.any(), value + extra, value)
    value = value * (column_scales.view(1, -1) * _UNIT)
    if bias is not None:
        value = value + bias.to(torch.float32)
    return value.to(dtype)


def outlier_product(x: Tensor, codes: Tensor, columns: Tensor) -> Tensor:
    """The part of a product that the columns have whose codes are 0, without the weight's scales; float32."""
    return product(torch.where(columns, x.to(torch.float32), 0.0), codes.detach().to(torch.float32).t())
