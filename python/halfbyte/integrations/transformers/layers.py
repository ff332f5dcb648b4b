"""The layers of a model without weights: which become 4-bit, and putting 4-bit ones in their place."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from halfbyte._native import CheckpointError
from halfbyte.models.layers import is_conv1d
from halfbyte.models.replace import SOURCE_CLASS, empty_linear4bit
from halfbyte.nn import Embedding4bit, Linear4bit, Params4bit
from halfbyte.offline.transformers_names import renamed
from halfbyte.state import PACKED_KEYS, TENSOR_KEYS


def is_conv1d_layer(module: nn.Module) -> bool:
    """Whether this dense layer is a `Conv1D`, whose weight is `[in, out]`."""
    return any(is_conv1d(cls) for cls in type(module).__mro__)


def is_transposed(module: nn.Module) -> bool:
    """Whether this 4-bit layer took the place of a `Conv1D`."""
    source = module.__dict__.get(SOURCE_CLASS)
    return isinstance(source, type) and any(is_conv1d(cls) for cls in source.__mro__)


def is_linear(module: nn.Module) -> bool:
    """Whether a load quantizes this layer: a plain `nn.Linear`, or a `Conv1D`."""
    return type(module) is nn.Linear or is_conv1d_layer(module)


def chosen(model: nn.Module, keep: Sequence[str]) -> list[str]:
    """Paths of the linear layers of a model that no name in `keep` covers, as transformers matches names."""
    return [
        name for name, module in model.named_modules() if is_linear(module) and should_convert_module(name, list(keep))
    ]


def without_effect(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of `names` that cover no module at all."""
    paths = [name for name, _ in model.named_modules() if name]
    return [name for name in names if all(should_convert_module(path, [name]) for path in paths)]


def packed_in(model: Any, files: Sequence[str]) -> list[str] | None:
    """Paths of the layers whose weight is packed in a checkpoint; None when its files do not tell.

    Args:
        model: The transformers model that the checkpoint is for.
        files: The checkpoint's files.

    Raises:
        CheckpointError: A packed weight lacks a part, or is one of many that the model holds as one tensor; the message
            names it.
    """
    if not files or not all(os.fspath(file).endswith(".safetensors") for file in files):
        return None
    from safetensors import safe_open

    names: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as header:
            names.update(dict.fromkeys(header.keys(), os.fspath(file)))
    found: list[str] = []
    for name, target, _, _ in renamed(model, _packed_weights(names)):
        if target is not None and target.endswith("weight"):
            found.append(target.rpartition(".")[0])
        elif target is not None:
            raise CheckpointError(
                f"{names[name]}: {name} is packed to 4 bits, but transformers {transformers.__version__} holds it as "
                f"part of {target}, one tensor for all experts, which cannot be made of packed ones; make a 16-bit "
                "checkpoint of it by `halfbyte dequantize`, or load the one that it was made from"
            )
    return found


def _packed_weights(names: Mapping[str, str]) -> list[str]:
    """Names of the packed weights among a checkpoint's tensors, which come with their files; each is complete."""
    parts: dict[str, set[str]] = {}
    for name in names:
        for key in (*PACKED_KEYS, *TENSOR_KEYS):
            if name.endswith(f".{key}"):
                parts.setdefault(name[: -len(key) - 1], set()).add(key)
                break
    for weight, keys in parts.items():
        file = names[f"{weight}.{min(keys)}"]
        if not weight.endswith("weight"):
            continue
        wanted = {"absmax", "quant_map"}
        if any(key.startswith("nested_") for key in keys):
            wanted |= {"nested_absmax", "nested_quant_map"}
        missing = [f"{weight}.{key}" for key in TENSOR_KEYS if key in wanted - keys]
        if not keys.intersection(PACKED_KEYS):
            missing.append(f"{weight}.{PACKED_KEYS[0]} (or {PACKED_KEYS[1].rpartition('.')[2]})")
        if weight not in names:
            missing.insert(0, weight)
        if missing:
            raise CheckpointError(
                f"{file}: {weight} is packed to 4 bits, but the checkpoint lacks {', '.join(missing)}; it is "
                "incomplete: save, or download, it again"
            )
    return [weight for weight, keys in parts.items() if keys.intersection(PACKED_KEYS)]


def put_4bit(
    model: nn.Module,
    paths: Iterable[str],
    *,
    quant_type: str,
    nested: bool,
    storage: torch.dtype,
    compute_dtype: torch.dtype | None,
    packed: bool,
) -> int:
    """Put a 4-bit layer, without numbers, in the place of each layer named; returns how many.

    Args:
        model: On the meta device.
        paths: Of linear layers and, when `packed`, embeddings. Layers of other classes are left as they are.
        quant_type: "nf4" or "fp4".
        nested: Quantize the scales too.
        storage: Of packed bytes.
        compute_dtype: Of products; None for the input's.
        packed: Weights will come packed, and the parameter says so by its dtype.
    """
    count = 0
    for path in dict.fromkeys(paths):
        old = model.get_submodule(path)
        new: Linear4bit | Embedding4bit
        with torch.device("meta"):
            if is_linear(old):
                shape: Any = old._parameters["weight"].shape  # type: ignore[union-attr]
                in_features, out_features = shape if is_conv1d_layer(old) else (shape[1], shape[0])
                new = empty_linear4bit(
                    old,
                    in_features,
                    out_features,
                    compute_dtype=compute_dtype,
                    nested=nested,
                    quant_type=quant_type,
                    storage=storage,
                )
            elif packed and type(old) is nn.Embedding:
                new = Embedding4bit(
                    old.num_embeddings,
                    old.embedding_dim,
                    dtype=old.weight.dtype,
                    quant_type=quant_type,
                    quant_storage=storage,
                )
                new.padding_idx = old.padding_idx
            else:
                continue
            dense = old._parameters["weight"]
            assert dense is not None
            weight = new.weight
            assert isinstance(weight, Params4bit)
            # A loader casts what it reads to the dtype found here.
            new.weight = weight._like(torch.empty(weight.shape, dtype=storage if packed else dense.dtype), None)
        if old._parameters.get("bias") is not None:
            new.bias = old._parameters["bias"]  # type: ignore[assignment]
        new.__dict__[SOURCE_CLASS] = type(old)
        new.train(old.training)
        new.requires_grad_(False)
        model.set_submodule(path, new)
        count += 1
    return count
