"""`halfbyte.nn.lora`: base and adapters as one product, against float64 and against the modules that it replaces."""

from __future__ import annotations

import gc
import itertools
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")

from compilers import needs_compiler  # noqa: E402
from halfbyte.functional import dequantize_4bit, quantize_4bit  # noqa: E402
from halfbyte.nn import lora  # noqa: E402
from halfbyte.nn.lora import Adapter, lora_linear_4bit  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

K, N = 96, 80
HALF = (torch.bfloat16, torch.float16)
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


class Layer(NamedTuple):
    """A packed weight with a bias, and the dense weight that it stands for."""

    packed: Any
    state: Any
    bias: Any
    dense: Any

    def __call__(self, x: Any, adapters: Any, compute: Any) -> Any:
        return lora_linear_4bit(x, self.packed, self.state, self.bias, adapters, compute)


def layer(seed: int = 0, bias: bool = True, nested: bool = True) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator) / K**0.5
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    shift = torch.randn(N, generator=generator) if bias else None
    return Layer(packed, state, shift, dequantize_4bit(packed, state).double())


def inputs(shape: tuple[int, ...], dtype: Any, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()


def adapter(rank: int, dtype: Any, scaling: float, x: Any = None, seed: int = 2) -> Adapter:
    generator = torch.Generator().manual_seed(seed + rank)
    A = (torch.randn(rank, K, generator=generator) / K**0.5).to(dtype).requires_grad_()
    B = (torch.randn(N, rank, generator=generator) / rank**0.5).to(dtype).requires_grad_()
    return Adapter(A, B, scaling, x)


def in_float64(layer: Layer, x: Any, adapters: Any) -> tuple[Any, list[Any]]:
    """The output from the same numbers in float64, and leaves in the order of `leaves`."""
    copies = {id(t): t.detach().double().requires_grad_() for t in leaves(layer, x, adapters)}

    def of(tensor: Any) -> Any:
        return copies[id(tensor)] if id(tensor) in copies else tensor.double()

    y = of(x) @ layer.dense.T
    if layer.bias is not None:
        y = y + of(layer.bias)
    for one in adapters:
        given = of(x if one.x is None else one.x)
        y = y + one.scaling * (given @ of(one.A).T) @ of(one.B).T
    return y, list(copies.values())


def leaves(layer: Layer, x: Any, adapters: Any) -> list[Any]:
    found = [x, *(t for one in adapters for t in (one.x, one.A, one.B) if t is not None)]
    if layer.bias is not None and layer.bias.requires_grad:
        found.append(layer.bias)
    return [t for t in found if t.requires_grad]


def error(found: Any, exact: Any) -> float:
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm())


def as_on_a_gpu(monkeypatch: Any, wide: bool = True) -> None:
    """The adapters' products in the compute dtype, and 16-bit products added to float32 sums, if `wide`."""

    def wide_addmm(total: Any, a: Any, b: Any, beta: int, alpha: float) -> Any:
        assert total.dtype == a.dtype == b.dtype != torch.float32
        product = alpha * (a.float() @ b.float())
        assert total.shape == product.shape
        return product + total.float() if beta else product

    monkeypatch.setattr(lora, "_low_dtype", lambda x, compute: compute)
    if wide:
        monkeypatch.setattr(lora, "_widens", lambda a: a.dtype != torch.float32)
        monkeypatch.setattr(lora, "_wide_addmm", wide_addmm)


