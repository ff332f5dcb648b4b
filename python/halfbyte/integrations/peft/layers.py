"""The class of fused layers. Imported only where PEFT's 4-bit layers are there already."""

from __future__ import annotations

import logging
from typing import Any

import torch
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch import Tensor, nn

from halfbyte._checks import FLOAT_DTYPES
from halfbyte.autograd import autocast_dtype
from halfbyte.nn.linear import Linear4bit, say_slow
from halfbyte.nn.lora import Adapter, lora_linear_4bit

_logger = logging.getLogger(__name__)
_said: set[str] = set()


class FusedLinear4bit(PeftLinear4bit):  # type: ignore[misc]
    """PEFT's 4-bit LoRA layer, whose forward is one product where it can be; see `halfbyte.integrations.peft.fuse`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base and active adapters: `[..., in_features]` to `[..., out_features]`, in the dtype of `x`."""
        y: Tensor
        # States of the layer that PEFT computes by the base layer alone, or by samples.
        if not (args or kwargs or self._disable_adapters or self.merged_adapters):
            base = self.base_layer
            reason = reason_of_base(self)
            adapters = None
            if reason is None:
                compute = autocast_dtype(x) or base.compute_dtype or x.dtype
                reason = _reason_of_call(x, base.weight, compute)
            if reason is None:
                reason, adapters = _adapters(self, x)
            if adapters:
                if compute is torch.float32 and x.dtype.itemsize == 2 and not torch.compiler.is_compiling():
                    say_slow(x.dtype, compute)
                weight = base.weight
                return lora_linear_4bit(x, weight, base._state(weight), base.bias, adapters, compute)
            if reason is not None:
                _say(reason)
        y = super().forward(x, *args, **kwargs)
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


def _reason_of_call(x: Tensor, weight: Tensor, compute: torch.dtype) -> str | None:
    if x.dtype not in FLOAT_DTYPES or compute not in FLOAT_DTYPES:
        return f"inputs of {x.dtype}, computed in {compute}"
    return "the input is on another device than the weight" if x.device != weight.device else None


def _adapters(layer: Any, x: Tensor) -> tuple[str | None, list[Adapter]]:
    """The active adapters; or why PEFT has to compute one of them."""
    found: list[Adapter] = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        reason = reason_of_adapter(layer, name)
        if reason is not None:
            return reason, []
        A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
        if type(A) is not nn.Parameter or type(B) is not nn.Parameter:
            return f"the adapter's parameters are of {type(A).__name__} and {type(B).__name__}", []
        if A.dtype not in FLOAT_DTYPES or B.dtype not in FLOAT_DTYPES or A.device != x.device or B.device != x.device:
            return f"the adapter is {A.dtype} on {A.device}, the input on {x.device}", []
        dropout = layer.lora_dropout[name]
        dropped = x if type(dropout) is nn.Identity else dropout(x)
        found.append(Adapter(A, B, layer.scaling[name], None if dropped is x else dropped))
    return None, found


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
