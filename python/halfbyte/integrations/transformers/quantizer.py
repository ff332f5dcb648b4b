"""`Quantizer4bit`: how transformers loads, saves and dequantizes a model whose layers are this package's.

It derives from transformers' quantizer for bitsandbytes, because code that asks with `isinstance` expects that, and
overrides everything that imports bitsandbytes. Hooks that only some releases know are all here (5.0 to 5.24).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.import_utils import is_accelerate_available

from halfbyte.config import BitsAndBytesConfig
from halfbyte.integrations.recognition import serve_bitsandbytes
from halfbyte.integrations.saved_config import with_compute_dtype
from halfbyte.integrations.transformers import checkpoint, experts, layers, operations
from halfbyte.models.experts import fused_paths, put_back
from halfbyte.models.layers import experts_note, fused_experts
from halfbyte.models.replace import SOURCE_CLASS
from halfbyte.models.transformers_experts import take_apart
from halfbyte.nn import Params4bit
from halfbyte.nn._quantized import Quantized
from halfbyte.offline.transformers_names import without_merges

_logger = logging.getLogger(__name__)

_STATE_BYTES = {True: 0.016, False: 1 / 16}
"""Bytes of scales per weight: nested, plain. Blocks of 64 values."""


class Quantizer4bit(Bnb4BitHfQuantizer):
    """4-bit quantization by halfbyte, under transformers' interface for quantizers."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        """Check the config; `pre_quantized` says whether it is the checkpoint's own.

        Raises:
            ValueError: A quantization or storage type that does not exist; the message lists those that do.
            TypeError: A field of the config has a wrong type.
        """
        coerced = BitsAndBytesConfig.coerce(quantization_config)
        if not coerced.load_in_4bit:
            raise ValueError("quantization_config: load_in_4bit must be True, got False")
        super().__init__(quantization_config, **kwargs)
        self.config = coerced
        self._device_map: Mapping[str, Any] = {}
        self._fused: dict[str, nn.Module] = {}
        self._merges: list[Any] = []

    # ---- before loading ----------------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Check the device map. Called again with the map that was inferred, which `place` needs.

        Raises:
            ImportError: accelerate is not installed, or too old.
            ValueError: The map names a target that is no device.
        """
        if not is_accelerate_available():
            raise ImportError("loading 4-bit weights needs accelerate: pip install -U 'accelerate>=1.3'")
        if isinstance(device_map, Mapping):
            for name, target in device_map.items():
                _check_target(name, target)
            self._device_map = dict(device_map)

    def adjust_max_memory(self, max_memory: dict[str, Any]) -> dict[str, Any]:
        """Return the limits as they are: quantizing needs no buffers on the device."""
        return max_memory

    @property
    def quantized_element_size(self) -> float:
        """Bytes per weight, scales included."""
        return 0.5 + _STATE_BYTES[self.config.bnb_4bit_use_double_quant]

    def param_element_size(self, model: Any, param_name: str, param: Any) -> float:
        """Bytes per element of a parameter, for device maps and warm-up."""
        if self.param_needs_quantization(model, param_name):
            return self.quantized_element_size
        return float(param.element_size())

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether this is the weight of a 4-bit layer."""
        path, _, leaf = param_name.rpartition(".")
        return leaf == operations.WEIGHT and isinstance(model.get_submodule(path), Quantized)

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any = None, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        """Put 4-bit layers into the model, which is on the meta device.

        On the fly, `llm_int8_skip_modules` is added to what transformers keeps by default. Of a 4-bit checkpoint the
        files tell which weights are packed; where they cannot, the list is taken as it is.
        """
        if isinstance(device_map, Mapping):
            self._device_map = dict(device_map)
        self._model = model
        skip = self.config.llm_int8_skip_modules
        kept = list(getattr(model, "_keep_in_fp32_modules", None) or ())
        paths = None
        if self.pre_quantized:
            heads = self.get_modules_to_not_convert(model, skip, kept, add_default_skips=True)
            self._fused = take_apart(model, ())
            try:
                paths = checkpoint.packed_in(model, checkpoint_files or (), heads)
            except BaseException:
                put_back(model, self._fused)
                raise
            dense = {path: old for path, old in self._fused.items() if not _holds(path, paths or ())}
            put_back(model, dense)
            self._fused = {path: old for path, old in self._fused.items() if path not in dense}
        if paths is None:
            self.modules_to_not_convert = self.get_modules_to_not_convert(
                model, skip, kept, add_default_skips=not self.pre_quantized
            )
            if not self.pre_quantized:
                self._fused = take_apart(model, self._kept_experts(model))
            paths = layers.chosen(model, self.modules_to_not_convert)
        if not self.pre_quantized:
            checkpoint.check_dense(model, checkpoint_files or (), paths)
            for name in layers.without_effect(model, skip or ()):
                _logger.warning(
                    "llm_int8_skip_modules: %r names no module of %s, so it keeps nothing; module names are matched "
                    "from their start, or as a suffix",
                    name,
                    type(model).__name__,
                )
            left = fused_experts(model.named_modules())
            if left:
                _logger.warning("%s: %s", type(model).__name__, experts_note(left))
        storage = self.config.bnb_4bit_quant_storage
        assert isinstance(storage, torch.dtype)
        count = layers.put_4bit(
            model,
            paths,
            quant_type=self.config.bnb_4bit_quant_type,
            nested=self.config.bnb_4bit_use_double_quant,
            storage=storage,
            compute_dtype=_compute_dtype(self.config),
            packed=self.pre_quantized,
        )
        self.quantization_config = with_compute_dtype(self.quantization_config, model.dtype)
        if not count:
            _logger.warning("%s has no linear layer to quantize: its weights stay as they are", type(model).__name__)

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
        if self.pre_quantized:
            return [
                WeightConverter(operations.SERIALIZED, operations.WEIGHT, operations=[operations.Deserialize(self)])
            ]
        # On the CPU a tensor is a view of the file: only packed bytes travel to a GPU, and a layer that is offloaded
        # to disk is saved packed.
        # Behind the first two, arguments are in another order in other releases.
        keywords = inspect.signature(WeightConverter.__init__).parameters
        how = {"force_cpu": True} if "force_cpu" in keywords else {}
        return [WeightConverter(operations.WEIGHT, operations.WEIGHT, operations=[operations.PassOn(self)], **how)]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Leave out what merges experts that were taken apart, and add what splits fused ones."""
        if self._fused:
            model = self._model if model is None else model
            split = experts.converters(self, self._fused, model, weight_conversions)
            needed = without_merges(model, weight_conversions)
            self._merges = [entry for entry in weight_conversions if entry not in needed]
            weight_conversions = [*needed, *split]
        given = inspect.signature(super().update_weight_conversions).parameters
        more = {"model": model} if "model" in given else {}
        updated: list[Any] = super().update_weight_conversions(weight_conversions, **more)
        return updated

    def _kept_experts(self, model: Any) -> list[str]:
        """Paths of fused experts that stay as they are."""
        paths = fused_paths(model.named_modules())
        return [path for path in paths if not should_convert_module(path, self.modules_to_not_convert)]

    def place(self, name: str, module: nn.Module, weight: Params4bit) -> Params4bit:
        """Prepare a module whose weight goes to disk: a packed parameter without bytes keeps its state there.

        accelerate brings the bytes back for each forward, with the dtype and the attributes of the parameter that it
        finds; without this it would quantize them again.
        """
        if self._device_map and _target(self._device_map, name) == "disk":
            with torch.no_grad():
                module._parameters[operations.WEIGHT] = weight.to("meta")
                module.quant_state = weight.quant_state  # type: ignore[assignment]
        return weight

    # ---- after loading -----------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Quantize weights that the checkpoint lacked, and mark the model as 4-bit for PEFT and Trainer."""
        for name, module in model.named_modules():
            weight = module._parameters.get(operations.WEIGHT) if isinstance(module, Quantized) else None
            if weight is None or weight.is_meta or module.quant_state is not None:
                continue
            # Initialized as `[out, in]`, whatever class the layer stands for.
            source = module.__dict__.pop(SOURCE_CLASS, None)
            try:
                module.weight = operations.quantize(module, weight.data, f"{name}.weight", self.config)
            finally:
                if source is not None:
                    module.__dict__[SOURCE_CLASS] = source
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is not None:
            # Kept, they would rename tensors when the model is saved.
            model._weight_conversions = [
                conversion
                for conversion in conversions
                if not any(isinstance(op, operations.Operation) for op in getattr(conversion, "operations", ()))
            ]
        serve_bitsandbytes(model)
        model.is_loaded_in_4bit = True
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


def _holds(path: str, paths: Iterable[str]) -> bool:
    return any(name.startswith(f"{path}.") for name in paths)


def _compute_dtype(config: BitsAndBytesConfig) -> torch.dtype | None:
    """The dtype of products; None, for the input's, where the config was not given one."""
    dtype = config.compute_dtype()
    assert dtype is None or isinstance(dtype, torch.dtype)
    return dtype


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


def _target(device_map: Mapping[str, Any], name: str) -> Any:
    """Where the longest entry that covers `name` sends it."""
    while True:
        if name in device_map:
            return device_map[name]
        if not name:
            return None
        name = name.rpartition(".")[0]
