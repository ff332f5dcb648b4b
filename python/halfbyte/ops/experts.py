"""`halfbyte::experts_4bit`: the experts of a Mixture-of-Experts layer as one operation.

Packed weights are reached by a table of addresses, int64 `[projections, experts, 4]`: of gates where there are such, up
and down projections, where their codes are, their scales, and of nested scales those of the scales and the offset (else
0). Who makes a table keeps what it names alive, where it is: `halfbyte.nn.expert_table`.

Nothing here waits for a GPU, so the operation can be part of a CUDA graph. Gradients go to the tokens and to the
router's weights, once. Backward has the arguments of forward and nothing else; on a GPU it waits for nothing either,
where torch multiplies groups of rows without (`halfbyte.backends.cuda_experts.multiplies_groups`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbyte import _native
from halfbyte.backends import cpu_experts, cuda_experts
from halfbyte.ops.checks_experts import check_experts, check_gradient
from halfbyte.ops.dispatch import kernels

SCHEMA = (
    "(Tensor x, Tensor ids, Tensor weights, Tensor table, Tensor? maps, Tensor? up_bias, Tensor? down_bias, "
    "SymInt intermediate, int blocksize, str quant_type, bool nested, str activation) -> Tensor"
)
"""`x` is `[tokens, hidden]`; `ids`, of experts, and `weights` are `[tokens, k]`; numbers of no expert mean none. Biases
are `[experts, gate's and up's rows]` and `[experts, hidden]`. Of `maps` see `halfbyte.backends.cuda_experts`."""

torch.library.define("halfbyte::experts_4bit", SCHEMA, tags=torch.Tag.pt2_compliant_tag)


def _fake(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    table: Tensor,
    maps: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    intermediate: int,
    blocksize: int,
    quant_type: str,
    nested: bool,
    activation: str,
) -> Tensor:
    check_experts(
        x, ids, weights, table, maps, up_bias, down_bias, intermediate, blocksize, quant_type, activation
    )  # fmt: skip
    return x.new_empty(x.shape)


torch.library.register_fake("halfbyte::experts_4bit", _fake)
torch.library.impl("halfbyte::experts_4bit", "cpu", cpu_experts.experts_4bit)
if hasattr(_native, "CudaExperts") and torch.version.hip is None:
    torch.library.impl("halfbyte::experts_4bit", "cuda", cuda_experts.experts_4bit)


torch.library.define(
    "halfbyte::experts_4bit_backward",
    "(Tensor grad, Tensor x, Tensor ids, Tensor weights, Tensor table, Tensor? up_bias, Tensor? down_bias, "
    "SymInt intermediate, int blocksize, str quant_type, bool nested, str activation, bool to_x, bool to_weights) "
    "-> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    table: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    intermediate: int,
    blocksize: int,
    quant_type: str,
    nested: bool,
    activation: str,
    to_x: bool,
    to_weights: bool,
) -> tuple[Tensor, Tensor]:
    check_experts(x, ids, weights, table, None, up_bias, down_bias, intermediate, blocksize, quant_type, activation)
    check_gradient(grad, x)
    return x.new_empty(x.shape if to_x else (0,)), weights.new_empty(weights.shape if to_weights else (0,))


torch.library.register_fake("halfbyte::experts_4bit_backward", _fake_backward)
torch.library.impl("halfbyte::experts_4bit_backward", "cpu", cpu_experts.experts_4bit_backward)
if hasattr(_native, "CudaExperts") and torch.version.hip is None:
    torch.library.impl("halfbyte::experts_4bit_backward", "cuda", cuda_experts.experts_4bit_backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ids, weights, table, _, up_bias, down_bias, *ctx.how = inputs
    ctx.save_for_backward(x, ids, weights, table, up_bias, down_bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    to_x, _, to_weights = ctx.needs_input_grad[:3]
    x_grad, weights_grad = torch.ops.halfbyte.experts_4bit_backward(
        grad, *ctx.saved_tensors, *ctx.how, to_x, to_weights
    )
    return x_grad if to_x else None, None, weights_grad if to_weights else None, *(None,) * 9


def _setup_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _no_second(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError("gradients of halfbyte::experts_4bit cannot be differentiated again")


torch.library.register_autograd("halfbyte::experts_4bit", _backward, setup_context=_setup)
torch.library.register_autograd("halfbyte::experts_4bit_backward", _no_second, setup_context=_setup_nothing)


def experts_4bit(x: Tensor, ids: Tensor, weights: Tensor, *how: Any) -> Tensor:
    """The operation by the way that is right now: arguments are those of the schema."""
    if kernels(x, weights, ids) is None:
        y: Tensor = torch.ops.halfbyte.experts_4bit(x, ids, weights, *how)
    elif x.is_cpu:
        y = cpu_experts.experts_4bit(x, ids, weights, *how)
    else:
        y = cuda_experts.experts_4bit(x, ids, weights, *how)
    return y
