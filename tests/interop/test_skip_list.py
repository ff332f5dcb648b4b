"""Names in `llm_int8_skip_modules`: what is saved of them, and which are refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from halfbyte import BitsAndBytesConfig  # noqa: E402
from halfbyte.nn import Linear4bit  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.quantizers.quantizers_utils import should_convert_module  # noqa: E402

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("skip", [["q_proj"], ["model.layers.0"], ["layers.1.mlp"], ["model.layers"], ["nothing"], []])
def test_saved_list_names_all_that_is_kept(
    dense: Path, tmp_path: Path, skip: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    # Loaders of transformers that find a list keep nothing else: no output embedding.
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skip)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    packed = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    names = written["llm_int8_skip_modules"]
    idle = ("nothing", "layers.1.mlp")  # no linear layer's path begins or ends so
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("keeps no linear layer" in text for text in warned) == any(name in idle for name in skip)
    assert [name for name in skip if name not in idle] == [name for name in names if name in skip]
    assert config.llm_int8_skip_modules == skip  # the caller's own is as it was
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert {name for name in linear if should_convert_module(name, names)} == packed
    # The base model's class has no prefix.
    inner = {name.removeprefix("model.") for name in packed}
    short = [name.removeprefix("model.") for name in linear]
    assert {name for name in short if should_convert_module(name, names)} == inner


@pytest.mark.parametrize("skip", [None, ["lm_head"]])
def test_list_is_saved_as_given_where_it_says_all(dense: Path, skip: list[str] | None) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skip)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    assert model.config.quantization_config.llm_int8_skip_modules == skip


@pytest.mark.parametrize("name", ["*.q_proj", "(", "[0-9"])
def test_name_that_is_no_regular_expression_is_refused(dense: Path, name: str) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head", name])
    with pytest.raises(ValueError, match="llm_int8_skip_modules must be names of modules") as found:
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    assert repr(name) in str(found.value)
