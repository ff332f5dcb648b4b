"""What cannot be loaded or adapted: one error each, which names the field, the file or the version, and the remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import halfbyte
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from scenarios import IDS, KIND, SIZES, TAKES_EXPERTS_APART, config, layers, loaded, scenario, source
from scenarios_models import said, tiny_models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


def message(call: Callable[[], object], *kinds: type[BaseException]) -> str:
    """What `call` raises, which is one of `kinds`."""
    try:
        call()
    except kinds as error:
        return str(error)
    raise AssertionError("no error")


def load(path: Path, **kwargs: Any) -> Any:
    """Load in 4 bits."""
    return AutoModelForCausalLM.from_pretrained(path, **{"quantization_config": config(), **kwargs})


def load_bare(path: Path) -> Any:
    """Load a checkpoint that says itself how it is quantized."""
    return AutoModelForCausalLM.from_pretrained(path)


def edited(path: Path, to: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a checkpoint whose config.json was edited."""
    shutil.copytree(path, to)
    values = json.loads((to / "config.json").read_text(encoding="utf-8"))
    edit(values)
    (to / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return to


@scenario
def error_device_maps(folder: Path) -> None:
    for target in ("gpu0", "cuda:x", -1, 1.5, True, None, [0]):
        text = message(lambda target=target: load(source(folder), device_map={"": target}), ValueError)
        assert "device_map['']" in text, text
        assert "'disk'" in text, text
        assert repr(target) in text, text
    text = message(lambda: load(source(folder), device_map={"model": "cpu", "lm_head": "gpu"}), ValueError)
    assert "device_map['lm_head']" in text, text


@scenario
def error_other_methods(folder: Path) -> None:
    for number, saved in enumerate(
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128},
            {"quant_method": "awq", "bits": 4, "group_size": 128},
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            {"quant_method": "compressed-tensors", "format": "float-quantized"},
        )
    ):
        path = edited(
            source(folder), folder / str(number), lambda values, saved=saved: values.update(quantization_config=saved)
        )
        text = message(lambda path=path: load(path), ValueError)
        assert repr(saved["quant_method"]) in text, text
        assert "config.json" in text, text
        assert "16-bit checkpoint" in text, text


@scenario
def error_wrong_config(folder: Path) -> None:
    text = message(lambda: halfbyte.BitsAndBytesConfig(load_in_4bit=True, load_in_8bit=True), ValueError)
    assert "load_in_4bit and load_in_8bit" in text, text
    loaded(folder).save_pretrained(folder / "packed")

    def broken(number: int, **fields: Any) -> Path:
        return edited(
            folder / "packed", folder / f"broken{number}", lambda values: values["quantization_config"].update(fields)
        )

    for number, (name, value, words) in enumerate(
        (
            ("llm_int8_skip_modules", "null", "a list of strings"),
            ("llm_int8_skip_modules", [None], "a list of strings"),
            ("llm_int8_threshold", "6", "a float"),
            ("bnb_4bit_use_double_quant", "yes", "a boolean"),
            ("bnb_4bit_quant_type", "int4", "'nf4'"),
            ("bnb_4bit_compute_dtype", "float99", "float99"),
            ("bnb_4bit_quant_storage", "int32", "'uint8'"),
        )
    ):
        path = broken(number, **{name: value})
        for way in (load, load_bare):
            if KIND == "present" and way is load_bare:
                continue  # that load is bitsandbytes'
            text = message(lambda path=path, way=way: way(path), TypeError, ValueError)
            assert name in text, text
            assert "config.json" in text, text
            assert words in text, text
    # Both are what a checkpoint with layers of both kinds says; the names of the tensors tell which is which.
    assert layers(load(broken(98, load_in_8bit=True))) == 14


@scenario
def error_too_old(folder: Path) -> None:
    version = transformers.__version__
    transformers.__version__ = "4.57.1"
    try:
        text = message(lambda: load(source(folder)), ImportError)
    finally:
        transformers.__version__ = version
    assert "transformers>=5.0" in text, text
    assert "4.57.1" in text, text
    assert layers(load(source(folder))) == 14


