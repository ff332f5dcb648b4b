"""Who is told that a model became 4-bit, or is dense again: the integrations, which know other libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import nn

    from halfbyte.config import BitsAndBytesConfig

Observer: TypeAlias = "Callable[[nn.Module, BitsAndBytesConfig | None], None]"
"""Called with the whole model, and how it was quantized; None when it is dense again."""

_observers: list[Observer] = []


def add_observer(observer: Observer) -> None:
    """Tell `observer` of every model that is changed from now on; once however often it is added."""
    if observer not in _observers:
        _observers.append(observer)


def notify(model: nn.Module, config: BitsAndBytesConfig | None) -> None:
    """Tell all observers that a model was quantized as `config` says, or with None that it is dense again.

    Args:
        model: The model.
        config: Names in its `llm_int8_skip_modules` are paths in `model`.
    """
    for observer in _observers:
        observer(model, config)
