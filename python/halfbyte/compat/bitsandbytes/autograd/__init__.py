"""Products with packed weights."""

from __future__ import annotations

from .._missing import missing_attribute
from . import _functions

__all__ = ["_functions"]

__getattr__ = missing_attribute(__name__)
