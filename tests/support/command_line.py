"""The command in a process of its own, and small checkpoints for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import halfbyte
import numpy as np
from safetensors.numpy import save_file

PACKAGE = Path(halfbyte.__file__).parent
COMMANDS = ("quantize", "dequantize", "inspect", "verify", "doctor", "completion")


def write_checkpoint(folder: Path, layers: int = 3, **config: object) -> Path:
    """A Llama-like checkpoint of float16 weights, 64 x 128 each."""
    rng = np.random.default_rng(0)
    tensors = {"model.embed_tokens.weight": rng.standard_normal((32, 128)).astype(np.float16)}
    for i in range(layers):
        for name in ("self_attn.q_proj", "mlp.up_proj"):
            tensors[f"model.layers.{i}.{name}.weight"] = rng.standard_normal((64, 128)).astype(np.float16)
        tensors[f"model.layers.{i}.input_layernorm.weight"] = np.ones(128, np.float16)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    facts = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps({**facts, **config}, indent=2))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def environment(**more: str) -> dict[str, str]:
    paths = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1", **more}


def run(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, without a terminal."""
    command = [sys.executable, "-m", "halfbyte", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**more), timeout=600)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
