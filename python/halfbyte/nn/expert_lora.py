"""LoRA adapters on the experts of a layer, all of them as one differentiable function.

A and B of all experts are stacked, which autograd undoes, so that the gradients come to the parameters of each.
Backward keeps the stacks and the arguments of the call (`halfbyte.backends.experts_torch`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from halfbyte.backends import cpu_experts, cuda_experts, experts_torch
from halfbyte.backends.expert_stage import reading
from halfbyte.nn.lora import Adapter

_RANK_UNIT = 8
"""Ranks are filled up to multiples of it: products of groups on a GPU read 16 bytes at a time."""


class Adapted(NamedTuple):
    """A layer with one adapter.

    Attributes:
        base: The 4-bit layer.
        adapter: A, B and the scaling.
        modules: The layer and its parts but the base: nobody may listen to them.
        entries: Of dictionaries: what must stay as it is.
    """

    base: nn.Module
    adapter: Adapter
    modules: Sequence[nn.Module]
    entries: Sequence[tuple[dict[str, Any], str, Any]]


READERS: list[Callable[[Any], Adapted | None]] = []
"""Of layers with adapters of other packages; `halfbyte.integrations` adds them."""


def adapter_of(layer: Any) -> Adapted | None:
    """What a layer with an adapter is made of; None where it has none, or must be called by itself."""
    return next((found for read in READERS if (found := read(layer)) is not None), None)


def are_alike(adapters: Sequence[Adapter | None]) -> bool:
    """Whether the adapters of all experts can be stacked; or none has one."""
    first = adapters[0]
    if first is None:
        return all(adapter is None for adapter in adapters)
    return all(
        adapter is not None
        and adapter.scaling == first.scaling
        and (adapter.A.shape, adapter.A.dtype, adapter.A.device) == (first.A.shape, first.A.dtype, first.A.device)
        and (adapter.B.shape, adapter.B.dtype, adapter.B.device) == (first.B.shape, first.B.dtype, first.B.device)
        for adapter in adapters
    )


class _Call(NamedTuple):
    """What one call knows besides tensors with derivatives. It keeps what the table names."""

    addresses: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    how: tuple[int, int, str, bool]
    activation: str
    scalings: Sequence[float | None]


def adapted_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    addresses: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    how: tuple[int, int, str, bool],
    activation: str,
    adapters: Sequence[Sequence[Adapter | None]],
) -> Tensor:
    """The experts of a layer with adapters.

    `how` is the intermediate size, the block size, the type, and whether scales are nested. Gradients go to `x`,
    `weights`, and A and B of each adapter, once.
    """
    low = torch.float32 if x.is_cpu else x.dtype
    scalings: list[float | None] = []
    factors: list[Tensor] = []
    for of_projection in adapters:
        given = [adapter for adapter in of_projection if adapter is not None]
        scalings.append(given[0].scaling if given else None)
        if given:
            missing = -given[0].A.shape[0] % _RANK_UNIT
            A = torch.stack([adapter.A for adapter in given]).to(low)
            B = torch.stack([adapter.B for adapter in given]).to(low)
            if missing:
                A, B = nn.functional.pad(A, (0, 0, 0, missing)), nn.functional.pad(B, (0, missing))
            factors += [A, B]
    call = _Call(addresses, up_bias, down_bias, how, activation, scalings)
    made: Tensor = _AdaptedExperts.apply(x, weights, ids, call, *factors)
    return made


def _layer(call: _Call, table: Tensor, x: Tensor, ids: Tensor, factors: Sequence[Tensor]) -> experts_torch.Layer:
    slots = experts_torch.Slots(ids, table.shape[1])
    backend = cpu_experts if x.is_cpu else cuda_experts
    products: Any = backend.products(x, slots, table, *call.how)
    left = iter(factors)
    adapters = [
        None if scaling is None else experts_torch.LowRank(next(left), next(left), scaling) for scaling in call.scalings
    ]
    return experts_torch.Layer(products, slots, call.activation, call.up_bias, call.down_bias, adapters)


class _AdaptedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, ids: Tensor, call: _Call, *factors: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(x, weights, ids, *factors)
        with experts_torch.not_cast(x), reading(call.addresses, None, ids.numel()) as (table, _):
            return experts_torch.forward(_layer(call, table, x, ids, factors), x, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, ids, *factors = ctx.saved_tensors
        with experts_torch.not_cast(x), reading(ctx.call.addresses, None, ids.numel()) as (table, _):
            layer = _layer(ctx.call, table, x, ids, factors)
            found = experts_torch.gradients(layer, grad, x, weights, *ctx.needs_input_grad[:2])
        of_factors = [factor for pair in found.adapters if pair is not None for factor in pair]
        return found.x, found.weights, None, None, *of_factors
