"""Models in 4 bits through transformers: loading, saving, offloading, generating."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import halfbyte
import torch
import transformers
from scenarios import IDS, KIND, config, layers, loaded, logits, scenario, source
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM


@scenario
def load_on_the_fly_equals_quantize_model(folder: Path) -> None:
    model = loaded(folder, torch.bfloat16)
    reference = halfbyte.quantize_model(LlamaForCausalLM.from_pretrained(source(folder, torch.bfloat16)), config())
    assert layers(model) == layers(reference) == 14
    assert torch.equal(logits(model), logits(reference))
    assert model.dtype is torch.bfloat16
    assert model.lm_head.weight.dtype is torch.bfloat16


@scenario
def load_with_transformers_class(folder: Path) -> None:
    given = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(source(folder), quantization_config=given)
    assert (layers(model) == 14) == (KIND != "present"), type(model.model.layers[0].self_attn.q_proj)


@scenario
def load_saved_without_argument(folder: Path) -> None:
    model = loaded(folder)
    model.save_pretrained(folder / "saved")
    again = AutoModelForCausalLM.from_pretrained(folder / "saved")
    assert (layers(again) == 14) == (KIND != "present"), type(again.model.layers[0].self_attn.q_proj)
    again = AutoModelForCausalLM.from_pretrained(folder / "saved", quantization_config=config())
    assert layers(again) == 14
    assert torch.equal(logits(again), logits(model))
    assert type(again.config.quantization_config) is halfbyte.BitsAndBytesConfig


@scenario
def save_of_a_loaded_model_is_byte_equal(folder: Path) -> None:
    loaded(folder).save_pretrained(folder / "first", max_shard_size="40KB")
    again = AutoModelForCausalLM.from_pretrained(folder / "first", quantization_config=config())
    again.save_pretrained(folder / "second", max_shard_size="40KB")
    names = sorted(path.name for path in (folder / "first").iterdir())
    assert names == sorted(path.name for path in (folder / "second").iterdir())
    assert sum(name.endswith(".safetensors") for name in names) > 1
    for name in names:
        assert (folder / "first" / name).read_bytes() == (folder / "second" / name).read_bytes(), name


@scenario
def load_into_the_base_class(folder: Path) -> None:
    loaded(folder, llm_int8_skip_modules=["model.layers.0"]).save_pretrained(folder / "skipped")
    model = AutoModel.from_pretrained(folder / "skipped", quantization_config=config())
    assert layers(model) == 7
    assert model(IDS).last_hidden_state.isfinite().all()


@scenario
def load_with_a_new_head(folder: Path) -> None:
    loaded(folder).save_pretrained(folder / "headless")
    for path in (source(folder), folder / "headless"):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            path, quantization_config=config(), pad_token_id=0
        )
        assert layers(model) == 14
        assert type(model.score) is nn.Linear
        assert model(IDS).logits.isfinite().all()


@scenario
def count_of_parameters_is_the_dense_models(folder: Path) -> None:
    dense = LlamaForCausalLM.from_pretrained(source(folder)).num_parameters()
    assert loaded(folder).num_parameters() == dense
    made = halfbyte.quantize_model(LlamaForCausalLM.from_pretrained(source(folder)), config())
    assert made.num_parameters() == dense


@scenario
def dequantize_and_save_dense(folder: Path) -> None:
    for model in (loaded(folder), halfbyte.quantize_model(LlamaForCausalLM.from_pretrained(source(folder)), config())):
        before = logits(model)
        dense = model.dequantize()
        assert layers(dense) == 0
        assert not getattr(dense, "is_quantized", False)
        torch.testing.assert_close(logits(dense), before, rtol=1e-4, atol=1e-4)
        dense.save_pretrained(folder / "dense")
        again = AutoModelForCausalLM.from_pretrained(folder / "dense")
        assert torch.equal(logits(again), logits(dense))


@scenario
def disk_offload_stays_4bit(folder: Path) -> None:
    loaded(folder).save_pretrained(folder / "packed")
    where = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    calls = []
    quantize = halfbyte.nn.params.quantize_4bit

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return quantize(*args, **kwargs)

    for path in (source(folder), folder / "packed"):
        whole = AutoModelForCausalLM.from_pretrained(path, quantization_config=config())
        model = AutoModelForCausalLM.from_pretrained(
            path,
            quantization_config=config(),
            device_map={**where, "model.layers.1": "disk"},
            offload_folder=folder / f"offload-{path.name}",
        )
        assert model.model.layers[1].self_attn.q_proj.weight.is_meta
        halfbyte.nn.params.quantize_4bit = counted
        try:
            for _ in range(2):
                assert torch.equal(logits(model), logits(whole))
        finally:
            halfbyte.nn.params.quantize_4bit = quantize
        assert not calls


@scenario
def generate_with_both_caches(folder: Path) -> None:
    model = loaded(folder)
    tokens = [
        model.generate(IDS[:, :4], max_new_tokens=4, do_sample=False, pad_token_id=0, **kwargs)
        for kwargs in ({}, {"cache_implementation": "static"})
    ]
    assert torch.equal(*tokens)


@scenario
def errors_before_anything_is_changed(folder: Path) -> None:
    def message(**kwargs: Any) -> str:
        try:
            AutoModelForCausalLM.from_pretrained(source(folder), **kwargs)
        except (ValueError, TypeError, ImportError) as error:
            return f"{type(error).__name__}: {error}"
        raise AssertionError(f"no error for {kwargs}")

    text = message(quantization_config=config(), device_map={"": "gpu0"})
    assert "device_map['']" in text, text
    assert "'gpu0'" in text, text
    assert "bnb_4bit_quant_type" in message(
        quantization_config=halfbyte.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="int4")
    )


@scenario
def tensors_of_16_bits_stay_views_of_the_file(folder: Path) -> None:
    model = loaded(folder, torch.bfloat16)
    address = model.model.embed_tokens.weight.data_ptr()
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "model.safetensors" in line]
    ranges = [tuple(int(x, 16) for x in parts[0].split("-")) for parts in maps]
    assert any(low <= address < high for low, high in ranges)
