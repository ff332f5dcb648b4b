"""`quantize_model` and `dequantize_model`: convert the linear layers of a model to 4 or 8 bits, and back.

Weights are packed one after the other, so at most one dense weight exists beside the packed ones. Layers of a model
that holds its weights are replaced one by one; those of one that is filled from a checkpoint, when all of it was read.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from halfbyte import _native
from halfbyte._native import CheckpointError
from halfbyte._terminal import Bar, format_bytes, is_terminal
from halfbyte.config import BitsAndBytesConfig
from halfbyte.models.checkpoint_reader import Folder
from halfbyte.models.devices import device_with_storage
from halfbyte.models.experts import fuse, with_own_memory
from halfbyte.models.layers import join, paths
from halfbyte.models.load import (
    assign,
    buffers_computed,
    check_ties,
    finish,
    model_bytes,
    tensor_holders,
    values,
)
from halfbyte.models.observers import notify
from halfbyte.models.packed import KEYS_8BIT
from halfbyte.models.plan import Plan, make_plan, report
from halfbyte.models.recipe import INT8, PACKED_LAYERS, PackedParameter, Recipe, bits_of, is_quantized, scales_of
from halfbyte.models.replace import replace, to_dense, to_linear
from halfbyte.models.select import Choice, Layer, choose, skip_list
from halfbyte.models.transformers_experts import apart
from halfbyte.nn import Params4bit
from halfbyte.nn.experts import Experts4bit
from halfbyte.nn.int8_params import check_weight
from halfbyte.offline.hub import Hub
from halfbyte.offline.options import QuantizeOptions, Rule, module_names, rule_texts
from halfbyte.ops.checks import FLOAT_DTYPES

_logger = logging.getLogger(__name__)

_Model = TypeVar("_Model", bound=nn.Module)
_Show = Callable[[int, int, str], None]


def quantize_model(
    model: _Model,
    config: BitsAndBytesConfig | dict[str, Any] | object | None = None,
    *,
    rules: Iterable[Rule] | None = None,
    skip: Iterable[str] | None = None,
    subclasses: bool | Iterable[type[nn.Linear]] = False,
    checkpoint: str | PathLike[str] | None = None,
    device: torch.device | str | int | None = None,
    progress: bool | _Show = True,
    blocksize: int = 64,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
) -> _Model:
    """Replace the linear layers of a model by `Linear4bit` or `Linear8bitLt`, in place.

    Args:
        model: Any module. All `nn.Linear` and transformers' `Conv1D` modules in it are converted.
        config: A `BitsAndBytesConfig` of this package or of transformers, or a dict of its arguments, with
            `load_in_4bit=True` or `load_in_8bit=True` (LLM.int8()). None means NF4 with double quantization, computed
            in the dtype of the input.
        rules: Exceptions, as in the offline tool: `"REGEX=nf4|fp4|int8|keep"`, or pairs of both sides. The first whose
            pattern is found in the name of a weight or of its layer decides, before the defaults.
        skip: Names of modules to keep in addition to the defaults, matched as transformers matches
            `llm_int8_skip_modules`. Names in `config` are added in the same way.
        subclasses: Subclasses of `nn.Linear` to convert too, or True for all that do not override `forward`.
        checkpoint: A folder of 16- or 32-bit safetensors (or one file, or a model's name). `model` is then on the meta
            device and is filled from it; each weight is quantized as it is read.
        device: Where to move the model, layer by layer. None leaves everything where it is (on the CPU, when it comes
            from a checkpoint).
        progress: Whether to show a bar on a terminal; or a callable(layers done, layers in total, name).
        blocksize: Weights per absmax, as in `quantize_checkpoint`.
        revision: Where `checkpoint` is a name on the hub, as in `quantize_checkpoint`.
        token: Where `checkpoint` is a name on the hub, as in `quantize_checkpoint`.
        cache_dir: Where `checkpoint` is a name on the hub, as in `quantize_checkpoint`.

    Returns:
        `model`; a new object only if the model itself is a linear layer. A summary is logged at level INFO.

    Raises:
        ValueError: There is nothing to convert; a layer cannot be converted (its weight is computed, offloaded or on
            the meta device, or its `forward` was replaced; for 8 bits, its weight has a NaN, an infinity or a value
            beyond float16); or `config`, a rule or a skip name is wrong. The message names the layer or argument, and
            the model is unchanged.
        CheckpointError: The checkpoint lacks a tensor or does not fit the model. The model is unchanged.
        TypeError: An argument has a wrong type.

    By default the same layers are kept as in transformers and the offline tool: output embeddings, tied weights,
    modules that the architecture keeps in float32, the last parameter of a transformers model, and weights of other
    dtypes. A layer with several parents is converted once and stays shared. Biases, hooks, attributes, the training
    flag and `requires_grad` of all other parameters are unchanged. A packed weight has no gradient. With
    `llm_int8_has_fp16_weight=True`, layers keep their float weights, which can be trained, and quantize them in each
    forward.

    Layers that are packed already are skipped, so a second call converts what the first one kept. Without `checkpoint`,
    an error in the middle (out of memory, an interrupt) leaves a working model with some layers packed. The number is
    logged, and the same call continues. With `checkpoint`, the model is filled when all of it has been read, and an
    error before that leaves it unchanged.

    >>> import torch, halfbyte
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
    >>> model = halfbyte.quantize_model(model, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, rules=["2=fp4"])
    >>> [layer.weight.quant_type for layer in (model[0], model[2])]
    ['nf4', 'fp4']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    settings = _settings(config)
    of_config = module_names("llm_int8_skip_modules", settings.llm_int8_skip_modules or ())
    options = QuantizeOptions(
        rules=rule_texts(rules or ()), skip=(*of_config, *module_names("skip", skip or ())), blocksize=blocksize
    )
    recipe = Recipe.from_config(settings, options.blocksize)
    target = None if device is None else device_with_storage(device)
    with apart(model) as experts:
        choice = choose(
            model,
            recipe.quant_type,
            rules=options.rules,
            skip=options.skip,
            subclasses=_classes(subclasses),
            meta=checkpoint is not None,
        )
        if not choice.layers:
            raise ValueError(_nothing(model, choice))
        listed = skip_list(model, choice)
        for note in choice.notes:
            _logger.warning("quantize_model: %s", note)

        _check_int8(choice, recipe, values=checkpoint is None)
        experts.settle(name for layer in choice.layers for name in layer.names)
        swap = _Swap(model, choice, recipe, target)
        # From here on only `swap` knows the layers, and lets go of each as it is converted.
        del choice
        with _display(progress) as show:
            if checkpoint is None:
                experts.keep()
                result = swap.run(show)
            else:
                result = swap.run_from(checkpoint, Hub(revision, token, cache_dir), show, experts.keep)
    notify(result, _written(settings, listed, result))
    _logger.info("%s", swap.summary(result))
    return result  # type: ignore[return-value]


def dequantize_model(model: _Model, dtype: torch.dtype | None = None) -> _Model:
    """Replace packed layers by the dense layers that they came from, one after the other, in place.

    Args:
        model: Any module with layers of `quantize_model` or `load_quantized`, or other `Linear4bit`, `Linear8bitLt`,
            `Embedding4bit` and `Embedding8bit` of this package.
        dtype: float16, bfloat16 or float32 of the dense weights; by default the dtype that each was quantized from. An
            8-bit weight does not say which that was: there it is the dtype of the bias, or of the model. A bias of
            another dtype is converted to it.

    Returns:
        `model`; another object only where the model itself is such a layer. `Conv1D` and subclasses of `nn.Linear` come
        back as what they were, hooks and attributes included, and `requires_grad` as it was.

    Raises:
        ValueError: There is no packed layer, or one of them is not quantized yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if dtype not in (None, torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype must be one of torch.float16, torch.bfloat16, torch.float32, None, got {dtype!r}")
    found = [(m, names) for m, names in paths(model).items() if isinstance(m, PACKED_LAYERS)]
    if not found:
        raise ValueError(f"model must have a 4-bit layer or an 8-bit one, got {type(model).__name__} without any")
    for module, names in found:
        if not is_quantized(module) or module.weight.is_meta:
            raise ValueError(f"model must be quantized, got {names[0] or 'a layer'} with a dense weight")
    result: nn.Module = model
    found.reverse()
    while found:
        module, names = found.pop()
        result = replace(result, names, to_dense(module, dtype))
        del module
    for experts, names in paths(result).items():
        whole = fuse(experts) if isinstance(experts, Experts4bit) else None
        if whole is not None:
            result = replace(result, names, whole)
    notify(result, None)
    return result  # type: ignore[return-value]


class _Swap:
    """One run of `quantize_model`."""

    def __init__(
        self,
        model: nn.Module,
        choice: Choice,
        recipe: Recipe,
        device: torch.device | None,
    ) -> None:
        self.model = model
        self.layers = choice.layers
        self.recipe = recipe
        self.device = device
        self.total = len(choice.layers)
        self.linear = self.total + len(choice.kept)
        self.types = sorted({layer.quant_type for layer in choice.layers})
        self.done = 0
        self.weights = 0
        self.bytes = 0
        self.bytes_of_dense = 0
        self.bytes_held = 0
        self.before = model_bytes(model)

    def run(self, show: _Show) -> nn.Module:
        """Convert a model that holds its weights."""
        with self._telling("these are packed, the others as they were"):
            # Popped from the end: a list of all layers would keep every dense weight alive.
            self.layers.reverse()
            while self.layers:
                layer = self.layers.pop()
                show(self.done, self.total, layer.name)
                weight = layer.module._parameters["weight"]
                assert weight is not None
                device = weight.device if self.device is None else self.device
                self._put(layer, self._pack(layer, weight.detach(), device, join(layer.names[0], "weight")))
                self.done += 1
                del layer, weight
            show(self.total, self.total, "")
            if self.device is not None:
                self.model = self.model.to(self.device)
        return self.model

    def run_from(self, checkpoint: str | PathLike[str], hub: Hub, show: _Show, begin: Callable[[], None]) -> nn.Module:
        """Convert a model whose weights are in a checkpoint; `begin` is called before anything is changed."""
        device = torch.device("cpu") if self.device is None else self.device
        with Folder(checkpoint, hub) as source:
            plan = make_plan(self.model, source)
            if plan.packed:
                one = next(iter(plan.packed.values()))
                raise CheckpointError(
                    f"{source.path}: {one.weight} is {one.bits}-bit already: load_quantized(model, folder)"
                )
            self._check_dense(source, plan)
            report(self.model, source, plan, strict=True, unexpected=False)
            check_ties(self.model, source, plan)
            with buffers_computed(self.model, plan), self._telling("the model is unchanged"):
                weights, rest = self._read(source, plan, device, show)
        begin()
        self.layers = []
        for layer, weight in weights:
            self._put(layer, weight)
        holders = tensor_holders(self.model)
        for name, tensor in rest:
            assign(holders, name, tensor)
        finish(self.model, plan, device)
        # What the model would have been.
        self.before = self.bytes_of_dense + model_bytes(self.model) - self.bytes_held
        return self.model

    def _read(
        self, source: Folder, plan: Plan, device: torch.device, show: _Show
    ) -> tuple[list[tuple[Layer, PackedParameter]], list[tuple[str, Tensor]]]:
        """All that a checkpoint has for the model, on the device: packed weights and their layers, other tensors."""
        wanted = {join(name, "weight"): layer for layer in self.layers for name in layer.names}
        weights: list[tuple[Layer, PackedParameter]] = []
        rest: list[tuple[str, Tensor]] = []
        order = {name: index for index, name in enumerate(source.names)}
        plan.entries.sort(key=lambda entry: order[entry.sources[0]])
        for entry in plan.entries:
            for name, tensor in values(source, entry, read=True):
                layer = wanted.pop(name, None)
                if layer is None:
                    # Of a tensor that was split, the whole would stay.
                    rest.append(
                        (name, tensor.to(device) if entry.convert is None else with_own_memory(tensor.to(device)))
                    )
                else:
                    show(self.done, self.total, layer.name)
                    for other in layer.names:
                        wanted.pop(join(other, "weight"), None)
                    where = f"{source.file(entry.sources[0])}: {entry.stored_as(name)}"
                    weights.append((layer, self._pack(layer, tensor, device, where)))
                    self.done += 1
                del tensor, layer
        show(self.total, self.total, "")
        return weights, rest

    def _check_dense(self, source: Folder, plan: Plan) -> None:
        """That a checkpoint to be quantized is not quantized already, and its weights are of a dtype that can be."""
        beside = dict(_native.companions_of_quantized([(name, source.dtype(name)) for name in source.names]))
        name = next((name for name in plan.unexpected if name in beside), None)
        if name is not None:
            raise CheckpointError(
                f"{source.file(name)}: {name}: belongs to a weight that is quantized already ({beside[name]}), and "
                "cannot be quantized again; start from the 16-bit checkpoint that it was made from"
            )
        weights = {join(path, "weight") for layer in self.layers for path in layer.names}
        for entry in plan.entries:
            for target, (_, dtype) in entry.targets.items():
                if target in weights and dtype not in FLOAT_DTYPES:
                    raise CheckpointError(
                        f"{source.file(entry.sources[0])}: {entry.stored_as(target)}: the weight in the checkpoint "
                        f"must be float16, bfloat16 or float32, got {dtype}"
                    )

    def _pack(self, layer: Layer, dense: Tensor, device: torch.device, where: str) -> PackedParameter:
        """Quantize the weight of a layer; `where` it is, for messages."""
        old = layer.module._parameters["weight"]
        trained = old is not None and old.requires_grad
        recipe = self.recipe.with_type(layer.quant_type)
        moved = (dense.t() if layer.transpose else dense).to(device)
        try:
            packed = recipe.parameter(moved, requires_grad=trained).to(device)
        except ValueError as error:
            raise ValueError(f"{where}: {str(error).removeprefix('weight: ')}") from error
        self.bytes_of_dense += dense.numel() * dense.element_size()
        self.weights += dense.numel()
        return packed

    def _put(self, layer: Layer, weight: PackedParameter) -> None:
        """Put a layer with a packed weight in the place of one."""
        new = to_linear(layer.module, weight, self.recipe.with_type(layer.quant_type))
        self.model = replace(self.model, layer.names, new)
        # The map of a 4-bit weight is the same for all, and does not count.
        state = weight.quant_state if isinstance(weight, Params4bit) else None
        needed = scales_of(new) if state is None else [state.absmax, *([state.state2.absmax] if state.state2 else [])]
        self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in (weight, *needed))
        self.bytes_held += sum(t.numel() * t.element_size() for t in (weight, *scales_of(new)))

    @contextlib.contextmanager
    def _telling(self, state: str) -> Iterator[None]:
        """Say how far it came, and in what `state` the model is, when it does not come to the end."""
        try:
            yield
        except BaseException as error:
            message = f"quantize_model stopped after {self.done} of {self.total} layers: {state}"
            _logger.error("%s", message)
            if hasattr(error, "add_note"):
                error.add_note(message)
            raise

    def summary(self, result: nn.Module) -> str:
        """One line: layers, bits per weight, bytes before and after."""
        return (
            f"quantized {self.done} of {self.linear} linear layers to {' and '.join(self.types)}, "
            f"{8 * self.bytes / self.weights:.3f} bits per weight: "
            f"{format_bytes(self.before)} before, {format_bytes(model_bytes(result))} after"
        )


def _settings(config: object) -> BitsAndBytesConfig:
    """The checked config."""
    if config is None:
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    made = BitsAndBytesConfig.coerce(config)
    if not made.is_quantizable():
        raise ValueError("config must have load_in_4bit=True or load_in_8bit=True, got False for both")
    return made


def _check_int8(choice: Choice, recipe: Recipe, values: bool) -> None:
    """That LLM.int8() can take the layers it is to have, and the `values` of their weights; nothing is changed yet."""
    for layer in choice.layers:
        if layer.quant_type != INT8 or recipe.has_fp16_weights:
            continue
        module = layer.module
        own = next((key for key in KEYS_8BIT if key in {**module._parameters, **module._buffers}), None)
        if own is not None:
            raise ValueError(
                f"{layer.name}: has a tensor of its own called {own}, the name that a part of an 8-bit weight is saved "
                f"under; keep the layer as it is: skip=[{layer.names[0]!r}]"
            )
        weight = module._parameters["weight"]
        if values and weight is not None and not weight.is_meta:
            check_weight(weight, join(layer.names[0], "weight"))


def _classes(subclasses: bool | Iterable[type[nn.Linear]]) -> bool | tuple[type[nn.Module], ...]:
    if isinstance(subclasses, bool):
        return subclasses
    one: Any = subclasses
    found: tuple[Any, ...] = (one,) if isinstance(one, type) else tuple(one)
    for cls in found:
        if not isinstance(cls, type) or not issubclass(cls, nn.Linear):
            raise TypeError(f"subclasses must be subclasses of torch.nn.Linear, got {cls!r}")
    return found


def _nothing(model: nn.Module, choice: Choice) -> str:
    """Why there is nothing to do."""
    reasons = [f"{name or 'it'} stays ({reason})" for name, reason in choice.kept.items()]
    if choice.quantized:
        reasons.insert(0, f"{choice.quantized} layers are packed already")
    reasons += choice.notes
    text = "; ".join(reasons[:5]) + ("; …" if len(reasons) > 5 else "")
    return f"model: {type(model).__name__} has no linear layer to quantize" + (f": {text}" if text else "")


def _written(config: BitsAndBytesConfig, listed: list[str] | None, model: nn.Module) -> BitsAndBytesConfig:
    """The config that a loader of the saved model needs: it says which kinds of layers are there."""
    made = copy.deepcopy(config)
    made.llm_int8_skip_modules = listed
    bits = {bits_of(module) for module in model.modules()}
    if not config.load_in_4bit:
        # Rules chose the 4-bit type. If they chose both, either will do: each weight stores its own.
        weights = (m.weight for m in model.modules() if isinstance(m, PACKED_LAYERS))
        types = {weight.quant_type for weight in weights if isinstance(weight, Params4bit)}
        made.bnb_4bit_quant_type = max(types, default=made.bnb_4bit_quant_type)
    # Not by the properties, which refuse both.
    made._load_in_4bit, made._load_in_8bit = 4 in bits, 8 in bits
    return made


@contextlib.contextmanager
def _display(progress: bool | _Show) -> Iterator[_Show]:
    if callable(progress):
        yield progress
    elif progress and is_terminal(sys.stderr):
        bar = Bar("quantizing", unit=lambda count: f"{count:.0f} layers")
        try:
            yield bar
        finally:
            bar.close()
    elif isinstance(progress, bool):
        yield lambda done, total, name: None
    else:
        raise TypeError(f"progress must be a bool or a callable(done, total, name), got {progress!r}")
