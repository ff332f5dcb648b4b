"""Adapters on 4-bit models: variants of LoRA, several at once, merging and what it costs."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import halfbyte
import pytest
import torch
from scenarios import (
    IDS,
    KIND,
    SIZES,
    TAKES_EXPERTS_APART,
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
)
from scenarios_models import said
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

# Older releases have no OFT, BOFT, MiSS and SHiRA on packed weights.
NEWER_PEFT = importlib.util.find_spec("peft.utils.quantization_utils") is not None


@scenario
def lora_initializations(folder: Path) -> None:
    for how, storage in (("gaussian", "uint8"), ("orthogonal", "float32"), ("olora", "uint8")):
        # PEFT gives orthogonal matrices the dtype of the packed bytes.
        learns(adapted(folder, lora(init_lora_weights=how), bnb_4bit_quant_storage=storage))
    # PiSSA decomposes dense weights only, and says so.
    with pytest.raises(TypeError, match="PiSSA under float32"):
        adapted(folder, lora(init_lora_weights="pissa_niter_4"))


@scenario
def lora_loftq(folder: Path) -> None:
    import peft
    from peft.utils import loftq_utils

    model = adapted(folder, lora(init_lora_weights=True, r=8))
    dense = LlamaForCausalLM.from_pretrained(source(folder)).eval()
    with torch.no_grad():
        expected = dense(IDS).logits
    before = float((logits(model) - expected).norm())
    with cuda_is_the_cpu():
        peft.replace_lora_weights_loftq(model, model_path=str(source(folder) / "model.safetensors"))
    after = float((logits(model) - expected).norm())
    assert after < before, (before, after)
    if KIND == "present":
        return  # what follows has no model, so it is bitsandbytes' own
    weight = torch.randn(64, 64)
    with cuda_is_the_cpu():
        found, a, b = loftq_utils.loftq_init(weight, num_bits=4, reduced_rank=8, num_iter=2)
    packed = halfbyte.functional.quantize_4bit(weight, quant_type="nf4")
    plain = float((halfbyte.functional.dequantize_4bit(*packed) - weight).norm())
    assert float((found + b @ a - weight).norm()) < plain


@contextlib.contextmanager
def cuda_is_the_cpu() -> Iterator[None]:
    """PEFT's LoftQ computes on a GPU and nowhere else."""
    stock = torch.Tensor.to

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        args = tuple("cpu" if arg == "cuda" else arg for arg in args)
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return stock(self, *args, **kwargs)

    own, parameter = halfbyte.nn.Params4bit.to, torch.Tensor
    parameter.to = to  # type: ignore[method-assign]
    halfbyte.nn.Params4bit.to = (  # type: ignore[method-assign]
        lambda self, *args, **kwargs: own(self, *("cpu" if arg == "cuda" else arg for arg in args), **kwargs)
    )
    try:
        yield
    finally:
        parameter.to = stock  # type: ignore[method-assign]
        halfbyte.nn.Params4bit.to = own  # type: ignore[method-assign]


@scenario
def lora_on_stacked_experts(folder: Path) -> None:
    import peft
    import tiny_models
    import transformers

    path = tiny_models.save("Qwen3MoeForCausalLM", folder / "moe", torch.float32)
    model = transformers.Qwen3MoeForCausalLM.from_pretrained(path, quantization_config=config())
    made = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=4,
            target_modules=["q_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            task_type="CAUSAL_LM",
        ),
    )
    learns(made)
    before = logits(made)
    made.save_pretrained(folder / "adapter")
    fresh = transformers.Qwen3MoeForCausalLM.from_pretrained(path, quantization_config=config())
    again = peft.PeftModel.from_pretrained(fresh, folder / "adapter")
    torch.testing.assert_close(logits(again), before, rtol=1e-4, atol=1e-5)
    merged = again.merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj) is type(model.model.layers[0].self_attn.k_proj)
    experts = merged.model.layers[0].mlp.experts
    if TAKES_EXPERTS_APART:
        assert type(experts._modules["0"].up_proj) is type(model.model.layers[0].self_attn.k_proj)
    else:
        assert experts.gate_up_proj.dtype is torch.float32
    assert same_tokens(logits(merged), before) >= 0.9


