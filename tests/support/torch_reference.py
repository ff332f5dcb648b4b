"""The arithmetic of the format for torch tensors: `reference` by way of numpy, nothing of halfbyte's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import reference
import torch
from torch import Tensor


@dataclass
class Quantized:
    """What quantizing a tensor gives, as plain tensors."""

    packed: Tensor
    """uint8 [ceil(n / 2)]."""
    absmax: Tensor
    """float32 [blocks], or uint8 when nested."""
    absmax2: Tensor | None
    offset: float | None
    values: Tensor
    """What the codes stand for, in the shape and dtype of the tensor."""


def to_numpy(tensor: Tensor) -> np.ndarray:
    """The exact float32 values of a tensor, flat, in row-major order."""
    return tensor.detach().to(torch.float32).reshape(-1).numpy()


def quantize_4bit(tensor: Tensor, quant_type: str, blocksize: int = 64, nested: bool = False) -> Quantized:
    """Quantize, and dequantize again."""
    values = to_numpy(tensor)
    packed, absmax = reference.quantize_4bit(values, quant_type, blocksize)
    if nested:
        second = reference.compress_absmax(absmax)
        scales = reference.expand_absmax(second)
        kept = torch.from_numpy(second.codes), torch.from_numpy(second.absmax), float(second.offset)
    else:
        scales, kept = absmax, (torch.from_numpy(absmax), None, None)
    again = reference.dequantize_4bit(packed, scales, values.size, quant_type, blocksize, "float32")
    dense = torch.from_numpy(np.ascontiguousarray(again)).reshape(tensor.shape).to(tensor.dtype)
    return Quantized(torch.from_numpy(packed), *kept, dense)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` in float64."""
    y = x.detach().double() @ weight.detach().double().T
    return y if bias is None else y + bias.detach().double()


def product_bound(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """How far a product computed in the dtype of `x` may be from `linear`'s, element by element.

    Every product and every sum rounds once; inputs and result are rounded to the dtype. The bound is that of a sum in
    any order, a few units in the last place of the sum of magnitudes.
    """
    magnitude = x.detach().double().abs() @ weight.detach().double().abs().T
    if bias is not None:
        magnitude = magnitude + bias.detach().double().abs()
    unit = torch.finfo(x.dtype).eps
    sums = (x.shape[-1] + 8) * torch.finfo(torch.float32).eps
    return magnitude * (2 * unit + sums) + 1e-30
