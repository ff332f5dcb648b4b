"""The Python functions for checkpoints on disk."""

from __future__ import annotations

import json
import re

import halfbyte
import pytest
from halfbyte.offline.dequantize import plan_dequantize
from halfbyte.offline.quantize import plan_checkpoint, quantize_checkpoint
from halfbyte.offline.run import Interrupted


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"config": {"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}}, "bnb_4bit_quant_type"),
        ({"config": {"load_in_4bit": True, "typo": 1}}, "typo"),
        ({"skip": "lm_head"}, "skip must be a list of module names, got 'lm_head'"),
        ({"skip": [1]}, "skip must hold module names, got 1"),
        ({"rules": "x=keep"}, "rules must be a list of rules, got 'x=keep'"),
        ({"rules": ["x"]}, "rule must be REGEX=nf4"),
        ({"rules": ["(=nf4"]}, "rule must be a regular expression"),
        ({"rules": [("x", "nf4", "y")]}, "rules must hold 'REGEX=nf4"),
        ({"selection": "guess"}, "selection must be one of rules, transformers, got 'guess'"),
        ({"trust_remote_code": True}, "trust_remote_code must be False unless selection='transformers'"),
        ({"dtype": "int8"}, "dtype must be one of bfloat16, float16, float32, got 'int8'"),
        ({"max_shard_size": "5gb"}, "max_shard_size must be a size of at least one byte"),
        ({"max_shard_size": 0}, "'2GiB', got 0"),
        ({"blocksize": 48}, "blocksize must be one of 32, 64, 128, 256, 512, 1024, 2048, 4096, got 48"),
        ({"blocksize": True}, "blocksize must be an int, got True"),
        ({"threads": 0}, "threads must be an int of at least 1, or None for one per core, got 0"),
        ({"threads": True}, "got True"),
        ({"overwrite": True, "resume": True}, "overwrite and resume must not both be True"),
        ({"progress": 7}, "progress must be None, True, or a callable(done, total, label), got 7"),
        ({"revision": "main"}, "revision must be None for a file or folder on this disk"),
    ],
)
def test_wrong_arguments(arguments, words, tmp_path):
    from command_line import write_checkpoint

    source = write_checkpoint(tmp_path / "source", layers=1)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        quantize_checkpoint(source, tmp_path / "out", **arguments)
    assert not isinstance(caught.value, halfbyte.CheckpointError)
    assert not (tmp_path / "out").exists()


def test_api_end_to_end(tmp_path):
    from command_line import files, write_checkpoint

    source = write_checkpoint(tmp_path / "source")
    config = halfbyte.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", llm_int8_skip_modules=["model.layers.0"]
    )
    seen: list[tuple[int, int, str]] = []
    rules = [("layers.2.mlp", "keep")]
    plan = plan_checkpoint(source, config, rules=rules)
    report = halfbyte.quantize_checkpoint(
        source, tmp_path / "out", config, rules=rules, threads=1, progress=lambda *a: seen.append(a)
    )
    assert report.converted_tensors == plan.totals["quantized_tensors"] == 3
    assert report.quantization_config["bnb_4bit_compute_dtype"] == "float16"
    assert seen[-1][0] == seen[-1][1] == plan.totals["bytes_in"]
    assert json.loads(json.dumps(report.to_dict()))["files"][0]["file"] == "model.safetensors"
    assert "quantized 3 of 11 tensors" in str(report)
    # A dict and more threads: the same bytes.
    given = {key: value for key, value in config.to_dict().items() if key != "bnb_4bit_compute_dtype"}
    halfbyte.quantize_checkpoint(source, tmp_path / "more", given, rules=["layers.2.mlp=keep"], threads=4)
    assert files(tmp_path / "more") == files(tmp_path / "out")
    verified = halfbyte.verify_checkpoint(source, tmp_path / "out")
    assert verified.ok
    assert verified.counts == {"identical": 11}
    inspected = halfbyte.inspect_checkpoint(tmp_path / "out")
    assert {w["quant_type"] for w in inspected.data["weights"]} == {"fp4"}
    assert "fp4, blocks of 64, was float16" in str(inspected)
    back = halfbyte.dequantize_checkpoint(tmp_path / "out", tmp_path / "back")
    assert back.converted_tensors == 3
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("config", "dtype", "named", "written"),
    [
        (None, None, "float16", "float16"),
        (NF4, None, "float16", "float16"),
        (halfbyte.BitsAndBytesConfig(**NF4), None, "float16", "float16"),
        (None, None, "torch.bfloat16", "bfloat16"),
        (None, "bfloat16", "float16", "bfloat16"),
        (None, None, None, "float16"),
        (NF4 | {"bnb_4bit_compute_dtype": "float32"}, None, "float16", "float32"),
        (halfbyte.BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype="bfloat16"), "float32", "float16", "bfloat16"),
    ],
)
def test_compute_dtype_that_was_not_given_is_written_as_the_checkpoints(tmp_path, config, dtype, named, written):
    from command_line import write_checkpoint

    source = write_checkpoint(tmp_path / "source")
    file = source / "config.json"
    said = {key: value for key, value in json.loads(file.read_text()).items() if key not in ("dtype", "torch_dtype")}
    file.write_text(json.dumps(said | ({} if named is None else {"torch_dtype": named})))
    report = halfbyte.quantize_checkpoint(source, tmp_path / "out", config, dtype=dtype)
    assert report.quantization_config["bnb_4bit_compute_dtype"] == written
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored["bnb_4bit_compute_dtype"] == written
    # A dense copy again knows nothing of it.
    assert plan_dequantize(tmp_path / "out").model_dtype is None


def test_transformers_selection_agrees(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    pytest.importorskip("halfbyte.offline.transformers_selection")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    asked = plan_checkpoint(tmp_path / "source", selection="transformers")
    ruled = plan_checkpoint(tmp_path / "source")
    assert [(t.name, t.target) for t in asked.tensors] == [(t.name, t.target) for t in ruled.tensors]
    assert asked.totals["quantized_tensors"] == 14


def test_interrupted_is_a_keyboard_interrupt():
    error = Interrupted(2, 5)
    assert isinstance(error, KeyboardInterrupt)
    assert str(error) == "interrupted: 2 of 5 shards are complete"
