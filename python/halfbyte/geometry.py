"""The sizes of the format, and the keys of a 4-bit weight in a state dict: constants, without torch."""

from __future__ import annotations

QUANT_TYPES = ("nf4", "fp4")
"""The two sets of sixteen values."""

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""How many consecutive values may share a scale."""

NESTED_BLOCKSIZE = 256
"""How many scales share a scale of their own."""

PACKED_KEYS = tuple(f"quant_state.bitsandbytes__{quant_type}" for quant_type in QUANT_TYPES)
"""The state-dict keys, relative to the weight's, of what is not a tensor."""

TENSOR_KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
"""The state-dict keys, relative to the weight's, of the state's tensors."""


def blocks_of(n: int, blocksize: int) -> int:
    """How many blocks `n` values fill, the last one perhaps in part."""
    return (n + blocksize - 1) // blocksize


def packed_bytes(n: int) -> int:
    """How many bytes hold the codes of `n` values."""
    return (n + 1) // 2
