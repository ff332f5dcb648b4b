"""Sources that are no checkpoints, or broken ones; tensors of all kinds."""

from __future__ import annotations

import json
import os
import socket
import struct
from typing import Any

import numpy as np
import pytest
from offline_runs import CONFIG, bfloat16, refused, write_single, write_tensors
from safetensors import safe_open

pytestmark = pytest.mark.usefixtures("nothing_else_is_touched")


def damaged(header: dict[str, Any] | bytes, data: int = 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def entry(dtype: str = "U8", shape: object = (8,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


FILES = {
    "empty": (b"", "0 bytes"),
    "short": (b"\x01", "1 bytes"),
    "long header": (b"\xff" * 40, "18446744073709551615"),
    "cut header": (damaged({"a": entry()})[:30], "cut short"),
    "cut data": (damaged({"a": entry()}, 7), "cut short"),
    "more data": (damaged({"a": entry()}, 9), "no tensor owns"),
    "zip": (b"PK\x03\x04" + bytes(60), "safetensors"),
    "bad JSON": (damaged(b'{"a":'), "EOF"),
    "bad text": (damaged(b'{"\xff":1}'), "UTF-8"),
    "deep": (damaged(b'{"a":' + b"[" * 100_000), "valid"),
    "overlap": (damaged({"a": entry(), "b": entry(offsets=(4, 12))}, 12), '"b"'),
    "reversed": (damaged({"a": entry(offsets=(8, 0))}), "reversed"),
    "overflow": (damaged({"a": entry(shape=(2**40, 2**40))}), "overflows"),
    "huge": (damaged({"a": entry(shape=(2**70,))}), '"a"'),
    "negative": (damaged({"a": entry(shape=(-8,))}), "-8"),
    "unknown dtype": (damaged({"a": entry("INT4")}), "INT4"),
    "duplicate": (damaged(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)), "two tensors"),
    "control characters": (damaged({"\n\x1b[2J": entry("\n\x1b[2J", (8,), (1, 9))}, 9), "\\n"),
    "unknown key": (damaged({"a": {**entry(), "\n\x1b[31m": 1}}), "unknown field"),
    "no tensors": (damaged({}, 0), "no tensor"),
    "long name": (damaged({"x" * 1_000_000: entry("?")}), "xxx"),
}


@pytest.mark.parametrize("case", FILES)
def test_broken_files_are_refused(tmp_path, case, here):
    data, word = FILES[case]
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.safetensors").write_bytes(data)
    (source / "config.json").write_text(json.dumps(CONFIG))
    text = refused(here("quantize", source, tmp_path / "out", "-q"), 3, "model.safetensors", word)
    assert len(text) < 3000
    refused(here("inspect", source / "model.safetensors"), 3, "model.safetensors")
    assert not (tmp_path / "out").exists()


INDICES = {
    "missing shard": ({"a": "no.safetensors"}, "no.safetensors"),
    "absent tensor": ({"a": "x.safetensors", "b\n": "x.safetensors"}, "b\\n"),
    "above": ({"a": "../x.safetensors"}, "../x.safetensors"),
    "absolute": ({"a": "/x.safetensors"}, "/x.safetensors"),
    "pickle": ({"a": "x.bin"}, "x.bin"),
    "empty": ({}, "empty"),
    "no names": ([], "weight_map"),
    "number": ({"a": 1}, "weight_map"),
}


@pytest.mark.parametrize("case", INDICES)
def test_broken_indices_are_refused(tmp_path, case, here):
    weight_map, word = INDICES[case]
    source = tmp_path / "source"
    source.mkdir()
    for folder in (source, tmp_path):
        write_tensors(folder / "x.safetensors", {"a": ("BF16", [64, 64], bytes(8192))})
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(here("quantize", source, tmp_path / "out", "-q"), 3, "model.safetensors.index.json", word)
    assert not (tmp_path / "out").exists()


def test_what_is_no_checkpoint(tmp_path, here):
    source, out = tmp_path / "source", tmp_path / "out"
    refused(here("quantize", source, out, "-q"), 3, source)
    source.mkdir()
    refused(here("quantize", source, out, "-q"), 3, source, "model.safetensors")
    (source / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    refused(here("quantize", source, out, "-q"), 3, source, "pickled", "save_pretrained")
    os.mkfifo(source / "model.safetensors")
    refused(here("quantize", source, out, "-q"), 3, "model.safetensors", "regular file")
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").mkdir()
    refused(here("quantize", source, out, "-q"), 3, "model.safetensors", "regular file")
    (source / "model.safetensors").rmdir()
    with socket.socket(socket.AF_UNIX) as listener:
        before = os.getcwd()
        os.chdir(source)  # the path of a socket is at most 108 bytes long
        listener.bind("model.safetensors")
        os.chdir(before)
        refused(here("quantize", source, out, "-q"), 3, "model.safetensors", "regular file")
    (source / "model.safetensors").unlink()
    for target in ("/dev/zero", "model.safetensors", "nowhere"):
        (source / "model.safetensors").symlink_to(target)
        done = here("quantize", source, out, "-q")
        refused(done, 3 if target == "/dev/zero" else 4, "model.safetensors")
        (source / "model.safetensors").unlink()
    assert not out.exists()


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (b"", "JSON"),
        (b"[]", "object"),
        (b"{" * 200_000, "config.json"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, "config.json"),
        (b'{"\xff": 1}', "config.json"),
        (
            json.dumps({**CONFIG, "quantization_config": {"quant_method": "gptq\n\x1b[2J"}}).encode(),
            "quantized already",
        ),
        (json.dumps({**CONFIG, "quantization_config": {"load_in_4bit": True}}).encode(), "dequantize"),
    ],
)
def test_broken_configs_are_refused(single, tmp_path, config, word, here):
    (single / "config.json").write_bytes(config)
    refused(here("quantize", single, tmp_path / "out", "-q"), 3, "config.json", word)
    assert not (tmp_path / "out").exists()


def test_a_config_that_is_no_file(single, tmp_path, here):
    (single / "config.json").unlink()
    (single / "config.json").mkdir()
    refused(here("quantize", single, tmp_path / "out", "-q"), 3, "config.json", "file")
    (single / "config.json").rmdir()
    with open(single / "config.json", "wb") as file:
        file.truncate(2**30)
    refused(here("quantize", single, tmp_path / "out", "-q"), 3, "config.json", 2**30)
    assert not (tmp_path / "out").exists()


def test_an_output_is_no_source(single, tmp_path, here):
    out = tmp_path / "out"
    assert here("quantize", single, out, "-q").returncode == 0
    refused(here("quantize", out, tmp_path / "again", "-q"), 3, "quantized already", "dequantize")
    (out / "config.json").unlink()
    refused(here("quantize", out, tmp_path / "again", "-q"), 3, "4-bit already", "dequantize")
    refused(here("dequantize", single, tmp_path / "again", "-q"), 3, single, "no 4-bit weight")
    assert not (tmp_path / "again").exists()


NONFINITE = {"NaN": 0x7FC0, "inf": 0x7F80, "-inf": 0xFF80}


@pytest.mark.parametrize("value", NONFINITE)
@pytest.mark.parametrize("at", [0, 1234, 4095])
def test_nonfinite_weights_are_named(tmp_path, value, at, here):
    weights = np.frombuffer(bfloat16(np.random.default_rng(0), 64, 64), np.uint16).copy()
    weights[at] = NONFINITE[value]
    source, out = write_single(tmp_path / "source", weights.tobytes()), tmp_path / "out"
    name = '"model.layers.0.mlp.up_proj.weight"'
    done = here("quantize", source, out, "-q")
    refused(
        done,
        3,
        "model.safetensors",
        name,
        f"element {at} ",
        f"must be finite, got {value};",
        "[64, 64]",
        "--allow-nonfinite",
    )
    assert not out.exists()
    assert here("quantize", source, out, "-q", "--rule", "up_proj=keep", "--rule", "norm=keep").returncode == 3
    for _ in range(2):
        assert here("quantize", source, out, "-q", "--allow-nonfinite", "--overwrite").returncode == 0
    assert here("verify", source, out).returncode == 0


def test_nonfinite_weights_of_a_transposed_layer_are_named_as_stored(tmp_path, here):
    # GPT-2 stores [in, out]: row 5, column 7 of 64 x 192 is element 5 * 192 + 7, whatever it becomes.
    weights = np.frombuffer(bfloat16(np.random.default_rng(0), 64, 192), np.uint16).copy().reshape(64, 192)
    weights[5, 7] = NONFINITE["NaN"]
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    name = "transformer.h.0.attn.c_attn.weight"
    write_tensors(source / "model.safetensors", {name: ("BF16", [64, 192], weights.tobytes())})
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    (source / "config.json").write_text(json.dumps(config))
    refused(here("quantize", source, out, "-q"), 3, name, f"element {5 * 192 + 7} ", "[64, 192]", "NaN")
    assert not out.exists()
    assert here("quantize", source, out, "-q", "--allow-nonfinite").returncode == 0


def test_names_and_tensors_of_all_kinds_survive(tmp_path, here):
    source, out, back = (tmp_path / name for name in ("source", "out", "back"))
    source.mkdir()
    rng = np.random.default_rng(0)
    odd = "model.layers.1.mlp.ev\x1b[2Jil\n\u202e.weight"
    tensors = {
        "model.layers.0.mlp.up_proj.weight": ("BF16", [64, 64], bfloat16(rng, 64, 64)),
        odd: ("F32", [3, 5], rng.standard_normal((3, 5), np.float32).tobytes()),
        "scalar": ("F32", [], bytes(4)),
        "empty.weight": ("F32", [0, 64], b""),
        "eight": ("F8_E4M3", [2, 2], b"abcd"),
        "four": ("F4", [2, 2], b"ab"),
        "flags": ("BOOL", [3], b"\0\1\0"),
        "": ("I64", [1], bytes(8)),
    }
    write_tensors(source / "model.safetensors", tensors)
    (source / "config.json").write_text(json.dumps(CONFIG))
    plan = here("quantize", source, "--plan")
    assert plan.returncode == 0
    assert "\x1b" not in plan.stdout
    assert "ev\\x1b[2Jil\\n\\u202e" in plan.stdout
    done = here("quantize", source, out)
    assert done.returncode == 0
    assert "\x1b" not in done.stderr + done.stdout
    with safe_open(out / "model.safetensors", "np") as file:
        assert set(file.keys()) >= set(tensors)
        assert f"{odd}.quant_state.bitsandbytes__nf4" in file.keys()  # noqa: SIM118
    for path in (out, out / "model.safetensors"):
        done = here("inspect", path)
        assert done.returncode == 0
        assert "\x1b" not in done.stdout
    assert here("verify", source, out, "-q").returncode == 0
    assert here("dequantize", out, back, "-q").returncode == 0
    raw = (back / "model.safetensors").read_bytes()
    for name in ("eight", "four", "flags"):
        assert tensors[name][2] in raw
    with safe_open(back / "model.safetensors", "np") as file:
        assert set(file.keys()) == set(tensors)
