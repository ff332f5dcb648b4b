"""`Experts4bit`: the experts of a Mixture-of-Experts layer, each projection of each expert a layer of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """One expert: its projections, under the names that its checkpoint has for them."""


class Experts4bit(nn.Module):
    """Experts that are called with tokens and the experts that a router chose for each.

    transformers 5 holds the experts of a layer as one tensor for each projection, `[experts, out, in]`. Here every
    matrix is a layer, `experts.<i>.gate_proj` and so on: packed weights keep scales and offset of their own, files have
    the names of the original checkpoints (which vLLM and transformers 4 read), and adapters can be added to each
    expert.

    Attributes:
        num_experts: How many there are.
        projections: Names of the gate's, the up and the down projection; the first is None where there is no gate.
        gate: From the outputs of the gate's and the up projection, side by side `[rows, 2 * intermediate]`, to the
            input of the down projection `[rows, intermediate]`. None for `act_fn(gate) * up`.
        interleaved: `gate` expects the two alternating, column by column.
    """

    num_experts: int
    projections: tuple[str | None, str, str]
    gate: Callable[[Any, Tensor], Tensor] | None
    interleaved: bool

    def __init__(self, experts: Sequence[Expert], projections: tuple[str | None, str, str]) -> None:
        """Hold the experts, under the names "0", "1", … ."""
        super().__init__()
        self.num_experts = len(experts)
        self.projections = projections
        self.gate = None
        self.interleaved = False
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of what the chosen experts make of each token.

        Args:
            hidden_states: `[tokens, hidden]`.
            top_k_index: Experts of each token, `[tokens, k]`. Numbers from `num_experts` on mean none (expert-parallel
                models have those for experts that are elsewhere).
            top_k_weights: What each is multiplied with, `[tokens, k]`.

        Returns:
            `[tokens, hidden]`, of the dtype of `hidden_states`. Each sum is in the order of `top_k_index`, so that the
            result does not change from run to run.
        """
        k = top_k_index.shape[-1]
        ids = top_k_index.reshape(-1)
        order = torch.argsort(ids, stable=True)
        counts = torch.bincount(ids, minlength=self.num_experts)[: self.num_experts].tolist()
        rows = hidden_states[order // k]
        made, begin = [], 0
        for index, count in enumerate(counts):
            if count:
                made.append(self._expert(index, rows[begin : begin + count]))
                begin += count
        if begin < len(order):
            made.append(torch.zeros_like(rows[begin:]))
        out = torch.cat(made) if made else rows
        out = out * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return out[back].view(*top_k_index.shape, out.shape[-1]).sum(dim=-2).to(hidden_states.dtype)

    def _expert(self, index: int, rows: Tensor) -> Tensor:
        """What one expert makes of its rows, `[rows, hidden]`."""
        gate, _, down = self.projections
        expert: Any = self._modules[str(index)]
        y = self._with_bias(f"{'gate_up' if gate else 'up'}_proj_bias", index, self._up(expert, rows))
        if gate is None:
            y = self._activation(y)
        elif self.gate is not None:
            y = self.gate(self, y)
        else:
            left, right = y.chunk(2, dim=-1)
            y = self._activation(left) * right
        y = self._with_bias("down_proj_bias", index, getattr(expert, down)(y))
        norm = self._modules.get("post_expert_norm")
        return y if norm is None else norm(y)

    def _activation(self, y: Tensor) -> Tensor:
        activation: Any = self.act_fn
        made: Tensor = activation(y)
        return made

    def _up(self, expert: Any, rows: Tensor) -> Tensor:
        gate, up, _ = self.projections
        right: Tensor = getattr(expert, up)(rows)
        if gate is None:
            return right
        left: Tensor = getattr(expert, gate)(rows)
        if self.interleaved:
            return torch.stack((left, right), dim=-1).flatten(-2)
        return torch.cat((left, right), dim=-1)

    def _with_bias(self, name: str, index: int, y: Tensor) -> Tensor:
        bias = self._parameters.get(name)
        return y if bias is None else y + bias[index].to(y.dtype)

    def extra_repr(self) -> str:
        """How many experts, for `print(model)`."""
        return f"num_experts={self.num_experts}"
