"""The `halfbyte quantize` command beside transformers + bitsandbytes: time and peak memory of whole processes.

    python benches/offline.py                     Llama-3.2-1B geometry: ours, the peer, and the floor of the machine
    python benches/offline.py --scale             ours on 0.25, 0.5, 1 and 2 times the layers, and one huge tensor

The checkpoint is generated (bfloat16, random normal weights of standard deviation 0.02) and kept in
.cache/benches/; it is in the page cache before anything is timed, every run writes a fresh destination, and dirty
pages of one run are flushed before the next begins. Times are from process start to exit, the best of --runs.

The floor rows read every input byte and write every output byte once, in one thread through an 8 MiB buffer, with
nothing computed. They show the order of magnitude that the machine allows, and are no strict bound: several threads,
or writing out to disk while the work goes on, can be faster, above all where fsync is waited for at the end.

Nothing is asserted here; results with their commands are in benches/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

from _table import MIB, Process, best_process, machine_line, median_wall, print_table, run_process, versions_line

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "benches"

# Llama-3.2-1B. Its embedding is also its output layer (tied), so there is no lm_head tensor.
LAYERS, HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 16, 2048, 8192, 32, 8, 64, 128_256


def llama_config(layers: int) -> dict[str, object]:
    """config.json of the generated model: that of Llama-3.2-1B, with another number of layers."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": MLP,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
        "num_key_value_heads": KV_HEADS,
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
        "vocab_size": VOCABULARY,
    }


def llama_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the generated model's tensors."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (HIDDEN,),
            f"{at}.mlp.down_proj.weight": (HIDDEN, MLP),
            f"{at}.mlp.gate_proj.weight": (MLP, HIDDEN),
            f"{at}.mlp.up_proj.weight": (MLP, HIDDEN),
            f"{at}.post_attention_layernorm.weight": (HIDDEN,),
            f"{at}.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{at}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
            f"{at}.self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
            f"{at}.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        }
    shapes["model.norm.weight"] = (HIDDEN,)
    return shapes


def huge_shapes() -> dict[str, tuple[int, ...]]:
    """A model of one layer's worth of names whose one linear weight is 128,256 x 8,192 (2.1 GB in bfloat16)."""
    return {"model.layers.0.mlp.down_proj.weight": (VOCABULARY, 8192)}


def generate(folder: Path, shapes: dict[str, tuple[int, ...]], config: dict[str, object]) -> None:
    """Write a one-file bfloat16 checkpoint; every tensor is a stretch of one pool of random normal numbers."""
    import numpy as np

    pool_length = 1 << 25
    normal = np.random.default_rng(20).standard_normal(pool_length, dtype=np.float32) * np.float32(0.02)
    # float32 -> bfloat16, to nearest: all values are finite, so adding half of the dropped part is enough.
    pool = ((normal.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)

    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        length = 2 * int(np.prod(shape))
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
            left = int(np.prod(shape))
            while left:
                count = min(left, pool_length - start)
                file.write(memoryview(pool[start : start + count]).cast("B"))
                left -= count
                start = (start + count) % pool_length
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    partial.rename(folder)


def checkpoint(name: str) -> Path:
    """The generated checkpoint of that name ("layers-16", "huge"), made by a process of its own if need be."""
    folder = CACHE / name
    if not folder.is_dir():
        print(f"generating {folder} …", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, __file__, "--generate", name], check=True)
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


def floor(source: Path, destination: Path, output_bytes: int, sync: bool) -> None:
    """Read all of `source`, write `output_bytes` bytes to a new file, both in pieces of 8 MiB."""
    buffer = memoryview(bytearray(8 * MIB))
    destination.mkdir()
    for file in source.iterdir():
        with open(file, "rb", buffering=0) as reader:
            while reader.readinto(buffer):
                pass
    with open(destination / "model.safetensors", "wb", buffering=0) as writer:
        left = output_bytes
        while left:
            left -= writer.write(buffer[: min(left, len(buffer))])
        if sync:
            os.fsync(writer.fileno())


