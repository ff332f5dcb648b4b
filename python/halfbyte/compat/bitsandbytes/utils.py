"""Dictionaries in tensors, and replacing linear layers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ._missing import missing_attribute

LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {"row": 0, "col32": 1, "col_turing": 2, "col_ampere": 3}
INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {code: name for name, code in LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING.items()}


def pack_dict_to_tensor(source_dict: dict[str, Any]) -> Tensor:
    """The dictionary's JSON, as a uint8 tensor of its UTF-8 bytes."""
    return torch.frombuffer(bytearray(json.dumps(source_dict).encode()), dtype=torch.uint8)


def unpack_tensor_to_dict(tensor_data: Tensor) -> dict[str, Any]:
    """The dictionary that `pack_dict_to_tensor` packed."""
    value: dict[str, Any] = json.loads(bytes(tensor_data.flatten().tolist()))
    return value


def replace_linear(
    model: torch.nn.Module,
    linear_replacement: Callable[[int, int, bool], torch.nn.Module],
    skip_modules: Iterable[str] = ("lm_head",),
    copy_weights: bool = False,
    post_processing_function: str | None = None,
) -> torch.nn.Module:
    """Replace, in place, each `torch.nn.Linear` whose own name is not in `skip_modules`.

    Args:
        model: Searched to any depth.
        linear_replacement: Called with in_features, out_features and whether there is a bias.
        skip_modules: Names of modules that stay.
        copy_weights: Give the new module the parameters of the old one.
        post_processing_function: Name of a method of the old module that is called afterwards, if it has it.
    """
    for name, child in model.named_children():
        replace_linear(child, linear_replacement, skip_modules, copy_weights, post_processing_function)
        if not isinstance(child, torch.nn.Linear) or name in skip_modules:
            continue
        new: Any = linear_replacement(child.in_features, child.out_features, child.bias is not None)
        if copy_weights:
            new.weight, new.bias = child.weight, child.bias
        setattr(model, name, new)
        after = getattr(child, post_processing_function, None) if post_processing_function is not None else None
        if after is not None:
            after(child)
    return model


def find_outlier_dims(
    weight: Tensor, reduction_dim: int = 0, zscore: float = 4.0, topk: int | None = None, rdm: bool = False
) -> Tensor:
    """Columns whose standard deviation is `zscore` deviations above the mean one; or the `topk` largest; or any."""
    if rdm:
        return torch.randint(0, weight.shape[1], size=(topk or 0,), device=weight.device)
    deviation = weight.std(reduction_dim)
    if topk is not None:
        return deviation.topk(topk, dim=0).indices
    return torch.where((deviation - deviation.mean()) / deviation.std() > zscore)[0]


def sync_gpu(t: Tensor) -> None:
    """Wait for the tensor's device."""
    if t.device.type == "cuda":
        torch.cuda.synchronize(t.device)


__getattr__ = missing_attribute(__name__)
