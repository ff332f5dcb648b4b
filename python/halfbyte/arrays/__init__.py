"""Quantize and dequantize numpy arrays, and read quantized checkpoints as numpy arrays. No torch.

The bytes are those that `halfbyte.functional` makes of tensors, and those of bitsandbytes.

>>> import numpy as np
>>> from halfbyte import arrays
>>> weight = np.linspace(-1, 1, 48 * 96, dtype=np.float32).reshape(48, 96)
>>> packed = arrays.quantize_4bit(weight, quant_type="nf4", nested=True)
>>> packed.codes.shape, packed.nbytes
((2304, 1), 2384)
>>> again = arrays.dequantize_4bit(packed)
>>> again.shape, again.dtype
((48, 96), dtype('float32'))

numpy has no bfloat16. Everywhere in this module a `uint16` array holds the bits of bfloat16 values; an array of
`ml_dtypes.bfloat16` is taken as well, and given where that dtype is asked for. Where no dtype is asked for, bfloat16
values are given as float32, which holds each of them exactly.
"""

from __future__ import annotations

from halfbyte.arrays.checkpoint import TensorInfo, iter_tensors, load_packed, load_tensor
from halfbyte.arrays.quantize import (
    PackedArray,
    dequantize_4bit,
    dequantize_blockwise,
    dequantize_rowwise,
    quantize_4bit,
    quantize_blockwise,
    quantize_rowwise,
)

__all__ = [
    "PackedArray",
    "TensorInfo",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_rowwise",
    "iter_tensors",
    "load_packed",
    "load_tensor",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_rowwise",
]
