"""Completion in shells."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from command_line import COMMANDS, environment
from halfbyte.cli import main as cli


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_parse(shell, capsys, tmp_path):
    assert cli.main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert "halfbyte" in text
    if not any(os.access(os.path.join(p, shell), os.X_OK) for p in os.get_exec_path()):
        pytest.skip(f"{shell} is not installed")
    script = tmp_path / "script"
    script.write_text(text)
    done = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("halfbyte ver", {"verify"}),
        ("halfbyte ", {*COMMANDS, "run"}),
        ("halfbyte quantize --no-", {"--no-double-quant", "--no-fsync"}),
        ("halfbyte quantize --type ", {"nf4", "fp4", "int8"}),
        ("halfbyte quantize a --storage f", {"float16", "float32", "float64"}),
        ("halfbyte dequantize --dtype b", {"bfloat16"}),
        ("halfbyte completion ", {"bash", "zsh", "fish"}),
    ],
)
def test_completion_in_bash(line, expected, tmp_path):
    command = tmp_path / "halfbyte"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m halfbyte "$@"\n')
    command.chmod(0o755)
    code = (
        'eval "$(halfbyte completion bash)"\n'
        f"COMP_LINE='{line}' COMP_POINT={len(line)} COMP_TYPE=9\n"
        '_python_argcomplete halfbyte "" ""\nprintf "%s\\n" "${COMPREPLY[@]}"'
    )
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "--norc", "-c", code], capture_output=True, text=True, env=environment(PATH=path), timeout=600
    )
    assert done.stderr == ""
    assert expected <= {word.strip() for word in done.stdout.split("\n")}
    assert {w.strip() for w in done.stdout.split("\n") if w and not w.startswith("-")} <= expected | {""}
