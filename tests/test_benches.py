"""Benches that need a GPU go through all their steps without one; nothing is timed here."""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import math
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.overrides import TorchFunctionMode  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def table(text: str, heading: str) -> list[dict[str, str]]:
    """The rows of the Markdown table below a line."""
    lines = text.split(heading, 1)[1].strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    end = next((i for i, row in enumerate(cells) if i > 1 and len(row) != len(cells[0])), len(cells))
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:end]]


# ---- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_models_are_measured_side_by_side(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    command = [sys.executable, str(ROOT / "benches" / "cuda_models.py"), "--device", "cpu", "--geometry", "small"]
    command += ["--layers", "1", "--prefill", "1x5,2x9", "--batches", "1,2", "--context", "6", "--tokens", "3"]
    command += ["--repeats", "1", "--product", "64", "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    prefill, decode = table(done.stdout, "prefill, milliseconds"), table(done.stdout, "decode, milliseconds a step")
    assert [row[""] for row in prefill] == ["prefill 1x5, eager", "prefill 2x9, eager"]
    assert [row[""] for row in decode] == ["decode 1, eager", "decode 2, eager"]
    for row in [*prefill, *decode]:
        for other in ("bf16", "bitsandbytes"):
            ratio = float(row[other]) / float(row["halfbyte"])
            assert float(row[f"{other} / halfbyte"]) == pytest.approx(ratio, rel=0.05, abs=0.02)
    found = json.loads((tmp_path / "figures.json").read_text())["contenders"]
    assert found.keys() == {"bf16", "bitsandbytes", "halfbyte"}
    # 4 bits and a float32 scale for each 64 of them in place of 16 bits; the embedding is the same in all.
    embedding = 8192 * 512 * 2
    norms = 3 * 512 * 2
    layers = found["bf16"]["bytes"] - embedding - norms
    assert found["halfbyte"]["bytes"] - embedding - norms == layers // 4 + layers // 2 // 64 * 4
    assert found["bitsandbytes"]["bytes"] == found["halfbyte"]["bytes"]
    assert float(done.stdout.split("bitsandbytes differ by ")[1].split()[0]) < 0.05


# ---- linear layers ---------------------------------------------------------------------------------------------------


class OnTheCPU(TorchFunctionMode):
    """What is asked for on a GPU is made on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


class Exact(torch.nn.Module):
    """A layer of humming that keeps its weight; `off` times too large."""

    off = 1.0

    def __init__(self, *, shape_n: int, shape_k: int, weight_config: dict[str, Any], torch_dtype: torch.dtype) -> None:
        super().__init__()
        assert weight_config == {"dtype": "int4", "group_size": 64}
        self.register_buffer("weight", torch.zeros(shape_n, shape_k, dtype=torch_dtype))
        self.ready = False

    def cuda(self) -> Exact:
        return self

    def load_from_unquantized(self, weight: torch.Tensor) -> None:
        self.weight.copy_(weight * self.off)

    def transform(self) -> None:
        self.ready = True

    def forward(self, x: torch.Tensor, outputs: torch.Tensor | None = None) -> torch.Tensor:
        assert self.ready
        y = torch.nn.functional.linear(x, self.weight)
        return y if outputs is None else outputs.copy_(y)


@pytest.fixture
def cuda_linear(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The bench, with clocks that call once, and a product that does nothing."""
    monkeypatch.syspath_prepend(str(ROOT / "benches"))
    bench = importlib.import_module("cuda_linear")

    def once(calls: Any, **_: Any) -> float:
        calls[-1]()
        return 1e-6 * len(calls)

    class NoFloor:
        def read(self, source: torch.Tensor) -> None:
            pass

    monkeypatch.setattr(bench, "graph_seconds", once)
    monkeypatch.setattr(bench, "host_seconds", once)
    monkeypatch.setattr(bench, "device_line", lambda: "no card, driver none")
    monkeypatch.setattr(bench, "rotation", lambda size: 2)
    monkeypatch.setattr(bench, "Floor", NoFloor)
    monkeypatch.setattr(bench.Weight, "product", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return bench


def run_linear(bench: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["cuda_linear.py", *arguments])
    with OnTheCPU():
        bench.main()


def with_humming(monkeypatch: pytest.MonkeyPatch, layer: type) -> None:
    package, module = types.ModuleType("humming"), types.ModuleType("humming.layer")
    package.__spec__ = importlib.machinery.ModuleSpec("humming", None)
    module.HummingLayer = layer
    monkeypatch.setitem(sys.modules, "humming", package)
    monkeypatch.setitem(sys.modules, "humming.layer", module)


ARGUMENTS = ("--m", "1,16", "--shapes", "64x128,128x64")


def test_linear_writes_its_rows_for_plots(
    cuda_linear: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_humming(monkeypatch, Exact)
    run_linear(cuda_linear, monkeypatch, *ARGUMENTS, "--json", str(tmp_path / "rows.json"))
    printed = capsys.readouterr().out
    data = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["n"], row["k"], row["m"]) for row in data["rows"]] == [
        (64, 128, 1), (64, 128, 16), (128, 64, 1), (128, 64, 16),
    ]  # fmt: skip
    assert {"floor", "halfbyte", "nested", "humming", "cublas", "host"} <= data["rows"][0].keys()
    assert data["device"] == "no card, driver none"
    assert "--shapes 64x128,128x64" in data["command"]
    rows = table(printed, "microseconds")
    assert [row[""] for row in rows] == ["64x128 M=1", "64x128 M=16", "128x64 M=1", "128x64 M=16"]
    assert float(rows[0]["humming / hb"]) == pytest.approx(1.0)


def test_linear_leaves_out_a_contender_that_fails(
    cuda_linear: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = type("Wrong", (Exact,), {"off": 2.0})
    with_humming(monkeypatch, wrong)
    run_linear(cuda_linear, monkeypatch, *ARGUMENTS, "--json", str(tmp_path / "rows.json"))
    printed = capsys.readouterr().out
    # Said once, not again at the next shape.
    assert printed.count("humming at ") == 1
    assert "RuntimeError" in printed
    assert "off by 1.0" in printed
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert len(rows) == 4
    assert not any("humming" in row for row in rows)


def test_linear_prints_rows_with_gaps(cuda_linear: Any, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"n": 64, "k": 32, "m": 1, "floor": 1.0, "halfbyte": 2.0, "nested": 2.5, "host": 3.0}
    cuda_linear.print_rows([{**row, "cublas": 5.0}, {**row, "m": 2}])
    rows = table("x" + capsys.readouterr().out, "x")
    assert [row["cuBLAS / hb"] for row in rows] == ["2.50", "nan"]
    assert [row["of floor"] for row in rows] == ["2.00", "2.00"]
    assert math.isnan(float(rows[1]["cuBLAS"]))
