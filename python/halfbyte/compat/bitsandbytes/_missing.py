"""What is not there: unknown names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def missing_attribute(module: str) -> Callable[[str], Any]:
    """A module's `__getattr__` that says who is asked."""

    def __getattr__(name: str) -> Any:
        raise AttributeError(f"module {module!r} has no attribute {name!r}; halfbyte stands in for bitsandbytes here")

    return __getattr__
