"""What tests of functions and modules on a GPU share."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import halfbyte.functional as F  # noqa: E402

import kernels as k  # noqa: E402

ops = torch.ops.halfbyte
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def bound(x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The product in float64, and how far from it one in the dtype of `x` may be."""
    exact = x.detach().double() @ dense.double().T
    size = x.detach().double().abs() @ dense.double().abs().T
    if bias is not None:
        exact, size = exact + bias.detach().double(), size + bias.detach().double().abs()
    unit = torch.finfo(x.dtype).eps + (x.shape[-1] + 8) * torch.finfo(torch.float32).eps
    return exact, 4 * unit * size + 2.0**-24


def close(y: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    exact, most = bound(x, dense, bias)
    error = (y.detach().double() - exact).abs()
    assert bool((error <= most).all()), float((error / most).max())


def pair(n: int, columns: int, dtype: torch.dtype = torch.bfloat16, **kwargs: object):
    """A weight quantized on the GPU: codes, state, and its dense values."""
    values = torch.randn(n, columns, dtype=dtype, device="cuda") * torch.rand(n, 1, dtype=dtype, device="cuda")
    packed, state = F.quantize_4bit(values, **{"quant_type": "nf4", **kwargs})
    return packed, state, F.dequantize_4bit(packed, state)


def same_state(a: F.QuantState, b: F.QuantState) -> bool:
    parts = lambda s: (s.absmax, s.code, s.offset, *(() if s.state2 is None else (s.state2.absmax, s.state2.code)))  # noqa: E731
    return a == b and all(k.same_bits(p, q) for p, q in zip(parts(a), parts(b), strict=True))


def gradients(model: torch.nn.Module, call, indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
    shift = torch.ones(64, device="cuda", requires_grad=True)
    model.zero_grad()
    y = call(indices, shift)
    y.pow(2).sum().backward()
    return y.detach(), shift.grad, model.first.bias.grad.clone()
