"""The command at work: options reach the output, runs are stopped and resumed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command_line import environment, files, run, write_checkpoint
from halfbyte import _native
from halfbyte.cli import main as cli
from halfbyte.cli.exit_codes import EXIT_DIFFERENT, EXIT_INTERRUPTED
from halfbyte.offline.quantize import quantize_checkpoint
from halfbyte.offline.run import Interrupted
from safetensors import safe_open
from safetensors.numpy import save_file

# ---------------------------------------------------------------------------------------------------- work end to end


def test_verify_finds_one_changed_byte(source, tmp_path):
    out = tmp_path / "out"
    assert run("quantize", source, out, "-q").returncode == 0
    assert run("verify", source, out).returncode == 0
    with safe_open(out / "model.safetensors", "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["model.layers.1.mlp.up_proj.weight"][7, 0] ^= 0x10
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    done = run("verify", source, out)
    assert done.returncode == EXIT_DIFFERENT
    (line,) = [line for line in done.stdout.splitlines() if "differs" in line and "up_proj" in line]
    assert line.startswith("model.layers.1.mlp.up_proj.weight")
    report = json.loads(run("verify", source, out, "--json").stdout)
    assert report["ok"] is False
    assert report["counts"] == {"identical": 10, "differs": 1}
    assert run("verify", source, out, "-q").returncode == EXIT_DIFFERENT


def test_quantize_options_reach_the_output(source, tmp_path):
    out = tmp_path / "out"
    options = ["--type", "fp4", "--no-double-quant", "--blocksize", "128", "--storage", "bfloat16"]
    options += ["--compute-dtype", "float16", "--skip", "model.layers.0", "--rule", r"layers\.1\.mlp=nf4"]
    done = run("quantize", source, out, *options)
    assert done.returncode == 0, done.stderr
    report = json.loads(run("inspect", out, "--json").stdout)
    weights = {w["name"]: w for w in report["weights"]}
    assert sorted(weights) == [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.2.self_attn.q_proj.weight",
    ]
    assert weights["model.layers.1.mlp.up_proj.weight"]["quant_type"] == "nf4"
    for name, w in weights.items():
        assert w["quant_type"] == ("nf4" if name.endswith("layers.1.mlp.up_proj.weight") else "fp4")
        assert (w["blocksize"], w["nested"], w["storage"], w["dtype"]) == (128, False, "bfloat16", "float16")
    config = report["quantization_config"]
    assert config["bnb_4bit_quant_type"] == "fp4"
    assert config["bnb_4bit_quant_storage"] == "bfloat16"
    assert config["bnb_4bit_compute_dtype"] == "float16"
    assert config["bnb_4bit_use_double_quant"] is False
    assert {"lm_head", "model.layers.0"} <= set(config["llm_int8_skip_modules"])


def test_dequantize_writes_dtype_and_config(source, tmp_path):
    out, back = tmp_path / "out", tmp_path / "back"
    assert run("quantize", source, out, "-q").returncode == 0
    assert run("dequantize", out, back, "--dtype", "float32", "-q").returncode == 0
    with safe_open(back / "model.safetensors", "numpy") as file:
        assert file.get_tensor("model.layers.0.mlp.up_proj.weight").dtype == np.float32
    config = json.loads((back / "config.json").read_text())
    assert config == {**json.loads((source / "config.json").read_text()), "torch_dtype": "float32"}
    done = run("quantize", out, tmp_path / "again")
    assert done.returncode == 3
    assert "quantized already (bitsandbytes)" in done.stderr


# ------------------------------------------------------------------------------------------------------- interruption


class EndlessJob:
    """A job that ends only when it is cancelled."""

    def __init__(self) -> None:
        self.cancelled = False
        self.waits = 0

    def wait(self, seconds: float) -> bool:
        self.waits += 1
        if self.waits == 2:
            raise KeyboardInterrupt
        return self.cancelled

    def progress(self) -> tuple[int, int, str]:
        return 1, 4, "model.layers.0"

    def cancel(self) -> None:
        self.cancelled = True

    def result(self) -> str:
        raise KeyboardInterrupt("stopped")


def test_interrupt_by_ctrl_c_cancels_and_says_how_to_resume(source, tmp_path, monkeypatch, capsys):
    job = EndlessJob()
    out = tmp_path / "my out"

    def start(plan: object, destination: str, *_: object) -> EndlessJob:
        staged = Path(destination) / ".halfbyte-partial" / "files"
        staged.mkdir(parents=True)
        (staged / "model-00001-of-00008.safetensors").touch()
        (staged / "model-00002-of-00008.safetensors.partial").touch()
        return job

    monkeypatch.setattr(_native, "run_plan", start)
    arguments = ["quantize", str(source), str(out), "--overwrite", "--max-shard-size", "10KB"]
    code = cli.main(arguments)
    captured = capsys.readouterr()
    assert code == EXIT_INTERRUPTED
    assert job.cancelled
    assert captured.out == ""
    assert captured.err.splitlines()[-1] == (
        "halfbyte: interrupted: 1 of 8 shards are complete; continue with: "
        f"halfbyte quantize {source} '{out}' --max-shard-size 10KB --resume"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupt_by_signal_stops_the_command(number, source, tmp_path):
    code = (
        "import signal, sys, time\nfrom halfbyte import _native\nfrom halfbyte.cli import main as cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Job:\n"
        "    done = False\n"
        "    def wait(self, seconds):\n        time.sleep(0.01); return self.done\n"
        "    def progress(self):\n        return 0, 1, 'model'\n"
        "    def cancel(self):\n        self.done = True\n"
        "    def result(self):\n        raise KeyboardInterrupt\n"
        "_native.run_plan = lambda *a: Job()\n"
        f"sys.exit(cli.main(['quantize', {str(source)!r}, {str(tmp_path / 'out')!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment())
    assert process.stderr is not None
    assert process.stderr.readline().startswith("quantizing")
    process.send_signal(number)
    rest = process.stderr.read()
    assert process.wait(60) == EXIT_INTERRUPTED
    process.stderr.close()
    assert rest.startswith("halfbyte: interrupted: 0 of 1 shards are complete; continue with: halfbyte quantize ")
    assert rest.endswith("--resume\n")


def test_resume_gives_the_bytes_of_an_uninterrupted_run(source, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    quantize_checkpoint(source, whole, max_shard_size="10KB")
    stops = []

    def stop(done: int, total: int, label: str) -> None:
        raise KeyboardInterrupt

    # The job runs meanwhile, so a try may complete some files, or all; each next one goes on from there.
    for _ in range(5):
        try:
            quantize_checkpoint(source, parts, max_shard_size="10KB", resume=True, progress=stop)
        except Interrupted as error:
            stops.append(error)
    report = quantize_checkpoint(source, parts, max_shard_size="10KB", resume=True)
    assert stops
    assert all(error.total == 8 and 0 <= error.complete <= 8 for error in stops)
    assert files(parts) == files(whole)
    again = quantize_checkpoint(source, parts, max_shard_size="10KB", resume=True)
    assert again.already_complete
    assert report.files == again.files


def test_resume_after_kill(tmp_path):
    source = write_checkpoint(tmp_path / "source", layers=40)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["--max-shard-size", "5KB", "--threads", "1", "-q"]
    assert run("quantize", source, whole, *options).returncode == 0
    command = [sys.executable, "-m", "halfbyte", "quantize", str(source), str(parts), *options]
    process = subprocess.Popen(command, env=environment())
    staged = parts / ".halfbyte-partial" / "files"
    end = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < end:
        if staged.is_dir() and any(staged.glob("*.safetensors")):
            break
        time.sleep(0.001)
    process.kill()
    process.wait(60)
    done = run("quantize", source, parts, *options, "--resume")
    assert done.returncode == 0, done.stderr
    assert files(parts) == files(whole)
