"""The scripts in examples/ run as a user would run them, on a tiny Llama."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TEXT = "the cat sat on the mat and the dog ran to the door while the sun came up"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny dense Llama and a tokenizer that knows the words of `TEXT`."""
    from tiny_models import save_llama_with_words

    folder = tmp_path_factory.mktemp("tiny-llama")
    save_llama_with_words(folder)
    return folder


def run(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run an example without a GPU, and return what it wrote."""
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "WANDB_DISABLED": "true", **environment}
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=600)


def tensors(folder: Path) -> set[str]:
    """Names in the safetensors file of a folder."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


@pytest.mark.slow
@pytest.mark.parametrize("target", ["4bit", "16bit"])
def test_qlora_example_learns_saves_and_merges(model: Path, tmp_path: Path, target: str) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("trl")
    data, output = tmp_path / "data", tmp_path / "output"
    (data / "more").mkdir(parents=True)
    (data / "one.txt").write_text(" ".join([TEXT] * 8), encoding="utf-8")
    (data / "more" / "two.txt").write_text(" ".join([TEXT] * 8), encoding="utf-8")
    (data / "empty.txt").write_text("\n", encoding="utf-8")
    options = ["--steps", 12, "--length", 32, "--batch-size", 2, "--learning-rate", 2e-2, "--merge-into", target]
    done = run("qlora.py", model, data, output, *options)
    assert done.returncode == 0, done.stderr[-4000:]
    losses = re.search(r"^loss: ([\d.]+) at the first step, ([\d.]+) at the last$", done.stdout, flags=re.MULTILINE)
    assert losses, done.stdout
    assert float(losses[2]) < float(losses[1]) - 0.1

    adapter = json.loads((output / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert adapter["peft_type"] == "LORA"
    assert (output / "adapter" / "adapter_model.safetensors").is_file()
    merged, config = tensors(output / "merged"), json.loads((output / "merged" / "config.json").read_text("utf-8"))
    absmax = "model.layers.0.self_attn.q_proj.weight.absmax"
    assert (absmax in merged) == ("quantization_config" in config) == (target == "4bit")
    assert not any("lora" in name for name in merged)

    # What was saved is a whole model, and has learned to write a word of the text after another.
    continued = run("generate.py", output / "merged", "the cat", "--tokens", 4)
    assert continued.returncode == 0, continued.stderr[-4000:]
    assert continued.stdout.startswith("the cat ")


@pytest.mark.slow
def test_qlora_example_refuses_a_folder_without_text(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("trl")
    done = run("qlora.py", model, tmp_path, tmp_path / "output")
    assert done.returncode == 1
    assert f"data must be a folder with .txt files that hold text, got {tmp_path}" in done.stderr
    assert not (tmp_path / "output").exists()


@pytest.mark.slow
def test_generate_example_says_the_same_when_compiled(model: Path, tmp_path: Path) -> None:
    compiled = tmp_path / "inductor"
    plain = run("generate.py", model, "the cat", "--tokens", 6, TORCHINDUCTOR_CACHE_DIR=str(compiled))
    assert plain.returncode == 0, plain.stderr[-4000:]
    assert not list(compiled.rglob("*.py"))
    fast = run("generate.py", model, "the cat", "--tokens", 6, "--compile", TORCHINDUCTOR_CACHE_DIR=str(compiled))
    assert fast.returncode == 0, fast.stderr[-4000:]
    assert list(compiled.rglob("*.py"))
    assert fast.stdout.splitlines()[0] == plain.stdout.splitlines()[0]
    assert re.fullmatch(r"\d+ tokens in [\d.]+ s: [\d.]+ tokens/s, prompt included", fast.stdout.splitlines()[1])
