"""PEFT: an adapter that was trained on another base is refused before the model is changed.

PEFT first puts the adapter's layers into the model, and then finds that the weights do not fit, or leaves those of
layers that the model has not. The shapes in the adapter's file tell before.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from halfbyte._native import CheckpointError
from halfbyte.models.recipe import PACKED_LAYERS
from halfbyte.nn import Linear4bit, Linear8bitLt

# Of these methods a part of each weight has a side of the layer: the parameter, which of its dimensions, and that side.
_SIDES = {
    "LORA": {"lora_A": (1, "in"), "lora_B": (0, "out"), "lora_magnitude_vector": (0, "out")},
    "ADALORA": {"lora_A": (1, "in"), "lora_B": (0, "out")},
    "VERA": {"vera_lambda_b": (0, "out")},
    "BOFT": {"boft_s": (0, "out")},
}
# These are prepended to the embeddings of the input.
_PROMPTS = ("PROMPT_TUNING", "P_TUNING")
_PREFIX = "base_model.model."
_FILE, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def enter(peft_model: ModuleType) -> None:
    """Wrap the two methods of `peft.peft_model.PeftModel` that read an adapter; once."""
    cls = peft_model.PeftModel
    stock = cls.__dict__["from_pretrained"]
    if hasattr(stock.__func__, "__halfbyte__"):
        return

    @functools.wraps(stock.__func__)
    def from_pretrained(cls: Any, model: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        check(model, model_id, **kwargs)
        return stock.__func__(cls, model, model_id, *args, **kwargs)

    # This function knows by it that the methods are wrapped already.
    from_pretrained.__halfbyte__ = True  # type: ignore[attr-defined]
    cls.from_pretrained = classmethod(from_pretrained)
    cls.load_adapter = _checked(cls.load_adapter)


def enter_transformers(peft: ModuleType) -> None:
    """Wrap `load_adapter` of transformers' models, in `transformers.integrations.peft`; once."""
    cls = peft.PeftAdapterMixin
    if not hasattr(cls.load_adapter, "__halfbyte__"):
        cls.load_adapter = _checked(cls.load_adapter)


def _checked(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        folder = args[0] if args else kwargs.get("model_id", kwargs.get("peft_model_id"))
        check(self, folder, **kwargs)
        return stock(self, *args, **kwargs)

    load_adapter.__halfbyte__ = True  # type: ignore[attr-defined]
    return load_adapter


def check(
    model: Any,
    folder: Any,
    *,
    subfolder: str | None = None,
    key_mapping: Any = None,
    ignore_mismatched_sizes: bool = False,
    **_: Any,
) -> None:
    """That an adapter in a folder fits a model with packed layers. Of others nothing is said.

    Args:
        model: With adapters or without.
        folder: As PEFT takes it. A name on a hub is left to PEFT.
        subfolder: Where in it.
        key_mapping: Given, names in the file are not those of the model, and nothing is checked.
        ignore_mismatched_sizes: Given, neither.

    Raises:
        CheckpointError: It was trained on a model of other sizes; the message names the tensor and both models.
    """
    if key_mapping or ignore_mismatched_sizes or not isinstance(model, nn.Module) or not isinstance(folder, str | Path):
        return
    place = Path(folder, subfolder or "")
    if not (place / _FILE).is_file() or not any(isinstance(module, PACKED_LAYERS) for module in model.modules()):
        return
    try:
        config = json.loads((place / _CONFIG).read_text(encoding="utf-8"))
        trained_on = config.get("base_model_name_or_path")
        shapes = _shapes(place / _FILE)
    except (OSError, ValueError, AttributeError):
        # Broken: PEFT says so.
        return
    base: Any = model
    if hasattr(model, "get_base_model"):
        base = base.get_base_model()
    problem = _problem(base, config, shapes)
    if problem is not None:
        name = getattr(base, "name_or_path", "") or type(base).__name__
        raise CheckpointError(
            f"{place / _FILE}: {problem}; the adapter was trained on another base, {trained_on!r} by "
            f"base_model_name_or_path in {_CONFIG}, and the model is {name!r}: load it on that base"
        )


def _problem(base: Any, config: dict[str, Any], shapes: dict[str, list[int]]) -> str | None:
    """What of an adapter does not fit a model; None where nothing is known to."""
    method = config.get("peft_type")
    if method in _PROMPTS:
        embeddings = getattr(base, "get_input_embeddings", lambda: None)()
        width = getattr(embeddings, "embedding_dim", None)
        wanted = config.get("token_dim")
        if isinstance(width, int) and isinstance(wanted, int) and width != wanted:
            return f"token_dim in {_CONFIG} is {wanted}, but embeddings of the model have {width} values"
        return None
    sides = {} if config.get("use_qalora") else _SIDES.get(str(method), {})
    # Adapters are put around a layer, so that the one that is written last under its path is the layer itself.
    modules = {name.replace(".base_layer", ""): module for name, module in base.named_modules()}
    # With it PEFT makes more blocks of the model's, all of the same sizes, before it puts the adapter into them.
    replicated = bool(config.get("layer_replication"))
    for key, shape in shapes.items():
        if not key.startswith(_PREFIX):
            continue
        key_path = key.removeprefix(_PREFIX)
        beyond = None if replicated else _beyond(modules, key_path)
        if beyond is not None:
            return f"{key} belongs to {beyond}, which the model has not"
        path, _, kind = key_path.removesuffix(".weight").rpartition(".")
        layer = modules.get(path)
        if isinstance(layer, Linear4bit | Linear8bitLt) and kind in sides:
            dimension, side = sides[kind]
            size = layer.in_features if side == "in" else layer.out_features
            if len(shape) > dimension and shape[dimension] != size:
                return f"{key} is {shape}, but {path} of the model has {size} {side}puts"
    return None


def _beyond(modules: dict[str, nn.Module], path: str) -> str | None:
    """The block of packed layers that this path leads to, where the model has such blocks, but fewer."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            blocks = modules.get(".".join(parts[:i]))
            if isinstance(blocks, nn.ModuleList) and int(part) >= len(blocks):
                packed = any(isinstance(module, PACKED_LAYERS) for module in blocks.modules())
                return ".".join(parts[: i + 1]) if packed else None
    return None


def _shapes(file: Path) -> dict[str, list[int]]:
    """Of the tensors in a safetensors file, from its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            return {name: list(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(str(error)) from None
