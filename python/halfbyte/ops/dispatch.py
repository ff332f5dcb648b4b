"""The one way to call an operation: straight to a device's kernels where that is right, else by torch's dispatcher.

A call through the dispatcher costs more than a small product. It is needed where something listens, traces or
transforms (compilers, tracers, dispatch and function modes, `torch.func`), where tensors are of other classes or lazily
negated views, and where a derivative is to be taken. Whether that is so is asked here and nowhere else.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from halfbyte.backends import cpu
from halfbyte.ops._torch_internals import (
    dispatch_modes,
    forward_ad,
    function_modes,
    functionalizing,
    tracing,
    transforms,
)
from halfbyte.ops.packed import PackedWeight, plain, plain_weight
from halfbyte.ops.registry import KERNELS, flatten

_ops = torch.ops.halfbyte

# Tensors that have nothing to say about operations on them. `halfbyte.nn` adds its parameters.
PLAIN_TYPES: set[type] = {torch.Tensor, torch.nn.Parameter, type(None)}

_is_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling


def transformed() -> bool:
    """Whether something traces or transforms what is called now, or listens to its operations."""
    return bool(
        _is_compiling()
        or dispatch_modes()
        or transforms() is not None
        or tracing() is not None
        # Forward-mode derivatives: tensors with a tangent look like others.
        or forward_ad._current_level >= 0
    )


def needs_op() -> bool:
    """Whether not even an autograd.Function will do: compilers, tracers and functionalize have no rule for those."""
    return _is_compiling() or bool(dispatch_modes()) or functionalizing()


def kernels(x: Tensor, factor: Tensor | None = None, *constants: Tensor | None) -> ModuleType | None:
    """The kernels to call directly, or None where only the dispatcher does right.

    Derivatives are taken with regard to `x` and `factor`; all others are constants.
    """
    found = _kernels(x, factor)
    # Afterwards: compilers of old releases of torch do not understand this question.
    if found is not None and any(type(constant) not in PLAIN_TYPES for constant in constants):
        return None
    return found


def _kernels(x: Tensor, factor: Tensor | None) -> ModuleType | None:
    # As in `transformed`, whose call would cost as much as its questions.
    if (
        _is_compiling()
        or dispatch_modes()
        or transforms() is not None
        or tracing() is not None
        or forward_ad._current_level >= 0
        or function_modes()
        or type(x) not in PLAIN_TYPES
        or x.is_neg()
    ):
        return None
    if factor is not None and (
        type(factor) not in PLAIN_TYPES or factor.is_neg() or (factor.requires_grad and _is_grad_enabled())
    ):
        return None
    if x.requires_grad and _is_grad_enabled():
        return None
    # The device's name takes longer than this question.
    return cpu if x.is_cpu else KERNELS.get(x.device.type)


def kernels_of(x: Tensor, factor: Tensor | None, weight: PackedWeight, *constants: Tensor | None) -> ModuleType | None:
    """`kernels` of a call with a packed weight. They take the weight's codes as a plain tensor: `plain_weight`."""
    codes, packing = weight
    memo = packing.memo
    if memo is not None and memo.plain and not constants:
        found = _kernels(x, factor)
        return found if found is None or type(codes) in PLAIN_TYPES else None
    absmax, absmax2, offset, *_ = packing
    found = kernels(x, factor, codes, absmax, absmax2, offset, *constants)
    if found is not None and memo is not None:
        memo.plain = True
    return found


def call(name: str, *args: Any) -> Any:
    """Call an operation that has no derivative.

    A packed weight is one argument, the first or the second, where the schema has its tensors and scalars.
    """
    first = args[0]
    if type(first) is PackedWeight:
        direct = kernels_of(plain(first.codes), None, first)
        if direct is not None:
            return getattr(direct, name)(plain_weight(first), *args[1:])
        return getattr(_ops, name)(*flatten(name, args))
    second = args[1] if len(args) > 1 else None
    if type(second) is PackedWeight:
        direct = kernels_of(first, None, second)
        if direct is not None:
            return getattr(direct, name)(first, plain_weight(second), *args[2:])
        return getattr(_ops, name)(*flatten(name, args))
    direct = kernels(first, None, *(argument for argument in args[1:] if isinstance(argument, Tensor)))
    return getattr(_ops if direct is None else direct, name)(*args)
