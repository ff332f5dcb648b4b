"""The files of a checkpoint of packed weights, compared with the model that they are for before it is changed.

transformers reads tensors one by one and says of what went wrong at the end, in a report; a linear layer that it does
not find starts at random. Here the headers and the small parts beside the weights tell before anything happens.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping

from halfbyte import _native
from halfbyte._native import CheckpointError
from halfbyte.integrations.transformers.layers import chosen
from halfbyte.models import packed, transformers_weights
from halfbyte.models.expert_layouts import stand_ins
from halfbyte.models.load import layer_shape
from halfbyte.models.packed import Packed
from halfbyte.models.recipe import shape_of
from halfbyte.models.transformers_experts import mapping_for
from halfbyte.offline.shards import AGAIN, not_whole
from halfbyte.offline.transformers_names import renamed

_logger = logging.getLogger(__name__)


class Found(NamedTuple):
    """The packed weights of a checkpoint.

    Attributes:
        layers: By the paths of their layers.
        of_experts: Where several matrices of experts are one weight in the files: the dtype of those that do not say
            it. None where each matrix is a weight.
        own: Names, in the files and in the model, of tensors that are called as parts of packed weights are, and are
            none.
        dense: Names in the files of tensors that are not packed, by those in the model.
    """

    layers: dict[str, Packed]
    of_experts: torch.dtype | None
    own: frozenset[str]
    dense: dict[str, str]


def packed_in(
    model: Any, files: Sequence[str], keep: Sequence[str], floats: bool = False, quant_type: str | None = None
) -> Found | None:
    """The packed weights of a checkpoint; None when its files do not tell.

    Args:
        model: The transformers model that the checkpoint is for.
        files: The checkpoint's files.
        keep: Names of the modules that the checkpoint has in 16 bits, and those that any may have so.
        floats: Its config says that weights are kept as floats (`llm_int8_has_fp16_weight`): none may be of 8 bits.
        quant_type: "nf4" or "fp4", of weights that do not say it themselves.

    Raises:
        CheckpointError: A file is missing or broken; a packed weight lacks a part, has one that does not fit, another
            shape than the model's, or is one of many that the model holds as one tensor; or a linear layer is not in
            the checkpoint at all. The message names the tensor and the file.
    """
    if not files or not all(os.fspath(file).endswith(".safetensors") for file in files):
        return None
    with ExitStack() as stack:
        checkpoint = _Checkpoint([os.fspath(file) for file in files], stack)
        instead = stand_ins(model, checkpoint, quant_type)
        checkpoint.replace(instead.hidden, instead.tensors)
        found = _packed_weights(checkpoint)
        _check_floats(checkpoint, found, floats)
        beside = {name for one in found.values() for name in one.parts.values()}
        targets: dict[str, str] = {}
        merged: list[str] = []
        own: set[str] = set()
        for name, target, _, converter in renamed(
            model, [name for name in checkpoint.files if name not in beside], _mapping(model)
        ):
            if target is None:
                continue
            if packed.is_called_a_part(name):
                own |= {name, target}
            if name not in found:
                targets[target] = name
                if converter is not None:
                    merged.append(name)
            elif target.endswith("weight"):
                targets[target] = name
            else:
                raise CheckpointError(
                    f"{checkpoint.files[name]}: {name} is packed to {found[name].bits} bits, but transformers "
                    f"{transformers.__version__} holds it as part of {target}, one tensor for all experts, which "
                    "cannot be made of packed ones; make a 16-bit checkpoint of it by `halfbyte dequantize`, or load "
                    "the one that it was made from"
                )
        _check_complete(model, checkpoint, targets, merged, keep)
        _check_codes(model, checkpoint, targets, found)
        here = {target: found[name] for target, name in targets.items() if name in found}
        odd = list(instead.odd)
        for target, one in here.items():
            odd += _check_weight(model, checkpoint, target, one)
        if odd:
            _logger.warning("%s: %s", checkpoint.where, packed.odd_scales_note(odd, len(here)))
    layers = {target.rpartition(".")[0]: one for target, one in here.items()}
    dense = {target: name for target, name in targets.items() if name not in found}
    return Found(layers, instead.dtype if instead.hidden else None, frozenset(own), dense)


def check_dense(model: Any, files: Sequence[str], paths: Sequence[str]) -> None:
    """That a checkpoint to be quantized is not quantized already, whatever its config.json says.

    Args:
        model: The transformers model that the checkpoint is for.
        files: The checkpoint's files.
        paths: Of the layers to quantize.

    Raises:
        CheckpointError: A weight of these layers is packed, or of a dtype that is none of a dense weight; or beside
            one is what only quantized weights have. The message names the tensor and its file.
    """
    if not files or not all(os.fspath(file).endswith(".safetensors") for file in files):
        return
    with ExitStack() as stack:
        checkpoint = _Checkpoint([os.fspath(file) for file in files], stack)
        odd = []
        for one in _candidates(checkpoint).values():
            name = one.mark
            if name is not None and (one.bits == 4 or one.weight in checkpoint.files):
                raise CheckpointError(
                    f"{checkpoint.files[name]}: {name}: the weight is packed to {one.bits} bits already, but "
                    f"config.json has no quantization_config with load_in_{one.bits}bit true; take config.json from "
                    "where the checkpoint is from"
                )
        for name in checkpoint.files:
            if checkpoint.dtype(name) not in ("F16", "BF16", "F32", "F64"):
                odd.append(name)
        weights = {f"{path}.weight" for path in paths}
        for name, target, _, _ in renamed(model, odd, _mapping(model)):
            if target in weights:
                raise CheckpointError(
                    f"{checkpoint.files[name]}: {name} is {checkpoint.dtype(name)}, so it is quantized already, and "
                    "cannot be quantized again; start from the 16-bit checkpoint that it was made from"
                )
        facts = [(name, checkpoint.dtype(name)) for name in checkpoint.files]
        beside = dict(_native.companions_of_quantized(facts))
        for name, target, _, _ in renamed(model, list(beside), _mapping(model)):
            if target is None and _stands_beside(name, paths):
                raise CheckpointError(
                    f"{checkpoint.files[name]}: {name}: belongs to a weight that is quantized already "
                    f"({beside[name]}), and cannot be quantized again; start from the 16-bit checkpoint that it was "
                    "made from"
                )


def _stands_beside(name: str, paths: Sequence[str]) -> bool:
    """Whether a tensor is in one of these modules, or around it, whatever comes before their paths in the file."""
    module = f".{name.rpartition('.')[0].removesuffix('.weight')}"
    return any(f"{module}." in f".{path}." or module.endswith(f".{path}") for path in paths)


def _mapping(model: Any) -> list[Any]:
    return mapping_for(model, get_model_conversion_mapping(model))


class _Checkpoint:
    """Open files of a checkpoint.

    Attributes:
        files: The file of each tensor, by its name.
        twice: Another file of a tensor that two files have.
        where: The file, or the index, for messages.
    """

    def __init__(self, files: list[str], stack: ExitStack) -> None:
        index = Path(files[0]).parent / "model.safetensors.index.json"
        self.where = files[0] if len(files) == 1 else str(index if index.is_file() else index.parent)
        self.files: dict[str, str] = {}
        self.twice: dict[str, str] = {}
        self._instead: dict[str, tuple[str, torch.Tensor]] = {}
        self._handles: dict[str, Any] = {}
        for file in files:
            if not Path(file).is_file():
                raise CheckpointError(f"{file}: there is no such file, but {self.where} names it; {AGAIN}")
            try:
                handle = self._handles[file] = stack.enter_context(safe_open(file, framework="pt"))
            except SafetensorError as error:
                raise not_whole(file, error) from None
            for name in handle.keys():  # noqa: SIM118  (not a dict)
                if self.files.setdefault(name, file) != file:
                    self.twice[name] = file

    @property
    def names(self) -> Collection[str]:
        """All tensors."""
        return self.files

    def file(self, name: str) -> str:
        """The file of a tensor."""
        return self.files[name]

    def replace(self, hidden: Collection[str], tensors: Mapping[str, tuple[str, torch.Tensor]]) -> None:
        """Have other tensors in the place of some: see `halfbyte.models.checkpoint_reader.Folder.replace`."""
        self._instead.update(tensors)
        self.files.update({name: self.files[source] for name, (source, _) in tensors.items()})
        self.twice.update({name: self.twice[source] for name, (source, _) in tensors.items() if source in self.twice})
        for name in hidden:
            del self.files[name]

    def is_replaced(self, name: str) -> bool:
        """Is a tensor one that was given to `replace`?"""
        return name in self._instead

    def view(self, name: str) -> torch.Tensor:
        """A tensor, in mapped memory."""
        if name in self._instead:
            return self._instead[name][1]
        tensor: torch.Tensor = self._handles[self.files[name]].get_tensor(name)
        return tensor

    def dtype(self, name: str) -> str:
        """The dtype of a tensor, as safetensors writes it."""
        source = self._instead[name][0] if name in self._instead else name
        dtype: str = self._handles[self.files[name]].get_slice(source).get_dtype()
        return dtype

    def facts(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor."""
        tensor = self.view(name)
        return tuple(tensor.shape), tensor.dtype


