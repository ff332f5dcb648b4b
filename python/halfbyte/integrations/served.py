"""Which loads use this package.

| loading with | bitsandbytes is not installed, or served by this package | bitsandbytes is installed |
|---|---|---|
| `quantization_config=` of this package's class | this package | this package |
| after `halfbyte.enable()` | this package | this package |
| transformers' own class, or a quantized checkpoint without an argument | this package | bitsandbytes |
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from halfbyte.config import BitsAndBytesConfig

_SERVED_FROM = Path(__file__).resolve().parents[1] / "compat"
"""The folder of this package whose modules are offered as `bitsandbytes`."""

_all_loads = False


def serve_all(on: bool) -> None:
    """Whether to serve all loads, or only those that name this package while bitsandbytes is installed."""
    global _all_loads
    _all_loads = on


def has_bitsandbytes() -> bool:
    """Whether the real bitsandbytes can be imported, or has been."""
    module = sys.modules.get("bitsandbytes")
    if module is not None:
        return not hasattr(module, "__halfbyte__")
    try:
        spec = importlib.util.find_spec("bitsandbytes")
    except (ImportError, ValueError):
        return False
    if spec is None or spec.origin is None:
        return False
    return not Path(spec.origin).resolve().is_relative_to(_SERVED_FROM)


def is_ours(config: object) -> bool:
    """Whether a load with this config is served here."""
    # `__class__` of the config claims transformers' class; the type does not.
    return issubclass(type(config), BitsAndBytesConfig) or is_ours_by_default()


def is_ours_by_default() -> bool:
    """Whether a load that names neither package is served here."""
    return _all_loads or not has_bitsandbytes()
