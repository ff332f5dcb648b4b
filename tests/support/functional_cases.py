"""Tensors and cases for tests of `halfbyte.functional`."""

from __future__ import annotations

from pathlib import Path

import torch

GOLDEN = Path(__file__).parents[1] / "golden" / "blockwise4.safetensors"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
STORAGES = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
