"""The module classes. Those of 4 bits are halfbyte's, not subclasses: `isinstance` holds in both directions."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from halfbyte.nn import (
    Embedding4bit,
    EmbeddingFP4,
    EmbeddingNF4,
    Linear4bit,
    LinearFP4,
    LinearNF4,
    Params4bit,
)

from .._missing import missing_attribute, no_int8
from ..functional import QuantState
from ..optim import GlobalOptimManager

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
    "Params4bit",
    "QuantState",
    "StableEmbedding",
    "fix_4bit_weight_quant_state_from_module",
]

logger = logging.getLogger(__name__)


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


class _WideEmbedding(torch.nn.Embedding):
    """An embedding that starts from Xavier's uniform distribution and asks for 32-bit optimizer states."""

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
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            device=device,
            dtype=dtype,
        )
        GlobalOptimManager.get_instance().register_module_override(self, "weight", {"optim_bits": 32})

    def reset_parameters(self) -> None:
        """Draw the weights."""
        torch.nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()


class StableEmbedding(_WideEmbedding):
    """An embedding followed by a layer norm, which is computed in the default dtype."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *args: Any, **kwargs: Any) -> None:
        """The arguments of `torch.nn.Embedding`."""
        super().__init__(num_embeddings, embedding_dim, *args, **kwargs)
        self.norm = torch.nn.LayerNorm(embedding_dim, device=kwargs.get("device"))

    def forward(self, input: Tensor) -> Tensor:
        """Look rows up and normalize them."""
        rows = super().forward(input).to(torch.get_default_dtype())
        return self.norm(rows).to(self.weight.dtype)  # type: ignore[no-any-return]


class Embedding(_WideEmbedding):
    """`torch.nn.Embedding` that starts from Xavier's uniform distribution."""


class Int8Params(torch.nn.Parameter):
    """The weight of LLM.int8(). For `isinstance` alone: it cannot be made yet."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Int8Params:
        """Raise NotImplementedError."""
        no_int8("bitsandbytes.nn.Int8Params")


class Linear8bitLt(torch.nn.Linear):
    """The linear layer of LLM.int8(). For `isinstance` alone: it cannot be made yet."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Raise NotImplementedError."""
        no_int8("bitsandbytes.nn.Linear8bitLt")


class Embedding8bit(torch.nn.Embedding):
    """The embedding of LLM.int8(). For `isinstance` alone: it cannot be made yet."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Raise NotImplementedError."""
        no_int8("bitsandbytes.nn.Embedding8bit")


class OutlierAwareLinear(torch.nn.Linear):
    """A base class of experiments with LLM.int8(). For `isinstance` alone: it cannot be made yet."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Raise NotImplementedError."""
        no_int8("bitsandbytes.nn.OutlierAwareLinear")


__getattr__ = missing_attribute(__name__)
