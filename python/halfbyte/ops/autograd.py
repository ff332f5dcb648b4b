"""Derivatives of the operations, their batching rules, and the product with a packed weight.

A packed weight is constant: gradients go to the other factor and to the bias. The backward pass of a product keeps the
packed weight and its scales, which exist anyway, and nothing dense; the gradient of `x @ W.T` is a product with `W`
itself, `linear_4bit_backward`, whose own gradient is the forward product again.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import register_vmap

from halfbyte.ops._torch_internals import any_autocast, transforms
from halfbyte.ops.checks import DTypeError, check_out
from halfbyte.ops.dispatch import kernels_of, needs_op
from halfbyte.ops.dispatch import linear_4bit as linear_4bit_directly
from halfbyte.ops.packed import PackedWeight, Packing, packed_weight, plain_weight
from halfbyte.ops.registry import flatten, unflatten
from halfbyte.state import QuantState

_ops = torch.ops.halfbyte
# Takes half as long as `is_compiling`. Dynamo alone cannot trace the questions that follow; others run them, with
# modes that the answers tell of.
_is_compiling = torch.compiler.is_dynamo_compiling


# ---- derivatives -----------------------------------------------------------------------------------------------------
#
# The same formulas twice: registered with the operations, for whatever traces those; and as functions of autograd, for
# eager calls, since registered formulas do not compose with torch.func, and cost more.


def keep(ctx: Any, weight: PackedWeight, *others: Tensor | None) -> None:
    """Save a packed weight, and more, for a backward pass. Torch notices when its tensors have changed until then."""
    ctx.packing = weight.packing
    ctx.save_for_backward(*weight.tensors(), *others)


def kept_by(ctx: Any) -> tuple[PackedWeight, tuple[Any, ...]]:
    """What `keep` saved."""
    codes, absmax, absmax2, offset, *others = ctx.saved_tensors
    packing: Packing = ctx.packing
    if absmax is packing.absmax and absmax2 is packing.absmax2 and offset is packing.offset:
        return PackedWeight(codes, packing), others
    # Hooks of saved tensors, such as those that offload, give others.
    shape, blocksize, quant_type = packing.shape, packing.blocksize, packing.quant_type
    return packed_weight(codes, absmax, absmax2, offset, shape, blocksize, quant_type), others


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, bias = unflatten("linear_4bit", inputs)
    ctx.bias_dtype = None if bias is None else bias.dtype
    keep(ctx, weight)


def _setup_linear_both(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _setup_linear(ctx, inputs, output)
    ctx.save_for_forward(*inputs[1:5])


def _linear_tangent(ctx: Any, x: Tensor, *tangents: Any) -> Tensor:
    return _tangent(ctx, x, tangents[4])


def _tangent(ctx: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """Of the result, those of `x` and the bias being given; zeros where there is none."""
    y = product(x, kept_by(ctx)[0], None)
    return y if bias is None else y + bias.to(y.dtype)


def _bias_gradient(ctx: Any, grad: Tensor) -> Tensor:
    rows = tuple(range(grad.dim() - 1))
    # A sum over no dimension would be one over all.
    return grad.sum(rows, dtype=ctx.bias_dtype) if rows else grad.to(ctx.bias_dtype)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = input_gradient(grad, kept_by(ctx)[0]) if ctx.needs_input_grad[0] else None
    grad_bias = _bias_gradient(ctx, grad) if ctx.needs_input_grad[5] else None
    return grad_x, None, None, None, None, grad_bias, None, None, None


def _setup_linear_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight = unflatten("linear_4bit_backward", inputs)
    keep(ctx, weight)


def _linear_double_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_grad = None
    if ctx.needs_input_grad[0]:
        grad_grad = product(grad, kept_by(ctx)[0], None)
    return grad_grad, None, None, None, None, None, None, None


torch.library.register_autograd("halfbyte::linear_4bit", _linear_backward, setup_context=_setup_linear)
torch.library.register_autograd(
    "halfbyte::linear_4bit_backward", _linear_double_backward, setup_context=_setup_linear_backward
)


def product_now(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """`product` within an autograd.Function, where the derivative is being taken care of."""
    y = None if _is_compiling() else linear_4bit_directly(x, *weight, bias)
    if y is None:
        y = _ops.linear_4bit(*flatten("linear_4bit", (x, weight, bias)))
    return y


def input_gradient_now(grad: Tensor, weight: PackedWeight) -> Tensor:
    """`input_gradient` within an autograd.Function."""
    direct = kernels_of(grad, None, weight)
    if direct is None:
        y: Tensor = _ops.linear_4bit_backward(*flatten("linear_4bit_backward", (grad, weight)))
    else:
        y = direct.linear_4bit_backward(grad, plain_weight(weight))
    return y


class _Linear4bit(torch.autograd.Function):
    """`x @ W.T + bias` in eager mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: PackedWeight) -> Tensor:
        ctx.bias_dtype = None if bias is None else bias.dtype
        keep(ctx, weight)
        ctx.save_for_forward(*weight.tensors())
        return product_now(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = input_gradient(grad, kept_by(ctx)[0]) if ctx.needs_input_grad[0] else None
        return grad_x, _bias_gradient(ctx, grad) if ctx.needs_input_grad[1] else None, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor, bias: Tensor | None, weight: None) -> Tensor:
        return _tangent(ctx, x, bias)


