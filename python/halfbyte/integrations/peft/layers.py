"""The forward of PEFT's 4-bit LoRA layers. Imported only when those have been imported."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.integrations.accelerate_hooks import only_places
from halfbyte.nn.expert_lora import READERS, Adapted
from halfbyte.nn.linear4bit import Linear4bit, say_slow
from halfbyte.nn.lora import Adapter, lora_linear_4bit
from halfbyte.ops.autograd import autocast_dtype
from halfbyte.ops.checks import FLOAT_DTYPES
from halfbyte.ops.dispatch import PLAIN_TYPES

VARIABLE = "HALFBYTE_FUSE_LORA"
"""An environment variable; with "0" only layers that `fuse` marked are fused."""

MARK = "_halfbyte_fused"
"""An attribute of layers: True after `fuse`, False after `unfuse`."""

_logger = logging.getLogger(__name__)
_said: set[str] = set()


def enter(bnb: ModuleType) -> None:
    """Give PEFT's `Linear4bit` a forward that is one product where it can be; see `halfbyte.integrations.peft.fuse`.

    Args:
        bnb: `peft.tuners.lora.bnb`. Where PEFT found no bitsandbytes when it was imported, there is nothing to do.
    """
    cls = getattr(bnb, "Linear4bit", None)
    if cls is None or is_entered(cls):
        return
    theirs: Callable[..., Tensor] = cls.forward
    wanted = os.environ.get(VARIABLE) != "0"

    @functools.wraps(theirs)
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # With arguments, or where adapters are off or merged, PEFT computes by the base layer alone or by samples.
        if (
            self.__dict__.get(MARK, wanted)
            and not (args or kwargs or self._disable_adapters or self.merged_adapters)
            and isinstance(x, Tensor)
        ):
            base: Any = self._modules["base_layer"]
            reason = reason_of_base(base)
            if reason is None:
                weight = base.weight
                compute = autocast_dtype(x) or base.compute_dtype or x.dtype
                reason, adapters = _active(self, x, weight.device, compute)
                if adapters:
                    if compute is torch.float32 and x.dtype is not compute and not torch.compiler.is_compiling():
                        say_slow(x.dtype, compute)
                    return lora_linear_4bit(x, weight, base._state(weight), base.bias, adapters, compute)
            if reason is not None and isinstance(base, Linear4bit):
                _say(reason)
        return theirs(self, x, *args, **kwargs)

    forward.__dict__["__halfbyte__"] = wanted
    cls.forward = forward
    READERS.append(functools.partial(_adapted, cls))


def is_entered(cls: Any) -> bool:
    """Whether the forward of PEFT's class is the one given above, and nobody has replaced it since."""
    return hasattr(cls.forward, "__halfbyte__")


def is_fused(layer: nn.Module) -> bool:
    """Whether a layer of PEFT's class is computed as one product, as far as its mark says."""
    wanted = getattr(type(layer).forward, "__halfbyte__", None)
    return wanted is not None and bool(layer.__dict__.get(MARK, wanted))


def reason_of_base(base: nn.Module) -> str | None:
    """Why the base layer has to be called as a module, or None."""
    if not isinstance(base, Linear4bit):
        return "the base layer is not halfbyte's Linear4bit"
    if type(base).forward is not Linear4bit.forward:
        return "the base layer's class has a forward of its own"
    return "the base layer has hooks" if _hooked(base) else None


def reason_of_adapter(layer: Any, name: str) -> str | None:
    """Why PEFT has to compute this adapter, or None."""
    # Not by attributes: as those, modules take `torch.nn.Module` a while to find.
    modules = layer._modules
    A, B = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    if (
        name not in layer.lora_variant
        and type(A) is type(B) is nn.Linear
        # Wrappers turn parameters into plain attributes, which `_parameters` does not have.
        and A._parameters.get("bias", A) is B._parameters.get("bias", B) is None
        and not _hooked(A)
        and not _hooked(B)
    ):
        return None
    if name in layer.lora_variant:
        return f"the adapter is a variant of LoRA, {type(layer.lora_variant[name]).__name__}"
    if type(A) is not nn.Linear or type(B) is not nn.Linear:
        return "the adapter's parts are not of class torch.nn.Linear"
    return "the adapter's parts have hooks" if _hooked(A) or _hooked(B) else "the adapter has a bias (lora_bias)"


