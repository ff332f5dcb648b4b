"""Tensors of a checkpoint that hold all experts of a layer, for a model whose experts were taken apart: split.

Imports transformers: for functions that have a model of it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from halfbyte.models.experts import Fused, fused_as
from halfbyte.nn.experts import Experts4bit
from halfbyte.offline.transformers_names import plain


class Split(ConversionOps):
    """A fused parameter to the matrices of the experts, views of it."""

    def __init__(self, parts: Mapping[str, tuple[Fused, str]], transpose: bool, by_shape: bool) -> None:
        """Remember how the experts at each path were held.

        Args:
            parts: By path: how the module held its experts, and the name of the parameter.
            transpose: The file has matrices in the other order than the module had.
            by_shape: With `transpose`: only where the shape is not the module's.
        """
        self.parts = parts
        self.transpose = transpose
        self.by_shape = by_shape

    def __deepcopy__(self, memo: dict[int, Any]) -> Split:
        """Return this object: it holds no tensors, and transformers copies it for each key of a checkpoint."""
        return self

    def of(self, name: str) -> tuple[str, Fused, str]:
        """Path of the experts that a weight of the model belongs to, how they were held, and the parameter."""
        path = name.rsplit(".", 3)[0]
        if path not in self.parts:
            # transformers 5.0 names no layer.
            path = next(candidate for candidate in self.parts if name.startswith(f"{candidate}."))
        return path, *self.parts[path]

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Split one tensor; names are those in the model."""
        (value,) = input_dict.values()
        tensor: Tensor = value[0] if isinstance(value, list) else value
        path, how, parameter = self.of(full_layer_name)
        experts = model.get_submodule(path)
        expected = (experts.num_experts, *how.shape(parameter, experts))
        if self.transpose and tensor.dim() == 3 and not (self.by_shape and tuple(tensor.shape) == expected):
            tensor = tensor.transpose(1, 2)
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


@dataclass(frozen=True)
class Target:
    """What tensors that hold all experts are split to, for all layers that call it the same.

    Attributes:
        experts: Last part of the experts' path.
        parameter: The one that held the matrices.
        projection: The first that is made of it.
        split: How, and of which layers.
    """

    experts: str
    parameter: str
    projection: str
    split: Split


def targets(model: nn.Module, given: Iterable[Any]) -> list[Target]:
    """What is to be split of a checkpoint for a model whose experts were taken apart.

    Args:
        model: With experts that were taken apart.
        given: The converters of the model's architecture.
    """
    groups: dict[tuple[str, str, str, bool, bool], dict[str, tuple[Fused, str]]] = {}
    for path, experts in model.named_modules():
        how = fused_as(experts) if isinstance(experts, Experts4bit) else None
        if how is None:
            continue
        for parameter in (how.up, how.down):
            first = (
                next(name for name in experts.projections if name) if parameter == how.up else experts.projections[2]
            )
            transposes = [
                operation
                for entry in given
                if isinstance(entry, WeightConverter)
                and any(f"{path}.{parameter}".endswith(plain(pattern)) for pattern in entry.target_patterns)
                for operation in entry.operations
                if type(operation).__name__ == "Transpose"
            ]
            by_shape = any(getattr(operation, "check_dims", False) for operation in transposes)
            key = (path.rpartition(".")[2], parameter, first, len(transposes) % 2 == 1, by_shape)
            groups.setdefault(key, {})[path] = (how, parameter)
    return [
        Target(leaf, parameter, first, Split(parts, transpose, by_shape))
        for (leaf, parameter, first, transpose, by_shape), parts in groups.items()
    ]


class SplitConverter(WeightConverter):
    """Splits tensors of experts that were taken apart, and leaves those of others to transformers."""

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The name of the first matrix that is made of a tensor; or the name as it is, and None."""
        renamed: tuple[str, str | None] = super().rename_source_key(source_key)
        if renamed[1] is None:
            return renamed
        (split,) = self.operations
        assert isinstance(split, Split)
        path = source_key.rpartition(".")[0]
        # The prefix of the base model may be missing on either side.
        ours = any(f".{known}".endswith(f".{path}") or f".{path}".endswith(f".{known}") for known in split.parts)
        return renamed if ours else (source_key, None)


def split_converters(model: nn.Module, given: Iterable[Any]) -> list[WeightConverter]:
    """What splits tensors of a checkpoint that hold all experts: see `targets`."""
    return [
        # The whole name: `shared_experts.down_proj.weight` is another module's.
        SplitConverter(
            rf"(?<=\.){re.escape(target.experts)}\.{target.parameter}$",
            f"{target.experts}.0.{target.projection}.weight",
            operations=[target.split],
            **on_cpu(),
        )
        for target in targets(model, given)
    ]


def on_cpu() -> dict[str, bool]:
    """Arguments of a converter that has tensors as views of the file.

    Releases that do not know the argument put them where the model is.
    """
    return {"force_cpu": True} if "force_cpu" in inspect.signature(WeightConverter.__init__).parameters else {}
