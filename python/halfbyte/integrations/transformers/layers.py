"""Choose the layers of an empty model that are packed, and replace them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from halfbyte.models.layers import is_conv1d
from halfbyte.models.recipe import PackedLayer, Recipe
from halfbyte.models.replace import SOURCE_CLASS, SOURCE_DTYPE


def is_conv1d_layer(module: nn.Module) -> bool:
    """Whether this dense layer is a `Conv1D`, whose weight is `[in, out]`."""
    return any(is_conv1d(cls) for cls in type(module).__mro__)


def is_transposed(module: nn.Module) -> bool:
    """Whether this packed layer took the place of a `Conv1D`."""
    source = module.__dict__.get(SOURCE_CLASS)
    return isinstance(source, type) and any(is_conv1d(cls) for cls in source.__mro__)


def is_linear(module: nn.Module) -> bool:
    """Whether a load quantizes this layer: a plain `nn.Linear`, or a `Conv1D`."""
    return type(module) is nn.Linear or is_conv1d_layer(module)


def chosen(model: nn.Module, keep: Sequence[str]) -> list[str]:
    """Paths of the linear layers of a model that no name in `keep` covers, as transformers matches names."""
    return [
        name for name, module in model.named_modules() if is_linear(module) and should_convert_module(name, list(keep))
    ]


def without_effect(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The names in `names` that match no module, or modules around linear layers, but none of these."""
    modules = [(path, is_linear(module)) for path, module in model.named_modules() if path]
    linear = [path for path, is_one in modules if is_one]
    idle = []
    for name in names:
        matched = [(path, is_one) for path, is_one in modules if not should_convert_module(path, [name])]
        around = [f"{path}." for path, _ in matched]
        if any(is_one for _, is_one in matched):
            continue
        if not matched or any(path.startswith(start) for path in linear for start in around):
            idle.append(name)
    return idle


def put_packed(model: nn.Module, recipes: Mapping[str, Recipe], packed: bool) -> int:
    """Put a packed layer, without numbers, in the place of each layer named; returns how many.

    Args:
        model: On the meta device.
        recipes: How, by the paths of linear layers and, when `packed`, embeddings. Layers of other classes are left as
            they are.
        packed: Weights will come packed, and the parameter says so by its dtype.
    """
    count = 0
    for path, recipe in recipes.items():
        old = model.get_submodule(path)
        dense = old._parameters.get("weight")
        new: PackedLayer
        if is_linear(old):
            assert dense is not None
            in_features, out_features = dense.shape if is_conv1d_layer(old) else dense.shape[::-1]
            new = recipe.empty_linear(in_features, out_features, old._parameters.get("bias") is not None)
        elif packed and type(old) is nn.Embedding:
            assert dense is not None
            new = recipe.empty_embedding(old, dense.dtype)
        else:
            continue
        # A loader casts what it reads to the dtype found here.
        dtype = (recipe.codes_dtype if packed else None) or dense.dtype
        shape = new.weight.shape
        new.weight = recipe.parameter(torch.empty(shape, dtype=dtype, device="meta"))
        if old._parameters.get("bias") is not None:
            new.bias = old._parameters["bias"]  # type: ignore[assignment]
        new.__dict__[SOURCE_CLASS] = type(old)
        new.__dict__[SOURCE_DTYPE] = dense.dtype
        new.train(old.training)
        new.requires_grad_(False)
        model.set_submodule(path, new)
        count += 1
    return count
