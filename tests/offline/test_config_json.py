"""`config.json`: read in order, refused when it is bad, and written as transformers does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import halfbyte
import pytest
from halfbyte.offline import config_json as _config_json
from halfbyte.offline.options import QuantizeOptions
from halfbyte.offline.quantize import quantization_config


def folder_with(tmp_path: Path, data: bytes) -> Path:
    (tmp_path / "config.json").write_bytes(data)
    return tmp_path


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "is not valid JSON (Expecting value"),
        (b"{", "is not valid JSON (Expecting property name"),
        (b"[]", "must hold a JSON object, got an array"),
        (b'"x"', "must hold a JSON object, got a string"),
        (b"null", "must hold a JSON object, got null"),
        (b'{"a": NaN}', "is not valid JSON (it holds NaN); save, or download, it again"),
        (b"\xef\xbb\xbf{}", "is not valid JSON (Unexpected UTF-8 BOM"),
        (b'{"a": "\xff"}', "is not valid JSON ('utf-8' codec can't decode"),
        (b"[" * 100_000, "is nested too deeply for a model's configuration"),
        (b'{"a":' * 100_000, "is nested too deeply for a model's configuration"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON (Exceeds the limit"),
    ],
)
def test_config_json_that_is_bad_is_named(data, text, tmp_path):
    with pytest.raises(halfbyte.CheckpointError) as caught:
        _config_json.read_config(folder_with(tmp_path, data))
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: {text}")
    assert "\n" not in str(caught.value)


def test_config_json_that_is_a_folder_or_too_large_is_named(tmp_path, monkeypatch):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(halfbyte.CheckpointError, match=r"config\.json: is not a file"):
        _config_json.read_config(tmp_path)
    (tmp_path / "config.json").rmdir()
    monkeypatch.setattr(_config_json, "MAX_BYTES", 3)
    with pytest.raises(halfbyte.CheckpointError, match=r"must be a model's configuration of at most 3 bytes, got 4"):
        _config_json.read_config(folder_with(tmp_path, b"{  }"))


def test_config_json_keeps_infinity_and_gives_the_core_null(tmp_path):
    config = _config_json.read_config(
        folder_with(tmp_path, b'{"limit": [0.0, Infinity], "low": -Infinity, "b": 1e999}')
    )
    assert config is not None
    assert json.loads(_config_json.native_text(config)) == {"limit": [0.0, None], "low": None, "b": None}
    assert '"limit": [\n    0.0,\n    Infinity\n  ]' in _config_json.dump(config)


def test_config_json_may_be_absent(tmp_path):
    assert _config_json.read_config(tmp_path) is None


def test_config_json_has_quantization_config_where_transformers_puts_it():
    quantization = {"quant_method": "bitsandbytes", "_load_in_4bit": True}
    ordered = {"architectures": ["A"], "id2label": {"0": "x", "10": "y", "2": "z"}, "vocab_size": 3}
    text = _config_json.with_quantization(ordered, quantization)
    assert list(json.loads(text)) == ["architectures", "id2label", "quantization_config", "vocab_size"]
    assert list(json.loads(text)["id2label"]) == ["0", "10", "2"]
    assert list(json.loads(text)["quantization_config"]) == ["_load_in_4bit", "quant_method"]
    unordered = {"model_type": "llama", "architectures": ["A"]}
    text = _config_json.with_quantization(unordered, quantization)
    assert list(json.loads(text)) == ["model_type", "architectures", "quantization_config"]
    assert text.endswith("\n}\n")


def test_config_json_dtype_keys():
    quantized = {"dtype": "bfloat16", "quantization_config": {}, "text_config": {"dtype": "bfloat16"}, "x": None}
    assert json.loads(_config_json.without_quantization(quantized, "float16")) == {
        "dtype": "float16",
        "text_config": {"dtype": "float16"},
        "x": None,
    }
    assert quantized["text_config"] == {"dtype": "bfloat16"}, "the source's config is left alone"
    assert "dtype" not in json.loads(_config_json.without_quantization({"quantization_config": {}}, None))
    assert json.loads(_config_json.without_quantization({}, "float32")) == {"torch_dtype": "float32"}


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({}, None),
        ({"quantization_config": None}, None),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        ({"quantization_config": "strange"}, "unknown method"),
    ],
)
def test_config_json_with_existing_quantization(config, method):
    assert _config_json.existing_quantization(config) == method


def test_config_json_is_what_transformers_writes(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaConfig(hidden_size=64, num_hidden_layers=1)
    theirs.save_pretrained(tmp_path)
    config = _config_json.read_config(tmp_path)
    assert config is not None
    # What it asks of a plan: the types of the weights, and what neither the options nor the config say.
    plan: Any = SimpleNamespace(types=[{"type": "nf4"}], skip_modules=None, model_dtype=None)
    text = _config_json.with_quantization(config, quantization_config(QuantizeOptions(), plan, None))
    theirs.quantization_config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
    )
    assert text == theirs.to_json_string()
