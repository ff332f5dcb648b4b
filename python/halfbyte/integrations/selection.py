"""Which weights the installed transformers would convert to 4 bits: asked of its own model classes.

The rules in the compiled core answer the same question without importing anything. This module is the other way, for
architectures that the rules do not know: it builds the model without weights and applies transformers' own lists.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["converted_modules", "converted_tensors", "skeleton", "transformers_selection"]


def transformers_selection(source: str | Path, skip: Sequence[str] = ()) -> list[str]:
    """Names of the tensors of a checkpoint that the installed transformers would quantize while loading it.

    Parameters
    ----------
    source:
        Folder with ``config.json`` and safetensors files.
    skip:
        Names of modules to keep besides transformers' defaults, matched as it matches ``llm_int8_skip_modules``.

    Returns
    -------
    list[str]
        Sorted names, as the checkpoint spells them. A tensor that transformers would first merge with others or
        split (fused projections) is not among them: it has no 4-bit form under its own name.

    Raises
    ------
    ImportError
        transformers is not installed; the message names the extra that brings it.
    ValueError
        The architecture is not one of transformers' own, or the folder holds no safetensors.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"--selection transformers needs the package {error.name!r}: pip install 'halfbyte[transformers]'",
            name=error.name,
        ) from error
    source = Path(source)
    names = _tensor_names(source)
    config = transformers.AutoConfig.from_pretrained(source)
    return converted_tensors(skeleton(_model_class(config, source), config), names, skip)


def skeleton(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model without weights, in the state that transformers' quantizers see: on the meta device, untied.

    Parameters
    ----------
    cls:
        The model's class.
    config:
        Its configuration; not modified.
    """
    import copy
    from contextlib import ExitStack

    import torch

    with ExitStack() as stack:
        for context in cls.get_init_context(torch.float32, True, False, False):
            stack.enter_context(context)
        return cls(copy.deepcopy(config))


def converted_tensors(model: PreTrainedModel, names: Iterable[str], skip: Sequence[str] = ()) -> list[str]:
    """Which of a checkpoint's tensors would be quantized while loading into ``model``.

    Parameters
    ----------
    model:
        The model without weights, see :func:`skeleton`.
    names:
        Tensor names of the checkpoint.
    skip:
        Names of modules to keep besides the defaults.

    Returns
    -------
    list[str]
        Sorted names, a subset of ``names``.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    modules = converted_modules(model, skip)
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    parameters = model.state_dict()
    prefix = model.base_model_prefix
    converted = []
    # The order in which transformers loads: some renamings depend on what came before.
    for name in sorted(names, key=dot_natural_key):
        key, converter = rename_source_key(name, renamings, converters, prefix, parameters)
        if key not in parameters and name in parameters:
            key, converter = rename_source_key(name, [], [], prefix, parameters)
        module, _, leaf = key.rpartition(".")
        if key in parameters and leaf == "weight" and module in modules and converter is None:
            converted.append(name)
    return sorted(converted)


def converted_modules(model: PreTrainedModel, skip: Sequence[str] = (), replace: bool = False) -> set[str]:
    """Paths of the modules that transformers' bitsandbytes quantizer would replace.

    Parameters
    ----------
    model:
        The model, see :func:`skeleton`.
    skip:
        Names of modules to keep.
    replace:
        ``skip`` replaces the defaults, as ``llm_int8_skip_modules`` does, instead of being added to them.
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


def _model_class(config: PreTrainedConfig, source: Path) -> type[PreTrainedModel]:
    """The class that ``architectures`` names, else the one that ``AutoModel`` would build."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    for name in getattr(config, "architectures", None) or []:
        cls: Any = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
        raise ValueError(
            f"{source / 'config.json'}: architectures is {name!r}: expected a class of transformers "
            f"{transformers.__version__}; code that comes with a checkpoint is not run"
        )
    found: Any = MODEL_MAPPING.get(type(config), None)
    if found is None:
        raise ValueError(f"{source / 'config.json'}: names no architectures, and {config.model_type!r} has no model")
    base: type[PreTrainedModel] = found[0] if isinstance(found, (tuple, list)) else found
    return base


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
