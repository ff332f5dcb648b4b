"""diffusers: `from_pretrained(quantization_config=…)`, saving and dequantizing, on CPUs too.

A quantizer for diffusers' own table, put there when diffusers is imported; see
`halfbyte.integrations.served` for which loads are served.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer
from torch import Tensor, nn

from halfbyte.config import BitsAndBytesConfig
from halfbyte.integrations.recognition import serve_bitsandbytes
from halfbyte.integrations.saved_config import keep_class_of_argument, with_compute_dtype
from halfbyte.integrations.served import is_ours
from halfbyte.models import packed
from halfbyte.models.checkpoint_reader import dtypes_in
from halfbyte.models.packed import Packed
from halfbyte.models.recipe import INT8, PACKED_LAYERS, Recipe, bits_of
from halfbyte.models.replace import SOURCE_CLASS, SOURCE_DTYPE
from halfbyte.offline.shards import AGAIN


class _Quantizer:
    """What both classes do, under diffusers' interface for quantizers; comes before diffusers' own class."""

    bits: ClassVar[int]
    pre_quantized: bool
    quantization_config: Any

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        """Check the config; `pre_quantized` says whether it is the checkpoint's own.

        Raises:
            ValueError: A quantization or storage type that does not exist, or a threshold below 0; the message lists
                what there is.
            TypeError: A field of the config has a wrong type.
        """
        ours = issubclass(type(quantization_config), BitsAndBytesConfig)
        # diffusers has a class of that name too, with the same arguments.
        self.config = BitsAndBytesConfig.coerce(quantization_config if ours else quantization_config.to_dict())
        super().__init__(quantization_config, **kwargs)  # type: ignore[call-arg]
        self.recipe = Recipe.from_config(self.config)
        self.modules_to_not_convert = list(self.config.llm_int8_skip_modules or ())
        self._packed: dict[str, Packed] | None = None
        self._held_back: dict[str, Tensor] = {}
        self._storage: dict[str, torch.dtype] = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Accept every device; what is offloaded stays packed."""

    def update_device_map(self, device_map: Any) -> Any:
        """Without a map: the current GPU, or the CPU where there is none."""
        if device_map is None and not (torch.cuda.is_available() or torch.xpu.is_available()):
            return {"": "cpu"}
        return super().update_device_map(device_map)  # type: ignore[misc]

    def adjust_max_memory(self, max_memory: dict[str, Any]) -> dict[str, Any]:
        """Return the limits as they are: quantizing needs no buffers on the device."""
        return max_memory

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Sequence[str]) -> list[str]:
        """Learn from a checkpoint's names and headers which weights are packed, and how.

        Raises:
            ValueError: A packed weight without all of its parts; the message names it.
        """
        super().maybe_update_loaded_keys(loaded_keys, checkpoint_files)  # type: ignore[misc]
        if self.pre_quantized:
            names = set(loaded_keys)
            dtypes = dtypes_in(map(os.fspath, checkpoint_files or ()))
            # What no header tells may be codes.
            found = packed.find(loaded_keys, lambda name: dtypes.get(name, torch.int8))
            for name, one in found.items():
                missing = one.lacking(names)
                lost = one.mark is not None or ("quant_map" in one.parts and one.weight in names)
                if missing and lost:
                    raise ValueError(f"{name}: is packed, but the checkpoint lacks {', '.join(missing)}; {AGAIN}")
            self._packed = {name.rpartition(".")[0]: one for name, one in found.items() if one.mark is not None}
        return loaded_keys

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Hold the tensors of a weight back until the shard comes that has the last of them."""
        merged, self._held_back = {**self._held_back, **state_dict}, {}
        for one in (self._packed or {}).values():
            names = (one.weight, *one.parts.values())
            if not all(name in merged for name in names):
                self._held_back.update({name: merged.pop(name) for name in names if name in merged})
            elif one.bits == 4 and merged[one.weight].is_floating_point():
                # diffusers would cast it to the dtype of the model.
                codes = merged[one.weight]
                self._storage[one.weight] = codes.dtype
                merged[one.weight] = codes.contiguous().view(-1).view(torch.uint8).view(-1, 1)
        return merged

    @property
    def supports_parallel_loading(self) -> bool:
        """Of a quantized checkpoint, shards are read one after the other."""
        return not self.pre_quantized

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any, keep_in_fp32_modules: Sequence[str] = (), **kwargs: Any
    ) -> None:
        """Put packed layers, without numbers, in the place of linear ones."""
        keep = [*self.modules_to_not_convert, *keep_in_fp32_modules, *self._kept_by_device(device_map)]
        found = {self.bits}
        for name, module in list(model.named_modules()):
            if type(module) is not nn.Linear:
                continue
            if name not in self._packed if self._packed is not None else _is_kept(name, keep):
                continue
            recipe = self._recipe_of(name)
            new = recipe.empty_linear(module.in_features, module.out_features, module.bias is not None)
            found.add(bits_of(new))
            if module.bias is not None:
                new.bias = module.bias
            new.__dict__[SOURCE_CLASS] = type(module)
            new.__dict__[SOURCE_DTYPE] = module.weight.dtype
            new.requires_grad_(False)
            model.set_submodule(name, new)
        self.modules_to_not_convert = keep
        for bits in found:
            setattr(model, f"is_loaded_in_{bits}bit", True)

    def _kept_by_device(self, device_map: Any) -> list[str]:
        """Modules that are not quantized because of where they go."""
        return []

    def _recipe_of(self, name: str) -> Recipe:
        """How a layer is made: as the checkpoint has it, or as the config says."""
        bits = self.bits if self._packed is None else self._packed[name].bits
        if bits == self.bits:
            return self.recipe
        return self.recipe.with_type(INT8 if bits == 8 else self.config.bnb_4bit_quant_type)

    def check_if_quantized_param(
        self, model: Any, param_value: Any, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Whether this is the weight of a packed layer."""
        path, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and isinstance(model.get_submodule(path), PACKED_LAYERS)

    @torch.no_grad()
    def create_quantized_param(
        self,
        model: Any,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Quantize one weight, or put a packed one together, and hold it in its layer.

        Raises:
            ValueError: A packed weight without all of its parts; the message names it.
        """
        path = param_name.rpartition(".")[0]
        module: Any = model.get_submodule(path)
        one = (self._packed or {}).get(path)
        if one is None:
            if self.pre_quantized and not param_value.is_floating_point():
                raise ValueError(
                    f"{param_name}: is {param_value.dtype}, as packed weights are, but the checkpoint lacks its scales "
                    f"and quantization state; {AGAIN}"
                )
            made = self._recipe_of(path) if self._packed is None else self.recipe
            # Quantized where it was read: only packed bytes travel.
            try:
                module.weight = made.parameter(param_value).to(param_value.device).to(target_device)
            except ValueError as error:
                raise ValueError(f"{param_name}: {error}") from error
            return
        if unexpected_keys is not None:
            unexpected_keys[:] = [key for key in unexpected_keys if key not in one.parts.values()]
        missing = [name for name in (*one.lacking([param_name]), *one.parts.values()) if name not in state_dict]
        if missing:
            raise ValueError(
                f"{param_name}: is packed, but the checkpoint lacks {', '.join(dict.fromkeys(missing))}; {AGAIN}"
            )
        parts = {key: state_dict[name] for key, name in one.parts.items()}
        storage = self._storage.get(one.weight)
        if storage is not None:
            param_value = param_value.view(-1).view(storage).view(-1, 1)
        try:
            module.weight = packed.parameter(one.bits, param_value, parts, torch.device(target_device))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{param_name}: {error}") from error

    def check_quantized_param_shape(self, param_name: str, current_param: Any, loaded_param: Any) -> bool:
        """Accept packed bytes; their state has the shape, and is checked when the weight is put together."""
        return True

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.quantization_config = with_compute_dtype(self.quantization_config, model.dtype)
        model.register_to_config(quantization_config=self.quantization_config)
        serve_bitsandbytes(model)
        return super()._process_model_after_weight_loading(model, **kwargs)  # type: ignore[misc]

    def _dequantize(self, model: Any) -> Any:
        from halfbyte.models.quantize import dequantize_model

        model = dequantize_model(model)
        # The caller takes it away.
        model.hf_quantizer = self
        return model


class Quantizer4bit(_Quantizer, BnB4BitDiffusersQuantizer):  # type: ignore[misc]
    """4-bit quantization by halfbyte."""

    bits = 4


class Quantizer8bit(_Quantizer, BnB8BitDiffusersQuantizer):  # type: ignore[misc]
    """LLM.int8() by halfbyte."""

    bits = 8

    def _kept_by_device(self, device_map: Any) -> list[str]:
        """With `llm_int8_enable_fp32_cpu_offload`, what goes to the CPU or to disk stays as it is, as in diffusers."""
        if not self.config.llm_int8_enable_fp32_cpu_offload or self.pre_quantized or not isinstance(device_map, dict):
            return []
        return [name for name, target in device_map.items() if name and str(target) in ("cpu", "disk")]


def _is_kept(name: str, keep: Sequence[str]) -> bool:
    """Whether a name of `keep` covers a module, as diffusers matches them: a path within the module's path."""
    return any(f".{key}." in f".{name}." for key in keep)


def enter(auto: Any) -> None:
    """Put the quantizer into the table of `diffusers.quantizers.auto`."""
    table: dict[str, Any] = auto.AUTO_QUANTIZER_MAPPING
    stock4, stock8 = table["bitsandbytes_4bit"], table["bitsandbytes_8bit"]
    if getattr(stock4, "__halfbyte__", False):
        return

    def maker(stock: Any, own: Any) -> Any:
        def make(quantization_config: Any, **kwargs: Any) -> Any:
            return (own if is_ours(quantization_config) else stock)(quantization_config, **kwargs)

        make.__halfbyte__ = True  # type: ignore[attr-defined]
        return make

    table["bitsandbytes_4bit"] = maker(stock4, Quantizer4bit)
    table["bitsandbytes_8bit"] = maker(stock8, Quantizer8bit)
    keep_class_of_argument(auto.DiffusersAutoQuantizer)
