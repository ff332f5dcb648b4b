"""What the operations of LLM.int8() accept: see `halfbyte.ops.checks`, whose rules and whose errors these are."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from halfbyte.ops.checks import FLOAT_DTYPES, DTypeError, check_float, check_quantize_rows, check_tensor, same_device

_STRIDED = torch.strided

MOST_COLUMNS = (2**31 - 1) // 127**2
"""Of two factors: the sum of more products of codes may not fit 32 bits."""


def check_threshold(threshold: object, positive: bool = False) -> None:
    """From which magnitude on values are outliers; 0, where that may be, for none."""
    legal = "a number greater than 0" if positive else "a number of at least 0 (0 turns it off)"
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(f"threshold must be {legal}, got {threshold!r}")
    if not (threshold > 0 or (threshold == 0 and not positive)):
        raise ValueError(f"threshold must be {legal}, got {threshold}")


def check_quantize_rows_outliers(input: Tensor, threshold: float) -> None:
    """The arguments of `quantize_rows_outliers`."""
    check_quantize_rows(input)
    check_threshold(threshold, positive=True)


def check_codes(argument: str, codes: object, dims: int | None = None) -> None:
    """Codes int8 `[..., columns]`, of `dims` dimensions where given."""
    check_tensor(argument, codes)
    assert isinstance(codes, Tensor)
    if codes.dtype is not torch.int8:
        raise DTypeError(f"{argument}: dtype {codes.dtype} is not torch.int8")
    if codes.dim() == 0 or (dims is not None and codes.dim() != dims):
        legal = "[rows, columns]" if dims == 2 else "[..., columns]"
        raise ValueError(f"{argument}: shape {list(codes.shape)} is not {legal}")


def check_columns(argument: str, columns: int) -> None:
    """So many products of codes are added in 32 bits."""
    if columns > MOST_COLUMNS:
        raise ValueError(f"{argument}: {columns} columns are more than {MOST_COLUMNS}, whose sum fits 32 bits")


def check_statistics(
    argument: str, scales: object, count: int, of: str, device: torch.device, what: str = "rows"
) -> None:
    """Scales, float32, one for each of `count` rows, or columns, of the argument `of`."""
    check_tensor(argument, scales)
    assert isinstance(scales, Tensor)
    same_device(argument, scales, of, device)
    if scales.dtype is not torch.float32:
        raise DTypeError(f"{argument}: dtype {scales.dtype} is not torch.float32")
    if scales.numel() != count:
        raise ValueError(f"{argument}: {scales.numel()} scales do not fit; {of} has {count} {what}")


def check_int8_matmul(a: Tensor, b: Tensor, arguments: tuple[str, str] = ("a", "b")) -> None:
    """The arguments of `int8_matmul`, by the names that the caller has for them."""
    first, second = arguments
    check_codes(first, a)
    check_codes(second, b, 2)
    same_device(second, b, first, a.device)
    if a.shape[-1] != b.shape[1]:
        raise ValueError(f"{second}: shape {list(b.shape)} does not end with the columns of {first}, {a.shape[-1]}")
    check_columns(first, a.shape[-1])


def check_int8_scaled_mm(
    a: Tensor,
    b: Tensor,
    row_scales: Tensor,
    column_scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    arguments: tuple[str, str, str, str] = ("a", "b", "row_scales", "column_scales"),
) -> None:
    """The arguments of `int8_scaled_mm`, by the names that the caller has for them."""
    first, second, third, fourth = arguments
    check_int8_matmul(a, b, (first, second))
    check_statistics(third, row_scales, prod(a.shape[:-1]), first, a.device)
    check_statistics(fourth, column_scales, b.shape[0], second, a.device)
    check_bias(bias, b.shape[0], first, a.device)
    check_float("dtype", dtype)


def check_bias(bias: Tensor | None, count: int, other: str, device: torch.device) -> None:
    """One value for each of `count` columns of a result that is on the device of the argument `other`."""
    if bias is None:
        return
    check_tensor("bias", bias)
    same_device("bias", bias, other, device)
    check_float("bias", bias.dtype)
    if bias.dim() != 1 or bias.shape[0] != count:
        raise ValueError(f"bias: shape {list(bias.shape)} is not [{count}]")


def check_linear_8bit(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, threshold: float) -> None:
    """The arguments of `linear_8bit`."""
    shape, sizes = codes.shape, x.shape
    if (
        type(x) is Tensor
        and codes.dtype is torch.int8
        and len(shape) == 2
        and len(sizes) > 0
        and sizes[-1] == shape[1]
        and shape[1] <= MOST_COLUMNS
        and x.dtype in FLOAT_DTYPES
        and x.layout is _STRIDED
        and codes.layout is _STRIDED
        and scales.dtype is torch.float32
        and scales.layout is _STRIDED
        and scales.numel() == shape[0]
        and ((x.is_cpu and codes.is_cpu and scales.is_cpu) or (x.device == codes.device and x.device == scales.device))
        and (
            bias is None
            or (
                bias.dtype in FLOAT_DTYPES
                and bias.shape == shape[:1]
                and bias.layout is _STRIDED
                and ((bias.is_cpu and x.is_cpu) or bias.device == x.device)
            )
        )
        and type(threshold) is float
        and threshold >= 0
    ):
        return
    check_tensor("x", x)
    check_float("x", x.dtype)
    _check_weight(codes, scales, "x", x.device)
    _check_factor("x", x, codes, 1)
    check_columns("codes", codes.shape[1])
    check_bias(bias, codes.shape[0], "x", x.device)
    check_threshold(threshold)


def check_linear_8bit_trained(
    x: Tensor, weight: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, threshold: float
) -> None:
    """The arguments of `linear_8bit_trained`."""
    check_linear_8bit(x, codes, scales, bias, threshold)
    check_tensor("weight", weight)
    check_float("weight", weight.dtype)
    same_device("weight", weight, "x", x.device)
    if weight.shape != codes.shape:
        raise ValueError(f"weight: shape {list(weight.shape)} is not that of codes, {list(codes.shape)}")


def check_linear_8bit_backward(grad: Tensor, codes: Tensor, scales: Tensor) -> None:
    """The arguments of `linear_8bit_backward`."""
    check_tensor("grad", grad)
    check_float("grad", grad.dtype)
    _check_weight(codes, scales, "grad", grad.device)
    _check_factor("grad", grad, codes, 0)


def _check_weight(codes: Tensor, scales: Tensor, other: str, device: torch.device) -> None:
    check_codes("codes", codes, 2)
    same_device("codes", codes, other, device)
    check_statistics("scales", scales, codes.shape[0], "codes", device)


def _check_factor(argument: str, factor: Tensor, codes: Tensor, dim: int) -> None:
    """A factor of a product with a matrix of codes, whose dimension `dim` it meets."""
    if factor.dim() == 0 or factor.shape[-1] != codes.shape[dim]:
        name = "in_features" if dim == 1 else "out_features"
        raise ValueError(f"{argument}: shape {list(factor.shape)} does not end with {name}, {codes.shape[dim]}")
