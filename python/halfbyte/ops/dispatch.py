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
    DisableTorchFunctionSubclass,
    dispatch_modes,
    forward_ad,
    function_modes,
    functionalizing,
    tracing,
    transforms,
)
from halfbyte.ops.packed import PackedWeight
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
    for constant in constants:
        if type(constant) not in PLAIN_TYPES:
            return None
    return _kernels(x, factor)


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


def plain(tensor: Tensor) -> Tensor:
    """A parameter as the tensor that it is: what is asked of that takes no way round through the parameter's class."""
    if type(tensor) is Tensor:
        return tensor
    with DisableTorchFunctionSubclass():
        return tensor.data


def kernels_of(x: Tensor, factor: Tensor | None, weight: PackedWeight, *constants: Tensor | None) -> ModuleType | None:
    """`kernels` of a call with a packed weight. They take the weight's codes as a plain tensor: `plain_weight`."""
    codes, packing = weight
    memo = packing.memo
    if memo is not None and memo.plain and not constants:
        return _kernels(x, factor) if type(codes) in PLAIN_TYPES else None
    absmax, absmax2, offset, *_ = packing
    found = kernels(x, factor, codes, absmax, absmax2, offset, *constants)
    if found is not None and memo is not None:
        memo.plain = True
    return found


def plain_weight(weight: PackedWeight) -> PackedWeight:
    """The same weight, its codes being a plain tensor."""
    codes, packing = weight
    return weight if type(codes) is Tensor else PackedWeight(plain(codes), packing)


def call(name: str, *args: Any) -> Any:
    """Call an operation that has no derivative. A packed weight is one argument, where the schema has its codes."""
    tensors, weight = [], None
    for argument in args:
        if isinstance(argument, PackedWeight):
            weight = argument
        elif isinstance(argument, Tensor):
            tensors.append(argument)
    if weight is None:
        direct = kernels(tensors[0], None, *tensors[1:])
        if direct is not None:
            return getattr(direct, name)(*args)
        return getattr(_ops, name)(*args)
    direct = kernels_of(tensors[0] if tensors else plain(weight.codes), None, weight)
    if direct is None:
        return getattr(_ops, name)(*flatten(name, args))
    return getattr(direct, name)(*(plain_weight(a) if a is weight else a for a in args))