def _candidates(checkpoint: _Checkpoint) -> dict[str, Packed]:
    """What may be packed weights, by their names."""
    try:
        return packed.find(checkpoint.files, lambda name: checkpoint.facts(name)[1])
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.where}: {error}") from None


def _packed_weights(checkpoint: _Checkpoint) -> dict[str, Packed]:
    """The packed weights of a checkpoint by their names; each is complete."""
    names = checkpoint.files
    candidates = _candidates(checkpoint)
    for weight, one in candidates.items():
        if not weight.endswith("weight"):
            continue
        missing = one.lacking(names)
        if missing:
            file = names[min(one.parts.values())]
            raise CheckpointError(
                f"{file}: {weight} is packed to {one.bits} bits, but the checkpoint lacks {', '.join(missing)}; {AGAIN}"
            )
        for name in (weight, *sorted(one.parts.values())):
            if name in checkpoint.twice:
                raise CheckpointError(
                    f"{names[name]}: {name} is in {checkpoint.twice[name]} too, and nothing says which is meant; "
                    "save, or download, the checkpoint again"
                )
    return {weight: one for weight, one in candidates.items() if one.mark is not None}


def _check_floats(checkpoint: _Checkpoint, found: Mapping[str, Packed], floats: bool) -> None:
    """A config that keeps float weights does not come with weights of 8 bits."""
    name = next((name for name, one in found.items() if one.bits == 8), None)
    if floats and name is not None:
        raise CheckpointError(
            f"{checkpoint.files[name]}: {name} is quantized to 8 bits, but quantization_config in config.json has "
            "llm_int8_has_fp16_weight true, which keeps weights as floats; make it false there"
        )


