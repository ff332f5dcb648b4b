"""transformers, PEFT, Trainer and TRL on 4-bit models, in processes that know bitsandbytes in different ways.

Which libraries were found is decided once in a process, so each kind has one of its own (`scenarios.py`), which runs
all scenarios and says what came of them.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from compilers import needs_compiler

SCRIPT = Path(__file__).with_name("scenarios.py")
KINDS = ("absent", "late", "present")


def names(kind: str) -> list[str]:
    """The scenarios of a kind of process, without importing what they import."""
    return [
        node.name
        for path in sorted(SCRIPT.parent.glob("scenarios_*.py"))
        if kind != "late" or path.stem in ("scenarios_loading", "scenarios_qlora")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(mark, ast.Name) and mark.id == "scenario" for mark in node.decorator_list)
    ]


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Runs one kind of process when a test first asks for it."""

    @cache
    def run(kind: str) -> dict[str, str | None]:
        folder = tmp_path_factory.mktemp(kind)
        done = subprocess.run(
            [sys.executable, str(SCRIPT), kind, str(folder)], capture_output=True, text=True, timeout=1800
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
        return found

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=needs_compiler if "compiled" in name else ())
        for kind in KINDS
        for name in names(kind)
    ],
)
def test_scenario(outcomes, kind: str, name: str) -> None:  # type: ignore[no-untyped-def]
    problem = outcomes(kind)[name]
    assert problem is None, problem
