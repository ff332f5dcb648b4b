"""`load_quantized`: fill a model from a 4-bit checkpoint, without a 16-bit copy in between.

Everything is checked against the file headers before the model is changed. On the CPU, tensors are memory-mapped, so
loading reads almost nothing.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from halfbyte._native import CheckpointError
from halfbyte._terminal import format_bytes
from halfbyte.config import BitsAndBytesConfig
from halfbyte.models import transformers_weights as weights
from halfbyte.models.checkpoint_reader import Folder
from halfbyte.models.layers import is_conv1d, is_transformers_model, join, paths
from halfbyte.models.observers import notify
from halfbyte.models.replace import replace, to_dense, to_embedding4bit, to_linear4bit
from halfbyte.models.transformers_weights import Entry
from halfbyte.nn import Embedding4bit, Linear4bit, Params4bit
from halfbyte.nn._quantized import Quantized
from halfbyte.offline import config_json
from halfbyte.offline.hub import Hub
from halfbyte.state import PACKED_KEYS, TENSOR_KEYS

_logger = logging.getLogger(__name__)

_Model = TypeVar("_Model", bound=nn.Module)
_EXTRA = "_extra_state"
_SUFFIXES = tuple(f".{key}" for key in (*TENSOR_KEYS, *PACKED_KEYS))


@dataclass
class Plan:
    """How the tensors of a checkpoint get into a model."""

    entries: list[Entry] = field(default_factory=list)
    packed: dict[str, str] = field(default_factory=dict)
    """Weights that are 4-bit in the checkpoint: name in the model, and in the checkpoint."""
    states: dict[str, list[str]] = field(default_factory=dict)
    """Of each packed weight, by its name in the checkpoint: the tensors beside it."""
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    """Those on the meta device that no checkpoint holds."""


def load_quantized(
    model: _Model,
    folder: str | PathLike[str],
    *,
    device: torch.device | str | int = "cpu",
    strict: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
) -> _Model:
    """Fill a model from a 4-bit checkpoint that this package, or transformers with bitsandbytes, has saved.

    Args:
        model: On the meta device, which saves memory, or on any other. Linear layers, `Conv1D` and embeddings whose
            weight is packed in the checkpoint become 4-bit layers. Others are filled as they are.
        folder: A folder with `model.safetensors` or `model.safetensors.index.json`, one `.safetensors` file, or (with
            huggingface_hub installed) the name of a model.
        device: The device of all parameters and buffers.
        strict: Whether names that only the model or only the checkpoint has are an error. If False they are logged, and
            parameters that the checkpoint lacks are unchanged.
        revision: Where `folder` is a name on the hub: a branch, a tag or a commit; None for the main branch.
        token: Where `folder` is a name on the hub: an access token, or False to send none. None uses the one that
            `hf auth login` has stored, if any.
        cache_dir: Where `folder` is a name on the hub: the folder of downloaded files; None for huggingface_hub's.

    Returns:
        `model`, changed in place; a new object only if the model itself is a linear layer. The training flag is
        unchanged. Parameters have the dtypes of the file. 4-bit layers compute in the dtype that `config.json` gives,
        or else in the dtype of their input.

    Raises:
        CheckpointError: The checkpoint is broken, is not 4-bit, or does not fit the model. The message names the
            tensor, and the model is unchanged.
        ValueError: A buffer is on the meta device, not in the checkpoint, and the model cannot compute it.

    For models of transformers, the installed transformers decides names, conversions, ties and computed buffers. Other
    models on the meta device need all of their buffers in the checkpoint: `accelerate.init_empty_weights()` leaves
    buffers on the CPU, `torch.device("meta")` does not.

    On the CPU, tensors are memory-mapped: do not overwrite the files in place while the model exists. Replacing or
    deleting them is safe.

    >>> import torch, tempfile, halfbyte
    >>> from safetensors.torch import save_file
    >>> model = halfbyte.quantize_model(torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU()))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file(model.state_dict(), f"{folder}/model.safetensors")
    ...     with torch.device("meta"):
    ...         empty = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU())
    ...     loaded = halfbyte.load_quantized(empty, folder)
    >>> x = torch.randn(2, 64)
    >>> torch.equal(loaded(x), model(x))
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    target = torch.device(device)
    if target.type == "meta":
        raise ValueError("device must be a device with storage, such as 'cpu' or 'cuda', got 'meta'")
    with Folder(folder, Hub(revision, token, cache_dir)) as source:
        config = _read_config(source)
        plan = make_plan(model, source)
        if not plan.packed:
            if plan.states:
                # There are 4-bit weights, under names that the model has not.
                report(model, source, plan, strict=True)
            raise CheckpointError(
                f"{source.path}: holds no 4-bit weight; to quantize it: "
                "quantize_model(model, config, checkpoint=folder)"
            )
        report(model, source, plan, strict)
        compute_dtype = _compute_dtype(source, config)
        # In mapped memory all of this costs nothing: the model is touched when everything is there and fits.
        layers = _layers(model, source, plan, target, compute_dtype)
        check_ties(model, source, plan)
        compute_buffers(model, plan)
        names = paths(model)
        result: nn.Module = model
        for old, new in layers:
            result = replace(result, names[old], new)
        holders = tensor_holders(result)
        for entry in plan.entries:
            for name, tensor in _values(source, entry):
                assign(holders, name, tensor.to(target))
        finish(result, plan, target)
        if config is not None:
            notify(result, config)
    _summary(result, source)
    return result  # type: ignore[return-value]


