"""What `python -m bitsandbytes` shows."""

from __future__ import annotations

from .._missing import missing_attribute

__getattr__ = missing_attribute(__name__)
