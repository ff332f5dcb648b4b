"""The class of fused layers. Imported only where PEFT's 4-bit layers are there already."""

from __future__ import annotations

import logging
from typing import Any

import torch
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch import Tensor, nn

from halfbyte._checks import FLOAT_DTYPES
from halfbyte._ops import PLAIN_TYPES
from halfbyte.autograd import autocast_dtype
from halfbyte.nn.linear import Linear4bit, say_slow
from halfbyte.nn.lora import Adapter, lora_linear_4bit

_logger = logging.getLogger(__name__)
_said: set[str] = set()


class FusedLinear4bit(PeftLinear4bit):
    """PEFT's 4-bit LoRA layer, whose forward is one product where it can be; see `halfbyte.integrations.peft.fuse`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base and active adapters: `[..., in_features]` to `[..., out_features]`, in the dtype of `x`."""
        # Arguments, and states in which PEFT computes by the base layer alone or sample by sample.
        if not (args or kwargs or self._disable_adapters or self.merged_adapters):
            reason = reason_of_base(self) or _reason_of_call(self, x)
            if reason is not None:
                _say(reason)
            elif adapters := _adapters(self, x):
                base: Any = self.base_layer
                weight, compute = base.weight, _compute_dtype(base, x)
                if compute is torch.float32 and x.dtype.itemsize == 2 and not torch.compiler.is_compiling():
                    say_slow(x.dtype, compute)
                return lora_linear_4bit(x, weight, base._state(weight), base.bias, adapters, compute)
        y: Tensor = super().forward(x, *args, **kwargs)
        return y


def reason_of_base(layer: Any) -> str | None:
    """Why the base layer has to be called as a module, or None."""
    base = layer.base_layer
    if not isinstance(base, Linear4bit):
        return "the base layer is not halfbyte's Linear4bit"
    if type(base).forward is not Linear4bit.forward:
        return "the base layer's class has a forward of its own"
    return "the base layer has hooks" if _hooked(base) else None


def reason_of_adapter(layer: Any, name: str) -> str | None:
    """Why PEFT has to compute this adapter, or None."""
    if name in layer.lora_variant:
        return f"the adapter is a variant of LoRA, {type(layer.lora_variant[name]).__name__}"
    A, B = layer.lora_A[name], layer.lora_B[name]
    if type(A) is not nn.Linear or type(B) is not nn.Linear:
        return "the adapter's parts are not of class torch.nn.Linear"
    if A.bias is not None or B.bias is not None:
        return "the adapter has a bias (lora_bias)"
    return "the adapter's parts have hooks" if _hooked(A) or _hooked(B) else None


def _compute_dtype(base: Linear4bit, x: Tensor) -> torch.dtype:
    return autocast_dtype(x) or base.compute_dtype or x.dtype


def _active(layer: Any) -> list[str]:
    """The active adapters that this layer has."""
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _reason_of_call(layer: Any, x: Tensor) -> str | None:
    """Why PEFT has to compute this input, with the adapters that are active, or None."""
    if not isinstance(x, Tensor):
        return f"the input is a {type(x).__name__}"
    base = layer.base_layer
    compute = _compute_dtype(base, x)
    if x.dtype not in FLOAT_DTYPES or compute not in FLOAT_DTYPES:
        return f"the input is {x.dtype}, and computed in {compute}"
    if x.device != base.weight.device:
        return "the input is on another device than the weight"
    for name in _active(layer):
        reason = reason_of_adapter(layer, name)
        if reason is not None:
            return reason
        for part in (layer.lora_A[name], layer.lora_B[name]):
            weight = part.weight
            if type(weight) not in PLAIN_TYPES:
                return f"the adapter's parameters are of class {type(weight).__name__}"
            if weight.dtype not in FLOAT_DTYPES or weight.device != x.device:
                return f"the adapter is {weight.dtype} on {weight.device}, the input on {x.device}"
    return None


def _adapters(layer: Any, x: Tensor) -> list[Adapter]:
    """The active adapters, with their inputs after dropout."""
    found = []
    for name in _active(layer):
        dropout = layer.lora_dropout[name]
        dropped = x if type(dropout) is nn.Identity else dropout(x)
        A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
        found.append(Adapter(A, B, layer.scaling[name], None if dropped is x else dropped))
    return found


def _hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward; hooks of all modules apart."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return "forward" in module.__dict__ and not _only_places(module.__dict__.get("_hf_hook"))


def _only_places(hook: Any) -> bool:
    """Whether this is accelerate's hook of a layer that stays on its device, where the input is then too."""
    kind = type(hook)
    return (
        kind.__module__ == "accelerate.hooks"
        and kind.__name__ == "AlignDevicesHook"
        and not hook.offload
        and not hook.io_same_device
    )


def _say(reason: str) -> None:
    """Once for each reason."""
    if not torch.compiler.is_compiling() and reason not in _said:
        _said.add(reason)
        _logger.warning("a fused LoRA layer runs PEFT's own forward: %s", reason)
