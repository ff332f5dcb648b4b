"""Functions on tensors: halfbyte's own, pointers for C functions, and the arithmetic of optimizers."""

from __future__ import annotations

import ctypes as ct
from collections.abc import Iterable

import torch
from torch import Tensor

from halfbyte import functional
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
    get_4bit_type,
    int8_double_quant,
    int8_linear_matmul,
    int8_mixed_scaled_mm,
    int8_mm_dequant,
    int8_scaled_mm,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
    quantize_4bit,
    quantize_blockwise,
    quantize_fp4,
    quantize_nf4,
)

from . import _ops  # noqa: F401  `torch.ops.bitsandbytes` is called below
from ._igemm import batched_igemm, check_matmul, igemm
from ._missing import missing_attribute
from ._updates import OPTIMIZERS, update_8bit_blockwise, update_32bit
from .cextension import lib
from .utils import pack_dict_to_tensor, unpack_tensor_to_dict

__all__ = [
    "FIRST_CUDA_DEVICE",
    "OPTIMIZERS",
    "CUBLAS_Context",
    "GlobalPageManager",
    "QuantState",
    "batched_igemm",
    "check_matmul",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "elementwise_func",
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


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> Tensor:
    """`A @ dequantize_4bit(B, state).t()`, on the CPU with the bits that bitsandbytes gives there.

    `transposed_A` and `transposed_B` are accepted for their callers' sake.

    Raises:
        ValueError: `state` is None.
    """
    if state is None or A.device.type != "cpu":
        return functional.gemv_4bit(A, B, out, transposed_A, transposed_B, state)
    absmax = state.absmax
    if state.state2 is not None and state.offset is not None:
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    arguments = (A, B, state.shape, absmax, state.code, state.blocksize)
    if out is None:
        result: Tensor = torch.ops.bitsandbytes.gemv_4bit.default(*arguments)
        return result
    torch.ops.bitsandbytes.gemv_4bit.out(*arguments, out=out)
    return out


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


class CUBLAS_Context:
    """Handles of cuBLAS for C functions that take one. There are none: torch makes the products."""

    _instance: CUBLAS_Context | None = None
    context: dict[int, ct.c_void_p]

    def __init__(self) -> None:
        """Raise RuntimeError: there is one instance."""
        raise RuntimeError("Call get_instance() instead")

    @classmethod
    def get_instance(cls) -> CUBLAS_Context:
        """The one instance."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.context = {}
        return cls._instance

    def get_context(self, device: torch.device) -> ct.c_void_p:
        """Raise NotImplementedError: no C function here takes one."""
        raise NotImplementedError("bitsandbytes.functional.CUBLAS_Context: halfbyte exports no function that takes one")


def get_paged(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device = FIRST_CUDA_DEVICE) -> Tensor:
    """Raise NotImplementedError: tensors in managed memory are not in halfbyte."""
    raise NotImplementedError("bitsandbytes.functional.get_paged: paged tensors are not in halfbyte yet")


def prefetch_tensor(A: Tensor, to_cpu: bool = False) -> None:
    """Raise NotImplementedError: tensors in managed memory are not in halfbyte."""
    raise NotImplementedError("bitsandbytes.functional.prefetch_tensor: paged tensors are not in halfbyte yet")


def elementwise_func(func_name: str, A: Tensor, B: Tensor | None, value: float | None, prefetch: bool = True) -> None:
    """Set the elements of `A`, float32 or uint8: "fill" with `value`, "arange" counts up, "_mul" multiplies by `B`.

    Raises:
        NotImplementedError: Another function, or another dtype.
    """
    if A.dtype not in (torch.float32, torch.uint8) or (A.dtype is torch.uint8 and func_name != "fill"):
        raise NotImplementedError(f"A must be float32, or uint8 for 'fill', got {A.dtype} for {func_name!r}")
    if func_name == "fill" and value is not None:
        A.fill_(value)
    elif func_name == "arange":
        A.copy_(torch.arange(A.numel(), dtype=A.dtype, device=A.device).view(A.shape))
    elif func_name == "_mul" and B is not None:
        A.mul_(B)
    else:
        raise NotImplementedError(
            f"func_name must be 'arange', 'fill' with a value or '_mul' with B, got {func_name!r}"
        )


def fill(A: Tensor, value: float, device: torch.device | None = None, prefetch: bool = True) -> None:
    """Fill a tensor, in place."""
    elementwise_func("fill", A, None, value)


def _mul(A: Tensor, B: Tensor, device: torch.device | None = None) -> None:
    elementwise_func("_mul", A, B, 0)


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


__getattr__ = missing_attribute(__name__)