# ---- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "gpu", "gpu before torch 2.8"])
@pytest.mark.parametrize("x_dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("compute", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_equals_float64(
    monkeypatch: pytest.MonkeyPatch, device: str, x_dtype: Any, compute: Any, factor_dtype: Any
) -> None:
    if device != "cpu":
        as_on_a_gpu(monkeypatch, wide=device == "gpu")
    one = layer()
    x = inputs((3, 5, K), x_dtype)
    adapters = [adapter(4, factor_dtype, 2.0), adapter(8, factor_dtype, 0.25, inputs((3, 5, K), x_dtype, 7))]
    y = one(x, adapters, compute)
    assert y.dtype == x_dtype
    assert y.shape == (3, 5, N)
    exact, exact_leaves = in_float64(one, x, adapters)
    tolerance = 4 * max(EPS[t] for t in (x_dtype, compute, factor_dtype))
    assert error(y, exact) < tolerance
    grad = inputs((3, 5, N), x_dtype, 9).detach()
    own = leaves(one, x, adapters)
    found = torch.autograd.grad(y, own, grad)
    for leaf, a, b in zip(own, found, torch.autograd.grad(exact, exact_leaves, grad.double()), strict=True):
        assert a.dtype == leaf.dtype
        assert a.shape == leaf.shape
        assert error(a, b) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_without_gradients_gives_the_same_bits(dtype: Any) -> None:
    one, x, adapters = layer(), inputs((4, K), dtype), [adapter(4, torch.float32, 2.0)]
    with torch.no_grad():
        plain = one(x, adapters, torch.bfloat16)
    assert plain.grad_fn is None
    assert torch.equal(one(x, adapters, torch.bfloat16), plain)
    with torch.inference_mode():
        assert torch.equal(one(x, adapters, torch.bfloat16), plain)


@pytest.mark.parametrize("shape", [(K,), (1, K), (0, K), (2, 0, K), (2, 1, 3, K)])
def test_lora_takes_any_leading_shape(shape: tuple[int, ...]) -> None:
    one, x, adapters = layer(nested=False), inputs(shape, torch.float32), [adapter(2, torch.float32, 0.5)]
    y = one(x, adapters, torch.float32)
    exact, exact_leaves = in_float64(one, x, adapters)
    assert y.shape == exact.shape
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(y.sum(), leaves(one, x, adapters))
    for a, b in zip(found, torch.autograd.grad(exact.sum(), exact_leaves), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(K,), (4, K), (2, 3, K)])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_lora_output_may_be_changed_in_place(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], x_dtype: Any, compute: Any
) -> None:
    """As a linear layer's: no view, which autograd would protect."""
    as_on_a_gpu(monkeypatch)
    one, x, adapters = layer(), inputs(shape, x_dtype), [adapter(4, torch.float32, 2.0)]
    own = leaves(one, x, adapters)
    expected = torch.autograd.grad((one(x, adapters, compute) * 2.0).sum(), own)
    y = one(x, adapters, compute)
    assert not y._is_view()
    y.mul_(2.0)
    found = torch.autograd.grad(y.sum(), own)
    assert all(map(torch.equal, found, expected))


def test_lora_gradient_of_a_trained_bias() -> None:
    one = layer()
    one.bias.requires_grad_()
    x, adapters = inputs((2, 3, K), torch.bfloat16), [adapter(2, torch.float32, 0.5)]
    y = one(x, adapters, torch.bfloat16)
    (found,) = torch.autograd.grad(y.sum(), one.bias)
    assert found.dtype is torch.float32
    assert torch.equal(found, torch.full((N,), 6.0))


@pytest.mark.parametrize("trained", [t for n in range(4) for t in itertools.combinations("xAB", n)])
def test_lora_gradients_go_only_where_they_are_wanted(trained: tuple[str, ...]) -> None:
    one, x, first = layer(), inputs((4, K), torch.float32), adapter(4, torch.float32, 2.0)
    second = adapter(3, torch.float32, 0.5)
    for name, tensor in (("x", x), ("A", first.A), ("B", first.B)):
        tensor.requires_grad_(name in trained)
    # Of two adapters, the second is frozen.
    second.A.requires_grad_(False)
    second.B.requires_grad_(False)
    y = one(x, [first, second], torch.float32)
    assert y.requires_grad == bool(trained)
    if trained:
        exact, exact_leaves = in_float64(one, x, [first, second])
        found = torch.autograd.grad(y.sum(), leaves(one, x, [first, second]))
        assert len(found) == len(trained)
        for a, b in zip(found, torch.autograd.grad(exact.sum(), exact_leaves), strict=True):
            assert error(a, b) < 1e-5


def test_lora_of_no_adapter_is_the_base_product() -> None:
    one, x = layer(), inputs((4, K), torch.float32)
    expected = x.double() @ one.dense.T + one.bias.double()
    torch.testing.assert_close(one(x, [], torch.float32).double(), expected, rtol=1e-5, atol=1e-5)


