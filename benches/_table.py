"""Helpers of the benches: the line that names the machine, best-of-many timing, whole processes, plain tables."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

MIB = 2**20


def machine_line() -> str:
    """One line that names the processor, the cores this process may use, memory, kernel, Python and the date."""
    processor, memory = platform.machine(), "unknown memory"
    cpuinfo, meminfo = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    if cpuinfo.is_file():
        facts = dict(
            (part.strip() for part in line.split(":", 1)) for line in cpuinfo.read_text().splitlines() if ":" in line
        )
        processor = facts.get("model name", processor)
        flags = set(facts.get("flags", "").split())
        widest = next((name for flag, name in (("avx512bw", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "no AVX2")
        processor = f"{processor} (family {facts.get('cpu family', '?')}, {widest})"
    if meminfo.is_file():
        memory = f"{int(meminfo.read_text().split()[1]) / 2**20:.0f} GiB"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    return f"{processor}, {cores} cores, {memory}; {system}; {date.today().isoformat()}"


def versions_line(*packages: str) -> str:
    """The installed versions of the named packages, without importing them."""
    from importlib import metadata

    def version(package: str) -> str:
        try:
            return f"{package} {metadata.version(package)}"
        except metadata.PackageNotFoundError:
            # halfbyte may be used from its source tree.
            return f"{package} {_source_tree_version()}" if package == "halfbyte" else f"{package} not installed"

    return ", ".join(version(package) for package in packages)


def _source_tree_version() -> str:
    """The version of a halfbyte that is not installed but importable."""
    import halfbyte

    return f"{halfbyte.__version__} (source tree)"


def best_seconds(work: Callable[[], object], *, at_least: int = 5, seconds: float = 1.0) -> float:
    """The fastest of many calls of `work`, after one unmeasured call.

    Calls go on until both `at_least` calls and `seconds` have passed. The minimum is the figure that a busy
    machine disturbs least.
    """
    work()
    best, calls, begin = float("inf"), 0, time.perf_counter()
    while calls < at_least or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
        calls += 1
    return best


@dataclass(frozen=True)
class Process:
    """What one process took: wall seconds from start to exit, CPU seconds, peak resident memory in bytes."""

    wall: float
    cpu: float
    peak: int


# Starts the command in argv[2:], writes its wall seconds, CPU seconds, ru_maxrss and exit code to the file argv[1].
_LAUNCHER = """
import os, sys, time
start = time.perf_counter()
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
wall = time.perf_counter() - start
with open(sys.argv[1], "w") as file:
    print(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss, os.waitstatus_to_exitcode(status), file=file)
"""


def run_process(command: Sequence[str], *, environment: dict[str, str] | None = None) -> Process:
    """Run a command to its end and measure it; its output is shown only when it fails.

    The kernel counts in a child's peak also the memory that its parent holds when it starts the child. So a bare
    interpreter starts it, which is smaller than any Python command that could be measured.
    """
    with tempfile.NamedTemporaryFile("r") as result:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, result.name, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            check=False,
        )
        fields = result.read().split()
    if done.returncode != 0 or len(fields) != 4 or fields[3] != "0":
        sys.stderr.write(done.stdout.decode(errors="replace"))
        raise SystemExit(f"error: exit code {fields[3:] or done.returncode} of: {' '.join(command)}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Process(float(fields[0]), float(fields[1]), int(fields[2]) * unit)


def best_process(runs: Sequence[Process]) -> Process:
    """The least wall and CPU time and the largest peak of several runs of the same command."""
    return Process(min(r.wall for r in runs), min(r.cpu for r in runs), max(r.peak for r in runs))


def median_wall(runs: Sequence[Process]) -> float:
    """The median wall time of several runs of the same command, in seconds."""
    return statistics.median(r.wall for r in runs)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table, the first column to the left and the others to the right, padded to be read as text."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    print(line(header))
    print("|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|")
    for row in rows:
        print(line(row))
    sys.stdout.flush()
