"""Compare a checkpoint on disk with the one that it was made from."""

from __future__ import annotations

import time

from halfbyte import _native
from halfbyte._terminal import format_weights
from halfbyte.offline import config_json
from halfbyte.offline.hub import Hub, resolve_sources
from halfbyte.offline.options import Progress, StrPath, thread_count
from halfbyte.offline.report import VerifyReport
from halfbyte.offline.run import display_progress, wait


def verify_checkpoint(
    a: StrPath,
    b: StrPath,
    *,
    threads: int | None = None,
    progress: Progress = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: StrPath | None = None,
) -> VerifyReport:
    """Compare every tensor of ``b`` with ``a``.

    Args:
        a: The original: each weight that ``b`` holds in 4 or 8 bits is quantized afresh, in the same way, and the bytes
            are compared. Or a quantized checkpoint: bytes are compared with bytes.
        b: The checkpoint to be checked.
        threads: As for `quantize_checkpoint`.
        progress: As for `quantize_checkpoint`.
        revision: As for `quantize_checkpoint`, for those of ``a`` and ``b`` that are names on the hub.
        token: As for `quantize_checkpoint`.
        cache_dir: As for `quantize_checkpoint`.

    Raises:
        CheckpointError: Either checkpoint is broken.
        OSError: They cannot be read.
    """
    started = time.monotonic()
    used = thread_count(threads)
    first, second = resolve_sources((a, b), Hub(revision, token, cache_dir))
    configs = [
        config_json.native_text(config_json.read_config(path if path.is_dir() else path.parent))
        for path in (first, second)
    ]
    job = _native.verify(str(first), str(second), configs[0], configs[1], used)
    with display_progress(progress, "verifying", unit=format_weights) as show:
        data = wait(job, show)
    return VerifyReport.of(data, time.monotonic() - started)