def test_lora_small_adapter_survives_a_float32_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contributions below the last place of a 16-bit output are kept where the output is float32."""
    as_on_a_gpu(monkeypatch)
    one, x = layer(bias=False), inputs((64, K), torch.float32)
    small = adapter(4, torch.float32, 2.0**-12)
    with torch.no_grad():
        difference = one(x, [small], torch.bfloat16) - one(x, [], torch.bfloat16)
        expected = 2.0**-12 * (x @ small.A.T) @ small.B.T
    assert error(difference, expected) < 0.02
    # And in the gradient of the input.
    grads = []
    for adapters in ([small], []):
        y = one(x, adapters, torch.bfloat16)
        grads.append(torch.autograd.grad(y, x, torch.ones_like(y))[0])
    expected = 2.0**-12 * (torch.ones(64, N) @ small.B) @ small.A
    assert error(grads[0] - grads[1], expected) < 0.02


def test_lora_cannot_be_differentiated_twice() -> None:
    one, x, adapters = layer(), inputs((4, K), torch.float32), [adapter(4, torch.float32, 2.0)]
    (grad,) = torch.autograd.grad(one(x, adapters, torch.float32).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("when", ["forward", "both"])
def test_lora_products_keep_their_dtype_under_autocast(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Whatever autocast wants: the caller has decided by `compute_dtype`."""
    as_on_a_gpu(monkeypatch)
    one, x, adapters = layer(), inputs((4, K), torch.float32), [adapter(4, torch.float32, 2.0)]
    own = leaves(one, x, adapters)
    y = one(x, adapters, torch.float32)
    expected = torch.autograd.grad(y, own, torch.ones_like(y))
    with torch.autocast("cpu", torch.bfloat16):
        z = one(x, adapters, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=when == "both"):
        found = torch.autograd.grad(z, own, torch.ones_like(z))
    assert torch.equal(y, z)
    assert all(map(torch.equal, found, expected))


def test_lora_refuses_inputs_of_another_size() -> None:
    with pytest.raises(ValueError, match="x"):
        layer()(inputs((4, K + 1), torch.float32), [adapter(4, torch.float32, 2.0)], torch.float32)


# ---- memory ----------------------------------------------------------------------------------------------------------


def saved(function: Any) -> tuple[Any, list[Any]]:
    """What a function returns, and the tensors that it keeps for backward."""
    kept: list[Any] = []

    def pack(tensor: Any) -> Any:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return function(), kept


def storages(tensors: Any) -> dict[int, int]:
    """Bytes by address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}


def test_lora_keeps_the_cast_input_and_rank_sized_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(monkeypatch)
    one, x, adapters = layer(), inputs((64, K), torch.float32), [adapter(4, torch.float32, 2.0)]
    y, kept = saved(lambda: one(x, adapters, torch.bfloat16))
    weight = storages([one.packed, one.state.absmax, one.state.state2.absmax, one.state.offset])
    rest = {address: size for address, size in storages(kept).items() if address not in weight}
    assert sorted(rest.values()) == sorted(2 * n for n in (64 * K, 4 * K, N * 4, 64 * 4))
    del y


def test_lora_keeps_no_input_for_frozen_factors() -> None:
    one, x, frozen = layer(), inputs((64, K), torch.float32), adapter(4, torch.float32, 2.0)
    frozen.A.requires_grad_(False)
    frozen.B.requires_grad_(False)
    _, kept = saved(lambda: one(x, [frozen], torch.float32))
    assert x.untyped_storage().data_ptr() not in storages(kept)


def casts(layers: int, monkeypatch: pytest.MonkeyPatch, between: Any = None) -> int:
    """How many casts of one input that many layers keep."""
    as_on_a_gpu(monkeypatch)
    x = inputs((64, K), torch.float32) * 1.0
    ones = [layer(seed) for seed in range(layers)]
    result = []

    def run() -> None:
        for one in ones:
            result.append(one(x, [adapter(4, torch.float32, 2.0)], torch.bfloat16))
            if between is not None:
                between(x)

    _, kept = saved(run)
    total = sum(y.sum() for y in result)
    if between is None:
        total.backward()
    return sum(size == 2 * 64 * K for size in storages(kept).values())


def test_lora_layers_share_the_cast_of_their_input(monkeypatch: pytest.MonkeyPatch) -> None:
    assert casts(3, monkeypatch) == 1


def test_lora_input_that_changed_is_cast_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert casts(3, monkeypatch, lambda x: x.mul_(2.0)) == 3


def test_lora_cast_is_not_kept_longer_than_its_input() -> None:
    one, x = layer(), inputs((4, K), torch.float32) * 1.0
    y = one(x, [], torch.bfloat16)
    assert lora._thread.last.cast is not None
    del x, y
    gc.collect()
    assert lora._thread.last.cast is None


def test_lora_cast_of_a_buffer_is_not_shared() -> None:
    """What is no result of autograd may be written to without torch's knowledge."""
    one, x = layer(), inputs((4, K), torch.float32).detach()
    first = one(x, [], torch.bfloat16)
    x.numpy()[:] *= 2.0
    assert not torch.equal(one(x, [], torch.bfloat16), first)


