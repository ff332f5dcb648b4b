"""Observers of models that become 4-bit or dense: the integrations, which inform other libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import nn

    from halfbyte.config import BitsAndBytesConfig

Observer: TypeAlias = "Callable[[nn.Module, BitsAndBytesConfig | None], None]"
"""Called with the whole model and its quantization config; None when it is dense again."""

_observers: list[Observer] = []


def add_observer(observer: Observer) -> None:
    """Call `observer` for every model that is changed from now on. Adding it twice has no effect."""
    if observer not in _observers:
        _observers.append(observer)


def notify(model: nn.Module, config: BitsAndBytesConfig | None) -> None:
    """Call all observers for a model that was quantized with `config`, or with None is dense again.

    Args:
        model: The model.
        config: Names in its `llm_int8_skip_modules` are paths in `model`.
    """
    for observer in _observers:
        observer(model, config)
