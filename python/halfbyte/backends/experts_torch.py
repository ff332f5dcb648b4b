"""Derivatives of a layer of experts, and adapters on them: products of the back ends, and torch's operations between.

Slots are the choices of all tokens. Sorted by expert, each expert's slots lie together, and every product is one of all
experts. With u = act(gate x, up x), the output of a slot d = down u, and y = sum of w d over a token's slots, the
derivatives of y to g are those of

    w   <d, g> = <u, down' g>           so the last product is not made again
    u   w down' g

Nothing of the forward pass is kept but its arguments: gate and up are multiplied again. Sums are in float32, and in the
order of a token's choices, so that results do not change from run to run.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.ops._torch_internals import grouped_mm

_AT_ONCE = 1 << 24
"""Elements that are float32 at a time: rows of matrices of 16 bits are widened in parts."""


class Slots:
    """The choices of all tokens, sorted by expert. On a GPU nothing of it is known to the host, but by `bounds`.

    Attributes:
        experts: How many there are.
        order: Numbers of slots, `token * k + choice`, in the order.
        tokens: The token of each, in the order.
        expert: The expert of each, in the order; behind the others those of none, which have the number of experts.
        ends: int32 `[experts]`: where each expert's slots end in the order.
    """

    def __init__(self, ids: Tensor, experts: int) -> None:
        """Sort them; numbers of no expert mean none."""
        numbers = ids.reshape(-1)
        numbers = numbers.masked_fill((numbers < 0) | (numbers >= experts), experts)
        self.experts = experts
        self.shape = ids.shape
        self.expert, self.order = torch.sort(numbers, stable=True)
        self.tokens = torch.div(self.order, ids.shape[1], rounding_mode="floor")
        every = torch.arange(experts, device=ids.device)
        self.ends = torch.searchsorted(self.expert, every, right=True, out_int32=True)

    @functools.cached_property
    def places(self) -> Tensor:
        """Where in the order each slot is."""
        return torch.empty_like(self.order).scatter_(
            0, self.order, torch.arange(len(self.order), device=self.order.device)
        )

    @functools.cached_property
    def nowhere(self) -> Tensor:
        """Which slots have no expert, `[slots, 1]`, as they are numbered. Their rows of products mean nothing."""
        return (self.expert == self.experts)[self.places].unsqueeze(-1)

    @functools.cached_property
    def _ends(self) -> list[int]:
        ends: list[int] = self.ends.tolist()
        return ends

    def bounds(self) -> Iterator[tuple[int, slice]]:
        """Experts that have slots, and where these are. On a GPU the host waits for it."""
        begin = 0
        for expert, end in enumerate(self._ends):
            if end > begin:
                yield expert, slice(begin, end)
            begin = end


class Products(Protocol):
    """Products of the rows of slots in the order with packed matrices, and with others."""

    gated: bool
    low: torch.dtype
    """The dtype of the products of adapters."""

    def forward(self, rows: Tensor, projection: int) -> Tensor:
        """`rows @ W.T` with each row's expert's matrix."""

    def backward(self, grads: Tensor, projection: int) -> Tensor:
        """`grads @ W`."""

    def grouped(self, rows: Tensor, stack: Tensor) -> Tensor:
        """`rows @ stack[expert]`."""

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        """`a.T @ b` of the rows of each expert, `[experts, a's columns, b's columns]`; of others zeros."""


def grouped_one_by_one(slots: Slots, rows: Tensor, stack: Tensor) -> Tensor:
    """`rows @ stack[expert]`, a product for each expert."""
    out = rows.new_empty(rows.shape[0], stack.shape[2])
    for expert, there in slots.bounds():
        torch.mm(rows[there], stack[expert], out=out[there])
    return out


def outer_one_by_one(slots: Slots, a: Tensor, b: Tensor) -> Tensor:
    """`a.T @ b` of the rows of each expert, a product for each."""
    out = a.new_zeros(slots.experts, a.shape[1], b.shape[1])
    for expert, there in slots.bounds():
        torch.mm(a[there].t(), b[there], out=out[expert])
    return out


def grouped_together(slots: Slots, rows: Tensor, stack: Tensor) -> Tensor:
    """`rows @ stack[expert]` in one launch."""
    assert grouped_mm is not None
    return grouped_mm(rows, stack, offs=slots.ends)


def outer_together(slots: Slots, a: Tensor, b: Tensor) -> Tensor:
    """`a.T @ b` of the rows of each expert in one launch."""
    assert grouped_mm is not None
    empty = torch.diff(slots.ends, prepend=slots.ends.new_zeros(1)) == 0
    return grouped_mm(a.t(), b, offs=slots.ends).masked_fill_(empty.view(-1, 1, 1), 0)


# ---- between the projections -----------------------------------------------------------------------------------------


def activated(name: str, gate: Tensor, up: Tensor | None) -> Tensor:
    """What goes into the last projection, of float32 products; `up` is None without a gate."""
    if name == "clamped_swiglu":
        assert up is not None
        most = gate.clamp(max=7.0)
        return most * torch.sigmoid(1.702 * most) * (up.clamp(-7.0, 7.0) + 1.0)
    y = _function(name, gate)
    return y if up is None else y * up


def _function(name: str, gate: Tensor) -> Tensor:
    if name == "silu":
        return functional.silu(gate)
    if name == "relu2":
        return gate.relu().square()
    return functional.gelu(gate, approximate="tanh" if name == "gelu_tanh" else "none")


def derivatives(name: str, gate: Tensor, up: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    """Of `activated`, to both products."""
    if name == "clamped_swiglu":
        assert up is not None
        most = gate.clamp(max=7.0)
        inside = up.clamp(-7.0, 7.0)
        sigmoid = torch.sigmoid(1.702 * most)
        slope = sigmoid * (1.0 + 1.702 * most * (1.0 - sigmoid))
        to_gate = (grad * (inside + 1.0) * slope).masked_fill_(gate > 7.0, 0.0)
        return to_gate, (grad * most * sigmoid).masked_fill_(inside != up, 0.0)
    to_up = None if up is None else grad * _function(name, gate)
    if up is not None:
        grad = grad * up
    if name == "silu":
        return torch.ops.aten.silu_backward(grad, gate), to_up
    if name == "relu2":
        return grad * gate.relu() * 2.0, to_up
    return torch.ops.aten.gelu_backward(
        grad, gate, approximate="tanh" if name == "gelu_tanh" else "none"
    ), to_up  # fmt: skip


# ---- a layer ---------------------------------------------------------------------------------------------------------


class LowRank(NamedTuple):
    """The adapters of a projection of all experts, in the dtype of their products.

    Attributes:
        A: `[experts, rank, in]`.
        B: `[experts, out, rank]`.
        scaling: The factor of their outputs.
    """

    A: Tensor
    B: Tensor
    scaling: float


class Layer(NamedTuple):
    """A call of a layer's experts.

    Attributes:
        products: By its packed matrices.
        slots: Which rows an expert has.
        activation: The name of what is between the projections.
        up_bias: `[experts, gate's and up's rows]`, the gate's first, or None.
        down_bias: `[experts, hidden]`, or None.
        adapters: Of each projection, or None.
    """

    products: Products
    slots: Slots
    activation: str
    up_bias: Tensor | None
    down_bias: Tensor | None
    adapters: Sequence[LowRank | None]


class Gradients(NamedTuple):
    """Of x and the router's weights, where they are wanted, and of A and B of each projection with adapters."""

    x: Tensor | None
    weights: Tensor | None
    adapters: list[tuple[Tensor, Tensor] | None]


