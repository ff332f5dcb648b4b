"""Checkpoints of other tools whose packed experts are not one weight for each matrix, seen as if they were.

| layout | whose | tensors of one projection |
|---|---|---|
| fused | Unsloth, bitsandbytes' parametrization | `experts.gate_up_proj`, one packed weight `[experts, out, in]` |
| bare | bitsandbytes' `Experts4bit` | `experts.gate_up_proj` uint8 `[experts, bytes]`, `experts.gate_up_absmax` |
| listed | gpt-oss by Unsloth | `experts.gate_up_projs.<i>.weight`, packed or not, `.bias`; `router.linear` |
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from halfbyte._native import CheckpointError
from halfbyte.models import packed
from halfbyte.models.expert_stacks import Stacked
from halfbyte.models.experts import fused_as
from halfbyte.models.packed import Packed
from halfbyte.models.transformers_experts import mapping_for
from halfbyte.nn import Params4bit
from halfbyte.nn.experts import Experts4bit
from halfbyte.offline.shards import AGAIN
from halfbyte.offline.transformers_names import renamed
from halfbyte.ops.checks import FLOAT_DTYPES
from halfbyte.state import QuantState

_FUSED = re.compile(r"(.+)\.(gate_up_proj|up_proj|down_proj)")
_BARE = re.compile(r"(.+)\.(gate_up|down)_absmax")
_LISTED = re.compile(r"(.+)\.(gate_up_proj|up_proj|down_proj)s\.(\d+)\.(weight|bias)")
_ANY = re.compile(
    r"\.(gate_up_proj|up_proj|down_proj)\.(absmax|quant_state\.bitsandbytes__\w+)$"
    r"|\.(gate_up|down)_absmax$|\.(gate_up_proj|up_proj|down_proj)s\.\d+\.weight$"
)


class Tensors(Protocol):
    """What is asked of a checkpoint."""

    @property
    def names(self) -> Collection[str]:
        """All tensors."""

    def view(self, name: str) -> Tensor:
        """A tensor, in mapped memory."""

    def file(self, name: str) -> Any:
        """The file of a tensor, for messages."""


@dataclass
class StandIns:
    """Tensors that are seen in the place of others.

    Attributes:
        tensors: By name: the tensor of the checkpoint that each is a part of, and itself.
        hidden: The tensors of the checkpoint that are not seen.
        dtype: That weights without a state are dequantized to.
        odd: Of `halfbyte.models.packed.odd_scales`.
    """

    tensors: dict[str, tuple[str, Tensor]] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)
    dtype: torch.dtype = torch.float32
    odd: list[str] = field(default_factory=list)

    def add(
        self, source: str, path: str, layer: Layer, expert: int, matrices: Mapping[int, tuple[Tensor, QuantState]]
    ) -> None:
        """Add the matrices of an expert."""
        for place, (codes, state) in matrices.items():
            weight = f"{path}.{layer.name(expert, place)}"
            self.tensors[weight] = (source, codes)
            for key, value in state.as_dict(packed=True).items():
                self.tensors[f"{weight}.{key}"] = (source, value)


def is_other_layout(name: str) -> bool:
    """Whether a tensor of this name belongs to packed experts in one of these layouts, as far as a name can tell."""
    return _ANY.search(name) is not None


def stand_ins(model: Any, source: Tensors, quant_type: str | None) -> StandIns:
    """What a checkpoint has for the experts of a model, as one packed weight for each matrix.

    Args:
        model: A model of transformers whose experts were taken apart.
        source: Its checkpoint.
        quant_type: "nf4" or "fp4", for weights that do not say it; None where `config.json` does not either.

    Raises:
        CheckpointError: Something is missing, does not fit the model, or cannot be split. The message names the tensor.
    """
    found = StandIns()
    layers = _layers(model, source)
    if not layers:
        return found
    try:
        candidates = packed.find(source.names, lambda name: source.view(name).dtype)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    beside = {name for one in candidates.values() for name in one.parts.values()}
    found.dtype = _float_dtype(source, beside)
    for path, layer in layers.items():
        _fused(source, path, layer, candidates, found)
        _bare(source, path, layer, quant_type, found)
        _listed(source, path, layer, candidates, found)
    return found


@dataclass
class Layer:
    """The experts of a layer of the model, and what a checkpoint may have for them."""

    experts: Experts4bit
    parameters: list[Stacked]

    @classmethod
    def of(cls, experts: Experts4bit) -> Layer | None:
        """None for experts that were not taken apart."""
        how = fused_as(experts)
        if how is None:
            return None
        return cls(experts, [Stacked.of(how, parameter, experts) for parameter in (how.up, how.down)])

    def name(self, expert: int, place: int) -> str:
        """Of the weight of a matrix, relative to the experts."""
        return f"{expert}.{self.experts.projections[place]}.weight"


def _layers(model: Any, source: Tensors) -> dict[str, Layer]:
    """The layers that a checkpoint has in one of these layouts, by the path that it has for them."""
    paths = dict[str, None]()
    for name in source.names:
        if is_other_layout(name):
            match = _LISTED.match(name) or _BARE.fullmatch(name) or _FUSED.match(name)
            assert match is not None
            paths[match.group(1)] = None
    modules = {path: module for path, module in model.named_modules() if isinstance(module, Experts4bit)}
    if not paths or not modules:
        return {}
    from transformers.conversion_mapping import get_model_conversion_mapping

    downs = {module.projections[2] for module in modules.values()}
    asked = {f"{path}.0.{down}.weight": path for path in paths for down in downs}
    found = {}
    for name, target, _, _ in renamed(model, asked, mapping_for(model, get_model_conversion_mapping(model))):
        module = None if target is None else modules.get(target.rsplit(".", 3)[0])
        layer = None if module is None else Layer.of(module)
        if layer is not None:
            found[asked[name]] = layer
    return found


def _float_dtype(source: Tensors, beside: Collection[str]) -> torch.dtype:
    """The dtype of what is not packed."""
    for name in source.names:
        if name not in beside and not name.endswith("_absmax"):
            dtype = source.view(name).dtype
            if dtype in FLOAT_DTYPES:
                return dtype
    return torch.float32


# ---- the layouts -----------------------------------------------------------------------------------------------------


def _fused(source: Tensors, path: str, layer: Layer, candidates: Mapping[str, Packed], found: StandIns) -> None:
    for stacked in layer.parameters:
        name = f"{path}.{stacked.parameter}"
        one = candidates.get(name)
        if one is not None and one.bits == 4:
            codes, state = _packed(source, one, found)
            with _named(source, name):
                experts = stacked.split(codes, state)
            for index, matrices in enumerate(experts):
                found.add(name, path, layer, index, matrices)
            found.hidden |= {name, *one.parts.values()}


def _bare(source: Tensors, path: str, layer: Layer, quant_type: str | None, found: StandIns) -> None:
    pairs = [
        (stacked, f"{path}.{projection}_proj", f"{path}.{projection}_absmax")
        for stacked, projection in zip(layer.parameters, ("gate_up", "down"), strict=True)
    ]
    names = set(source.names)
    if not any(absmax in names for _, _, absmax in pairs):
        return
    _complete(source, [name for pair in pairs for name in pair[1:]])
    for stacked, name, absmax in pairs:
        with _named(source, name):
            if quant_type is None:
                raise ValueError(
                    "only config.json says what its codes mean: its quantization_config must have load_in_4bit true "
                    "and bnb_4bit_quant_type"
                )
            codes = source.view(name)
            experts = stacked.split(codes, stacked.state(source.view(absmax), codes, quant_type, found.dtype))
        for index, matrices in enumerate(experts):
            found.add(name, path, layer, index, matrices)
        found.hidden |= {name, absmax}


def _listed(source: Tensors, path: str, layer: Layer, candidates: Mapping[str, Packed], found: StandIns) -> None:
    names = set(source.names)
    if not any(f"{path}.{stacked.parameter}s.0.weight" in names for stacked in layer.parameters):
        return
    for stacked in layer.parameters:
        start = f"{path}.{stacked.parameter}s."
        listed = [f"{start}{index}.weight" for index in range(stacked.count)]
        _complete(source, listed)
        if f"{start}{stacked.count}.weight" in names:
            with _named(source, f"{start}{stacked.count}.weight"):
                raise ValueError(f"is one expert too many, the model has {stacked.count}")
        for index, name in enumerate(listed):
            one = candidates.get(name)
            if one is None:
                dense = source.view(name)
                with _named(source, name):
                    stacked.check_shape(dense.shape)
                for place, rows in stacked.rows.items():
                    found.tensors[f"{path}.{layer.name(index, place)}"] = (name, dense[rows].contiguous())
                found.hidden.add(name)
                continue
            codes, state = _packed(source, one, found)
            with _named(source, name):
                matrices = stacked.split_one(codes, state)
            found.add(name, path, layer, index, matrices)
            found.hidden |= {name, *one.parts.values()}
        biases = [f"{start}{index}.bias" for index in range(stacked.count)]
        if names.intersection(biases):
            _complete(source, biases)
            found.tensors[f"{path}.{stacked.parameter}_bias"] = (biases[0], torch.stack([*map(source.view, biases)]))
            found.hidden.update(biases)
    router = f"{path.rpartition('.')[0]}.router."
    for name in names:
        if name.startswith(f"{router}linear."):
            found.tensors[router + name.removeprefix(f"{router}linear.")] = (name, source.view(name))
            found.hidden.add(name)


def _packed(source: Tensors, one: Packed, found: StandIns) -> tuple[Tensor, QuantState]:
    """Codes and state of a packed weight of a checkpoint."""
    missing = one.lacking(source.names)
    if missing:
        raise CheckpointError(
            f"{source.file(min(one.parts.values()))}: {one.weight} is packed to {one.bits} bits, but the checkpoint "
            f"lacks {', '.join(missing)}; {AGAIN}"
        )
    with _named(source, one.weight):
        parts = {key: source.view(name) for key, name in one.parts.items()}
        weight = packed.parameter(one.bits, source.view(one.weight), parts)
        if not isinstance(weight, Params4bit) or weight.quant_state is None:
            raise ValueError(f"must be packed to 4 bits, got {one.bits}")
        odd = packed.odd_scales(one, weight, parts)
        found.odd += [] if odd is None else [odd]
    return weight.data, weight.quant_state


def _complete(source: Tensors, wanted: Sequence[str]) -> None:
    """That a checkpoint has all of these tensors, of which it has some."""
    names = set(source.names)
    lacking = [name for name in wanted if name not in names]
    if lacking:
        here = next(name for name in wanted if name in names)
        raise CheckpointError(
            f"{source.file(here)}: {here} is a part of packed experts, but the checkpoint lacks "
            f"{', '.join(lacking[:4])}{' and more' if len(lacking) > 4 else ''}; {AGAIN}"
        )


@contextlib.contextmanager
def _named(source: Tensors, name: str) -> Iterator[None]:
    """Errors name the tensor and its file."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source.file(name)}: {name}: {error}") from None
