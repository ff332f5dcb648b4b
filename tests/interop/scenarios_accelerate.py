"""accelerate on 4-bit models: models without weights, device maps, hooks that offload, its own way to quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import halfbyte
import pytest
import torch
from accelerate import (
    cpu_offload,
    disk_offload,
    dispatch_model,
    infer_auto_device_map,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from scenarios import KIND, SIZES, layers, loaded, logits, scenario, source
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def skeleton(packed: bool = False) -> Any:
    """The tiny Llama without weights, with 4-bit layers or dense ones."""
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    with torch.device("meta"):
        for name, module in list(model.named_modules()) if packed else ():
            if type(module) is nn.Linear and name != "lm_head":
                new = halfbyte.nn.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
                model.set_submodule(name, new)
    return model


@scenario
def empty_weights_are_filled(folder: Path) -> None:
    whole = loaded(folder)
    whole.save_pretrained(folder / "packed")
    # A dense checkpoint is quantized where it arrives, layer by layer.
    model = load_checkpoint_and_dispatch(skeleton(packed=True), str(source(folder)), device_map={"": "cpu"})
    assert layers(model) == 14
    assert torch.equal(logits(model), logits(whole))
    # A 4-bit one is not for accelerate, which takes tensors one by one; this package's own function fills the model.
    with pytest.raises(ValueError, match="load_quantized"):
        load_checkpoint_and_dispatch(skeleton(packed=True), str(folder / "packed"), device_map={"": "cpu"})
    model = dispatch_model(
        halfbyte.load_quantized(skeleton(), folder / "packed"), {"": "cpu"}, main_device="cpu", force_hooks=True
    )
    assert torch.equal(logits(model), logits(whole))
    # Without a map it is torch that loads, and that works.
    model = load_checkpoint_and_dispatch(skeleton(packed=True).to_empty(device="cpu"), str(folder / "packed"))
    model.model.rotary_emb = whole.model.rotary_emb
    assert torch.equal(logits(model), logits(whole))


@scenario
def device_maps_count_packed_bytes(folder: Path) -> None:
    model = loaded(folder)
    dense = LlamaForCausalLM.from_pretrained(source(folder))
    packed = accelerate.utils.compute_module_sizes(model)
    sizes = accelerate.utils.compute_module_sizes(dense)
    assert packed["model.layers.0.mlp.up_proj.weight"] == sizes["model.layers.0.mlp.up_proj.weight"] // 8
    found = infer_auto_device_map(model, max_memory={"cpu": packed[""] + 1000})
    assert set(found.values()) == {"cpu"}, found
    assert "disk" in infer_auto_device_map(dense, max_memory={"cpu": packed[""] + 1000}).values()


@scenario
def hooks_offload_packed_weights(folder: Path) -> None:
    base = logits(loaded(folder))
    cpu = torch.device("cpu")
    parts = {
        name: "disk" if name == "model.layers.1" else "cpu"
        for name in (
            "model.embed_tokens",
            "model.layers.0",
            "model.layers.1",
            "model.norm",
            "model.rotary_emb",
            "lm_head",
        )
    }
    for model in (
        cpu_offload(loaded(folder), execution_device=cpu),
        disk_offload(loaded(folder), str(folder / "all"), execution_device=cpu),
        dispatch_model(loaded(folder), parts, offload_dir=str(folder / "one"), main_device="cpu", force_hooks=True),
    ):
        weight = model.model.layers[1].mlp.up_proj.weight
        assert weight.is_meta
        assert weight.dtype is torch.uint8
        with mock.patch.object(halfbyte.nn.params, "quantize_4bit", side_effect=AssertionError("quantized again")):
            for _ in range(2):
                assert torch.equal(logits(model), base)
        accelerate.hooks.remove_hook_from_submodules(model)


@scenario
def accelerate_quantizes(folder: Path) -> None:
    if KIND == "present":
        return  # that is bitsandbytes' own
    halfbyte.enable()
    try:
        from accelerate.utils import BnbQuantizationConfig, load_and_quantize_model

        how = BnbQuantizationConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype="fp32",
            torch_dtype=torch.float32,
        )
        model = LlamaForCausalLM.from_pretrained(source(folder))
        # It looks for a GPU, and moves the model there.
        with (
            mock.patch.object(torch.cuda, "is_available", return_value=True),
            mock.patch.object(torch.cuda, "current_device", return_value="cpu"),
        ):
            made = load_and_quantize_model(model, bnb_quantization_config=how)
    finally:
        halfbyte.enable(False)
    assert layers(made) == 14
    assert made.is_loaded_in_4bit
    assert torch.equal(logits(made), logits(loaded(folder)))


@scenario
def accelerator_prepares(folder: Path) -> None:
    from scenarios import adapted, lora, train

    model = adapted(folder, lora())
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    assert layers(prepared) == 14
    losses = train(prepared, 3)
    assert losses[-1] < losses[0], losses
    state = accelerator.get_state_dict(prepared)
    assert any(name.endswith("weight.absmax") for name in state)
    accelerator.save_state(str(folder / "state"))
    before = logits(prepared)
    train(prepared, 2)
    assert not torch.equal(logits(prepared), before)
    accelerator.load_state(str(folder / "state"))
    assert torch.equal(logits(prepared), before)
