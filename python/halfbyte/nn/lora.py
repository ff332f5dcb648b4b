"""A 4-bit linear layer and its LoRA adapters as one differentiable product.

    y = x Wᵀ + b + Σ s · (x Aᵀ) Bᵀ

Module by module, each adapter costs a clone of the base output, a scaling, an addition and casts of whole activations,
forward and backward. Here the small products accumulate into the output of the base product, and the scaling is a
factor of that accumulation:

    h  = x Aᵀ          y  += s · h Bᵀ                         forward; h is rows x rank
    gh = g B           gx += s · gh A                         backward, after gx = g W
                       gB  = s · gᵀ h         gA = s · ghᵀ x

On a GPU each of the four products of rows is one launch, together with the casts around it and the addition
(`halfbyte.backends.cuda_lora`); elsewhere what changes dtype is A and B, which are small. x and g are cast where the
base product casts them anyway.

**Precision.** Sums are kept in the dtype of the output, not of the products: with a float32 residual stream under
autocast, contributions of an adapter that is new would vanish in a 16-bit sum. Gradients of A and B leave the products
in the dtype of A and B where the device can do that.

**Memory.** For backward are kept x in the dtype of the product (once for all layers that read the same x), h, and the
casts of A and B where there are any. The weight stays packed.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from halfbyte.backends import cuda_lora
from halfbyte.ops._torch_internals import any_autocast, current_stream
from halfbyte.ops.autograd import input_gradient_now, keep, kept_by, linear_4bit, product_now
from halfbyte.ops.dispatch import PLAIN_TYPES, transformed
from halfbyte.ops.packed import PackedWeight
from halfbyte.state import QuantState


class Adapter(NamedTuple):
    """One LoRA adapter of a linear layer `[out_features, in_features]`.

    Attributes:
        A: `[rank, in_features]`.
        B: `[out_features, rank]`.
        scaling: The factor of the adapter's output.
        x: The adapter's own input, like that of the layer: after dropout. None where it is the layer's input.
    """

    A: Tensor
    B: Tensor
    scaling: float
    x: Tensor | None = None


def lora_linear_4bit(
    x: Tensor,
    packed: Tensor,
    state: QuantState,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    compute_dtype: torch.dtype,
) -> Tensor:
    """The product of `x` with a packed weight and any number of adapters.

    Gradients go to `x`, the adapters' inputs, A and B, and `bias`. In eager mode they cannot be differentiated again.

    Args:
        x: float16, bfloat16 or float32 `[..., in_features]`.
        packed: The packed weight.
        state: Its state; its shape is `[out_features, in_features]`.
        bias: `[out_features]`, or None.
        adapters: The adapters to add; A and B of any of the three dtypes, on the device of `x`.
        compute_dtype: Of the product with the weight, and on a GPU of the adapters' products: one of the three. On a
            CPU the adapters' products are computed in float32, since few CPUs multiply 16-bit numbers.

    Returns:
        `[..., out_features]` in the dtype of `x`.

    Raises:
        ValueError: Shapes or devices of `x`, the weight and the adapters do not fit each other.

    >>> import torch
    >>> from halfbyte.functional import dequantize_4bit, quantize_4bit
    >>> from halfbyte.nn.lora import Adapter, lora_linear_4bit
    >>> x, w, a, b = torch.randn(2, 96), torch.randn(48, 96), torch.randn(4, 96), torch.randn(48, 4)
    >>> packed, state = quantize_4bit(w, quant_type="nf4")
    >>> y = lora_linear_4bit(x, packed, state, None, [Adapter(a, b, 0.5)], torch.float32)
    >>> torch.testing.assert_close(y, x @ (dequantize_4bit(packed, state) + 0.5 * b @ a).T)
    """
    _check(x, state, adapters)
    low = _low_dtype(x, compute_dtype)
    # Nothing of all this has a rule for autograd.Function as it is used here.
    if transformed() or type(x) not in PLAIN_TYPES:
        return _traceable(x, packed, state, bias, adapters, compute_dtype, low)
    factors = [tensor for adapter in adapters for tensor in (adapter.x, adapter.A, adapter.B)]
    weight = state.packed(packed)
    kernels = [
        type(A) in PLAIN_TYPES and type(B) in PLAIN_TYPES and cuda_lora.takes(A, B, low) for A, B, _, _ in adapters
    ]
    first = None
    if adapters and kernels[0] and adapters[0].x is None:
        # Where x is still to be cast, the first product comes with that.
        cast, first = _cast_and_down(x, adapters[0].A, low)
    else:
        cast = _cast_once(x, compute_dtype)
    call = _Call(low, [adapter.scaling for adapter in adapters], kernels, first)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (bias is not None and bias.requires_grad)
        or any(factor is not None and factor.requires_grad for factor in factors)
    ):
        y: Tensor = _LoraLinear4bit.apply(x, cast, call, weight, bias, *factors)
        return y
    y, _ = _products(x, cast, call, False, weight, bias, *factors)
    return y


def _check(x: Tensor, state: QuantState, adapters: Sequence[Adapter]) -> None:
    shape = state.shape
    if shape is None or len(shape) != 2:
        return  # The product says so.
    for A, B, _, own in adapters:
        if A.dim() != 2 or A.shape[1] != shape[1]:
            raise ValueError(f"adapters: A is {list(A.shape)}, not [rank, {shape[1]}] as the weight wants it")
        if B.shape != (shape[0], A.shape[0]):
            raise ValueError(
                f"adapters: B is {list(B.shape)}, not {[shape[0], A.shape[0]]} as the weight and A want it"
            )
        if own is not None and own.shape != x.shape:
            raise ValueError(f"adapters: x is {list(own.shape)}, not {list(x.shape)} as the input of the layer")
        for name, part in (("A", A), ("B", B), ("x", own)):
            if part is not None and part.get_device() != x.get_device():
                raise ValueError(f"adapters: {name} is on {part.device}, not on {x.device} as the input of the layer")


class _Call(NamedTuple):
    """What one call knows besides tensors."""

    low: torch.dtype
    scalings: list[float]
    kernels: list[bool]
    """Of each adapter, whether `cuda_lora` has kernels for it."""
    first: Tensor | None
    """The first adapter's `x Aᵀ`, if that is known."""


