"""Training through the experts of a layer: gradients beside those of the layers one by one."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from compilers import needs_compiler
from halfbyte.backends import experts_torch
from halfbyte.nn import Expert, Experts4bit, Linear4bit
from torch.utils.checkpoint import checkpoint

EXPERTS, HIDDEN, INTERMEDIATE = 5, 64, 96
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GATED = ("gate_proj", "up_proj", "down_proj")


class Squared(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu().square()


# As transformers has it.
Squared.__name__ = "ReLUSquaredActivation"
Squared.__module__ = "transformers.activations"


def clamped(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


clamped.__qualname__ = "GptOssExperts._apply_gate"
clamped.__module__ = "transformers.models.gpt_oss"


def layer(act: Any = None, gated: bool = True, biases: bool = False, **recipe: Any) -> Experts4bit:
    """Experts of random weights, packed."""
    torch.manual_seed(3)
    names = GATED if gated else (None, *GATED[1:])
    experts = []
    for _ in range(EXPERTS):
        expert = Expert()
        for name in filter(None, names):
            rows, columns = (HIDDEN, INTERMEDIATE) if name == "down_proj" else (INTERMEDIATE, HIDDEN)
            expert.add_module(name, Linear4bit(columns, rows, bias=False, quant_type="nf4", **recipe))
        experts.append(expert)
    module = Experts4bit(experts, names)
    if act is clamped:
        module.gate, module.limit, module.alpha = clamped, 7.0, 1.702  # type: ignore[assignment]
    else:
        module.act_fn = act or torch.nn.SiLU()
    if biases:
        name = "gate_up_proj_bias" if gated else "up_proj_bias"
        setattr(module, name, torch.nn.Parameter(torch.randn(EXPERTS, INTERMEDIATE * (1 + gated))))
        module.down_proj_bias = torch.nn.Parameter(torch.randn(EXPERTS, HIDDEN))
    return module.to("cpu").requires_grad_(False)


def inputs(tokens: int = 7, k: int = 2, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[torch.Tensor]:
    torch.manual_seed(5)
    x = (scale * torch.randn(tokens, HIDDEN)).to(dtype)
    return [x, torch.rand(tokens, EXPERTS).topk(k).indices, torch.rand(tokens, k)]


def gradients(call: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    """The result, and the gradients of a sum of it with other factors for each element."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = call(x, ids, weights)
    factors = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    y.backward(factors)
    found: list[Any] = [x.grad, weights.grad]
    assert [part.dtype for part in found] == [x.dtype, weights.dtype]
    return [y.detach(), *found]


UNITS = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def errors(found: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    """By norms, since what is clamped may be on another side of the limit once it is rounded."""
    assert [part.shape for part in found] == [part.shape for part in expected]
    pairs = zip(found, expected, strict=True)
    return [float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30)) for a, b in pairs]


