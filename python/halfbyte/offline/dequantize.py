"""Turn a 4-bit checkpoint on disk back into a 16- or 32-bit one."""

from __future__ import annotations

import json

from halfbyte import _native
from halfbyte.offline import config_json
from halfbyte.offline.hub import resolve_source
from halfbyte.offline.options import Progress, StrPath, dtype_name, shard_size
from halfbyte.offline.plan import CheckpointPlan
from halfbyte.offline.report import DequantizeReport
from halfbyte.offline.run import Prepared, run


def plan_dequantize(
    src: StrPath, *, dtype: str | None = None, max_shard_size: int | str | None = None
) -> CheckpointPlan:
    """What `dequantize_checkpoint` would do with these arguments; see there."""
    return prepare_dequantize(src, dtype=dtype, max_shard_size=max_shard_size).plan


def dequantize_checkpoint(
    src: StrPath,
    dst: StrPath,
    *,
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    threads: int | None = None,
    fsync: bool = True,
    progress: Progress = None,
) -> DequantizeReport:
    """Turn a 4-bit checkpoint, of halfbyte or of bitsandbytes, back into a 16- or 32-bit one.

    Parameters
    ----------
    src, dst, max_shard_size, overwrite, resume, threads, fsync, progress
        As in `quantize_checkpoint`.
    dtype
        ``"bfloat16"``, ``"float16"`` or ``"float32"`` (or torch's dtype); None for the dtype that each weight had
        before.

    Raises
    ------
    ValueError, CheckpointError, OSError, Interrupted
        As in `quantize_checkpoint`; a source without quantized weights is a CheckpointError.
    """
    prepared = prepare_dequantize(src, dtype=dtype, max_shard_size=max_shard_size)
    return run_dequantize(
        prepared, dst, overwrite=overwrite, resume=resume, threads=threads, fsync=fsync, progress=progress
    )


def prepare_dequantize(
    src: StrPath,
    *,
    dtype: object = None,
    max_shard_size: int | str | None = None,
    hub_progress: bool = False,
) -> Prepared:
    """Plan `dequantize_checkpoint`; see there for the arguments."""
    name = dtype_name(dtype)
    options = {"dtype": name, "max_shard_size": shard_size(max_shard_size)}
    folder = resolve_source(src, progress=hub_progress)
    config = config_json.read_config(folder if folder.is_dir() else folder.parent)
    plan = CheckpointPlan.of(_native.plan_dequantize(str(folder), config_json.native_text(config), json.dumps(options)))
    return Prepared(plan, config, None, name)


def run_dequantize(
    prepared: Prepared,
    dst: StrPath,
    *,
    overwrite: bool = False,
    resume: bool = False,
    threads: int | None = None,
    fsync: bool = True,
    progress: Progress = None,
) -> DequantizeReport:
    """Carry out what `prepare_dequantize` has planned."""
    return DequantizeReport(**run(prepared, dst, overwrite, resume, threads, fsync, progress, "dequantizing"))
