"""Training by TRL and by Trainer, as scripts for QLoRA do it."""

from __future__ import annotations

import contextlib
import warnings
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from scenarios import KIND, adapted, config, layers, loaded, logits, lora, scenario, source, trainer
from scenarios_models import tokenizer_beside


def trl_fits() -> bool:
    """Whether the installed TRL takes the installed libraries; with the oldest ones it does not."""
    with contextlib.suppress(ImportError):
        wanted = [Requirement(text) for text in requires("trl") or ()]
        return all(
            one.specifier.contains(version(one.name)) for one in wanted if one.name in ("accelerate", "transformers")
        )
    return False


def quiet(folder: Path, **kwargs: Any) -> dict[str, Any]:
    """Arguments that all of TRL's trainers take."""
    return {
        "output_dir": str(folder / "trl"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-3,
        **kwargs,
    }


def texts() -> Any:
    """A few lines."""
    from datasets import Dataset

    return Dataset.from_dict({"text": ["a b c d e f", "g h i j k l", "a c e g i k", "b d f h j l"] * 2})


def finite_losses(run: Any, steps: int = 2) -> None:
    """That it trains, and that every loss is a number."""
    assert run.train().global_step == steps
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == steps, run.state.log_history
    assert all(torch.tensor(losses).isfinite()), losses


@scenario
def sft_trains(folder: Path) -> None:
    if not trl_fits():
        return
    from trl import SFTConfig, SFTTrainer

    tokenizer = tokenizer_beside(source(folder))
    for kwargs in ({"packing": False}, {"packing": True}, {"gradient_accumulation_steps": 2}):
        sft = SFTTrainer(
            model=loaded(folder),
            args=SFTConfig(**quiet(folder, max_length=16, **kwargs)),
            train_dataset=texts(),
            processing_class=tokenizer,
            peft_config=lora(),
        )
        finite_losses(sft)
        assert layers(sft.model) == 14
    # By path, with the config that TRL hands on.
    sft = SFTTrainer(
        model=str(source(folder)),
        args=SFTConfig(
            **quiet(folder, max_length=16, model_init_kwargs={"quantization_config": config(), "dtype": "float32"})
        ),
        train_dataset=texts(),
        processing_class=tokenizer,
        peft_config=lora(),
    )
    finite_losses(sft)
    assert layers(sft.model) == 14


@scenario
def dpo_trains(folder: Path) -> None:
    if not trl_fits():
        return
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    pairs = Dataset.from_dict({"prompt": ["a b", "c d"], "chosen": [" e f", " g h"], "rejected": [" i j", " k l"]})
    dpo = DPOTrainer(
        model=loaded(folder),
        ref_model=None,
        args=DPOConfig(**quiet(folder, max_length=16)),
        train_dataset=pairs,
        processing_class=tokenizer_beside(source(folder)),
        peft_config=lora(),
    )
    finite_losses(dpo)
    # The reference is the model without its adapter: at first both agree, and the loss is log 2.
    first = next(entry["loss"] for entry in dpo.state.log_history if "loss" in entry)
    assert abs(first - 0.6931) < 1e-3, first


@scenario
def grpo_trains(folder: Path) -> None:
    if not trl_fits():
        return
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(set(text.split()))) for text in completions]

    grpo = GRPOTrainer(
        model=loaded(folder),
        reward_funcs=reward,
        args=GRPOConfig(
            **quiet(folder, per_device_train_batch_size=4, num_generations=2, max_completion_length=6, beta=0.1)
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a b", "c d", "e f", "g h"]}),
        processing_class=tokenizer_beside(source(folder)),
        peft_config=lora(),
    )
    finite_losses(grpo)
    assert layers(grpo.model) == 14


@scenario
def trl_refuses_a_bare_model(folder: Path) -> None:
    if not trl_fits():
        return
    from trl import SFTConfig, SFTTrainer

    with pytest.raises(ValueError, match="adapters"):
        SFTTrainer(
            model=loaded(folder),
            args=SFTConfig(**quiet(folder, max_length=16)),
            train_dataset=texts(),
            processing_class=tokenizer_beside(source(folder)),
        )


@scenario
def accumulation_and_checkpointing_change_nothing(folder: Path) -> None:
    """Two batches of 2 are one batch of 4, and recomputed activations are what they were."""
    found = []
    for kwargs in (
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 4, "gradient_checkpointing": True},
        {
            "per_device_train_batch_size": 4,
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
    ):
        run = trainer(folder, adapted(folder, lora()), logging_strategy="steps", logging_steps=1, **kwargs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run.train()
        found.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    for losses in found[1:]:
        assert len(losses) == len(found[0]) == 4
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(found[0]), rtol=2e-4, atol=2e-4)


@scenario
def trainer_saves_adapters_alone(folder: Path) -> None:
    run = trainer(folder, adapted(folder, lora()), max_steps=2, save_strategy="steps", save_steps=2)
    run.train()
    before = logits(run.model)
    saved = folder / "trainer" / "checkpoint-2"
    names = {path.name for path in saved.iterdir()}
    assert "adapter_model.safetensors" in names, names
    assert "model.safetensors" not in names, names
    import peft

    again = peft.PeftModel.from_pretrained(loaded(folder), saved)
    torch.testing.assert_close(logits(again), before, rtol=1e-4, atol=1e-4)


@scenario
def trainer_computes_in_bfloat16(folder: Path) -> None:
    if KIND == "late":
        return  # nothing in it depends on the order of imports
    model = adapted(folder, lora(), bnb_4bit_compute_dtype="bfloat16")
    run = trainer(folder, model, bf16=True, logging_strategy="steps", logging_steps=1)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert losses[-1] < losses[0], losses
