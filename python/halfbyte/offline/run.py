"""Carrying out a plan: followed, shown, interrupted."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from halfbyte import _native
from halfbyte._terminal import format_bytes, progress_display
from halfbyte.offline import config_json
from halfbyte.offline.options import Progress, RunOptions, StrPath, thread_count
from halfbyte.offline.plan import CheckpointPlan

_Report = TypeVar("_Report")

# Python looks at signals between two waits.
_POLL_SECONDS = 0.02
_SHOW_SECONDS = 0.1


class Interrupted(KeyboardInterrupt):
    """Stopped by Ctrl-C. What is complete stays, and ``resume=True`` goes on from there.

    Attributes:
        complete: How many shards are complete.
        total: How many there will be.
    """

    def __init__(self, complete: int, total: int) -> None:
        super().__init__(f"interrupted: {complete} of {total} shards are complete")
        self.complete = complete
        self.total = total


@dataclass(frozen=True)
class Prepared:
    """A plan with what its execution needs besides."""

    plan: CheckpointPlan
    config: dict[str, Any] | None
    quantization: dict[str, Any] | None
    dtype: str | None = None

    def config_text(self) -> str | None:
        """The output's ``config.json``."""
        if self.config is None:
            return None
        if self.quantization is None:
            return config_json.without_quantization(self.config, self.dtype)
        return config_json.with_quantization(self.config, self.quantization, self.dtype)


def run(prepared: Prepared, dst: StrPath, options: RunOptions, progress: Progress, verb: str) -> dict[str, Any]:
    """Execute a plan; the fields of `ConvertReport`."""
    if not os.fspath(dst):
        # As a path it would stand for the working directory: not what an unset variable in a script means.
        raise ValueError("dst must be the folder to write to, got ''")
    plan = prepared.plan
    destination = str(Path(dst))
    names = [name for name, _ in plan.shards]
    ended = False

    def complete(name: str) -> bool:
        return ended or _native.is_staged(destination, name)

    with display_progress(progress, verb, names, complete) as show:
        job = _native.run_plan(
            plan.native, destination, options.mode, prepared.config_text(), thread_count(options.threads), options.fsync
        )
        try:
            written = wait(job, show)
            ended = True
            show(*job.progress())
        except KeyboardInterrupt:
            with contextlib.suppress(Exception, KeyboardInterrupt):
                # It may have ended before it could be stopped.
                job.result()
                ended = True
            raise Interrupted(sum(complete(name) for name in names), len(names)) from None
    data, totals = plan.data, plan.totals
    return {
        "source": data["source"],
        "destination": written["destination"],
        "files": tuple((shard["file"], shard["bytes"]) for shard in written["shards"]),
        "copied": tuple(copy["file"] for copy in data["copies"]),
        "reused": written["resumed_shards"],
        "already_complete": written["already_complete"],
        "tensors": totals["tensors"],
        "converted_tensors": totals["quantized_tensors"],
        "weights": totals["weights"],
        "converted_weights": totals["quantized_weights"],
        "types": tuple(plan.types),
        "bytes_in": totals["bytes_in"],
        "bytes_out": totals["bytes_out"],
        "bits_per_weight": totals["bits_per_weight"],
        "seconds": written["seconds"],
        "notes": plan.notes,
        "left_out": plan.left_out,
    }


def wait(job: _native.Job[_Report], show: Callable[[int, int, str], None]) -> _Report:
    """Follow a job to its end. An interruption stops it, waits until it has stopped, and is raised again."""
    try:
        show(*job.progress())
        shown = time.monotonic()
        while not job.wait(_POLL_SECONDS):
            if time.monotonic() - shown >= _SHOW_SECONDS:
                show(*job.progress())
                shown = time.monotonic()
    except BaseException:
        job.cancel()
        # A second Ctrl-C ends the wait too; what was being written is a temporary file then, and resuming finds it.
        while not job.wait(_POLL_SECONDS):
            pass
        raise
    return job.result()


@contextlib.contextmanager
def display_progress(
    progress: Progress,
    verb: str,
    files: Sequence[str] = (),
    complete: Callable[[str], bool] = lambda name: False,
    unit: Callable[[float], str] = format_bytes,
) -> Iterator[Callable[[int, int, str], None]]:
    """The callable to tell progress to."""
    if progress is None or progress is False:
        yield lambda done, total, label: None
    elif progress is True:
        display = progress_display(verb, files, complete, unit)
        try:
            yield display
        finally:
            display.close()
    elif callable(progress):
        yield progress
    else:
        raise ValueError(f"progress must be None, True, or a callable(done, total, label), got {progress!r}")
