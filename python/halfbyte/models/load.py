"""`load_quantized`: fill a model from a checkpoint of packed weights, without a 16-bit copy in between.

Everything is checked against the file headers before the model is changed. On the CPU, tensors are memory-mapped, so
loading reads almost nothing.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from halfbyte._native import CheckpointError
from halfbyte._terminal import format_bytes
from halfbyte.backends import host_memory
from halfbyte.config import BitsAndBytesConfig
from halfbyte.models import packed
from halfbyte.models import transformers_weights as weights
from halfbyte.models.checkpoint_reader import Folder
from halfbyte.models.devices import device_with_storage
from halfbyte.models.expert_layouts import is_other_layout, stand_ins
from halfbyte.models.layers import is_conv1d, is_transformers_model, join, paths
from halfbyte.models.observers import notify
from halfbyte.models.offload import check_resident_bytes, experts_of, offload_experts
from halfbyte.models.plan import EXTRA, Plan, make_plan, persistent, report, some
from halfbyte.models.recipe import INT8, PACKED_LAYERS, PackedLayer, Recipe, bits_of, scales_of, shape_of
from halfbyte.models.replace import SOURCE_DTYPE, dense_dtype, replace, to_dense, to_embedding, to_linear
from halfbyte.models.transformers_experts import apart
from halfbyte.models.transformers_weights import Entry
from halfbyte.offline.hub import Hub
from halfbyte.ops.checks import FLOAT_DTYPES

_logger = logging.getLogger(__name__)

_Model = TypeVar("_Model", bound=nn.Module)

# Something beside the packed weight of a single expert.
_OF_AN_EXPERT = re.compile(r"experts\.\d+\.\w+\.(weight\.(absmax|nested_absmax)|SCB)$")
_SINGLE_EXPERT = re.compile(r"experts\.\d+\.\w+\.weight$")


def load_quantized(
    model: _Model,
    folder: str | PathLike[str],
    *,
    device: torch.device | str | int = "cpu",
    strict: bool = True,
    resident_expert_bytes: int | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
) -> _Model:
    """Fill a model from a 4-bit or 8-bit checkpoint that this package, or transformers with bitsandbytes, has saved.

    Args:
        model: On the meta device, which saves memory, or on any other. Linear layers, `Conv1D` and embeddings whose
            weight is packed in the checkpoint become 4-bit or 8-bit layers, as the names of its tensors say. Others are
            filled as they are.
        folder: A folder with `model.safetensors` or `model.safetensors.index.json`, one `.safetensors` file, or (with
            huggingface_hub installed) the name of a model.
        device: The device of all parameters and buffers.
        strict: Whether names that only the model or only the checkpoint has are an error. If False they are logged, and
            parameters that the checkpoint lacks are unchanged.
        resident_expert_bytes: Keep the packed experts of a Mixture-of-Experts model in pinned host memory, but for so
            many bytes of them (`halfbyte.offload_experts`); `device` must be a CUDA device. None loads all to `device`.
        revision: Where `folder` is a name on the hub: a branch, a tag or a commit; None for the main branch.
        token: Where `folder` is a name on the hub: an access token, or False to send none. None uses the one that
            `hf auth login` has stored, if any.
        cache_dir: Where `folder` is a name on the hub: the folder of downloaded files; None for huggingface_hub's.

    Returns:
        `model`, changed in place; a new object only if the model itself is a linear layer. The training flag is
        unchanged. Parameters have the dtypes of the file. 4-bit layers compute in the dtype that `config.json` gives,
        or else in the dtype of their input; 8-bit layers have the threshold that it gives, or else 6.0.

    Raises:
        CheckpointError: The checkpoint is broken, has no packed weight, or does not fit the model. The message names
            the tensor, and the model is unchanged.
        ValueError: A buffer is on the meta device, not in the checkpoint, and the model cannot compute it. With
            `resident_expert_bytes`, `device` is no CUDA device that torch sees, or the loaded model has no experts of 4
            bits.

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
    target = device_with_storage(device)
    gpu = None
    if resident_expert_bytes is not None:
        check_resident_bytes("resident_expert_bytes", resident_expert_bytes)
        # The experts go from the mapped files to pinned memory, and never to the GPU as a whole.
        gpu, target = host_memory.check_device(target), torch.device("cpu")
    with ExitStack() as stack:
        source = stack.enter_context(Folder(folder, Hub(revision, token, cache_dir)))
        config = _read_config(source)
        odd: list[str] = []
        single = any(map(_SINGLE_EXPERT.search, source.names))
        wanted = any(_OF_AN_EXPERT.search(name) or is_other_layout(name) for name in source.names)
        experts = stack.enter_context(apart(model, wanted, single))
        if is_transformers_model(model):
            instead = stand_ins(model, source, config.bnb_4bit_quant_type if config and config.load_in_4bit else None)
            source.replace(instead.hidden, instead.tensors)
            odd += instead.odd
        plan = make_plan(model, source)
        if plan.packed and experts.join(_unpacked_stacks(plan, experts.paths)):
            plan = make_plan(model, source)
        if not plan.packed:
            if plan.found:
                # There are packed weights, under names that the model has not.
                report(model, source, plan, strict=True)
            raise CheckpointError(
                f"{source.path}: holds no 4-bit weight and none of 8 bits; to quantize it: "
                "quantize_model(model, config, checkpoint=folder)"
            )
        report(model, source, plan, strict)
        if gpu is not None:
            _check_experts(model, plan)
        recipe = _recipe(source, config)
        # In mapped memory all of this costs nothing: the model is touched when everything is there and fits.
        layers = _layers(model, source, plan, target, recipe, odd)
        check_ties(model, source, plan)
        with buffers_computed(model, plan):
            rest = [(name, tensor.to(target)) for entry in plan.entries for name, tensor in values(source, entry)]
        experts.keep()
        names = paths(model)
        result: nn.Module = model
        for old, new in layers:
            result = replace(result, names[old], new)
        holders = tensor_holders(result)
        for name, tensor in rest:
            assign(holders, name, tensor)
        finish(result, plan, target)
        if config is not None:
            notify(result, config)
        if gpu is not None:
            offload_experts(result, gpu, resident_bytes=resident_expert_bytes or 0)
    if odd:
        _logger.warning("%s: %s", source.path, packed.odd_scales_note(odd, len(plan.packed)))
    _summary(result, source)
    return result  # type: ignore[return-value]