class _InputGradient(torch.autograd.Function):
    """`grad @ W` in eager mode."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, weight: PackedWeight) -> Tensor:
        keep(ctx, weight)
        return input_gradient_now(grad, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return product(grad, kept_by(ctx)[0], None) if ctx.needs_input_grad[0] else None, None


class _FuncLinear4bit(torch.autograd.Function):
    """`_Linear4bit` in the form that torch.func asks for, which takes its time: tensors are arguments of their own."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return product_now(*unflatten("linear_4bit", args))

    setup_context = staticmethod(_setup_linear_both)
    backward = staticmethod(_linear_backward)
    jvp = staticmethod(_linear_tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        return _vmap_linear(_flat_product, info, in_dims, *args)


class _FuncInputGradient(torch.autograd.Function):
    """`_InputGradient` in the form that torch.func asks for."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return input_gradient_now(*unflatten("linear_4bit_backward", args))

    setup_context = staticmethod(_setup_linear_backward)
    backward = staticmethod(_linear_double_backward)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        return _vmap_linear_backward(_flat_input_gradient, info, in_dims, *args)


def product(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """`x @ W.T + bias` by the way that is right now; differentiable."""
    y = None if _is_compiling() else linear_4bit_directly(x, *weight, bias)
    return _product_of_torch(x, weight, bias) if y is None else y


def _product_of_torch(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    y: Tensor
    if needs_op():
        y = _ops.linear_4bit(*flatten("linear_4bit", (x, weight, bias)))
    elif transforms() is None:
        y = _Linear4bit.apply(x, bias, weight)
    else:
        y = _FuncLinear4bit.apply(*flatten("linear_4bit", (x, weight, bias)))
    return y


def input_gradient(grad: Tensor, weight: PackedWeight) -> Tensor:
    """`grad @ W` by the way that is right now; differentiable."""
    direct = kernels_of(grad, None, weight)
    y: Tensor
    if direct is not None:
        y = direct.linear_4bit_backward(grad, plain_weight(weight))
    elif needs_op():
        y = _ops.linear_4bit_backward(*flatten("linear_4bit_backward", (grad, weight)))
    elif transforms() is None:
        y = _InputGradient.apply(grad, weight)
    else:
        y = _FuncInputGradient.apply(*flatten("linear_4bit_backward", (grad, weight)))
    return y


def _flat_product(*args: Any) -> Tensor:
    return product(*unflatten("linear_4bit", args))


def _flat_input_gradient(*args: Any) -> Tensor:
    return input_gradient(*unflatten("linear_4bit_backward", args))


def _no_gradient(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError(f"halfbyte::{ctx.name} has no derivative: what it quantizes or reads is constant")


def _register_constant(name: str) -> None:
    """Outputs that no gradient flows through."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = name
        ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))

    torch.library.register_autograd(f"halfbyte::{name}", _no_gradient, setup_context=setup_context)


for _name in (
    "quantize_4bit",
    "quantize_4bit_nested",
    "dequantize_4bit",
    "compress_absmax",
    "expand_absmax",
    "quantize_blockwise",
    "dequantize_blockwise",
    "quantize_rows",
    "dequantize_rows",
    "embedding_4bit",
):
    _register_constant(_name)


# ---- torch.func.vmap -------------------------------------------------------------------------------------------------


