"""The peer of benches/offline.py: load a model while quantizing it with transformers + bitsandbytes, and save it.

This is how a 4-bit checkpoint is made without halfbyte: `python benches/offline_peer.py SOURCE DESTINATION`.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def main(source: str, destination: str) -> None:
    """Quantize to NF4 with double quantization on the CPU, everything else in bfloat16."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(destination)


if __name__ == "__main__":
    main(*sys.argv[1:])
