"""`Recipe`: how the weight of a layer is packed, to 4 bits or to rows of 8, and what the layer then computes in."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from halfbyte.config import BitsAndBytesConfig
from halfbyte.nn import Embedding4bit, Embedding8bit, Int8Params, Linear4bit, Linear8bitLt, Params4bit

INT8 = "int8"
"""The `quant_type` of LLM.int8()."""

PACKED_LAYERS = (Linear4bit, Embedding4bit, Linear8bitLt, Embedding8bit)
"""The classes of layers that hold a packed weight."""

PackedParameter = Params4bit | Int8Params
PackedLinear = Linear4bit | Linear8bitLt
PackedEmbedding = Embedding4bit | Embedding8bit
PackedLayer = PackedLinear | PackedEmbedding


def bits_of(layer: nn.Module | Tensor) -> int:
    """Bits per value of a packed layer or weight: 4 or 8; 0 for anything else."""
    if isinstance(layer, Linear4bit | Embedding4bit | Params4bit):
        return 4
    return 8 if isinstance(layer, Linear8bitLt | Embedding8bit | Int8Params) else 0


def is_quantized(layer: PackedLayer) -> bool:
    """Whether a packed layer's weight holds codes: it does not before a module is first moved to a device.

    A layer that keeps its float weight and quantizes it in each forward (`has_fp16_weights`) has nothing to wait for.
    """
    if isinstance(layer, Linear4bit | Embedding4bit):
        return layer.quant_state is not None
    if isinstance(layer, Linear8bitLt) and layer.state.has_fp16_weights:
        return True
    return layer.weight.dtype is torch.int8


def scales_of(layer: nn.Module) -> list[Tensor]:
    """What is kept beside a packed weight; nothing for other layers."""
    if isinstance(layer, Linear4bit | Embedding4bit):
        return layer.quant_state.tensors() if layer.quant_state is not None else []
    scales = getattr(layer.weight, "SCB", None) if isinstance(layer, Linear8bitLt | Embedding8bit) else None
    if scales is None and isinstance(layer, Linear8bitLt):
        scales = layer.state.SCB
    return [] if scales is None else [scales]


def shape_of(weight: PackedParameter) -> tuple[int, ...]:
    """The shape of the tensor that was packed."""
    if isinstance(weight, Params4bit):
        state = weight.quant_state
        return tuple((state.shape if state is not None else None) or ())
    return tuple(weight.shape)


@dataclass(frozen=True)
class Recipe:
    """How layers are made.

    Attributes:
        quant_type: "nf4", "fp4" or "int8".
        nested: 4-bit: the scales are quantized too.
        storage: 4-bit: the dtype that the packed bytes are viewed as.
        compute_dtype: 4-bit: the dtype of products; None for the input's.
        blocksize: 4-bit: values per scale.
        threshold: 8-bit: columns of the input with a value of at least this are multiplied unquantized; 0.0 for none.
        has_fp16_weights: 8-bit: the layer keeps its float weight, and quantizes it in each forward.
    """

    quant_type: str
    nested: bool = False
    storage: torch.dtype = torch.uint8
    compute_dtype: torch.dtype | None = None
    blocksize: int = 64
    threshold: float = 6.0
    has_fp16_weights: bool = False

    @classmethod
    def from_config(cls, config: BitsAndBytesConfig, blocksize: int = 64) -> Recipe:
        """What a config asks for; its `quant_type` is that of layers that nothing else names."""
        storage, compute_dtype = config.bnb_4bit_quant_storage, config.compute_dtype()
        assert isinstance(storage, torch.dtype)
        assert compute_dtype is None or isinstance(compute_dtype, torch.dtype)
        return cls(
            quant_type=INT8 if config.load_in_8bit else config.bnb_4bit_quant_type,
            nested=config.bnb_4bit_use_double_quant,
            storage=storage,
            compute_dtype=compute_dtype,
            blocksize=blocksize,
            threshold=float(config.llm_int8_threshold),
            has_fp16_weights=config.llm_int8_has_fp16_weight,
        )

    def with_type(self, quant_type: str) -> Recipe:
        """The same with another `quant_type`."""
        return replace(self, quant_type=quant_type)

    def of(self, weight: PackedParameter) -> Recipe:
        """The same, but for a weight that is packed already."""
        if isinstance(weight, Int8Params):
            return replace(self, quant_type=INT8, has_fp16_weights=weight.has_fp16_weights)
        return replace(
            self,
            quant_type=weight.quant_type,
            nested=weight.compress_statistics,
            storage=weight.quant_storage,
            blocksize=weight.blocksize,
        )

    @property
    def codes_dtype(self) -> torch.dtype | None:
        """The dtype of a packed weight; None where the layer keeps its float weight."""
        if self.quant_type != INT8:
            return self.storage
        return None if self.has_fp16_weights else torch.int8

    def empty_linear(self, in_features: int, out_features: int, bias: bool) -> PackedLinear:
        """A linear layer on the meta device."""
        with torch.device("meta"):
            if self.quant_type == INT8:
                return Linear8bitLt(
                    in_features,
                    out_features,
                    bias=bias,
                    has_fp16_weights=self.has_fp16_weights,
                    threshold=self.threshold,
                )
            return Linear4bit(
                in_features,
                out_features,
                bias=bias,
                compute_dtype=self.compute_dtype,
                compress_statistics=self.nested,
                quant_type=self.quant_type,
                quant_storage=self.storage,
            )

    def empty_embedding(self, old: nn.Embedding, dtype: torch.dtype) -> PackedEmbedding:
        """An embedding on the meta device, of the sizes of `old`, that gives rows of this dtype."""
        new: PackedEmbedding
        with torch.device("meta"):
            if self.quant_type == INT8:
                new = Embedding8bit(old.num_embeddings, old.embedding_dim, dtype=dtype)
            else:
                new = Embedding4bit(
                    old.num_embeddings,
                    old.embedding_dim,
                    dtype=dtype,
                    quant_type=self.quant_type,
                    quant_storage=self.storage,
                )
        # The meta device has no say in these.
        new.padding_idx = old.padding_idx
        return new

    def parameter(self, dense: Tensor, requires_grad: bool = False) -> PackedParameter:
        """A float tensor as a parameter that `.to(device)` quantizes.

        `requires_grad` is for a weight that stays what it is (`has_fp16_weights`); packed ones have no gradient.
        """
        if self.quant_type == INT8:
            return Int8Params(
                dense,
                requires_grad=requires_grad and self.has_fp16_weights,
                has_fp16_weights=self.has_fp16_weights,
            )
        return Params4bit(
            dense,
            requires_grad=False,
            blocksize=self.blocksize,
            compress_statistics=self.nested,
            quant_type=self.quant_type,
            quant_storage=self.storage,
        )
