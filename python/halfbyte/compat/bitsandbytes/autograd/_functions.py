"""`matmul_4bit`, and the names of LLM.int8()'s product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbyte.ops.autograd import matmul_4bit

from .. import functional as F
from .._missing import missing_attribute, no_int8

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


class MatMul4Bit(torch.autograd.Function):
    """`matmul_4bit` in the form of an autograd function: for code that calls `apply`."""

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


class MatMul8bitLt(torch.autograd.Function):
    """LLM.int8()'s product; not in halfbyte yet."""

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        """Raise NotImplementedError."""
        no_int8("bitsandbytes.autograd._functions.MatMul8bitLt")


class MatMul8bitFp(torch.autograd.Function):
    """LLM.int8()'s product with a dequantized weight; not in halfbyte yet."""

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        """Raise NotImplementedError."""
        no_int8("bitsandbytes.autograd._functions.MatMul8bitFp")


class GlobalOutlierPooler:
    """Outlier columns common to several layers."""

    _instance: GlobalOutlierPooler | None = None
    outliers: set[int]
    model_dim: int | None

    def __init__(self) -> None:
        """Raise RuntimeError: there is one instance."""
        raise RuntimeError("Call get_instance() instead")

    def initialize(self) -> None:
        """Forget what was added."""
        self.outliers = set()
        self.model_dim = None

    @classmethod
    def get_instance(cls) -> GlobalOutlierPooler:
        """The one instance."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def add_outliers(self, outlier_idx: Tensor, feature_dim: int) -> None:
        """Add columns, unless the layer has another width than the first that added some."""
        if self.model_dim is None:
            self.model_dim = feature_dim
        if feature_dim == self.model_dim:
            self.outliers.update(outlier_idx.tolist())

    def get_current_outlier_idx(self) -> Tensor:
        """All that were added, int64."""
        return torch.tensor(sorted(self.outliers), dtype=torch.int64)


class MatmulLtState:
    """The state of LLM.int8()'s product. For `isinstance` alone: it cannot be made yet."""

    has_accumulated_gradients = False
    threshold = 0.0
    is_training = True
    has_fp16_weights = True
    use_pool = False

    def __init__(
        self,
        force_no_igemmlt: bool = False,
        CB: Tensor | None = None,
        SB: Tensor | None = None,
        SCB: Tensor | None = None,
        SBt: Tensor | None = None,
        CBt: Tensor | None = None,
        subB: Tensor | None = None,
        outlier_pool: GlobalOutlierPooler | None = None,
        idx: Tensor | None = None,
    ) -> None:
        """Raise NotImplementedError."""
        no_int8("bitsandbytes.MatmulLtState")


def matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """LLM.int8()'s product; not in halfbyte yet: raises NotImplementedError."""
    no_int8("bitsandbytes.matmul")


__getattr__ = missing_attribute(__name__)
