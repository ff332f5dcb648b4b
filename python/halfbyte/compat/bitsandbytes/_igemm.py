"""Integer products of any two int8 matrices, or batches of them: deprecated in bitsandbytes too."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["batched_igemm", "check_matmul", "igemm"]


def _deprecated(name: str) -> None:
    warnings.warn(
        f"{name}: This function is deprecated and will be removed in a future release.", FutureWarning, stacklevel=3
    )


def check_matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None,
    transposed_A: bool,
    transposed_B: bool,
    expected_type: torch.dtype = torch.int8,
) -> Sequence[int]:
    """The shape of the product of two matrices, or of batches of them.

    Raises:
        TypeError: They are not of `expected_type`.
        ValueError: They do not fit each other.
    """
    _deprecated("check_matmul")
    return _shape(A, B, out, transposed_A, transposed_B, expected_type)


def _shape(
    A: Tensor,
    B: Tensor,
    out: Tensor | None,
    transposed_A: bool,
    transposed_B: bool,
    expected_type: torch.dtype = torch.int8,
) -> Sequence[int]:
    for name, tensor in (("A", A), ("B", B)):
        if tensor.dtype is not expected_type:
            raise TypeError(f"{name} must be {expected_type}, got {tensor.dtype}")
    fits = (A.dim(), B.dim()) in ((2, 2), (3, 2), (3, 3))
    if fits:
        rows, inner = (A.shape[-1], A.shape[-2]) if transposed_A else (A.shape[-2], A.shape[-1])
        inner_B, columns = (B.shape[-1], B.shape[-2]) if transposed_B else (B.shape[-2], B.shape[-1])
        if inner == inner_B:
            return (*A.shape[:-2], rows, columns)
        if out is not None and _is_contraction(A, B) and tuple(out.shape) == (A.shape[2], B.shape[2]):
            return tuple(out.shape)
    raise ValueError(
        f"A and B must fit each other, got {list(A.shape)} and {list(B.shape)} "
        f"(transposed: {transposed_A}, {transposed_B})"
    )


def _is_contraction(A: Tensor, B: Tensor) -> bool:
    """Whether it is `bsi,bso->io`, the gradient of a weight."""
    return A.dim() == B.dim() == 3 and A.shape[:2] == B.shape[:2]


def _product(A: Tensor, B: Tensor) -> Tensor:
    # float64 holds sums of 2^39 products of int8 exactly.
    return torch.matmul(A.double(), B.double()).to(torch.int32)


def _give(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None else out.copy_(result)


def igemm(
    A: Tensor, B: Tensor, out: Tensor | None = None, transposed_A: bool = False, transposed_B: bool = False
) -> Tensor:
    """`A @ B`, int32, of int8 matrices, a batch and a matrix, or two batches.

    Of two batches of rows, `[b, s, i]` and `[b, s, o]`, with an `out` of `[i, o]` it is the sum of `A.T @ B`.
    """
    _deprecated("igemm")
    shape = _shape(A, B, out, transposed_A, transposed_B)
    if len(shape) == 2 and A.dim() == 3:
        return _give(_product(A.flatten(0, 1).t(), B.flatten(0, 1)), out)
    return _give(_product(A.mT if transposed_A else A, B.mT if transposed_B else B), out)


def batched_igemm(
    A: Tensor, B: Tensor, out: Tensor | None = None, transposed_A: bool = False, transposed_B: bool = False
) -> Tensor:
    """`A @ B`, int32, of two batches of int8 matrices."""
    _deprecated("batched_igemm")
    if A.dim() != 3 or B.dim() != 3:
        raise ValueError(f"A and B must have three dimensions, got {list(A.shape)} and {list(B.shape)}")
    _shape(A, B, out, transposed_A, transposed_B)
    return _give(_product(A.mT if transposed_A else A, B.mT if transposed_B else B), out)
