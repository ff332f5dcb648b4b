"""`halfbyte run`: a Python program whose `import bitsandbytes` is halfbyte."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

from halfbyte.compat import install


def run(program: Sequence[str]) -> None:
    """Run `script.py args…` or `-m module args…` as `python` would, with halfbyte in place of bitsandbytes.

    Exceptions, SystemExit among them, are left to the interpreter.
    """
    install()
    if program[0] == "-m":
        sys.argv = list(program[1:])
        sys.path.insert(0, os.getcwd())
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(program)
        # A console script's own folder comes first; a program expects its own there.
        sys.path[0] = os.path.dirname(os.path.realpath(program[0]))
        runpy.run_path(program[0], run_name="__main__")
