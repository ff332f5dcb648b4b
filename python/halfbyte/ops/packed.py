"""A packed 4-bit weight as one value: codes, and how they are read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from halfbyte import _native
from halfbyte.ops._torch_internals import DisableTorchFunctionSubclass

Tensors: TypeAlias = "tuple[Tensor, Tensor, Tensor | None, Tensor | None]"
Scalars: TypeAlias = tuple[tuple[int, ...], int, str]


class Memo:
    """What is known of a packing from one call to the next.

    Nothing is remembered of strides: back ends make contiguous what native code reads, in each call.

    Attributes:
        addresses: Of `absmax`, `absmax2` and `offset` when they were checked; 0 where there is none.
        sizes: Their numbers of elements.
        codes: What was checked of the codes: number, dtype, and the index of their device, None for the CPU.
        linear: The CPU's products with such a weight, once there was one.
    """

    __slots__ = ("addresses", "codes", "linear", "sizes")

    def __init__(self) -> None:
        self.addresses: tuple[int, int, int] | None = None
        self.sizes = (0, 0, 0)
        self.codes: tuple[object, ...] = ()
        self.linear: _native.CpuLinear | None = None


class Packing(NamedTuple):
    """How codes are read: everything of a packed weight but the codes. The compiled core knows the order.

    Attributes:
        absmax: Scales, float32 `[blocks]`; or uint8 codes of them when they are nested.
        absmax2: When nested, the scales of the scales, float32 `[ceil(blocks / 256)]`.
        offset: When nested, what was subtracted from the scales: float32 `[]`.
        shape: Of the tensor that was quantized.
        blocksize: How many consecutive values share a scale.
        quant_type: "nf4" or "fp4".
        memo: What checks and back ends remember of it, so that a weight that is used again costs less; None for a
            packing that is made for a single call.
    """

    absmax: Tensor
    absmax2: Tensor | None
    offset: Tensor | None
    shape: tuple[int, ...]
    blocksize: int
    quant_type: str
    memo: Memo | None = None


class PackedWeight(NamedTuple):
    """Codes (bytes viewed as any storage dtype) and their packing.

    Immutable. A tuple and no dataclass, since one is made for each call: that takes half the time, and the compilers of
    all releases of torch know tuples.
    """

    codes: Tensor
    packing: Packing

    def tensors(self) -> Tensors:
        """`packed, absmax, absmax2, offset`, as in the operations' schemas."""
        packing = self.packing
        return self.codes, packing.absmax, packing.absmax2, packing.offset

    def scalars(self) -> Scalars:
        """`shape, blocksize, quant_type`, as in the operations' schemas."""
        packing = self.packing
        return packing.shape, packing.blocksize, packing.quant_type


packed_pair: Callable[[tuple[Tensor, Packing]], PackedWeight] = partial(tuple.__new__, PackedWeight)
"""`PackedWeight` of its two parts, without a Python function in between: for calls that compute little else."""


def plain(tensor: Tensor) -> Tensor:
    """A parameter as the tensor that it is: what is asked of that takes no way round through the parameter's class."""
    if type(tensor) is Tensor:
        return tensor
    with DisableTorchFunctionSubclass():
        return tensor.data


def plain_weight(weight: PackedWeight) -> PackedWeight:
    """The same weight, its codes being a plain tensor."""
    codes, packing = weight
    return weight if type(codes) is Tensor else packed_pair((plain(codes), packing))


def packed_weight(
    codes: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    shape: Any,
    blocksize: int,
    quant_type: str,
) -> PackedWeight:
    """One value of what is several in the operations' schemas."""
    return PackedWeight(codes, Packing(absmax, absmax2, offset, shape, blocksize, quant_type))
