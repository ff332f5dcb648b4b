"""The C functions that the compiled core exports under bitsandbytes' names, as ctypes function pointers."""

from __future__ import annotations

import ctypes as ct
import functools
import logging
from pathlib import Path
from typing import Any

import torch

from halfbyte import _native

from ._missing import missing_attribute
from .consts import DYNAMIC_LIBRARY_SUFFIX, PACKAGE_DIR
from .cuda_specs import CUDASpecs, get_cuda_specs, get_cuda_version_tuple, get_rocm_gpu_arch

__all__ = [
    "BNB_BACKEND",
    "DYNAMIC_LIBRARY_SUFFIX",
    "HIP_ENVIRONMENT",
    "PACKAGE_DIR",
    "ROCM_GPU_ARCH",
    "BNBNativeLibrary",
    "CUDASpecs",
    "ErrorHandlerMockBNBNativeLibrary",
    "get_cuda_bnb_library_path",
    "get_cuda_specs",
    "get_cuda_version_tuple",
    "get_native_library",
    "get_rocm_gpu_arch",
    "lib",
]

logger = logging.getLogger(__name__)

_FLOATS = ("fp32", "fp16", "bf16")
_KINDS = ("", "_nf4", "_fp4")
# code, input, absmax, out, values per block, number of values: of which the input is codes, or values
_QUANTIZE = (ct.c_void_p,) * 4 + (ct.c_int,) * 2
# The same, and a stream.
_DEQUANTIZE = (*_QUANTIZE, ct.c_void_p)
# m, n, k, input, codes, absmax, code, out, three leading dimensions, values per block, stream
_PRODUCT = (ct.c_int,) * 3 + (ct.c_void_p,) * 5 + (ct.c_int,) * 4 + (ct.c_void_p,)

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    **{f"cdequantize_blockwise_{dtype}{kind}": _DEQUANTIZE for dtype in _FLOATS for kind in _KINDS},
    **{f"cquantize_blockwise_{dtype}{kind}": _QUANTIZE for dtype in _FLOATS for kind in _KINDS},
    **{f"cgemm_4bit_inference_naive_{dtype}": _PRODUCT for dtype in _FLOATS},
}


class BNBNativeLibrary:
    """Looks C functions up by name. One that is not exported is an AttributeError, so that `hasattr` tells.

    The functions take what bitsandbytes' take: addresses of a GPU's memory, or of the processor's. What one refuses, or
    the driver, is a RuntimeError.
    """

    def __init__(self, lib: ct.CDLL) -> None:
        """Wrap an opened library."""
        self._lib = lib
        self._error = lib.halfbyte_last_error
        self._error.restype = ct.c_char_p
        self.compiled_with_cuda = hasattr(_native, "cuda_kernels") and bool(_native.cuda_kernels())

    def __getattr__(self, name: str) -> Any:
        """A ctypes function pointer with its argument types set."""
        signature = _SIGNATURES.get(name)
        if signature is None:
            raise AttributeError(
                f"C function {name!r} is not exported; halfbyte stands in for bitsandbytes here and exports "
                + ", ".join(_SIGNATURES)
            )
        function = getattr(self._lib, name)
        function.argtypes, function.restype, function.errcheck = signature, ct.c_int, self._check
        setattr(self, name, function)
        return function

    def _check(self, status: int, function: Any, arguments: tuple[Any, ...]) -> None:
        """What the functions give Python: nothing, as bitsandbytes' do."""
        if status:
            raise RuntimeError(f"{function.__name__}: {self._error().decode()}")

    def __getitem__(self, name: str) -> Any:
        """The same by index."""
        return getattr(self, name)


class ErrorHandlerMockBNBNativeLibrary(BNBNativeLibrary):
    """What bitsandbytes has in place of a library that could not be opened. For `isinstance` alone: ours always can."""

    def __init__(self, error_msg: str) -> None:
        """Raise RuntimeError: there is nothing to stand in for."""
        raise RuntimeError(error_msg)


def get_cuda_bnb_library_path(cuda_specs: CUDASpecs) -> Path:
    """Where the library is: one, whatever the version of CUDA."""
    return Path(_native.__file__)


@functools.cache
def get_native_library() -> BNBNativeLibrary:
    """The compiled core, opened for ctypes."""
    return BNBNativeLibrary(ct.CDLL(_native.__file__))


lib = get_native_library()

HIP_ENVIRONMENT = False
ROCM_GPU_ARCH = get_rocm_gpu_arch()
BNB_BACKEND = "CUDA" if torch.cuda.is_available() else "CPU"

__getattr__ = missing_attribute(__name__)