def _check_codes(
    model: nn.Module, checkpoint: _Checkpoint, targets: Mapping[str, str], found: Mapping[str, Packed]
) -> None:
    """No weight of a linear layer holds integers without the scales that belong to them."""
    layers = {f"{path}.weight" for path in chosen(model, ())}
    for target, name in targets.items():
        if target not in layers or name in found:
            continue
        dtype = checkpoint.dtype(name)
        if dtype == "I8":
            raise CheckpointError(
                f"{checkpoint.files[name]}: {name} is packed to 8 bits, but the checkpoint lacks "
                f"{packed.beside(name, packed.SCB)}; {AGAIN}"
            )
        if not dtype.startswith(("F", "BF")):
            raise CheckpointError(
                f"{checkpoint.files[name]}: {name} is {dtype}, and no part of a packed weight is beside it: expected "
                f"F16, BF16 or F32; {AGAIN}"
            )


def _check_weight(model: nn.Module, checkpoint: _Checkpoint, target: str, one: Packed) -> list[str]:
    """A packed weight and its parts fit together, and the model. Returns what is odd about its scales."""
    where = f"{checkpoint.files[one.weight]}: {one.weight}"
    parts = {key: checkpoint.view(name) for key, name in one.parts.items()}
    try:
        weight = packed.parameter(one.bits, checkpoint.view(one.weight), parts)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}; save, or download, the checkpoint again") from None
    path, _, attribute = target.rpartition(".")
    holder = model.get_submodule(path)
    expected = layer_shape(holder) if attribute == "weight" else tuple(getattr(holder, attribute).shape)
    shape = shape_of(weight)
    if shape != expected:
        raise CheckpointError(
            f"{where}: the checkpoint holds a weight {list(shape)}, the model has {list(expected)}; load it with the "
            "config.json that it was saved with"
        )
    odd = None if checkpoint.is_replaced(one.weight) else packed.odd_scales(one, weight, parts)
    return [] if odd is None else [odd]


