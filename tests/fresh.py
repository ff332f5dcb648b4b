"""Code in a process of its own that has imported torch and nothing more: a new interpreter without the wait for it.

One process imports torch, and forks for each piece of code. Tests that ask what is imported, or how an interpreter
starts, start one.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from functools import cache
from typing import IO

_SERVER = """
import json, os, sys, tempfile, traceback
import torch, torch._dynamo  # the second is imported by the first step of any optimizer, for seconds
for line in sys.stdin:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                module = type(sys)("__main__")
                sys.modules["__main__"] = module
                exec(compile(json.loads(line), "<test>", "exec"), module.__dict__)
                code = 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else int(error.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        found = [os.waitstatus_to_exitcode(status)]
        for file in (out, err):
            file.seek(0)
            found.append(file.read().decode(errors="replace"))
    print(json.dumps(found), flush=True)
"""


@cache
def _server() -> tuple[IO[str], IO[str]]:
    kept = {name: value for name, value in os.environ.items() if name != "HALFBYTE_BITSANDBYTES"}
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=kept
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def end() -> None:
        process.stdin.close()  # type: ignore[union-attr]
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]

    atexit.register(end)
    return process.stdin, process.stdout


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run this code, and return what came of it."""
    if not hasattr(os, "fork"):
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    question, answer = _server()
    question.write(json.dumps(code) + "\n")
    question.flush()
    returncode, out, err = json.loads(answer.readline())
    return subprocess.CompletedProcess(["python", "-c", code], returncode, out, err)


def passes(code: str) -> None:
    """Run this code, which must not fail."""
    done = run(code)
    assert done.returncode == 0, done.stderr
