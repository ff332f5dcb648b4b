"""The operations as torch sees them: `torch.ops.halfbyte.*`.

Here are schemas, fake kernels (what a traced or meta call returns), the registrations of `cpu` and `cuda`, and
`kernels`, through which eager calls go straight to a device's kernels. Kernels of another device are registered
likewise: one `_register` call. Derivatives and batching rules are in `halfbyte.ops.autograd`.

All operations are functional: no output shares memory with an input. A packed weight is several arguments: `packed`
(bytes viewed as any storage dtype), `absmax`, and `absmax2` and `offset` where the scales are nested; then its `shape`,
`blocksize` and `quant_type`.
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
from halfbyte.ops._torch_internals import (
    DisableTorchFunctionSubclass,
    dispatch_modes,
    forward_ad,
    function_modes,
    tracing,
    transforms,
)
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
    "linear_4bit": f"(Tensor x, {_WEIGHT}, Tensor? bias, SymInt[] shape, {_HOW}) -> Tensor",
    "linear_4bit_backward": f"(Tensor grad, {_WEIGHT}, SymInt[] shape, {_HOW}) -> Tensor",
    "embedding_4bit": f"(Tensor indices, {_WEIGHT}, SymInt[] shape, ScalarType dtype, {_HOW}) -> Tensor",
}
"""Each operation's arguments and results."""

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"halfbyte::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)


# ---- fake kernels ----------------------------------------------------------------------------------------------------


def _fake(name: str) -> Callable[[_Function], _Function]:
    """Register a function as what a traced or meta call of an operation returns."""

    def register(function: _Function) -> _Function:
        torch.library.register_fake(f"halfbyte::{name}", function)
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
def _dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocksize: int,
    quant_type: str,
) -> Tensor:
    check_weight(packed, absmax, absmax2, offset, shape, blocksize, quant_type)
    check_float("dtype", dtype)
    return packed.new_empty(shape, dtype=dtype)


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


@_fake("linear_4bit")
def _linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    shape: Sequence[int],
    blocksize: int,
    quant_type: str,
) -> Tensor:
    check_weight(packed, absmax, absmax2, offset, shape, blocksize, quant_type)
    check_product(x, "x", bias, shape, packed, 1)
    return x.new_empty((*x.shape[:-1], shape[0]))


@_fake("linear_4bit_backward")
def _linear_4bit_backward(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    blocksize: int,
    quant_type: str,
) -> Tensor:
    check_weight(packed, absmax, absmax2, offset, shape, blocksize, quant_type)
    check_product(grad, "grad", None, shape, packed, 0)
    return grad.new_empty((*grad.shape[:-1], shape[1]))


@_fake("embedding_4bit")
def _embedding_4bit(
    indices: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocksize: int,
    quant_type: str,
) -> Tensor:
    check_weight(packed, absmax, absmax2, offset, shape, blocksize, quant_type)
    check_embedding(indices, packed, shape, dtype)
    return packed.new_empty((*indices.shape, shape[1]), dtype=dtype)


# ---- devices ---------------------------------------------------------------------------------------------------------

_KERNELS: dict[str, ModuleType] = {}


def _register(device: str, kernels: ModuleType) -> None:
    """Make a module's functions, one for each operation and of its name, the kernels for tensors on `device`."""
    _KERNELS[device] = kernels
    for name in SCHEMAS:
        torch.library.impl(f"halfbyte::{name}", device, getattr(kernels, name))


_register("cpu", cpu)
# A ROCm build of torch calls its devices "cuda" too; the kernels are not for them.
if hasattr(_native, "cuda_quantize_4bit") and torch.version.hip is None:
    _register("cuda", cuda)


# ---- eager calls -----------------------------------------------------------------------------------------------------

# Tensors that have nothing to say about operations on them. `halfbyte.nn` adds its parameters.
PLAIN_TYPES: set[type] = {torch.Tensor, torch.nn.Parameter, type(None)}


def kernels(
    x: Tensor,
    factor: Tensor | None = None,
    first: Tensor | None = None,
    second: Tensor | None = None,
    third: Tensor | None = None,
    fourth: Tensor | None = None,
) -> ModuleType | None:
    """The kernels to call directly, or None where only the dispatcher does right.

    A call through torch's dispatcher costs more than a small product. It is needed where something listens or
    transforms (compiling, tracing, dispatch and function modes, `torch.func`), where tensors are subclasses or lazily
    negated views, and where a derivative is to be taken, with regard to `x` or `factor`. All others are constants.
    """
    plain = PLAIN_TYPES
    if (
        torch.compiler.is_compiling()
        or dispatch_modes()
        or function_modes()
        or transforms() is not None
        or tracing() is not None
        or type(x) not in plain
        or type(factor) not in plain
        or type(first) not in plain
        or type(second) not in plain
        or type(third) not in plain
        or type(fourth) not in plain
        or x.is_neg()
        or (factor is not None and factor.is_neg())
        # Forward-mode derivatives: tensors with a tangent look like others.
        or forward_ad._current_level >= 0
    ):
        return None
    if _is_grad_enabled() and (x.requires_grad or (factor is not None and factor.requires_grad)):
        return None
    # The device's name takes longer than this question.
    return cpu if x.is_cpu else _KERNELS.get(x.device.type)


_is_grad_enabled = torch.is_grad_enabled


def plain(tensor: Tensor) -> Tensor:
    """A parameter as the tensor that it is: what is asked of that takes no way round through the parameter's class."""
    if type(tensor) is Tensor:
        return tensor
    with DisableTorchFunctionSubclass():
        return tensor.data