@scenario
def several_adapters_and_a_weighted_sum(folder: Path) -> None:
    model = adapted(folder, lora(init_lora_weights=False))
    model.add_adapter("other", lora(init_lora_weights=False))
    one = logits(model)
    model.set_adapter("other")
    two = logits(model)
    plain = logits(loaded(folder))
    model.add_weighted_adapter(["default", "other"], [1.0, 0.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model), one, rtol=1e-4, atol=1e-4)
    for how in ("linear", "svd", "ties", "dare_linear"):
        more = {"density": 0.5} if how in ("ties", "dare_linear") else {}
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], how, combination_type=how, **more)
        model.set_adapter(how)
        assert logits(model).isfinite().all(), how
    # Rows of one batch through different adapters.
    model.eval()
    with torch.no_grad():
        mixed = model(input_ids=IDS, adapter_names=["default", "other"]).logits
    torch.testing.assert_close(mixed[0], one[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1], two[1], rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), plain)
    model.delete_adapter("other")
    model.set_adapter("default")
    torch.testing.assert_close(logits(model), one)


@scenario
def further_tuners(folder: Path) -> None:
    import peft

    targets = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    prompt = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
    for made in (
        *([peft.ShiraConfig(**targets)] if NEWER_PEFT else []),
        peft.VBLoRAConfig(num_vectors=16, vector_length=64, **targets),
        peft.FourierFTConfig(n_frequency=100, **targets),
        peft.WaveFTConfig(n_frequency=100, **targets),
        peft.C3AConfig(block_size=16, **targets),
        peft.RandLoraConfig(**targets),
        peft.RoadConfig(**targets),
        peft.PromptTuningConfig(**prompt),
        peft.PrefixTuningConfig(**prompt),
        lora(target_modules=["embed_tokens", "q_proj"]),
        lora(target_modules="all-linear"),
        lora(trainable_token_indices=[1, 2]),
        lora(lora_bias=True),
    ):
        model = peft.get_peft_model(loaded(folder), made)
        autocast = isinstance(made, peft.RandLoraConfig | peft.RoadConfig)
        losses = train(model, 3, autocast=autocast, rate=1e-2)
        assert losses[-1] < losses[0], (made, losses)


@scenario
def kbit_training_and_saved_modules(folder: Path) -> None:
    import peft

    base = loaded(folder, torch.bfloat16)
    model = peft.prepare_model_for_kbit_training(base)
    assert model.is_gradient_checkpointing
    assert {p.dtype for p in model.parameters() if not isinstance(p, halfbyte.nn.Params4bit)} == {torch.float32}
    assert layers(model) == 14
    made = peft.get_peft_model(model, lora(modules_to_save=["lm_head"]))
    head = made.base_model.model.lm_head
    first = head.modules_to_save["default"].weight.detach().clone()
    learns(made, autocast=True, rate=1e-2)
    assert not torch.equal(head.modules_to_save["default"].weight, first)
    before = logits(made)
    made.save_pretrained(folder / "adapter")
    fresh = peft.prepare_model_for_kbit_training(loaded(folder, torch.bfloat16))
    again = peft.PeftModel.from_pretrained(fresh, folder / "adapter")
    torch.testing.assert_close(logits(again), before)
    merged = again.merge_and_unload()
    assert torch.equal(merged.lm_head.weight, head.modules_to_save["default"].weight)


# ---- merging ---------------------------------------------------------------------------------------------------------

