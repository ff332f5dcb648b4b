"""Arrays to 4 and to 8 bits, and back."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from halfbyte import _native
from halfbyte.arrays.dtypes import FLOATS, Array, as_native, as_values, filled, raw, widen
from halfbyte.geometry import BLOCK_SIZES, NESTED_BLOCKSIZE, QUANT_TYPES, blocks_of, packed_bytes

_logger = logging.getLogger(__name__)


def _check_blocksize(blocksize: object) -> None:
    if type(blocksize) is not int:
        raise TypeError(f"blocksize must be an int, got {blocksize!r}")
    if blocksize not in BLOCK_SIZES:
        raise ValueError(f"blocksize must be one of {', '.join(map(str, BLOCK_SIZES))}, got {blocksize}")


def _check_quant_type(quant_type: object) -> None:
    if quant_type not in QUANT_TYPES:
        kind = ValueError if isinstance(quant_type, str) else TypeError
        raise kind(f"quant_type must be 'nf4' or 'fp4', got {quant_type!r}")


# ---- 4 bits ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PackedArray:
    """An array in 4 bits a value: codes, scales, and what they were made from.

    Args:
        codes: Two codes to a byte, uint8 `[ceil(n / 2), 1]`.
        absmax: Scales, float32 `[blocks]`; or uint8 codes of them when they are nested.
        shape: Of the array that was quantized.
        dtype: Of the array that was quantized: "float16", "bfloat16" or "float32".
        blocksize: How many consecutive values share a scale.
        quant_type: "nf4" or "fp4".
        absmax2: When nested, the scales of the scales, float32 `[ceil(blocks / 256)]`.
        offset: When nested, what was subtracted from the scales before they were quantized.

    Raises:
        TypeError: A part of another type or dtype.
        ValueError: Parts that do not fit each other.
    """

    codes: NDArray[np.uint8]
    absmax: Array
    shape: tuple[int, ...]
    dtype: str
    blocksize: int
    quant_type: str
    absmax2: NDArray[np.float32] | None = None
    offset: float | None = None

    def __post_init__(self) -> None:
        """Check that the parts fit each other."""
        _check_blocksize(self.blocksize)
        _check_quant_type(self.quant_type)
        if self.dtype not in FLOATS:
            raise ValueError(f"dtype must be one of {', '.join(map(repr, FLOATS))}, got {self.dtype!r}")
        blocks = blocks_of(self.size, self.blocksize)
        nested = self.absmax2 is not None
        if nested != (self.offset is not None):
            raise ValueError("absmax2 and offset must be given both (nested scales) or neither, got one of them")
        check_part("codes", self.codes, np.uint8, packed_bytes(self.size))
        check_part("absmax", self.absmax, np.uint8 if nested else np.float32, blocks)
        if nested:
            check_part("absmax2", self.absmax2, np.float32, blocks_of(blocks, NESTED_BLOCKSIZE))

    @property
    def nested(self) -> bool:
        """Whether the scales are quantized themselves."""
        return self.absmax2 is not None

    @property
    def size(self) -> int:
        """How many values there are."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        nested = 0 if self.absmax2 is None else self.absmax2.nbytes + 4
        return self.codes.nbytes + self.absmax.nbytes + nested

    def scales(self) -> NDArray[np.float32]:
        """One float32 scale for each block, dequantized where they are nested."""
        absmax = as_native("absmax", self.absmax)
        if self.absmax2 is None or self.offset is None:
            return absmax
        absmax2, out = as_native("absmax2", self.absmax2), np.empty(self.absmax.size, np.float32)
        _native.expand_absmax(raw(absmax), raw(absmax2), self.offset, raw(out))
        return out

    def to_tensors(self, name: str) -> dict[str, Array]:
        """What a checkpoint holds of a weight called `name`: for `safetensors.numpy.save_file`.

        >>> import numpy as np
        >>> sorted(quantize_4bit(np.ones((8, 8), np.float32)).to_tensors("lin.weight"))[1:]
        ['lin.weight.absmax', 'lin.weight.quant_map', 'lin.weight.quant_state.bitsandbytes__nf4']
        """
        state: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": self.dtype,
            "shape": list(self.shape),
        }
        tensors = {
            name: self.codes,
            f"{name}.absmax": self.absmax,
            f"{name}.quant_map": np.array(_native.quant_map(self.quant_type), np.float32),
        }
        if self.absmax2 is not None:
            tensors[f"{name}.nested_absmax"] = self.absmax2
            tensors[f"{name}.nested_quant_map"] = np.array(_native.dynamic_map(), np.float32)
            state |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32", "nested_offset": self.offset}
        blob = np.frombuffer(bytearray(json.dumps(state).encode()), np.uint8)
        return {**tensors, f"{name}.quant_state.bitsandbytes__{self.quant_type}": blob}


