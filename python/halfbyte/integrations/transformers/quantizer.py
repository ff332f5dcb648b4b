"""`Quantizer4bit` and `Quantizer8bit`: how transformers loads, saves and dequantizes models with this package's layers.

They derive from transformers' quantizers for bitsandbytes, because code that asks with `isinstance` expects that, and
override everything that imports bitsandbytes. Hooks that only some releases know are all here (5.0 to 5.24). A
checkpoint may hold weights of both kinds: either class loads it, and the config decides only what is quantized on the
fly.
"""

from __future__ import annotations

import copy
import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.import_utils import is_accelerate_available

from halfbyte.config import BitsAndBytesConfig
from halfbyte.integrations.recognition import serve_bitsandbytes
from halfbyte.integrations.saved_config import with_compute_dtype
from halfbyte.integrations.transformers import checkpoint, layers, operations
from halfbyte.integrations.transformers.expert_offload import OffloadedExperts, target_of, without_hooks
from halfbyte.integrations.transformers.expert_operations import Renaming, unstacked
from halfbyte.models.experts import fused_paths, is_dispatched, put_back
from halfbyte.models.layers import experts_note, fused_experts
from halfbyte.models.packed import Packed
from halfbyte.models.recipe import INT8, PACKED_LAYERS, PackedParameter, Recipe, bits_of, is_quantized
from halfbyte.models.replace import SOURCE_CLASS
from halfbyte.models.select import names_to_keep
from halfbyte.models.transformers_experts import mapping_for, take_apart
from halfbyte.models.transformers_split import Split
from halfbyte.nn import Params4bit

_logger = logging.getLogger(__name__)

_STATE_BYTES = {True: 0.016, False: 1 / 16}
"""Bytes of scales per weight: nested, plain. Blocks of 64 values."""


