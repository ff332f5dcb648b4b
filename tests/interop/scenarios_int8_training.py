"""Adapters on 8-bit models: PEFT's own 8-bit layers, merging, Trainer and TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import halfbyte
import pytest
import torch
import transformers
from scenarios import IDS, KIND, learns, logits, lora, same_tokens, scenario, source, train, trainer
from scenarios_int8 import config8, layers8, loaded8, message, stock8
from scenarios_models import said, tokenizer_beside
from scenarios_peft import COST, NEWER_PEFT, sane
from scenarios_training import finite_losses, quiet, texts, trl_fits
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM


def adapted8(folder: Path, peft_config: Any, path: Path | None = None, **kwargs: Any) -> Any:
    """An 8-bit model with an adapter."""
    import peft

    model = AutoModelForCausalLM.from_pretrained(path or source(folder), quantization_config=config8(**kwargs))
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft_config)


def q_proj(model: Any) -> Any:
    """A layer with an adapter."""
    return model.base_model.model.model.layers[0].self_attn.q_proj


@scenario
def int8_lora_trains_saves_reloads_and_merges(folder: Path) -> None:
    import peft

    model = adapted8(folder, lora())
    layer = q_proj(model)
    assert type(layer).__module__ == "peft.tuners.lora.bnb", type(layer)
    assert type(layer).__name__ == "Linear8bitLt", type(layer)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}
    learns(model)
    before = logits(model)
    model.save_pretrained(folder / "adapter")
    again = peft.PeftModel.from_pretrained(loaded8(folder), folder / "adapter")
    torch.testing.assert_close(logits(again), before, rtol=1e-5, atol=1e-5)

    dense = layer.base_layer.dequantize() + layer.get_delta_weight("default")
    codes, scales, _ = halfbyte.functional.int8_vectorwise_quant(dense.half())
    model.merge_adapter()
    assert type(layer.base_layer.weight) is type(model.base_model.model.model.layers[0].self_attn.k_proj.weight)
    assert torch.equal(layer.base_layer.weight.data, codes)
    assert torch.equal(layer.base_layer.weight.SCB, scales)
    assert same_tokens(logits(model), before) >= 0.95
    model.unmerge_adapter()
    assert same_tokens(logits(model), before) >= 0.95
    merged = again.merge_and_unload()
    assert layers8(merged) == 14
    assert same_tokens(logits(merged), before) >= 0.95
    merged.save_pretrained(folder / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(folder / "merged", quantization_config=config8())
    assert torch.equal(logits(reloaded), logits(merged))


@scenario
def int8_lora_losses_are_bitsandbytes(folder: Path) -> None:
    """Fifty steps on one batch, from the same weights: in 8 bits by bitsandbytes and by this package."""
    if KIND != "present":
        return  # there is no other to compare with
    import peft

    def run(model: Any) -> list[float]:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        torch.manual_seed(1)
        return train(peft.get_peft_model(model, lora(target_modules="all-linear")), 50)

    path = sane(folder)
    theirs = run(stock8(path))
    ours = run(AutoModelForCausalLM.from_pretrained(path, quantization_config=config8()))
    assert ours[-1] < 0.9 * ours[0], ours
    apart = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    assert max(apart) < 1e-2, (max(apart), ours, theirs)


@scenario
def int8_lora_variants(folder: Path) -> None:
    for kwargs in ({"use_rslora": True}, {"use_dora": True}, {"init_lora_weights": "olora"}):
        model = adapted8(folder, lora(**kwargs))
        learns(model)
        before = logits(model)
        least = 0.85 if kwargs.get("init_lora_weights") == "olora" else 0.95
        merged = model.merge_and_unload()
        assert layers8(merged) == 14
        assert same_tokens(logits(merged), before) >= least, kwargs


@scenario
def int8_lora_with_several_adapters(folder: Path) -> None:
    model = adapted8(folder, lora())
    first, plain = logits(model), logits(loaded8(folder))
    model.add_adapter("other", lora(r=8, init_lora_weights=False))
    model.set_adapter("other")
    learns(model)
    second = logits(model)
    assert not torch.equal(second, first)
    model.eval()
    with torch.no_grad():
        mixed = model(input_ids=IDS, adapter_names=["default", "other"]).logits
    torch.testing.assert_close(mixed[0], first[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1], second[1], rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), plain)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


@scenario
def int8_other_tuners_train_and_merge(folder: Path) -> None:
    import peft

    targets = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    mergeable = [
        peft.VeraConfig(r=4, **targets),
        peft.RandLoraConfig(r=4, **targets),
        peft.RoadConfig(**targets),
    ]
    if NEWER_PEFT:
        mergeable += [
            peft.OFTConfig(oft_block_size=16, use_cayley_neumann=False, **targets),
            peft.BOFTConfig(boft_block_size=16, **targets),
            peft.MissConfig(r=4, **targets),
        ]
    for tuner in (
        *mergeable,
        peft.AdaLoraConfig(init_r=4, target_r=2, total_step=20, **targets),
        peft.IA3Config(feedforward_modules=[], **targets),
    ):
        name = type(tuner).__name__
        autocast = isinstance(tuner, peft.RandLoraConfig | peft.RoadConfig | peft.IA3Config)
        losses = train(adapted8(folder, tuner), 4, autocast=autocast, rate=1e-2)
        assert losses[-1] < losses[0], (name, losses)
        if tuner not in mergeable:
            continue
        model = adapted8(folder, tuner, sane(folder))
        train(model, 2, autocast=autocast)
        before = logits(model)
        with said() as lines:
            merged = model.merge_and_unload()
        assert layers8(merged) == 14, name
        assert same_tokens(logits(merged), before) >= 0.98, name
        assert len(lines) == 1, (name, lines)
        assert lines[0].startswith("merge_and_unload: 4 weights"), (name, lines)


@scenario
def int8_merging_says_what_it_costs(folder: Path) -> None:
    model = adapted8(folder, lora(), sane(folder))
    learns(model)
    layer = q_proj(model)
    wanted = layer.base_layer.dequantize() + layer.get_delta_weight("default")
    with said() as lines:
        merged = model.merge_and_unload()
    assert len(lines) == 1, lines
    found = COST.match(lines[0])
    assert found, lines
    assert (found[1], found[2]) == ("merge_and_unload", "4")
    mean, worst, change = float(found[3]), float(found[4]), float(found[6])
    assert 0 < mean <= worst < 2, lines
    assert change > 0, lines
    made = merged.model.layers[0].self_attn.q_proj
    error = 100 * float((made.dequantize() - wanted).norm() / wanted.norm())
    assert error <= worst * 1.05, (error, lines)


@scenario
def int8_adapter_of_another_base(folder: Path) -> None:
    import peft

    wide = folder / "wide"
    torch.manual_seed(0)
    from scenarios import SIZES

    LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "hidden_size": 128})).save_pretrained(wide)
    made = AutoModelForCausalLM.from_pretrained(wide, quantization_config=config8())
    peft.get_peft_model(made, lora()).save_pretrained(folder / "adapter")
    model = loaded8(folder)
    text = message(lambda: peft.PeftModel.from_pretrained(model, folder / "adapter"), ValueError)
    assert "q_proj.lora_A.weight is [4, 128]" in text, text
    assert layers8(model) == 14


@scenario
def int8_quantize_model_takes_adapters_too(folder: Path) -> None:
    import peft

    made = halfbyte.quantize_model(LlamaForCausalLM.from_pretrained(source(folder)), config8())
    model = peft.get_peft_model(made, lora())
    assert type(q_proj(model)).__name__ == "Linear8bitLt"
    learns(model)
    # Layers that no adapter of PEFT is made for stay with PEFT's own forward, and that is said.
    from halfbyte.integrations.peft import fuse

    report = fuse(model)
    assert report.fused == 0
    assert sum(report.left.values()) == 4, report


@scenario
def int8_kbit_training_checkpoints(folder: Path) -> None:
    import peft

    model = peft.prepare_model_for_kbit_training(loaded8(folder, torch.bfloat16))
    assert model.is_gradient_checkpointing
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.int8}
    assert layers8(model) == 14
    made = peft.get_peft_model(model, lora(modules_to_save=["lm_head"]))
    learns(made, autocast=True, rate=1e-2)


@scenario
def int8_trainer_trains_adapters(folder: Path) -> None:
    for kwargs in ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}):
        run = trainer(folder, adapted8(folder, lora()), logging_strategy="steps", logging_steps=1, **kwargs)
        finite_losses(run, 4)
        assert layers8(run.model) == 14
    for model in (
        loaded8(folder),
        halfbyte.quantize_model(LlamaForCausalLM.from_pretrained(source(folder)), config8()),
    ):
        with pytest.raises(ValueError, match="adapters"):
            trainer(folder, model)


@scenario
def int8_sft_trains(folder: Path) -> None:
    if not trl_fits():
        return
    from trl import SFTConfig, SFTTrainer

    tokenizer = tokenizer_beside(source(folder))
    handed_on = {"model_init_kwargs": {"quantization_config": config8(), "dtype": "float32"}}
    for model, kwargs in ((loaded8(folder), {}), (str(source(folder)), handed_on)):
        sft = SFTTrainer(
            model=model,
            args=SFTConfig(**quiet(folder, max_length=16, **kwargs)),
            train_dataset=texts(),
            processing_class=tokenizer,
            peft_config=lora(),
        )
        finite_losses(sft)
        assert layers8(sft.model) == 14
        assert all(type(m) is not nn.Linear for name, m in sft.model.named_modules() if name.endswith("base_layer"))
