"""Packed layers to test with, and what is compared of them."""

from __future__ import annotations

import torch
from halfbyte.nn import Linear4bit

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
STORAGES = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
STATE_KEYS = ("absmax", "quant_map")
NESTED_KEYS = ("nested_absmax", "nested_quant_map")


def bytes_of(tensor):
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def keys_of(quant_type, nested, bias):
    keys = {"weight", *(f"weight.{k}" for k in STATE_KEYS), f"weight.quant_state.bitsandbytes__{quant_type}"}
    return keys | {f"weight.{k}" for k in NESTED_KEYS if nested} | {"bias" for _ in range(bias)}


def quantized(n=48, k=96, *, dtype=torch.float32, **kwargs):
    """A dense layer, and the quantized one of the same weight."""
    dense = torch.nn.Linear(k, n, bias=kwargs.get("bias", True), dtype=dtype)
    layer = Linear4bit(k, n, **{"quant_type": "nf4", **kwargs}, device="meta")
    layer.load_state_dict(dense.state_dict(), assign=True)
    return dense, layer
