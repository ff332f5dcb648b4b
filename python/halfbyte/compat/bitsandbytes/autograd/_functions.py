"""`matmul_4bit`, and the names of LLM.int8()'s product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbyte.ops.autograd import matmul_4bit

from .. import functional as F
from .._missing import int8_function, missing_attribute, no_int8

__all__ = [
    "F",
    "GlobalOutlierPooler",
    "MatMul4Bit",
    "MatMul8bitFp",
    "MatMul8bitLt",
    "MatmulLtState",
    "matmul",
    "matmul_4bit",
]


class _Product:
    """What code written for an autograd function calls on it."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Compute the product; differentiable."""
        raise NotImplementedError


class MatMul4Bit(_Product):
    """`matmul_4bit` in the form of an autograd function."""

    @classmethod
    def apply(
        cls,
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        quant_state: F.QuantState | None = None,
    ) -> Tensor:
        """`A @ dequantized B + bias`, as `matmul_4bit` computes it."""
        if quant_state is None:
            raise ValueError("quant_state must be the state that quantize_4bit returned, got None")
        return matmul_4bit(A, B, quant_state, out, bias)


class MatMul8bitLt(_Product):
    """LLM.int8()'s product; not in halfbyte yet."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Raise NotImplementedError."""
        no_int8("bitsandbytes.autograd._functions.MatMul8bitLt")


class MatMul8bitFp(_Product):
    """LLM.int8()'s product with a dequantized weight; not in halfbyte yet."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Raise NotImplementedError."""
        no_int8("bitsandbytes.autograd._functions.MatMul8bitFp")


class GlobalOutlierPooler:
    """Outlier columns that several layers share; not in halfbyte yet."""

    def __init__(self) -> None:
        """Raise RuntimeError: there is one instance."""
        raise RuntimeError("Call get_instance() instead")

    @classmethod
    def get_instance(cls) -> GlobalOutlierPooler:
        """Raise NotImplementedError."""
        no_int8("bitsandbytes.autograd._functions.GlobalOutlierPooler")


class MatmulLtState:
    """The state of LLM.int8()'s product. For `isinstance` alone: it cannot be made yet."""

    has_accumulated_gradients = False
    threshold = 0.0
    is_training = True
    has_fp16_weights = True
    use_pool = False
    CB: torch.Tensor | None = None
    SCB: torch.Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Raise NotImplementedError."""
        no_int8("bitsandbytes.MatmulLtState")


matmul = int8_function("bitsandbytes.matmul")

__getattr__ = missing_attribute(__name__)