COST = re.compile(
    r"(\w+): (\d+) weights were quantized again, which changed them by ([\d.e-]+) % on average .*"
    r"at worst by ([\d.e-]+) %, in ([\w.]+); the adapter had changed them by ([\d.e-]+) %"
)


def sane(folder: Path) -> Path:
    """A model that has learned something: which token follows which."""
    path = folder / "sane"
    if not path.exists():
        torch.manual_seed(0)
        sizes = {**SIZES, "hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.05}
        model = LlamaForCausalLM(LlamaConfig(**sizes))
        train(model, 60, rate=3e-3)
        model.save_pretrained(path)
    return path


@scenario
def merging_says_what_it_costs(folder: Path) -> None:
    import peft

    def made() -> Any:
        model = AutoModelForCausalLM.from_pretrained(sane(folder), quantization_config=config())
        torch.manual_seed(1)
        return peft.get_peft_model(model, lora())

    model = made()
    learns(model)
    before = logits(model)
    model.save_pretrained(folder / "adapter")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    wanted = layer.base_layer.dequantize() + layer.get_delta_weight("default")
    with said() as lines:
        merged = model.merge_and_unload()
    assert len(lines) == 1, lines
    found = COST.match(lines[0])
    assert found, lines
    assert found[1] == "merge_and_unload"
    assert found[2] == "4"
    mean, worst, change = float(found[3]), float(found[4]), float(found[6])
    assert 0 < mean <= worst < 20, lines
    assert change > 0, lines
    names = dict(merged.named_modules())
    assert isinstance(names[found[5]], halfbyte.nn.Linear4bit), lines
    q_proj = merged.model.layers[0].self_attn.q_proj
    error = 100 * float((q_proj.dequantize() - wanted).norm() / wanted.norm())
    assert error <= worst * 1.01, (error, lines)
    if found[5] == "model.layers.0.self_attn.q_proj":
        assert math.isclose(error, worst, rel_tol=0.02), (error, lines)
    assert same_tokens(logits(merged), before) >= 0.98

    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(sane(folder), quantization_config=config()), folder / "adapter"
    )
    assert same_tokens(logits(model), before) == 1
    with said() as lines:
        model.merge_adapter()
    assert [COST.match(line)[1] for line in lines] == ["merge_adapter"], lines
    assert same_tokens(logits(model), before) >= 0.98
    with said() as lines:
        model.unmerge_adapter()
    assert [COST.match(line)[1] for line in lines] == ["unmerge_adapter"], lines
    assert same_tokens(logits(model), before) >= 0.98
    # A dense model is none of our business.
    dense = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(sane(folder)), folder / "adapter")
    with said() as lines:
        dense.merge_and_unload()
    assert not lines, lines


@scenario
def merging_of_every_tuner(folder: Path) -> None:
    import peft

    targets = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    tuners = [
        lora(use_dora=True),
        lora(use_rslora=True),
        peft.VeraConfig(r=4, **targets),
        peft.RandLoraConfig(r=4, **targets),
        peft.RoadConfig(**targets),
    ]
    if NEWER_PEFT:
        tuners += [
            peft.OFTConfig(oft_block_size=16, use_cayley_neumann=False, **targets),
            peft.BOFTConfig(boft_block_size=16, **targets),
            peft.MissConfig(r=4, **targets),
        ]
    for tuner in tuners:
        model = AutoModelForCausalLM.from_pretrained(sane(folder), quantization_config=config())
        torch.manual_seed(1)
        model = peft.get_peft_model(model, tuner)
        train(model, 2, rate=1e-3)
        before = logits(model)
        with said() as lines:
            merged = model.merge_and_unload()
        assert len(lines) == 1, (type(tuner).__name__, lines)
        assert lines[0].startswith("merge_and_unload: 4 weights"), lines
        assert layers(merged) == 14
        assert all(type(module) is not nn.Linear for name, module in merged.named_modules() if "proj" in name)
        assert same_tokens(logits(merged), before) >= 0.98, type(tuner).__name__
