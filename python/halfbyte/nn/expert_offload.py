"""Experts that stay in pinned host memory, and are read by a GPU as the router chooses.

What moves. The packed weights of a layer's experts, codes and scales, are put into pinned memory of the host, one
region for the layer. Their parameters become tensors of the GPU whose bytes are there
(`halfbyte.backends.host_memory`); router, biases, adapters and everything else are on the GPU. Experts that are
`resident` have their packed weights in the GPU's own memory. That is all: nothing is marked, and what a layer does
follows from where its bytes are. So, with experts of the host:

    forward, few tokens     the kernels read the experts that were chosen, over the bus, in place
    forward, many tokens    the layer's experts are copied to a buffer that all layers share, and read there
                            (`halfbyte.backends.expert_stage`, which also says how many are many)
    backward                likewise; the packed weights have no gradients
    one by one, hooks       every other kernel reads them in place too
    dequantize              gives dense weights on the GPU
    state dict, saving      the same names and bytes as without
    pickles, deep copies    of the values; what comes out is an ordinary layer of the GPU
    .cpu(), .to(other GPU)  an ordinary layer there
    .to(the same GPU)       nothing: to bring all experts to the GPU, `offload(resident=range(num_experts))`
    load_state_dict         writes codes where they are, and brings scales to the GPU; with `assign=True` the
                            tensors are those that were given

accelerate moves modules that a device map puts on "cpu" to the GPU as a whole, in each forward. Experts that are 4-bit
layers get no such hook: `halfbyte.integrations.transformers.expert_offload`.

Results are the same bits as those of the layer on the GPU, whatever is resident. Nothing waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.backends import host_memory
from halfbyte.nn._quantized import Quantized
from halfbyte.nn.linear4bit import Linear4bit
from halfbyte.nn.params import Params4bit
from halfbyte.ops.packed import plain


def packed_tensors(layer: Quantized) -> list[Tensor]:
    """The tensors of a packed weight that move: codes, and all that belongs to the scales."""
    return [plain(layer.weight).detach(), *layer._state().tensors()]


def bytes_of(experts: Any, index: int) -> int:
    """What one expert takes: its packed weights, each tensor rounded up to 256 bytes."""
    return sum(host_memory.room(tensor) for layer in _layers(experts, index) for tensor in packed_tensors(layer))


def check(experts: Any) -> None:
    """That the experts of a layer can be put into host memory.

    Raises:
        ValueError: One is not packed in 4 bits, or has no bytes; the message names it.
    """
    for index in range(experts.num_experts):
        expert: Any = experts._modules.get(str(index))
        for name in experts.projections:
            projection = None if expert is None or name is None else expert._modules.get(name)
            if name is not None and projection is None:
                raise ValueError(f"experts must have a layer {index}.{name}, got none")
            if projection is not None and not any(isinstance(module, Linear4bit) for module in projection.modules()):
                raise ValueError(
                    f"experts must be 4-bit layers (Linear4bit) to be offloaded, got {type(projection).__name__} in "
                    f"{index}.{name}"
                )
        for layer in _layers(experts, index):
            weight = layer._parameters.get("weight")
            if weight is not None and weight.is_meta:
                raise ValueError(
                    f"experts must hold their weights to be offloaded, got one on the meta device in {index}: "
                    "accelerate has offloaded it, or it was never loaded"
                )
            if not isinstance(weight, Params4bit) or not weight.bnb_quantized or layer.quant_state is None:
                found = "no weight" if weight is None else f"{type(weight).__name__} of {weight.dtype}"
                raise ValueError(f"experts must be quantized to be offloaded, got {found} in {index}")


def resident_numbers(experts: Any, resident: Iterable[int]) -> frozenset[int]:
    """The numbers of experts that `resident` has.

    Raises:
        TypeError: It has something that is no integer.
        ValueError: It has the number of no expert.
    """
    numbers = list(resident)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"resident must have integers, got {number!r}")
        if not 0 <= number < experts.num_experts:
            raise ValueError(f"resident must have numbers from 0 to {experts.num_experts - 1}, got {number}")
    return frozenset(numbers)


def resident_of(experts: Any) -> list[int]:
    """The numbers of experts whose packed weights are not in host memory."""
    return [index for index in range(experts.num_experts) if not any(_in_host(experts, index))]


def offload(experts: Any, device: torch.device | str | int, resident: Iterable[int]) -> None:
    """See `halfbyte.nn.Experts4bit.offload`."""
    target = host_memory.check_device(device)
    kept = resident_numbers(experts, resident)
    check(experts)
    away = [index for index in range(experts.num_experts) if index not in kept]
    layers = [layer for index in away for layer in _layers(experts, index)]
    if not all(there for index in away for there in _in_host(experts, index, target)):
        memory = host_memory.HostMemory(
            target, sum(host_memory.room(tensor) for layer in layers for tensor in packed_tensors(layer))
        )
        for layer in layers:
            layer.weight = moved(layer.weight, layer, memory.place)
    for index in sorted(kept):
        for layer, there in zip(_layers(experts, index), _in_host(experts, index), strict=True):
            if there:
                layer.weight = moved(layer.weight, layer, lambda tensor: tensor.to(target, copy=True))
    experts._held.hold(None)
    experts.to(target)


def moved(weight: Any, layer: Quantized | None, place: Any) -> Params4bit:
    """A packed parameter whose tensors are what `place` makes of those of another."""
    state = weight.quant_state if layer is None else layer._state()
    made: Params4bit = weight._like(place(plain(weight).detach()), state.map(place))
    return made


def _layers(experts: Any, index: int) -> list[Linear4bit]:
    """The packed layers of one expert, inside of others where adapters are on them."""
    expert: nn.Module = experts._modules[str(index)]
    return [module for module in expert.modules() if isinstance(module, Linear4bit)]


def _in_host(experts: Any, index: int, device: torch.device | None = None) -> Iterator[bool]:
    """Whether each layer of an expert is in host memory, for a certain GPU if one is given."""
    for layer in _layers(experts, index):
        codes = plain(layer.weight)
        yield host_memory.is_there(codes) and device in (None, codes.device)
