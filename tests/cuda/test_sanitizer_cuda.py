"""The kernels under compute-sanitizer, where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = shutil.which("compute-sanitizer")


@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_clean(tool: str) -> None:
    assert TOOL is not None
    script = Path(__file__).with_name("exercise.py")
    command = [TOOL, "--tool", tool, "--error-exitcode", "9"]
    if tool != "initcheck":
        # Only our kernels: those of torch are many, and not ours to judge. What they write, initcheck must know.
        kernels = "|".join(("quantize", "dequantize", "nested", "product", "decode", "embedding", "expand", "rows"))
        command += ["--kernel-name", f"regex={kernels}"]
    command += [sys.executable, str(script)]
    # Freed memory is given back at once, so that what lies behind an end is nobody's.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
