"""Experts of a Mixture-of-Experts model that is being loaded: taken apart, so that each matrix is packed by itself.

transformers merges the experts of a checkpoint into one tensor for each projection, by converters of its own, or finds
them merged. For a model whose experts were taken apart, the former tensors are loaded as they are in the file, and the
latter are split.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import Transpose, WeightConverter

from halfbyte.integrations.transformers.operations import Operation
from halfbyte.models.experts import Fused, Names, fused
from halfbyte.models.transformers_experts import plain


class Split(Operation):
    """A fused parameter to the matrices of the experts, views of it."""

    def __init__(self, hf_quantizer: Any, parts: Mapping[str, tuple[Fused, bool, Names]], transpose: bool) -> None:
        """Remember how the experts at each path were held.

        Args:
            hf_quantizer: As for all operations.
            parts: By path: how the module held them, whether this is about the up projection, and the names.
            transpose: The file has matrices in the other order than the module had.
        """
        super().__init__(hf_quantizer)
        self.parts = parts
        self.transpose = transpose

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        """Split one tensor; names are those in the model."""
        (value,) = input_dict.values()
        tensor: Tensor = value[0] if isinstance(value, list) else value
        path = full_layer_name.rsplit(".", 3)[0]
        how, is_up, names = self.parts[path]
        if self.transpose:
            tensor = tensor.transpose(1, 2)
        return {
            f"{path}.{index}.{names[place]}.weight": matrix
            for index, matrices in enumerate(how.split(how.up if is_up else how.down, tensor))
            for place, matrix in matrices.items()
        }


def converters(
    hf_quantizer: Any, before: Mapping[str, nn.Module], model: nn.Module, given: Iterable[Any]
) -> list[WeightConverter]:
    """What splits tensors of a checkpoint that hold all experts.

    Args:
        hf_quantizer: For the operations.
        before: The modules that were taken apart, by path.
        model: Which has the parts.
        given: The converters of the model's architecture.
    """
    groups: dict[tuple[str, str, bool], dict[str, tuple[Fused, bool, Names]]] = {}
    for path, module in before.items():
        how = fused(module)
        assert how is not None
        names: Names = model.get_submodule(path).projections  # type: ignore[assignment]
        for parameter in (how.up, how.down):
            is_up = parameter == how.up
            first = names[0 if how.gated else 1] if is_up else names[2]
            suffix = path.rpartition(".")[2]
            transpose = any(
                isinstance(entry, WeightConverter)
                and any(f"{path}.{parameter}".endswith(plain(target)) for target in entry.target_patterns)
                and sum(isinstance(operation, Transpose) for operation in entry.operations) % 2
                for entry in given
            )
            key = (f"{suffix}.{parameter}", f"{suffix}.0.{first}.weight", bool(transpose))
            groups.setdefault(key, {})[path] = (how, is_up, names)
    keywords = inspect.signature(WeightConverter.__init__).parameters
    more = {"force_cpu": True} if "force_cpu" in keywords else {}
    return [
        WeightConverter(source, target, operations=[Split(hf_quantizer, parts, transpose)], **more)
        for (source, target, transpose), parts in groups.items()
    ]