def _low_dtype(x: Tensor, compute_dtype: torch.dtype) -> torch.dtype:
    """The dtype of the products with A and B."""
    return torch.float32 if x.is_cpu else compute_dtype


def _traceable(
    x: Tensor,
    packed: Tensor,
    state: QuantState,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    compute_dtype: torch.dtype,
    low: torch.dtype,
) -> Tensor:
    """The same in operations that compilers fuse, and transformations have rules for."""
    linear = torch.nn.functional.linear
    y = linear_4bit(x.to(compute_dtype), packed, state, bias)
    y = y.to(_sum_dtype(compute_dtype, x.dtype))
    for adapter in adapters:
        given = (x if adapter.x is None else adapter.x).to(low)
        product = linear(linear(given, adapter.A.to(low)), adapter.B.to(low))
        y = torch.add(y, product, alpha=adapter.scaling).to(y.dtype)
    return y.to(x.dtype)


# ---- eager -----------------------------------------------------------------------------------------------------------


def _products(
    x: Tensor,
    cast: Tensor,
    call: _Call,
    keeps: bool,
    weight: PackedWeight,
    bias: Tensor | None,
    *factors: Tensor | None,
) -> tuple[Tensor, list[Any]]:
    """The output, and for each adapter its input, A and B in the dtype of its products, and `x Aᵀ`.

    By `cuda_lora`, A is in its own dtype, and B the other way round, if it `keeps` them for a backward pass.
    """
    y = total = product_now(cast, weight, bias)
    dtype, low = x.dtype, call.low
    summed = _sum_dtype(cast.dtype, dtype)
    shared = None
    kept = []
    for i, scaling in enumerate(call.scalings):
        given: Any
        A: Any
        B: Any
        h: Tensor
        given, A, B = factors[3 * i : 3 * i + 3]
        if call.kernels[i]:
            if i == 0 and call.first is not None:
                given, h = cast, call.first
            else:
                given, h = cuda_lora.down(cast if given is None else given, A, low)
            turned = B.new_empty(B.shape[1], B.shape[0], dtype=low) if keeps else None
            total, B = cuda_lora.up(total, h, B, True, scaling, summed, turned), turned
        else:
            if given is not None:
                given = _rows(_to(given, low))
            else:
                if shared is None:
                    shared = _rows(cast if cast.dtype is low else _to(x, low))
                given = shared
            A, B = _to(A, low), _to(B, low)
            h = _product(given, A.t())
            total = _add_product(_rows(total), h, B.t(), scaling, summed)
        kept += [given, A, B, h]
    total = _to(total, dtype)
    # Not a view to autograd, since those that autograd.Function returns must not be changed in place.
    return total if total.dim() == y.dim() else _unsafe_view(total, y.shape), kept


