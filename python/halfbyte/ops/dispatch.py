"""The one way to call an operation: straight to a device's kernels where that is right, else by torch's dispatcher.

A call through the dispatcher costs more than a small product. It is needed where something listens, traces or
transforms (compilers, tracers, dispatch and function modes, `torch.func`), where tensors are of other classes or lazily
negated views, and where a derivative is to be taken. Whether that is so is asked here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from halfbyte import _native
from halfbyte.ops._torch_internals import (
    dispatch_modes,
    empty_cpu,
    forward_ad_level,
    function_modes,
    functionalizing,
    tracing,
    transforms,
)
from halfbyte.ops.packed import PackedWeight, Packing, packed_pair, plain, plain_weight
from halfbyte.ops.registry import KERNELS, flatten

_ops = torch.ops.halfbyte

# Tensors that have nothing to say about operations on them. `halfbyte.nn` adds its parameters.
PLAIN_TYPES: set[type] = {torch.Tensor, torch.nn.Parameter, type(None)}

_is_compiling = torch.compiler.is_compiling

# Asked in one native call: from here, the questions would take longer than a small product. Compilers understand none
# of them: for those, `_is_compiling()` goes before.
_direct = _native.DirectCalls(
    plain_types=PLAIN_TYPES,
    kernels=KERNELS,
    transforms=(dispatch_modes, transforms, tracing),
    function_modes=function_modes,
    # Tensors with a tangent look like others.
    forward_ad_level=forward_ad_level,
    is_grad_enabled=torch.is_grad_enabled,
    empty=empty_cpu,
    get_num_threads=torch.get_num_threads,
    packed_weight=packed_pair,
)
_transformed, _kernels, _kernels_of = _direct.transformed, _direct.kernels, _direct.kernels_of

linear_4bit: Callable[[Tensor, Tensor, Packing, Tensor | None], Tensor | None] = _direct.linear_4bit
"""`x @ W.T + bias` straight by the kernels of the device, or None where only the dispatcher does right.

Of `x`, codes, their packing and the bias, never within a compiler. A packed weight is two arguments here: to make one
value of them takes as long as some of the questions.
"""


def transformed() -> bool:
    """Whether something traces or transforms what is called now, or listens to its operations."""
    return _is_compiling() or _transformed()


def needs_op() -> bool:
    """Whether not even an autograd.Function will do: compilers, tracers and functionalize have no rule for those."""
    return _is_compiling() or bool(dispatch_modes()) or functionalizing()


def kernels(x: Tensor, factor: Tensor | None = None, *constants: Tensor | None) -> ModuleType | None:
    """The kernels to call directly, or None where only the dispatcher does right.

    Derivatives are taken with regard to `x` and `factor`; all others are constants.
    """
    return None if _is_compiling() else _kernels(x, factor, *constants)


def kernels_of(x: Tensor, factor: Tensor | None, weight: PackedWeight, *constants: Tensor | None) -> ModuleType | None:
    """`kernels` of a call with a packed weight. They take the weight's codes as a plain tensor: `plain_weight`."""
    if _is_compiling():
        return None
    codes, packing = weight
    found = _kernels_of(x, factor, codes, packing)
    return None if constants and any(type(constant) not in PLAIN_TYPES for constant in constants) else found


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
