"""Runs of the offline tool, and the checkpoints that they read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import halfbyte
import numpy as np

PACKAGE = Path(halfbyte.__file__).parent
STAGE = ".halfbyte-partial"
LAYERS = 24
HIDDEN = 512
SHARDS = 15  # at least, of the sizes below
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}


def bfloat16(rng: np.random.Generator, *shape: int) -> bytes:
    """Normal values, cut to 16 bits."""
    return (rng.standard_normal(shape, np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()


def write_tensors(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """A safetensors file, also of tensors that its libraries would not write."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for *_, data in tensors.values()))


def write_llama(folder: Path, layers: int = LAYERS, hidden: int = HIDDEN, seed: int = 0) -> Path:
    """A Llama of one shard per layer, with small files around it."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    weight_map = {}
    for layer in range(layers):
        tensors = {}
        for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            tensors[f"model.layers.{layer}.{module}.weight"] = ("BF16", [hidden, hidden], bfloat16(rng, hidden, hidden))
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = ("BF16", [hidden], bfloat16(rng, hidden))
        if layer == 0:
            tensors["model.embed_tokens.weight"] = ("BF16", [64, hidden], bfloat16(rng, 64, hidden))
        shard = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        write_tensors(folder / shard, tensors)
        weight_map.update(dict.fromkeys(tensors, shard))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {**CONFIG, "num_hidden_layers": layers, "hidden_size": hidden, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "sub").mkdir()
    (folder / "sub" / "template.jinja").write_text("{{ messages }}")
    return folder


def write_single(folder: Path, weight: bytes | None = None, config: dict[str, Any] | None = None) -> Path:
    """One small weight to quantize and one to keep, in one file."""
    folder.mkdir(parents=True)
    weight = bfloat16(np.random.default_rng(0), 64, 64) if weight is None else weight
    tensors = {
        "model.layers.0.mlp.up_proj.weight": ("BF16", [64, 64], weight),
        "model.norm.weight": ("BF16", [64], bytes(128)),
    }
    write_tensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    return folder


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "halfbyte", *map(str, arguments)]


def environment() -> dict[str, str]:
    paths = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}


def run(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 600, "env": environment()}
    return subprocess.run(command(*arguments), **{**options, **more})


def start(*arguments: object) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command(*arguments), stdout=pipe, stderr=pipe, text=True, env=environment())


def quantize(src: Path, dst: Path, *more: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """A run slow enough to be hit: one thread, one file per layer, each flushed."""
    return run("quantize", src, dst, "--threads", "1", "--max-shard-size", "700KB", "-q", *more, **options)


def refused(done: subprocess.CompletedProcess[str], code: int, *words: object) -> str:
    """The one line of a refusal, after checking that it is one."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    one_line(done.stderr)
    for word in words:
        assert str(word) in done.stderr
    return done.stderr


def one_line(text: str) -> None:
    assert re.fullmatch("halfbyte: error: [^\n]+\n", text), text
    assert "Traceback" not in text
    assert "panicked" not in text
    assert "\x1b" not in text


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def identity(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Inode, time and hash of every file, and time of every folder: what nobody may change in a source."""
    everything = [folder, *sorted(folder.rglob("*"))]
    hashes = contents(folder)
    return {
        str(p): (p.stat().st_ino, p.stat().st_mtime_ns, hashes.get(str(p.relative_to(folder)), "")) for p in everything
    }


def complete_shards(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every finished file of weights, wherever it is."""
    found = {}
    for place in (folder, folder / STAGE / "files"):
        for path in place.glob("*.safetensors"):
            with contextlib.suppress(FileNotFoundError):
                found[path.name] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600
    while not what() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)


@contextlib.contextmanager
def paused(what: Callable[[], bool], process: subprocess.Popen[str]) -> Iterator[None]:
    """The process stands still inside the block, where `what` has just become true."""
    wait_for(what, process)
    process.send_signal(signal.SIGSTOP)
    if process.returncode is None:
        # A signal is not yet a stop: wait until the process stands still, or has ended.
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)
