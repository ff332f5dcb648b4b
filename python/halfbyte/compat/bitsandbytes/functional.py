"""Functions on tensors: halfbyte's own, pointers for C functions, and the arithmetic of optimizers."""

from __future__ import annotations

import ctypes as ct
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from halfbyte.functional import (
    QuantState,
    create_dynamic_map,
    create_fp8_map,
    create_linear_map,
    create_normal_map,
    dequantize_4bit,
    dequantize_blockwise,
    dequantize_fp4,
    dequantize_nf4,
    gemv_4bit,
    get_4bit_type,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
    quantize_4bit,
    quantize_blockwise,
    quantize_fp4,
    quantize_nf4,
)

from ._missing import int8_function, missing_attribute
from ._updates import OPTIMIZERS, update_8bit_blockwise, update_32bit
from .cextension import lib
from .utils import pack_dict_to_tensor, unpack_tensor_to_dict

__all__ = [
    "FIRST_CUDA_DEVICE",
    "OPTIMIZERS",
    "GlobalPageManager",
    "QuantState",
    "batched_igemm",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "fill",
    "gemv_4bit",
    "get_4bit_type",
    "get_paged",
    "get_ptr",
    "has_avx512bf16",
    "igemm",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mixed_scaled_mm",
    "int8_mm_dequant",
    "int8_scaled_mm",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "is_on_gpu",
    "lib",
    "name2qmap",
    "optimizer_update_8bit_blockwise",
    "optimizer_update_32bit",
    "pack_dict_to_tensor",
    "prefetch_tensor",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
    "unpack_tensor_to_dict",
]

name2qmap: dict[str, Tensor] = {}
FIRST_CUDA_DEVICE = torch.device("cuda", index=0)
C = 127.0

int8_linear_matmul = int8_function("bitsandbytes.functional.int8_linear_matmul")
int8_mm_dequant = int8_function("bitsandbytes.functional.int8_mm_dequant")
int8_double_quant = int8_function("bitsandbytes.functional.int8_double_quant")
int8_scaled_mm = int8_function("bitsandbytes.functional.int8_scaled_mm")
int8_mixed_scaled_mm = int8_function("bitsandbytes.functional.int8_mixed_scaled_mm")
igemm = int8_function("bitsandbytes.functional.igemm")
batched_igemm = int8_function("bitsandbytes.functional.batched_igemm")


def get_ptr(A: Tensor | None) -> ct.c_void_p | None:
    """The address of a tensor's first element, as C functions take it; None for None."""
    return None if A is None else ct.c_void_p(A.data_ptr())


def _get_tensor_stream(tensor: Tensor) -> ct.c_void_p:
    """The current CUDA stream of the tensor's device, as C functions take it."""
    return ct.c_void_p(torch.cuda.current_stream(tensor.device if tensor.is_cuda else None).cuda_stream)


def is_on_gpu(tensors: Iterable[Tensor | None]) -> bool:
    """True when all tensors are on one device; None and paged tensors are on any.

    Raises:
        RuntimeError: They are on several.
    """
    given = [t for t in tensors if t is not None and not getattr(t, "is_paged", False)]
    if len({t.device for t in given}) > 1:
        found = ", ".join(f"{tuple(t.shape)} on {t.device}" for t in given)
        raise RuntimeError(f"tensors must be on the same device, got {found}")
    return True


def has_avx512bf16() -> bool:
    """Whether weights must be packed in another order for the processor: never, here."""
    return False


class GlobalPageManager:
    """Paged tensors. There are none: optimizer states stay on their parameter's device."""

    _instance: GlobalPageManager | None = None

    def __init__(self) -> None:
        """Raise RuntimeError: there is one instance."""
        raise RuntimeError("Call get_instance() instead")

    @classmethod
    def get_instance(cls) -> GlobalPageManager:
        """The one instance."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.paged_tensors = []
        return cls._instance

    paged_tensors: list[Tensor]

    def prefetch_all(self, to_cpu: bool = False) -> None:
        """Do nothing: there is nothing to fetch."""


def get_paged(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device = FIRST_CUDA_DEVICE) -> Tensor:
    """Raise NotImplementedError: tensors in managed memory are not in halfbyte."""
    raise NotImplementedError("bitsandbytes.functional.get_paged: paged tensors are not in halfbyte yet")


def prefetch_tensor(A: Tensor, to_cpu: bool = False) -> None:
    """Raise NotImplementedError: tensors in managed memory are not in halfbyte."""
    raise NotImplementedError("bitsandbytes.functional.prefetch_tensor: paged tensors are not in halfbyte yet")


def fill(A: Tensor, value: float, device: torch.device | None = None, prefetch: bool = True) -> None:
    """Fill a tensor, in place."""
    A.fill_(value)


def optimizer_update_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    beta1: float,
    eps: float,
    step: int,
    lr: float,
    state2: Tensor | None = None,
    beta2: float = 0.0,
    beta3: float = 0.0,
    alpha: float = 0.0,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    unorm_vec: Tensor | None = None,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
) -> None:
    """Update a parameter and its float32 states, in place. See `OPTIMIZERS` for the names."""
    is_on_gpu([g, p, state1, state2, unorm_vec])
    update_32bit(
        optimizer_name, g, p, state1, state2, beta1, beta2, beta3, alpha, eps, weight_decay, step, lr,
        gnorm_scale, unorm_vec, max_unorm, skip_zeros,
    )  # fmt: skip


def optimizer_update_8bit_blockwise(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: Tensor,
    qmap2: Tensor | None,
    absmax1: Tensor,
    absmax2: Tensor | None,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    skip_zeros: bool = False,
) -> None:
    """Update a parameter and its states of 8 bits in blocks of 256, in place: through float32 copies of the states."""
    is_on_gpu([g, p, state1, state2, qmap1, qmap2, absmax1, absmax2])
    update_8bit_blockwise(
        optimizer_name, g, p, (state1, qmap1, absmax1), (state2, qmap2, absmax2), beta1, beta2, beta3, alpha, eps,
        weight_decay, step, lr, gnorm_scale, skip_zeros,
    )  # fmt: skip


_missing = missing_attribute(__name__)


def __getattr__(name: str) -> Any:
    """Names of LLM.int8() and paging that nothing serves say so; see `missing_attribute`."""
    return _missing(name)
