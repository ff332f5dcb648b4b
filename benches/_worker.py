"""A measured process: it reports phase by phase, and its memory is watched from outside (Linux).

Anonymous memory is what a process has allocated. Pages of a mapped file do not count: the system can drop them, and
other processes share them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _table import MIB, versions_line

_MARK = "phase: "


def report(phase: str, **measured: Any) -> None:
    """In the measured process: end a phase, and wait until the other side has taken its peak."""
    print(_MARK + json.dumps({"phase": phase, "anonymous": anonymous(os.getpid()), **measured}), flush=True)
    sys.stdin.readline()


def anonymous(pid: int) -> int:
    """Bytes of anonymous memory that a process holds now; 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = [line.split()[1] for line in text.splitlines() if line.startswith("RssAnon:")]
    return int(found[0]) * 1024 if found else 0


def run_worker(command: Sequence[str], path: str | None = None) -> dict[str, dict[str, Any]]:
    """Run a command that calls `report`; returns what it reported by phase, with `peak`, the phase's anonymous peak.

    Args:
        command: The command.
        path: A folder that the process finds packages in before all others.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if path:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (path, environment.get("PYTHONPATH"))))
    phases: dict[str, dict[str, Any]] = {}
    done = threading.Event()
    peak = 0
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        assert process.stdin is not None
        assert process.stdout is not None

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.002):
                peak = max(peak, anonymous(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            for line in process.stdout:
                if not line.startswith(_MARK):
                    print(line, end="")
                    continue
                fields = json.loads(line.removeprefix(_MARK))
                fields["peak"] = max(peak, fields["anonymous"])
                phases[fields.pop("phase")] = fields
                peak = 0
                process.stdin.write("\n")
                process.stdin.flush()
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            done.set()
            watcher.join()
        if code != 0:
            errors.seek(0)
            sys.stderr.write(errors.read())
            raise SystemExit(f"error: exit code {code} of: {' '.join(command)}")
    return phases


def peer_versions(path: str | None) -> str:
    """The versions of what is compared; bitsandbytes may be in a folder of its own."""
    line = versions_line("halfbyte", "torch", "transformers", "peft", "accelerate", "bitsandbytes")
    return f"{line} (bitsandbytes from {path})" if path else line


def mib(size: float) -> str:
    """Bytes as MiB."""
    return f"{size / MIB:.0f}"
