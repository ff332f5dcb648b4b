"""The dtypes of arrays, bfloat16 among them, and arrays as the core takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array: TypeAlias = NDArray[Any]
Raw: TypeAlias = tuple[int, int, str]

FLOATS = ("float16", "bfloat16", "float32")
_LEGAL = "float16, float32, uint16 (the bits of bfloat16) or ml_dtypes.bfloat16"


def float_name(dtype: np.dtype[Any]) -> str | None:
    """What the core calls a dtype of values, or None where it has none."""
    name = "bfloat16" if dtype == np.uint16 else dtype.name
    return name if name in FLOATS else None


def target(dtype: DTypeLike) -> tuple[str, np.dtype[Any]]:
    """A dtype to dequantize to: what the core calls it, and numpy's."""
    try:
        wanted = np.dtype(dtype).newbyteorder("=")
    except TypeError:
        raise TypeError(f"dtype must be {_LEGAL}, got {dtype!r}") from None
    name = float_name(wanted)
    if name is None:
        raise TypeError(f"dtype must be {_LEGAL}, got {wanted}")
    return name, wanted


def widen(bits: Array) -> NDArray[np.float32]:
    """Bits of bfloat16 values as float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def as_native(argument: str, array: object, dtype: type[np.generic] | None = None) -> Array:
    """An argument as the core reads it: contiguous, aligned, in the machine's byte order."""
    if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{argument} must be a numpy.ndarray, got {type(array).__name__}")
    if dtype is not None and array.dtype != dtype:
        raise TypeError(f"{argument} must be {np.dtype(dtype)}, got {array.dtype}")
    native: Array = array.astype(array.dtype.newbyteorder("="), copy=False)
    # `numpy.require` makes one dimension of none.
    required: Array = np.require(native, requirements=["C_CONTIGUOUS", "ALIGNED"]).reshape(array.shape)
    return required


def as_values(values: object) -> tuple[Array, str]:
    """Values to quantize, and what the core calls their dtype."""
    array = as_native("values", values)
    name = float_name(array.dtype)
    if name is None:
        raise TypeError(f"values must be {_LEGAL}, got {array.dtype}")
    return array, name


def raw(array: Array, dtype: str | None = None) -> Raw:
    """Address, count and dtype, for the core. The caller keeps the array alive meanwhile."""
    return array.ctypes.data, array.size, dtype or array.dtype.name


def filled(shape: tuple[int, ...], dtype: DTypeLike | None, recorded: str, fill: Callable[[Raw], None]) -> Array:
    """An array of `dtype`, by default the recorded one, into which `fill` writes what the core calls that dtype."""
    name, wanted = (recorded, None) if dtype is None else target(dtype)
    out = np.empty(shape, np.uint16 if name == "bfloat16" else name)
    fill(raw(out, name))
    if wanted is None:
        return widen(out) if name == "bfloat16" else out
    return out.view(wanted)


def cast(array: Array, dtype: DTypeLike) -> Array:
    """A tensor that is not quantized, in another dtype."""
    name, wanted = target(dtype)
    if name != "bfloat16":
        return array.astype(wanted)
    bits = array.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Rounded up, the bits of a NaN could become those of a number.
    quiet = (bits >> 16) | 0x40
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet, rounded).astype(np.uint16).view(wanted)
