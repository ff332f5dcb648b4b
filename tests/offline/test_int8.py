"""8-bit checkpoints (LLM.int8()): the command writes what transformers and bitsandbytes write, and the reverse.

One difference is known and bounded: bitsandbytes multiplies with `127 / scale` where the format divides by the scale,
so that a value in the middle of two codes may get either.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import halfbyte
import numpy as np
import pytest
import torch
import transformers
from bitsandbytes.functional import int8_vectorwise_dequant
from bitsandbytes.nn import Linear8bitLt
from checkpoints import Case, load, load_tensors, outputs, raw, read_json
from halfbyte import arrays
from halfbyte.cli import main
from halfbyte.offline.options import QuantizeOptions
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parent.parent / "golden" / "int8.safetensors"
UP = "model.layers.0.mlp.up_proj"
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
CASES = [
    Case("llama", "bfloat16", "int8", False, "uint8", sharded=True),
    Case("llama-tied", "float16", "int8", False, "uint8"),
    Case("gpt2", "float32", "int8", False, "uint8"),
    Case("gpt2", "bfloat16", "int8", False, "uint8", sharded=True),
    Case("t5", "float16", "int8", False, "uint8"),
    Case("ragged", "float32", "int8", False, "uint8"),
]
by_case = pytest.mark.parametrize("case", CASES, ids=str)


def modules(tensors: dict[str, torch.Tensor]) -> list[str]:
    """The modules whose weight is in 8 bits."""
    found = [name.removesuffix("SCB") for name in tensors if name.endswith("SCB")]
    assert found
    return found


def save(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def command(*arguments: object) -> int:
    return main([*map(str, arguments), "-q"])


# ------------------------------------------------------------------------------------------------- the same checkpoint


@by_case
def test_tensors_are_those_of_transformers_and_bitsandbytes(workshop, case):
    theirs, ours = load_tensors(workshop.theirs(case)), load_tensors(workshop.ours(case))
    assert ours.keys() == theirs.keys()
    source = load_tensors(workshop.source(*case.source))
    made = modules(ours)
    moved = total = 0
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        module = name.removesuffix("weight")
        if module not in made or name == module:
            assert raw(ours[name]) == raw(tensor), name
            continue
        dense = source[name].T if case.model in ("gpt2", "ragged") else source[name]
        exact = dense.half().double() * 127 / theirs[module + "SCB"].double()[:, None]
        differ = ours[name] != tensor
        middle = (exact - exact.floor() - 0.5).abs() < 1e-4
        assert middle[differ].all(), name
        assert ((ours[name].double() - exact).abs() <= 0.5 + 1e-4).all(), name
        moved += int(differ.sum())
        total += tensor.numel()
    assert moved <= 1e-4 * total


@by_case
def test_config_json_is_that_of_transformers(workshop, case):
    ours, theirs = (read_json(folder / "config.json") for folder in (workshop.ours(case), workshop.theirs(case)))
    assert list(ours["quantization_config"].items()) == list(theirs["quantization_config"].items())
    assert ours == theirs
    assert theirs["quantization_config"]["llm_int8_threshold"] == 6.0


@by_case
def test_verify_of_ours_and_of_theirs(workshop, case):
    source = workshop.source(*case.source)
    report = halfbyte.verify_checkpoint(source, workshop.ours(case))
    assert set(report.counts) == {"identical"}
    assert sum(t.kind == "int8" for t in report.tensors) == len(modules(load_tensors(workshop.ours(case))))
    other = halfbyte.verify_checkpoint(source, workshop.theirs(case))
    assert other.ok
    assert set(other.counts) <= {"identical", "rounded"}
    assert "8-bit weights: rmse up to" in str(other)
    assert halfbyte.verify_checkpoint(workshop.ours(case), workshop.ours(case)).ok


@by_case
@pytest.mark.parametrize("origin", ["ours", "theirs"])
def test_values_are_those_of_bitsandbytes(workshop, tmp_path, case, origin):
    folder = getattr(workshop, origin)(case)
    halfbyte.dequantize_checkpoint(folder, tmp_path / "dense", fsync=False)
    tensors, found = load_tensors(folder), load_tensors(tmp_path / "dense")
    source = load_tensors(workshop.source(*case.source))
    assert found.keys() == source.keys()
    for module in modules(tensors):
        name = module + "weight"
        values = int8_vectorwise_dequant(tensors[name], tensors[module + "SCB"])
        expected = values.T if case.model in ("gpt2", "ragged") else values
        assert (found[name].dtype, found[name].shape) == (source[name].dtype, source[name].shape)
        assert torch.equal(found[name], expected.to(found[name].dtype)), name
        loaded = arrays.load_tensor(folder, name)
        assert loaded.dtype == np.float32
        assert np.array_equal(loaded, values.numpy()), name
    assert read_json(tmp_path / "dense" / "config.json") == read_json(workshop.source(*case.source) / "config.json")


@pytest.mark.parametrize("case", [case for case in CASES if case.model != "ragged"], ids=str)
def test_stock_loading_gives_the_same_outputs(workshop, case):
    """The 8-bit model of ours and that of theirs, loaded by transformers, and the dense one that ours stands for."""
    ours, theirs, dense = (
        load(folder, case.model) for folder in (workshop.ours(case), workshop.theirs(case), workshop.dequantized(case))
    )
    layers = [module for module in ours.modules() if isinstance(module, Linear8bitLt)]
    assert len(layers) == len(modules(load_tensors(workshop.ours(case))))
    assert {layer.state.threshold for layer in layers} == {6.0}
    found, expected, close = (outputs(model, training=False) for model in (ours, theirs, dense))
    assert found.isfinite().all()
    assert found.std() > 0
    spread = expected.std()
    # A few codes of their file are next to ours.
    assert (found - expected).abs().max() <= 0.02 * spread
    # Inputs are rounded to 8 bits as well.
    assert (found - close).square().mean().sqrt() <= 0.1 * spread


@pytest.mark.parametrize("key", ["r0", "r1", "r2", "l8"])
def test_golden_vectors_through_the_command(tmp_path, key):
    golden = load_file(GOLDEN)
    weight = golden["l8.weight" if key == "l8" else f"{key}.input"]
    codes, scales = (golden[f"l8.0.0.sd.{name}" if key == "l8" else f"{key}.{end}"] for name, end in
                     (("weight", "CB"), ("SCB", "SCB")))  # fmt: skip
    config = {**LLAMA, "torch_dtype": str(weight.dtype).removeprefix("torch.")}
    source = save(tmp_path / "source", {f"{UP}.weight": weight.contiguous()}, config)
    assert command("quantize", source, tmp_path / "out", "--type", "int8") == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == {f"{UP}.weight", f"{UP}.SCB", f"{UP}.weight_format"}
    assert torch.equal(found[f"{UP}.SCB"], scales)
    assert (found[f"{UP}.weight_format"].dtype, found[f"{UP}.weight_format"].shape) == (torch.uint8, ())
    differ = found[f"{UP}.weight"] != codes
    # Values in the middle of two codes, by the approximate reciprocal of CUDA.
    assert int(differ.sum()) == (2 if key == "l8" else 0)
    exact = weight.double() * 127 / scales.double()[:, None]
    assert ((exact - exact.floor() - 0.5).abs() < 1e-6)[differ].all()


# --------------------------------------------------------------------------------------------------- rules and options


def test_four_and_eight_bits_are_mixed_by_rules(workshop, tmp_path):
    source = workshop.source("llama", "bfloat16")
    rules = [r"layers\.0\..*mlp=int8", "o_proj=keep"]
    plan = halfbyte.plan_checkpoint(source, rules=rules)
    assert [note for note in plan.notes if "refuses the output" in note]
    assert {line["type"] for line in plan.types} == {"int8", "nf4", "keep"}
    report = halfbyte.quantize_checkpoint(source, tmp_path / "out", rules=rules, fsync=False)
    assert report.types == tuple(plan.types)
    assert "\nint8: 3 tensors" in str(report)
    config = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert config["load_in_4bit"] is config["load_in_8bit"] is config["_load_in_8bit"] is True
    assert (config["bnb_4bit_quant_type"], config["bnb_4bit_use_double_quant"]) == ("nf4", True)
    with pytest.raises(ValueError, match="both True"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert halfbyte.verify_checkpoint(source, tmp_path / "out").ok
    inspected = halfbyte.inspect_checkpoint(tmp_path / "out")
    assert "9 4-bit weights and 3 8-bit weights" in str(inspected)
    assert "int8, a scale per row" in str(inspected)
    kinds = {t.name: t.quant_type for t in arrays.iter_tensors(tmp_path / "out")}
    assert (kinds[f"{UP}.weight"], kinds["model.layers.1.mlp.up_proj.weight"]) == ("int8", "nf4")
    halfbyte.dequantize_checkpoint(tmp_path / "out", tmp_path / "dense", fsync=False)
    dense, before = load_tensors(tmp_path / "dense"), load_tensors(source)
    assert {name: (t.dtype, t.shape) for name, t in dense.items()} == {
        name: (t.dtype, t.shape) for name, t in before.items()
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rules": ["lm_head=int8"]}, {"lm_head", "q_proj", "up_proj"}),
        ({"rules": ["mlp=keep"]}, {"q_proj"}),
        ({"skip": ["q_proj"]}, {"up_proj"}),
    ],
)
def test_rules_and_skip_names_hold_when_transformers_loads(workshop, tmp_path, options, expected):
    config = halfbyte.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=3.5)
    source = workshop.source("llama", "bfloat16")
    halfbyte.quantize_checkpoint(source, tmp_path / "out", config, fsync=False, **options)
    model = load(tmp_path / "out", "llama")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear8bitLt)}
    assert {f"{name}." for name in layers} == set(modules(load_tensors(tmp_path / "out")))
    names = {name.rpartition(".")[2] for name in layers}
    assert {name for name in ("lm_head", "q_proj", "up_proj") if name in names} == expected
    assert {module.state.threshold for module in layers.values()} == {3.5}
    assert outputs(model, training=False).isfinite().all()


def test_a_rule_alone_makes_a_checkpoint_of_eight_bits(workshop, tmp_path):
    source = workshop.source("llama-tied", "bfloat16")
    assert command("quantize", source, tmp_path / "rule", "--rule", "_proj=int8", "--threshold", "0") == 0
    assert command("quantize", source, tmp_path / "type", "--type", "int8", "--threshold", "0.0") == 0
    names = ("config.json", "model.safetensors")
    assert all((tmp_path / "rule" / n).read_bytes() == (tmp_path / "type" / n).read_bytes() for n in names)
    config = read_json(tmp_path / "type" / "config.json")["quantization_config"]
    assert config == transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0).to_dict() | {
        "quant_method": "bitsandbytes"
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--threshold", "6"], "--threshold must only be given with the type int8"),
        (["--type", "int8", "--blocksize", "128"], "--blocksize must only be given with a type of 4 bits"),
        (["--type", "int8", "--no-double-quant"], "--double-quant must only"),
        (["--type", "int8", "--compute-dtype", "float16"], "--compute-dtype must only"),
        (["--rule", "a=int9"], "int9"),
    ],
)
def test_options_of_another_kind_of_weights_are_refused(workshop, tmp_path, capsys, options, words):
    source = workshop.source("llama-tied", "bfloat16")
    assert command("quantize", source, tmp_path / "out", *options) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    mixed = ["--type", "int8", "--rule", "mlp=nf4", "--blocksize", "128", "--threshold", "6"]
    assert command("quantize", source, tmp_path / "out", "--plan", *mixed) == 0


@pytest.mark.parametrize("threshold", ["-1", "nan", "inf", "six"])
def test_thresholds_are_checked(threshold, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["quantize", "x", "y", "--type", "int8", "--threshold", threshold])
    assert stop.value.code == 2
    assert "finite number of at least 0" in capsys.readouterr().err
    if threshold != "six":
        with pytest.raises(ValueError, match="threshold must be a finite number of at least 0, got"):
            QuantizeOptions(quant_type="int8", threshold=float(threshold))


def test_configs_that_no_checkpoint_can_have_are_refused(workshop, tmp_path):
    source = workshop.source("llama-tied", "bfloat16")
    for config, word in (
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight must be False"),
        ({}, "got neither"),
    ):
        with pytest.raises(ValueError, match=word):
            halfbyte.quantize_checkpoint(source, tmp_path / "out", config)


# ------------------------------------------------------------------------------------------------ bad and unlucky input


def broken(change: str) -> tuple[dict[str, torch.Tensor], str]:
    """Tensors of an 8-bit checkpoint with a fault, and the name that a message must have."""
    rows = torch.arange(24, dtype=torch.int8).reshape(4, 6)
    tensors = {f"{UP}.weight": rows, f"{UP}.SCB": torch.ones(4), f"{UP}.weight_format": torch.tensor(0).byte()}
    if change == "no scales":
        del tensors[f"{UP}.SCB"]
        return tensors, f"{UP}.SCB"
    changes = {
        "short": ("SCB", torch.ones(3)),
        "half": ("SCB", torch.ones(4).half()),
        "order": ("weight_format", torch.tensor(2).byte()),
        "float": ("weight", torch.ones(4, 6).bfloat16()),
    }
    leaf, tensor = changes[change]
    return {**tensors, f"{UP}.{leaf}": tensor}, f"{UP}.{leaf}"


@pytest.mark.parametrize("change", ["no scales", "short", "half", "order", "float"])
def test_parts_that_do_not_fit_are_named(tmp_path, capsys, change):
    tensors, name = broken(change)
    source = save(tmp_path / "source", tensors, LLAMA)
    for arguments in (["dequantize", source, tmp_path / "out"], ["verify", source, source]):
        assert command(*arguments) == 3
        said = capsys.readouterr().err
        assert name in said
        assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    if change != "float":
        with pytest.raises(halfbyte.CheckpointError, match=name.rpartition(".")[2]):
            arrays.load_tensor(source, f"{UP}.weight")


@pytest.mark.parametrize("value", [1e5, float("nan"), float("-inf")])
def test_weights_that_float16_cannot_hold_are_named(tmp_path, capsys, value):
    weight = torch.randn(192, 64).bfloat16()
    weight[5, 7] = value
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    # Stored [in, out]: named as it is stored, not as it becomes.
    name = "transformer.h.0.mlp.c_proj.weight"
    source = save(tmp_path / "source", {name: weight}, config)
    assert command("quantize", source, tmp_path / "out", "--type", "int8") == 3
    said = capsys.readouterr().err
    assert name in said
    assert f"element {5 * 64 + 7} " in said
    assert "float16" in said or "finite" in said
    assert not (tmp_path / "out").exists()
    assert command("quantize", source, tmp_path / "out", "--type", "int8", "--allow-nonfinite") == 0
    assert command("verify", source, tmp_path / "out") == 0


def test_killed_runs_resume_to_the_same_bytes(tmp_path):
    source = tmp_path / "source"
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(512, 1024).bfloat16() for i in range(24)}
    save(source, tensors, {**LLAMA, "torch_dtype": "bfloat16"})
    arguments = ["--type", "int8", "--rule", "5=nf4", "--threads", "1", "--max-shard-size", "600KB", "-q"]
    assert main(["quantize", str(source), str(tmp_path / "whole"), *arguments]) == 0
    whole = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    hit = 0
    for shards in (1, 9, 17):
        out = tmp_path / f"out-{shards}"
        run = [sys.executable, "-m", "halfbyte", "quantize", str(source), str(out), *arguments]
        process = subprocess.Popen(run)
        stage = out / ".halfbyte-partial" / "files"
        deadline = time.monotonic() + 60
        while process.poll() is None and len(list(stage.glob("*.safetensors"))) < shards:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
        hit += process.wait() == -signal.SIGKILL
        assert main(["quantize", str(source), str(out), *arguments, "--resume"]) == 0
        assert {p.name: p.read_bytes() for p in out.iterdir()} == whole
    assert hit
