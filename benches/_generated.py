"""Checkpoints for the benches: Llamas and experts with random weights, generated once and kept in .cache/benches/.

Weights are bfloat16, normal with a standard deviation of 0.02, and 1 in norms: with small ones a model would have
outputs next to zero, and nothing to learn. Embedding and output layer are one (tied).
"""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from _table import MIB

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "benches"


@dataclass(frozen=True)
class Geometry:
    """The sizes of a Llama."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    def config(self) -> dict[str, object]:
        """The config.json of the model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": self.vocabulary - 256,
            "eos_token_id": self.vocabulary - 255,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.mlp,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": self.vocabulary,
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the model's tensors."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            shapes |= {
                f"{at}.input_layernorm.weight": (self.hidden,),
                f"{at}.mlp.down_proj.weight": (self.hidden, self.mlp),
                f"{at}.mlp.gate_proj.weight": (self.mlp, self.hidden),
                f"{at}.mlp.up_proj.weight": (self.mlp, self.hidden),
                f"{at}.post_attention_layernorm.weight": (self.hidden,),
                f"{at}.self_attn.k_proj.weight": (self.kv_heads * self.head_dim, self.hidden),
                f"{at}.self_attn.o_proj.weight": (self.hidden, self.heads * self.head_dim),
                f"{at}.self_attn.q_proj.weight": (self.heads * self.head_dim, self.hidden),
                f"{at}.self_attn.v_proj.weight": (self.kv_heads * self.head_dim, self.hidden),
            }
        shapes["model.norm.weight"] = (self.hidden,)
        return shapes

    def weights(self) -> int:
        """The number of weights."""
        return sum(prod(shape) for shape in self.shapes().values())


LLAMA_1B = Geometry(16, 2048, 8192, 32, 8, 64, 128_256)
LLAMA_3B = Geometry(28, 3072, 8192, 24, 8, 128, 128_256)
SMALL = Geometry(4, 512, 1536, 8, 4, 64, 8192)


def geometry(name: str) -> Geometry:
    """The geometry of that name: "llama-3b", "small", or "layers-N" for a Llama-3.2-1B of N layers."""
    named = {"llama-3b": LLAMA_3B, "small": SMALL}
    return named[name] if name in named else replace(LLAMA_1B, layers=int(name.removeprefix("layers-")))


def huge_shapes() -> dict[str, tuple[int, ...]]:
    """A model of one layer's worth of names whose one linear weight is 128,256 x 8,192 (2.1 GB in bfloat16)."""
    return {"model.layers.0.mlp.down_proj.weight": (LLAMA_1B.vocabulary, 8192)}


# One layer of Qwen3-30B-A3B, and one of gpt-oss-20b.
QWEN_EXPERTS = (128, 2048, 768)
GPT_OSS_EXPERTS = (32, 2880, 2880)


def moe_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """The experts of one layer: "moe" (one tensor for each), "moe-fused", "moe-gpt-oss" (transposed, alternating)."""
    experts, hidden, inner = GPT_OSS_EXPERTS if kind == "moe-gpt-oss" else QWEN_EXPERTS
    at = "model.layers.0.mlp"
    router = {f"{at}.{'router' if kind == 'moe-gpt-oss' else 'gate'}.weight": (experts, hidden)}
    if kind == "moe-gpt-oss":
        return router | {
            f"{at}.experts.gate_up_proj": (experts, hidden, 2 * inner),
            f"{at}.experts.down_proj": (experts, inner, hidden),
        }
    if kind == "moe-fused":
        return router | {
            f"{at}.experts.gate_up_proj": (experts, 2 * inner, hidden),
            f"{at}.experts.down_proj": (experts, hidden, inner),
        }
    shapes = {
        f"{at}.experts.{expert}.{name}_proj.weight": (hidden, inner) if name == "down" else (inner, hidden)
        for expert in range(experts)
        for name in ("gate", "up", "down")
    }
    return router | shapes


def moe_config(kind: str) -> dict[str, object]:
    """The config.json of a model with these experts."""
    name, model_type = ("GptOss", "gpt_oss") if kind == "moe-gpt-oss" else ("Qwen3Moe", "qwen3_moe")
    experts = (GPT_OSS_EXPERTS if kind == "moe-gpt-oss" else QWEN_EXPERTS)[0]
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": model_type,
        "num_experts" if model_type == "qwen3_moe" else "num_local_experts": experts,
        "torch_dtype": "bfloat16",
    }


def many_experts(folder: Path, layers: int = 61, experts: int = 384) -> None:
    """A checkpoint of 70,272 matrices of experts, a shard for each layer, in files of holes: for plans alone."""
    config = {**moe_config("moe"), "num_experts": experts}
    weight_map: dict[str, str] = {}
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes: dict[str, tuple[int, ...]] = {f"{at}.mlp.gate.weight": (experts, 1024)}
        for expert in range(experts):
            for name, shape in (("gate", (512, 1024)), ("up", (512, 1024)), ("down", (1024, 512))):
                shapes[f"{at}.mlp.experts.{expert}.{name}_proj.weight"] = shape
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (1024, 1024) for name in "qkvo"}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + 2 * prod(shape)]}
            end += 2 * prod(shape)
        text = json.dumps(header).encode()
        shard = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        with open(partial / shard, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        weight_map.update(dict.fromkeys(shapes, shard))
    (partial / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (partial / "config.json").write_text(json.dumps(config))
    partial.rename(folder)


def generate(folder: Path, shapes: dict[str, tuple[int, ...]], config: dict[str, object]) -> None:
    """Write a one-file bfloat16 checkpoint; every matrix is a stretch of one pool of random normal numbers."""
    import numpy as np

    pool_length = 1 << 25
    normal = np.random.default_rng(20).standard_normal(pool_length, dtype=np.float32) * np.float32(0.02)
    # float32 -> bfloat16, to nearest: all values are finite, so adding half of the dropped part is enough.
    pool = ((normal.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)

    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        length = 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + length]}
        offset += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with open(partial / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = 0
        for shape in shapes.values():
            left = prod(shape)
            if len(shape) == 1:
                file.write(np.full(left, 0x3F80, np.uint16).tobytes())  # 1.0
                continue
            while left:
                count = min(left, pool_length - start)
                file.write(memoryview(pool[start : start + count]).cast("B"))
                left -= count
                start = (start + count) % pool_length
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    partial.rename(folder)


def checkpoint(name: str) -> Path:
    """The checkpoint of that name, made by a process of its own if need be.

    Names are "huge", "many-experts", and those that `moe_shapes` and `geometry` explain.
    """
    folder = CACHE / name
    if not folder.is_dir():
        print(f"generating {folder} …", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, __file__, name], check=True)
    return folder


def total_bytes(folder: Path) -> int:
    """The size of all files of a folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def warm(folder: Path) -> None:
    """Read every file of a folder, so that the page cache holds it."""
    buffer = bytearray(8 * MIB)
    for file in folder.iterdir():
        with open(file, "rb", buffering=0) as reader:
            while reader.readinto(buffer):
                pass


if __name__ == "__main__":
    wanted = sys.argv[1]
    if wanted == "huge":
        generate(CACHE / wanted, huge_shapes(), replace(LLAMA_1B, layers=1).config())
    elif wanted == "many-experts":
        many_experts(CACHE / wanted)
    elif wanted.startswith("moe"):
        generate(CACHE / wanted, moe_shapes(wanted), moe_config(wanted))
    else:
        generate(CACHE / wanted, geometry(wanted).shapes(), geometry(wanted).config())