def close(found: list[torch.Tensor], expected: list[torch.Tensor], dtype: torch.dtype) -> None:
    assert all(error <= UNITS[dtype] for error in errors(found, expected)), errors(found, expected)


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The experts one by one; calls of the layer that come to them fail."""
    real = Experts4bit._one_by_one

    def refused(*args: Any) -> Any:
        raise AssertionError("the experts are called one by one")

    monkeypatch.setattr(Experts4bit, "_one_by_one", refused)
    return real


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "act",
    [None, torch.nn.GELU(), torch.nn.GELU("tanh"), Squared(), clamped],
    ids=["silu", "gelu", "gelu_tanh", "relu2", "clamped_swiglu"],
)
def test_gradients_are_those_of_experts_one_by_one(act: Any, dtype: torch.dtype, together: Any) -> None:
    for gated, biases, recipe in (
        (True, True, {"compress_statistics": False}),
        (act is clamped, act is clamped, {"compress_statistics": True, "blocksize": 128}),
    ):
        module = layer(act, gated, biases, **recipe)
        if act is clamped:
            # Both of its limits are met.
            module.gate_up_proj_bias.mul_(6)
        for tokens, k in ((1, 3), (40, 3)):
            args = inputs(tokens, k, dtype)
            found = gradients(module, *args)
            expected = gradients(lambda *a, m=module: together(m, *a), *args)
            if dtype is torch.float32:
                close(found, expected, dtype)
                continue
            # No further from what they are without rounding.
            exact = gradients(lambda *a, m=module: together(m, *a), args[0].float(), *args[1:])
            # One token has three gradients of the router's weights, too few for errors to average.
            units = (4 if act is clamped else 1) * (2 if tokens == 1 else 1)
            for ours, theirs in zip(errors(found, exact), errors(expected, exact), strict=True):
                assert ours <= max(1.1 * theirs, UNITS[dtype] * units)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu2", "clamped_swiglu"])
def test_derivatives_are_those_of_the_activations(name: str) -> None:
    torch.manual_seed(0)
    gate, up = (5 * torch.randn(2, 300, dtype=torch.float64)).requires_grad_().unbind()
    for other in (up, None):
        if other is None and name == "clamped_swiglu":
            continue
        of = [part for part in (gate, other) if part is not None]
        y = experts_torch.activated(name, gate, other)
        factors = torch.randn(300, dtype=torch.float64)
        expected = torch.autograd.grad(y, of, factors, retain_graph=True)
        found = experts_torch.derivatives(name, gate.detach(), other if other is None else other.detach(), factors)
        for a, b in zip(found, expected, strict=False):
            torch.testing.assert_close(a, b)
        assert (found[1] is None) == (other is None)


def test_gradients_of_one_of_both_and_the_same_bits_each_time(together: Any) -> None:
    module = layer()
    args = inputs(33, 3, torch.bfloat16)
    _, x_grad, weights_grad = gradients(module, *args)
    for place, expected in ((0, x_grad), (2, weights_grad)):
        given = [arg.clone() for arg in args]
        given[place].requires_grad_()
        y = module(*given)
        factors = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
        y.backward(factors)
        assert torch.equal(given[place].grad, expected)  # type: ignore[arg-type]


def test_gradients_with_numbers_of_no_expert_and_no_tokens(together: Any) -> None:
    module = layer(biases=True)
    x, ids, weights = inputs(9, 3)
    some = ids.clone()
    some[::2, 1] = EXPERTS
    some[4] = EXPERTS + 9
    none = torch.where(some >= EXPERTS, 0.0, weights)
    y, x_grad, weights_grad = gradients(module, x, some, weights)
    y_none, x_none, weights_none = gradients(module, x, ids, none)
    close([y, x_grad], [y_none, x_none], torch.float32)
    assert (weights_grad[some >= EXPERTS] == 0).all()
    close([weights_grad], [torch.where(some >= EXPERTS, 0.0, weights_none)], torch.float32)
    assert (x_grad[4] == 0).all()
    for empty in ([x[:0], ids[:0], weights[:0]], [x, ids[:, :0], weights[:, :0]]):
        y, x_grad, weights_grad = gradients(module, *empty)
        assert y.shape == x_grad.shape == empty[0].shape
        assert weights_grad.shape == empty[2].shape
        assert (x_grad == 0).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_checkpointing_and_autocast(reentrant: bool, together: Any) -> None:
    module = layer()
    args = inputs(20)
    plain = gradients(module, *args)
    again = gradients(lambda *a: checkpoint(module, *a, use_reentrant=reentrant), *args)
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))

    def cast(call: Any) -> Any:
        def called(*a: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return call(*a)  # type: ignore[no-any-return]

        return called

    found = gradients(cast(module), *args)
    assert max(errors(found, gradients(cast(lambda *a: together(module, *a)), *args))) < 0.02
    assert not torch.equal(found[1], plain[1])
    again = gradients(cast(lambda *a: checkpoint(module, *a, use_reentrant=reentrant)), *args)
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))


def test_gradients_live_longer_than_the_layers(together: Any) -> None:
    module = layer()
    x, ids, weights = inputs(20)
    _, expected, _ = gradients(module, x, ids, weights)
    x.requires_grad_()
    y = module(x, ids, weights)
    factors = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    addresses = module._held.table.addresses  # type: ignore[union-attr]
    named = addresses.named
    del module, addresses
    assert all(weight.codes.numel() for projection in named for weight in projection)
    del named
    # What would be where the codes were.
    rubbish = [torch.full((HIDDEN * INTERMEDIATE // 2,), 255, dtype=torch.uint8) for _ in range(200)]
    y.backward(factors)
    assert torch.equal(x.grad, expected)  # type: ignore[arg-type]
    assert len(rubbish) == 200


def test_gradients_cannot_be_differentiated_again(together: Any) -> None:
    module = layer()
    x, ids, weights = inputs()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(module(x, ids, weights).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad.sum().backward()


def test_opcheck_experts_backward(together: Any) -> None:
    module = layer(biases=True)
    x, ids, weights = inputs(dtype=torch.bfloat16)
    module(x, ids, weights)
    table: Any = module._held.table
    args = (
        torch.randn_like(x), x, ids, weights, table.addresses, table.up_bias.bfloat16(), table.down_bias.bfloat16(),
        INTERMEDIATE, 64, "nf4", table.kind.nested, "silu",
    )  # fmt: skip
    backward = torch.ops.halfbyte.experts_4bit_backward
    for wanted in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(backward.default, (*args, *wanted))
        found = backward(*args, *wanted)
        assert [part.numel() > 0 for part in found] == list(wanted)
    with pytest.raises(ValueError, match=r"grad must have shape \[7, 64\]"):
        backward(args[0][:3], *args[1:], True, True)
    with pytest.raises(TypeError, match="grad must have dtype"):
        backward(args[0].half(), *args[1:], True, True)


@needs_compiler
@pytest.mark.slow
def test_gradients_compile_without_a_break(together: Any) -> None:
    torch._dynamo.reset()
    module = layer()
    args = inputs(31, dtype=torch.bfloat16)
    module(*args)
    compiled = torch.compile(lambda *a: module(*a) * 2, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = gradients(compiled, *args)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(lambda *a: module(*a) * 2, *args), strict=True))
