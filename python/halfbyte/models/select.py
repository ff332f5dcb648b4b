"""Which layers of a torch model become 4-bit, and why the others do not.

The choice is transformers' and the offline tool's: plain `nn.Linear` and `Conv1D`, without output embeddings, tied
weights, modules that the architecture keeps in float32, and the module that holds a transformers model's last
parameter. Rules and skip names are matched by the compiled core, which serves the offline tool too, so that a pattern
means the same in both; here they see the model's own names. Nothing in this file changes the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from halfbyte import _native
from halfbyte._terminal import format_bytes
from halfbyte.nn._quantized import Quantized
from halfbyte.ops.checks import FLOAT_DTYPES, names

_EXPERTS = ("experts", "local_experts")


@dataclass
class Layer:
    """A layer to convert."""

    module: nn.Module
    """`nn.Linear`, a subclass that was asked for, or `Conv1D`."""
    names: tuple[str, ...]
    """Every path under which the model holds it."""
    quant_type: str
    transpose: bool
    """The weight is stored `[in, out]`, as `Conv1D` has it."""

    @property
    def name(self) -> str:
        """The first of its names, for messages."""
        return self.names[0] or "the model itself"


@dataclass
class Choice:
    """The decision for a whole model."""

    layers: list[Layer] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    """Linear layers that stay as they are: first path, and why."""
    quantized: int = 0
    """Layers that are 4-bit already."""
    as_default: bool = True
    """Whether a loader that is told nothing would choose the same."""
    notes: list[str] = field(default_factory=list)


@dataclass
class _RuleUse:
    decided: int = 0
    quantized: int = 0
    refused: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    """Biases of linear layers: a pattern for the layer reaches them too, which is worth no word."""


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


def choose(
    model: nn.Module,
    quant_type: str,
    *,
    rules: Sequence[str] = (),
    skip: Sequence[str] = (),
    subclasses: bool | tuple[type[nn.Module], ...] = False,
    meta: bool = False,
) -> Choice:
    """Decide for every layer of a model.

    Args:
        model: Any module.
        quant_type: Of layers that no rule names.
        rules: `"REGEX=nf4|fp4|keep"`; the first that is found in the name of a weight or of its module decides.
        skip: Names of modules to keep besides the defaults, matched as transformers matches `llm_int8_skip_modules`.
        subclasses: True to take also subclasses of `nn.Linear` that do not override `forward`; or the classes to take.
        meta: Weights on the meta device are acceptable: they will come from a checkpoint.

    Raises:
        ValueError: A rule or skip name does not parse, a rule asks only for what cannot be quantized, or a layer that
            is to be converted cannot be; the message names it.
    """
    _refuse_adapters(model)
    choice = Choice()
    modules = paths(model)
    linear = {m: p for m, p in modules.items() if _is_linear(m, subclasses)}
    never, kept = _defaults(model, modules, linear)

    tensors = [
        (join(path, name), module)
        for module, module_paths in modules.items()
        if not isinstance(module, Quantized)
        for path in module_paths
        for name in module._parameters
        if module._parameters[name] is not None
    ]
    # Where a weight is computed (weight norm, pruning) there is no parameter of that name, but a layer all the same.
    known = {name for name, _ in tensors}
    tensors += [
        (join(path, "weight"), module)
        for module, module_paths in linear.items()
        for path in module_paths
        if join(path, "weight") not in known
    ]
    matches = match([name for name, _ in tensors], rules, skip)
    use = {rule: _RuleUse() for rule in rules}
    wanted: dict[nn.Module, list[str | None]] = {module: [] for module in linear}
    why: dict[nn.Module, str] = {}
    for (name, module), (rule, rule_type, skipped) in zip(tensors, matches, strict=True):
        is_weight = module in linear and name.rpartition(".")[2] == "weight"
        reason = never.get(module) if is_weight else "not the weight of a linear layer"
        if rule is not None:
            use[rule].decided += 1
            if rule_type is not None and reason is not None:
                beside = module in linear and not is_weight
                (use[rule].beside if beside else use[rule].refused).append(f"{name} ({reason})")
        if not is_weight:
            continue
        if rule is not None and rule_type is None:
            reason = f"rule '{rule}'"
        elif reason is None and rule is not None:
            use[rule].quantized += 1
            wanted[module].append(rule_type)
            continue
        else:
            reason = reason or kept.get(module) or (f"skip list ({skipped})" if skipped is not None else None)
        wanted[module].append(None if reason else quant_type)
        if reason:
            why[module] = reason

    for module, module_paths in linear.items():
        types = set(wanted[module])
        # What one of its names keeps stays: a layer is one object, whatever it is called.
        if None in types:
            choice.kept[module_paths[0]] = why[module]
        elif len(types) > 1:
            raise ValueError(
                f"rules: {' and '.join(map(repr, module_paths))} are one layer, and rules ask for it as nf4 and as fp4"
            )
        else:
            (chosen,) = types
            assert chosen is not None
            choice.layers.append(Layer(module, module_paths, chosen, is_conv1d(_conv1d_base(module))))
        # What a loader keeps by default, and what can never be, is the same to it.
        choice.as_default &= (None in types) == (module in never or module in kept)
    _check_rules(use, choice.notes)
    for skip_name in skip:
        if not any(hit for *_, hit in match([name for name, _ in tensors], (), [skip_name])):
            choice.notes.append(f"the skip name {skip_name!r} matches no module")
    for layer in choice.layers:
        reason = _obstacle(layer.module, meta)
        if reason is not None:
            raise ValueError(f"{layer.name}: {reason}; or keep the layer as it is: skip=[{layer.names[0]!r}]")
    choice.quantized = sum(isinstance(module, Quantized) for module in modules)
    choice.notes += _left_out(modules, linear, subclasses)
    return choice


def skip_list(model: nn.Module, choice: Choice) -> list[str] | None:
    """`llm_int8_skip_modules` that makes a loader choose the same: None where its defaults do.

    In transformers 5 a list replaces the defaults, so it is complete.
    """
    if choice.as_default:
        return None
    tensors = [[join(name, "weight"), [1, 1], "F32"] for layer in choice.layers for name in layer.names]
    tensors += [[join(name, "weight"), [1, 1], "F32"] for name in choice.kept]
    keep = ["^(?:" + "|".join(map(re.escape, choice.kept)) + r")\.weight$=keep"] if choice.kept else []
    options = {"rules": keep, "explicit": [name for name, *_ in tensors]}
    answer = json.loads(_native.select(None, json.dumps(tensors), json.dumps(options)))
    listed: list[str] = answer["skip_modules"] or []
    return _with_and_without_prefix(model, listed, [name for layer in choice.layers for name in layer.names])


def _with_and_without_prefix(model: nn.Module, listed: Sequence[str], packed: Sequence[str]) -> list[str]:
    """Names that also hold where the base model is loaded by itself, under paths without its prefix.

    A short name that would also keep a layer that is packed is left out: the model itself comes first.
    """
    prefixes = [
        join(path, prefix) + "."
        for path, module in model.named_modules()
        if is_transformers_model(module)
        and isinstance(prefix := getattr(module, "base_model_prefix", None), str)
        and prefix
        and isinstance(getattr(module, prefix, None), nn.Module)
    ]
    short = [name.removeprefix(prefix) for name in listed for prefix in prefixes if name.startswith(prefix)]
    if not short:
        return list(listed)
    seen = [*packed, *(name.removeprefix(prefix) for name in packed for prefix in prefixes)]
    weights = [join(name, "weight") for name in dict.fromkeys(seen)]
    harmless = [name for name in short if all(hit is None for *_, hit in match(weights, (), [name]))]
    return list(dict.fromkeys([*listed, *harmless]))


def match(
    tensors: Sequence[str], rules: Sequence[str], skip: Sequence[str]
) -> list[tuple[str | None, str | None, str | None]]:
    """For each name of a tensor: the first rule that matches and what it asks for, and else the skip name that does.

    Raises:
        ValueError: A rule or a skip name does not parse; the message is the offline tool's.
    """
    # The core is asked about tensors that nothing but the user keeps, and says in words which rule or name it was.
    facts = [[name, [1, 1], "F32"] for name in tensors]
    options = {"rules": list(rules), "skip": list(skip), "explicit": list(tensors)}
    answer = json.loads(_native.select(None, json.dumps(facts), json.dumps(options)))
    found: list[tuple[str | None, str | None, str | None]] = []
    for quant_type, _, reason in answer["decisions"]:
        if reason.startswith("rule '"):
            found.append((reason[len("rule '") : -1], quant_type, None))
        elif reason.startswith("skip list ("):
            found.append((None, None, reason[len("skip list (") : -1]))
        else:
            found.append((None, None, None))
    return found


# ---- defaults --------------------------------------------------------------------------------------------------------


def _defaults(
    model: nn.Module, modules: Mapping[nn.Module, tuple[str, ...]], linear: Mapping[nn.Module, tuple[str, ...]]
) -> tuple[dict[nn.Module, str], dict[nn.Module, str]]:
    """Why linear layers are not quantized: those that never are, and those that a rule may quantize all the same."""
    never: dict[nn.Module, str] = {}
    kept: dict[nn.Module, str] = {}
    says_outputs = False
    for root, root_paths in _roots(model, modules):
        own = dict(_below(root, root_paths[0], linear))
        for reason, patterns in _keys_never(root):
            hit = _hit if reason == "tied weight" or is_transformers_model(root) else _hit_component
            never.update({m: reason for m in hit(own, patterns) if m not in never})
        outputs = _output_keys(root)
        says_outputs |= hasattr(root, "get_output_embeddings")
        for reason, patterns in (("output embedding", outputs), ("last layer", _last_key(root))):
            kept.update({m: reason for m in _hit(own, patterns) if m not in kept})
    if not says_outputs:
        for module, module_paths in linear.items():
            facts = json.dumps([[join(path, "weight"), [1, 1], "F32"] for path in module_paths])
            if any(why == "output embedding" for *_, why in json.loads(_native.select(None, facts))["decisions"]):
                kept[module] = "output embedding by its name"
    holders = _holders(modules)
    for module in linear:
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        if len(holders[_memory(weight)]) > 1:
            never.setdefault(module, "tied weight")
        if weight.dtype not in FLOAT_DTYPES:
            never.setdefault(module, f"{weight.dtype} is none of {names(FLOAT_DTYPES)}")
        elif not _is_lazy(weight) and weight.numel() == 0:
            never.setdefault(module, "empty")
    return never, kept


def _roots(
    model: nn.Module, modules: Mapping[nn.Module, tuple[str, ...]]
) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    """The outermost modules that say which of their parts are special, as transformers' models do."""
    seen: list[str] = []
    for module, module_paths in modules.items():
        path = module_paths[0]
        if any(above == "" or path == above or path.startswith(f"{above}.") for above in seen):
            continue
        if callable(getattr(module, "get_output_embeddings", None)) or hasattr(module, "_keep_in_fp32_modules"):
            seen.append(path)
            yield module, module_paths


