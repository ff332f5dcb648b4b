"""What tests of the offline tool share."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from halfbyte.cli import main as cli
from offline_runs import SHARDS, contents, quantize, write_llama, write_single

Here = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str]) -> Here:
    """`run`, in this process: for the many cases that need no other."""

    def run_here(*arguments: object) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        code = cli.main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess([], code, out, err)

    return run_here


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama") / "source")


@pytest.fixture(scope="session")
def whole(llama: Path) -> dict[str, str]:
    """What an uninterrupted run makes of the Llama, and how long it takes."""
    out = llama.parent / "whole"
    done = quantize(llama, out)
    assert (done.returncode, done.stderr) == (0, "")
    found = contents(out)
    assert len([n for n in found if n.endswith(".safetensors")]) >= SHARDS
    return found


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_single(tmp_path / "source")


@pytest.fixture
def nothing_else_is_touched(tmp_path: Path) -> Iterator[None]:
    """Sources stay as they are and nothing appears beside destinations, in every test of a file."""
    yield
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith((".halfbyte", "lock", "journal"))]
