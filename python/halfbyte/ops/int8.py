"""The functions of LLM.int8() (arXiv 2208.07339) on plain tensors: rows to 8 bits and back, and integer products."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from halfbyte.backends.int8_torch import product
from halfbyte.ops import dispatch
from halfbyte.ops.checks import (
    DTypeError,
    check_dequantize_rows,
    check_float,
    check_out,
    check_quantize_rows,
    check_tensor,
    same_device,
)
from halfbyte.ops.checks_8bit import (
    check_bias,
    check_columns,
    check_int8_matmul,
    check_int8_scaled_mm,
    check_statistics,
    check_threshold,
)

_UNIT = 1.0 / 127.0


def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize each row of a matrix to 8 bits, by its largest magnitude.

    Args:
        A: float16, bfloat16 or float32 `[..., columns]`.
        threshold: When positive, columns with a value of at least this magnitude are outliers: their codes are 0, and
            those values do not count for their rows' scales.

    Returns:
        The codes, int8, shaped as `A`: `round(127 * value / scale)`; the scales, float32 `[rows]`; and the outlier
        columns, int64, ascending, or None without a threshold. To know them, the host waits for the device.

    Raises:
        TypeError: A wrong type or dtype. The message names the argument and the legal ones.
        ValueError: A negative `threshold`, or an `A` without dimensions.

    >>> import torch
    >>> codes, scales, _ = int8_vectorwise_quant(torch.tensor([[1.0, -4.0, 2.0]]))
    >>> codes, scales
    (tensor([[  32, -127,   64]], dtype=torch.int8), tensor([4.]))
    """
    check_quantize_rows(A, "A")
    check_threshold(threshold)
    A = A.detach() if A.requires_grad else A
    if threshold == 0:
        codes, scales = dispatch.call("quantize_rows", A)
        return codes, scales, None
    codes, scales, outliers = dispatch.call("quantize_rows_outliers", A, float(threshold))
    return codes, scales, outliers.nonzero().view(-1)


def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """Read back what `int8_vectorwise_quant` gave: `A * stats / 127`.

    Args:
        A: The codes, int8 `[..., columns]`.
        stats: The scales, float32 `[rows]`; other floats are converted.

    Returns:
        float32, shaped as `A`.

    Raises:
        TypeError: A wrong type or dtype. The message names the argument and the legal ones.
        ValueError: Scales that do not fit the codes.
    """
    check_tensor("stats", stats)
    stats = stats.to(torch.float32).resolve_neg()
    check_dequantize_rows(A, stats, torch.float32, ("A", "stats"))
    result: Tensor = dispatch.call("dequantize_rows", A, stats, torch.float32)
    return result


