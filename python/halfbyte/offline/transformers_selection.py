"""Which weights the installed transformers would convert to 4 bits: asked of its own model classes.

The rules in the compiled core answer the same question without importing anything. This module is the other way, for
architectures that the rules do not know: it builds the model without weights and applies transformers' own lists.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte._native import CheckpointError
from halfbyte.offline import config_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "RemoteCodeError",
    "converted_modules",
    "converted_tensors",
    "selected_and_conv1d",
    "skeleton",
    "transformers_selection",
]


class RemoteCodeError(ValueError):
    """The model's code comes with the checkpoint, and nobody has said that it may be run."""


def transformers_selection(
    source: str | Path, skip: Sequence[str] = (), *, trust_remote_code: bool = False
) -> list[str]:
    """Names of the tensors of a checkpoint that the installed transformers would quantize while loading it.

    Args:
        source: Folder with ``config.json`` and safetensors files.
        skip: Names of modules to keep besides transformers' defaults, matched as it matches ``llm_int8_skip_modules``.
        trust_remote_code: Run the code that comes with the checkpoint (``auto_map`` in ``config.json``), where it has
            some. Nothing is ever asked: without it such a checkpoint is refused.

    Returns:
        Sorted names, as the checkpoint spells them. A tensor that transformers would first merge with others or split
            (fused projections) is not among them: it has no 4-bit form under its own name.

    Raises:
        ImportError: transformers is not installed; the message names the extra that brings it.
        ValueError: The architecture is not one of transformers' own, or the folder holds no safetensors.
            `RemoteCodeError` where ``trust_remote_code`` would help.
        CheckpointError: The checkpoint's own code was run and failed.
    """
    return sorted(selected_and_conv1d(source, skip, trust_remote_code=trust_remote_code)[0])


def selected_and_conv1d(
    source: str | Path, skip: Sequence[str] = (), *, trust_remote_code: bool = False
) -> tuple[list[str], list[str]]:
    """`transformers_selection`, and which of the tensors are weights of ``Conv1D``, stored ``[in, out]``."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"--selection transformers needs the package {error.name!r}: pip install 'halfbyte[transformers]'",
            name=error.name,
        ) from error
    source = Path(source)
    names = _tensor_names(source)
    if not trust_remote_code and _config_needs_code(source):
        raise RemoteCodeError(
            f"{source / config_json.FILE}: the model's code comes with the checkpoint (auto_map) and is not run: if "
            "you trust it, add --trust-remote-code (trust_remote_code=True)"
        )
    with _own_words(source, trust_remote_code):
        # False, not None: transformers would ask on standard input.
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        model = skeleton(_model_class(config, source, trust_remote_code), config)
    from transformers.pytorch_utils import Conv1D

    found = _converted(model, names, skip)
    return sorted(found), sorted(
        name for name, module in found.items() if isinstance(model.get_submodule(module), Conv1D)
    )


def _config_needs_code(source: Path) -> bool:
    """Does the checkpoint bring a class of its own for a config that transformers has none for?"""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = config_json.read_config(source) or {}
    table = config.get("auto_map")
    return isinstance(table, dict) and "AutoConfig" in table and config.get("model_type") not in CONFIG_MAPPING


@contextlib.contextmanager
def _own_words(source: Path, trust_remote_code: bool) -> Iterator[None]:
    """Inside the block, an error of the checkpoint's own code is one of the checkpoint."""
    try:
        yield
    except (RemoteCodeError, ImportError, OSError):
        raise
    except Exception as error:
        if trust_remote_code and not isinstance(error, ValueError):
            raise CheckpointError(
                f"{source}: the model's own code failed: {type(error).__name__}: {error}".splitlines()[0]
            ) from error
        raise


