"""The kernels under compute-sanitizer, where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = shutil.which("compute-sanitizer")


def watched(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """tests/cuda/exercise.py under a tool; status 9 is that it found something."""
    assert TOOL is not None
    command = [TOOL, "--tool", tool, "--error-exitcode", "9"]
    if tool != "initcheck":
        # Only our kernels: those of torch are many, and not ours to judge. What they write, initcheck must know.
        kernels = "|".join(("quantize", "gemm_4bit", "embedding_4bit", "int8", "experts", "lora"))
        command += ["--kernel-name", f"regex={kernels}"]
    if tool in ("racecheck", "synccheck"):
        # Room for barriers in shared memory: what the tool guesses is too low for the 64 of a block of threads.
        command += ["--num-cuda-barriers", str(2**16)]
    command += [sys.executable, str(Path(__file__).with_name("exercise.py")), *arguments]
    # Freed memory is given back at once, so that what lies behind an end is nobody's.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)


@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_clean(tool: str) -> None:
    # Racecheck has an internal error with products by warpgroups, or reports what barriers in shared memory order:
    # these are left to the emulator's race detector.
    left_out = {"initcheck": ["written"], "racecheck": ["without-tiles"]}
    done = watched(tool, *left_out.get(tool, []))
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed")
def test_what_is_not_clean_is_found() -> None:
    done = watched("memcheck", "past-the-end")
    assert done.returncode == 9, (done.stdout + done.stderr)[-4000:]
    assert "Invalid __global__ read" in done.stdout
    assert "dequantize" in done.stdout