@scenario
def error_incomplete_checkpoints(folder: Path) -> None:
    loaded(folder).save_pretrained(folder / "packed")
    whole = load_file(folder / "packed" / "model.safetensors")
    weight = "model.layers.1.mlp.up_proj.weight"
    for number, gone in enumerate(
        (
            weight,
            f"{weight}.absmax",
            f"{weight}.quant_map",
            f"{weight}.nested_absmax",
            f"{weight}.nested_quant_map",
            f"{weight}.quant_state.bitsandbytes__nf4",
        )
    ):
        path = folder / str(number)
        shutil.copytree(folder / "packed", path)
        rest = {name: tensor for name, tensor in whole.items() if name != gone}
        save_file(rest, path / "model.safetensors", metadata={"format": "pt"})
        text = message(lambda path=path: load(path), ValueError)
        assert gone in text, text
        assert str(path / "model.safetensors") in text, text
        assert "lacks" in text, text
    # Of a weight that is cut short, or of another shape, the report of transformers tells.
    for number, tensor in enumerate((whole[weight][:-8], whole["model.layers.1.self_attn.q_proj.weight"])):
        path = folder / f"short{number}"
        shutil.copytree(folder / "packed", path)
        save_file({**whole, weight: tensor.contiguous().clone()}, path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises((ValueError, RuntimeError)):
            load(path)


@scenario
def packed_experts_of_older_releases_load_or_are_an_error(folder: Path) -> None:
    path = tiny_models.save("MixtralForCausalLM", folder / "moe", torch.float32)
    made: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if ".experts." not in name:
            made[name] = tensor
            continue
        packed, state = halfbyte.functional.quantize_4bit(tensor, quant_type="nf4")
        made[name] = packed
        made.update({f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()})
    save_file(made, path / "model.safetensors", metadata={"format": "pt"})
    saved = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    path = edited(path, folder / "packed", lambda values: values.update(quantization_config=saved))
    if TAKES_EXPERTS_APART:
        halfbyte.dequantize_checkpoint(path, folder / "dense")
        expected = transformers.AutoModelForCausalLM.from_pretrained(folder / "dense")
        torch.testing.assert_close(load(path)(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-5)
        return
    text = message(lambda: load(path), ValueError)
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in text, text
    assert "model.layers.0.mlp.experts.gate_up_proj" in text, text
    assert "`halfbyte dequantize`" in text, text
    # And that remedy works.
    halfbyte.dequantize_checkpoint(path, folder / "dense")
    model = load(folder / "dense")
    assert layers(model) == 8
    assert model(IDS).logits.isfinite().all()


@scenario
def error_ignored_config_is_said(folder: Path) -> None:
    loaded(folder).save_pretrained(folder / "packed")
    with said() as lines:
        load(folder / "packed")
    assert not [line for line in lines if "is used" in line], lines
    other = halfbyte.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype="bfloat16")
    with said() as lines:
        load(folder / "packed", quantization_config=other)
    told = [line for line in lines if "is used" in line]
    assert len(told) == 1, lines
    assert "bnb_4bit_compute_dtype is 'float32', not 'bfloat16'" in told[0], told


@scenario
def error_adapter_of_another_base(folder: Path) -> None:
    import peft

    wide = folder / "wide"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 128})).save_pretrained(wide)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(load(wide), lora).save_pretrained(folder / "adapter")
    model = loaded(folder)
    names = [name for name, _ in model.named_modules()]
    text = message(lambda: peft.PeftModel.from_pretrained(model, folder / "adapter"), ValueError)
    assert str(folder / "adapter" / "adapter_model.safetensors") in text, text
    assert "q_proj.lora_A.weight is [4, 128]" in text, text
    assert f"{str(wide)!r} by base_model_name_or_path" in text, text
    assert repr(str(source(folder))) in text, text
    assert names == [name for name, _ in model.named_modules()]
    # transformers' own way to adapters, and a second one.
    assert "lora_A" in message(lambda: model.load_adapter(str(folder / "adapter")), ValueError)
    assert names == [name for name, _ in model.named_modules()]
    adapted = peft.get_peft_model(loaded(folder), lora)
    assert "lora_A" in message(lambda: adapted.load_adapter(folder / "adapter", "other"), ValueError)
    assert list(adapted.peft_config) == ["default"]
    other = peft.LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM")
    model = loaded(folder)
    text = message(lambda: peft.get_peft_model(model, other), ValueError)
    assert "c_attn" in text, text
    assert layers(model) == 14
    assert model(IDS).logits.isfinite().all()


@scenario
def error_skip_names_without_effect(folder: Path) -> None:
    with said() as lines:
        loaded(folder, llm_int8_skip_modules=["vision_tower", "model.layers.0"])
    told = [line for line in lines if "keeps no linear layer" in line]
    assert len(told) == 1, lines
    assert "'vision_tower'" in told[0], told
