"""Models in a few lines of torch, and which of their layers are packed."""

from __future__ import annotations

from typing import Any

import torch
from halfbyte.nn import Linear4bit
from torch import nn

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def packed(model: nn.Module) -> dict[str, str]:
    """Path and type of every 4-bit layer."""
    return {name: m.weight.quant_type for name, m in model.named_modules() if isinstance(m, Linear4bit)}


def mlp(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96, **options), nn.GELU(), nn.Linear(96, 32, **options))