def _below(
    root: nn.Module, path: str, linear: Mapping[nn.Module, tuple[str, ...]]
) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    """Linear layers under `path`, with their paths as seen from there."""
    start = f"{path}." if path else ""
    for module, module_paths in linear.items():
        inside = tuple(name.removeprefix(start) for name in module_paths if name.startswith(start) and name != path)
        if inside:
            yield module, inside


def _hit(own: Mapping[nn.Module, tuple[str, ...]], patterns: Sequence[str]) -> list[nn.Module]:
    """Modules that a list of keys covers, matched as transformers does."""
    if not patterns or not own:
        return []
    flat = [(module, join(path, "weight")) for module, module_paths in own.items() for path in module_paths]
    matches = match([name for _, name in flat], (), patterns)
    return [module for (module, _), (*_, key) in zip(flat, matches, strict=True) if key is not None]


def _hit_component(own: Mapping[nn.Module, tuple[str, ...]], keys: Sequence[str]) -> list[nn.Module]:
    """Modules with a key among the components of a path, as diffusers matches and models of no library mean it."""
    wanted = {tuple(key.split(".")) for key in keys}

    def covered(path: str) -> bool:
        parts = (*path.split("."), "weight")
        return any(parts[i : i + len(key)] == key for key in wanted for i in range(len(parts)))

    return [module for module, module_paths in own.items() if any(map(covered, module_paths))]


