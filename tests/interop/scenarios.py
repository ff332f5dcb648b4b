"""Runs what a user does with transformers, PEFT and Trainer: the scenarios of `test_processes.py`, in a process apart.

They are in the files beside this one, `scenarios_*.py`; here is what these share.

`python scenarios.py KIND FOLDER [NAME…]` runs all scenarios, or those named, and prints one JSON object, name to None
or to what went wrong. KIND says what the process knows of bitsandbytes:

- `absent`: it is hidden, as if it had never been installed; halfbyte is imported first.
- `late`: it is hidden; transformers and PEFT are imported before halfbyte. Only the scenarios of `BASIC`, where an
  order of imports could show.
- `present`: the real one is installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", WANDB_DISABLED="true")

KIND = sys.argv[1] if __name__ == "__main__" else "present"


def hide_bitsandbytes() -> None:
    """Hide the installed bitsandbytes from imports, `find_spec` and `importlib.metadata`."""
    from importlib.machinery import PathFinder
    from importlib.metadata import MetadataPathFinder

    find, distributions = PathFinder.find_spec, MetadataPathFinder.find_distributions

    def find_spec(fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.partition(".")[0] == "bitsandbytes" and path is None:
            return None
        return find(fullname, path, target)

    def find_distributions(*args: Any, **kwargs: Any) -> Any:
        found = distributions(*args, **kwargs)
        return (one for one in found if one.name != "bitsandbytes")

    PathFinder.find_spec = staticmethod(find_spec)  # type: ignore[assignment, method-assign]
    MetadataPathFinder.find_distributions = staticmethod(find_distributions)  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    if KIND in ("absent", "late"):
        hide_bitsandbytes()
    if KIND == "late":
        for module in ("peft", "transformers.quantizers.auto"):
            importlib.import_module(module)

import halfbyte  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

import transformers  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

# Releases of transformers from 5.8 on let a load change how experts are read.
TAKES_EXPERTS_APART = hasattr(transformers.quantizers.base.HfQuantizer, "update_weight_conversions")

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

BASIC = ("scenarios_loading", "scenarios_qlora")
SCENARIOS: dict[str, Callable[[Path], None]] = {}
IDS = torch.arange(48).reshape(2, 24) % 96
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 96,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}


def scenario(function: Callable[[Path], None]) -> Callable[[Path], None]:
    """Run this function as a scenario of its name."""
    SCENARIOS[function.__name__] = function
    return function


def config(**kwargs: Any) -> Any:
    """How these scenarios quantize, in this package's class."""
    return halfbyte.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, **kwargs
    )


def source(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The folder of a tiny dense Llama, made when it is first asked for."""
    path = folder / f"source-{str(dtype)[6:]}"
    if not path.exists():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype).save_pretrained(path)
    return path


def loaded(folder: Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    """That model, loaded in 4 bits."""
    return AutoModelForCausalLM.from_pretrained(source(folder, dtype), quantization_config=config(**kwargs))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Of a fixed batch."""
    training = model.training
    found: Tensor = model.eval()(IDS).logits.float()
    model.train(training)
    return found


def same_tokens(a: Tensor, b: Tensor) -> float:
    """The share of positions at which both prefer the same token."""
    return float((a.argmax(-1) == b.argmax(-1)).float().mean())


def layers(model: nn.Module) -> int:
    """How many layers are this package's 4-bit ones."""
    return sum(isinstance(module, halfbyte.nn.Linear4bit) for module in model.modules())


def train(model: nn.Module, steps: int = 4, autocast: bool = False, rate: float = 1e-3) -> list[float]:
    """Train on one batch, and return the losses."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


# ---- adapters and training -------------------------------------------------------------------------------------------


def adapted(folder: Path, peft_config: Any, **kwargs: Any) -> Any:
    """A 4-bit model with an adapter, as QLoRA makes it."""
    import peft

    model = peft.prepare_model_for_kbit_training(loaded(folder, **kwargs), use_gradient_checkpointing=False)
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft_config)


def lora(**kwargs: Any) -> Any:
    """A small LoRA of the attention."""
    import peft

    return peft.LoraConfig(
        **{
            "r": 4,
            "target_modules": ["q_proj", "v_proj"],
            "task_type": "CAUSAL_LM",
            "init_lora_weights": True,
            **kwargs,
        }
    )


def learns(model: Any, **kwargs: Any) -> None:
    """That training lowers the loss."""
    losses = train(model, 3, **kwargs)
    assert losses[-1] < losses[0], losses


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Eight rows of tokens."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = (torch.arange(24) * (index + 1)) % 96
        return {"input_ids": row, "labels": row}


def trainer(folder: Path, model: Any, **kwargs: Any) -> Any:
    """A Trainer that says nothing."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder / "trainer"),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "seed": 0,
    }
    return transformers.Trainer(
        model=model, args=transformers.TrainingArguments(**{**defaults, **kwargs}), train_dataset=Rows()
    )


# ---- running them ----------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the scenarios named on the command line, all by default."""
    import shutil

    # The other files import this one: they must not run it again.
    sys.modules["scenarios"] = sys.modules[__name__]
    files = sorted(path.stem for path in Path(__file__).parent.glob("scenarios_*.py"))
    for name in BASIC if KIND == "late" else files:
        importlib.import_module(name)
    warnings.simplefilter("ignore")
    folder, names = Path(sys.argv[2]), sys.argv[3:] or list(SCENARIOS)
    results: dict[str, str | None] = {}
    for name in names:
        place = folder / name
        place.mkdir()
        try:
            SCENARIOS[name](place)
            results[name] = None
        except BaseException:
            results[name] = traceback.format_exc()
        shutil.rmtree(place)
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()