# ---- the plan --------------------------------------------------------------------------------------------------------
# ---- carrying it out -------------------------------------------------------------------------------------------------


def _layers(
    model: nn.Module, source: Folder, plan: Plan, device: torch.device, recipe: Recipe, odd: list[str]
) -> list[tuple[nn.Module, nn.Module]]:
    """The packed layers that the checkpoint holds, each beside the layer that it replaces; `odd` scales are added."""
    found: dict[nn.Module, nn.Module] = {}
    dense: list[str] = []
    dtype = _float_dtype(plan)
    for target, one in plan.packed.items():
        path, _, attribute = target.rpartition(".")
        old = model.get_submodule(path)
        where, bits = f"{source.file(one.weight)}: {one.weight}", f"{one.bits}-bit"
        if attribute != "weight" or not (isinstance(old, nn.Linear | nn.Embedding) or is_conv1d(type(old))):
            raise CheckpointError(
                f"{where}: is {bits}, but {target} of the model belongs to a {type(old).__name__}, "
                "expected nn.Linear, Conv1D or nn.Embedding"
            )
        if isinstance(old, nn.Embedding) and (old.max_norm is not None or old.sparse):
            raise CheckpointError(
                f"{where}: is {bits}, but {path} of the model has max_norm or sparse=True, which a {bits} table cannot "
                "have; build the model without them"
            )
        parts = {key: source.view(name) for key, name in one.parts.items()}
        try:
            weight = packed.parameter(one.bits, source.view(one.weight), parts, device)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{where}: {error}") from None
        found_odd = None if source.is_replaced(one.weight) else packed.odd_scales(one, weight, parts)
        odd += [] if found_odd is None else [found_odd]
        shape, expected = shape_of(weight), layer_shape(old)
        if shape != expected:
            raise CheckpointError(
                f"{where}: holds {list(shape)}, {path} of the model has {list(expected)}; build the model with the "
                "configuration that the checkpoint was saved with"
            )
        if old in found:
            raise CheckpointError(
                f"{where}: is a second packed weight for {path}, which is one layer of the model under several names; "
                "expected one packed weight for each layer"
            )
        new: PackedLayer
        if isinstance(old, nn.Embedding):
            state = getattr(weight, "quant_state", None)
            new = to_embedding(old, weight, (state.dtype if state is not None else dtype) or torch.float32, recipe)
        else:
            new = to_linear(old, weight, recipe)
        if one.bits == 8 and dtype is not None:
            # The model's own weights may be of another dtype than the file's.
            new.__dict__[SOURCE_DTYPE] = dtype
        found[old] = new
        if _has_own_code(type(old)):
            dense.append(path)
            found[old] = to_dense(new, dense_dtype(new))
    if dense:
        _logger.warning("%s: %s: the module's class has code of its own that reads the weight, so it is unpacked",
                        source.path, some(dense))  # fmt: skip
    return list(found.items())


def _unpacked_stacks(plan: Plan, paths: Iterable[str]) -> set[str]:
    """Of the paths of experts, those that the checkpoint has in 16 bits, all of a layer in one tensor."""

    def path_of(weight: str) -> str:
        # `….experts.<i>.<projection>.weight`
        return weight.rsplit(".", 3)[0]

    split = {path_of(next(iter(e.targets))) for e in plan.entries if len(e.targets) > 1 and len(e.sources) == 1}
    return split.intersection(paths) - {path_of(weight) for weight in plan.packed}


