"""Compare a checkpoint on disk with the one that it was made from."""

from __future__ import annotations

import json
import time

from halfbyte import _native
from halfbyte._terminal import format_weights
from halfbyte.offline import config_json
from halfbyte.offline.hub import resolve_source
from halfbyte.offline.options import Progress, StrPath, thread_count
from halfbyte.offline.report import VerifyReport
from halfbyte.offline.run import display_progress, wait


def verify_checkpoint(a: StrPath, b: StrPath, *, threads: int | None = None, progress: Progress = None) -> VerifyReport:
    """Compare every tensor of ``b`` with ``a``.

    Parameters
    ----------
    a
        The original: each weight that ``b`` holds in 4 bits is quantized afresh, in the same way, and the bytes are
        compared. Or a quantized checkpoint: bytes are compared with bytes.
    b
        The checkpoint to be checked.
    threads, progress
        As in `quantize_checkpoint`.

    Raises
    ------
    CheckpointError
        Either checkpoint is broken.
    OSError
        They cannot be read.
    """
    started = time.monotonic()
    folders = [resolve_source(a), resolve_source(b)]
    config = config_json.read_config(folders[0] if folders[0].is_dir() else folders[0].parent)
    job = _native.verify(str(folders[0]), str(folders[1]), config_json.native_text(config), thread_count(threads))
    with display_progress(progress, "verifying", unit=format_weights) as show:
        data = json.loads(wait(job, show))
    return VerifyReport.of(data, time.monotonic() - started)
