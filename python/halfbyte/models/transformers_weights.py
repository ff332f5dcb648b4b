"""How transformers' models take a checkpoint's tensors: their names, what is converted, tied, and computed.

All of it is asked of the installed transformers, which must be imported already: the model is one of its classes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfbyte.models.transformers_experts import mapping_for
from halfbyte.offline.transformers_names import renamed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Facts = Callable[[str], tuple[tuple[int, ...], torch.dtype]]


@dataclass
class Entry:
    """Tensors of a checkpoint that are used together, and what they become in the model."""

    sources: list[str]
    targets: dict[str, tuple[tuple[int, ...], torch.dtype]]
    """Name in the model, shape and dtype."""
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    """Where it is more than a change of name: sources by name to targets by name."""

    def stored_as(self, target: str) -> str:
        """The name in the checkpoint of what becomes `target`, which is itself where it is put together or split."""
        return self.sources[0] if self.convert is None else target


def entries(model: PreTrainedModel, names: Iterable[str], facts: Facts) -> tuple[list[Entry], list[str]]:
    """What each tensor of a checkpoint becomes, by transformers' own tables; and those that become nothing.

    Args:
        model: The model, on any device.
        names: Of the checkpoint's tensors.
        facts: Shape and dtype of a tensor.

    Raises:
        ValueError: transformers cannot convert a group of tensors; the message names them.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    found: list[Entry] = []
    unexpected: list[str] = []
    groups: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    mapping = mapping_for(model, get_model_conversion_mapping(model))
    for name, target, pattern, converter in renamed(model, names, mapping):
        if target is None:
            unexpected.append(name)
        elif pattern is None:
            found.append(Entry([name], {target: facts(name)}))
        else:
            groups.setdefault(target, (converter, []))[1].append((name, pattern))
    for key, (converter, sources) in groups.items():
        convert = _conversion(model, key, converter, sources)
        blank = {name: torch.empty(facts(name)[0], dtype=facts(name)[1], device="meta") for name, _ in sources}
        try:
            made = convert(blank)
        except Exception as error:
            raise ValueError(
                f"{sources[0][0]} and {len(sources) - 1} more: transformers cannot make {key} of them: {error}"
            ) from error
        targets = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()}
        found.append(Entry([name for name, _ in sources], targets, convert))
    return found, unexpected


def _conversion(
    model: PreTrainedModel, key: str, converter: Any, sources: list[tuple[str, str]]
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """The conversion of one group of tensors."""

    def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Collects its tensors, so each use needs its own.
        fresh = copy.deepcopy(converter)
        for name, pattern in sources:
            fresh.add_tensor(key, name, pattern, tensors[name])
        made = fresh.convert(key, model=model, config=model.config)
        if isinstance(made, tuple):
            # transformers 5.0 returns what went wrong beside the tensors.
            made, problems = made
            if problems:
                raise ValueError(next(iter(problems.values())))
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    return convert


def expected_absent(model: PreTrainedModel, missing: Iterable[str]) -> set[str]:
    """Those names that the architecture says a checkpoint may lack."""
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return {name for name in missing if any(re.search(pattern, name) for pattern in patterns)}


def expected_extra(model: PreTrainedModel, unexpected: Iterable[str]) -> set[str]:
    """Those names that the architecture says a checkpoint may have besides."""
    patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    # Buffers that older releases saved, and newer ones compute.
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return {name for name in unexpected if any(re.search(pattern, name) for pattern in patterns)}


def tied_names(model: PreTrainedModel) -> list[tuple[str, str]]:
    """Pairs of names of weights that are one."""
    return list((getattr(model, "all_tied_weights_keys", None) or {}).items())


def compute_buffers(model: PreTrainedModel, buffers: Mapping[str, Tensor]) -> None:
    """Let the model compute its buffers that no checkpoint holds, such as rotary frequencies.

    Args:
        model: The model; its parameters may be on the meta device, and stay what they are.
        buffers: Those to compute, by name, on the meta device.

    Raises:
        ValueError: The model leaves some of them as they are; the message names them. All of them are then on the meta
            device, as before.
    """
    blank = {name: _blank(buffer) for name, buffer in buffers.items()}
    for name, buffer in blank.items():
        _set_buffer(model, name, buffer)
    try:
        with _as_if_loaded(model, set(blank)):
            model.initialize_weights()  # type: ignore[no-untyped-call]
        made = {name: model.get_buffer(name) for name in blank}
        untouched = [name for name, buffer in made.items() if buffer.is_meta or _is_blank(buffer)]
        if untouched:
            raise ValueError(
                f"{type(model).__name__} does not compute its buffers {', '.join(untouched)}, which are on the meta "
                "device and in no checkpoint; build it with accelerate.init_empty_weights(include_buffers=False), "
                "which leaves only parameters on the meta device"
            )
    except BaseException:
        for name, buffer in buffers.items():
            _set_buffer(model, name, buffer)
        raise


def _blank(buffer: Tensor) -> Tensor:
    """A buffer on the CPU, full of what nobody computes."""
    if buffer.is_floating_point() or buffer.is_complex():
        return torch.full_like(buffer, float("nan"), device="cpu")
    return torch.full_like(buffer, True if buffer.dtype is torch.bool else torch.iinfo(buffer.dtype).min, device="cpu")


def _is_blank(buffer: Tensor) -> bool:
    if buffer.dtype is torch.bool or buffer.numel() == 0:
        # A mask may well be all true: nothing to tell.
        return False
    if buffer.is_floating_point() or buffer.is_complex():
        return bool(buffer.isnan().all())
    return bool((buffer == torch.iinfo(buffer.dtype).min).all())


def _set_buffer(model: torch.nn.Module, name: str, value: Tensor) -> None:
    parent, _, attribute = name.rpartition(".")
    model.get_submodule(parent)._buffers[attribute] = value


@contextmanager
def _as_if_loaded(model: PreTrainedModel, blank: set[str]) -> Iterator[None]:
    """Mark everything but the blank buffers as loaded, so that initialization leaves it alone."""
    tensors: list[Tensor] = list(model.parameters())
    tensors += [tensor for name, tensor in model.named_buffers() if name not in blank]
    objects: list[Any] = [*tensors, *model.modules()]
    before = [item.__dict__.get("_is_hf_initialized") for item in objects]
    try:
        for item in objects:
            item.__dict__["_is_hf_initialized"] = isinstance(item, Tensor)
        yield
    finally:
        for item, value in zip(objects, before, strict=True):
            if value is None:
                item.__dict__.pop("_is_hf_initialized", None)
            else:
                item.__dict__["_is_hf_initialized"] = value