def fresh_run(command: list[str], destination: Path) -> Process:
    """Measure one command that makes `destination`, on a machine with nothing left to write."""
    shutil.rmtree(destination, ignore_errors=True)
    os.sync()
    return run_process(command, environment={"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})


def halfbyte_command(*arguments: str) -> list[str]:
    """The `halfbyte` command beside this interpreter, or the module it stands for in a source tree."""
    beside = Path(sys.executable).with_name("halfbyte")
    return [*([str(beside)] if beside.exists() else [sys.executable, "-m", "halfbyte"]), *arguments]


def quantize_command(source: Path, destination: Path, *more: str) -> list[str]:
    """The measured command: NF4 with double quantization."""
    return halfbyte_command("quantize", str(source), str(destination), "--type", "nf4", "--double-quant", *more)


def compare(runs: int, peer_runs: int) -> None:
    """One table for the Llama-3.2-1B geometry: ours, the peer, the floor; durable and not."""
    source, destination = checkpoint(f"layers-{LAYERS}"), CACHE / "out"
    warm(source)
    fresh_run(quantize_command(source, destination, "--quiet"), destination)
    input_bytes, output_bytes = total_bytes(source), total_bytes(destination)

    script = [sys.executable, __file__, "--floor", str(source), str(destination), str(output_bytes)]
    commands = {
        "halfbyte quantize": quantize_command(source, destination, "--quiet"),
        "halfbyte quantize --no-fsync": quantize_command(source, destination, "--quiet", "--no-fsync"),
        "floor: read input, write output, fsync": [*script, "fsync"],
        "floor: read input, write output": [*script, "no-fsync"],
    }
    measured: dict[str, list[Process]] = {label: [] for label in commands}
    for _ in range(runs):  # in turns, so that a busy moment of the machine does not hit one of them alone
        for label, command in commands.items():
            measured[label].append(fresh_run(command, destination))
    nothing = run_process([sys.executable, "-c", "pass"])
    peer_script = str(Path(__file__).with_name("offline_peer.py"))
    peer_label = "transformers + bitsandbytes, load and save"
    measured[peer_label] = [
        fresh_run([sys.executable, peer_script, str(source), str(destination)], destination) for _ in range(peer_runs)
    ]
    shutil.rmtree(destination, ignore_errors=True)

    print(f"\nLlama-3.2-1B geometry, bfloat16 to NF4 + double quantization: {input_bytes / 1e9:.2f} GB in page cache")
    print(f"to {output_bytes / 1e9:.2f} GB; best of {runs} runs (peer: {peer_runs})\n")
    peer = best_process(measured[peer_label]).wall if peer_runs else None
    rows = []
    for label, processes in measured.items():
        if not processes:
            continue
        best = best_process(processes)
        rows.append(
            [
                label,
                f"{best.wall:.2f}",
                f"{median_wall(processes):.2f}",
                f"{best.cpu:.2f}",
                f"{input_bytes / best.wall / 1e9:.2f}",
                f"{peer / best.wall:.1f}x" if peer else "",
                f"{best.peak / MIB:.0f}",
            ]
        )
    print_table(["whole process", "s", "median s", "CPU s", "GB/s in", "peer / this", "peak MiB"], rows)
    print(f"\nAn empty Python process: {nothing.wall * 1000:.0f} ms, {nothing.peak / MIB:.0f} MiB.")


def scale(runs: int, keep: bool) -> None:
    """Ours on growing models, then on one huge tensor: time in proportion to bytes, memory not growing with them."""
    rows = []
    for name in [*(f"layers-{int(LAYERS * factor)}" for factor in (0.25, 0.5, 1, 2)), "huge"]:
        source, destination = checkpoint(name), CACHE / "out"
        warm(source)
        for label, more in (("", []), (", --no-fsync", ["--no-fsync"])):
            command = quantize_command(source, destination, "--quiet", *more)
            best = best_process([fresh_run(command, destination) for _ in range(runs)])
            size = total_bytes(source)
            rows.append(
                [
                    ("one 128,256 x 8,192 tensor" if name == "huge" else name.replace("-", " = ")) + label,
                    f"{size / 1e9:.2f}",
                    f"{total_bytes(destination) / 1e9:.2f}",
                    f"{best.wall:.2f}",
                    f"{size / best.wall / 1e9:.2f}",
                    f"{best.peak / MIB:.0f}",
                ]
            )
        shutil.rmtree(destination, ignore_errors=True)
        if not keep and name != f"layers-{LAYERS}":
            shutil.rmtree(source)
    print(f"\nhalfbyte quantize --type nf4 --double-quant, best of {runs} runs\n")
    print_table(["checkpoint", "GB in", "GB out", "s", "GB/s in", "peak MiB"], rows)


def main() -> None:
    """Read the arguments, do one of the modes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="runs of each of our commands (default: 5)")
    parser.add_argument("--peer-runs", type=int, default=1, help="runs of the peer, some 30 s each; 0 leaves it out")
    parser.add_argument("--scale", action="store_true", help="time and memory against the size of the model")
    parser.add_argument("--keep", action="store_true", help="with --scale: keep all generated checkpoints (10 GB)")
    parser.add_argument("--generate", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--floor", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()

    if options.floor:
        source, destination, output_bytes, sync = options.floor
        floor(Path(source), Path(destination), int(output_bytes), sync == "fsync")
    elif options.generate == "huge":
        generate(CACHE / "huge", huge_shapes(), llama_config(1))
    elif options.generate:
        layers = int(options.generate.removeprefix("layers-"))
        generate(CACHE / options.generate, llama_shapes(layers), llama_config(layers))
    else:
        print(machine_line())
        print(versions_line("halfbyte", "torch", "transformers", "bitsandbytes"), flush=True)
        if options.scale:
            scale(options.runs, options.keep)
        else:
            compare(options.runs, options.peer_runs)


if __name__ == "__main__":
    main()
