"""Mark a model as quantized for transformers, diffusers, PEFT and Trainer, as `from_pretrained` does."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from halfbyte.config import BitsAndBytesConfig
from halfbyte.models.layers import is_transformers_model

_FLAGS = ("is_loaded_in_4bit", "is_loaded_in_8bit")


def attach(model: nn.Module, config: BitsAndBytesConfig | None) -> None:
    """Mark every transformers or diffusers model in `model` as quantized, or with None as dense.

    Afterwards `save_pretrained`, `dequantize`, `num_parameters`, Trainer and PEFT see what they would see after a load.

    Args:
        model: Any module. Of nested models, the outermost are marked, each with skip names relative to it.
        config: The config it was quantized with; names in `llm_int8_skip_modules` are paths in `model`.
    """
    for path, root in _outermost(model):
        if is_transformers_model(root):
            _tell_transformers(root, config and _seen_from(path, config))
        else:
            _tell_diffusers(root, config and _seen_from(path, config))


def is_diffusers_model(module: nn.Module) -> bool:
    """Is this a `ModelMixin` of diffusers?"""
    return any(c.__name__ == "ModelMixin" and c.__module__.startswith("diffusers.") for c in type(module).__mro__)


def _outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    seen: list[str] = []
    for path, module in model.named_modules():
        if any(above == "" or path.startswith(f"{above}.") for above in seen):
            continue
        if is_transformers_model(module) or is_diffusers_model(module):
            seen.append(path)
            yield path, module


def _seen_from(path: str, config: BitsAndBytesConfig) -> BitsAndBytesConfig:
    made = copy.deepcopy(config)
    if path and config.llm_int8_skip_modules is not None:
        start = f"{path}."
        inside = [name.removeprefix(start) for name in config.llm_int8_skip_modules if name.startswith(start)]
        made.llm_int8_skip_modules = inside
    return made


def _tell_transformers(model: Any, config: BitsAndBytesConfig | None) -> None:
    if config is None:
        for name in ("hf_quantizer", "quantization_method", *_FLAGS):
            model.__dict__.pop(name, None)
        model.is_quantized = False
        model.config.__dict__.pop("quantization_config", None)
        for module in model.modules():
            if is_transformers_model(module):
                module.config.__dict__.pop("_is_quantized", None)
        return
    from halfbyte.integrations.saved_config import with_compute_dtype
    from halfbyte.integrations.transformers.quantizer import Quantizer4bit, Quantizer8bit

    cls: Any = Quantizer8bit if config.load_in_8bit else Quantizer4bit
    quantizer = cls(with_compute_dtype(config, model.dtype), pre_quantized=False)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.quant_method
    quantizer.postprocess_model(model)


def _tell_diffusers(model: Any, config: BitsAndBytesConfig | None) -> None:
    if config is None:
        for name in ("hf_quantizer", "quantization_method", "is_quantized", *_FLAGS):
            model.__dict__.pop(name, None)
        internal = dict(model.config)
        internal.pop("quantization_config", None)
        model._internal_dict = type(model.config)(internal)
        return
    from halfbyte.integrations.diffusers import Quantizer4bit, Quantizer8bit
    from halfbyte.integrations.saved_config import with_compute_dtype

    config = with_compute_dtype(config, model.dtype)
    assert config is not None
    cls: Any = Quantizer8bit if config.load_in_8bit else Quantizer4bit
    quantizer = cls(config, pre_quantized=False)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.register_to_config(quantization_config=config)
    quantizer.postprocess_model(model)