def _active(layer: Any, x: Tensor, device: torch.device, compute: torch.dtype) -> tuple[str | None, list[Adapter]]:
    """The active adapters with their inputs after dropout; or why PEFT has to compute this input with one of them."""
    if x.dtype not in FLOAT_DTYPES or compute not in FLOAT_DTYPES:
        return f"the input is {x.dtype}, and computed in {compute}", []
    if x.device != device:
        return "the input is on another device than the weight", []
    modules = layer._modules
    As, Bs = modules["lora_A"]._modules, modules["lora_B"]._modules
    found = []
    names = [name for name in layer.active_adapters if name in As]
    for name in names:
        reason = reason_of_adapter(layer, name)
        if reason is not None:
            return reason, []
        A: Any = As[name]._parameters.get("weight")
        B: Any = Bs[name]._parameters.get("weight")
        A, B = As[name].weight if A is None else A, Bs[name].weight if B is None else B
        for part in (A, B):
            if type(part) not in PLAIN_TYPES:
                return f"the adapter's parameters are of class {type(part).__name__}", []
            if part.dtype not in FLOAT_DTYPES or part.device != device:
                return f"the adapter is {part.dtype} on {part.device}, the input on {device}", []
        found.append(Adapter(A, B, layer.scaling[name]))
    # Random numbers are drawn only when it is known that they are used.
    dropouts = modules["lora_dropout"]._modules
    for i, name in enumerate(names):
        dropout = dropouts[name]
        if type(dropout) is not nn.Identity:
            dropped = dropout(x)
            if dropped is not x:
                found[i] = found[i]._replace(x=dropped)
    return None, found


def _adapted(cls: Any, layer: Any) -> Adapted | None:
    """What a layer with one active adapter is made of, where all experts can be computed together."""
    if type(layer) is not cls or not is_entered(cls) or not is_fused(layer):
        return None
    own, modules = vars(layer), layer._modules
    base: Any = modules["base_layer"]
    names = [name for name in layer.active_adapters if name in modules["lora_A"]._modules]
    if layer._disable_adapters or layer.merged_adapters or len(names) != 1 or reason_of_base(base) is not None:
        return None
    (name,) = names
    A, B = (modules[part]._modules[name] for part in ("lora_A", "lora_B"))
    dropout = modules["lora_dropout"]._modules[name]
    if reason_of_adapter(layer, name) is not None or not (type(dropout) is nn.Identity or not dropout.training):
        return None
    factors: list[Any] = [A._parameters.get("weight"), B._parameters.get("weight")]
    if any(type(factor) not in PLAIN_TYPES or factor is None or factor.dtype not in FLOAT_DTYPES for factor in factors):
        return None
    entries = [
        *((own, key, own[key]) for key in ("_disable_adapters", "_active_adapter", MARK) if key in own),
        (modules["lora_A"]._modules, name, A),
        (modules["lora_B"]._modules, name, B),
        (modules["lora_dropout"]._modules, name, dropout),
        (A._parameters, "weight", factors[0]),
        (B._parameters, "weight", factors[1]),
        (vars(dropout), "training", dropout.training),
        (layer.scaling, name, layer.scaling[name]),
        (modules, "base_layer", base),
    ]
    return Adapted(base, Adapter(factors[0], factors[1], layer.scaling[name]), (layer, A, B, dropout), entries)


def _hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward; hooks of all modules apart."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return "forward" in module.__dict__ and not only_places(module.__dict__.get("_hf_hook"))


def _say(reason: str) -> None:
    """Once for each reason."""
    if not torch.compiler.is_compiling() and reason not in _said:
        _said.add(reason)
        _logger.info("a fused LoRA layer runs PEFT's own forward: %s", reason)
