"""The modules of a torch model: their paths, which are linear layers, and what keeps one from being converted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from halfbyte._terminal import format_bytes
from halfbyte.models.recipe import PACKED_LAYERS

_EXPERTS = ("experts", "local_experts")


def is_conv1d(cls: type) -> bool:
    """Is this transformers' `Conv1D`, whose weight is `[in, out]`? Told by its name: transformers is not imported."""
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def is_transformers_model(module: nn.Module) -> bool:
    """Is this a `PreTrainedModel` of transformers?"""
    return any(
        c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.") for c in type(module).__mro__
    )


def paths(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Every module of a model with all of its paths, in the model's order."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(module, []).append(name)
    return {module: tuple(module_names) for module, module_names in found.items()}


def join(path: str, name: str) -> str:
    """`path.name`, or `name` at the root."""
    return f"{path}.{name}" if path else name


def is_lazy(tensor: Tensor) -> bool:
    """Will it have a shape only when the model is called?"""
    return isinstance(tensor, nn.UninitializedParameter)


def is_linear(module: nn.Module, subclasses: bool | tuple[type[nn.Module], ...]) -> bool:
    """Is this a layer that is converted, where `subclasses` are taken too?"""
    cls = type(module)
    if isinstance(module, PACKED_LAYERS):
        return False
    if cls is nn.Linear or is_conv1d(cls):
        return True
    if nn.utils.parametrize.is_parametrized(module):
        # torch makes a subclass of each parametrized module: what it was before counts.
        return _is_linear_class(cls.__bases__[0], subclasses)
    if isinstance(module, nn.LazyLinear):
        return True
    return _is_linear_class(cls, subclasses)


def _is_linear_class(cls: type, subclasses: bool | tuple[type[nn.Module], ...]) -> bool:
    if cls is nn.Linear or is_conv1d(cls):
        return True
    if isinstance(subclasses, tuple):
        return cls in subclasses
    # `nn.MultiheadAttention` reads the weight of this class, and never calls it.
    inert = nn.modules.linear.NonDynamicallyQuantizableLinear
    return subclasses and issubclass(cls, nn.Linear) and cls is not inert and cls.forward is nn.Linear.forward


def conv1d_base(module: nn.Module) -> type:
    """The class of the module, or the `Conv1D` that it is a subclass of."""
    return next((cls for cls in type(module).__mro__ if is_conv1d(cls)), type(module))


def obstacle(module: nn.Module, meta: bool) -> str | None:
    """Why a layer that is to be converted cannot be, and what to do about it."""
    if nn.utils.parametrize.is_parametrized(module):
        return "its weight is parametrized: torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') first"
    weight = module._parameters.get("weight")
    if weight is None:
        return (
            "its weight is no parameter of its own, but computed (weight norm, spectral norm, pruning): "
            "remove that first, as with torch.nn.utils.remove_weight_norm(module)"
        )
    if is_lazy(weight):
        return "its weight has no shape yet: call the model once first"
    if type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, expected a plain tensor"
    if weight.dim() != 2:
        return f"its weight has the shape {list(weight.shape)}, expected two dimensions"
    if weight.is_meta and not meta:
        hook = module.__dict__.get("_hf_hook")
        if hook is not None:
            return "its weight is offloaded by accelerate: load the model without offloading"
        return "its weight is on the meta device, without numbers: give checkpoint=FOLDER"
    own = module.__dict__
    if own.get("_compiled_call_impl") is not None:
        return "it was compiled by itself: compile after quantizing"
    if "forward" in own:
        inner = own.get("_old_forward") if "_hf_hook" in own else own["forward"]
        if getattr(inner, "__func__", None) is not type(module).forward:
            return "its forward was replaced on the instance, which cannot be carried over"
    return None


def refuse_adapters(model: nn.Module) -> None:
    """Fail where PEFT has added adapters already."""
    for name, module in model.named_modules():
        if any(c.__name__ == "BaseTunerLayer" and c.__module__.startswith("peft.") for c in type(module).__mro__):
            raise ValueError(
                f"model: {name or 'it'} is a layer with a PEFT adapter; quantize the model first, then add adapters"
            )


def fused_experts(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.Parameter]:
    """Weights of Mixture-of-Experts layers that are one tensor for all experts, by their names.

    Args:
        modules: Paths and modules, as `named_modules` gives them.
    """
    found = {}
    for path, module in modules:
        names = module._parameters
        if "experts" in type(module).__name__.lower() or any(part in _EXPERTS for part in names):
            for name, parameter in names.items():
                if parameter is not None and parameter.dim() >= 3:
                    found[join(path, name)] = parameter
    return found


def experts_note(found: Mapping[str, nn.Parameter]) -> str:
    """What to say of fused experts that are not converted."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in found.values())
    return (
        f"{len(found)} fused expert weights (Mixture-of-Experts), {format_bytes(size)}, stay as they are, "
        f"the first is {next(iter(found))}"
    )


def left_out(
    modules: Mapping[nn.Module, tuple[str, ...]],
    linear: Mapping[nn.Module, tuple[str, ...]],
    subclasses: bool | tuple[type[nn.Module], ...],
) -> list[str]:
    """Large things that stay in 16 bits without anybody having asked for it."""
    notes = []
    others: dict[str, int] = {}
    for module in modules:
        cls = type(module)
        inert = nn.modules.linear.NonDynamicallyQuantizableLinear
        if isinstance(module, nn.Linear) and module not in linear and not isinstance(module, (*PACKED_LAYERS, inert)):
            others[cls.__name__] = others.get(cls.__name__, 0) + 1
    if others:
        listed = ", ".join(f"{count} {name}" for name, count in sorted(others.items()))
        notes.append(f"subclasses of nn.Linear stay as they are: {listed}; to take them, give subclasses=(…,)")
    fused = fused_experts((names[0], module) for module, names in modules.items())
    if fused:
        notes.append(experts_note(fused))
    return notes
