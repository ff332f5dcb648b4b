"""Torch's private names, each with a fallback.

They ask in nanoseconds what public names ask in microseconds, or cannot ask: whether something listens to, traces or
transforms the call that is being made. A release of torch without one of these questions is answered "yes", so that
every call goes through torch's dispatcher, which is right and slower. Each name is written in full, as `torch.….name`
or `getattr(torch.…, "name", …)`: tests/torch/test_torch_internals.py finds them, and runs the operations without each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
    """The number of active `TorchDispatchMode`s."""
    function_modes: Callable[[], int] = torch._C._len_torch_function_stack
    """The number of active `TorchFunctionMode`s."""
    transforms: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack
    """The innermost transform of `torch.func`, or None."""
    tracing: Callable[[], Any] = torch._C._get_tracing_state
    """The state of `torch.jit.trace`, or None."""
    forward_ad_level: tuple[object, str] = torch.autograd.forward_ad, "_current_level"
    """Where the level of forward-mode derivatives is found, which is negative outside of them."""
    _ = dispatch_modes(), function_modes(), transforms(), tracing(), torch.autograd.forward_ad._current_level
except (AttributeError, TypeError):

    def dispatch_modes() -> int:
        """One, which sends every call through the dispatcher."""
        return 1

    def function_modes() -> int:
        """None known."""
        return 0

    def transforms() -> Any:
        """None known."""
        return None

    def tracing() -> Any:
        """None known."""
        return None

    class _Outside:
        """Of forward-mode derivatives, as far as is known."""

        level = -1

    forward_ad_level = _Outside, "level"


try:
    _functionalize = torch._C._functorch.TransformType.Functionalize
    _interpreters: Callable[[], Any] = torch._C._functorch.get_interpreter_stack
except AttributeError:

    def _interpreters() -> Any:
        """None known: `functionalize` then refuses what other transforms take."""
        return ()


def functionalizing() -> bool:
    """Whether `torch.func.functionalize` is among the active transforms."""
    return transforms() is not None and any(level.key() == _functionalize for level in _interpreters())


try:
    disable_modes: Callable[[], Any] = torch.utils._python_dispatch._disable_current_modes
    """A context without modes of torch."""
except AttributeError:

    def disable_modes() -> Any:
        """Nothing: modes stay active."""
        return contextlib.nullcontext()


def _public_empty_cpu(sizes: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(sizes, strides, dtype=dtype, device="cpu")


empty_cpu: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor] = getattr(
    torch._C._dynamo.guards, "_empty_strided_cpu", _public_empty_cpu
)
"""A new CPU tensor of these sizes, strides and dtype. Modes of torch do not hear of it."""

any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
"""Whether `torch.autocast` may be active, on whatever device."""

try:
    DisableTorchFunctionSubclass: Any = torch._C.DisableTorchFunctionSubclass
    """A context in which tensor subclasses are treated as plain tensors."""
except AttributeError:
    # Function modes hear nothing in it either.
    DisableTorchFunctionSubclass = torch._C.DisableTorchFunction


def _public_subclass(cls: type, data: Tensor, requires_grad: bool) -> Any:
    return data.detach().as_subclass(cls).requires_grad_(requires_grad)


make_subclass: Callable[[type, Tensor, bool], Any] = getattr(torch.Tensor, "_make_subclass", _public_subclass)
"""A tensor of a subclass, which shares memory with another."""


def _public_parse(*args: Any, **kwargs: Any) -> tuple[torch.device | None, torch.dtype | None, bool, Any]:
    if args and isinstance(args[0], Tensor):
        first: tuple[str, ...] = ("other",)
    elif args and isinstance(args[0], torch.dtype):
        first = ("dtype",)
    else:
        first = ("device", "dtype")
    given = dict(zip((*first, "non_blocking", "copy"), args, strict=False)) | kwargs
    like = given.get("other")
    device, dtype = (given.get("device"), given.get("dtype")) if like is None else (like.device, like.dtype)
    device = None if device is None else torch.device(device)
    return device, dtype, bool(given.get("non_blocking", False)), given.get("memory_format")


parse_to: Callable[..., Any] = getattr(torch._C._nn, "_parse_to", _public_parse)
"""The arguments of `.to(...)`: device, dtype, non_blocking, memory format."""


def can_hold(tensor: Tensor, data: Tensor) -> bool:
    """Whether `tensor.data = data` is possible."""
    compatible: bool = getattr(torch, "_has_compatible_shallow_copy_type", lambda a, b: False)(tensor, data)
    return compatible


def _public_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _public_stream)
"""The handle of torch's current stream on a CUDA device."""

grouped_mm: Callable[..., Tensor] | None = getattr(torch, "_grouped_mm", None)
"""A product of each group of rows with a matrix of its own; None in releases without. Only some devices do not wait."""
