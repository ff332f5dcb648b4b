"""The operations of LLM.int8(): rows to 8 bits and back, and integer products, by `halfbyte.functional`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbyte import functional
from halfbyte.ops.int8 import mm_dequant

from ._define import check_dtype, check_out, define

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
    return functional.int8_vectorwise_quant(A, threshold)


def _fake_int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    check_dtype("A", A, torch.int8)
    return torch.empty_like(A, dtype=torch.float32)


@define("int8_vectorwise_dequant", "(Tensor A, Tensor stats) -> Tensor", _fake_int8_vectorwise_dequant)
def _int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    return functional.int8_vectorwise_dequant(A, stats)


def _fake_int8_double_quant(A: Tensor, threshold: float = 0.0) -> Any:
    rows, scales, columns = _fake_int8_vectorwise_quant(A, threshold)
    return rows, torch.empty_like(rows), scales, A.new_empty(A.shape[-1], dtype=torch.float32), columns


@define(
    "int8_double_quant",
    "(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)",
    _fake_int8_double_quant,
)
def _int8_double_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    return functional.int8_double_quant(A, threshold=threshold)


# ---- products --------------------------------------------------------------------------------------------------------


def _fake_int8_linear_matmul(A: Tensor, B: Tensor) -> Tensor:
    check_dtype("A", A, torch.int8)
    check_dtype("B", B, torch.int8)
    torch._check(A.shape[-1] == B.shape[-1], lambda: f"B must have {A.shape[-1]} columns, as A, got {B.shape[-1]}")
    return A.new_empty((*A.shape[:-1], B.shape[0]), dtype=torch.int32)


@define("int8_linear_matmul", "(Tensor A, Tensor B) -> Tensor", _fake_int8_linear_matmul)
def _int8_linear_matmul(A: Tensor, B: Tensor) -> Tensor:
    return functional.int8_linear_matmul(A, B)


def _fake_int8_linear_matmul_out(A: Tensor, B: Tensor, out: Tensor) -> None:
    _fake_int8_linear_matmul(A, B)
    check_out(out, (*A.shape[:-1], B.shape[0]), torch.int32, A.device)


@define("int8_linear_matmul.out", "(Tensor A, Tensor B, Tensor! out) -> ()", _fake_int8_linear_matmul_out)
def _int8_linear_matmul_out(A: Tensor, B: Tensor, out: Tensor) -> None:
    functional.int8_linear_matmul(A, B, out)


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
    return mm_dequant(A, row_stats, col_stats, bias, dtype or torch.float16)


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
    return functional.int8_scaled_mm(A, B, row_stats, col_stats, bias, dtype or torch.float16)


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
    return functional.int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, outlier_cols, bias)