# ---- layers that are not there ---------------------------------------------------------------------------------------


def _check_complete(
    model: Any, checkpoint: _Checkpoint, targets: Mapping[str, str], merged: Sequence[str], keep: Sequence[str]
) -> None:
    """No linear layer that should be packed is absent.

    A new head may be, and whatever else transformers starts anew when a checkpoint of one class is loaded into another.
    """
    given = set(targets)
    absent = _absent(model, given, keep)
    if absent and merged:
        # Of these transformers makes more tensors than the one by which it groups them.
        for entry in transformers_weights.entries(model, merged, checkpoint.facts)[0]:
            given.update(entry.targets)
        absent = _absent(model, given, keep)
    saved_from_it = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
    blocks = {_block(name) for name in given} - {None}
    lost = [
        f"{path}.weight"
        for path in absent
        if (saved_from_it and not _is_optional(model, path)) or _block(f"{path}.weight") in blocks
    ]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise CheckpointError(
            f"{checkpoint.where}: the quantized checkpoint lacks {lost[0]}{more}, packed or not; {AGAIN}, or load it "
            "with the config.json that it was saved with. What is meant to start anew can be named in "
            "llm_int8_skip_modules of the quantization_config in config.json"
        )


def _absent(model: Any, given: set[str], keep: Sequence[str]) -> list[str]:
    """Paths of linear layers that are not kept, whose weight the checkpoint has under no name."""
    names: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(path)
    same: dict[str, set[str]] = {}
    for a, b in transformers_weights.tied_names(model):
        same.setdefault(a, set()).add(b)
        same.setdefault(b, set()).add(a)
    candidates = []
    for path in chosen(model, keep):
        weights = {f"{name}.weight" for name in names[model.get_submodule(path)]}
        weights |= {other for weight in weights for other in same.get(weight, ())}
        if not weights & given:
            candidates.append(path)
    allowed = transformers_weights.expected_absent(model, [f"{path}.weight" for path in candidates])
    return [path for path in candidates if f"{path}.weight" not in allowed]


def _block(name: str) -> str | None:
    """The name without its numbers, which is that of the same tensor in other blocks; None outside of any."""
    block, count = re.subn(r"(?<=\.)\d+(?=\.)", "*", name)
    return block if count else None


def _is_optional(model: nn.Module, path: str) -> bool:
    """Whether the class can be built without this layer: a pooler, which checkpoints of other tools often lack."""
    start, found, _ = f".{path}.".partition(".pooler.")
    if not found:
        return False
    holder = model.get_submodule(start.strip("."))
    return "add_pooling_layer" in inspect.signature(type(holder).__init__).parameters
