"""Device maps that put 4-bit experts on "cpu" beside a GPU: they are read where they are, in pinned memory.

accelerate would move such modules to the GPU as a whole, in each forward. So the map that the loader and accelerate see
has these experts on the GPU, and every packed weight of theirs goes to pinned memory of the host as soon as it is made
(`halfbyte.nn.expert_offload`): it is a tensor of the GPU then. All else that a map puts on "cpu" is accelerate's.

A map may name experts one by one; those that it has on the GPU are resident. Where it names a block around the experts,
the block's entry is replaced by entries for its other parts. With several GPUs a block is left to accelerate: its parts
would be without the hook that brings their inputs together.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from halfbyte.backends import host_memory
from halfbyte.backends.host_memory import HostMemory
from halfbyte.integrations.accelerate_hooks import only_places
from halfbyte.nn import Experts4bit, Linear4bit, Params4bit
from halfbyte.nn.expert_offload import moved

_logger = logging.getLogger(__name__)


class OffloadedExperts:
    """The experts that a device map keeps in host memory, while a model is loaded.

    Attributes:
        experts: The GPU that each is read by, by its path.
    """

    def __init__(self) -> None:
        """None yet."""
        self.experts: dict[str, torch.device] = {}
        self._memories: dict[str, HostMemory] = {}

    def claim(self, model: nn.Module, device_map: dict[str, Any]) -> None:
        """Find them, and put them on their GPU in the map, which is changed."""
        gpus = {_gpu(target): target for target in device_map.values() if _gpu(target) is not None}
        if not gpus or not any(map(_is_cpu, device_map.values())):
            return
        for path, experts in list(model.named_modules()):
            if not isinstance(experts, Experts4bit) or not _is_packed(experts):
                continue
            targets = {str(index): target_of(device_map, f"{path}.{index}") for index in range(experts.num_experts)}
            away = [index for index, target in targets.items() if _is_cpu(target)]
            if not away or any(str(target) == "disk" for target in targets.values()):
                continue
            around = target_of(device_map, path.rpartition(".")[0])
            place = around if _gpu(around) is not None else next(iter(gpus.values()))
            if any(_gpu(target) not in (None, _gpu(place)) for target in targets.values()):
                continue
            device = host_memory.check_device(_gpu(place) or 0)
            if not _set_apart(model, device_map, path, len(gpus) == 1):
                continue
            for name in [name for name in device_map if name == path or name.startswith(f"{path}.")]:
                del device_map[name]
            device_map[path] = place
            self.experts.update((f"{path}.{index}", device) for index in away)

    def __contains__(self, name: str) -> bool:
        """Whether a parameter of this name is kept in host memory."""
        return bool(self.experts) and _expert_of(name) in self.experts

    def place(self, name: str, weight: Params4bit) -> Params4bit:
        """The packed weight of this name, in host memory."""
        expert = _expert_of(name)
        layer = expert.rpartition(".")[0]
        if layer not in self._memories:
            self._memories[layer] = HostMemory(self.experts[expert])
        return moved(weight, None, self._memories[layer].place)

    def finish(self) -> None:
        """When all weights are there."""
        self._memories.clear()


def without_hooks(model: nn.Module) -> None:
    """Remove what accelerate puts on the layers of experts that stay where they are.

    All modules of a model that it dispatches get hooks that bring inputs to their device. The one of the experts as a
    whole suffices: with others inside, experts would be called one by one.
    """
    for experts in model.modules():
        hook: Any = experts.__dict__.get("_hf_hook")
        if not isinstance(experts, Experts4bit) or not only_places(hook):
            continue
        inside = [module for module in experts.modules() if module is not experts and "_hf_hook" in module.__dict__]
        hooks = [module.__dict__["_hf_hook"] for module in inside]
        if all(only_places(one) and one.execution_device == hook.execution_device for one in hooks):
            for module in inside:
                _remove_hook(module)


def target_of(device_map: Mapping[str, Any], name: str) -> Any:
    """Where the longest entry that covers `name` sends it."""
    while True:
        if name in device_map:
            return device_map[name]
        if not name:
            return None
        name = name.rpartition(".")[0]


def _expert_of(name: str) -> str:
    """Of `….experts.3.up_proj.weight`, `….experts.3`."""
    return name.rsplit(".", 2)[0]


def _is_cpu(target: Any) -> bool:
    return str(target) == "cpu"


def _gpu(target: Any) -> int | None:
    """The number of a CUDA device that a map names; None for other targets."""
    if isinstance(target, int):
        return target
    device = None if target in (None, "disk") else torch.device(target)
    if device is None or device.type != "cuda":
        return None
    if device.index is None:
        return torch.cuda.current_device() if torch.cuda.is_available() else 0
    return device.index


def _is_packed(experts: Experts4bit) -> bool:
    """Whether all projections are 4-bit layers."""
    return all(
        isinstance(getattr(experts.get_submodule(str(index)), name, None), Linear4bit)
        for index in range(experts.num_experts)
        for name in experts.projections
        if name is not None
    )


def _set_apart(model: nn.Module, device_map: dict[str, Any], path: str, alone: bool) -> bool:
    """Have no entry cover the experts at `path` together with other modules; False where that cannot be."""
    entry = path
    while entry not in device_map and entry:
        entry = entry.rpartition(".")[0]
    if entry == path or not _is_cpu(device_map.get(entry)):
        # The experts' own, or that of a GPU beside entries of single experts.
        return True
    steps = path.removeprefix(f"{entry}.").split(".") if entry else path.split(".")
    around = [
        model.get_submodule(".".join([*([entry] if entry else []), *steps[:count]])) for count in range(len(steps))
    ]
    if not alone or any(_has_tensors(module) for module in around):
        _logger.warning(
            "device_map: the experts at %s are moved to the GPU as a whole in each forward, because %r is on the CPU "
            "as a whole; give them an entry of their own to have them read in place",
            path,
            entry,
        )
        return False
    more: dict[str, Any] = {}
    name = entry
    for module, step in zip(around, steps, strict=True):
        for child in module._modules:
            inner = f"{name}.{child}" if name else child
            if child != step and inner not in device_map:
                more[inner] = device_map[entry]
        name = f"{name}.{step}" if name else step
    del device_map[entry]
    device_map.update(more)
    return True


def _has_tensors(module: nn.Module) -> bool:
    return any(tensor is not None for held in (module._parameters, module._buffers) for tensor in held.values())


def _remove_hook(module: nn.Module) -> None:
    hooks: Any = sys.modules["accelerate.hooks"]
    hooks.remove_hook_from_module(module)
    forward = module.__dict__.get("forward")
    if getattr(forward, "__func__", None) is type(module).forward:
        # What accelerate puts back is the method of the class.
        del module.__dict__["forward"]