def int8_double_quant(
    A: Tensor,
    col_stats: Tensor | None = None,
    row_stats: Tensor | None = None,
    out_col: Tensor | None = None,
    out_row: Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Quantize a matrix by its rows, and by its columns too.

    Args:
        A: float16, bfloat16 or float32 `[..., columns]`.
        col_stats: None; memory for results is not taken, nor are the next three.
        row_stats: None.
        out_col: None.
        out_row: None.
        threshold: When positive, values of at least this magnitude do not count; see `int8_vectorwise_quant`.

    Returns:
        Codes by rows and codes by columns, int8, shaped as `A`; scales of rows and of columns, float32; and the outlier
        columns as `int8_vectorwise_quant` gives them.

    Raises:
        TypeError: A wrong type or dtype. The message names the argument and the legal ones.
        ValueError: A negative `threshold`, or memory that was given for a result.
    """
    given = {"row_stats": row_stats, "col_stats": col_stats, "out_col": out_col, "out_row": out_row}
    for name, memory in given.items():
        if memory is not None:
            raise ValueError(f"{name} must be None, got a tensor")
    rows, row_scales, columns = int8_vectorwise_quant(A, threshold)
    turned = A.detach().reshape(prod(A.shape[:-1]), A.shape[-1]).t().to(torch.float32)
    if threshold > 0:
        turned = turned.masked_fill(turned.abs() >= threshold, 0.0)
    codes, column_scales = dispatch.call("quantize_rows", turned)
    return rows, codes.t().contiguous().view(A.shape), row_scales, column_scales, columns


def int8_linear_matmul(A: Tensor, B: Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.int32) -> Tensor:
    """Multiply codes, exactly: `A @ B.T`.

    Args:
        A: int8 `[..., k]`; `k` is at most 133144, so that sums fit 32 bits.
        B: int8 `[n, k]`.
        out: Where to write the result.
        dtype: int32.

    Returns:
        int32 `[..., n]`.

    Raises:
        TypeError: A wrong type or dtype. The message names the argument and the legal ones.
        ValueError: Shapes or devices that do not fit each other.
    """
    if dtype is not torch.int32:
        raise DTypeError(f"dtype: {dtype} is not torch.int32")
    check_int8_matmul(A, B, ("A", "B"))
    if out is not None:
        check_out(out, (*A.shape[:-1], B.shape[0]), torch.int32, A.device)
    result: Tensor = dispatch.call("int8_matmul", A, B)
    return result if out is None else out.copy_(result)


def int8_mm_dequant(
    A: Tensor, row_stats: Tensor, col_stats: Tensor, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Read what a product of codes stands for: `A * row_stats / 127 * col_stats / 127 + bias`, computed in float32.

    Args:
        A: int32 `[..., n]`, as `int8_linear_matmul` gives it.
        row_stats: The scales of its first factor, float32.
        col_stats: The scales of its second, float32 `[n]`.
        out: Where to write the result.
        bias: float16, bfloat16 or float32 `[n]`.

    Returns:
        float16, shaped as `A`.

    Raises:
        TypeError: A wrong type or dtype. The message names the argument and the legal ones.
        ValueError: Shapes or devices that do not fit each other.
    """
    result = mm_dequant(A, row_stats, col_stats, bias, torch.float16)
    if out is None:
        return result
    check_out(out, A.shape, out.dtype if isinstance(out, Tensor) else torch.float16, A.device)
    return out.copy_(result)


def mm_dequant(A: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`int8_mm_dequant` in any of the three float dtypes."""
    check_tensor("A", A)
    if A.dtype is not torch.int32:
        raise DTypeError(f"A: dtype {A.dtype} is not torch.int32")
    if A.dim() == 0:
        raise ValueError("A: shape [] has no rows; expected [..., columns]")
    rows, columns = prod(A.shape[:-1]), A.shape[-1]
    check_statistics("row_stats", row_stats, rows, "A", A.device)
    check_statistics("col_stats", col_stats, columns, "A", A.device, "columns")
    check_bias(bias, columns, "A", A.device)
    check_float("dtype", dtype)
    value = A.reshape(rows, columns).to(torch.float32) * (row_stats.view(-1, 1) * _UNIT)
    return _finish(value, col_stats, bias, dtype).view(A.shape)


def int8_scaled_mm(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Multiply codes, and read what the product stands for: `int8_linear_matmul` and `int8_mm_dequant` in one.

    Args:
        A: int8 `[..., k]`.
        B: int8 `[n, k]`.
        row_stats: The scales of `A`, float32.
        col_stats: The scales of `B`, float32 `[n]`.
        bias: float16, bfloat16 or float32 `[n]`.
        dtype: Of the result: float16, bfloat16 or float32.

    Returns:
        `dtype` `[..., n]`.

    Raises:
        TypeError: A wrong type or dtype. The message names the argument and the legal ones.
        ValueError: Shapes or devices that do not fit each other.
    """
    check_int8_scaled_mm(A, B, row_stats, col_stats, bias, dtype, ("A", "B", "row_stats", "col_stats"))
    result: Tensor = dispatch.call("int8_scaled_mm", A, B, row_stats, col_stats, bias, dtype)
    return result


def int8_mixed_scaled_mm(
    A: Tensor,
    CA: Tensor,
    CB: Tensor,
    SCA: Tensor,
    SCB: Tensor,
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`int8_scaled_mm`, and the outlier columns that were left out of the codes, multiplied as they are.

    Args:
        A: float16, bfloat16 or float32 `[..., k]`: what was quantized.
        CA: Its codes, int8 `[..., k]`, as `int8_vectorwise_quant` gives them with a threshold.
        CB: The weight's codes, int8 `[n, k]`.
        SCA: The scales of `CA`, float32.
        SCB: The scales of `CB`, float32 `[n]`.
        outlier_cols: Which columns were left out, int64.
        bias: float16, bfloat16 or float32 `[n]`.

    Returns:
        The product `[..., n]`, in the dtype of `A`; and those columns of `A`, `[rows, outliers]`.

    Raises:
        TypeError: A wrong type or dtype. The message names the argument and the legal ones.
        ValueError: Shapes or devices that do not fit each other.
    """
    check_tensor("A", A)
    check_int8_scaled_mm(CA, CB, SCA, SCB, bias, A.dtype, ("CA", "CB", "SCA", "SCB"))
    same_device("A", A, "CA", CA.device)
    if A.shape != CA.shape:
        raise ValueError(f"A: shape {list(A.shape)} is not that of CA, {list(CA.shape)}")
    check_columns("A", A.shape[-1])
    if outlier_cols is None or outlier_cols.numel() == 0:
        return dispatch.call("int8_scaled_mm", CA, CB, SCA, SCB, bias, A.dtype), A.new_empty(0)
    rows = prod(A.shape[:-1])
    outliers = A.reshape(rows, A.shape[-1])[:, outlier_cols].contiguous()
    extra = product(outliers.to(torch.float32), CB[:, outlier_cols].to(torch.float32).t())
    total = dispatch.call("int8_matmul", CA, CB).view(rows, CB.shape[0]).to(torch.float32)
    value = total * (SCA.view(-1, 1) * _UNIT) + extra
    return _finish(value, SCB, bias, A.dtype).view(*A.shape[:-1], CB.shape[0]), outliers


def _finish(value: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Sums, scaled by rows already, as what they stand for."""
    value = value * (scales.view(1, -1) * _UNIT)
    if bias is not None:
        value = value + bias.to(torch.float32)
    return value.to(dtype)
