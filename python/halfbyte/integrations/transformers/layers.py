"""Choose the layers of an empty model that become 4-bit, and replace them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from halfbyte.models.layers import is_conv1d
from halfbyte.models.replace import SOURCE_CLASS, empty_linear4bit
from halfbyte.nn import Embedding4bit, Linear4bit, Params4bit


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
    """The names in `names` that match no module."""
    paths = [name for name, _ in model.named_modules() if name]
    return [name for name in names if all(should_convert_module(path, [name]) for path in paths)]


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
