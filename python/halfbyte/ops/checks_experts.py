"""What the operation on the experts of a layer takes, checked for all devices alike."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.ops.checks import FLOAT_DTYPES, DTypeError, check_blocksize, check_quant_type, names

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2", "clamped_swiglu")
"""What can be between the projections; the last is gpt-oss's, and needs a gate."""


def check_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    table: Tensor,
    maps: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    intermediate: int,
    blocksize: int,
    quant_type: str,
    activation: str,
) -> None:
    """Shapes, dtypes and devices of `experts_4bit`. What the table names is its maker's to check."""
    check_quant_type(quant_type)
    check_blocksize(blocksize)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    for name, tensor in (("x", x), ("weights", weights)):
        if tensor.dtype not in FLOAT_DTYPES:
            raise DTypeError(f"{name} must have a dtype of {names(FLOAT_DTYPES)}, got {tensor.dtype}")
    for name, tensor in (("ids", ids), ("table", table)):
        if tensor.dtype is not torch.int64:
            raise DTypeError(f"{name} must have dtype torch.int64, got {tensor.dtype}")
    if x.dim() != 2:
        raise ValueError(f"x must have shape [tokens, hidden], got {list(x.shape)}")
    if ids.dim() != 2 or ids.shape[0] != x.shape[0]:
        raise ValueError(f"ids must have shape [{x.shape[0]}, k], got {list(ids.shape)}")
    if weights.shape != ids.shape:
        raise ValueError(f"weights must have shape {list(ids.shape)}, as ids, got {list(weights.shape)}")
    if table.dim() != 3 or table.shape[0] not in (2, 3) or table.shape[2] != 4:
        raise ValueError(f"table must have shape [2 or 3, experts, 4], got {list(table.shape)}")
    if maps is not None and (maps.dtype is not torch.uint8 or maps.shape != (*table.shape[:2], 256)):
        wanted = f"be torch.uint8 of shape {[*table.shape[:2], 256]}"
        raise ValueError(f"maps must {wanted}, got {maps.dtype} of shape {list(maps.shape)}")
    if intermediate < 1:
        raise ValueError(f"intermediate must be at least 1, got {intermediate}")
    gated = table.shape[0] == 3
    if activation == "clamped_swiglu" and not gated:
        raise ValueError("activation must be one of experts without a gate, got 'clamped_swiglu'")
    experts = table.shape[1]
    for name, bias, width in (("up_bias", up_bias, intermediate * (1 + gated)), ("down_bias", down_bias, x.shape[1])):
        if bias is None:
            continue
        if bias.dtype is not x.dtype:
            raise DTypeError(f"{name} must have dtype {x.dtype}, as x, got {bias.dtype}")
        if bias.shape != (experts, width):
            raise ValueError(f"{name} must have shape [{experts}, {width}], got {list(bias.shape)}")
    others = {"ids": ids, "weights": weights, "table": table, "maps": maps, "up_bias": up_bias, "down_bias": down_bias}
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, as x, got {other.device}")


def check_gradient(grad: Tensor, x: Tensor) -> None:
    """Of the operation's result, beside its first argument."""
    if grad.dtype is not x.dtype:
        raise DTypeError(f"grad must have dtype {x.dtype}, as x, got {grad.dtype}")
    if grad.shape != x.shape:
        raise ValueError(f"grad must have shape {list(x.shape)}, as x, got {list(grad.shape)}")
    if grad.device != x.device:
        raise ValueError(f"grad must be on {x.device}, as x, got {grad.device}")
