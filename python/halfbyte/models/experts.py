"""Fused experts of transformers' Mixture-of-Experts models: apart, as layers that can be converted, and together again.

Recognized by the attributes that `transformers.integrations.moe.use_experts_implementation` gives to a class, and by
their class where they are Llama 4's. Each matrix becomes an `nn.Linear` that is a view of the fused parameter: nothing
is copied, and what converts linear layers converts these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.nn.experts import DispatchedExperts4bit, Expert, Experts4bit

Names = tuple[str | None, str, str]

GATED: Names = ("gate_proj", "up_proj", "down_proj")
"""How most checkpoints call the projections of an expert."""

_SOURCE = "source_cls"
"""The attribute of `Experts4bit` with the class of the module that it was made of."""

_HOW = "fused_as"
"""The attribute of `Experts4bit` that says how that module held its experts: a `Fused`."""

_FLAGS = ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate")


@dataclass(frozen=True)
class Fused:
    """How a module holds its experts.

    Attributes:
        up: Name of the parameter with the up projections, and the gates' where there are such.
        down: Name of that with the down projections.
        gated: Whether there are gates.
        transposed: Matrices are `[in, out]`.
        interleaved: Rows of gate and up projection alternate.
        dispatched: It is called with all tokens once for each expert, as Llama 4's. Checkpoints with packed experts
            have single matrices, and transformers has no converter that makes a fused parameter of those.
    """

    up: str
    down: str
    gated: bool
    transposed: bool
    interleaved: bool
    dispatched: bool = False

    @property
    def usual_names(self) -> Names:
        """Of the projections, where nothing else is known."""
        return GATED if self.gated else (None, *GATED[1:])

    def split(self, name: str, fused: Tensor) -> list[dict[int, Tensor]]:
        """The matrices of each expert, views `[out, in]`, by their place in `projections`.

        Args:
            name: `up` or `down`.
            fused: Of all experts, `[experts, out, in]`, or `[experts, in, out]` where they are transposed.
        """
        matrices = [matrix.t() if self.transposed else matrix for matrix in fused.unbind()]
        rows = self.rows(name, matrices[0].shape[0])
        return [{place: matrix[picked] for place, picked in rows.items()} for matrix in matrices]

    def rows(self, name: str, out_features: int) -> dict[int, slice]:
        """Which rows of one expert's part of `up` or `down`, `[out, in]`, are each matrix, by its place."""
        if name == self.down:
            return {2: slice(None)}
        if not self.gated:
            return {1: slice(None)}
        if self.interleaved:
            return {0: slice(0, None, 2), 1: slice(1, None, 2)}
        return {0: slice(0, out_features // 2), 1: slice(out_features // 2, None)}

    def shape(self, name: str, experts: Experts4bit) -> tuple[int, int]:
        """Of one expert's part of a fused parameter."""
        first: Any = experts._modules["0"]
        gate, up, down = experts.projections
        layers = [
            getattr(first, projection) for projection in ([down] if name == self.down else [gate, up]) if projection
        ]
        out_features = sum(layer.out_features for layer in layers)
        in_features: int = layers[0].in_features
        return (in_features, out_features) if self.transposed else (out_features, in_features)

    def join(self, name: str, experts: Sequence[Sequence[Tensor]]) -> Tensor:
        """The way back: of each expert its matrices for `name`, gate before up projection; in memory of its own."""
        made: Tensor | None = None
        for index, matrices in enumerate(experts):
            if len(matrices) == 1:
                matrix = matrices[0]
            elif self.interleaved:
                matrix = torch.stack(tuple(matrices), dim=1).flatten(0, 1)
            else:
                matrix = torch.cat(tuple(matrices))
            matrix = matrix.t() if self.transposed else matrix
            if made is None:
                made = matrix.new_empty((len(experts), *matrix.shape))
            made[index] = matrix
        assert made is not None
        return made


def fused(module: nn.Module) -> Fused | None:
    """How a module holds fused experts; None for one that does not, or in a way that is not known."""
    own: Any = module
    found = None if isinstance(module, Experts4bit) else _how(own, type(module))
    if found is None:
        return None
    for name in (found.up, found.down):
        weight = module._parameters.get(name)
        if weight is None or weight.dim() != 3 or weight.shape[0] != own.num_experts or type(weight.data) is not Tensor:
            return None
    up = module._parameters[found.up]
    assert up is not None
    if found.gated and up.shape[2 if found.transposed else 1] % 2:
        return None
    # What others have put on the module would be lost.
    if "_hf_hook" in module.__dict__ or "forward" in module.__dict__ or nn.utils.parametrize.is_parametrized(module):
        return None
    return found


def _how(own: Any, cls: Any) -> Fused | None:
    """How a module of this class says that it holds experts."""
    if cls.__name__ == "Llama4TextExperts" and cls.__module__ == "transformers.models.llama4.modeling_llama4":
        return Fused("gate_up_proj", "down_proj", gated=True, transposed=True, interleaved=False, dispatched=True)
    if not all(hasattr(own, flag) for flag in _FLAGS):
        return None
    # Older releases of transformers do not say it. There the order is known of classes without a gate of their own.
    concatenated = getattr(own, "is_concatenated", _is_default(cls._apply_gate) or None)
    if concatenated is None:
        return None
    return Fused(
        "gate_up_proj" if own.has_gate else "up_proj",
        "down_proj",
        bool(own.has_gate),
        bool(own.is_transposed),
        not concatenated,
    )


def is_dispatched(module: nn.Module) -> bool:
    """Whether a module has fused experts of Llama 4's kind: see `Fused.dispatched`."""
    how = fused(module)
    return how is not None and how.dispatched


def fused_as(experts: Experts4bit) -> Fused | None:
    """How the module held its experts that these were made of; None where they were made in another way."""
    how: Fused | None = experts.__dict__.get(_HOW)
    return how


def unfuse(module: nn.Module, names: Names | None = None) -> Experts4bit:
    """A module that computes the same as one with fused experts, of linear layers that are views of its weights.

    Args:
        module: It is left as it is.
        names: Of the projections; `GATED`, or its last two, by default.

    Raises:
        ValueError: The module has no fused experts that are known.
    """
    how = fused(module)
    if how is None:
        raise ValueError(f"module must have fused experts, got {type(module).__name__}")
    if names is None:
        names = how.usual_names
    experts = [Expert() for _ in range(int(getattr(module, "num_experts")))]  # noqa: B009
    for parameter in (how.up, how.down):
        weight = module._parameters[parameter]
        assert weight is not None
        for expert, matrices in zip(experts, how.split(parameter, weight.detach()), strict=True):
            for place, matrix in matrices.items():
                name = names[place]
                assert name is not None
                expert.add_module(name, _linear(matrix, weight.requires_grad))
    new = (DispatchedExperts4bit if how.dispatched else Experts4bit)(experts, names)
    own = {*vars(new)} - {"training", "num_experts"}
    new.__dict__.update({name: value for name, value in vars(module).items() if name not in own})
    for name, value in module._modules.items():
        new.add_module(name, value)
    for name, parameter_or_none in module._parameters.items():
        if name not in (how.up, how.down):
            new.register_parameter(name, parameter_or_none)
    new._buffers.update(module._buffers)
    new._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
    gate = getattr(type(module), "_apply_gate", None)
    new.gate = None if _is_default(gate) else gate
    new.interleaved = how.interleaved
    new.__dict__[_SOURCE] = type(module)
    new.__dict__[_HOW] = how
    new.train(module.training)
    return new


def fuse(module: Experts4bit) -> nn.Module | None:
    """The module that `unfuse` was given, with weights made of those of the linear layers.

    Returns:
        None where the experts were not made by `unfuse`, or are not plain linear layers.
    """
    how: Fused | None = module.__dict__.get(_HOW)
    cls: Any = module.__dict__.get(_SOURCE)
    experts = [module._modules[str(index)] for index in range(module.num_experts)]
    layers = [[expert._modules.get(name) for name in module.projections if name] for expert in experts]  # type: ignore[union-attr]
    if how is None or cls is None or not all(type(layer) is nn.Linear for found in layers for layer in found):
        return None
    new = cls.__new__(cls)
    nn.Module.__init__(new)
    own = {*vars(Experts4bit((), GATED)), _SOURCE, _HOW} - {"training", "num_experts"}
    new.__dict__.update({name: value for name, value in vars(module).items() if name not in own})
    for name, picked in ((how.up, slice(0, -1)), (how.down, slice(-1, None))):
        weights: Any = [[layer.weight for layer in found[picked]] for found in layers]  # type: ignore[union-attr]
        with torch.no_grad():
            joined = how.join(name, weights)
        new.register_parameter(name, nn.Parameter(joined, requires_grad=weights[0][0].requires_grad))
    for name, parameter in module._parameters.items():
        new.register_parameter(name, parameter)
    for name, child in module._modules.items():
        if not name.isdigit():
            new.add_module(name, child)
    new._buffers.update(module._buffers)
    new._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
    return new  # type: ignore[no-any-return]


def _is_default(gate: Any) -> bool:
    return getattr(gate, "__name__", "") == "_default_apply_gate"


def _linear(weight: Tensor, requires_grad: bool) -> nn.Linear:
    out_features, in_features = weight.shape
    # Not by its constructor, which draws random weights: on the meta device too, where that takes most of its time.
    layer = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(layer)
    layer.in_features, layer.out_features = in_features, out_features
    layer.weight = nn.Parameter(weight, requires_grad=requires_grad)
    layer.register_parameter("bias", None)
    return layer


def unfuse_all(model: nn.Module, chosen: Mapping[str, Names | None]) -> dict[str, nn.Module]:
    """Take the experts at these paths apart, in place; returns what was there, for `put_back`."""
    before = {path: model.get_submodule(path) for path in chosen}
    new = {path: unfuse(module, chosen[path]) for path, module in before.items()}
    for path, module in new.items():
        model.set_submodule(path, module)
    return before


def with_own_memory(matrix: Tensor) -> Tensor:
    """The same numbers in order, and in memory that holds nothing else: a view is copied."""
    if matrix.is_contiguous() and matrix.untyped_storage().nbytes() == matrix.numel() * matrix.element_size():
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def put_back(model: nn.Module, before: Mapping[str, nn.Module]) -> None:
    """Undo `unfuse_all`."""
    for path, module in before.items():
        model.set_submodule(path, module)


def fused_paths(modules: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """Paths of the modules with fused experts that can be taken apart."""
    return [path for path, module in modules if path and fused(module) is not None]
