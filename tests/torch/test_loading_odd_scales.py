"""Scales that no finite weight has: loading logs one warning, which names their tensors as the files do."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import halfbyte  # noqa: E402  (needs torch)
import tiny_models  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

pytestmark = pytest.mark.usefixtures("quiet_transformers")

NAME = "LlamaForCausalLM"
UP = "model.layers.1.mlp.up_proj"
STATE = f"{UP}.weight.quant_state.bitsandbytes__nf4"
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
NESTED, INT8 = {**NF4, "bnb_4bit_use_double_quant": True}, {"load_in_8bit": True}
NOTE = "quantized weights have scales that no finite weight has (NaN, infinite or negative): "


def ours(model: str) -> Any:
    cls = getattr(transformers, model)
    with torch.device("meta"):
        return cls(tiny_models.tiny_config(model))


def saved(folder: Path, config: dict[str, Any], changes: dict[str, Any]) -> Path:
    """A checkpoint some of whose tensors are changed."""
    halfbyte.quantize_checkpoint(
        tiny_models.save(NAME, folder / "source"), folder / "out", config=config, progress=None
    )
    path = folder / "out" / "model.safetensors"
    tensors = load_file(path)
    for name, value in changes.items():
        if isinstance(value, dict):
            state = {**json.loads(bytes(tensors[name].tolist())), **value}
            tensors[name] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
        else:
            tensors[name].view(-1)[0] = value
    save_file(tensors, path, {"format": "pt"})
    return folder / "out"


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "no finite weight" in r.getMessage()]


def load(how: str, folder: Path) -> Any:
    if how == "load_quantized":
        return halfbyte.load_quantized(ours(NAME), folder)
    config = halfbyte.BitsAndBytesConfig(**json.loads((folder / "config.json").read_text())["quantization_config"])
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


NAN, INF = float("nan"), float("inf")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("how", ["load_quantized", "from_pretrained"])
@pytest.mark.parametrize(
    ("config", "changes", "text"),
    [
        (NESTED, {STATE: {"nested_offset": NAN}}, f"1 of 14 {NOTE}{STATE} (nested_offset is nan)"),
        (NESTED, {STATE: {"nested_offset": -INF}}, f"1 of 14 {NOTE}{STATE} (nested_offset is -inf)"),
        (NESTED, {f"{UP}.weight.nested_absmax": NAN}, f"1 of 14 {NOTE}{UP}.weight.nested_absmax (1 of 1)"),
        (NESTED, {f"{UP}.weight.nested_absmax": -1}, f"1 of 14 {NOTE}{UP}.weight.nested_absmax (1 of 1)"),
        (INT8, {f"{UP}.SCB": INF}, f"1 of 14 {NOTE}{UP}.SCB (1 of 128)"),
        (
            INT8,
            {f"model.layers.{i}.mlp.{name}.SCB": NAN for i in (0, 1) for name in ("up_proj", "down_proj")},
            " and 1 more",
        ),
        (NESTED, {}, None),
        # Too many to be read before the model is used.
        (NF4, {f"{UP}.weight.absmax": NAN}, None),
    ],
)
def test_loading_odd_scales_are_told_once(
    how: str,
    config: dict[str, Any],
    changes: dict[str, Any],
    text: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = saved(tmp_path, config, changes)
    with caplog.at_level(logging.WARNING, logger="halfbyte"):
        load(how, folder)
    found = told(caplog)
    assert len(found) == (text is not None)
    if text is not None:
        assert text in found[0]
        assert str(folder) in found[0]