def skeleton(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model without weights, in the state that transformers' quantizers see: on the meta device, untied.

    Args:
        cls: The model's class.
        config: Its configuration; not modified.
    """
    import copy
    import inspect
    from contextlib import ExitStack

    import torch

    # The first three are dtype, is_quantized and whether DeepSpeed was set up; releases after 5.0 ask for more.
    more = len(inspect.signature(cls.get_init_context).parameters) - 3
    with ExitStack() as stack:
        for context in cls.get_init_context(torch.float32, True, False, *[False] * more):
            stack.enter_context(context)
        return cls(copy.deepcopy(config))


def converted_tensors(model: PreTrainedModel, names: Iterable[str], skip: Sequence[str] = ()) -> list[str]:
    """Which of a checkpoint's tensors would be quantized while loading into ``model``.

    Args:
        model: The model without weights, see :func:`skeleton`.
        names: Tensor names of the checkpoint.
        skip: Names of modules to keep besides the defaults.

    Returns:
        Sorted names, a subset of ``names``.
    """
    return sorted(_converted(model, names, skip))


def _converted(model: PreTrainedModel, names: Iterable[str], skip: Sequence[str]) -> dict[str, str]:
    """Tensors of a checkpoint that would be quantized while loading into ``model``, with the module of each."""
    from halfbyte.offline.transformers_names import renamed

    modules = converted_modules(model, skip)
    converted = {}
    for name, target, pattern, _ in renamed(model, names):
        module, _, leaf = (target or "").rpartition(".")
        if leaf == "weight" and module in modules and pattern is None:
            converted[name] = module
    return converted


def converted_modules(model: PreTrainedModel, skip: Sequence[str] = (), replace: bool = False) -> set[str]:
    """Paths of the modules that transformers' bitsandbytes quantizer would replace.

    Args:
        model: The model, see :func:`skeleton`.
        skip: Names of modules to keep.
        replace: ``skip`` replaces the defaults, as ``llm_int8_skip_modules`` does, instead of being added to them.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    keep = HfQuantizer.get_modules_to_not_convert(
        model,
        skip_modules=list(skip) if replace or skip else None,
        keep_in_fp32_modules=list(model._keep_in_fp32_modules or []),
        add_default_skips=not replace,
    )
    return {
        name
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, keep)
    }


def _model_class(config: PreTrainedConfig, source: Path, trust_remote_code: bool = False) -> type[PreTrainedModel]:
    """The class that ``architectures`` names, else the one that ``AutoModel`` would build."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    own = _own_class(config)
    if own is not None and trust_remote_code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        theirs: type[PreTrainedModel] = get_class_from_dynamic_module(own, str(source))
        return theirs
    for name in getattr(config, "architectures", None) or []:
        cls: Any = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
        hint = "; if you trust it, add --trust-remote-code (trust_remote_code=True)" if own is not None else ""
        raise (RemoteCodeError if hint else ValueError)(
            f"{source / 'config.json'}: architectures is {name!r}: expected a class of transformers "
            f"{transformers.__version__}; code that comes with a checkpoint is not run{hint}"
        )
    found: Any = MODEL_MAPPING.get(type(config), None)
    if found is None:
        raise ValueError(f"{source / 'config.json'}: names no architectures, and {config.model_type!r} has no model")
    base: type[PreTrainedModel] = found[0] if isinstance(found, (tuple, list)) else found
    return base


def _own_class(config: PreTrainedConfig) -> str | None:
    """The entry of ``auto_map`` for the model: that of the class in ``architectures``, else the first for a model."""
    table = getattr(config, "auto_map", None) or {}
    models = {key: value for key, value in table.items() if key.startswith("AutoModel") and isinstance(value, str)}
    named = (getattr(config, "architectures", None) or [None])[0]
    for value in models.values():
        if value.rpartition(".")[2] == named:
            return value
    for key in ("AutoModelForCausalLM", "AutoModel"):
        if key in models:
            return models[key]
    return next(iter(models.values()), None)


def _tensor_names(source: Path) -> list[str]:
    """Names of all tensors in the folder, from the index when there is one."""
    from safetensors import safe_open

    index = source / "model.safetensors.index.json"
    if index.is_file():
        return list(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    names: list[str] = []
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            names += file.keys()
    if not names:
        raise ValueError(f"{source}: expected model.safetensors or model.safetensors.index.json")
    return names