class _Product(NamedTuple):
    """By the packed matrices and by B, which are added in float32, and `scaling · rows A'`, of which the latter is."""

    base: Tensor
    low: Tensor | None
    reduced: Tensor | None

    def part(self, rows: slice) -> Tensor:
        """Some rows, in float32."""
        y = self.base[rows].float()
        return y if self.low is None else y.add_(self.low[rows])


def _multiply(layer: Layer, rows: Tensor, projection: int) -> _Product:
    products, adapter = layer.products, layer.adapters[projection]
    base = products.forward(rows, projection)
    if adapter is None:
        return _Product(base, None, None)
    reduced = products.grouped(rows.to(products.low), adapter.A.transpose(1, 2)).mul_(adapter.scaling)
    return _Product(base, products.grouped(reduced, adapter.B.transpose(1, 2)), reduced)


def _parts(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _AT_ONCE // columns)
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


def _between(layer: Layer, first: Sequence[_Product], rows: slice) -> tuple[Tensor, Tensor | None]:
    """The products of some rows, with biases: the gate's and the up projection's, or the latter's alone."""
    values = [product.part(rows) for product in first]
    if layer.up_bias is not None:
        expert = layer.slots.expert[rows].clamp(max=layer.slots.experts - 1)
        biases = layer.up_bias.chunk(len(values), dim=1)
        values = [value.add_(bias.index_select(0, expert)) for value, bias in zip(values, biases, strict=True)]
    return values[0], values[1] if len(values) > 1 else None


def _of_tokens(layer: Layer, parts: Sequence[Tensor], weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The sums of each token's slots, of what is in the order; times weights."""
    slots = layer.slots
    tokens, k = slots.shape
    columns = parts[0].shape[1]
    y = parts[0].new_empty(tokens, columns, dtype=dtype)
    for some in _parts(tokens, k * columns):
        numbers = slice(some.start * k, some.stop * k)
        places = slots.places[numbers]
        values = parts[0].index_select(0, places).float()
        for part in parts[1:]:
            values.add_(part.index_select(0, places))
        values.masked_fill_(slots.nowhere[numbers], 0.0)
        if weights is not None:
            values.mul_(weights.reshape(-1, 1)[numbers])
        y[some] = values.view(-1, k, columns).sum(dim=1)
    return y


def forward(layer: Layer, x: Tensor, weights: Tensor) -> Tensor:
    """The layer's output with adapters; without any, there are operations for that."""
    slots = layer.slots
    rows = x.index_select(0, slots.tokens)
    first = [_multiply(layer, rows, projection) for projection in range(len(layer.adapters) - 1)]
    hidden = torch.empty_like(first[0].base)
    for some in _parts(*hidden.shape):
        hidden[some] = activated(layer.activation, *_between(layer, first, some))
    last = _multiply(layer, hidden, len(layer.adapters) - 1)
    parts = [part for part in (last.base, last.low) if part is not None]
    if layer.down_bias is not None:
        parts.append(layer.down_bias.index_select(0, slots.expert.clamp(max=slots.experts - 1)))
    return _of_tokens(layer, parts, weights, x.dtype)


def gradients(layer: Layer, grad: Tensor, x: Tensor, weights: Tensor, to_x: bool, to_weights: bool) -> Gradients:
    """Of all that can have some. What is wanted of adapters is asked of each: all of a layer's are trained together."""
    products, slots, adapters = layer.products, layer.slots, layer.adapters
    last = len(adapters) - 1
    low = products.low
    made: list[tuple[Tensor, Tensor] | None] = [None] * len(adapters)
    rows = grad.index_select(0, slots.tokens)
    weight = weights.reshape(-1).index_select(0, slots.order).float().unsqueeze(-1)
    down = adapters[last]
    # To the slots' outputs, but for their weights; and through the last projection.
    into = _Product(products.backward(rows, last), None, None)
    if down is not None:
        reduced = products.grouped(rows.to(low), down.B).mul_(down.scaling)
        into = _Product(into.base, products.grouped(reduced, down.A), reduced)

    given = x.index_select(0, slots.tokens)
    first = [_multiply(layer, given, projection) for projection in range(last)]
    hidden = torch.empty_like(first[0].base)
    found = [torch.empty_like(product.base) for product in first]
    of_weight = weight.new_empty(weight.shape[0])
    for some in _parts(*hidden.shape):
        gate, up = _between(layer, first, some)
        hidden[some] = activated(layer.activation, gate, up)
        through = into.part(some)
        if to_weights:
            of_weight[some] = (hidden[some].float() * through).sum(dim=-1)
        for place, value in zip(
            found, derivatives(layer.activation, gate, up, through.mul_(weight[some])), strict=False
        ):
            if value is not None:
                place[some] = value
    if down is not None and into.reduced is not None:
        small = products.grouped(hidden.to(low), down.A.transpose(1, 2)).mul_(down.scaling).mul_(weight)
        to_B = products.outer(rows.to(low), small)
        made[last] = products.outer(into.reduced.mul_(weight), hidden.to(low)), to_B
    if to_weights and layer.down_bias is not None:
        expert = slots.expert.clamp(max=slots.experts - 1)
        for some in _parts(*rows.shape):
            of_weight[some] += (rows[some].float() * layer.down_bias.index_select(0, expert[some])).sum(dim=-1)

    parts: list[Tensor] = []
    # The up projection first, whose stack may still be there.
    for projection in reversed(range(last)):
        grads, adapter, given_A = found[projection], adapters[projection], first[projection].reduced
        if to_x:
            parts.append(products.backward(grads, projection))
        if adapter is not None and given_A is not None:
            narrow = products.grouped(grads.to(low), adapter.B).mul_(adapter.scaling)
            made[projection] = products.outer(narrow, given.to(low)), products.outer(grads.to(low), given_A)
            if to_x:
                parts.append(products.grouped(narrow, adapter.A))
    x_grad = _of_tokens(layer, parts, None, x.dtype) if to_x else None
    weights_grad = None
    if to_weights:
        sorted_back = of_weight.index_select(0, slots.places).masked_fill_(slots.nowhere[:, 0], 0.0)
        weights_grad = sorted_back.view(slots.shape).to(weights.dtype)
    return Gradients(x_grad, weights_grad, made)


def backward(
    products: Products,
    slots: Slots,
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    to_x: bool,
    to_weights: bool,
) -> tuple[Tensor, Tensor]:
    """The derivatives of `experts_4bit`; tensors without elements for what is not wanted."""
    if not len(slots.order):
        return x.new_zeros(x.shape if to_x else (0,)), weights.new_zeros(weights.shape if to_weights else (0,))
    layer = Layer(products, slots, activation, up_bias, down_bias, [None] * (3 if products.gated else 2))
    with not_cast(x):
        found = gradients(layer, grad, x, weights, to_x, to_weights)
    return (
        x.new_empty(0) if found.x is None else found.x,
        weights.new_empty(0) if found.weights is None else found.weights,
    )


def not_cast(x: Tensor) -> Any:
    """A context in which autocast leaves products alone, whose operands have their dtypes."""
    return torch.autocast(x.device.type, enabled=False)
