"""Derivatives and batching rules of LLM.int8()'s operations, and the product with a weight of 8-bit rows.

Such a weight is constant. The gradient of `x @ W.T` with regard to `x` is the plain product with `W`, as read from its
codes: that the rows of `x` were quantized too is passed over. A float weight that is quantized anew for each forward
pass has a gradient, the plain product of the other two.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.library import register_vmap

from halfbyte.backends.int8_torch import product as matmul
from halfbyte.ops._torch_internals import any_autocast, transforms
from halfbyte.ops.autograd import _batch_first, _bias_gradient, _register_constant, _register_vmap_each, _vmap_each
from halfbyte.ops.dispatch import kernels, needs_op
from halfbyte.ops.packed import plain

_ops = torch.ops.halfbyte


# ---- the product -----------------------------------------------------------------------------------------------------


def product(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """`x @ W.T + bias` by the way that is right now; differentiable."""
    direct = kernels(x, bias, codes, scales)
    y: Tensor
    if direct is not None:
        y = direct.linear_8bit(x, plain(codes), scales, bias, threshold)
    elif needs_op():
        y = _ops.linear_8bit(x, codes, scales, bias, threshold)
    elif transforms() is None:
        y = _Linear8bit.apply(x, bias, codes, scales, threshold)
    else:
        y = _FuncLinear8bit.apply(x, codes, scales, bias, threshold)
    return y


def input_gradient(grad: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """`grad @ W` by the way that is right now; differentiable."""
    direct = kernels(grad, None, codes, scales)
    y: Tensor
    if direct is not None:
        y = direct.linear_8bit_backward(grad, plain(codes), scales)
    elif needs_op():
        y = _ops.linear_8bit_backward(grad, codes, scales)
    elif transforms() is None:
        y = _InputGradient.apply(grad, codes, scales)
    else:
        y = _FuncInputGradient.apply(grad, codes, scales)
    return y


def _product_now(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """`product` within an autograd.Function, where the derivative is being taken care of."""
    direct = kernels(x, bias, codes, scales)
    y: Tensor
    if direct is None:
        y = _ops.linear_8bit(x, codes, scales, bias, threshold)
    else:
        y = direct.linear_8bit(x, plain(codes), scales, bias, threshold)
    return y


def _input_gradient_now(grad: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """`input_gradient` within an autograd.Function."""
    direct = kernels(grad, None, codes, scales)
    y: Tensor
    if direct is None:
        y = _ops.linear_8bit_backward(grad, codes, scales)
    else:
        y = direct.linear_8bit_backward(grad, plain(codes), scales)
    return y


def _plain_product(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ W.T`, without quantizing `x`: the derivative of `input_gradient`, and of `product` in the direction `x`."""
    weight = _ops.dequantize_rows(codes, scales, x.dtype)
    if bias is None:
        return matmul(x, weight.t())
    if any_autocast():
        return matmul(x, weight.t()) + bias.to(x.dtype)
    # One operation, which compilers do not take apart and round otherwise.
    return torch.nn.functional.linear(x, weight, bias.to(x.dtype))


# ---- derivatives -----------------------------------------------------------------------------------------------------
#
# Twice, as those of the 4-bit product: see `halfbyte.ops.autograd`.


def _tangent(ctx: Any, x: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Of the result, those of `x` and the bias being given."""
    y = None if x is None else _plain_product(x, *ctx.saved_tensors)
    if bias is None:
        return y
    return bias.to(ctx.dtype).expand(ctx.shape) if y is None else y + bias.to(y.dtype)


def _remember(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> None:
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.dtype, ctx.shape = x.dtype, (*x.shape[:-1], codes.shape[0])
    ctx.save_for_backward(codes, scales)


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scales, bias, _ = inputs
    _remember(ctx, x, codes, scales, bias)


def _setup_linear_both(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _setup_linear(ctx, inputs, output)
    ctx.save_for_forward(*inputs[1:3])


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = input_gradient(grad, *ctx.saved_tensors) if ctx.needs_input_grad[0] else None
    return grad_x, None, None, _bias_gradient(ctx, grad) if ctx.needs_input_grad[3] else None, None


def _setup_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _setup_gradient_both(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _setup_gradient(ctx, inputs, output)
    ctx.save_for_forward(*inputs[1:])


def _gradient_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _plain_product(grad, *ctx.saved_tensors) if ctx.needs_input_grad[0] else None, None, None


torch.library.register_autograd("halfbyte::linear_8bit", _linear_backward, setup_context=_setup_linear)
torch.library.register_autograd("halfbyte::linear_8bit_backward", _gradient_backward, setup_context=_setup_gradient)


class _Linear8bit(torch.autograd.Function):
    """`x @ W.T + bias` in eager mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, codes: Tensor, scales: Tensor, threshold: float) -> Tensor:
        _remember(ctx, x, codes, scales, bias)
        ctx.save_for_forward(codes, scales)
        return _product_now(x, codes, scales, bias, threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = input_gradient(grad, *ctx.saved_tensors) if ctx.needs_input_grad[0] else None
        return grad_x, _bias_gradient(ctx, grad) if ctx.needs_input_grad[1] else None, None, None, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, bias: Tensor | None, *constants: Any) -> Tensor | None:
        return _tangent(ctx, x, bias)


