"""Modules whose weights have 4 or 8 bits a value, under the names that bitsandbytes gave them."""

from __future__ import annotations

from halfbyte.nn._quantized import fix_4bit_weight_quant_state_from_module
from halfbyte.nn.embedding import Embedding4bit, Embedding8bit, EmbeddingFP4, EmbeddingNF4
from halfbyte.nn.int8_params import Int8Params
from halfbyte.nn.linear4bit import Linear4bit, LinearFP4, LinearNF4
from halfbyte.nn.linear8bit import Linear8bitLt
from halfbyte.nn.params import Params4bit

__all__ = [
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "Params4bit",
    "fix_4bit_weight_quant_state_from_module",
]
