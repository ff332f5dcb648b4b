"""Modules whose weights are packed to 4 bits, under the names that bitsandbytes gave them."""

from __future__ import annotations

from halfbyte.nn._quantized import fix_4bit_weight_quant_state_from_module
from halfbyte.nn.embedding import Embedding4bit, EmbeddingFP4, EmbeddingNF4
from halfbyte.nn.linear4bit import Linear4bit, LinearFP4, LinearNF4
from halfbyte.nn.params import Params4bit

__all__ = [
    "Embedding4bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Linear4bit",
    "LinearFP4",
    "LinearNF4",
    "Params4bit",
    "fix_4bit_weight_quant_state_from_module",
]