def _keys_never(root: nn.Module) -> list[tuple[str, list[str]]]:
    """Keys of modules that cannot be quantized."""
    tied = getattr(root, "all_tied_weights_keys", None) or {}
    float32 = getattr(root, "_keep_in_fp32_modules", None) or ()
    return [
        ("tied weight", sorted({key.removesuffix(".weight") for key in [*tied, *tied.values()]})),
        ("kept in float32 by the architecture", sorted(float32)),
    ]


def _output_keys(root: nn.Module) -> list[str]:
    """The path of the output embedding."""
    get = getattr(root, "get_output_embeddings", None)
    if not callable(get):
        return []
    try:
        output = get()
    except (NotImplementedError, AttributeError):
        return []
    return [name for name, module in root.named_modules() if module is output and name]


def _last_key(root: nn.Module) -> list[str]:
    """The last parameter of a transformers model, which its loader keeps whatever it is."""
    if not is_transformers_model(root):
        return []
    last = [name for name, _ in root.named_parameters()][-1:]
    return [name.removesuffix(".weight") for name in last]


def _holders(modules: Iterable[nn.Module]) -> dict[object, set[tuple[int, str]]]:
    """Which modules hold each piece of memory as a parameter."""
    found: dict[object, set[tuple[int, str]]] = {}
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(_memory(parameter), set()).add((id(module), name))
    return found


