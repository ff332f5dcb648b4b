"""PEFT: report the error of merging an adapter into packed weights.

A merge adds the adapter to the dequantized weight and quantizes the sum, which rounds small changes away. PEFT's
methods that merge a whole model are wrapped, so that the report comes once per call and not once per layer.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from torch import nn

from halfbyte.models.recipe import PACKED_LAYERS
from halfbyte.nn import Int8Params, Params4bit
from halfbyte.nn._joint import JOINT
from halfbyte.nn._requantized import Requantized, watch

_logger = logging.getLogger(__name__)

# Temporary merges are not worth a warning: training with a server beside it merges and unmerges at every step.
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

    # Tells `enter` that the method is wrapped already.
    method.__halfbyte__ = True  # type: ignore[attr-defined]
    return method


def _layers(model: nn.Module) -> dict[nn.Module, str]:
    """The packed layers of a model, by the names that they have without adapters."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, PACKED_LAYERS)]
    return {module: name.replace(".base_layer", "") for name, module in layers}


def cost(found: list[Requantized], names: dict[nn.Module, str]) -> str:
    """One line: mean and worst relative error of the new weights, beside the size of the adapter's own change."""
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
    """Make PEFT create this package's parameters while it merges, also where bitsandbytes is installed.

    PEFT creates them as `bitsandbytes.nn.Params4bit` and `Int8Params`, which quantize with other code. The joint
    classes put under those names are subclasses. Nothing changes if the model has layers of bitsandbytes too.
    """
    own = {cls.__name__: JOINT[cls] for cls in (Params4bit, Int8Params) if cls in JOINT}
    from halfbyte.integrations.bitsandbytes import find

    module = find(load=False) if own else None
    theirs = () if module is None else (module.nn.Linear4bit, module.nn.Linear8bitLt)
    if any(isinstance(layer, theirs) and not isinstance(layer, PACKED_LAYERS) for layer in model.modules()):
        module = None
    if module is None:
        yield
        return
    before = {name: getattr(module.nn, name) for name in own}
    for name, cls in own.items():
        setattr(module.nn, name, cls)
    try:
        yield
    finally:
        for name, cls in before.items():
            setattr(module.nn, name, cls)
