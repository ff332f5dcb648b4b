"""Watching weights that are quantized a second time, as when an adapter is merged into them.

Whoever wants to know what that costs calls `watch`. `Params4bit` tells it of every float tensor that takes the place of
a packed one, and the layer when the new weight is assigned: then the old bytes, the numbers that were to be kept, and
the new bytes are all at hand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.functional import dequantize_4bit


@dataclass
class Requantized:
    """One weight that was quantized again."""

    module: nn.Module
    error: float
    """Norm of what rounding took or added, relative to that of the numbers that were to be kept."""
    change: float
    """Norm by which those numbers differ from the old weight, relative to their own."""


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
        state, before = new.quant_state, getattr(old, "quant_state", None)
        if state is None or before is None or old is None or new.is_meta:
            return
        size = float(wanted.norm())
        error = float((dequantize_4bit(new.data, state).float() - wanted).norm())
        change = float((dequantize_4bit(old.data, before).float() - wanted).norm())
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
