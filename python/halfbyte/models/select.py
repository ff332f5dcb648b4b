"""Which layers of a torch model are packed, to 4 bits or to 8, and why the others are not.

The choice is transformers' and the offline tool's: plain `nn.Linear` and `Conv1D`, without output embeddings, tied
weights, modules that the architecture keeps in float32, and the module that holds a transformers model's last
parameter. Rules and skip names are matched by the compiled core, which serves the offline tool too, so that a pattern
means the same in both; here they see the model's own names. Nothing in this file changes the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from halfbyte import _native
from halfbyte.models.defaults import kept_by_default
from halfbyte.models.layers import (
    conv1d_base,
    is_conv1d,
    is_linear,
    is_transformers_model,
    join,
    left_out,
    obstacle,
    paths,
    refuse_adapters,
)
from halfbyte.models.recipe import PACKED_LAYERS
from halfbyte.nn.experts import Experts4bit
from halfbyte.ops.checks import FLOAT_DTYPES, names


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
    """Layers that are packed already."""
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
        rules: `"REGEX=nf4|fp4|int8|keep"`; the first that is found in the name of a weight or of its module decides.
        skip: Names of modules to keep besides the defaults, matched as transformers matches `llm_int8_skip_modules`.
        subclasses: True to take also subclasses of `nn.Linear` that do not override `forward`; or the classes to take.
        meta: Weights on the meta device are acceptable: they will come from a checkpoint.

    Raises:
        ValueError: A rule or skip name does not parse, a rule asks only for what cannot be quantized, or a layer that
            is to be converted cannot be; the message names it.
    """
    refuse_adapters(model)
    choice = Choice()
    modules = paths(model)
    linear = {m: p for m, p in modules.items() if is_linear(m, subclasses)}
    never, kept = kept_by_default(model, modules, linear)

    tensors = [
        (join(path, name), module)
        for module, module_paths in modules.items()
        if not isinstance(module, PACKED_LAYERS)
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
    matches = _native.match_names([name for name, _ in tensors], rules, skip)
    # The list of experts is a module too, and the one that a model has before its experts are taken apart.
    lists = [path for module, own in modules.items() if isinstance(module, Experts4bit) for path in own]
    of_lists = _native.match_names([join(path, "weight") for path in lists], (), skip)
    kept_lists = {
        path: skip[found["skip"]] for path, found in zip(lists, of_lists, strict=True) if found["skip"] is not None
    }
    use = {rule: _RuleUse() for rule in rules}
    wanted: dict[nn.Module, list[str | None]] = {module: [] for module in linear}
    why: dict[nn.Module, str] = {}
    for (name, module), found in zip(tensors, matches, strict=True):
        rule = None if found["rule"] is None else rules[found["rule"]]
        skipped = kept_lists.get(name.rsplit(".", 3)[0]) if found["skip"] is None else skip[found["skip"]]
        rule_type = found["quant_type"]
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
                f"rules: {' and '.join(map(repr, module_paths))} are one layer, and rules ask for it as "
                f"{' and as '.join(sorted(str(one) for one in types))}"
            )
        else:
            (chosen,) = types
            assert chosen is not None
            choice.layers.append(Layer(module, module_paths, chosen, is_conv1d(conv1d_base(module))))
        # What a loader keeps by default, and what can never be, is the same to it.
        choice.as_default &= (None in types) == (module in never or module in kept)
    _check_rules(use, choice.notes)
    known_names = [*(name for name, _ in tensors), *(join(path, "weight") for path in lists)]
    for skip_name in skip:
        if all(found["skip"] is None for found in _native.match_names(known_names, (), [skip_name])):
            choice.notes.append(f"the skip name {skip_name!r} matches no module")
    for layer in choice.layers:
        reason = obstacle(layer.module, meta)
        if reason is not None:
            raise ValueError(f"{layer.name}: {reason}; or keep the layer as it is: skip=[{layer.names[0]!r}]")
    choice.quantized = sum(isinstance(module, PACKED_LAYERS) for module in modules)
    choice.notes += left_out(modules, linear, subclasses)
    return choice


def skip_list(model: nn.Module, choice: Choice) -> list[str] | None:
    """`llm_int8_skip_modules` that makes a loader choose the same: None where its defaults do.

    In transformers 5 a list replaces the defaults, so it is complete.
    """
    if choice.as_default:
        return None
    return names_to_keep(model, [name for layer in choice.layers for name in layer.names], list(choice.kept))


def names_to_keep(model: nn.Module, packed: Sequence[str], kept: Sequence[str]) -> list[str]:
    """Names of modules by which a loader keeps the linear layers at some paths, and packs those at others."""
    return _with_and_without_prefix(model, _native.skip_modules(packed, kept) or [], packed)


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
    harmless = [
        name for name in short if all(found["skip"] is None for found in _native.match_names(weights, (), [name]))
    ]
    return list(dict.fromkeys([*listed, *harmless]))


def _check_rules(use: Mapping[str, _RuleUse], notes: list[str]) -> None:
    """A rule must have done something, as in the offline tool."""
    for rule, used in use.items():
        if used.decided == 0:
            notes.append(f"the rule '{rule}' decides for no tensor")
        elif (used.refused or used.beside) and not used.quantized:
            reached = (used.refused or used.beside)[0]
            raise ValueError(
                f"rule must be a pattern for weights of linear layers of {names(FLOAT_DTYPES)}, neither tied nor kept "
                f"in float32, got '{rule}', which reaches {reached}"
            )
        elif used.refused:
            notes.append(
                f"the rule '{rule}' also reaches {len(used.refused)} tensors that stay as they are: "
                f"{used.refused[0]}, …"
            )