class _LoraLinear4bit(torch.autograd.Function):
    """`lora_linear_4bit` in eager mode. `cast` is `x` in the compute dtype, and has no gradient of its own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cast: Tensor, call: _Call, weight: PackedWeight, bias: Tensor | None, *factors: Any
    ) -> Tensor:
        y, kept = _products(x, cast, call, True, weight, bias, *factors)
        needs = ctx.needs_input_grad
        for i in range(len(call.scalings)):
            # The input is wanted by the gradient of A alone, `x Aᵀ` by that of B.
            if not needs[6 + 3 * i]:
                kept[4 * i] = None
            if not needs[7 + 3 * i]:
                kept[4 * i + 3] = None
        dtypes = [None if tensor is None else tensor.dtype for tensor in (x, cast, bias, *factors)]
        ctx.known = call._replace(first=None), x.shape, dtypes
        keep(ctx, weight, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # The decorated function costs more, and says that there are no gradients of gradients.
        found: tuple[Any, ...] = _once(ctx, grad) if torch.is_grad_enabled() else _gradients(ctx, grad)
        return found


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Of all inputs of `_LoraLinear4bit`."""
    weight, kept = kept_by(ctx)
    call: _Call
    call, shape, (dtype, compute, bias_dtype, *dtypes) = ctx.known
    low, needs = call.low, ctx.needs_input_grad
    first = None
    if call.kernels and call.kernels[0] and (needs[0] or needs[5] or needs[6]):
        # `compute` is `low`.
        cast, first = cuda_lora.down(grad, kept[2], low)
        g = _rows(cast)
    else:
        cast = _to(grad, compute).contiguous()
        g = _rows(cast if low is compute else _to(grad, low))
    grad_x = grad_bias = None
    if needs[0]:
        grad_x = input_gradient_now(cast, weight)
    if needs[4]:
        grad_bias = _rows(grad).sum(0, dtype=bias_dtype)
    summed = _sum_dtype(compute, dtype)
    grads: list[Tensor | None] = []
    for i, scaling in enumerate(call.scalings):
        given, A, B, h = kept[4 * i : 4 * i + 4]
        own_dtype, A_dtype, B_dtype = dtypes[3 * i : 3 * i + 3]
        needs_own, needs_A, needs_B = needs[5 + 3 * i : 8 + 3 * i]
        into_x = own_dtype is None and grad_x is not None
        own = grad_A = grad_B = None
        if needs_A or needs_own or into_x:
            if not call.kernels[i]:
                gh = _product(g, B)
            elif i == 0 and first is not None:
                gh = first
            else:
                gh = cuda_lora.down(cast, B, low)[1]
            if grad_x is not None and into_x:
                if call.kernels[i]:
                    grad_x = cuda_lora.up(grad_x, gh, A, False, scaling, summed)
                else:
                    grad_x = _add_product(_rows(grad_x), gh, A, scaling, summed)
            if needs_own:
                if call.kernels[i]:
                    own = cuda_lora.product(gh, A, False, scaling, _sum_dtype(low, own_dtype))
                else:
                    own = _product(gh, A, scaling)
                own = _to(own, own_dtype).view(*shape)
            if needs_A:
                grad_A = _product(gh.t(), _rows(given), scaling, A_dtype)
        if needs_B:
            grad_B = _product(g.t(), h, scaling, B_dtype)
        grads += [own, grad_A, grad_B]
    if grad_x is not None:
        grad_x = _to(grad_x, dtype)
        if grad_x.dim() != len(shape):
            grad_x = grad_x.view(shape)
    return grad_x, None, None, None, grad_bias, *grads


_unsafe_view = torch.ops.aten._unsafe_view.default
_once = once_differentiable(_gradients)


# ---- products --------------------------------------------------------------------------------------------------------
#
# Autocast leaves in-place and `out_dtype` forms alone. What is asked for twice in Python is not asked for: a step of a
# small batch waits for the host.


def _rows(tensor: Tensor) -> Tensor:
    """A matrix of all rows."""
    dims = tensor.dim()
    if dims == 2:
        return tensor
    return tensor.flatten(0, -2) if dims > 2 else tensor.unsqueeze(0)


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _sum_dtype(compute: torch.dtype, result: torch.dtype) -> torch.dtype:
    """In which a result of this dtype is summed up from products computed in the other."""
    return torch.float32 if torch.float32 in (compute, result) else compute


