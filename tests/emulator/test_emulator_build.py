"""The cache of compiled kernels: any number of processes use it at the same time, and some of them are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import build_emulator
import pytest

SOURCE = build_emulator.HERE / "tests" / "collectives.cu"
OTHER = build_emulator.HERE / "tests" / "planted.cu"
ENGINE = {path.stem for path in build_emulator.HERE.glob("*.cpp")}

# Writes its output in two steps, as compilers do, and notes what it was asked for. With a file "stall" beside it, it
# stays in the middle until that is gone.
COMPILER = """#!/bin/sh
here=$(dirname "$0")
case " $* " in
*" --version "*) echo a compiler; exit;;
*" -E "*) exit;;
esac
while [ $# -gt 1 ]; do shift; done
echo "$1" >>"$here/calls"
printf 'first half, ' >"$1"
sleep 0.05
while [ -e "$here/stall" ]; do sleep 0.05; done
printf 'second half' >>"$1"
"""
WHOLE = "first half, second half"

# One of several processes that build the sources of argv[4:] in the cache argv[1] with the compiler argv[2], once the
# file argv[3] is there.
BUILD = """
import sys, time
from pathlib import Path
sys.path.append(sys.argv[0])
import build_emulator
build_emulator.CACHE = Path(sys.argv[1])
while not Path(sys.argv[3]).exists():
    time.sleep(0.005)
for source in sys.argv[4:]:
    print(build_emulator.build(Path(source), "library", [sys.argv[2]]))
"""


class Machine:
    """A cache of its own, and a compiler that needs no time and notes its calls."""

    def __init__(self, folder: Path) -> None:
        self.cache, self.go, self.stall = folder / "cache", folder / "go", folder / "stall"
        self.calls, self.compiler = folder / "calls", folder / "c++"
        self.compiler.write_text(COMPILER)
        self.compiler.chmod(0o755)

    def start(self, *sources: Path) -> subprocess.Popen[str]:
        """A process that builds."""
        program = BUILD.replace("sys.argv[0]", repr(str(build_emulator.HERE)))
        command = [sys.executable, "-c", program, self.cache, self.compiler, self.go, *sources]
        return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def made(self) -> list[str]:
        """The names of what the compiler was asked for, in order."""
        return sorted(Path(line).name for line in self.calls.read_text().splitlines())

    def check_nothing_is_left(self) -> None:
        """What is in the cache is whole, and nothing else is there but locks."""
        for path in self.cache.iterdir():
            assert path.suffix == ".lock" or path.read_text() == WHOLE, path


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.005)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_build_by_several_processes_at_once(machine: Machine) -> None:
    processes = [machine.start(*sources) for sources in [(SOURCE, OTHER), (SOURCE, OTHER), (OTHER, SOURCE)]]
    machine.go.touch()
    found = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        found.append(set(out.split()))
    # Each was given the same files, and none was compiled twice.
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 2
    made = machine.made()
    assert made.count("kernels.o") == 2
    assert {name.partition("-")[0] for name in made} == {*ENGINE, "collectives", "planted", "kernels.o"}
    assert len(made) == len(ENGINE) + 4
    machine.check_nothing_is_left()


def test_build_after_a_process_that_was_killed(machine: Machine) -> None:
    machine.stall.touch()
    killed = machine.start(SOURCE)
    machine.go.touch()
    wait_for(machine.calls)
    waiting = machine.start(SOURCE)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    half = Path(machine.calls.read_text().splitlines()[0])
    assert half.read_text() != WHOLE
    # The compiler of the killed process lives on, and ends while the next one builds.
    machine.stall.unlink()
    out, err = waiting.communicate(timeout=120)
    assert waiting.returncode == 0, err
    assert Path(out.strip()).read_text() == WHOLE
    made = machine.made()
    assert made.count(half.name) == 2
    assert len(made) == len(ENGINE) + 3
    assert not half.exists()
    for stream in (killed.stdout, killed.stderr):
        assert stream is not None
        stream.close()
    machine.check_nothing_is_left()


def test_build_that_fails_leaves_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_emulator, "CACHE", machine.cache)
    machine.compiler.write_text(COMPILER + "echo not C++ >&2\nexit 1\n")
    for _ in range(2):
        with pytest.raises(build_emulator.BuildError, match=r"not C\+\+"):
            build_emulator.build(SOURCE, "library", [str(machine.compiler)])
    assert machine.made() == ["kernels.o", "kernels.o"]
    assert {path.suffix for path in machine.cache.iterdir()} == {".lock"}
