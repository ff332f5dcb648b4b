"""Where the packed weights of a layer's experts are: a table by which one operation reaches all of them.

A table holds aliases of the tensors whose addresses it has, so an address never dangles. Nothing moves, and nothing is
shared with other tables. It is made when it is first used, and again when something of what it was made of has been
replaced: `ExpertTable.holds` asks so before each use, of few tokens on the CPU for the experts that they go to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _global

from halfbyte import _native
from halfbyte.backends import cpu_experts, cuda_experts, expert_stage
from halfbyte.nn.expert_lora import adapter_of, are_alike
from halfbyte.nn.linear4bit import Linear4bit
from halfbyte.nn.lora import Adapter
from halfbyte.nn.params import Params4bit
from halfbyte.ops._torch_internals import DisableTorchFunctionSubclass
from halfbyte.ops.checks import FLOAT_DTYPES
from halfbyte.ops.dispatch import PLAIN_TYPES
from halfbyte.ops.packed import PackedWeight, plain
from halfbyte.state import QuantState

_ALIGNMENT = 16
"""In bytes, of codes on a GPU: its kernels read so many at once."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(
    getattr(_global, f"_global{name}") for name in _HOOKS if isinstance(getattr(_global, f"_global{name}", None), dict)
)


class Held:
    """The place of a layer's table, known to the layer and to its experts. Copies and pickles are empty."""

    def __init__(self) -> None:
        self.hold(None)

    def hold(self, table: ExpertTable | None) -> None:
        """Hold this table from now on, or none."""
        self.table = table
        # Of compiled calls, where none was made before: what a compiler has seen must stay so while it traces.
        self.traced = table

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy the place alone: addresses are those of the original's memory."""
        return Held, ()


class Kind(NamedTuple):
    """What all experts of a layer have in common."""

    hidden: int
    intermediate: int
    gated: bool
    quant_type: str
    blocksize: int
    nested: bool
    compute_dtype: torch.dtype | None


class ExpertTable:
    """The packed weights of a layer's experts, and what is computed with them.

    Attributes:
        addresses: int64 `[projections, experts, 4]`, on their device.
        maps: What a GPU's kernel for many tokens reads them by, or None.
        up_bias: `[experts, gate's and up's rows]`, the gate's first, or None.
        down_bias: `[experts, hidden]`, or None.
        kind: Shapes, and how they are packed.
        activation: What is between the projections, one of `halfbyte.ops.checks_experts.ACTIVATIONS`.
        dtypes: Of activations that there is an operation for.
        adapters: Of each projection of each expert, those of a projection alike; None where there are none.
    """

    def __init__(self, experts: Any, kind: Kind, activation: str, found: _Found) -> None:
        """Take the addresses of what was found."""
        self.kind = kind
        self.activation = activation
        weights = found.weights
        device = weights[0][0].codes.device
        rows = [
            [[0 if tensor is None else tensor.data_ptr() for tensor in weight.tensors()] for weight in projection]
            for projection in weights
        ]
        self.addresses = torch.tensor(rows, dtype=torch.int64).to(device)
        # A backward pass keeps the addresses, and with them what they name, whatever becomes of the layers until then.
        vars(self.addresses)["named"] = weights
        shapes = [(shape[0], shape[1]) for shape in (projection[0].packing.shape for projection in weights)]

        def maps(rows: expert_stage.Rows) -> Tensor | None:
            if device.type != "cuda":
                return None
            codes, scales = ([[row[i] for row in projection] for projection in rows] for i in range(2))
            plain = kind.blocksize == 64 and not kind.nested
            made: Tensor | None = cuda_experts.tensor_maps(device.index, codes, scales if plain else None, shapes)
            return made

        self.maps: Tensor | None = None
        copied = expert_stage.plan(rows)
        if copied is None:
            self.maps = maps(rows)
        else:
            # The kernel for many tokens reads experts of the host in the stage alone.
            expert_stage.attach(self.addresses, expert_stage.Staging(rows, copied, device, maps))
        if kind.gated:
            self.up_bias = _up_bias(experts._parameters.get("gate_up_proj_bias"), experts.interleaved)
        else:
            self.up_bias = _up_bias(experts._parameters.get("up_proj_bias"), False)
        down_bias = experts._parameters.get("down_proj_bias")
        self.down_bias: Tensor | None = None if down_bias is None else down_bias.detach()
        self._biases = [
            (bias, bias._version)
            for name in ("gate_up_proj_bias", "up_proj_bias", "down_proj_bias")
            if (bias := experts._parameters.get(name)) is not None
        ]
        self.trains = any(bias.requires_grad for bias, _ in self._biases)
        self._weights = weights
        self.adapters = found.adapters if any(adapters[0] for adapters in found.adapters) else None
        self._unchanged = _native.Unchanged(found.entries, found.sizes, found.bounds)
        self._parameters = found.parameters
        self._pointers = _addresses(found.parameters)
        # Compilers of older torch cannot ask a method of an object.
        self.dtypes = tuple(dtype for dtype in FLOAT_DTYPES if self._takes(dtype))

    def holds(self, ids: Tensor | None = None) -> bool:
        """Whether all that the table was made of is as it was; with the experts of some tokens, of these alone."""
        chosen = None if ids is None else self._few(ids)
        parameters, pointers = self._parameters, self._pointers
        if chosen is not None:
            # Each expert has one of each projection, one after the other.
            count = len(self._weights)
            places = [place for expert in chosen for place in range(expert * count, (expert + 1) * count)]
            parameters, pointers = [parameters[place] for place in places], [pointers[place] for place in places]
        return (
            self._unchanged.holds(chosen)
            and _addresses(parameters) == pointers
            and all(bias._version == version for bias, version in self._biases)
        )

    def _few(self, ids: Tensor) -> list[int] | None:
        """The experts in `ids`; None where they are many, or where reading them would wait for a GPU."""
        experts = self.addresses.shape[1]
        if not ids.is_cpu or type(ids) is not Tensor or 2 * ids.numel() > experts:
            return None
        return [expert for expert in {*ids.reshape(-1).tolist()} if 0 <= expert < experts]

    def _takes(self, dtype: torch.dtype) -> bool:
        if self.addresses.is_cpu:
            return cpu_experts.takes(dtype)
        hidden, intermediate, gated, quant_type, blocksize, nested, _ = self.kind
        return cuda_experts.takes(
            dtype, self.addresses.get_device(), self.addresses.shape[1], hidden, intermediate, gated, quant_type,
            blocksize, nested,
        )  # fmt: skip


