"""Arguments for operations with a packed weight."""

from __future__ import annotations

import halfbyte.functional as F
import torch

ops = torch.ops.halfbyte


def weight(n, k, dtype=torch.float32, nested=False, quant_type="nf4", storage=torch.uint8):
    """Tensors, and scalars, of a packed weight as the operations take them."""
    packed, state = F.quantize_4bit(
        torch.randn(n, k, dtype=dtype), quant_type=quant_type, compress_statistics=nested, quant_storage=storage
    )
    return (packed, *state.scales()), state.weight(), state
