"""Tensors of a checkpoint that hold all experts of a layer, for a model whose experts were taken apart: split.

Imports transformers: for functions that have a model of it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from halfbyte.models.experts import Fused, fused_as
from halfbyte.nn.experts import Experts4bit
from halfbyte.offline.transformers_names import plain


class Split(ConversionOps):
    """A fused parameter to the matrices of the experts, views of it."""

    def __init__(self, parts: Mapping[str, tuple[Fused, str]], transpose: bool) -> None:
        """Remember how the experts at each path were held.

        Args:
            parts: By path: how the module held its experts, and the name of the parameter.
            transpose: The file has matrices in the other order than the module had.
        """
        self.parts = parts
        self.transpose = transpose

    def __deepcopy__(self, memo: dict[int, Any]) -> Split:
        """Return this object: it holds no tensors, and transformers copies it for each key of a checkpoint."""
        return self

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Split one tensor; names are those in the model."""
        (value,) = input_dict.values()
        tensor: Tensor = value[0] if isinstance(value, list) else value
        path = full_layer_name.rsplit(".", 3)[0]
        if path not in self.parts:
            # transformers 5.0 names no layer.
            path = next(candidate for candidate in self.parts if full_layer_name.startswith(f"{candidate}."))
        how, parameter = self.parts[path]
        experts = model.get_submodule(path)
        if self.transpose:
            tensor = tensor.transpose(1, 2)
        expected = (experts.num_experts, *how.shape(parameter, experts))
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{path}.{parameter}: the checkpoint holds {list(tensor.shape)}, the model has {list(expected)}"
            )
        found = {}
        for index, matrices in enumerate(how.split(parameter, tensor)):
            for place, matrix in matrices.items():
                layer = experts.get_submodule(f"{index}.{experts.projections[place]}")
                # Packing reads any order. A layer that stays in 16 bits keeps the tensor, which is saved one day.
                weight = matrix.contiguous() if type(layer) is nn.Linear else matrix
                found[f"{path}.{index}.{experts.projections[place]}.weight"] = weight
        return found


def split_converters(model: nn.Module, given: Iterable[Any]) -> list[WeightConverter]:
    """What splits tensors of a checkpoint that hold all experts.

    Args:
        model: With experts that were taken apart.
        given: The converters of the model's architecture.
    """
    groups: dict[tuple[str, str, bool], dict[str, tuple[Fused, str]]] = {}
    for path, experts in model.named_modules():
        how = fused_as(experts) if isinstance(experts, Experts4bit) else None
        if how is None:
            continue
        for parameter in (how.up, how.down):
            first = (
                next(name for name in experts.projections if name) if parameter == how.up else experts.projections[2]
            )
            target = path.rpartition(".")[2]
            transpose = any(
                any(f"{path}.{parameter}".endswith(plain(pattern)) for pattern in entry.target_patterns)
                and sum(type(operation).__name__ == "Transpose" for operation in entry.operations) % 2
                for entry in given
                if isinstance(entry, WeightConverter)
            )
            # The whole name: `shared_experts.down_proj.weight` is another module's.
            source = rf"(?<=\.){re.escape(target)}\.{parameter}$"
            key = (source, f"{target}.0.{first}.weight", transpose)
            groups.setdefault(key, {})[path] = (how, parameter)
    # On the CPU a tensor is a view of the file. Releases that do not know the argument put it where the model is.
    more = {"force_cpu": True} if "force_cpu" in inspect.signature(WeightConverter.__init__).parameters else {}
    return [
        WeightConverter(source, target, operations=[Split(parts, transpose)], **more)
        for (source, target, transpose), parts in groups.items()
    ]