def _batch_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _vmap_each(op: Any, info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """One call for each element of the batch: for batches of weights, which no kernel takes."""
    results = [
        op(*(a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(results[0], tuple):
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])
    return torch.stack(results), 0


def _vmap_linear(op: Any, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    x, packed, absmax, absmax2, offset, bias, *how = args
    if any(isinstance(d, int) for d in in_dims[1:5]):
        return _vmap_each(op, info, in_dims, args)
    x = _batch_first(x, in_dims[0], info.batch_size)
    if in_dims[5] is None:
        return op(x, packed, absmax, absmax2, offset, bias, *how), 0
    bias = bias.movedim(in_dims[5], 0)
    y = op(x, packed, absmax, absmax2, offset, None, *how)
    return (y + bias.view(bias.shape[0], *(1,) * (y.dim() - 2), bias.shape[1])).to(y.dtype), 0


def _vmap_linear_backward(op: Any, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    if any(isinstance(d, int) for d in in_dims[1:5]):
        return _vmap_each(op, info, in_dims, args)
    return op(args[0].movedim(in_dims[0], 0), *args[1:]), 0


def _vmap_embedding(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    if any(isinstance(d, int) for d in in_dims[1:5]):
        return _vmap_each(_ops.embedding_4bit, info, in_dims, args)
    return _ops.embedding_4bit(args[0].movedim(in_dims[0], 0), *args[1:]), 0


def _register_vmap_each(name: str) -> None:
    op = getattr(_ops, name)

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return _vmap_each(op, info, in_dims, args)

    register_vmap(f"halfbyte::{name}", rule)


register_vmap("halfbyte::linear_4bit", partial(_vmap_linear, _ops.linear_4bit))
register_vmap("halfbyte::linear_4bit_backward", partial(_vmap_linear_backward, _ops.linear_4bit_backward))
register_vmap("halfbyte::embedding_4bit", _vmap_embedding)
for _name in (
    "quantize_4bit",
    "quantize_4bit_nested",
    "dequantize_4bit",
    "compress_absmax",
    "expand_absmax",
    "quantize_blockwise",
    "dequantize_blockwise",
    "quantize_rows",
    "dequantize_rows",
):
    _register_vmap_each(_name)


# ---- the product -----------------------------------------------------------------------------------------------------


def linear_4bit(x: Tensor, packed: Tensor, state: QuantState, bias: Tensor | None) -> Tensor:
    """`x @ W.T + bias` in the dtype of `x`; differentiable.

    `packed` and `state` are the weight `[out_features, in_features]`; `x` is `[..., in_features]`.
    """
    y: Tensor | None = None
    if not _is_compiling():
        y = linear_4bit_directly(x, packed, state.packing(), bias)
    return _product_of_torch(x, state.packed(packed), bias) if y is None else y


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype of products with `tensor` under `torch.autocast`, or None outside of it."""
    if not _is_compiling() and not any_autocast():
        return None
    device = tensor.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def matmul_4bit(
    A: Tensor,
    B: Tensor,
    quant_state: QuantState,
    out: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply by a packed weight: `A @ W.T + bias`, without a dense copy of `W` being kept.

    Args:
        A: float16, bfloat16 or float32 `[..., in_features]`, of any strides.
        B: The packed weight: `quantize_4bit`'s first result, or that transposed.
        quant_state: Its state: `quantize_4bit`'s second result; its shape is `[out_features, in_features]`.
        out: Where to write the result; the gradient does not flow through it.
        bias: float16, bfloat16 or float32 `[out_features]`; added before the result is rounded.

    Returns:
        `[..., out_features]`, in the dtype of `A`, or in that of `torch.autocast` where it is enabled. Gradients go to
        `A` and `bias`.

    Raises:
        TypeError: A wrong type or dtype. The message names the argument and the legal ones.
        ValueError: Shapes, devices or a state that do not fit each other.

    A weight that was quantized as `[in_features, out_features]` is recognised when the two differ; such use is
    deprecated.

    >>> import torch, halfbyte
    >>> from halfbyte.functional import quantize_4bit, dequantize_4bit
    >>> x, w = torch.randn(2, 96), torch.randn(48, 96)
    >>> packed, state = quantize_4bit(w, quant_type="nf4")
    >>> y = halfbyte.matmul_4bit(x, packed, state)
    >>> torch.testing.assert_close(y, x @ dequantize_4bit(packed, state).T)
    """
    if not isinstance(quant_state, QuantState):
        kind = DTypeError if quant_state is None else TypeError
        raise kind(f"quant_state: {type(quant_state).__name__} is not a QuantState, as quantize_4bit returns")
    if not isinstance(A, Tensor):
        raise TypeError(f"A: {type(A).__name__} is not a torch.Tensor")
    dtype = autocast_dtype(A)
    if dtype is not None and A.is_floating_point():
        A = A.to(dtype)
    shape = _matrix(quant_state)
    rows, columns = shape
    features = A.shape[-1] if A.dim() else 0
    if features == rows and features != columns:
        if not torch.compiler.is_compiling():
            warnings.warn(
                f"matmul_4bit: the weight was quantized as [in_features, out_features], {list(shape)}. Re-quantize "
                "from the weight as [out_features, in_features]: this form will not be accepted forever.",
                DeprecationWarning,
                stacklevel=2,
            )
        result = input_gradient(A, quant_state.packed(B))
        if bias is not None:
            result = result + bias.to(result.dtype)
    else:
        result = linear_4bit(A, B, quant_state, bias)
    if out is None:
        return result
    return _write(out, result)


def _matrix(state: QuantState) -> tuple[int, ...]:
    shape, _, _ = state.weight()
    if len(shape) != 2:
        raise ValueError(f"quant_state.shape: {list(shape)} is not [out_features, in_features]")
    return shape


def _write(out: Tensor, result: Tensor) -> Tensor:
    check_out(out, result.shape, result.dtype, result.device)
    written: Tensor = out.copy_(result)
    return written
