"""The operations as torch sees them: `torch.ops.halfbyte.*`.

Here are schemas, fake kernels (what a traced or meta call returns) and the registrations of `cpu` and `cuda`. Kernels
of another device are registered likewise: one `_register` call. How operations are called is in
`halfbyte.ops.dispatch`, derivatives and batching rules are in `halfbyte.ops.autograd`.

All operations are functional: no output shares memory with an input. A packed weight is several arguments: `packed`
(bytes viewed as any storage dtype), `absmax`, and `absmax2` and `offset` where the scales are nested; then its `shape`,
`blocksize` and `quant_type`. Kernels, and fake ones, take it as one `PackedWeight`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from halfbyte import _native
from halfbyte.backends import cpu, cuda
from halfbyte.ops.checks import (
    NESTED_BLOCKSIZE,
    blocks_of,
    check_compress,
    check_dequantize_blockwise,
    check_dequantize_rows,
    check_embedding,
    check_expand,
    check_float,
    check_product,
    check_quantize,
    check_quantize_blockwise,
    check_quantize_rows,
    check_weight,
    packed_bytes,
)
from halfbyte.ops.checks_8bit import (
    check_int8_matmul,
    check_int8_scaled_mm,
    check_linear_8bit,
    check_linear_8bit_backward,
    check_linear_8bit_trained,
    check_quantize_rows_outliers,
)
from halfbyte.ops.packed import PackedWeight, packed_weight

_Function = TypeVar("_Function", bound=Callable[..., Any])

_WEIGHT = "Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? offset"
_HOW = "int blocksize, str quant_type"

SCHEMAS = {
    "quantize_4bit": f"(Tensor input, {_HOW}) -> (Tensor, Tensor)",
    "quantize_4bit_nested": f"(Tensor input, {_HOW}) -> (Tensor, Tensor, Tensor, Tensor)",
    "dequantize_4bit": f"({_WEIGHT}, SymInt[] shape, ScalarType dtype, {_HOW}) -> Tensor",
    "compress_absmax": "(Tensor absmax) -> (Tensor, Tensor, Tensor)",
    "expand_absmax": "(Tensor codes, Tensor absmax2, Tensor offset) -> Tensor",
    "quantize_blockwise": "(Tensor input, Tensor code, int blocksize) -> (Tensor, Tensor)",
    "dequantize_blockwise": "(Tensor codes, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor",
    "quantize_rows": "(Tensor input) -> (Tensor, Tensor)",
    "dequantize_rows": "(Tensor codes, Tensor scales, ScalarType dtype) -> Tensor",
    "quantize_rows_outliers": "(Tensor input, float threshold) -> (Tensor, Tensor, Tensor)",
    "int8_matmul": "(Tensor a, Tensor b) -> Tensor",
    "int8_scaled_mm": (
        "(Tensor a, Tensor b, Tensor row_scales, Tensor column_scales, Tensor? bias, ScalarType dtype) -> Tensor"
    ),
    "linear_8bit": "(Tensor x, Tensor codes, Tensor scales, Tensor? bias, float threshold) -> Tensor",
    "linear_8bit_backward": "(Tensor grad, Tensor codes, Tensor scales) -> Tensor",
    "linear_4bit": f"(Tensor x, {_WEIGHT}, Tensor? bias, SymInt[] shape, {_HOW}) -> Tensor",
    "linear_4bit_backward": f"(Tensor grad, {_WEIGHT}, SymInt[] shape, {_HOW}) -> Tensor",
    "embedding_4bit": f"(Tensor indices, {_WEIGHT}, SymInt[] shape, ScalarType dtype, {_HOW}) -> Tensor",
}
"""Each operation's arguments and results."""

COMPOSED = {
    "linear_8bit_trained": (
        "(Tensor x, Tensor weight, Tensor codes, Tensor scales, Tensor? bias, float threshold) -> Tensor"
    ),
}
"""Operations that are made of others, and have derivatives of their own."""

