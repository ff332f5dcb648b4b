"""diffusers: `from_pretrained(quantization_config=…)`, saving and dequantizing, on CPUs too.

A quantizer for diffusers' own table, put there when diffusers is imported; see
`halfbyte.integrations.served` for which loads are served.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer
from torch import Tensor, nn

from halfbyte.config import BitsAndBytesConfig
from halfbyte.integrations.recognition import serve_bitsandbytes
from halfbyte.integrations.saved_config import keep_class_of_argument, with_compute_dtype
from halfbyte.integrations.served import is_ours
from halfbyte.models.replace import SOURCE_CLASS, empty_linear4bit
from halfbyte.nn import Params4bit
from halfbyte.nn._quantized import Quantized
from halfbyte.state import PACKED_KEYS, TENSOR_KEYS

_STATE_SUFFIXES = tuple(f".{key}" for key in (*TENSOR_KEYS, *PACKED_KEYS))


class Quantizer4bit(BnB4BitDiffusersQuantizer):
    """4-bit quantization by halfbyte, under diffusers' interface for quantizers."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        """Check the config; `pre_quantized` says whether it is the checkpoint's own.

        Raises:
            ValueError: A quantization or storage type that does not exist; the message lists those that do.
            TypeError: A field of the config has a wrong type.
        """
        ours = issubclass(type(quantization_config), BitsAndBytesConfig)
        # diffusers has a class of that name too, with the same arguments.
        self.config = BitsAndBytesConfig.coerce(quantization_config if ours else quantization_config.to_dict())
        super().__init__(quantization_config, **kwargs)  # type: ignore[no-untyped-call]
        self.modules_to_not_convert = list(self.config.llm_int8_skip_modules or ())
        self._packed: set[str] | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Accept every device; what is offloaded stays 4-bit."""

    def update_device_map(self, device_map: Any) -> Any:
        """Without a map: the current GPU, or the CPU where there is none."""
        if device_map is None and not (torch.cuda.is_available() or torch.xpu.is_available()):
            return {"": "cpu"}
        return super().update_device_map(device_map)  # type: ignore[no-untyped-call]

    def adjust_max_memory(self, max_memory: dict[str, Any]) -> dict[str, Any]:
        """Return the limits as they are: quantizing needs no buffers on the device."""
        return max_memory

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Sequence[str]) -> list[str]:
        """Learn from a 4-bit checkpoint's names which weights are packed."""
        suffixes = tuple(f".weight.{key}" for key in PACKED_KEYS)
        if self.pre_quantized:
            self._packed = {key.removesuffix(end) for key in loaded_keys for end in suffixes if key.endswith(end)}
        return loaded_keys

    def _process_model_before_weight_loading(  # type: ignore[override]
        self, model: Any, device_map: Any, keep_in_fp32_modules: Sequence[str] = (), **kwargs: Any
    ) -> None:
        """Put 4-bit layers, without numbers, in the place of linear ones."""
        keep = [*self.modules_to_not_convert, *keep_in_fp32_modules]
        storage, compute_dtype = self.config.bnb_4bit_quant_storage, self.config.compute_dtype()
        assert isinstance(storage, torch.dtype)
        assert compute_dtype is None or isinstance(compute_dtype, torch.dtype)
        for name, module in list(model.named_modules()):
            if type(module) is not nn.Linear:
                continue
            if name not in self._packed if self._packed is not None else _is_kept(name, keep):
                continue
            new = empty_linear4bit(
                module,
                module.in_features,
                module.out_features,
                compute_dtype=compute_dtype,
                nested=self.config.bnb_4bit_use_double_quant,
                quant_type=self.config.bnb_4bit_quant_type,
                storage=storage,
            )
            if module.bias is not None:
                new.bias = module.bias
            new.__dict__[SOURCE_CLASS] = type(module)
            new.requires_grad_(False)
            model.set_submodule(name, new)
        self.modules_to_not_convert = keep
        model.is_loaded_in_4bit = True

    def check_if_quantized_param(
        self, model: Any, param_value: Any, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Whether this is the weight of a 4-bit layer."""
        path, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and isinstance(model.get_submodule(path), Quantized)

    @torch.no_grad()
    def create_quantized_param(  # type: ignore[override]
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
            ValueError: A packed weight without all of its state; the message names it.
        """
        module: Any = model.get_submodule(param_name.rpartition(".")[0])
        old = module.weight
        assert isinstance(old, Params4bit)
        stats = {key: state_dict[key] for suffix in _STATE_SUFFIXES if (key := f"{param_name}{suffix}") in state_dict}
        if unexpected_keys is not None:
            unexpected_keys[:] = [key for key in unexpected_keys if key not in stats]
        if stats:
            relative = {key.removeprefix(f"{param_name}."): value for key, value in stats.items()}
            try:
                new = type(old).from_prequantized(param_value, relative, device=target_device, module=module)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{param_name}: {error}") from error
        elif self.pre_quantized and not param_value.is_floating_point():
            raise ValueError(f"{param_name}: is packed, but its state is missing: {param_name}{_STATE_SUFFIXES[0]}, …")
        else:
            # Quantized where it was read: only packed bytes travel.
            new = old._like(param_value, None).to(param_value.device).to(target_device)
        module.weight = new

    def check_quantized_param_shape(self, param_name: str, current_param: Any, loaded_param: Any) -> bool:
        """Accept packed bytes; their state has the shape, and is checked when the weight is put together."""
        return True

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.quantization_config = with_compute_dtype(self.quantization_config, model.dtype)
        model.register_to_config(quantization_config=self.quantization_config)
        serve_bitsandbytes(model)
        return super()._process_model_after_weight_loading(model, **kwargs)

    def _dequantize(self, model: Any) -> Any:
        from halfbyte.models.quantize import dequantize_model

        model = dequantize_model(model)
        # The caller takes it away.
        model.hf_quantizer = self
        return model


def _is_kept(name: str, keep: Sequence[str]) -> bool:
    """Whether a name of `keep` covers a module, as diffusers matches them: a path within the module's path."""
    return any(f".{key}." in f".{name}." for key in keep)


def enter(auto: Any) -> None:
    """Put the quantizer into the table of `diffusers.quantizers.auto`."""
    table: dict[str, Any] = auto.AUTO_QUANTIZER_MAPPING
    stock = table["bitsandbytes_4bit"]
    if getattr(stock, "__halfbyte__", False):
        return

    def make(quantization_config: Any, **kwargs: Any) -> Any:
        return (Quantizer4bit if is_ours(quantization_config) else stock)(quantization_config, **kwargs)

    make.__halfbyte__ = True  # type: ignore[attr-defined]
    table["bitsandbytes_4bit"] = make
    keep_class_of_argument(auto.DiffusersAutoQuantizer)
