"""Experts of a whole model in pinned host memory: which of them stay on the GPU, and how often each was chosen.

What a layer does with its experts there is said in `halfbyte.nn.expert_offload`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from halfbyte._terminal import format_bytes
from halfbyte.backends import host_memory
from halfbyte.nn import Experts4bit, expert_offload

_logger = logging.getLogger(__name__)

_Model = TypeVar("_Model", bound=nn.Module)


class Resident(NamedTuple):
    """Which experts stay on the GPU.

    Attributes:
        experts: Their numbers, by the path of the layer's experts.
        nbytes: Of all of them.
    """

    experts: dict[str, list[int]]
    nbytes: int


def offload_experts(
    model: _Model,
    device: torch.device | str | int = "cuda",
    *,
    resident_bytes: int = 0,
    counts: Mapping[str, Tensor] | None = None,
) -> _Model:
    """Keep the packed experts of a model in pinned host memory, and everything else on a GPU.

    Args:
        model: With experts of 4 bits (`halfbyte.nn.Experts4bit`), on the CPU or on a GPU. Of a model on the CPU only
            what stays on the GPU goes there.
        device: The GPU.
        resident_bytes: Bytes of the GPU's own memory for experts. They are given to experts of the whole model in the
            order of `counts`, the most often chosen first; equals, and all experts without counts, by their number,
            and then in the order of layers. An expert for which the bytes that are left do not suffice is passed over.
        counts: How often each expert was chosen, `[experts]` by the path of `Experts4bit` in the model, as
            `count_experts` gives it. Layers that it lacks count as never chosen.

    Returns:
        `model`, changed in place. Called again, it changes which experts are resident.

    Raises:
        ValueError: `device` is no CUDA device that torch sees, the model has no experts of 4 bits or has some on the
            meta device, `resident_bytes` is below 0, or `counts` does not fit the model. The model is unchanged.
        TypeError: An argument has a wrong type.
        RuntimeError: The host memory cannot be pinned. Layers before that one are offloaded, and the model works where
            it was on that GPU.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers = experts_of(model)
    if not layers:
        raise ValueError(f"model must have experts of 4 bits (Experts4bit), got {type(model).__name__} without any")
    target = host_memory.check_device(device)
    for path, experts in layers.items():
        try:
            expert_offload.check(experts)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    chosen = choose_resident(layers, resident_bytes, counts)
    for path, experts in layers.items():
        experts.offload(target, resident=chosen.experts[path])
    moved = model.to(target)
    total = sum(experts.num_experts for experts in layers.values())
    kept = sum(map(len, chosen.experts.values()))
    _logger.info("%d of %d experts stay on %s: %s", kept, total, target, format_bytes(chosen.nbytes))
    return moved


def experts_of(model: nn.Module) -> dict[str, Experts4bit]:
    """The experts of a model by their paths."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Experts4bit)}


def choose_resident(
    layers: Mapping[str, Experts4bit], resident_bytes: int, counts: Mapping[str, Tensor] | None
) -> Resident:
    """Which experts stay on the GPU, by the rule of `offload_experts`."""
    check_resident_bytes("resident_bytes", resident_bytes)
    often = _checked(layers, {} if counts is None else counts)
    order = sorted(
        (-often[path][index] if path in often else 0, index, place, path)
        for place, (path, experts) in enumerate(layers.items())
        for index in range(experts.num_experts)
    )
    found: dict[str, list[int]] = {path: [] for path in layers}
    left = resident_bytes
    for _, index, _, path in order if resident_bytes else ():
        size = expert_offload.bytes_of(layers[path], index)
        if size <= left:
            left -= size
            found[path].append(index)
    return Resident({path: sorted(indices) for path, indices in found.items()}, resident_bytes - left)


def check_resident_bytes(name: str, value: object) -> None:
    """That an argument of this name can be a number of bytes."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


def _checked(layers: Mapping[str, Experts4bit], counts: Mapping[str, Tensor]) -> dict[str, list[int]]:
    if not isinstance(counts, Mapping):
        raise TypeError(f"counts must be a mapping from paths to tensors, got {type(counts).__name__}")
    for path, count in counts.items():
        if path not in layers:
            raise ValueError(
                f"counts must have paths of experts of the model, got {path!r}; it has {', '.join(layers)}"
            )
        expected = layers[path].num_experts
        if not isinstance(count, Tensor) or count.is_floating_point() or count.shape != (expected,):
            found = f"{count.dtype} {list(count.shape)}" if isinstance(count, Tensor) else type(count).__name__
            raise ValueError(f"counts[{path!r}] must be a tensor of integers [{expected}], got {found}")
    return {path: count.tolist() for path, count in counts.items()}


@contextlib.contextmanager
def count_experts(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Count how often each expert of a model is chosen, while the context is open.

    Args:
        model: With experts of 4 bits.

    Yields:
        int64 `[experts]` by the path of each `Experts4bit`, on the device of the router's choices, from the layer's
        first call on. Nothing waits for the GPU, and a captured graph counts in each replay if the layer was called
        before it was captured.

    Raises:
        ValueError: The model has no experts of 4 bits.

    >>> import halfbyte, torch
    >>> from halfbyte.nn import Expert, Experts4bit, Linear4bit
    >>> expert = Expert()
    >>> for name in ("up_proj", "down_proj"):
    ...     expert.add_module(name, Linear4bit(64, 64, bias=False))
    >>> experts = Experts4bit([expert], (None, "up_proj", "down_proj")).to("cpu")
    >>> experts.act_fn = torch.nn.SiLU()
    >>> with halfbyte.count_experts(experts) as counts:
    ...     y = experts(torch.randn(3, 64), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    >>> counts
    {'': tensor([3])}
    """
    layers = experts_of(model)
    if not layers:
        raise ValueError(f"model must have experts of 4 bits (Experts4bit), got {type(model).__name__} without any")
    counts: dict[str, Tensor] = {}
    handles = []
    try:
        for path, experts in layers.items():
            handles.append(experts.register_forward_pre_hook(_counter(path, counts), with_kwargs=True))
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _counter(path: str, counts: dict[str, Tensor]) -> Any:
    @torch.inference_mode(False)
    @torch.no_grad()
    def count(experts: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids: Tensor = (args[1] if len(args) > 1 else kwargs["top_k_index"]).reshape(-1)
        number = experts.num_experts
        if path not in counts:
            counts[path] = torch.zeros(number, dtype=torch.int64, device=ids.device)
        there = (ids >= 0) & (ids < number)
        counts[path].scatter_add_(0, ids.clamp(0, number - 1).long(), there.long())

    return count
