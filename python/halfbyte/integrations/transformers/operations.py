"""What becomes of a tensor on its way from a checkpoint into a model: quantized, or put together from its parts.

transformers copies an operation, and with it everything that it refers to, for each key of a checkpoint; these return
themselves instead. Operations of other releases are called with other keywords, hence `**kwargs`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from halfbyte.config import BitsAndBytesConfig
from halfbyte.integrations.transformers.layers import is_transposed
from halfbyte.models import packed
from halfbyte.models.load import layer_shape
from halfbyte.models.recipe import PACKED_LAYERS, PackedLayer, PackedParameter, Recipe, bits_of, shape_of
from halfbyte.nn import Params4bit
from halfbyte.state import PACKED_KEYS, TENSOR_KEYS

WEIGHT = "weight"
# The weight itself comes last: older releases take the first pattern that matches.
SERIALIZED = [
    *(f"{WEIGHT}.{key}" for key in (*reversed(TENSOR_KEYS), *PACKED_KEYS)),
    *reversed(packed.KEYS_8BIT),
    WEIGHT,
]
"""Names of one packed weight and of what is saved beside it, of 4 bits or of 8."""


class Quantizer(Protocol):
    """What the operations ask of the quantizer that made them."""

    config: BitsAndBytesConfig
    recipe: Recipe
    problems: list[str]
    own: frozenset[str]

    def param_needs_quantization(self, model: Any, param_name: str) -> bool:
        """Whether this is the dense weight of a packed layer."""

    def place(self, name: str, module: nn.Module, weight: PackedParameter) -> PackedParameter:
        """Prepare the module for its weight."""


class NotFiniteError(ValueError):
    """A weight has values that cannot be quantized to 8 bits."""


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
        """Quantize the weights of packed layers among `input_dict`, by their names in the model."""
        made: dict[str, Any] = {}
        for name, value in input_dict.items():
            tensor: Tensor = value[0] if isinstance(value, list) else value
            if not self.hf_quantizer.param_needs_quantization(model, name):
                made[name] = tensor
                continue
            module = model.get_submodule(name.rpartition(".")[0])
            try:
                weight = quantize(module, tensor, name, self.hf_quantizer.recipe)
            except NotFiniteError as error:
                # transformers would say no more than that something went wrong. The load is stopped at its end.
                self.hf_quantizer.problems.append(str(error))
                weight = self.hf_quantizer.recipe.parameter(torch.zeros(layer_shape(module)))
            made[name] = self.hf_quantizer.place(name, module, weight)
        return made


class Gather(WeightConverter):
    """Brings the parts of one packed weight together, by whole names.

    transformers searches for patterns, and finds `weight` or `SCB` in the names of modules too: in `reweight.weight`.
    """

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The name of the weight that a tensor belongs to, and what it is; or the name as it is, and None."""
        if source_key in self._own():
            return source_key, None
        for part in self.source_patterns:
            if f".{source_key}".endswith(f".{part}"):
                # transformers keeps account of converters that were of use.
                self._was_used = True
                return source_key.removesuffix(part) + WEIGHT, part
        return source_key, None

    def _own(self) -> Collection[str]:
        """What is called as a part of a packed weight is, and is a tensor of its own."""
        (operation,) = self.operations
        assert isinstance(operation, Operation)
        return operation.hf_quantizer.own


class Deserialize(Operation):
    """A packed weight and its scales, as they are saved, to the parameter of a packed layer."""

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        """Put one weight together. A tensor that comes alone is not packed, and returned as it is."""
        parts = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        module = model.get_submodule(full_layer_name.rpartition(".")[0])
        if set(parts) == {WEIGHT}:
            return {WEIGHT: self._alone(full_layer_name, module, parts[WEIGHT])}
        weight = parts.pop(WEIGHT, None)
        if weight is None:
            raise ValueError(
                f"{full_layer_name}: missing, but {', '.join(sorted(parts))} are in the checkpoint: it is incomplete"
            )
        bits = 8 if packed.SCB in parts else 4
        try:
            made = packed.parameter(bits, weight, {key.removeprefix(f"{WEIGHT}."): v for key, v in parts.items()})
        except (TypeError, ValueError) as error:
            raise type(error)(f"{full_layer_name}: {error}") from error
        if not isinstance(module, PACKED_LAYERS):
            # Its class reads the weight with code of its own.
            return {WEIGHT: packed.dense(made, module.weight.dtype)}
        _check_shape(full_layer_name, module, shape_of(made))
        module._is_hf_initialized = True  # type: ignore[assignment]
        return {WEIGHT: self.hf_quantizer.place(full_layer_name, module, made)}

    def _alone(self, name: str, module: nn.Module, tensor: Tensor) -> Tensor:
        """A weight without parts: dense, of a layer that keeps its float weight or of one that is none of ours."""
        if self.hf_quantizer.recipe.has_fp16_weights and bits_of(module) == 8:
            return quantize(module, tensor, name, self.hf_quantizer.recipe)
        return tensor


def quantize(module: nn.Module, tensor: Tensor, name: str, recipe: Recipe) -> PackedParameter:
    """Quantize the dense weight of a packed layer on the device that it is on.

    Args:
        module: The layer.
        tensor: float16, bfloat16 or float32, `[out, in]`, or `[in, out]` where the layer stands for a `Conv1D`.
        name: For errors.
        recipe: How.

    Raises:
        NotFiniteError: For 8 bits: a value is not finite in float16.
        ValueError: Shapes disagree, or the dtype is none of the three.
    """
    assert isinstance(module, PACKED_LAYERS)
    if is_transposed(module):
        tensor = tensor.t()
    _check_shape(name, module, tuple(tensor.shape))
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(
            f"{name}: dtype must be one of torch.float16, torch.bfloat16, torch.float32, got {tensor.dtype}"
        )
    made = recipe.parameter(tensor.detach())
    if isinstance(made, Params4bit):
        # Told of its state, the layer needs no other sign that it is quantized.
        made.module = module
    try:
        made = made.to(tensor.device)
    except ValueError as error:
        raise NotFiniteError(f"{name}: {str(error).removeprefix('weight: ')}") from error
    module._is_hf_initialized = True  # type: ignore[assignment]
    return made


def _check_shape(name: str, module: PackedLayer, shape: tuple[int, ...]) -> None:
    expected = layer_shape(module)
    if shape != expected:
        raise ValueError(f"{name}: the checkpoint holds a weight {list(shape)}, the model has {list(expected)}")
