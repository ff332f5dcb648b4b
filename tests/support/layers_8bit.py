"""Layers of rows of 8 bits for tests: quantized ones, those that are trained, and whether two are the same."""

from __future__ import annotations

import torch
from halfbyte.nn import Linear8bitLt

THRESHOLDS = (0.0, 6.0)


def quantized(n=48, k=96, *, bias=True, threshold=0.0, dtype=torch.float32):
    """A dense layer, and the quantized one of the same weight."""
    dense = torch.nn.Linear(k, n, bias=bias, dtype=dtype)
    layer = Linear8bitLt(k, n, bias=bias, has_fp16_weights=False, threshold=threshold, device="meta")
    layer.load_state_dict(dense.state_dict(), assign=True)
    return dense, layer


def trained(n=48, k=96, threshold=0.0):
    layer = Linear8bitLt(k, n, threshold=threshold)
    assert layer.state.has_fp16_weights
    assert layer.weight.requires_grad
    return layer


def same_layer(a, b):
    x = torch.randn(3, a.in_features)
    assert torch.equal(a.weight, b.weight)
    assert torch.equal(a.weight.SCB, b.weight.SCB)
    assert torch.equal(a.state.SCB, b.state.SCB)
    assert torch.equal(a(x), b(x))
