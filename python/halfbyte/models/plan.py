"""How the tensors of a checkpoint get into a model: decided by names, shapes and dtypes, before anything is changed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from halfbyte._native import CheckpointError
from halfbyte.models import packed
from halfbyte.models import transformers_weights as weights
from halfbyte.models.checkpoint_reader import Folder
from halfbyte.models.layers import is_transformers_model, join, paths
from halfbyte.models.packed import Packed
from halfbyte.models.recipe import bits_of
from halfbyte.models.transformers_weights import Entry
from halfbyte.offline import config_json
from halfbyte.offline.shards import AGAIN
from halfbyte.state import PACKED_KEYS

_logger = logging.getLogger(__name__)

EXTRA = "_extra_state"


@dataclass
class Plan:
    """How the tensors of a checkpoint get into a model."""

    entries: list[Entry] = field(default_factory=list)
    packed: dict[str, Packed] = field(default_factory=dict)
    """Weights that are packed in the checkpoint, by their names in the model."""
    found: dict[str, Packed] = field(default_factory=dict)
    """All packed weights of the checkpoint, by their names there."""
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    """Those on the meta device that no checkpoint holds."""


def make_plan(model: nn.Module, source: Folder) -> Plan:
    """Compare a checkpoint with a model, by names, shapes and dtypes alone.

    Raises:
        CheckpointError: Shapes disagree, a state has no weight, or the checkpoint is quantized in another way.
    """
    method = config_json.existing_quantization(source.config) if source.config else None
    if method not in (None, "bitsandbytes"):
        raise CheckpointError(
            f"{source.path}: is quantized with {method}, expected bitsandbytes' format of 4 bits or of LLM.int8(); "
            "load it with the library of that method, or quantize the 16-bit checkpoint that it was made from"
        )
    plan = Plan(found=_packed_weights(source))
    beside = {name for one in plan.found.values() for name in one.parts.values()}
    names = [name for name in source.names if name not in beside]

    tensors = persistent(model)
    if is_transformers_model(model):
        plan.entries, plan.unexpected = weights.entries(model, names, source.facts)  # type: ignore[arg-type]
        extra = weights.expected_extra(model, plan.unexpected)  # type: ignore[arg-type]
        plan.unexpected = [name for name in plan.unexpected if name not in extra]
    else:
        plan.entries = [Entry([name], {name: source.facts(name)}) for name in names if name in tensors]
        plan.unexpected = [name for name in names if name not in tensors]
    _take_packed(model, source, plan)
    given = {name for entry in plan.entries for name in entry.targets} | set(plan.packed)
    plan.missing = _missing(model, tensors, given)
    plan.buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.is_meta and name not in tensors}
    _check_tensors(source, plan, tensors)
    return plan


def _packed_weights(source: Folder) -> dict[str, Packed]:
    """The packed weights of a checkpoint, each with its weight and what says how it is packed."""
    try:
        candidates = packed.find(source.names, lambda name: source.facts(name)[1])
    except ValueError as error:
        raise CheckpointError(f"{source.path}: {error}") from None
    found = {}
    names = frozenset(source.names)
    for weight, one in candidates.items():
        first = next(iter(one.parts.values()))
        if one.mark is None:
            if weight in source:
                raise CheckpointError(
                    f"{source.file(first)}: {first} is a part of a packed weight, but the checkpoint lacks "
                    f"{weight}.{PACKED_KEYS[0]}; {AGAIN}"
                )
            continue
        missing = weight if weight not in source else next(iter(one.lacking(names)), None)
        if missing is not None and (one.bits == 8 or missing == weight):
            raise CheckpointError(
                f"{source.file(first)}: {first} is a part of a packed weight, but the checkpoint lacks {missing}; "
                f"{AGAIN}"
            )
        found[weight] = one
    return found


def persistent(model: nn.Module) -> dict[str, Tensor]:
    """Everything that the model's state dict holds, but for what is beside weights that are packed already."""
    ours: set[str] = set()
    for module, module_paths in paths(model).items():
        for weight in (join(path, "weight") for path in module_paths):
            if bits_of(module) == 4:
                ours.update(f"{weight}.{key}" for key in packed.KEYS_4BIT)
            elif bits_of(module) == 8:
                ours.update(packed.beside(weight, key) for key in packed.KEYS_8BIT)
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and name not in ours}