# ---- checkpoints, compilers and transformations ----------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_lora_checkpointed(reentrant: bool) -> None:
    one, x, adapters = layer(), inputs((4, K), torch.float32), [adapter(4, torch.float32, 2.0)]
    own = leaves(one, x, adapters)

    def run(x: Any) -> Any:
        return torch.relu(one(x * 1.0, adapters, torch.bfloat16))

    for function in (run, lambda x: checkpoint(run, x, use_reentrant=reentrant)):
        for leaf in own:
            leaf.grad = None
        y = function(x)
        y.square().sum().backward()
        if function is run:
            expected = [leaf.grad.clone() for leaf in own]
            plain = y.detach()
    assert torch.equal(y, plain)
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(own, expected, strict=True))


@needs_compiler
def test_lora_compiles_without_a_break() -> None:
    one, x = layer(), inputs((4, K), torch.float32)
    adapters = [adapter(4, torch.float32, 2.0), adapter(2, torch.bfloat16, 0.5)]
    own = leaves(one, x, adapters)

    def run(x: Any) -> Any:
        return one(x, adapters, torch.float32)

    y, z = run(x), torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(z, y, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(z.sum(), own)
    for a, b in zip(found, torch.autograd.grad(y.sum(), own), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if a.dtype is torch.bfloat16 else 1e-4, atol=1e-4)


def test_lora_in_torch_func() -> None:
    one, x, first = layer(), inputs((4, K), torch.float32), adapter(4, torch.float32, 2.0)

    def loss(A: Any, x: Any) -> Any:
        return one(x, [first._replace(A=A)], torch.float32).square().sum()

    (expected,) = torch.autograd.grad(loss(first.A, x), first.A)
    torch.testing.assert_close(torch.func.grad(loss)(first.A.detach(), x.detach()), expected)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(first.A.detach(), x.detach())
    torch.testing.assert_close(each.sum(0), expected, rtol=1e-4, atol=1e-4)
    tangent = torch.randn_like(first.A)
    _, forward = torch.func.jvp(lambda A: loss(A, x.detach()), (first.A.detach(),), (tangent,))
    torch.testing.assert_close(forward, (expected * tangent).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"A": (4, K + 8)}, "A is .4, 104., not .rank, 96."),
        ({"A": (4,)}, "A is .4., not"),
        ({"B": (N + 8, 4)}, "B is .88, 4., not .80, 4."),
        ({"B": (N, 8)}, "B is .80, 8., not .80, 4."),
        ({"x": (3, K)}, "x is .3, 96., not .2, 96."),
    ],
    ids=str,
)
def test_adapters_that_do_not_fit_are_refused(wrong: dict[str, tuple[int, ...]], named: str) -> None:
    """Before anything is computed: a kernel would read and write what is not there."""
    given = adapter(4, torch.float32, 1.0)._replace(**{name: torch.zeros(shape) for name, shape in wrong.items()})
    with pytest.raises(ValueError, match=named):
        layer()(inputs((2, K), torch.float32), [given], torch.float32)
