"""The operations of LLM.int8(): rows to 8 bits and back, and integer products.

The products are plain: exact integer arithmetic by torch, without kernels of halfbyte's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._define import check_dtype, check_out, define

# 1 / 127²: what the product of two rows of codes is multiplied with, beside their scales.
_UNIT = 1.0 / (127.0 * 127.0)


# ---- rows ------------------------------------------------------------------------------------------------------------


def _fake_int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> Any:
    codes = torch.empty_like(A, dtype=torch.int8)
    scales = A.new_empty(A.numel() // A.shape[-1], dtype=torch.float32)
    if threshold == 0.0:
        return codes, scales, None
    return codes, scales, A.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


@define(
    "int8_vectorwise_quant",
    "(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor?)",
    _fake_int8_vectorwise_quant,
)
def _int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    from halfbyte.functional import int8_vectorwise_quant

    return int8_vectorwise_quant(A, threshold)


def _fake_int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    check_dtype("A", A, torch.int8)
    return torch.empty_like(A, dtype=torch.float32)


@define("int8_vectorwise_dequant", "(Tensor A, Tensor stats) -> Tensor", _fake_int8_vectorwise_dequant)
def _int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    from halfbyte.functional import int8_vectorwise_dequant

    return int8_vectorwise_dequant(A, stats)


def _fake_int8_double_quant(A: Tensor, threshold: float = 0.0) -> Any:
    rows, scales, columns = _fake_int8_vectorwise_quant(A, threshold)
    return rows, torch.empty_like(rows), scales, A.new_empty(A.shape[-1], dtype=torch.float32), columns


@define(
    "int8_double_quant",
    "(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)",
    _fake_int8_double_quant,
)
def _int8_double_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    rows, row_scales, columns = _int8_vectorwise_quant(A, threshold)
    values = A.reshape(-1, A.shape[-1]).float()
    if threshold > 0.0:
        values = values.masked_fill(values.abs() >= threshold, 0.0)
    scales = values.abs().amax(0)
    codes = (values * (127.0 / scales)).nan_to_num_(0.0).round_().to(torch.int8)
    return rows, codes.view(A.shape), row_scales, scales, columns


# ---- products --------------------------------------------------------------------------------------------------------


def _product(A: Tensor, B: Tensor) -> Tensor:
    """`A @ B.T` of int8 matrices, int32."""
    m, k, n = A.shape[0], A.shape[1], B.shape[0]
    if 0 in (m, k, n):
        return A.new_zeros((m, n), dtype=torch.int32)
    if A.is_cuda:
        # cuBLAS takes more than 16 rows, and multiples of 8: zeros add nothing.
        rows = max(24, -(-m // 8) * 8)
        A = torch.nn.functional.pad(A, (0, -k % 8, 0, rows - m))
        B = torch.nn.functional.pad(B, (0, -k % 8, 0, -n % 8))
    return torch._int_mm(A.contiguous(), B.t())[:m, :n].contiguous()


def _fake_int8_linear_matmul(A: Tensor, B: Tensor) -> Tensor:
    check_dtype("A", A, torch.int8)
    check_dtype("B", B, torch.int8)
    torch._check(A.shape[-1] == B.shape[-1], lambda: f"B must have {A.shape[-1]} columns, as A, got {B.shape[-1]}")
    return A.new_empty((*A.shape[:-1], B.shape[0]), dtype=torch.int32)


@define("int8_linear_matmul", "(Tensor A, Tensor B) -> Tensor", _fake_int8_linear_matmul)
def _int8_linear_matmul(A: Tensor, B: Tensor) -> Tensor:
    check_dtype("A", A, torch.int8)
    check_dtype("B", B, torch.int8)
    return _product(A.reshape(-1, A.shape[-1]), B).view(*A.shape[:-1], B.shape[0])


def _fake_int8_linear_matmul_out(A: Tensor, B: Tensor, out: Tensor) -> None:
    _fake_int8_linear_matmul(A, B)
    check_out(out, (*A.shape[:-1], B.shape[0]), torch.int32, A.device)


@define("int8_linear_matmul.out", "(Tensor A, Tensor B, Tensor! out) -> ()", _fake_int8_linear_matmul_out)
def _int8_linear_matmul_out(A: Tensor, B: Tensor, out: Tensor) -> None:
    check_out(out, (*A.shape[:-1], B.shape[0]), torch.int32, A.device)
    out.copy_(_int8_linear_matmul(A, B))


def _fake_int8_mm_dequant(
    A: Tensor, row_stats: Tensor, col_stats: Tensor, dtype: torch.dtype | None = None, bias: Tensor | None = None
) -> Tensor:
    check_dtype("A", A, torch.int32)
    return torch.empty_like(A, dtype=dtype or torch.float16)


@define(
    "int8_mm_dequant",
    "(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None) -> Tensor",
    _fake_int8_mm_dequant,
)
def _int8_mm_dequant(
    A: Tensor, row_stats: Tensor, col_stats: Tensor, dtype: torch.dtype | None = None, bias: Tensor | None = None
) -> Tensor:
    check_dtype("A", A, torch.int32)
    check_dtype("row_stats", row_stats, torch.float32)
    check_dtype("col_stats", col_stats, torch.float32)
    out = A.reshape(-1, A.shape[-1]) * (row_stats.reshape(-1, 1) * col_stats.reshape(1, -1) * _UNIT)
    if bias is not None:
        out += bias
    return out.to(dtype or torch.float16).view(A.shape)


def _fake_int8_scaled_mm(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return A.new_empty((*A.shape[:-1], B.shape[0]), dtype=dtype or torch.float16)


@define(
    "int8_scaled_mm",
    "(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, ScalarType? dtype=None) -> Tensor",
    _fake_int8_scaled_mm,
)
def _int8_scaled_mm(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return _int8_mm_dequant(_int8_linear_matmul(A, B), row_stats, col_stats, dtype or torch.float16, bias)


def _fake_int8_mixed_scaled_mm(
    A: Tensor,
    CA: Tensor,
    CB: Tensor,
    SCA: Tensor,
    SCB: Tensor,
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    columns = torch.library.get_ctx().new_dynamic_size()
    return A.new_empty((*CA.shape[:-1], CB.shape[0])), A.new_empty(columns, dtype=torch.int64)


@define(
    "int8_mixed_scaled_mm",
    "(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None, Tensor? bias=None) "
    "-> (Tensor, Tensor?)",
    _fake_int8_mixed_scaled_mm,
)
def _int8_mixed_scaled_mm(
    A: Tensor,
    CA: Tensor,
    CB: Tensor,
    SCA: Tensor,
    SCB: Tensor,
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    out = _int8_scaled_mm(CA, CB, SCA, SCB, bias, A.dtype)
    if outlier_cols is None or not outlier_cols.numel():
        return out, A.new_empty(0)
    # The outlier columns were left out of the codes of A: they are multiplied in A's own precision.
    outliers = A[:, outlier_cols].contiguous()
    weight = _int8_vectorwise_dequant(CB[:, outlier_cols].contiguous(), SCB).to(A.dtype)
    return out.addmm(outliers, weight.t()), outliers
