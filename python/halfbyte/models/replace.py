"""Replace a module, keeping the hooks and attributes that torch, accelerate and users have added to it.

Hooks keep their handles (`handle.remove()` works afterwards), attributes, buffers and further parameters move, and the
bias stays the same parameter object. A module that several parents hold is replaced in all of them.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from halfbyte.nn import Embedding4bit, Linear4bit, Params4bit

SOURCE_CLASS = "source_cls"
"""The attribute that holds the class of the module that was replaced; transformers sets the same."""

_SOURCE_REQUIRES_GRAD = "source_requires_grad"
# accelerate rebinds these on the module that it hooks.
_BOUND = ("forward", "_old_forward", "_hf_hook")
_SPECIAL = ("_parameters", "_buffers", "_modules", *_BOUND)


def _own_attributes() -> frozenset[str]:
    """What a 4-bit layer has and a plain one has not."""
    with torch.device("meta"):
        packed = {*vars(Linear4bit(1, 1)), *vars(Embedding4bit(1, 1))}
        plain = {*vars(nn.Linear(1, 1)), *vars(nn.Embedding(1, 1))}
    return frozenset(packed - plain | {SOURCE_CLASS, _SOURCE_REQUIRES_GRAD})


def empty_linear4bit(
    old: nn.Module,
    in_features: int,
    out_features: int,
    *,
    compute_dtype: torch.dtype | None,
    nested: bool,
    quant_type: str,
    storage: torch.dtype,
) -> Linear4bit:
    """A `Linear4bit` on the meta device, with a bias if `old`, a linear layer, has one."""
    with torch.device("meta"):
        return Linear4bit(
            in_features,
            out_features,
            bias=old._parameters.get("bias") is not None,
            compute_dtype=compute_dtype,
            compress_statistics=nested,
            quant_type=quant_type,
            quant_storage=storage,
        )


def to_linear4bit(
    old: nn.Module, weight: Params4bit, in_features: int, out_features: int, compute_dtype: torch.dtype | None
) -> Linear4bit:
    """A `Linear4bit` with this weight, which is packed, and all else of `old`, a linear layer."""
    new = empty_linear4bit(
        old,
        in_features,
        out_features,
        compute_dtype=compute_dtype,
        nested=weight.compress_statistics,
        quant_type=weight.quant_type,
        storage=weight.quant_storage,
    )
    _become_packed(old, new, weight)
    return new


def to_embedding4bit(old: nn.Embedding, weight: Params4bit, dtype: torch.dtype) -> Embedding4bit:
    """An `Embedding4bit` with this weight, which is packed, and all else of `old`."""
    with torch.device("meta"):
        new = Embedding4bit(
            old.num_embeddings,
            old.embedding_dim,
            dtype=dtype,
            quant_type=weight.quant_type,
            quant_storage=weight.quant_storage,
        )
    # The meta device has no say in these.
    new.padding_idx = old.padding_idx
    _become_packed(old, new, weight)
    return new


def _become_packed(old: nn.Module, new: Linear4bit | Embedding4bit, weight: Params4bit) -> None:
    before = old._parameters.get("weight")
    new.weight = weight
    weight.module = new
    new.quant_state = weight.quant_state
    _take_over(old, new, leave=frozenset(vars(new)))
    if not isinstance(old, Linear4bit | Embedding4bit):
        new.__dict__[SOURCE_CLASS] = type(old)
        new.__dict__[_SOURCE_REQUIRES_GRAD] = before is None or before.requires_grad


def to_dense(old: Linear4bit | Embedding4bit, dtype: torch.dtype | None) -> nn.Module:
    """The dense layer that `old` came from: `nn.Linear`, `Conv1D`, a subclass, or `nn.Embedding`."""
    default = nn.Embedding if isinstance(old, nn.Embedding) else nn.Linear
    cls: type[nn.Module] = old.__dict__.get(SOURCE_CLASS, default)
    dense = old.dequantize(dtype)
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
