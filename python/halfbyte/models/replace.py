"""Replace a module, keeping the hooks and attributes that torch, accelerate and users have added to it.

Hooks keep their handles (`handle.remove()` works afterwards), attributes, buffers and further parameters move, and the
bias stays the same parameter object. A module that several parents hold is replaced in all of them.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from halfbyte.models.recipe import (
    PACKED_LAYERS,
    PackedEmbedding,
    PackedLayer,
    PackedLinear,
    PackedParameter,
    Recipe,
    shape_of,
)
from halfbyte.nn import Embedding4bit, Int8Params, Linear4bit
from halfbyte.ops.checks import FLOAT_DTYPES

SOURCE_CLASS = "source_cls"
"""The attribute that holds the class of the module that was replaced; transformers sets the same."""

SOURCE_DTYPE = "source_dtype"
"""The attribute of an 8-bit layer that holds the dtype that its weight had; 4-bit weights know it themselves."""

_SOURCE_REQUIRES_GRAD = "source_requires_grad"
# accelerate rebinds these on the module that it hooks.
_BOUND = ("forward", "_old_forward", "_hf_hook")
_SPECIAL = ("_parameters", "_buffers", "_modules", *_BOUND)


@functools.cache
def _own_attributes() -> frozenset[str]:
    """What a packed layer has and a plain one has not."""
    packed: set[str] = set()
    with torch.device("meta"):
        for cls in PACKED_LAYERS:
            packed |= vars(cls(1, 1)).keys()
        plain = {*vars(nn.Linear(1, 1)), *vars(nn.Embedding(1, 1))}
    return frozenset(packed - plain | {SOURCE_CLASS, SOURCE_DTYPE, _SOURCE_REQUIRES_GRAD})


def to_linear(old: nn.Module, weight: PackedParameter, recipe: Recipe) -> PackedLinear:
    """A linear layer with this weight, which is packed, and all else of `old`, also one.

    Args:
        old: `nn.Linear`, a subclass, `Conv1D`, or a packed layer.
        weight: `[out, in]`.
        recipe: What the layer computes in. How the weight is packed, it says itself.
    """
    out_features, in_features = shape_of(weight)
    new = recipe.of(weight).empty_linear(in_features, out_features, old._parameters.get("bias") is not None)
    _become_packed(old, new, weight)
    return new


def to_embedding(old: nn.Embedding, weight: PackedParameter, dtype: torch.dtype, recipe: Recipe) -> PackedEmbedding:
    """An embedding with this weight, which is packed, and all else of `old`."""
    new = recipe.of(weight).empty_embedding(old, dtype)
    _become_packed(old, new, weight)
    return new


def _become_packed(old: nn.Module, new: PackedLayer, weight: PackedParameter) -> None:
    before = old._parameters.get("weight")
    new.weight = weight
    _take_over(old, new, leave=frozenset(vars(new)))
    if not isinstance(old, PACKED_LAYERS):
        new.__dict__[SOURCE_CLASS] = type(old)
        new.__dict__[_SOURCE_REQUIRES_GRAD] = before is None or before.requires_grad
        if before is not None and isinstance(weight, Int8Params):
            new.__dict__[SOURCE_DTYPE] = before.dtype


def dense_dtype(layer: PackedLayer) -> torch.dtype:
    """The dtype that a packed weight was made from, as far as it is known."""
    if isinstance(layer, Linear4bit | Embedding4bit):
        state = layer.quant_state
        return (state.dtype if state is not None else None) or torch.float32
    bias = layer._parameters.get("bias")
    if bias is not None and bias.dtype in FLOAT_DTYPES:
        return bias.dtype
    known = layer.__dict__.get(SOURCE_DTYPE)
    return known if known in FLOAT_DTYPES else torch.float32


def to_dense(old: PackedLayer, dtype: torch.dtype | None) -> nn.Module:
    """The dense layer that `old` came from: `nn.Linear`, `Conv1D`, a subclass, or `nn.Embedding`.

    Args:
        old: A layer whose weight is quantized.
        dtype: Of the weight; None for `dense_dtype`.
    """
    default = nn.Embedding if isinstance(old, nn.Embedding) else nn.Linear
    cls: type[nn.Module] = old.__dict__.get(SOURCE_CLASS, default)
    dense = old.dequantize(dense_dtype(old) if dtype is None else dtype)
    new = cls.__new__(cls)
    nn.Module.__init__(new)
    if not issubclass(cls, nn.Linear | nn.Embedding):
        # Conv1D: `[in, out]`, and other names for the two.
        new.nx, new.nf = old.in_features, old.out_features  # type: ignore[assignment]
        dense = dense.t().contiguous()
        leave = _own_attributes() | {"in_features", "out_features"}
    else:
        leave = _own_attributes()
    weight = nn.Parameter(dense, requires_grad=old.__dict__.get(_SOURCE_REQUIRES_GRAD, True))
    new.register_parameter("weight", weight)
    _take_over(old, new, leave)
    bias = new._parameters.get("bias")
    if bias is not None and bias.dtype != weight.dtype:
        # A product of two dtypes is an error in torch.
        bias.data = bias.data.to(weight.dtype)
    return new


def _take_over(old: nn.Module, new: nn.Module, leave: frozenset[str]) -> None:
    """Move everything from `old` to `new` but its weight and the attributes named."""
    weight = new._parameters["weight"]
    new.__dict__["_parameters"] = {
        name: weight if name == "weight" else value for name, value in old._parameters.items()
    }
    new.__dict__["_buffers"] = old._buffers
    new.__dict__["_modules"] = old._modules
    for name, value in vars(old).items():
        torchs_own = name in _MODULE_ATTRIBUTES
        if name not in _SPECIAL and (torchs_own or name not in leave):
            new.__dict__[name] = value
    for hook in new._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):
            setattr(hook, "module", weakref.ref(new))  # noqa: B010  (torch's wrapper has no type)


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


def replace(model: nn.Module, names: Iterable[str], new: nn.Module) -> nn.Module:
    """Put `new` in the place of the module at these paths; returns the model, which is `new` for the path ""."""
    for name in names:
        if name == "":
            old, model = model, new
        else:
            parent_name, _, attribute = name.rpartition(".")
            parent = model.get_submodule(parent_name)
            old = parent._modules[attribute]  # type: ignore[assignment]
            parent._modules[attribute] = new
        if old is not new and "_hf_hook" in old.__dict__:
            _rehook(old, new)
    return model


def _rehook(old: nn.Module, new: nn.Module) -> None:
    """Give `new` the hook that accelerate put on `old`: it wraps `forward`, so it cannot just be copied."""
    accelerate: Any = sys.modules["accelerate.hooks"]
    accelerate.add_hook_to_module(new, old.__dict__["_hf_hook"])
