"""QLoRA with PEFT and Trainer: adapters of every kind, merging, training that is resumed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import halfbyte
import pytest
import torch
from scenarios import (
    KIND,
    adapted,
    config,
    layers,
    learns,
    loaded,
    logits,
    lora,
    same_tokens,
    scenario,
    source,
    train,
    trainer,
)
from transformers import AutoModelForCausalLM, LlamaForCausalLM


@scenario
def lora_trains_saves_reloads_and_merges(folder: Path) -> None:
    import peft

    model = adapted(folder, lora())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer).__module__ == "peft.tuners.lora.bnb", type(layer)
    learns(model)
    before = logits(model)
    model.save_pretrained(folder / "adapter")
    again = peft.PeftModel.from_pretrained(loaded(folder), folder / "adapter")
    torch.testing.assert_close(logits(again), before, rtol=1e-5, atol=1e-5)

    merged_layer = again.base_model.model.model.layers[0].self_attn.q_proj
    dense = merged_layer.base_layer.dequantize() + merged_layer.get_delta_weight("default")
    model.merge_adapter()
    expected = halfbyte.functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
    torch.testing.assert_close(
        layer.base_layer.dequantize(), halfbyte.functional.dequantize_4bit(*expected), rtol=1e-3, atol=1e-3
    )
    assert same_tokens(logits(model), before) >= 0.9
    model.unmerge_adapter()
    assert same_tokens(logits(model), before) >= 0.9
    merged = again.merge_and_unload()
    assert layers(merged) == 14
    assert same_tokens(logits(merged), before) >= 0.9
    merged.save_pretrained(folder / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(folder / "merged", quantization_config=config())
    assert torch.equal(logits(reloaded), logits(merged))


@scenario
def lora_variants(folder: Path) -> None:
    for kwargs in ({"use_rslora": True}, {"use_dora": True}, {"init_lora_weights": "olora"}):
        model = adapted(folder, lora(**kwargs))
        learns(model)
        before = logits(model)
        # OLoRA's adapter is a part of the weight, not a small addition: quantizing the sum costs more.
        least = 0.7 if kwargs.get("init_lora_weights") == "olora" else 0.9
        assert same_tokens(logits(model.merge_and_unload()), before) >= least, kwargs


@scenario
def lora_with_several_adapters(folder: Path) -> None:
    model = adapted(folder, lora())
    first = logits(model)
    model.add_adapter("other", lora(r=8))
    model.set_adapter("other")
    learns(model)
    assert not torch.equal(logits(model), first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


@scenario
def lora_fused_trains_saves_and_merges(folder: Path) -> None:
    import peft
    from halfbyte.integrations.peft import fuse, unfuse

    for autocast in (False, True):
        losses = []
        for fused in (False, True):
            model = adapted(folder, lora(target_modules="all-linear"))
            report = fuse(model)
            assert (report.fused, report.left) == (14, {}), report
            if not fused:
                assert unfuse(model) == 14
            losses.append(train(model, 8, autocast))
        assert losses[1] == pytest.approx(losses[0], rel=2e-3 if autocast else 1e-5), losses
    before = logits(model)
    model.save_pretrained(folder / "adapter")
    again = peft.PeftModel.from_pretrained(loaded(folder), folder / "adapter")
    assert torch.equal(logits(again), before)
    assert layers(model.merge_and_unload()) == 14
    assert unfuse(again) == 14
    torch.testing.assert_close(logits(again), before, rtol=1e-5, atol=1e-5)
    assert type(again.base_model.model.model.layers[0].self_attn.q_proj).__module__ == "peft.tuners.lora.bnb"


@scenario
def other_tuners(folder: Path) -> None:
    import peft

    targets = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    # Older releases rotate dense weights only.
    newer = importlib.util.find_spec("peft.utils.quantization_utils") is not None
    for made in (
        peft.OFTConfig(oft_block_size=16, use_cayley_neumann=False, **targets),
        *([peft.BOFTConfig(boft_block_size=16, **targets)] if newer else []),
        peft.VeraConfig(r=4, **targets),
        peft.MissConfig(r=4, **targets),
        peft.AdaLoraConfig(init_r=4, target_r=2, total_step=20, **targets),
    ):
        model = adapted(folder, made)
        losses = train(model, 4, rate=1e-2)
        assert losses[-1] < losses[0], (type(made).__name__, losses)
    model = adapted(folder, peft.IA3Config(feedforward_modules=[], **targets))
    learns(model, autocast=True, rate=5e-2)


@scenario
def quantize_model_takes_adapters_too(folder: Path) -> None:
    import peft

    made = halfbyte.quantize_model(LlamaForCausalLM.from_pretrained(source(folder)), config())
    model = peft.get_peft_model(made, lora())
    assert type(model.base_model.model.model.layers[0].self_attn.q_proj).__module__ == "peft.tuners.lora.bnb"
    learns(model)


@scenario
def autocast_keeps_the_inputs_dtype(folder: Path) -> None:
    layer = loaded(folder, bnb_4bit_compute_dtype="bfloat16").model.layers[0].mlp.up_proj
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 64)).dtype is torch.float32


@scenario
def trainer_resumes_to_the_same_losses(folder: Path) -> None:
    kwargs: dict[str, Any] = {
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "logging_strategy": "steps",
        "logging_steps": 1,
    }
    whole = trainer(folder, adapted(folder, lora()), save_strategy="steps", save_steps=2, **kwargs)
    whole.train()
    resumed = trainer(folder, adapted(folder, lora()), **kwargs)
    resumed.train(resume_from_checkpoint=str(folder / "trainer" / "checkpoint-2"))
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (whole, resumed)]
    assert len(losses[0]) == 4, losses
    assert losses[0] == losses[1], losses


@scenario
def trainer_refuses_a_bare_4bit_model(folder: Path) -> None:
    for model in (loaded(folder), halfbyte.quantize_model(LlamaForCausalLM.from_pretrained(source(folder)), config())):
        with pytest.raises(ValueError, match="adapters"):
            trainer(folder, model)


@scenario
def trainer_takes_the_optimizers_names(folder: Path) -> None:
    if KIND == "present":
        return  # those are bitsandbytes' own
    for name in ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "rmsprop_bnb"):
        run = trainer(folder, adapted(folder, lora()), optim=name, max_steps=2)
        assert run.train().global_step == 2, name