for _name, _schema in {**SCHEMAS, **COMPOSED}.items():
    torch.library.define(f"halfbyte::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)


# ---- packed weights --------------------------------------------------------------------------------------------------

# Of operations with a packed weight: how many arguments come before it, and how many tensors and others after it.
_PLACES = {
    "dequantize_4bit": (0, 0, 1),
    "linear_4bit": (1, 1, 0),
    "linear_4bit_backward": (1, 0, 0),
    "embedding_4bit": (1, 0, 1),
}


def flatten(name: str, args: Sequence[Any]) -> tuple[Any, ...]:
    """Arguments as the schema has them, of those where the packed weight is one."""
    before, tensors, _ = _PLACES[name]
    weight: PackedWeight = args[before]
    shape, *how = weight.scalars()
    rest = args[before + 1 :]
    return *args[:before], *weight.tensors(), *rest[:tensors], shape, *rest[tensors:], *how


def unflatten(name: str, args: Sequence[Any]) -> tuple[Any, ...]:
    """The way back."""
    before, tensors, others = _PLACES[name]
    packed, absmax, absmax2, offset, *rest = args[before:]
    shape, (blocksize, quant_type) = rest[tensors], rest[tensors + 1 + others :]
    weight = packed_weight(packed, absmax, absmax2, offset, shape, blocksize, quant_type)
    return *args[:before], weight, *rest[:tensors], *rest[tensors + 1 : tensors + 1 + others]


def _flat(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a packed weight as one that takes the arguments of the schema."""
    if name not in _PLACES:
        return function
    names = [argument.rpartition(" ")[2] for argument in SCHEMAS[name].partition(")")[0].split(", ")]

    def call(*args: Any, **named: Any) -> Any:
        if named:
            args = *args, *(named[argument] for argument in names[len(args) :])
        return function(*unflatten(name, args))

    return call


# ---- fake kernels ----------------------------------------------------------------------------------------------------


def _fake(name: str) -> Callable[[_Function], _Function]:
    """Register a function as what a traced or meta call of an operation returns."""

    def register(function: _Function) -> _Function:
        torch.library.register_fake(f"halfbyte::{name}", _flat(name, function))
        return function

    return register


@_fake("quantize_4bit")
def _quantize_4bit(input: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    check_quantize(input, blocksize, quant_type)
    n = input.numel()
    return (
        input.new_empty((packed_bytes(n), 1), dtype=torch.uint8),
        input.new_empty(blocks_of(n, blocksize), dtype=torch.float32),
    )


@_fake("quantize_4bit_nested")
def _quantize_4bit_nested(input: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    packed, absmax = _quantize_4bit(input, blocksize, quant_type)
    return packed, *_compress_absmax(absmax)


@_fake("dequantize_4bit")
def _dequantize_4bit(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    check_weight(weight)
    check_float("dtype", dtype)
    return weight.codes.new_empty(weight.packing.shape, dtype=dtype)


@_fake("compress_absmax")
def _compress_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_compress(absmax)
    n = absmax.numel()
    return (
        absmax.new_empty(n, dtype=torch.uint8),
        absmax.new_empty(blocks_of(n, NESTED_BLOCKSIZE)),
        absmax.new_empty(()),
    )


@_fake("expand_absmax")
def _expand_absmax(codes: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
    check_expand(codes, absmax2, offset)
    return absmax2.new_empty(codes.numel())


@_fake("quantize_blockwise")
def _quantize_blockwise(input: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    check_quantize_blockwise(input, code, blocksize)
    return (
        input.new_empty(input.shape, dtype=torch.uint8),
        input.new_empty(blocks_of(input.numel(), blocksize), dtype=torch.float32),
    )


@_fake("dequantize_blockwise")
def _dequantize_blockwise(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    check_dequantize_blockwise(codes, absmax, code, blocksize, dtype)
    return codes.new_empty(codes.shape, dtype=dtype)


@_fake("quantize_rows")
def _quantize_rows(input: Tensor) -> tuple[Tensor, Tensor]:
    check_quantize_rows(input)
    return (
        input.new_empty(input.shape, dtype=torch.int8),
        input.new_empty(prod(input.shape[:-1]), dtype=torch.float32),
    )


@_fake("dequantize_rows")
def _dequantize_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    check_dequantize_rows(codes, scales, dtype)
    return codes.new_empty(codes.shape, dtype=dtype)


@_fake("quantize_rows_outliers")
def _quantize_rows_outliers(input: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    check_quantize_rows_outliers(input, threshold)
    return *_quantize_rows(input), input.new_empty(input.shape[-1], dtype=torch.bool)


@_fake("int8_matmul")
def _int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    check_int8_matmul(a, b)
    return a.new_empty((*a.shape[:-1], b.shape[0]), dtype=torch.int32)


@_fake("int8_scaled_mm")
def _int8_scaled_mm(
    a: Tensor, b: Tensor, row_scales: Tensor, column_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    check_int8_scaled_mm(a, b, row_scales, column_scales, bias, dtype)
    return a.new_empty((*a.shape[:-1], b.shape[0]), dtype=dtype)


@_fake("linear_8bit")
def _linear_8bit(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    check_linear_8bit(x, codes, scales, bias, threshold)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@_fake("linear_8bit_backward")
def _linear_8bit_backward(grad: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    check_linear_8bit_backward(grad, codes, scales)
    return grad.new_empty((*grad.shape[:-1], codes.shape[1]))


@_fake("linear_8bit_trained")
def _linear_8bit_trained(
    x: Tensor, weight: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, threshold: float
) -> Tensor:
    check_linear_8bit_trained(x, weight, codes, scales, bias, threshold)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.impl("halfbyte::linear_8bit_trained", "default")  # type: ignore[untyped-decorator, unused-ignore]
def _linear_8bit_trained_now(
    x: Tensor, weight: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, threshold: float
) -> Tensor:
    """`linear_8bit` with the codes of a float weight, which gets a gradient."""
    check_linear_8bit_trained(x, weight, codes, scales, bias, threshold)
    y: Tensor = torch.ops.halfbyte.linear_8bit(x, codes, scales, bias, threshold)
    return y


@_fake("linear_4bit")
def _linear_4bit(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    check_weight(weight)
    check_product(x, "x", bias, weight, 1)
    return x.new_empty((*x.shape[:-1], weight.packing.shape[0]))


@_fake("linear_4bit_backward")
def _linear_4bit_backward(grad: Tensor, weight: PackedWeight) -> Tensor:
    check_weight(weight)
    check_product(grad, "grad", None, weight, 0)
    return grad.new_empty((*grad.shape[:-1], weight.packing.shape[1]))


@_fake("embedding_4bit")
def _embedding_4bit(indices: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    check_weight(weight)
    check_embedding(indices, weight, dtype)
    return weight.codes.new_empty((*indices.shape, weight.packing.shape[1]), dtype=dtype)


# ---- devices ---------------------------------------------------------------------------------------------------------

KERNELS: dict[str, ModuleType] = {}


def _register(device: str, kernels: ModuleType) -> None:
    """Make a module's functions, one for each operation and of its name, the kernels for tensors on `device`."""
    KERNELS[device] = kernels
    for name in SCHEMAS:
        torch.library.impl(f"halfbyte::{name}", device, _flat(name, getattr(kernels, name)))


_register("cpu", cpu)
# A ROCm build of torch calls its devices "cuda" too; the kernels are not for them.
if hasattr(_native, "cuda_quantize_4bit") and torch.version.hip is None:
    _register("cuda", cuda)
