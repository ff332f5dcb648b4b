"""Which loads are this package's: an entry in transformers' table of quantizers that decides for each of them.

| who asks | bitsandbytes is not installed, or served by this package | bitsandbytes is installed |
|---|---|---|
| `quantization_config=` of this package's class | this package | this package |
| after `halfbyte.enable()` | this package | this package |
| transformers' own class, or a 4-bit checkpoint without an argument | this package | bitsandbytes |
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from halfbyte.config import BitsAndBytesConfig
from halfbyte.integrations._when_imported import when_imported

_TABLE = "transformers.quantizers.auto"
_SERVED_FROM = Path(__file__).resolve().parents[2] / "compat"
"""The folder of this package whose modules are offered as `bitsandbytes`."""

_enabled = False
_waiting = False


def enable(on: bool = True) -> None:
    """Serve every 4-bit load of transformers in this process, also where bitsandbytes is installed.

    Without it, a load is served when its `quantization_config` is of this package's class, or when bitsandbytes is not
    installed.

    Args:
        on: False gives loads that do not name this package back to bitsandbytes.

    Raises:
        TypeError: `on` is not a bool.
    """
    if not isinstance(on, bool):
        raise TypeError(f"on must be a bool, got {on!r}")
    global _enabled
    _enabled = on
    register()


def register() -> None:
    """Enter this package's quantizers into the tables of transformers and diffusers, now or when those are imported.

    Idempotent.
    """
    global _waiting
    if not _waiting:
        _waiting = True
        when_imported(_TABLE, _enter)
        when_imported("diffusers.quantizers.auto", _enter_diffusers)


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
    # `__class__` answers what transformers wants to hear; the type does not.
    return issubclass(type(config), BitsAndBytesConfig) or _enabled or not has_bitsandbytes()


def _enter_diffusers(auto: ModuleType) -> None:
    from halfbyte.integrations import diffusers

    diffusers.enter(auto)


def _enter(auto: ModuleType) -> None:
    """Replace the two entries for bitsandbytes, and keep the class of a config that is given beside a checkpoint's."""
    table: dict[str, Any] = auto.AUTO_QUANTIZER_MAPPING
    stock4, stock8 = table.get("bitsandbytes_4bit"), table.get("bitsandbytes_8bit")
    if stock4 is None or stock8 is None or getattr(stock4, "__halfbyte__", False):
        return

    def make_4bit(quantization_config: Any, **kwargs: Any) -> Any:
        if not is_ours(quantization_config):
            return stock4(quantization_config, **kwargs)
        from halfbyte.integrations.transformers.quantizer import Quantizer4bit

        return Quantizer4bit(quantization_config, **kwargs)

    def make_8bit(quantization_config: Any, **kwargs: Any) -> Any:
        if not has_bitsandbytes():
            raise ImportError(
                "load_in_8bit=True: LLM.int8() is not in halfbyte yet, and bitsandbytes is not installed; use "
                "load_in_4bit=True, or pip install bitsandbytes"
            )
        return stock8(quantization_config, **kwargs)

    make_4bit.__halfbyte__ = make_8bit.__halfbyte__ = True  # type: ignore[attr-defined]
    table["bitsandbytes_4bit"], table["bitsandbytes_8bit"] = make_4bit, make_8bit

    keep_class_of_argument(auto.AutoHfQuantizer)


def keep_class_of_argument(cls: Any) -> None:
    """Let a config of this package's class that is given beside a checkpoint's own stay of that class when merged.

    Args:
        cls: The class of transformers or diffusers whose `merge_quantization_configs` does the merging.
    """
    stock = cls.merge_quantization_configs

    @functools.wraps(stock)
    def merge(cls: type, quantization_config: Any, quantization_config_from_args: Any) -> Any:
        merged = stock(quantization_config, quantization_config_from_args)
        if issubclass(type(quantization_config_from_args), BitsAndBytesConfig) and hasattr(merged, "load_in_4bit"):
            return BitsAndBytesConfig.from_dict(merged.to_dict())
        return merged

    cls.merge_quantization_configs = classmethod(merge)