# ---- the plan --------------------------------------------------------------------------------------------------------


def make_plan(model: nn.Module, source: Folder) -> Plan:
    """Compare a checkpoint with a model, by names, shapes and dtypes alone.

    Raises:
        CheckpointError: Shapes disagree, a state has no weight, or the checkpoint is quantized in another way.
    """
    _refuse_other_formats(source)
    plan = Plan()
    bases = [name.removesuffix(f".{key}") for key in PACKED_KEYS for name in source.names if name.endswith(f".{key}")]
    for base in dict.fromkeys(bases):
        plan.states[base] = [f"{base}{suffix}" for suffix in _SUFFIXES if f"{base}{suffix}" in source]
        if base not in source:
            raise CheckpointError(f"{source.path}: {base} is missing, but {plan.states[base][0]} is there")
    for name in source.names:
        base, _, key = name.rpartition(".")
        if key in TENSOR_KEYS and base in source and base not in plan.states:
            raise CheckpointError(
                f"{source.path}: {name} is there, but neither {base}.{PACKED_KEYS[0]} nor {PACKED_KEYS[1]}"
            )
    beside = {name for state in plan.states.values() for name in state}
    names = [name for name in source.names if name not in beside]

    tensors = _persistent(model)
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
    _check_shapes(source, plan, tensors)
    return plan


def _refuse_other_formats(source: Folder) -> None:
    method = config_json.existing_quantization(source.config) if source.config else None
    if method not in (None, "bitsandbytes"):
        raise CheckpointError(f"{source.path}: is quantized with {method}, expected bitsandbytes' 4-bit format")
    eight = next((name for name in source.names if name.endswith(".SCB")), None)
    if eight is not None:
        raise CheckpointError(f"{source.path}: {eight}: is quantized to 8 bits (LLM.int8()), expected 4 bits")


def _persistent(model: nn.Module) -> dict[str, Tensor]:
    """Everything that the model's state dict holds, but for the states of weights that are packed already."""
    packed = {f"{path}.weight{suffix}".lstrip(".")
              for module, module_paths in paths(model).items() if isinstance(module, Quantized)
              for path in module_paths for suffix in _SUFFIXES}  # fmt: skip
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and name not in packed}


