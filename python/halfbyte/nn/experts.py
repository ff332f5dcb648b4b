"""`Experts4bit`: the experts of a Mixture-of-Experts layer, each projection of each expert a layer of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.nn import expert_offload
from halfbyte.nn.expert_lora import adapted_experts
from halfbyte.nn.expert_table import ExpertTable, Held, table_of
from halfbyte.ops._torch_internals import tracing, transforms
from halfbyte.ops.autograd import autocast_dtype
from halfbyte.ops.dispatch import transformed
from halfbyte.ops.experts import experts_4bit

_is_compiling = torch.compiler.is_compiling

_MAKES_TABLES = tuple(int(number) for number in torch.__version__.split(".")[:2]) >= (2, 15)
"""Whether a table can be made while a compiler traces. That of 2.11 hands no module to a function that it does not
trace, and releases in between were not tried: there, a call before compilation makes the table."""


class Expert(nn.Module):
    """One expert: its projections, under the names that its checkpoint has for them."""

    def __setattr__(self, name: str, value: Any) -> None:
        """As any module; a projection that is replaced takes the experts' table with it."""
        held: Held | None = self.__dict__.get("_held")
        if held is not None and isinstance(value, nn.Module):
            held.hold(None)
        super().__setattr__(name, value)


class Experts4bit(nn.Module):
    """Experts that are called with tokens and the experts that a router chose for each.

    transformers 5 holds the experts of a layer as one tensor for each projection, `[experts, out, in]`. Here every
    matrix is a layer, `experts.<i>.gate_proj` and so on: packed weights keep scales and offset of their own, files have
    the names of the original checkpoints (which vLLM and transformers 4 read), and adapters can be added to each
    expert.

    Where nobody listens to the layers and the activation is a known one, all of it is a single operation
    (`halfbyte.ops.experts`), which can be compiled and captured, and has derivatives; else each expert is called by
    itself.

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
    _held: Held

    def __init__(self, experts: Sequence[Expert], projections: tuple[str | None, str, str]) -> None:
        """Hold the experts, under the names "0", "1", … ."""
        super().__init__()
        self.num_experts = len(experts)
        self.projections = projections
        self.gate = None
        self.interleaved = False
        self.__dict__["_held"] = Held()
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)
            expert.__dict__["_held"] = self._held

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Experts4bit:
        """Move or cast as any module."""
        self._held.hold(None)
        apply: Any = super()._apply
        apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load as any module: layers may come to hold other tensors."""
        self._held.hold(None)
        super()._load_from_state_dict(*args, **kwargs)

    def offload(self, device: torch.device | str | int = "cuda", *, resident: Iterable[int] = ()) -> Experts4bit:
        """Keep the packed weights of experts in pinned host memory, and everything else on a GPU.

        The GPU reads the experts that the router chooses over the bus. Results are the same bits as with all experts on
        the GPU. A second call changes what is resident; `resident=range(experts.num_experts)` brings all experts to
        the GPU. To another place, `.cpu()` for example, the layer moves like any other.

        Args:
            device: The GPU.
            resident: Numbers of experts whose packed weights are kept in the GPU's own memory.

        Returns:
            The layer itself.

        Raises:
            ValueError: `device` is no CUDA device that torch sees, `resident` has the number of no expert, or an expert
                is not packed in 4 bits. The message names the value, and the layer is unchanged.
            TypeError: `resident` has something that is no integer.
            RuntimeError: The host memory cannot be pinned.
        """
        expert_offload.offload(self, device, resident)
        return self

    @property
    def resident(self) -> list[int]:
        """Numbers of the experts that are not in pinned host memory: all, unless `offload` was called."""
        return expert_offload.resident_of(self)

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
        compute = autocast_dtype(hidden_states)
        table = self._table(hidden_states, top_k_index, top_k_weights, compute)
        if table is None:
            return self._one_by_one(hidden_states, top_k_index, top_k_weights)
        kind = table.kind
        dtype = compute or kind.compute_dtype or hidden_states.dtype
        x, ids = hidden_states.to(dtype), top_k_index.to(torch.int64)
        up_bias = None if table.up_bias is None else table.up_bias.to(dtype)
        down_bias = None if table.down_bias is None else table.down_bias.to(dtype)
        if table.adapters is not None:
            how = kind.intermediate, kind.blocksize, kind.quant_type, kind.nested
            y = adapted_experts(
                x, ids, top_k_weights, table.addresses, up_bias, down_bias, how, table.activation, table.adapters
            )
            return y.to(hidden_states.dtype)
        y = experts_4bit(
            x,
            ids,
            top_k_weights,
            table.addresses,
            table.maps,
            up_bias,
            down_bias,
            kind.intermediate,
            kind.blocksize,
            kind.quant_type,
            kind.nested,
            table.activation,
        )
        return y.to(hidden_states.dtype)

    def _table(self, x: Tensor, ids: Tensor, weights: Tensor, compute: torch.dtype | None) -> ExpertTable | None:
        """The table for these arguments; None where experts are called one by one."""
        if x.dim() != 2 or ids.dim() != 2 or x.dtype is torch.float64:
            return None
        table = self._held.table
        if _is_compiling():
            # An exported program would be run where there are no such addresses.
            if _is_exporting():
                return None
            if table is None and _MAKES_TABLES:
                _make_table(self)
                table = self._held.traced
        elif transforms() is not None or tracing() is not None or x.is_meta:
            return None
        elif table is None or not table.holds(ids):
            table = table_of(self)
            self._held.hold(table)
        if table is None or (torch.is_grad_enabled() and table.trains):
            return None
        if table.adapters is not None and (_is_compiling() or transformed() or ids.numel() < self.num_experts):
            # All adapters are stacked, which few tokens are not worth.
            return None
        dtype = compute or table.kind.compute_dtype or x.dtype
        return table if x.device == table.addresses.device and dtype in table.dtypes else None

    def _one_by_one(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Each expert with its rows, sorted."""
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


class DispatchedExperts4bit(Experts4bit):
    """Experts that are called with all tokens once for each of them, as Llama 4 calls its experts.

    The router has scaled the rows already, those of experts that it did not choose with zero. An expert makes zeros of
    zeros, so such rows are left out, without waiting for a GPU to tell which they are.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """What each expert makes of its rows.

        Args:
            hidden_states: `[experts * tokens, hidden]`, the rows of the first expert first.

        Returns:
            As many rows, in the same order and dtype; zeros for a row of zeros.
        """
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        number = torch.arange(self.num_experts, device=rows.device)
        number = number.unsqueeze(-1).expand(-1, rows.shape[0] // self.num_experts).reshape(-1)
        ids = torch.where((rows != 0).any(dim=-1), number, self.num_experts)
        return super().forward(rows, ids.unsqueeze(-1), rows.new_ones(rows.shape[0], 1))


def _make_table(experts: Experts4bit) -> bool:
    """Make the table while a compiler traces, which looks at what is there afterwards."""
    held = experts._held
    if held.traced is None or not held.traced.holds():
        held.traced = table_of(experts)
    return held.traced is not None


def _is_exporting() -> bool:
    """Asked outside of what is traced: releases of torch answer "yes" to this question whenever they compile."""
    return torch.compiler.is_exporting()


for _function in (_make_table, _is_exporting):
    # As torch.compiler.assume_constant_result does, which imports the compiler.
    _function.__dict__["_dynamo_marked_constant"] = True