def _product(a: Tensor, b: Tensor, scaling: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    """`scaling · a @ b`, in `dtype` where given."""
    if dtype is torch.float32 and _widens(a):
        # What it is added to is not read, but has to be there.
        return _wide_addmm(a.new_empty(a.shape[0], b.shape[1]), a, b, 0, scaling)
    if scaling == 1.0 and (not any_autocast() or torch.get_autocast_dtype(a.device.type) is a.dtype):
        result = torch.mm(a, b)
    else:
        result = a.new_empty(a.shape[0], b.shape[1]).addmm_(a, b, beta=0, alpha=scaling)
    return result if dtype is None else _to(result, dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """`total + scaling · a @ b` in `dtype`; `total` is overwritten where it can hold that."""
    if total.dtype is not dtype:
        if total.dtype is a.dtype and _widens(a):
            return _wide_addmm(total, a, b, 1, scaling)
        total = total.to(dtype)
    if a.dtype is dtype:
        return total.addmm_(a, b, alpha=scaling)
    return total.add_(_product(a, b), alpha=scaling)


def _widens(a: Tensor) -> bool:
    """Whether torch can multiply matrices like this one into a float32 result."""
    return a.dtype is not torch.float32 and a.is_cuda and _device_widens(a.get_device(), a.dtype)


@functools.lru_cache(maxsize=64)
def _device_widens(device: int, dtype: torch.dtype) -> bool:
    """The same, tried once: torch before 2.8 cannot, nor can all of its builds."""
    a = torch.zeros(16, 16, dtype=dtype, device=f"cuda:{device}")
    try:
        _wide_addmm(a, a, a, 0, 1.0)
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError.
        return False
    return True


def _wide_addmm(total: Tensor, a: Tensor, b: Tensor, beta: int, alpha: float) -> Tensor:
    """`beta · total + alpha · a @ b` of 16-bit matrices, rounded to float32 alone."""
    result: Tensor = torch.addmm(total, a, b, torch.float32, beta=beta, alpha=alpha)
    return result


# ---- casts -----------------------------------------------------------------------------------------------------------


class _Last:
    """The last input that was cast in a thread, and what came of it."""

    source: weakref.ref[Tensor] | None = None
    version: int = 0
    stream: int = 0
    cast: Tensor | None = None


class _Thread(threading.local):
    def __init__(self) -> None:
        self.last = _Last()


_thread = _Thread()


def _cast_and_down(x: Tensor, A: Tensor, low: torch.dtype) -> tuple[Tensor, Tensor]:
    """`_cast_once`, and the rows of `x` times `Aᵀ`."""
    found = None

    def cast(x: Tensor) -> Tensor:
        nonlocal found
        result, found = cuda_lora.down(x, A, low)
        return result

    cast_x = _cast_once(x, low, cast)
    return cast_x, cuda_lora.down(cast_x, A, low)[1] if found is None else found


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().to(dtype)


def _cast_once(x: Tensor, dtype: torch.dtype, cast: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """`x` in `dtype`, by `cast` where given; layers that read the same `x` one after the other share one cast.

    Sharing saves most where activations are kept for backward: the query, key and value layers keep one tensor. It is
    restricted to results of autograd, whose every change has to be counted in their version; and to what runs at once,
    since a captured graph has to hold the casts of what it reads.
    """
    if x.dtype is dtype:
        return x
    shared = x.grad_fn is not None and torch.is_grad_enabled() and not x.is_inference()
    stream = 0
    if shared and x.is_cuda:
        stream = current_stream(x.get_device())
        shared = not torch.cuda.is_current_stream_capturing()
    cast = cast or functools.partial(_cast, dtype=dtype)
    if not shared:
        return cast(x)
    last = _thread.last
    if (
        last.source is not None
        and last.source() is x
        and last.version == x._version
        and last.stream == stream
        and last.cast is not None
        and last.cast.dtype is dtype
    ):
        return last.cast
    last.cast = cast(x)
    last.version, last.stream = x._version, stream
    # The cast lives as long as its source, if no gradient needs it longer.
    last.source = weakref.ref(x, functools.partial(_forget, last))
    return last.cast


def _forget(last: _Last, source: weakref.ref[Tensor]) -> None:
    if last.source is source:
        last.source = last.cast = None
