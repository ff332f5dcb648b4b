"""What the 4-bit classes have to know of the joint ones, which `halfbyte.integrations.bitsandbytes` makes."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch

JOINT: dict[type, type] = {}
"""The joint class of a class; empty until there is a real bitsandbytes."""

STANDS_FOR = "_stands_for"
"""In a joint class, the class that it is the joint one of."""


def portable(cls: type) -> type:
    """The class to name in a pickle: that which a joint class stands for."""
    named: type = cls.__dict__.get(STANDS_FOR, cls)
    return named


def new_module(cls: type[torch.nn.Module]) -> torch.nn.Module:
    """An empty module of a class, as unpickling starts with; of the joint one where there is one."""
    made: Any = JOINT.get(cls, cls)
    module: torch.nn.Module = made.__new__(made)
    return module


def is_foreign(param: object, name: str = "Params4bit") -> bool:
    """Whether this is a parameter of the class `name` of bitsandbytes, and none of this package."""
    return any(
        cls.__name__ == name and cls.__module__.partition(".")[0] == "bitsandbytes" for cls in type(param).__mro__
    )


def foreign_parts(param: Any) -> tuple[torch.Tensor, dict[str, Any] | None]:
    """The packed bytes of a parameter of bitsandbytes, and its state as the entries of a state dict.

    The bytes are not copied. The state is None where the parameter is not quantized yet.
    """
    data, state = param.data, param.quant_state
    if state is None or not param.bnb_quantized:
        return data, None
    if getattr(state, "packing_format_for_cpu", False):
        # A forward pass on some CPUs has rearranged the bytes; their own function puts them back.
        modules = sys.modules[
            next(c.__module__ for c in type(param).__mro__ if c.__module__.startswith("bitsandbytes"))
        ]
        data, state = modules._convert_weight_packed_for_cpu_inverse(data, copy.copy(state))
    entries: dict[str, Any] = state.as_dict(packed=True)
    return data, entries
