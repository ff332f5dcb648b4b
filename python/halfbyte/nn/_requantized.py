"""Watching weights that are quantized a second time, as when an adapter is merged into them.

Whoever wants to know what that costs calls `watch`. `Params4bit` and `Int8Params` tell it of every float tensor that
takes the place of a packed one, and the layer when the new weight is assigned: then the old bytes, the numbers that
were to be kept, and the new bytes are all at hand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.functional import dequantize_4bit, int8_vectorwise_dequant


@dataclass
class Requantized:
    """One weight that was quantized again."""

    module: nn.Module
    error: float
    """Norm of what rounding took or added, relative to that of the numbers that were to be kept."""
    change: float
    """Norm by which those numbers differ from the old weight, relative to their own."""


def values(module: Any, weight: Any) -> Tensor | None:
    """What a packed weight stands for, float32; None where it is not packed."""
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return dequantize_4bit(weight.data, state).float()
    if weight.dtype is not torch.int8:
        return None
    scales = getattr(weight, "SCB", None)
    scales = getattr(getattr(module, "state", None), "SCB", None) if scales is None else scales
    return None if scales is None else int8_vectorwise_dequant(weight.data, scales)


class Watch:
    """What was requantized while this watches."""

    def __init__(self) -> None:
        self.found: list[Requantized] = []
        self._wanted: tuple[Any, Tensor] | None = None

    def quantized(self, weight: Any, wanted: Tensor) -> None:
        """`weight` has just been quantized from `wanted`, and had a state before."""
        self._wanted = weight, wanted

    @torch.no_grad()
    def assigned(self, module: nn.Module, old: Tensor | None, new: Any) -> None:
        """`new` takes the place of `old` in a layer."""
        if self._wanted is None or self._wanted[0] is not new:
            return
        wanted = self._wanted[1].to(new.device, torch.float32)
        self._wanted = None
        if old is None or new.is_meta:
            return
        now, before = values(module, new), values(module, old)
        if now is None or before is None:
            return
        size = float(wanted.norm())
        error = float((now - wanted).norm())
        change = float((before.to(new.device) - wanted).norm())
        if size > 0:
            self.found.append(Requantized(module, error / size, change / size))


_watch: Watch | None = None


def watching() -> Watch | None:
    """The one who watches now."""
    return _watch


@contextlib.contextmanager
def watch() -> Iterator[Watch]:
    """Collect what is requantized inside; the innermost collects."""
    global _watch
    before, _watch = _watch, Watch()
    try:
        yield _watch
    finally:
        _watch = before
