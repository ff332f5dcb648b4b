"""What tests of the configuration share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import halfbyte
import transformers

Theirs = transformers.BitsAndBytesConfig
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}


def run_python(code: str, *arguments: str) -> str:
    """Run code in a fresh interpreter that finds halfbyte where this one does; return what it prints."""
    paths = [str(Path(halfbyte.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
