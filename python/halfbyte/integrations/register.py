"""Register this package's quantizers with transformers and diffusers, and its LoRA layers with PEFT."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from halfbyte.config import BitsAndBytesConfig
from halfbyte.integrations._when_imported import when_imported
from halfbyte.integrations.saved_config import keep_class_of_argument
from halfbyte.integrations.served import has_bitsandbytes, is_ours, serve_all
from halfbyte.models.observers import add_observer

if TYPE_CHECKING:
    from torch import nn

_TABLE = "transformers.quantizers.auto"

OLDEST = (5, 0)
"""The first release of transformers whose loads are served."""

_waiting = False


def enable(on: bool = True) -> None:
    """Load every 4-bit and 8-bit model of transformers with this package, also where bitsandbytes is installed.

    Without this call, a load uses this package if its `quantization_config` has this package's class, or if
    bitsandbytes is not installed. In the latter case `import bitsandbytes` also gives this package from now on, for
    libraries that import it before a model is loaded.

    Args:
        on: False restores the default.

    Raises:
        TypeError: `on` is not a bool.
    """
    if not isinstance(on, bool):
        raise TypeError(f"on must be a bool, got {on!r}")
    serve_all(on)
    register()
    if on and not has_bitsandbytes():
        # For libraries that ask for it before any model is loaded.
        from halfbyte import compat

        compat.offer()


def register() -> None:
    """Register this package with transformers, diffusers and PEFT, now or when they are imported.

    Models quantized in memory are marked in the same way as loaded ones. Idempotent.
    """
    global _waiting
    if not _waiting:
        _waiting = True
        when_imported(_TABLE, _enter)
        when_imported("diffusers.quantizers.auto", _enter_diffusers)
        when_imported("peft.tuners.lora.bnb", _enter_peft)
        add_observer(_attach)


def _attach(model: nn.Module, config: BitsAndBytesConfig | None) -> None:
    from halfbyte.integrations.attach import attach

    attach(model, config)


def _enter_diffusers(auto: ModuleType) -> None:
    from halfbyte.integrations import diffusers

    diffusers.enter(auto)


def _enter_peft(bnb: ModuleType) -> None:
    from halfbyte.integrations.peft import layers

    layers.enter(bnb)


def _enter(auto: ModuleType) -> None:
    """Replace the two entries for bitsandbytes, and keep the class of a config that is given beside a checkpoint's."""
    table: dict[str, Any] = auto.AUTO_QUANTIZER_MAPPING
    stock4, stock8 = table.get("bitsandbytes_4bit"), table.get("bitsandbytes_8bit")
    if stock4 is None or stock8 is None or getattr(stock4, "__halfbyte__", False):
        return

    def maker(stock: Any, name: str) -> Any:
        def make(quantization_config: Any, **kwargs: Any) -> Any:
            if not is_ours(quantization_config):
                return stock(quantization_config, **kwargs)
            check_version()
            from halfbyte.integrations.transformers import quantizer

            return getattr(quantizer, name)(quantization_config, **kwargs)

        make.__halfbyte__ = True  # type: ignore[attr-defined]
        return make

    table["bitsandbytes_4bit"] = maker(stock4, "Quantizer4bit")
    table["bitsandbytes_8bit"] = maker(stock8, "Quantizer8bit")
    keep_class_of_argument(auto.AutoHfQuantizer)


def check_version() -> None:
    """Check the version of transformers.

    Raises:
        ImportError: transformers is older than `OLDEST`.
    """
    version = getattr(sys.modules.get("transformers"), "__version__", "")
    numbers = version.split(".")[:2]
    if all(number.isdigit() for number in numbers) and tuple(map(int, numbers)) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(
            f"halfbyte loads models with transformers>={oldest}, got transformers {version}: "
            f"pip install -U 'transformers>={oldest}'; halfbyte.quantize_model takes a loaded model of any release"
        )