def _take_packed(model: nn.Module, source: Folder, plan: Plan) -> None:
    """Take the packed weights out of the entries."""
    for entry in plan.entries:
        bases = [name for name in entry.sources if name in plan.found]
        if not bases:
            continue
        if entry.convert is not None:
            raise CheckpointError(
                f"{source.path}: {bases[0]} is {plan.found[bases[0]].bits}-bit, but {type(model).__name__} wants it "
                f"split or merged into {', '.join(entry.targets)}, which needs 16 bits: keep it when quantizing, as by "
                f"--rule '{bases[0].split('.')[-2]}=keep'"
            )
        (target,) = entry.targets
        plan.packed[target] = plan.found[bases[0]]
    plan.entries = [entry for entry in plan.entries if not (set(entry.targets) & set(plan.packed))]


def _missing(model: nn.Module, tensors: Mapping[str, Tensor], given: set[str]) -> list[str]:
    """Names of the model that nothing of the checkpoint fills, directly or through a tie."""
    together: dict[str, set[str]] = {name: {name} for name in tensors}

    def tie(a: str, b: str) -> None:
        if a in together and b in together and together[a] is not together[b]:
            together[a] |= together[b]
            for name in together[b]:
                together[name] = together[a]

    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        tie(first.setdefault(id(tensor), name), name)
    if is_transformers_model(model):
        for a, b in weights.tied_names(model):  # type: ignore[arg-type]
            tie(a, b)
    missing = [name for name in tensors if not (together[name] & given)]
    if is_transformers_model(model):
        absent = weights.expected_absent(model, missing)  # type: ignore[arg-type]
        # What is on the meta device must come from somewhere, whatever the architecture says.
        missing = [name for name in missing if name not in absent or tensors[name].is_meta]
    return missing


def is_extra(name: str) -> bool:
    """Is it the state of a module's own making (`get_extra_state`), of whatever shape?"""
    return name.rpartition(".")[2] == EXTRA


def _check_tensors(source: Folder, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    """Tensors that are filled as they are must have the model's shapes, and be numbers where the model has numbers."""
    wrong = []
    for entry in plan.entries:
        for name, (shape, dtype) in entry.targets.items():
            held = tensors.get(name)
            if held is None or is_extra(name):
                continue
            stored = entry.stored_as(name)
            if shape != tuple(held.shape):
                wrong.append(f"{stored} is {list(shape)}, the model has {list(held.shape)}")
            elif dtype is torch.int8 and held.is_floating_point() and name.rpartition(".")[2] == "weight":
                wrong.append(f"{stored} is torch.int8, but its scales {packed.beside(stored, packed.SCB)} are missing")
            elif held.is_floating_point() and not (dtype.is_floating_point and dtype.itemsize > 1):
                wrong.append(f"{stored} is {dtype}, the model has {held.dtype}")
    if wrong:
        raise CheckpointError(f"{source.path}: {some(wrong)}")


def report(model: nn.Module, source: Folder, plan: Plan, strict: bool, unexpected: bool = True) -> None:
    """Raise for, or else log, names that only one side has; without `unexpected`, the checkpoint's are only logged.

    Raises:
        CheckpointError: There are such names, and `strict`.
    """
    what = []
    if plan.missing:
        what.append(f"the checkpoint lacks {some(plan.missing)}")
    if plan.unexpected:
        what.append(f"{type(model).__name__} has no place for {some(plan.unexpected)}")
    if strict and (plan.missing or (unexpected and plan.unexpected)):
        raise CheckpointError(f"{source.path}: {'; '.join(what)}")
    for line in what:
        _logger.warning("%s: %s", source.path, line)


def some(items: Sequence[str], most: int = 10) -> str:
    """The first few of many, and how many there are."""
    rest = len(items) - most
    return ", ".join(items[:most]) + (f" and {rest} more" if rest > 0 else "")