def check_part(argument: str, part: object, dtype: type[np.generic], size: int) -> None:
    """That a part of a packed weight is an array of this dtype and size. Errors call it `argument`."""
    if not isinstance(part, np.ndarray):
        raise TypeError(f"{argument} must be a numpy.ndarray, got {type(part).__name__}")
    if part.dtype != dtype:
        raise TypeError(f"{argument} must be {np.dtype(dtype)}, got {part.dtype}")
    if part.size != size:
        raise ValueError(f"{argument} must have {size} elements for this shape and blocksize, got {part.size}")


def quantize_4bit(values: Array, quant_type: str = "nf4", blocksize: int = 64, nested: bool = False) -> PackedArray:
    """Quantize an array to 4 bits a value, in blocks that share a scale.

    Args:
        values: float16, bfloat16 (see the module) or float32, of any shape and strides; read in row-major order.
        quant_type: "nf4" or "fp4".
        blocksize: 32, 64, 128, 256, 512, 1024, 2048 or 4096 consecutive values.
        nested: Quantize the scales too, to 8 bits in blocks of 256.

    Raises:
        TypeError: A wrong type or dtype; float64, numpy's default, is to be cast first.
        ValueError: A wrong `blocksize` or `quant_type`.

    NaN gets code 0, and blocks that contain Inf dequantize to NaN or Inf; both are logged.
    """
    _check_blocksize(blocksize)
    _check_quant_type(quant_type)
    array, dtype = as_values(values)
    codes = np.empty((packed_bytes(array.size), 1), np.uint8)
    absmax = np.empty(blocks_of(array.size, blocksize), np.float32)
    if not _native.quantize_4bit(raw(array, dtype), raw(codes), raw(absmax), quant_type, blocksize):
        _logger.warning(
            "values of shape %s contain NaN or Inf; NaN gets code 0, blocks with Inf dequantize to NaN or Inf",
            list(array.shape),
        )
    if not nested:
        return PackedArray(codes, absmax, array.shape, dtype, blocksize, quant_type)
    scales = np.empty(absmax.size, np.uint8)
    absmax2 = np.empty(blocks_of(absmax.size, NESTED_BLOCKSIZE), np.float32)
    offset = _native.compress_absmax(raw(absmax), raw(scales), raw(absmax2))
    return PackedArray(codes, scales, array.shape, dtype, blocksize, quant_type, absmax2, offset)


def dequantize_4bit(packed: PackedArray, dtype: DTypeLike | None = None) -> Array:
    """The values of a packed array.

    Args:
        packed: What `quantize_4bit` or `load_packed` gave.
        dtype: Of the result: float16, float32, uint16 (the bits of bfloat16) or `ml_dtypes.bfloat16`. By default that
            of the array that was quantized, and float32 with the same values where that was bfloat16.
    """
    if not isinstance(packed, PackedArray):
        raise TypeError(f"packed must be a PackedArray, got {type(packed).__name__}")
    codes, scales = as_native("codes", packed.codes), packed.scales()
    quant_type, blocksize = packed.quant_type, packed.blocksize
    return filled(
        packed.shape,
        dtype,
        packed.dtype,
        lambda out: _native.dequantize_4bit(raw(codes), raw(scales), out, quant_type, blocksize),
    )


