"""Scales that no finite weight has are told by `inspect`, `verify` and `dequantize`, and are no error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from offline_runs import bfloat16, write_single, write_tensors
from safetensors import safe_open

UP = "model.layers.0.mlp.up_proj"
STATE = f"{UP}.weight.quant_state.bitsandbytes__nf4"
NOTE = "1 of 1 quantized weights have scales that no finite weight has (NaN, infinite or negative): "
DTYPES = {"float32": "F32", "uint8": "U8", "int8": "I8"}


def changed(folder: Path, name: str, change: Any) -> None:
    """Let a function change a tensor of a checkpoint, an array or the JSON of a state."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    if "quant_state" in name:
        text = json.dumps(change(json.loads(bytes(tensors[name].tolist())))).encode()
        found = {name: np.frombuffer(text, np.uint8)}
    else:
        array = tensors[name].numpy().copy()
        change(array.reshape(-1))
        found = {name: array}
    written = {}
    for key, tensor in tensors.items():
        array = found.get(key)
        if array is None and str(tensor.dtype) == "torch.bfloat16":
            import torch

            written[key] = ("BF16", list(tensor.shape), tensor.view(torch.uint8).numpy().tobytes())
            continue
        array = tensor.numpy() if array is None else array
        written[key] = (DTYPES[str(array.dtype)], list(array.shape), array.tobytes())
    write_tensors(path, written)


def put(index: int, value: float) -> Any:
    def change(values: np.ndarray[Any, Any]) -> None:
        values[index] = value

    return change


def offset(value: float) -> Any:
    return lambda state: {**state, "nested_offset": value}


NAN, INF = float("nan"), float("inf")
NESTED, SINGLE, INT8 = (), ("--no-double-quant",), ("--type", "int8")
# How it is quantized, what is changed, and what is said of it; whether that is among what `inspect` reads.
CASES = [
    (NESTED, STATE, offset(NAN), "(nested_offset is NaN)", True),
    (NESTED, STATE, offset(-INF), "(nested_offset is -inf)", True),
    (NESTED, STATE, offset(-0.5), "(nested_offset is -0.5)", True),
    (NESTED, f"{UP}.weight.nested_absmax", put(0, NAN), "(1 of 1)", True),
    (NESTED, f"{UP}.weight.nested_absmax", put(0, -1), "(1 of 1)", True),
    (SINGLE, f"{UP}.weight.absmax", put(63, INF), "(1 of 64)", False),
    (SINGLE, f"{UP}.weight.absmax", put(0, -1), "(1 of 64)", False),
    (INT8, f"{UP}.SCB", put(5, NAN), "(1 of 64)", True),
    (INT8, f"{UP}.SCB", put(5, -1), "(1 of 64)", True),
]


@pytest.mark.parametrize(("options", "name", "change", "what", "inspected"), CASES)
def test_odd_scales_are_told(tmp_path, here, options, name, change, what, inspected):
    pytest.importorskip("torch")
    source, out = write_single(tmp_path / "source"), tmp_path / "out"
    assert here("quantize", source, out, "-q", *options).returncode == 0
    commands = (("inspect", out), ("verify", out, out), ("dequantize", out, "--plan"))
    for command in commands:
        assert "no finite weight" not in here(*command).stdout
    changed(out, name, change)
    told = f'{NOTE}"{name}" {what}'
    for command in commands:
        done = here(*command)
        assert done.returncode == 0
        assert (told in done.stdout) == (inspected or command[0] != "inspect"), command
    # Both sides are named; JSON has the same.
    assert here("verify", out, out).stdout.count(f"note: {out}: {told}") == 2
    assert json.loads(here("verify", out, out, "--json").stdout)["notes"] == [f"{out}: {told}"] * 2
    done = here("dequantize", out, tmp_path / "back", "--dtype", "float32")
    assert done.returncode == 0
    assert f"note: {told}" in done.stderr
    # Beside what it was made from, it differs as before.
    assert here("verify", source, out).returncode == 1


@pytest.mark.parametrize("options", [NESTED, SINGLE])
def test_odd_scales_of_a_weight_that_is_not_finite_are_no_difference(tmp_path, here, options):
    weights = np.frombuffer(bfloat16(np.random.default_rng(0), 64, 64), np.uint16).copy()
    weights[7] = 0x7F80
    source, out = write_single(tmp_path / "source", weights.tobytes()), tmp_path / "out"
    assert here("quantize", source, out, "-q", "--allow-nonfinite", *options).returncode == 0
    done = here("verify", source, out)
    assert done.returncode == 0
    assert f"note: {out}: {NOTE}" in done.stdout
    assert f"note: {source}" not in done.stdout


def test_odd_scales_of_many_weights_are_counted(tmp_path, here):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    weights = np.frombuffer(bfloat16(np.random.default_rng(0), 64, 64), np.uint16).copy()
    tensors = {}
    for layer in range(6):
        weights[3] = 0x7F80 if layer else 0
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        tensors[name] = ("BF16", [64, 64], weights.tobytes())
    write_tensors(source / "model.safetensors", tensors)
    assert here("quantize", source, out, "-q", "--allow-nonfinite").returncode == 0
    (note,) = json.loads(here("inspect", out, "--json").stdout)["notes"]
    assert note.startswith("5 of 6 quantized weights have scales that no finite weight has")
    assert note.count("nested_offset") == 3
    assert note.endswith(" and 2 more")
