"""PEFT: what merging an adapter into 4-bit weights costs is said.

A merge adds the adapter to the dequantized weight and quantizes the sum: what the 16 values cannot tell apart is lost.
PEFT's methods that merge a whole model are wrapped, to say so once for each call, and not once for each layer.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from torch import nn

from halfbyte.nn import Params4bit
from halfbyte.nn._joint import JOINT
from halfbyte.nn._quantized import Quantized
from halfbyte.nn._requantized import Requantized, watch

_logger = logging.getLogger(__name__)

# Merged for good, or to be undone: training with a server beside it does that at every step.
_METHODS = {"merge_and_unload": logging.WARNING, "merge_adapter": logging.INFO, "unmerge_adapter": logging.INFO}


def enter(tuners_utils: ModuleType) -> None:
    """Wrap the methods of `peft.tuners.tuners_utils.BaseTuner`; once."""
    cls = tuners_utils.BaseTuner
    for name, level in _METHODS.items():
        stock = cls.__dict__.get(name)
        if stock is not None and not hasattr(stock, "__halfbyte__"):
            setattr(cls, name, _measured(stock, level))


def _measured(stock: Callable[..., Any], level: int) -> Callable[..., Any]:
    @functools.wraps(stock)
    def method(tuner: Any, *args: Any, **kwargs: Any) -> Any:
        names = _layers(tuner.model)
        if not names:
            return stock(tuner, *args, **kwargs)
        if not _logger.isEnabledFor(level):
            with _own_parameters(tuner.model):
                return stock(tuner, *args, **kwargs)
        with _own_parameters(tuner.model), watch() as seen:
            result = stock(tuner, *args, **kwargs)
        if seen.found:
            _logger.log(level, "%s: %s", stock.__name__, cost(seen.found, names))
        return result

    # `enter` knows by this that the method is wrapped already.
    method.__halfbyte__ = True  # type: ignore[attr-defined]
    return method


def _layers(model: nn.Module) -> dict[nn.Module, str]:
    """The 4-bit layers of a model, by the names that they have without adapters."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, Quantized)]
    return {module: name.replace(".base_layer", "") for name, module in layers}


def cost(found: list[Requantized], names: dict[nn.Module, str]) -> str:
    """One line: how far the new weights are from what they should be, on average and at worst, beside the adapter."""
    mean = sum(one.error for one in found) / len(found)
    worst = max(found, key=lambda one: one.error)
    changed = [one for one in found if one.change > 0]
    line = (
        f"{len(found)} weights were quantized again, which changed them by {_percent(mean)} on average (relative to "
        f"their norm), at worst by {_percent(worst.error)}, in {names.get(worst.module, 'a layer')}"
    )
    if changed:
        change = sum(one.change for one in changed) / len(changed)
        most = ", and most of that was rounded away" if 2 * mean > change else ""
        line += (
            f"; the adapter had changed them by {_percent(change)}{most}. Merge into the dense model, as "
            "model.dequantize() gives it, to keep all of it"
        )
    return line


def _percent(value: float) -> str:
    return f"{100 * value:.2g} %"


@contextlib.contextmanager
def _own_parameters(model: nn.Module) -> Iterator[None]:
    """Where bitsandbytes is installed, let the weights that PEFT makes meanwhile be this package's.

    It makes them by the name `bitsandbytes.nn.Params4bit`, which quantizes by other code on the CPU. The joint class,
    under that name, is a subclass. Nothing is changed where the model has layers of bitsandbytes too.
    """
    own = JOINT.get(Params4bit)
    from halfbyte.integrations.bitsandbytes import find

    module = find(load=False) if own is not None else None
    if module is None or any(
        isinstance(layer, module.nn.Linear4bit) and not isinstance(layer, Quantized) for layer in model.modules()
    ):
        yield
        return
    theirs = module.nn.Params4bit
    module.nn.Params4bit = own
    try:
        yield
    finally:
        module.nn.Params4bit = theirs