# ---- 8 bits ----------------------------------------------------------------------------------------------------------


def _map(code: Array | None) -> NDArray[np.float32]:
    if code is None:
        return np.array(_native.dynamic_map(), np.float32)
    code = as_native("code", code, np.float32)
    if code.size != 256:
        raise ValueError(f"code must have 256 elements, got {code.size}")
    return code


def quantize_blockwise(
    values: Array, code: Array | None = None, blocksize: int = 4096
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Quantize an array to 8 bits a value, in blocks that share a scale.

    Args:
        values: float16, bfloat16 (see the module) or float32, of any shape and strides.
        code: The 256 values that codes stand for, float32, finite and ascending; default the signed dynamic map.
        blocksize: 32, 64, 128, 256, 512, 1024, 2048 or 4096 consecutive values.

    Returns:
        The codes, uint8, shaped as `values`, and the scales, float32 `[ceil(n / blocksize)]`.
    """
    _check_blocksize(blocksize)
    array, dtype = as_values(values)
    code = _map(code)
    array = widen(array.view(np.uint16)) if dtype == "bfloat16" else array.astype(np.float32, copy=False)
    codes = np.empty(array.shape, np.uint8)
    absmax = np.empty(blocks_of(array.size, blocksize), np.float32)
    _native.quantize_8bit(raw(array), raw(code), raw(codes), raw(absmax), blocksize)
    return codes, absmax


def dequantize_blockwise(
    codes: Array, absmax: Array, code: Array | None = None, blocksize: int = 4096
) -> NDArray[np.float32]:
    """Read back what `quantize_blockwise` gave: float32, shaped as `codes`."""
    _check_blocksize(blocksize)
    codes, absmax, code = as_native("codes", codes, np.uint8), as_native("absmax", absmax, np.float32), _map(code)
    check_part("absmax", absmax, np.float32, blocks_of(codes.size, blocksize))
    out = np.empty(codes.shape, np.float32)
    _native.dequantize_8bit(raw(codes), raw(absmax), raw(code), raw(out), blocksize)
    return out


def quantize_rowwise(values: Array) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantize each row of a matrix to 8 bits, by its largest magnitude (LLM.int8(), arXiv 2208.07339).

    Args:
        values: float16, bfloat16 (see the module) or float32 `[..., columns]`.

    Returns:
        The codes, int8, shaped as `values`: `round(127 * value / scale)`; and the scales, float32 `[rows]`.

    >>> import numpy as np
    >>> quantize_rowwise(np.array([[1, -4, 2]], np.float32))
    (array([[  32, -127,   64]], dtype=int8), array([4.], dtype=float32))
    """
    array, dtype = as_values(values)
    if array.ndim == 0:
        raise ValueError("values must have at least one dimension, [..., columns], got a scalar")
    rows, columns = prod(array.shape[:-1]), array.shape[-1]
    codes, scales = np.empty(array.shape, np.int8), np.empty(rows, np.float32)
    _native.quantize_rows(raw(array, dtype), raw(codes), raw(scales), rows, columns)
    return codes, scales


def dequantize_rowwise(codes: Array, scales: Array, dtype: DTypeLike = np.float32) -> Array:
    """Read back what `quantize_rowwise` gave: `codes * scales / 127`, shaped as `codes`."""
    codes, scales = as_native("codes", codes, np.int8), as_native("scales", scales, np.float32)
    if codes.ndim == 0:
        raise ValueError("codes must have at least one dimension, [..., columns], got a scalar")
    rows, columns = prod(codes.shape[:-1]), codes.shape[-1]
    if scales.size != rows:
        raise ValueError(f"scales must have {rows} elements, one for each row of codes, got {scales.size}")
    return filled(
        codes.shape,
        dtype,
        "float32",
        lambda out: _native.dequantize_rows(raw(codes), raw(scales), out, rows, columns),
    )
