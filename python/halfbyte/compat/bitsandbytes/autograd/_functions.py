"""`matmul_4bit`, and LLM.int8()'s product."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.ops import matmul_8bit
from halfbyte.ops.autograd import matmul_4bit
from halfbyte.ops.autograd_8bit import dense_product
from halfbyte.ops.matmul_8bit import MatmulLtState

from .. import functional as F
from .._missing import missing_attribute

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
    """LLM.int8()'s product in the form of an autograd function: for code that calls `apply`."""

    @classmethod
    def apply(
        cls,
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        state: MatmulLtState | None = None,
    ) -> Tensor:
        """`A @ B.T + bias`, as `matmul` computes it."""
        return matmul_8bit.matmul(A, B, out, state, bias=bias)


class MatMul8bitFp(torch.autograd.Function):
    """The product with a weight of 8-bit rows that is dequantized, likewise: `A` is not quantized."""

    @classmethod
    def apply(
        cls,
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        state: MatmulLtState | None = None,
    ) -> Tensor:
        """`A @ dequantized B.T + bias`."""
        state = MatmulLtState() if state is None else state
        if B.dtype is not torch.int8:
            codes, scales = matmul_8bit.codes_of(B, state)
            if B.requires_grad:
                # The values are those of the codes, the gradient is that of B.
                weight = F.int8_vectorwise_dequant(codes, scales) + (B - B.detach()).float()
                return torch.nn.functional.linear(A, weight.to(A.dtype), None if bias is None else bias.to(A.dtype))
            return dense_product(A, codes, scales, bias)
        if state.SCB is None:
            raise ValueError("state.SCB must be the scales of B, which is int8, got None")
        return dense_product(A, B.detach() if state.CB is None else state.CB, state.SCB, bias)


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


def matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """LLM.int8()'s product, `halfbyte.matmul`; on a CPU, `A` is not quantized while `state.is_training`."""
    state = MatmulLtState() if state is None else state
    if threshold > 0.0:
        state.threshold = threshold
    if state.is_training and A.device.type == "cpu":
        return MatMul8bitFp.apply(A, B, out, bias, state)
    return matmul_8bit.matmul(A, B, out, state, bias=bias)


__getattr__ = missing_attribute(__name__)