def _memory(tensor: Tensor) -> object:
    """What two tensors have in common when they are one: the object, or the same place in the same storage."""
    if tensor.is_meta or _is_lazy(tensor) or type(tensor.data) is not Tensor:
        return id(tensor)
    address = tensor.untyped_storage().data_ptr()
    if address == 0:
        return id(tensor)
    return address, tensor.storage_offset(), tuple(tensor.shape), tensor.device


def _is_lazy(tensor: Tensor) -> bool:
    """Will it have a shape only when the model is called?"""
    return isinstance(tensor, nn.UninitializedParameter)


# ---- what is a linear layer, and what stands in the way --------------------------------------------------------------


def _is_linear(module: nn.Module, subclasses: bool | tuple[type[nn.Module], ...]) -> bool:
    cls = type(module)
    if isinstance(module, Quantized):
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


def _conv1d_base(module: nn.Module) -> type:
    """The class of the module, or the `Conv1D` that it is a subclass of."""
    return next((cls for cls in type(module).__mro__ if is_conv1d(cls)), type(module))


def _obstacle(module: nn.Module, meta: bool) -> str | None:
    """Why a layer that is to be converted cannot be, and what to do about it."""
    if nn.utils.parametrize.is_parametrized(module):
        return "its weight is parametrized: torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') first"
    weight = module._parameters.get("weight")
    if weight is None:
        return (
            "its weight is no parameter of its own, but computed (weight norm, spectral norm, pruning): "
            "remove that first, as with torch.nn.utils.remove_weight_norm(module)"
        )
    if _is_lazy(weight):
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


def _refuse_adapters(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any(c.__name__ == "BaseTunerLayer" and c.__module__.startswith("peft.") for c in type(module).__mro__):
            raise ValueError(
                f"model: {name or 'it'} is a layer with a PEFT adapter; quantize the model first, then add adapters"
            )


def _check_rules(use: Mapping[str, _RuleUse], notes: list[str]) -> None:
    """A rule must have done something, as in the offline tool."""
    for rule, used in use.items():
        if used.decided == 0:
            notes.append(f"the rule '{rule}' decides for no tensor")
        elif (used.refused or used.beside) and not used.quantized:
            reached = (used.refused or used.beside)[0]
            raise ValueError(
                f"rule is '{rule}', which reaches {reached}: expected a pattern for weights of linear layers "
                f"of {names(FLOAT_DTYPES)}, neither tied nor kept in float32"
            )
        elif used.refused:
            notes.append(
                f"the rule '{rule}' also reaches {len(used.refused)} tensors that stay as they are: "
                f"{used.refused[0]}, …"
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


def _left_out(
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
        if isinstance(module, nn.Linear) and module not in linear and not isinstance(module, Quantized | inert):
            others[cls.__name__] = others.get(cls.__name__, 0) + 1
    if others:
        listed = ", ".join(f"{count} {name}" for name, count in sorted(others.items()))
        notes.append(f"subclasses of nn.Linear stay as they are: {listed}; to take them, give subclasses=(…,)")
    fused = fused_experts((names[0], module) for module, names in modules.items())
    if fused:
        notes.append(experts_note(fused))
    return notes