class _InputGradient(torch.autograd.Function):
    """`grad @ W` in eager mode."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return _input_gradient_now(grad, codes, scales)

    backward = staticmethod(_gradient_backward)


class _FuncLinear8bit(torch.autograd.Function):
    """`_Linear8bit` in the form that torch.func asks for, which takes its time."""

    @staticmethod
    def forward(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
        return _product_now(x, codes, scales, bias, threshold)

    setup_context = staticmethod(_setup_linear_both)
    backward = staticmethod(_linear_backward)

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, codes: None, scales: None, bias: Tensor | None, threshold: None) -> Any:
        return _tangent(ctx, x, bias)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        return _vmap_linear(product, info, in_dims, *args)


class _FuncInputGradient(torch.autograd.Function):
    """`_InputGradient` in the form that torch.func asks for."""

    @staticmethod
    def forward(grad: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        return _input_gradient_now(grad, codes, scales)

    setup_context = staticmethod(_setup_gradient_both)
    backward = staticmethod(_gradient_backward)

    @staticmethod
    def jvp(ctx: Any, grad: Tensor, codes: None, scales: None) -> Tensor:
        return input_gradient(grad, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        return _vmap_gradient(input_gradient, info, in_dims, *args)


class _DenseLinear8bit(torch.autograd.Function):
    """`dense_product` in eager mode and in compilers. Nothing dense is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, codes: Tensor, scales: Tensor) -> Tensor:
        _remember(ctx, x, codes, scales, bias)
        return _plain_product(x, codes, scales, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = input_gradient(grad, *ctx.saved_tensors) if ctx.needs_input_grad[0] else None
        return grad_x, _bias_gradient(ctx, grad) if ctx.needs_input_grad[1] else None, None, None


def dense_product(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ W.T + bias` without quantizing `x`, as bitsandbytes trains on a CPU; differentiable."""
    if transforms() is not None:
        return _plain_product(x, codes, scales, bias)
    y: Tensor = _DenseLinear8bit.apply(x, bias, codes, scales)
    return y


for _name in ("quantize_rows_outliers", "int8_matmul", "int8_scaled_mm"):
    _register_constant(_name)


# ---- float weights that are quantized for each pass ------------------------------------------------------------------


def trained_product(
    x: Tensor, weight: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, threshold: float
) -> Tensor:
    """`product` with the codes and scales of a float weight, which gets the gradient of the plain product."""
    y: Tensor
    if needs_op():
        y = _ops.linear_8bit_trained(x, weight, codes, scales, bias, threshold)
    else:
        y = _Linear8bitTrained.apply(x, weight, codes, scales, bias, threshold)
    return y


def _setup_trained(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, codes, scales, bias, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.weight_dtype = weight.dtype
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, codes, scales)


def _setup_trained_both(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _setup_trained(ctx, inputs, output)
    ctx.save_for_forward(inputs[0], *inputs[2:4])


def _trained_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, codes, scales = ctx.saved_tensors
    grad_x = input_gradient(grad, codes, scales) if ctx.needs_input_grad[0] else None
    grad_weight = None
    if ctx.needs_input_grad[1]:
        rows = prod(grad.shape[:-1])
        grad_weight = matmul(grad.reshape(rows, grad.shape[-1]).t(), x.reshape(rows, x.shape[-1])).to(ctx.weight_dtype)
    grad_bias = _bias_gradient(ctx, grad) if ctx.needs_input_grad[4] else None
    return grad_x, grad_weight, None, None, grad_bias, None


torch.library.register_autograd("halfbyte::linear_8bit_trained", _trained_backward, setup_context=_setup_trained)


class _Linear8bitTrained(torch.autograd.Function):
    """`trained_product` outside of compilers."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, threshold: float
    ) -> Tensor:
        return _product_now(x, codes, scales, bias, threshold)

    setup_context = staticmethod(_setup_trained_both)
    backward = staticmethod(_trained_backward)

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, weight: Tensor | None, *others: Any) -> Tensor | None:
        factor, codes, scales = ctx.saved_tensors
        parts = [] if x is None else [_plain_product(x, codes, scales)]
        if weight is not None:
            parts.append(matmul(factor, weight.to(factor.dtype).t()))
        if others[2] is not None:
            parts.append(others[2].to(factor.dtype).expand(*factor.shape[:-1], codes.shape[0]))
        return sum(parts[1:], parts[0]) if parts else None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        each: tuple[Tensor, int] = _vmap_each(trained_product, info, in_dims, args)
        return each


# ---- torch.func.vmap -------------------------------------------------------------------------------------------------


def _vmap_linear(op: Any, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    x, codes, scales, bias, threshold = args
    if threshold > 0 or any(isinstance(d, int) for d in in_dims[1:4]):
        # Which columns are outliers depends on all rows of a call.
        each: tuple[Tensor, int] = _vmap_each(op, info, in_dims, args)
        return each
    return op(_batch_first(x, in_dims[0], info.batch_size), codes, scales, bias, threshold), 0


def _vmap_gradient(op: Any, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    if any(isinstance(d, int) for d in in_dims[1:3]):
        each: tuple[Tensor, int] = _vmap_each(op, info, in_dims, args)
        return each
    return op(args[0].movedim(in_dims[0], 0), *args[1:]), 0


def _rule(vmap: Any, op: Any) -> Any:
    return lambda info, in_dims, *args: vmap(op, info, in_dims, *args)


register_vmap("halfbyte::linear_8bit", _rule(_vmap_linear, _ops.linear_8bit))
register_vmap("halfbyte::linear_8bit_backward", _rule(_vmap_gradient, _ops.linear_8bit_backward))
for _name in ("quantize_rows_outliers", "int8_matmul", "int8_scaled_mm", "linear_8bit_trained"):
    _register_vmap_each(_name)
