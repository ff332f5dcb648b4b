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
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from halfbyte.config import BitsAndBytesConfig
from halfbyte.integrations._when_imported import when_imported
from halfbyte.models.observers import add_observer

if TYPE_CHECKING:
    from torch import nn

_TABLE = "transformers.quantizers.auto"
_SERVED_FROM = Path(__file__).resolve().parents[2] / "compat"
"""The folder of this package whose modules are offered as `bitsandbytes`."""

OLDEST = (5, 0)
"""The first release of transformers whose loads are served."""

_logger = logging.getLogger(__name__)

_enabled = False
_waiting = False


def enable(on: bool = True) -> None:
    """Serve every 4-bit load of transformers in this process, also where bitsandbytes is installed.

    Without it, a load is served when its `quantization_config` is of this package's class, or when bitsandbytes is not
    installed. Where it is not installed, `import bitsandbytes` gives this package's layer from now on, for libraries
    that need it before a model is loaded.

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
    if on and not has_bitsandbytes():
        # For libraries that ask for it before any model is loaded.
        from halfbyte import compat

        compat.offer()


def register() -> None:
    """Enter this package's quantizers into the tables of transformers and diffusers, now or when those are imported.

    Models that are quantized in memory are told the same as a load tells them. Idempotent.
    """
    global _waiting
    if not _waiting:
        _waiting = True
        when_imported(_TABLE, _enter)
        when_imported("diffusers.quantizers.auto", _enter_diffusers)
        add_observer(_attach)


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


def _attach(model: nn.Module, config: BitsAndBytesConfig | None) -> None:
    from halfbyte.integrations.transformers.attach import attach

    attach(model, config)


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
        check_version()
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
    """Check the config of a 4-bit checkpoint, and let it be of this package's class where the one given is.

    The checkpoint's own config decides, as in the libraries; a warning names what was asked for in vain.

    Args:
        cls: The class of transformers or diffusers whose `merge_quantization_configs` does the merging.
    """
    stock = cls.merge_quantization_configs

    @functools.wraps(stock)
    def merge(cls: type, quantization_config: Any, quantization_config_from_args: Any) -> Any:
        given = quantization_config_from_args
        if not issubclass(type(given), BitsAndBytesConfig):
            if has_bitsandbytes() and not _enabled:
                return stock(quantization_config, given)
            _check_saved(quantization_config)
            return stock(quantization_config, given)
        values = quantization_config if isinstance(quantization_config, dict) else quantization_config.to_dict()
        if not (values.get("load_in_4bit") or values.get("load_in_8bit")):
            method = getattr(values.get("quant_method"), "value", values.get("quant_method"))
            if method != "bitsandbytes":
                raise ValueError(
                    f"quantization_config: the checkpoint is quantized already, its config.json says quant_method "
                    f"{method!r}, and cannot be quantized to 4 bits again; load it without quantization_config, by the "
                    "library of that method, or start from the 16-bit checkpoint that it was made from"
                )
        saved = _check_saved(values)
        assert saved is not None
        if issubclass(type(quantization_config), BitsAndBytesConfig):
            # Of a model in memory: it remembers what was not given.
            saved = quantization_config
        _say_ignored(given, saved)
        return saved

    cls.merge_quantization_configs = classmethod(merge)


def check_version() -> None:
    """That transformers is one that this package was made for.

    Raises:
        ImportError: It is older.
    """
    version = getattr(sys.modules.get("transformers"), "__version__", "")
    numbers = version.split(".")[:2]
    if all(number.isdigit() for number in numbers) and tuple(map(int, numbers)) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(
            f"halfbyte loads models with transformers>={oldest}, got transformers {version}: "
            f"pip install -U 'transformers>={oldest}'; halfbyte.quantize_model takes a loaded model of any release"
        )


def _check_saved(config: Any) -> BitsAndBytesConfig | None:
    """The config of a checkpoint, checked; None for what is not bitsandbytes'.

    Raises:
        TypeError: A field has a wrong type.
        ValueError: A field has a value that does not exist.
    """
    values = config if isinstance(config, dict) else config.to_dict()
    if not (values.get("load_in_4bit") or values.get("load_in_8bit") or values.get("quant_method") == "bitsandbytes"):
        return None
    try:
        return BitsAndBytesConfig.coerce(BitsAndBytesConfig.from_dict(values))
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"config.json of the checkpoint: quantization_config: {error}; correct the file") from error


def _say_ignored(given: BitsAndBytesConfig, saved: BitsAndBytesConfig) -> None:
    """Say which of the values given are not those of the checkpoint, which decides."""
    # What was left to its default was not asked for.
    asked = {name: value for name, value in given.to_diff_dict().items() if not name.startswith("_")}
    written = saved.to_dict()
    other = [f"{name} is {written[name]!r}, not {value!r}" for name, value in asked.items() if written[name] != value]
    if other:
        _logger.warning(
            "the checkpoint is quantized already, and its own quantization_config is used, where %s", "; ".join(other)
        )
