"""What the benches share: the line that names the machine, best-of-many timing, whole processes, plain tables."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
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
            return f"{package} not installed"

    return ", ".join(version(package) for package in packages)


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


def run_process(command: Sequence[str], *, environment: dict[str, str] | None = None) -> Process:
    """Run a command to its end and measure it; its output is shown only when it fails.

    The kernel counts in a child's peak also the memory that its parent held when it started the child, so call this
    from a process that has not grown: the benches make their data in a child of its own.
    """
    start = time.perf_counter()
    with subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **(environment or {})},
    ) as child:
        assert child.stdout is not None
        output = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        sys.stderr.write(output.decode(errors="replace"))
        raise SystemExit(f"error: exit code {child.returncode} of: {' '.join(command)}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Process(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


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
