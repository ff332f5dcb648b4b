"""What becomes of a tensor on its way from a checkpoint into a model: quantized, or put together from its parts.

transformers copies an operation, and with it everything that it refers to, for each key of a checkpoint; these return
themselves instead. Operations of other releases are called with other keywords, hence `**kwargs`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from halfbyte.config import BitsAndBytesConfig
from halfbyte.functional import dequantize_4bit
from halfbyte.integrations.transformers.layers import is_transposed
from halfbyte.models.load import float_parts
from halfbyte.nn import Params4bit
from halfbyte.nn._quantized import Quantized
from halfbyte.state import PACKED_KEYS, TENSOR_KEYS, QuantState

WEIGHT = "weight"
# The weight itself comes last: older releases take the first pattern that matches.
SERIALIZED = [f"{WEIGHT}.{key}" for key in (*reversed(TENSOR_KEYS), *PACKED_KEYS)] + [WEIGHT]
"""Names of one packed weight and of what is saved beside it."""


class Quantizer(Protocol):
    """What the operations ask of the quantizer that made them."""

    config: BitsAndBytesConfig

    def param_needs_quantization(self, model: Any, param_name: str) -> bool:
        """Whether this is the dense weight of a 4-bit layer."""

    def place(self, name: str, module: nn.Module, weight: Params4bit) -> Params4bit:
        """Prepare the module for its weight."""


class Operation(ConversionOps):
    """An operation of this package; models do not keep it for saving."""

    def __init__(self, hf_quantizer: Quantizer) -> None:
        """Remember the quantizer, under the name by which transformers knows not to cast the tensors."""
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> Operation:
        """Return this object: it holds no tensors."""
        return self


class PassOn(Operation):
    """Nothing; its converter makes tensors arrive on the CPU, where they are views of the file."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the tensors as they came."""
        return input_dict


class Quantize(Operation):
    """A 16- or 32-bit weight to a packed one, where it is."""

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Quantize the weights of 4-bit layers among `input_dict`, by their names in the model."""
        made: dict[str, Any] = {}
        for name, value in input_dict.items():
            tensor: Tensor = value[0] if isinstance(value, list) else value
            if not self.hf_quantizer.param_needs_quantization(model, name):
                made[name] = tensor
                continue
            module = model.get_submodule(name.rpartition(".")[0])
            made[name] = self.hf_quantizer.place(name, module, quantize(module, tensor, name, self.hf_quantizer.config))
        return made


class Deserialize(Operation):
    """A packed weight and its scales, as they are saved, to the parameter of a 4-bit layer."""

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        """Put one weight together. A tensor that comes alone is not packed, and returned as it is."""
        parts = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        module = model.get_submodule(full_layer_name.rpartition(".")[0])
        if set(parts) == {WEIGHT}:
            return {WEIGHT: parts[WEIGHT]}
        weight = parts.pop(WEIGHT, None)
        if weight is None:
            raise ValueError(
                f"{full_layer_name}: missing, but {', '.join(sorted(parts))} are in the checkpoint: it is incomplete"
            )
        stats = float_parts({key.removeprefix(f"{WEIGHT}."): value for key, value in parts.items()})
        try:
            if not isinstance(module, Quantized):
                # Its class reads the weight with code of its own.
                return {WEIGHT: dequantize_4bit(weight, QuantState.from_dict(stats))}
            packed = Params4bit.from_prequantized(weight, stats, module=module)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{full_layer_name}: {error}") from error
        state, expected = packed.quant_state, module._weight_shape()
        assert state is not None
        if tuple(state.shape or ()) != expected:
            raise ValueError(
                f"{full_layer_name}: the checkpoint holds a weight {list(state.shape or ())}, "
                f"the model has {list(expected)}"
            )
        module._is_hf_initialized = True  # type: ignore[assignment]
        return {WEIGHT: self.hf_quantizer.place(full_layer_name, module, packed)}


def quantize(module: nn.Module, tensor: Tensor, name: str, config: BitsAndBytesConfig) -> Params4bit:
    """Quantize the dense weight of a 4-bit layer on the device that it is on.

    Args:
        module: The layer.
        tensor: float16, bfloat16 or float32, `[out, in]`, or `[in, out]` where the layer stands for a `Conv1D`.
        name: For errors.
        config: How.

    Raises:
        ValueError: Shapes disagree, or the dtype is none of the three.
    """
    assert isinstance(module, Quantized)
    if is_transposed(module):
        tensor = tensor.t()
    if tuple(tensor.shape) != module._weight_shape():
        raise ValueError(
            f"{name}: the checkpoint holds a weight {list(tensor.shape)}, the model has {list(module._weight_shape())}"
        )
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(
            f"{name}: dtype must be one of torch.float16, torch.bfloat16, torch.float32, got {tensor.dtype}"
        )
    made = Params4bit(
        tensor.detach(),
        requires_grad=False,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
        quant_storage=module.quant_storage,
        module=module,
    ).to(tensor.device)
    module._is_hf_initialized = True  # type: ignore[assignment]
    return made