def _take_packed(model: nn.Module, source: Folder, plan: Plan) -> None:
    """Take the packed weights out of the entries."""
    for entry in plan.entries:
        bases = [name for name in entry.sources if name in plan.states]
        if not bases:
            continue
        if entry.convert is not None:
            raise CheckpointError(
                f"{source.path}: {bases[0]} is 4-bit, but {type(model).__name__} wants it split or merged into "
                f"{', '.join(entry.targets)}, which needs 16 bits: keep it when quantizing, as by "
                f"--rule '{bases[0].split('.')[-2]}=keep'"
            )
        (target,) = entry.targets
        plan.packed[target] = bases[0]
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


def _is_extra(name: str) -> bool:
    """Is it the state of a module's own making (`get_extra_state`), of whatever shape?"""
    return name.rpartition(".")[2] == _EXTRA


def _check_shapes(source: Folder, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    """Tensors that are filled as they are must have the model's shapes."""
    wrong = [
        f"{name} is {list(shape)}, the model has {list(tensors[name].shape)}"
        for entry in plan.entries
        for name, (shape, _) in entry.targets.items()
        if name in tensors and not _is_extra(name) and shape != tuple(tensors[name].shape)
    ]
    if wrong:
        raise CheckpointError(f"{source.path}: {_some(wrong)}")


def report(model: nn.Module, source: Folder, plan: Plan, strict: bool, unexpected: bool = True) -> None:
    """Raise for, or else log, names that only one side has; without `unexpected`, the checkpoint's are only logged.

    Raises:
        CheckpointError: There are such names, and `strict`.
    """
    what = []
    if plan.missing:
        what.append(f"the checkpoint lacks {_some(plan.missing)}")
    if plan.unexpected:
        what.append(f"{type(model).__name__} has no place for {_some(plan.unexpected)}")
    if strict and (plan.missing or (unexpected and plan.unexpected)):
        raise CheckpointError(f"{source.path}: {'; '.join(what)}")
    for line in what:
        _logger.warning("%s: %s", source.path, line)


def _some(items: Sequence[str], most: int = 10) -> str:
    """The first few of many, and how many there are."""
    rest = len(items) - most
    return ", ".join(items[:most]) + (f" and {rest} more" if rest > 0 else "")


# ---- carrying it out -------------------------------------------------------------------------------------------------


def _layers(
    model: nn.Module, source: Folder, plan: Plan, device: torch.device, compute_dtype: torch.dtype | None
) -> list[tuple[nn.Module, nn.Module]]:
    """The 4-bit layers that the checkpoint holds, each beside the layer that it replaces."""
    found: dict[nn.Module, nn.Module] = {}
    dense: list[str] = []
    for target, base in plan.packed.items():
        path, _, attribute = target.rpartition(".")
        old = model.get_submodule(path)
        where = f"{source.file(base)}: {base}"
        if attribute != "weight" or not (isinstance(old, nn.Linear | nn.Embedding) or is_conv1d(type(old))):
            raise CheckpointError(
                f"{where}: is 4-bit, but {target} of the model belongs to a {type(old).__name__}, "
                "expected nn.Linear, Conv1D or nn.Embedding"
            )
        if isinstance(old, nn.Embedding) and (old.max_norm is not None or old.sparse):
            raise CheckpointError(f"{where}: is 4-bit, but {path} has max_norm or sparse, which 4-bit tables have not")
        stats = float_parts({name.removeprefix(f"{base}."): source.view(name) for name in plan.states[base]})
        try:
            weight = Params4bit.from_prequantized(source.view(base), stats, device=device)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{where}: {error}") from None
        state = weight.quant_state
        assert state is not None
        assert state.shape is not None
        shape, expected = tuple(state.shape), layer_shape(old)
        if shape != expected:
            raise CheckpointError(f"{where}: holds {list(shape)}, {path} of the model has {list(expected)}")
        if old in found:
            raise CheckpointError(f"{where}: {path} of the model has another 4-bit weight under another name")
        if _has_own_code(type(old)):
            dense.append(path)
        if isinstance(old, nn.Embedding):
            found[old] = to_embedding4bit(old, weight, state.dtype or torch.float32)
        else:
            found[old] = to_linear4bit(old, weight, shape[1], shape[0], compute_dtype)
        if _has_own_code(type(old)):
            found[old] = to_dense(found[old], state.dtype)  # type: ignore[arg-type]
    if dense:
        _logger.warning("%s: %s: the module's class has code of its own that reads the weight, so it is unpacked",
                        source.path, _some(dense))  # fmt: skip
    return list(found.items())


def float_parts(stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts beside a packed weight with scales in float32: some tools cast all that is not packed to 16 bits."""
    half = (torch.float16, torch.bfloat16)
    return {key: value.float() if value.dtype in half else value for key, value in stats.items()}


def _has_own_code(cls: type[nn.Module]) -> bool:
    """Would a 4-bit layer in its place lose code of the class, or be read by code that expects a plain weight?"""
    if issubclass(cls, Linear4bit | Embedding4bit) or is_conv1d(cls):
        return False
    base: type[nn.Module] = nn.Embedding if issubclass(cls, nn.Embedding) else nn.Linear
    # `nn.MultiheadAttention` reads the weight of this class, and never calls it.
    inert = nn.modules.linear.NonDynamicallyQuantizableLinear
    return cls is inert or cls.forward is not base.forward


def layer_shape(old: nn.Module) -> tuple[int, ...]:
    """`[out, in]` of a linear layer, `[rows, columns]` of an embedding."""
    if isinstance(old, Linear4bit | Embedding4bit):
        return old._weight_shape()
    weight = old._parameters["weight"]
    assert weight is not None
    return tuple(weight.shape[::-1] if is_conv1d(type(old)) else weight.shape)


def _values(source: Folder, entry: Entry, read: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the model by name, made of a checkpoint's; mapped, or with `read` in memory of their own."""
    get = source.read if read else source.view
    if entry.convert is None:
        (target,), (name,) = entry.targets, entry.sources
        yield target, get(name)
    else:
        yield from entry.convert({name: get(name) for name in entry.sources}).items()


values = _values


def check_ties(model: nn.Module, source: Folder, plan: Plan) -> None:
    """What is one parameter in the model, and two tensors in the checkpoint, must be the same numbers there.

    Raises:
        CheckpointError: It is not; the message names both.
    """
    tensors = _persistent(model)
    first: dict[int, str] = {}
    by_target = {name: entry for entry in plan.entries if entry.convert is None for name in entry.targets}
    for name, entry in by_target.items():
        other = first.setdefault(id(tensors[name]), name)
        if other == name:
            continue
        a, b = source.view(by_target[other].sources[0]), source.view(entry.sources[0])
        if a.dtype != b.dtype or not torch.equal(a, b):
            raise CheckpointError(
                f"{source.path}: {other} and {name} are one parameter in the model, but differ in the checkpoint; "
                "untie them (tie_word_embeddings=False in the model's config)"
            )


def compute_buffers(model: nn.Module, plan: Plan) -> None:
    """Compute the buffers that no checkpoint holds.

    Raises:
        ValueError: The model cannot.
    """
    left = dict(plan.buffers)
    for path, module in model.named_modules():
        inside = {
            n.removeprefix(join(path, "")): b for n, b in left.items() if n.startswith(join(path, "")) or not path
        }
        if inside and is_transformers_model(module):
            weights.compute_buffers(module, inside)
            left = {name: buffer for name, buffer in left.items() if name.removeprefix(join(path, "")) not in inside}
    if left:
        raise ValueError(
            f"model: its buffers {_some(list(left))} are on the meta device and in no checkpoint; build the model with "
            "accelerate.init_empty_weights(), which leaves only parameters on the meta device"
        )


def tensor_holders(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """For each name of a parameter or buffer, every place that holds the same object; and of each extra state."""
    by_object: dict[int, list[tuple[nn.Module, str]]] = {}
    by_name: dict[str, list[tuple[nn.Module, str]]] = {}
    for module, module_paths in paths(model).items():
        by_name.update({join(path, _EXTRA): [(module, _EXTRA)] for path in module_paths})
        for held in (module._parameters, module._buffers):
            for attribute, tensor in held.items():
                if tensor is None:
                    continue
                places = by_object.setdefault(id(tensor), [])
                places.append((module, attribute))
                by_name.update({join(path, attribute): places for path in module_paths})
    return by_name


def assign(holders: Mapping[str, list[tuple[nn.Module, str]]], name: str, value: Tensor) -> None:
    """Put a tensor in a parameter's or buffer's place, wherever the model holds it."""
    places = holders[name]
    module, attribute = places[0]
    if attribute == _EXTRA:
        module.set_extra_state(value)
        return
    if attribute in module._buffers:
        for holder, buffer in places:
            holder._buffers[buffer] = value
        return
    old = module._parameters[attribute]
    assert old is not None
    new = nn.Parameter(value, requires_grad=old.requires_grad and value.is_floating_point())
    for holder, parameter in places:
        holder._parameters[parameter] = new


def finish(model: nn.Module, plan: Plan, device: torch.device) -> None:
    """Tie what is tied, and move what was not in the checkpoint."""
    if is_transformers_model(model):
        given = {name for entry in plan.entries for name in entry.targets} | set(plan.packed)
        missing = {name for pair in weights.tied_names(model) for name in pair if name not in given}  # type: ignore[arg-type]
        its: Any = model
        its.tie_weights(missing_keys=missing, recompute_mapping=False)
    for module in model.modules():
        tensors: Iterable[Tensor | None] = [*module._parameters.values(), *module._buffers.values()]
        if any(tensor is not None and not tensor.is_meta and tensor.device != device for tensor in tensors):
            module._apply(  # type: ignore[no-untyped-call]
                lambda tensor: tensor if tensor.is_meta else tensor.to(device), recurse=False
            )


def _read_config(source: Folder) -> BitsAndBytesConfig | None:
    """The `quantization_config` of `config.json`, checked; None where there is none.

    Raises:
        CheckpointError: A value has a wrong type or is not one of those that there are.
    """
    found = (source.config or {}).get("quantization_config")
    if not isinstance(found, dict):
        return None
    where = f"{source.path}: config.json: quantization_config"
    skipped = found.get("llm_int8_skip_modules")
    if skipped is not None and not (isinstance(skipped, list) and all(isinstance(name, str) for name in skipped)):
        raise CheckpointError(f"{where}: llm_int8_skip_modules must be a list of names or null, got {skipped!r}")
    arguments = inspect.signature(BitsAndBytesConfig).parameters
    given = {key: value for key, value in found.items() if key in arguments}
    if given.get("load_in_4bit") is True and given.get("load_in_8bit") is True:
        # A checkpoint of both kinds, by rules. A config has one of them; which weight is what, the tensors say.
        given["load_in_8bit"] = False
    try:
        return BitsAndBytesConfig.coerce(BitsAndBytesConfig.from_dict(given))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from None


def _compute_dtype(source: Folder, config: BitsAndBytesConfig | None) -> torch.dtype | None:
    """What `config.json` says, if it says anything."""
    if config is None or (source.config or {})["quantization_config"].get("bnb_4bit_compute_dtype") is None:
        return None
    dtype = config.bnb_4bit_compute_dtype
    return dtype if isinstance(dtype, torch.dtype) else None


def _summary(model: nn.Module, source: Folder) -> None:
    packed = sum(isinstance(module, Quantized) for module in model.modules())
    _logger.info("loaded %d 4-bit layers from %s: %s", packed, source.path, format_bytes(model_bytes(model)))


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, buffers and quantization states, what is shared counted once."""
    seen: dict[int, int] = {}
    for module in model.modules():
        held = [*module._parameters.values(), *module._buffers.values()]
        if isinstance(module, Quantized) and module.quant_state is not None:
            held += module.quant_state.tensors()
        for tensor in held:
            if tensor is not None and not isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
                seen[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())
