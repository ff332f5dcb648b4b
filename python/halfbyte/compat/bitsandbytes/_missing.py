"""What is not there: unknown names, and the products of LLM.int8()."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn


def missing_attribute(module: str) -> Callable[[str], Any]:
    """A module's `__getattr__` that says who is asked."""

    def __getattr__(name: str) -> Any:
        raise AttributeError(f"module {module!r} has no attribute {name!r}; halfbyte stands in for bitsandbytes here")

    return __getattr__


def no_int8(name: str) -> NoReturn:
    """Raise for a function or a class of LLM.int8()'s products."""
    raise NotImplementedError(f"{name}: LLM.int8() is not in halfbyte yet; halfbyte stands in for bitsandbytes here")
