"""The config of a quantized checkpoint: merged with the one that was passed to a load, and made for a save."""

from __future__ import annotations

import copy
import functools
import logging
from typing import Any

from halfbyte.config import BitsAndBytesConfig
from halfbyte.integrations.served import is_ours_by_default

_logger = logging.getLogger(__name__)


def keep_class_of_argument(cls: Any) -> None:
    """Check the config of a quantized checkpoint, and convert it to this package's class if the argument has that.

    The checkpoint's config takes precedence, as in transformers. A warning names the values that are ignored.

    Args:
        cls: The class of transformers or diffusers whose `merge_quantization_configs` does the merging.
    """
    stock = cls.merge_quantization_configs

    @functools.wraps(stock)
    def merge(cls: type, quantization_config: Any, quantization_config_from_args: Any) -> Any:
        given = quantization_config_from_args
        if not issubclass(type(given), BitsAndBytesConfig):
            if is_ours_by_default():
                own = _check_saved(quantization_config)
                if own is not None and own.load_in_4bit and own.load_in_8bit:
                    # Both kinds of layers, which transformers' own class refuses.
                    return own
            return stock(quantization_config, given)
        values = quantization_config if isinstance(quantization_config, dict) else quantization_config.to_dict()
        if not (values.get("load_in_4bit") or values.get("load_in_8bit")):
            method = getattr(values.get("quant_method"), "value", values.get("quant_method"))
            if method != "bitsandbytes":
                way = "by the library of that method, or start from the 16-bit checkpoint that it was made from"
                if method == "mxfp4":
                    way = "by transformers, or convert the checkpoint with `halfbyte quantize`, which decodes MXFP4"
                raise ValueError(
                    f"quantization_config: the checkpoint is quantized already, its config.json says quant_method "
                    f"{method!r}, and cannot be quantized again; load it without quantization_config, {way}"
                )
        saved = _check_saved(values)
        assert saved is not None
        if issubclass(type(quantization_config), BitsAndBytesConfig):
            # Of a model in memory: it remembers what was not given.
            saved = quantization_config
        _say_ignored(given, saved)
        return saved

    cls.merge_quantization_configs = classmethod(merge)


def with_compute_dtype(config: Any, dtype: Any) -> Any:
    """The config to save with a model: a compute dtype that was not given is the model's.

    Readers of the file cannot tell float32 from "not given", and would compute in float32.
    """
    import torch

    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), None)
    if (
        not issubclass(type(config), BitsAndBytesConfig)
        or config.compute_dtype() is not None
        or not config.load_in_4bit
    ):
        return config
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return config
    made = copy.deepcopy(config)
    made.bnb_4bit_compute_dtype = dtype
    return made


def _check_saved(config: Any) -> BitsAndBytesConfig | None:
    """The config of a checkpoint, checked; None for what is not bitsandbytes'.

    Raises:
        TypeError: A field has a wrong type.
        ValueError: A field has a value that does not exist.
    """
    values = config if isinstance(config, dict) else config.to_dict()
    if not (values.get("load_in_4bit") or values.get("load_in_8bit") or values.get("quant_method") == "bitsandbytes"):
        return None
    try:
        return BitsAndBytesConfig.of_checkpoint(values)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"config.json of the checkpoint: quantization_config: {error}; correct the file") from error


def _say_ignored(given: BitsAndBytesConfig, saved: BitsAndBytesConfig) -> None:
    """Warn about values that differ from the checkpoint's and are ignored."""
    # What was left to its default was not asked for.
    asked = {name: value for name, value in given.to_diff_dict().items() if not name.startswith("_")}
    written = saved.to_dict()
    other = [f"{name} is {written[name]!r}, not {value!r}" for name, value in asked.items() if written[name] != value]
    if other:
        _logger.warning(
            "the checkpoint is quantized already, and its own quantization_config is used, where %s", "; ".join(other)
        )