class _Quantizer:
    """What both classes do, under transformers' interface for quantizers; comes before transformers' own class."""

    bits: ClassVar[int]
    pre_quantized: bool
    quantization_config: Any
    get_modules_to_not_convert: Any

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        """Check the config; `pre_quantized` says whether it is the checkpoint's own.

        Raises:
            ValueError: A quantization or storage type that does not exist, a threshold below 0, or a name to keep that
                is no regular expression; the message lists what there is.
            TypeError: A field of the config has a wrong type.
        """
        coerced = BitsAndBytesConfig.coerce(quantization_config)
        flag = f"load_in_{self.bits}bit"
        if not getattr(coerced, flag):
            raise ValueError(f"quantization_config: {flag} must be True, got False")
        super().__init__(quantization_config, **kwargs)  # type: ignore[call-arg]
        for name in coerced.llm_int8_skip_modules or ():
            try:
                re.compile(name)
            except re.error as error:
                raise ValueError(
                    "quantization_config: llm_int8_skip_modules must be names of modules or regular expressions for "
                    f"them, got {name!r} ({error})"
                ) from None
        self.config = coerced
        self.recipe = Recipe.from_config(coerced)
        self.problems: list[str] = []
        self.own: frozenset[str] = frozenset()
        self._device_map: Mapping[str, Any] = {}
        self._fused: dict[str, nn.Module] = {}
        self._merges: list[Any] = []
        self._offloaded = OffloadedExperts()
        self._model: Any = None
        self._of_experts: torch.dtype | None = None

    # ---- before loading ----------------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Check the device map. Called again with the map that was inferred, which `place` needs.

        Raises:
            ImportError: accelerate is not installed, or too old.
            ValueError: The map names a target that is no device.
        """
        if not is_accelerate_available():
            raise ImportError("loading quantized weights needs accelerate: pip install -U 'accelerate>=1.3'")
        if isinstance(device_map, Mapping):
            for name, target in device_map.items():
                _check_target(name, target)
            self._follow(device_map)

    def update_device_map(self, device_map: Any) -> Any:
        """As transformers does; a map is copied, because it may be changed here."""
        stock: Any = super().update_device_map  # type: ignore[misc]
        found = stock(device_map)
        return dict(found) if isinstance(found, Mapping) else found

    def _follow(self, device_map: Mapping[str, Any]) -> None:
        """Take a device map, and change it for experts that it puts on the CPU beside a GPU."""
        if self._model is not None and isinstance(device_map, dict):
            self._offloaded.claim(self._model, device_map)
        self._device_map = dict(device_map)

    def adjust_max_memory(self, max_memory: dict[str, Any]) -> dict[str, Any]:
        """Return the limits as they are: quantizing needs no buffers on the device."""
        return max_memory

    @property
    def quantized_element_size(self) -> float:
        """Bytes per weight, scales included."""
        return self._bytes_per_weight(self.bits)

    def _bytes_per_weight(self, bits: int) -> float:
        if bits == 4:
            return 0.5 + _STATE_BYTES[self.recipe.nested]
        # One scale per row is too little to count.
        return 2.0 if self.recipe.has_fp16_weights else 1.0

    def param_element_size(self, model: Any, param_name: str, param: Any) -> float:
        """Bytes per element of a parameter, for device maps and warm-up."""
        if param_name in self._offloaded:
            return 0.0
        if self.param_needs_quantization(model, param_name):
            return self._bytes_per_weight(bits_of(model.get_submodule(param_name.rpartition(".")[0])))
        return float(param.element_size())

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether this is the weight of a packed layer."""
        path, _, leaf = param_name.rpartition(".")
        return leaf == operations.WEIGHT and isinstance(model.get_submodule(path), PACKED_LAYERS)

    def _convert_model_for_quantization(self, model: Any) -> None:
        """Take experts apart before transformers puts a class of its own, which does not go back, in their place.

        Called for quantized checkpoints.
        """
        self._fused = take_apart(model, ())
        stock: Any = super()._convert_model_for_quantization  # type: ignore[misc]
        stock(model)

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any = None, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        """Put packed layers into the model, which is on the meta device.

        On the fly, `llm_int8_skip_modules` is added to what transformers keeps by default. Of a quantized checkpoint
        the files tell which weights are packed, and how; where they cannot, the list is taken as it is.
        """
        if isinstance(device_map, Mapping):
            self._device_map = dict(device_map)
        self._model = model
        skip = self.config.llm_int8_skip_modules
        in_float32 = list(getattr(model, "_keep_in_fp32_modules", None) or ())
        kept = in_float32 if self.pre_quantized else [*in_float32, *self._kept_by_device()]
        recipes = self._packed_in(model, checkpoint_files or (), skip, kept) if self.pre_quantized else None
        if recipes is None:
            self.modules_to_not_convert = self.get_modules_to_not_convert(
                model, skip, kept, add_default_skips=not self.pre_quantized
            )
            if not self.pre_quantized:
                self._fused = take_apart(model, self._kept_experts(model))
            recipes = dict.fromkeys(layers.chosen(model, self.modules_to_not_convert), self.recipe)
        if not self.pre_quantized:
            checkpoint.check_dense(model, checkpoint_files or (), list(recipes))
            idle = layers.without_effect(model, skip or ())
            for name in idle:
                _logger.warning(
                    "llm_int8_skip_modules: %r keeps no linear layer of %s; a name is matched with the start of a "
                    "module's path, as 'model.layers.0', or with its end, as 'q_proj'",
                    name,
                    type(model).__name__,
                )
            left = fused_experts(model.named_modules())
            if left:
                _logger.warning("%s: %s", type(model).__name__, experts_note(left))
            self.quantization_config = self._complete(model, recipes, in_float32, idle)
        count = layers.put_packed(model, recipes, packed=self.pre_quantized)
        self.quantization_config = with_compute_dtype(self.quantization_config, model.dtype)
        if not count:
            _logger.warning("%s has no linear layer to quantize: its weights stay as they are", type(model).__name__)
        if isinstance(device_map, Mapping):
            self._follow(device_map)

    def _complete(self, model: Any, recipes: Mapping[str, Recipe], in_float32: list[str], idle: list[str]) -> Any:
        """The config to save with a model that is quantized on the fly: it names all that is kept, and nothing else.

        A loader of transformers that reads a list packs whatever is not in it, output embeddings too. Idle names, which
        keep nothing here, may do so in the base model, where paths are shorter.
        """
        skip = self.config.llm_int8_skip_modules
        by_list = layers.chosen(model, self.get_modules_to_not_convert(model, skip, in_float32))
        if set(by_list) == set(recipes) and not idle:
            return self.quantization_config
        useful = [name for name in skip or () if name not in idle]
        left = [path for path in layers.chosen(model, ()) if path not in recipes]
        made = copy.deepcopy(self.quantization_config)
        made.llm_int8_skip_modules = list(dict.fromkeys([*useful, *names_to_keep(model, list(recipes), left)]))
        return made

    def _kept_by_device(self) -> list[str]:
        """Modules that are not quantized on the fly because of where they go."""
        return []

    def _packed_in(
        self, model: Any, files: Sequence[str], skip: list[str] | None, kept: list[str]
    ) -> dict[str, Recipe] | None:
        """How the layers are packed that are so in the checkpoint; None where its files do not tell."""
        heads = self.get_modules_to_not_convert(model, skip, kept, add_default_skips=True)
        floats = self.recipe.has_fp16_weights and self.recipe.quant_type == INT8
        # Releases that do not call `_convert_model_for_quantization` have left them.
        self._fused.update(take_apart(model, ()))
        try:
            quant_type = self.config.bnb_4bit_quant_type if self.config.load_in_4bit else None
            found = checkpoint.packed_in(model, files, heads, floats, quant_type)
        except BaseException:
            put_back(model, self._fused)
            raise
        layers_found = found.layers if found is not None else {}
        if any(path.startswith(f"{experts}.") for experts in self._fused for path in layers_found):
            stay = _unpacked_stacks(layers_found, found.dense if found is not None else {})
        else:
            # All are in 16 bits.
            stay = set(self._fused)
        whole = {path: module for path, module in self._fused.items() if path in stay and not is_dispatched(module)}
        put_back(model, whole)
        self._fused = {path: module for path, module in self._fused.items() if path not in whole}
        if found is None:
            return None
        recipes = {path: self._recipe_of(one) for path, one in found.layers.items()}
        if floats:
            keep = self.get_modules_to_not_convert(model, skip, kept)
            recipes.update(dict.fromkeys(layers.chosen(model, keep), self.recipe))
        # What comes by our converter keeps its dtype; the others are cast to the model's.
        dense = {target: name for target, name in found.dense.items() if target.rpartition(".")[0] not in recipes}
        self._of_experts, self.own = found.of_experts, found.own | {*dense, *dense.values()}
        return recipes

    def _recipe_of(self, one: Packed) -> Recipe:
        """How a layer of the checkpoint is made. What its codes mean, its parts say when they arrive."""
        if one.bits == 8:
            return self.recipe.with_type(INT8)
        return self.recipe if self.bits == 4 else self.recipe.with_type(self.config.bnb_4bit_quant_type)

    # ---- the way of a tensor -----------------------------------------------------------------------------------------

    def get_quantize_ops(self) -> operations.Operation:
        """What quantizes a weight on the fly."""
        return operations.Quantize(self)

    serialized_names = {operations.WEIGHT: operations.SERIALIZED}  # noqa: RUF012  (as the base class declares it)

    def get_load_operations(self) -> dict[str, Any]:
        """What puts a packed weight together."""
        return {"deserialize": operations.Deserialize}

    def get_weight_conversions(self) -> list[WeightConverter]:
        """The converter that brings the parts of a packed weight together, or weights of 16 bits to the CPU."""
        # Behind the first two, arguments are in another order in other releases.
        keywords = inspect.signature(WeightConverter.__init__).parameters
        how = {"force_cpu": True} if "force_cpu" in keywords else {}
        if self.pre_quantized:
            # Experts for host memory are not to gather on the GPU before. A map that is inferred is not known yet.
            inferred = self._fused and not self._device_map
            how = how if inferred or self._offloaded.experts else {}
            deserialize = operations.Deserialize(self)
            return [operations.Gather(operations.SERIALIZED, operations.WEIGHT, operations=[deserialize], **how)]
        # On the CPU a tensor is a view of the file: only packed bytes travel to a GPU, and a layer that is offloaded
        # to disk is saved packed.
        return [operations.Gather(operations.WEIGHT, operations.WEIGHT, operations=[operations.PassOn(self)], **how)]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Leave out what merges experts that were taken apart, and add what splits fused ones."""
        if self._fused:
            model = self._model if model is None else model
            changed = mapping_for(model, weight_conversions)
            self._merges = [entry for entry in weight_conversions if entry not in changed]
            weight_conversions = changed
            if self._of_experts is not None:
                weight_conversions = unstacked(model, changed, self, self._of_experts)
        stock: Any = super().update_weight_conversions  # type: ignore[misc]
        more = {"model": model} if "model" in inspect.signature(stock).parameters else {}
        updated: list[Any] = stock(weight_conversions, **more)
        return updated

    def _kept_experts(self, model: Any) -> list[str]:
        """Paths of fused experts that stay as they are."""
        paths = fused_paths(model.named_modules())
        return [path for path in paths if not should_convert_module(path, self.modules_to_not_convert)]

    def place(self, name: str, module: nn.Module, weight: PackedParameter) -> PackedParameter:
        """Prepare a module whose weight goes to disk: a packed parameter without bytes keeps its scales there.

        Weights of experts that are offloaded go to host memory. For each forward of others, accelerate brings the bytes
        back from disk, with the dtype and the attributes of the parameter that it finds; without this it would quantize
        them again.
        """
        if isinstance(weight, Params4bit) and name in self._offloaded:
            return self._offloaded.place(name, weight)
        if self._device_map and target_of(self._device_map, name) == "disk":
            with torch.no_grad():
                if isinstance(weight, Params4bit):
                    module._parameters[operations.WEIGHT] = weight.to("meta")
                    module.quant_state = weight.quant_state  # type: ignore[assignment]
                elif weight.SCB is not None:
                    # A plain parameter: one of class `Int8Params` goes by way of a GPU, which may not be there.
                    empty = torch.empty_like(weight.data, device="meta")
                    module._parameters[operations.WEIGHT] = nn.Parameter(empty, requires_grad=False)
                    module.offloaded_scales = weight.SCB
        return weight

    # ---- after loading -----------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Quantize weights that the checkpoint lacked, and mark the model as quantized for PEFT and Trainer.

        Raises:
            ValueError: A weight has values that cannot be quantized; the message names it.
        """
        if self.problems:
            more = f" (and {len(self.problems) - 1} more weights)" if len(self.problems) > 1 else ""
            raise ValueError(f"{self.problems[0]}{more}")
        self._offloaded.finish()
        without_hooks(model)
        found = {self.bits}
        for name, module in model.named_modules():
            if not isinstance(module, PACKED_LAYERS):
                continue
            found.add(bits_of(module))
            weight = module._parameters.get(operations.WEIGHT)
            if weight is None or weight.is_meta or is_quantized(module):
                continue
            # Initialized as `[out, in]`, whatever class the layer stands for.
            source = module.__dict__.pop(SOURCE_CLASS, None)
            try:
                module.weight = operations.quantize(module, weight.data, f"{name}.weight", self.recipe)
            finally:
                if source is not None:
                    module.__dict__[SOURCE_CLASS] = source
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is not None:
            # Kept, they would rename tensors when the model is saved.
            ours = (operations.Operation, Split)
            model._weight_conversions = [
                conversion
                for conversion in conversions
                if not isinstance(conversion, Renaming)
                and not any(isinstance(op, ours) for op in getattr(conversion, "operations", ()))
            ]
        serve_bitsandbytes(model)
        for bits in found:
            setattr(model, f"is_loaded_in_{bits}bit", True)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Return True."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on the model."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile the model by itself."""
        return True

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        from halfbyte.models.quantize import dequantize_model

        if isinstance(dtype, str):
            # Saving a model leaves a name in `config.dtype`.
            dtype = getattr(torch, dtype.removeprefix("torch."))
        model = dequantize_model(model, dtype)
        if self._merges:
            # The experts are together again, and are saved apart.
            model._weight_conversions = [*(getattr(model, "_weight_conversions", None) or ()), *self._merges]
        return model


class Quantizer4bit(_Quantizer, Bnb4BitHfQuantizer):
    """4-bit quantization by halfbyte."""

    bits = 4


class Quantizer8bit(_Quantizer, Bnb8BitHfQuantizer):
    """LLM.int8() by halfbyte."""

    bits = 8

    def _kept_by_device(self) -> list[str]:
        """With `llm_int8_enable_fp32_cpu_offload`, what goes to the CPU or to disk stays as it is."""
        if not self.config.llm_int8_enable_fp32_cpu_offload:
            return []
        return [name for name, target in self._device_map.items() if name and str(target) in ("cpu", "disk")]


def _unpacked_stacks(layers: Mapping[str, Packed], dense: Mapping[str, str]) -> set[str]:
    """Paths of experts that a quantized checkpoint has in 16 bits, those of a layer in one tensor."""

    def path_of(layer: str) -> str:
        # A layer is `….experts.<i>.<projection>`.
        return layer.rsplit(".", 2)[0]

    targets = {target.removesuffix(".weight") for target in dense}
    # Of a tensor that is split, only the first matrix is named.
    first, second = ({path_of(t) for t in targets if t.split(".")[-2:-1] == [number]} for number in ("0", "1"))
    return first - second - {path_of(layer) for layer in layers}


def _check_target(name: str, target: Any) -> None:
    if isinstance(target, bool) or not isinstance(target, int | str | torch.device):
        valid = False
    elif isinstance(target, str) and target != "disk":
        try:
            torch.device(target)
            valid = True
        except RuntimeError:
            valid = False
    else:
        valid = not isinstance(target, int) or target >= 0
    if not valid:
        raise ValueError(
            f"device_map[{name!r}] must be the number of a GPU, 'disk', or a device such as 'cpu' or 'cuda:0', "
            f"got {target!r}"
        )
