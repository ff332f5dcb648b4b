"""Dictionaries in tensors, and replacing linear layers."""

from __future__ import annotations

import json
import logging
import shlex
import subprocess
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ._missing import missing_attribute

logger = logging.getLogger(__name__)

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


class OutlierTracer:
    """Remembers, for each linear layer of a model, which of its inputs are outliers in the first forward."""

    _instance: OutlierTracer | None = None
    last_w: Tensor | None
    current_outlier_dims: Tensor | None
    hvalues: list[int]
    outliers: list[Tensor]
    hvalue2outlier_idx: dict[int, Tensor]
    hooks: list[Any]

    def __init__(self) -> None:
        """Raise RuntimeError: there is one instance."""
        raise RuntimeError("Call get_instance() instead")

    def initialize(self, model: torch.nn.Module) -> None:
        """Forget what was seen, and watch the linear layers of `model`."""
        self.last_w = None
        self.current_outlier_dims = None
        self.hvalues = []
        self.outliers = []
        self.hvalue2outlier_idx = {}
        self.initialized = True
        linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        self.hooks = [m.register_forward_pre_hook(outlier_hook) for m in linear]

    def is_initialized(self) -> bool:
        """Whether a model is, or was, watched."""
        return getattr(self, "initialized", False)

    def get_hvalue(self, weight: Tensor) -> int:
        """What a weight is known by: where its storage is."""
        return weight.data.untyped_storage().data_ptr()

    def get_outliers(self, weight: Tensor) -> Tensor | None:
        """Indices of the outliers among the inputs of this weight's layer, or None where it was not seen."""
        if not self.is_initialized():
            logger.warning("Outlier tracer is not initialized...")
            return None
        return self.hvalue2outlier_idx.get(self.get_hvalue(weight))

    @classmethod
    def get_instance(cls) -> OutlierTracer:
        """The one instance."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
        return cls._instance


def outlier_hook(module: torch.nn.Module, input: tuple[Tensor, ...]) -> None:
    """Record outlier columns of a linear layer: from its weight, and for the first layer from its input."""
    if not isinstance(module, torch.nn.Linear):
        raise TypeError(f"module must be a torch.nn.Linear, got {type(module).__name__}")
    tracer = OutlierTracer.get_instance()
    known = tracer.get_hvalue(module.weight)
    if known in tracer.hvalue2outlier_idx:
        for hook in tracer.hooks:
            hook.remove()
        return
    tracer.outliers.append(find_outlier_dims(module.weight))
    tracer.hvalues.append(known)
    if len(tracer.outliers) > 1:
        tracer.hvalue2outlier_idx[known] = tracer.outliers[-1]
        return
    rows = input[0].reshape(-1, input[0].shape[-1])
    large = torch.where((rows.abs() > 6).sum(0) > 0)[0]
    found = torch.cat([find_outlier_dims(rows, reduction_dim=1, zscore=3), large])
    tracer.hvalue2outlier_idx[known] = torch.unique(found)


def execute_and_return(command_string: str) -> tuple[str, str]:
    """What a command, which no shell interprets, writes to stdout and to stderr, without the space around it."""
    done = subprocess.run(shlex.split(command_string), capture_output=True, text=True, check=False)
    return done.stdout.strip(), done.stderr.strip()


def sync_gpu(t: Tensor) -> None:
    """Wait for the tensor's device."""
    if t.device.type == "cuda":
        torch.cuda.synchronize(t.device)


__getattr__ = missing_attribute(__name__)