class _Found:
    """What a table is made of, and how it is noticed that it changes."""

    def __init__(self) -> None:
        self.weights: list[list[PackedWeight]] = []
        self.adapters: list[list[Adapter | None]] = []
        self.parameters: list[Params4bit] = []
        self.entries: list[tuple[dict[str, Any], str, Any]] = []
        self.sizes: list[dict[str, Any]] = list(_GLOBAL_HOOKS)
        self.bounds: list[tuple[int, int]] = []

    def bound(self) -> None:
        """Mark where an expert begins, or the last one ends."""
        self.bounds.append((len(self.entries), len(self.sizes)))

    def is_bare(self, module: nn.Module) -> bool:
        """Whether nobody listens to a module, or has put a forward of their own on it; and see to it in future."""
        own = vars(module)
        if any(own[name] for name in _HOOKS) or "forward" in own or "_hf_hook" in own:
            return False
        self.sizes += [own, *(own[name] for name in _HOOKS)]
        return True

    def packed(self, layer: Any) -> tuple[QuantState, PackedWeight, Any] | None:
        """The weight of a layer whose product can be a part of the operation, its adapter, and the layer itself."""
        adapted = adapter_of(layer)
        adapter = None
        if adapted is not None:
            if not all(self.is_bare(module) for module in adapted.modules):
                return None
            self.entries += adapted.entries
            layer, adapter = adapted.base, adapted.adapter
        if type(layer).forward is not Linear4bit.forward or not self.is_bare(layer):
            return None
        weight, state = layer._parameters.get("weight"), None
        if isinstance(weight, Params4bit):
            state = weight.__dict__.get("quant_state")
        if weight is None or state is None or layer._parameters.get("bias") is not None:
            return None
        packed: PackedWeight = state.packed(plain(weight).detach())
        tensors = [tensor for tensor in packed.tensors() if tensor is not None]
        device = tensors[0].device
        if (
            device.type not in ("cpu", "cuda")
            or (device.type == "cuda" and packed.codes.data_ptr() % _ALIGNMENT)
            or any(
                type(tensor) not in PLAIN_TYPES or tensor.device != device or not tensor.is_contiguous()
                for tensor in tensors
            )
        ):
            return None
        self.parameters.append(weight)
        self.entries += [(layer._parameters, "weight", weight), (weight.__dict__, "quant_state", state)]
        return state, packed, (adapter, layer)


