"""Carrying out a plan: followed, shown, interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte import _native
from halfbyte._terminal import format_bytes, progress_display
from halfbyte.offline import config_json
from halfbyte.offline.options import Progress, StrPath, thread_count
from halfbyte.offline.plan import CheckpointPlan

# Python looks at signals between two waits.
_POLL_SECONDS = 0.02
_SHOW_SECONDS = 0.1
# Where the compiled core keeps complete files until all of them are there (its module `checkpoint::stage`).
_STAGE = ".halfbyte-partial"


class Interrupted(KeyboardInterrupt):
    """Stopped by Ctrl-C. What is complete stays, and ``resume=True`` goes on from there.

    Attributes
    ----------
    complete, total
        Output files of weights that are complete, and how many there will be.
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


def run(
    prepared: Prepared,
    dst: StrPath,
    overwrite: bool,
    resume: bool,
    threads: int | None,
    fsync: bool,
    progress: Progress,
    verb: str,
) -> dict[str, Any]:
    """Execute a plan; the fields of `ConvertReport`."""
    if overwrite and resume:
        raise ValueError("overwrite and resume are both set: expected at most one of them")
    if not os.fspath(dst):
        # As a path it would stand for the working directory: not what an unset variable in a script means.
        raise ValueError("dst is '': expected the folder to write to")
    mode = "overwrite" if overwrite else "resume" if resume else "new"
    plan = prepared.plan
    destination = Path(dst)
    staged = destination / _STAGE / "files"
    names = [name for name, _ in plan.shards]
    ended = False

    def complete(name: str) -> bool:
        return ended or (staged / name).is_file()

    with display_progress(progress, verb, names, complete) as show:
        job = _native.run_plan(
            plan.native, str(destination), mode, prepared.config_text(), thread_count(threads), fsync
        )
        try:
            data = json.loads(wait(job, show))
            ended = True
            show(*job.progress())
        except KeyboardInterrupt:
            with contextlib.suppress(Exception, KeyboardInterrupt):
                # It may have ended before it could be stopped.
                job.result()
                ended = True
            raise Interrupted(sum(complete(name) for name in names), len(names)) from None
    totals = plan.totals
    return {
        "source": str(plan.data["source"]),
        "destination": data["destination"],
        "files": tuple((shard["file"], shard["bytes"]) for shard in data["shards"]),
        "copied": tuple(c["file"] for c in plan.data.get("copies") or ()),
        "reused": data["resumed_shards"],
        "already_complete": data["already_complete"],
        "tensors": totals["tensors"],
        "converted_tensors": totals["quantized_tensors"],
        "weights": totals["weights"],
        "converted_weights": totals["quantized_weights"],
        "bytes_in": totals["bytes_in"],
        "bytes_out": totals["bytes_out"],
        "bits_per_weight": totals["bits_per_weight"],
        "seconds": data["seconds"],
        "notes": plan.notes,
        "left_out": plan.left_out,
    }


def wait(job: _native.Job, show: Callable[[int, int, str], None]) -> str:
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
        raise ValueError(f"progress is {progress!r}: expected None, True, or a callable(done, total, label)")
