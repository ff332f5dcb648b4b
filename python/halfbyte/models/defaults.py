"""Which linear layers stay as they are by default, and why.

transformers keeps them too: output embeddings, tied weights, modules that the architecture wants in float32, and the
module with a transformers model's last parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from halfbyte import _native
from halfbyte.models.layers import is_lazy, is_transformers_model, join
from halfbyte.ops.checks import FLOAT_DTYPES, names


def kept_by_default(
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
            if any(_native.named_as_output(module_paths)):
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
        elif not is_lazy(weight) and weight.numel() == 0:
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
    matches = _native.match_names([name for _, name in flat], (), patterns)
    return [module for (module, _), found in zip(flat, matches, strict=True) if found["skip"] is not None]


def _hit_component(own: Mapping[nn.Module, tuple[str, ...]], keys: Sequence[str]) -> list[nn.Module]:
    """Modules with a key among the components of a path, as diffusers matches and models of no library mean it."""
    flat = [(module, path) for module, module_paths in own.items() for path in module_paths]
    covered = _native.match_components([path for _, path in flat], keys)
    return list(dict.fromkeys(module for (module, _), hit in zip(flat, covered, strict=True) if hit))


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
    if tensor.is_meta or is_lazy(tensor) or type(tensor.data) is not Tensor:
        return id(tensor)
    address = tensor.untyped_storage().data_ptr()
    if address == 0:
        return id(tensor)
    return address, tensor.storage_offset(), tuple(tensor.shape), tensor.device
