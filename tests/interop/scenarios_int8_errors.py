"""8-bit checkpoints and configs that cannot be loaded: one error each, which names the tensor, file or field."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import halfbyte
import pytest
import torch
from scenarios import config, layers, scenario, source
from scenarios_int8 import WEIGHT, config8, configured, edited, layers8, loaded8, message
from scenarios_models import said
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM


@scenario
def int8_error_wrong_config(folder: Path) -> None:
    text = message(lambda: halfbyte.BitsAndBytesConfig(load_in_4bit=True, load_in_8bit=True), ValueError)
    assert "load_in_4bit and load_in_8bit are both True" in text, text
    for threshold in (-1.0, float("nan")):
        text = message(lambda threshold=threshold: loaded8(folder, llm_int8_threshold=threshold), ValueError)
        assert text.startswith("llm_int8_threshold must be a number of at least 0.0"), text
        assert text.endswith(f"got {threshold}"), text
    loaded8(folder).save_pretrained(folder / "packed")
    path = configured(folder / "packed", folder / "below", lambda values: values.update(llm_int8_threshold=-2.0))
    text = message(lambda: AutoModelForCausalLM.from_pretrained(path, quantization_config=config8()), ValueError)
    assert "config.json of the checkpoint: quantization_config: llm_int8_threshold" in text, text
    path = configured(folder / "packed", folder / "f", lambda values: values.update(llm_int8_has_fp16_weight=True))
    text = message(lambda: AutoModelForCausalLM.from_pretrained(path, quantization_config=config8()), ValueError)
    assert "is quantized to 8 bits" in text, text
    assert "llm_int8_has_fp16_weight" in text, text
    assert str(path / "model.safetensors") in text, text


@scenario
def int8_error_incomplete_checkpoints(folder: Path) -> None:
    loaded8(folder).save_pretrained(folder / "packed")
    scales, layout = WEIGHT.replace("weight", "SCB"), WEIGHT.replace("weight", "weight_format")

    def empty() -> Any:
        with torch.device("meta"):
            return LlamaForCausalLM(AutoConfig.from_pretrained(folder / "packed"))

    for number, (edit, *words) in enumerate(
        (
            (lambda t: t.pop(scales), scales),
            (lambda t: (t.pop(scales), t.pop(layout)), scales, WEIGHT),
            (lambda t: t.pop(WEIGHT), WEIGHT),
            (lambda t: t.update({scales: t[scales][:-1].clone()}), WEIGHT, "shape [128], got [127]"),
            (lambda t: t.update({scales: t[scales].int()}), WEIGHT, "SCB must be torch.float32, got torch.int32"),
            (lambda t: t.update({layout: t[layout] + 2}), WEIGHT, "weight_format must be 0 (rows), got 2"),
            (lambda t: t.update({WEIGHT: t[WEIGHT].float()}), WEIGHT, "must be torch.int8"),
            (lambda t: t.update({WEIGHT: t[WEIGHT][:, 1:].clone()}), WEIGHT, "[128, 63]", "[128, 64]"),
            (lambda t: t.update({f"{WEIGHT}.absmax": t[scales].clone()}), "4 bits and of 8 bits"),
        )
    ):
        path = edited(folder / "packed", folder / str(number), edit)
        for load in (
            lambda path=path: AutoModelForCausalLM.from_pretrained(path, quantization_config=config8()),
            lambda path=path: halfbyte.load_quantized(empty(), path),
        ):
            text = message(load, halfbyte.CheckpointError)
            assert str(path) in text, text
            for word in words:
                assert word in text, (word, text)


@scenario
def int8_error_checkpoint_that_is_quantized_already(folder: Path) -> None:
    """A checkpoint's own config goes before the argument, and without one nothing is quantized twice."""
    AutoModelForCausalLM.from_pretrained(source(folder), quantization_config=config()).save_pretrained(folder / "four")
    loaded8(folder).save_pretrained(folder / "eight")
    for path, given, count in (
        (folder / "four", config8(), (14, 0)),
        (folder / "eight", config(), (0, 14)),
    ):
        with said() as lines:
            model = AutoModelForCausalLM.from_pretrained(path, quantization_config=given)
        assert (layers(model), layers8(model)) == count
        told = [line for line in lines if "is used" in line]
        assert len(told) == 1, lines
        assert "load_in_8bit is" in told[0] or "load_in_4bit is" in told[0], told
    for name, bits in (("four", 4), ("eight", 8)):
        shutil.copytree(folder / name, folder / f"{name}-bare")
        file = folder / f"{name}-bare" / "config.json"
        values = json.loads(file.read_text(encoding="utf-8"))
        del values["quantization_config"]
        file.write_text(json.dumps(values), encoding="utf-8")
        for given in (config(), config8()):
            text = message(
                lambda name=name, given=given: AutoModelForCausalLM.from_pretrained(
                    folder / f"{name}-bare", quantization_config=given
                ),
                halfbyte.CheckpointError,
            )
            assert f"packed to {bits} bits already" in text, text
            assert f"load_in_{bits}bit" in text, text


@scenario
def int8_error_weights_that_are_not_finite(folder: Path) -> None:
    for number, value in enumerate((float("nan"), float("inf"), 1e5)):

        def spoil(tensors: dict[str, Any], value: float = value) -> None:
            tensors[WEIGHT][3, 5] = value

        path = edited(source(folder), folder / str(number), spoil)
        text = message(
            lambda path=path: AutoModelForCausalLM.from_pretrained(path, quantization_config=config8()), ValueError
        )
        assert text.startswith(f"{WEIGHT}: contains "), text
        assert "at [3, 5]" in text, text
        model = LlamaForCausalLM.from_pretrained(path)
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: contains .* at \[3, 5\]"):
            halfbyte.quantize_model(model, config8())
        assert layers8(model) == 0
