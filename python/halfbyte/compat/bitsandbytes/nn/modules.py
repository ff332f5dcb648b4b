"""The module classes. The quantized ones are halfbyte's own, not subclasses, so `isinstance` works both ways."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from halfbyte.nn import (
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    Int8Params,
    Linear4bit,
    Linear8bitLt,
    LinearFP4,
    LinearNF4,
    Params4bit,
)

from .._missing import missing_attribute
from ..functional import QuantState
from ..optim import GlobalOptimManager
from ..utils import INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING, OutlierTracer

__all__ = [
    "Embedding",
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "OutlierAwareLinear",
    "OutlierTracer",
    "Params4bit",
    "QuantState",
    "StableEmbedding",
    "fix_4bit_weight_quant_state_from_module",
    "maybe_rearrange_weight",
]

logger = logging.getLogger(__name__)

# What code written for bitsandbytes finds after a forward.
Linear4bit._casts_bias = Linear8bitLt._casts_bias = True
# On a CPU, bitsandbytes quantizes inputs in evaluation alone.
Linear8bitLt._trains_dense_on_cpu = True
# What such code relies on to be refused.
Linear8bitLt._loads_codes_early = False


def fix_4bit_weight_quant_state_from_module(module: Embedding4bit | Linear4bit) -> None:
    """Give the weight back the state that its module kept, after something replaced the weight's tensor.

    Raises:
        ValueError: Neither the weight nor the module has a state, and the weight is not packed.
    """
    weight = module.weight
    if getattr(weight, "quant_state", None) is not None:
        return
    state = getattr(module, "quant_state", None)
    if state is None:
        logger.warning("%s has no quantization state yet; move it to a device first", type(module).__name__)
    if weight.dim() != 2 or weight.shape[1] != 1:
        raise ValueError(f"weight must be packed, of shape [bytes, 1], got shape {list(weight.shape)}")
    if not isinstance(weight, Params4bit):
        module.weight = weight = Params4bit(
            weight.data, quant_state=state, quant_storage=weight.dtype, bnb_quantized=True, module=module
        )
    weight.quant_state = state


def maybe_rearrange_weight(
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Take the entry `weight_format` of an 8-bit layer out of a state dict.

    Raises:
        ValueError: The weight is not in rows, the only format that there still is.
    """
    if state_dict.get(f"{prefix}weight") is None:
        return
    found = state_dict.pop(f"{prefix}weight_format", "row")
    if isinstance(found, Tensor):
        found = found.item()
    name = INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING.get(found, found)
    if name != "row":
        raise ValueError(f"{prefix}weight_format must be 'row' (0), got {name!r}")


def _ask_for_32_bits(module: torch.nn.Embedding) -> None:
    """Have optimizers keep 32-bit states for the weight."""
    GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})


def _draw(module: torch.nn.Embedding) -> None:
    """Weights from Xavier's uniform distribution."""
    torch.nn.init.xavier_uniform_(module.weight)
    module._fill_padding_idx_with_zero()


class StableEmbedding(torch.nn.Embedding):
    """An embedding followed by a layer norm, which is computed in the default dtype.

    It starts from Xavier's uniform distribution, and asks for 32-bit optimizer states.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """The arguments of `torch.nn.Embedding`."""
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.norm = torch.nn.LayerNorm(embedding_dim, device=device)
        _ask_for_32_bits(self)

    def reset_parameters(self) -> None:
        """Draw the weights."""
        _draw(self)

    def forward(self, input: Tensor) -> Tensor:
        """Look rows up and normalize them."""
        rows = super().forward(input).to(torch.get_default_dtype())
        return self.norm(rows).to(self.weight.dtype)  # type: ignore[no-any-return]


class Embedding(torch.nn.Embedding):
    """`torch.nn.Embedding` that starts from Xavier's uniform distribution, and asks for 32-bit optimizer states."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        """The arguments of `torch.nn.Embedding`, but for `dtype`."""
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight,
            device=device,
        )  # fmt: skip
        _ask_for_32_bits(self)

    def reset_parameters(self) -> None:
        """Draw the weights."""
        _draw(self)


class OutlierAwareLinear(torch.nn.Linear):
    """A linear layer that quantizes its weight at its first forward pass, in view of its outlier columns.

    A base class for experiments: `quantize_weight` and `forward_with_outliers` are for derived classes to write.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
    ) -> None:
        """The arguments of `torch.nn.Linear`."""
        super().__init__(input_features, output_features, bias, device)
        self.outlier_dim: Tensor | None = None
        self.is_quantized = False

    def forward_with_outliers(self, x: Tensor, outlier_idx: Tensor) -> Tensor:
        """The product, given the outlier columns; a derived class has it."""
        raise NotImplementedError(f"{type(self).__name__} must have a method forward_with_outliers(x, outlier_idx)")

    def quantize_weight(self, w: Tensor, outlier_idx: Tensor) -> Tensor:
        """What takes the place of the weight; a derived class has it."""
        raise NotImplementedError(f"{type(self).__name__} must have a method quantize_weight(w, outlier_idx)")

    def forward(self, x: Tensor) -> None:  # type: ignore[override]
        """Find the outlier columns and quantize the weight, once. As in bitsandbytes, nothing is returned."""
        if self.outlier_dim is None:
            tracer = OutlierTracer.get_instance()
            if not tracer.is_initialized():
                logger.warning("call OutlierTracer.initialize(model) before an OutlierAwareLinear is used")
            self.outlier_dim = tracer.get_outliers(self.weight)
        if not self.is_quantized:
            weight = self.quantize_weight(self.weight, self.outlier_dim)
            self.weight.data.copy_(weight)
            self.is_quantized = True


__getattr__ = missing_attribute(__name__)