def table_of(experts: Any) -> ExpertTable | None:
    """Make the table of an `Experts4bit`; None where one operation cannot do what its layers do one by one."""
    activation = activation_of(experts)
    found = _Found()
    if activation is None or not _GLOBAL_HOOKS or any(_GLOBAL_HOOKS) or "post_expert_norm" in experts._modules:
        return None
    gate, up, down = experts.projections
    projections = [name for name in (gate, up, down) if name]
    found.weights = [[] for _ in projections]
    found.adapters = [[] for _ in projections]
    kinds: set[Any] = set()
    for index in range(experts.num_experts):
        found.bound()
        expert = experts._modules.get(str(index))
        if expert is None or not found.is_bare(expert):
            return None
        found.entries.append((experts._modules, str(index), expert))
        for place, name in enumerate(projections):
            layer = expert._modules.get(name)
            made = None if layer is None else found.packed(layer)
            if made is None or len(kinds) > 2:
                return None
            found.entries.append((expert._modules, name, layer))
            state, packed, (adapter, layer) = made
            found.adapters[place].append(adapter)
            shape, blocksize, quant_type = packed.scalars()
            kinds.add(
                (name == down, shape, blocksize, quant_type, state.nested, packed.codes.device, layer.compute_dtype)
            )
            found.weights[place].append(packed)
    found.bound()
    if len(kinds) != 2:
        return None
    (_, ups, *how), (_, downs, *how_down) = sorted(kinds, key=lambda kind: kind[0])
    if how != how_down or len(ups) != 2 or tuple(downs) != (ups[1], ups[0]):
        return None
    blocksize, quant_type, nested, _, compute_dtype = how
    act: Any = getattr(experts, "act_fn", None)
    if isinstance(act, nn.Module):
        if not found.is_bare(act):
            return None
        found.entries.append((experts._modules, "act_fn", act))
    else:
        found.entries.append((vars(experts), "gate", experts.gate))
    for name in ("gate_up_proj_bias", "up_proj_bias", "down_proj_bias"):
        if (bias := experts._parameters.get(name)) is not None:
            found.entries.append((experts._parameters, name, bias))
    if not all(are_alike(adapters) for adapters in found.adapters):
        return None
    kind = Kind(ups[1], ups[0], gate is not None, quant_type, blocksize, nested, compute_dtype)
    return ExpertTable(experts, kind, activation, found)


def _addresses(parameters: list[Params4bit]) -> list[int]:
    # Asked as of plain tensors: through the class of the parameters it takes ten times as long.
    with DisableTorchFunctionSubclass():
        return list(map(Tensor.data_ptr, parameters))


def _up_bias(bias: Tensor | None, interleaved: bool) -> Tensor | None:
    """The biases of gate and up projection, the gate's first."""
    if bias is None:
        return None
    bias = bias.detach()
    return torch.cat((bias[:, 0::2], bias[:, 1::2]), dim=1) if interleaved else bias


# ---- activations -----------------------------------------------------------------------------------------------------

_MODULES = {
    ("torch.nn.modules.activation", "SiLU"): "silu",
    ("transformers.activations", "SiLUActivation"): "silu",
    ("transformers.activations", "GELUActivation"): "gelu",
    ("transformers.activations", "GELUTanh"): "gelu_tanh",
    ("transformers.activations", "PytorchGELUTanh"): "gelu_tanh",
    ("transformers.activations", "NewGELUActivation"): "gelu_tanh",
    ("transformers.activations", "ReLUSquaredActivation"): "relu2",
}
_FUNCTIONS: dict[Callable[..., Any], str] = {nn.functional.silu: "silu", nn.functional.gelu: "gelu"}

# Functions of transformers' classes, and where they have the limit and the factor of the sigmoid.
_CLAMPED = {
    "GptOssExperts._apply_gate": ("limit", "alpha"),
    "OpenAIPrivacyFilterExperts._apply_gate": ("limit", "alpha"),
    "MiniMaxM3VLExperts._apply_gate": ("swiglu_limit", "swiglu_alpha"),
}


def activation_of(experts: Any) -> str | None:
    """The name of what is between the projections; None for what is not known."""
    if experts.projections[0] is not None and experts.gate is not None:
        gate = experts.gate
        numbers = _CLAMPED.get(getattr(gate, "__qualname__", ""))
        if numbers is None or not str(getattr(gate, "__module__", "")).startswith("transformers.models."):
            return None
        return "clamped_swiglu" if _numbers(experts, numbers) == [7.0, 1.702] else None
    if experts.interleaved:
        return None
    act: Any = getattr(experts, "act_fn", None)
    if isinstance(act, nn.GELU):
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(act.approximate)
    if isinstance(act, nn.Module):
        return _MODULES.get((type(act).__module__, type(act).__name__))
    return next((name for function, name in _FUNCTIONS.items() if function is act), None)


def _numbers(experts: Any, names: Iterable[str]) -> list[Any]:
    return [getattr(experts, name, None) for name in names]
