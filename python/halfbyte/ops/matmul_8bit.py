"""LLM.int8()'s product as bitsandbytes offers it: `matmul`, and the state that goes from one call to the next."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from halfbyte.ops import dispatch
from halfbyte.ops.autograd_8bit import product, trained_product
from halfbyte.ops.checks import FLOAT_DTYPES, DTypeError, check_out, check_tensor, names
from halfbyte.ops.checks_8bit import check_statistics, check_threshold


@dataclass(eq=False)
class MatmulLtState:
    """What a product with a weight of 8-bit rows knows from one call to the next.

    Attributes:
        CB: The weight's codes, int8 `[out_features, in_features]`.
        SCB: The largest magnitude of each of its rows, float32 `[out_features]`.
        threshold: From which magnitude on activations are outliers, whose columns are not quantized; 0 for none.
        has_fp16_weights: Whether the weight is a float tensor, which is quantized anew while training.
        is_training: Whether the next call is part of training.

    The others are there for code that was written for bitsandbytes; nothing here reads them.
    """

    force_no_igemmlt: bool = False

    CB: Tensor | None = None
    SB: Tensor | None = None
    SCB: Tensor | None = None

    SBt: Tensor | None = None
    CBt: Tensor | None = None

    subB: Tensor | None = None

    outlier_pool: Any = None
    has_accumulated_gradients = False
    threshold = 0.0
    idx: Tensor | None = None
    is_training = True
    has_fp16_weights = True
    use_pool = False

    # Version and address of the float weight that the codes were made from.
    _made_from = None

    def reset_grads(self) -> None:
        """Forget the weight: its codes and scales are taken, or made, anew."""
        self.CB = self.SB = self.SCB = self.SBt = self.CBt = self._made_from = None

    def __eq__(self, other: object) -> bool:
        """Whether both say the same; tensors by their values."""
        if not isinstance(other, MatmulLtState):
            return NotImplemented
        names = {*(field.name for field in fields(self)), *self.__dict__, *other.__dict__} - {"_made_from"}
        return all(_same(getattr(self, name, None), getattr(other, name, None)) for name in names)

    __hash__ = None  # type: ignore[assignment]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.to(a.device))
    return bool(a == b)


def quantize_float(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a float weight, which is rounded to float16 first."""
    codes, scales = dispatch.call("quantize_rows", weight.detach().to(torch.float16))
    return codes, scales


def codes_of(weight: Tensor, state: MatmulLtState) -> tuple[Tensor, Tensor]:
    """Codes and scales of a float weight: those in `state`, if they are still right, or new ones, which are put there.

    While a weight is trained they are made for each call, and afterwards when it has changed.
    """
    compiling = torch.compiler.is_compiling()
    # Compilers follow no versions of tensors.
    now = None if compiling or weight.is_inference() else (weight._version, weight.data_ptr())
    codes, scales = state.CB, state.SCB
    if codes is not None and scales is not None:
        if not state.has_fp16_weights:
            return codes, scales
        made_from = getattr(state, "_made_from", None)
        if not compiling and not state.is_training and (made_from is None or made_from == now):
            return codes, scales
    codes, scales = quantize_float(weight)
    if not compiling:
        state.reset_grads()
        state.CB, state.SCB = codes, scales
        state._made_from = now
    return codes, scales


def matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply by a weight of 8-bit rows, quantizing the rows of `A` too: `A @ W.T + bias` (arXiv 2208.07339).

    Args:
        A: float16, bfloat16 or float32 `[..., in_features]`, of any strides.
        B: The weight `[out_features, in_features]`: its codes, or a float tensor, which is quantized.
        out: Where to write the result; the gradient does not flow through it.
        state: Codes and scales of the weight (`CB`, `SCB`), and how to multiply. Those of a float `B` are stored in it:
            with `has_fp16_weights` they are made anew by each call while `is_training`, otherwise once.
        threshold: When positive, it becomes the state's: columns of `A` with a value of at least this magnitude are
            multiplied in the precision of `A`.
        bias: float16, bfloat16 or float32 `[out_features]`; added before the result is rounded.

    Returns:
        `[..., out_features]`, in the dtype of `A`. Gradients go to `A` and `bias`, and to a float `B`.

    Raises:
        TypeError: A wrong type or dtype. The message names the argument and the legal ones.
        ValueError: Shapes, devices or a threshold that do not fit.

    >>> import torch, halfbyte
    >>> x, w = torch.randn(2, 96), torch.randn(48, 96)
    >>> y = halfbyte.matmul(x, w, threshold=6.0)
    >>> torch.testing.assert_close(y, x @ w.T, atol=0.5, rtol=0.0)
    """
    check_tensor("A", A)
    check_tensor("B", B)
    check_threshold(threshold)
    state = MatmulLtState() if state is None else state
    if not isinstance(state, MatmulLtState):
        raise TypeError(f"state: {type(state).__name__} is not a MatmulLtState")
    check_threshold(state.threshold)
    threshold = float(threshold if threshold > 0 else state.threshold)
    if A.dtype not in FLOAT_DTYPES:
        raise DTypeError(f"A: dtype {A.dtype} is not one of {names(FLOAT_DTYPES)}")
    state.threshold = threshold
    codes, scales = state.CB, state.SCB
    if B.dtype is torch.int8:
        codes = B.detach() if codes is None else codes
        scales = getattr(B, "SCB", None) if scales is None else scales
        if scales is None:
            raise ValueError("state.SCB: None, but B is int8: its scales are missing, float32 [out_features]")
        check_statistics("state.SCB", scales, codes.shape[0], "B", B.device)
        result = product(A, codes, scales, bias, threshold)
    elif B.dtype not in FLOAT_DTYPES:
        raise DTypeError(f"B: dtype {B.dtype} is not torch.int8, or one of {names(FLOAT_DTYPES)}")
    else:
        codes, scales = codes_of(B, state)
        if B.requires_grad:
            result = trained_product(A, B, codes, scales, bias, threshold)
        else:
            result = product(A, codes, scales, bias, threshold)
    if out is None:
        return result
    check_out(out, result.shape, result.dtype, result.device)
    written: Tensor = out.copy_(result)
    return written
