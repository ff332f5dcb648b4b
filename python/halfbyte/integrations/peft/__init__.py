"""PEFT: its 4-bit LoRA layers as one product each.

PEFT computes an adapter in separate modules beside the base layer. Fused layers compute base and adapters together
(`halfbyte.nn.lora`): parameters, adapters and state dicts stay as they are, and everything that PEFT does with its
layers still works. They keep PEFT's class. Layers over `halfbyte.nn.Linear4bit` are fused from the start (`layers`),
unless `HALFBYTE_FUSE_LORA=0` is set. `unfuse` undoes it for a model, and `fuse` does it again.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["FuseReport", "fuse", "unfuse"]

_logger = logging.getLogger(__name__)
_said: set[str] = set()


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did.

    Attributes:
        fused: The number of the model's layers that are fused now.
        left: The layers that PEFT's own forward still computes: how many of each kind, by kind and reason.
    """

    fused: int
    left: dict[str, int]


def fuse(model: nn.Module) -> FuseReport:
    """Let PEFT's 4-bit LoRA layers compute base and adapters as one product.

    A training step then launches fewer kernels, casts fewer activations and keeps less for backward; losses and
    gradients are equal within rounding. Outputs keep the dtype of the input. It works with autocast, gradient
    checkpointing, `torch.compile`, several active adapters and dropout. Adapters can be added, switched, deleted,
    saved, merged and unloaded as before. Gradients of gradients need `unfuse`.

    This is how layers over `halfbyte.nn.Linear4bit` compute anyway. The call is needed only after `unfuse`, or where
    `HALFBYTE_FUSE_LORA=0` is set, or to hear which layers are left.

    PEFT's own forward goes on computing layers over other base layers, variants such as DoRA, `lora_bias`, calls with
    `adapter_names`, merged or disabled adapters, and layers whose parts have hooks. Which layers were left, and why, is
    logged once for each kind, and returned.

    Args:
        model: A model with LoRA layers of PEFT, or a part of one. It is changed in place.

    Returns:
        The number of fused layers, and the layers that were left.

    Raises:
        TypeError: `model` is not a module.
        ValueError: There is no layer of PEFT in it.
    """
    layers = list(_tuner_layers(model))
    if not layers:
        raise ValueError(
            f"model must have LoRA layers of PEFT, got {type(model).__name__} without any; call get_peft_model first"
        )
    left: Counter[str] = Counter()
    chosen = []
    for layer in layers:
        reason = _reason_to_leave(layer)
        if reason is None:
            chosen.append(layer)
        else:
            left[f"{_kind(layer)}: {reason}"] += 1
    for layer in chosen:
        from halfbyte.integrations.peft.layers import MARK

        setattr(layer, MARK, True)
    for text, count in left.items():
        if text not in _said:
            _said.add(text)
            _logger.warning("fuse: %d layers keep PEFT's own forward: %s", count, text)
    return FuseReport(len(chosen), dict(left))


def unfuse(model: nn.Module) -> int:
    """Let PEFT's own forward compute the LoRA layers of a model, those made later excepted.

    Args:
        model: The model, or a part of it. It is changed in place.

    Returns:
        The number of layers that were fused.

    Raises:
        TypeError: `model` is not a module.
    """
    count = 0
    for layer in _tuner_layers(model):
        if type(layer) is _peft_class():
            from halfbyte.integrations.peft.layers import MARK, is_fused

            count += is_fused(layer) and _reason_to_leave(layer) is None
            setattr(layer, MARK, False)
    return count


def _tuner_layers(model: nn.Module) -> Iterator[nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    # A model can only have such layers where this was imported.
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is not None:
        yield from (module for module in model.modules() if isinstance(module, tuners.BaseTunerLayer))


def _peft_class() -> Any:
    """PEFT's 4-bit LoRA layer, or None where it was never needed."""
    return getattr(sys.modules.get("peft.tuners.lora.bnb"), "Linear4bit", None)


def _reason_to_leave(layer: Any) -> str | None:
    """Why PEFT's forward has to go on computing this layer, or None."""
    cls = _peft_class()
    if cls is None or type(layer) is not cls:
        return "it is not PEFT's LoRA layer for 4-bit weights"
    from halfbyte.integrations.peft.layers import is_entered, reason_of_adapter, reason_of_base

    # accelerate's hooks of a device map call the class's forward.
    if not is_entered(cls) or ("forward" in layer.__dict__ and "_hf_hook" not in layer.__dict__):
        return "its forward was replaced"

    names = list(layer.lora_A)
    reasons = [reason_of_adapter(layer, name) for name in names]
    return reason_of_base(layer.base_layer) or (reasons[0] if reasons and all(reasons) else None)


def _kind(layer: Any) -> str:
    base = layer.get_base_layer()
    return f"{type(layer).__module__}.{type(layer).__qualname__} over {type(base).__module__}.{type(base).__qualname__}"