def _check_experts(model: nn.Module, plan: Plan) -> None:
    """That there are experts to be kept in host memory, all of them of 4 bits."""
    found = experts_of(model)
    if not found:
        raise ValueError(
            f"resident_expert_bytes must be None for a model without experts of 4 bits, such as {type(model).__name__}"
        )
    for target, one in plan.packed.items():
        if one.bits != 4 and any(target.startswith(join(path, "")) for path in found):
            raise ValueError(f"resident_expert_bytes must be None for experts of {one.bits} bits, such as {target}")


def _float_dtype(plan: Plan) -> torch.dtype | None:
    """The dtype of what is not packed in a checkpoint: the first that is one of a model's."""
    dtypes = (dtype for entry in plan.entries for _, dtype in entry.targets.values())
    return next((dtype for dtype in dtypes if dtype in FLOAT_DTYPES), None)


def _has_own_code(cls: type[nn.Module]) -> bool:
    """Would a packed layer in its place lose code of the class, or be read by code that expects a plain weight?"""
    if issubclass(cls, PACKED_LAYERS) or is_conv1d(cls):
        return False
    base: type[nn.Module] = nn.Embedding if issubclass(cls, nn.Embedding) else nn.Linear
    # `nn.MultiheadAttention` reads the weight of this class, and never calls it.
    inert = nn.modules.linear.NonDynamicallyQuantizableLinear
    return cls is inert or cls.forward is not base.forward


def layer_shape(old: nn.Module) -> tuple[int, ...]:
    """`[out, in]` of a linear layer, `[rows, columns]` of an embedding."""
    if isinstance(old, PACKED_LAYERS):
        if isinstance(old, nn.Embedding):
            return old.num_embeddings, old.embedding_dim
        return old.out_features, old.in_features
    weight = old._parameters["weight"]
    assert weight is not None
    return tuple(weight.shape[::-1] if is_conv1d(type(old)) else weight.shape)


def values(source: Folder, entry: Entry, read: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the model by name, made of a checkpoint's; mapped, or with `read` in memory of their own."""
    get = source.read if read else source.view
    if entry.convert is None:
        (target,), (name,) = entry.targets, entry.sources
        yield target, get(name)
    else:
        yield from entry.convert({name: get(name) for name in entry.sources}).items()


def check_ties(model: nn.Module, source: Folder, plan: Plan) -> None:
    """What is one parameter in the model, and two tensors in the checkpoint, must be the same numbers there.

    Raises:
        CheckpointError: It is not; the message names both.
    """
    tensors = persistent(model)
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


@contextmanager
def buffers_computed(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Compute the buffers that no checkpoint holds. An error in the context takes them back to the meta device.

    Raises:
        ValueError: The model cannot.
    """
    try:
        _compute_buffers(model, plan)
        yield
    except BaseException:
        for name, buffer in plan.buffers.items():
            path, _, attribute = name.rpartition(".")
            model.get_submodule(path)._buffers[attribute] = buffer
        raise


def _compute_buffers(model: nn.Module, plan: Plan) -> None:
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
            f"model: its buffers {some(list(left))} are on the meta device and in no checkpoint; build the model with "
            "accelerate.init_empty_weights(), which leaves only parameters on the meta device"
        )


def tensor_holders(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """For each name of a parameter or buffer, every place that holds the same object; and of each extra state."""
    by_object: dict[int, list[tuple[nn.Module, str]]] = {}
    by_name: dict[str, list[tuple[nn.Module, str]]] = {}
    for module, module_paths in paths(model).items():
        by_name.update({join(path, EXTRA): [(module, EXTRA)] for path in module_paths})
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
    if attribute == EXTRA:
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
    try:
        return BitsAndBytesConfig.of_checkpoint(given)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from None


def _recipe(source: Folder, config: BitsAndBytesConfig | None) -> Recipe:
    """What layers compute in: what `config.json` says, if it says anything."""
    if config is None:
        return Recipe(INT8)
    recipe = Recipe.from_config(config)
    said = (source.config or {})["quantization_config"].get("bnb_4bit_compute_dtype")
    return recipe if said is not None else dataclasses.replace(recipe, compute_dtype=None)


def _summary(model: nn.Module, source: Folder) -> None:
    counts = Counter(bits_of(module) for module in model.modules())
    layers = " and ".join(f"{counts[bits]} {bits}-bit" for bits in (4, 8) if counts[bits])
    _logger.info("loaded %s layers from %s: %s", layers, source.path, format_bytes(model_bytes(model)))


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, buffers and scales, what is shared counted once."""
    seen: dict[int, int] = {}
    for module in model.modules():
        held = [*module._parameters.values(), *module._buffers.values(), *scales_of(module)]
        for tensor in held:
            if tensor is not None and not isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
                seen[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())
