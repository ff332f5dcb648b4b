"""Turn a quantized checkpoint on disk back into a 16- or 32-bit one."""

from __future__ import annotations

from halfbyte import _native
from halfbyte.offline import config_json
from halfbyte.offline.hub import Hub, resolve_source
from halfbyte.offline.options import DequantizeOptions, Progress, RunOptions, StrPath
from halfbyte.offline.plan import CheckpointPlan
from halfbyte.offline.report import DequantizeReport
from halfbyte.offline.run import Prepared, run


def plan_dequantize(
    src: StrPath,
    *,
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: StrPath | None = None,
) -> CheckpointPlan:
    """What `dequantize_checkpoint` would do with these arguments; see there."""
    options = DequantizeOptions(dtype=dtype, max_shard_size=max_shard_size)  # type: ignore[arg-type]
    return prepare_dequantize(src, options, Hub(revision, token, cache_dir)).plan


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
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: StrPath | None = None,
) -> DequantizeReport:
    """Dequantize a 4- or 8-bit checkpoint, of halfbyte or of bitsandbytes, shard by shard.

    Args:
        src: As for `quantize_checkpoint`, with 4- or 8-bit weights.
        dst: As for `quantize_checkpoint`.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"`` (or torch's dtype); None for the dtype that each weight
            had before; for 8-bit weights, which do not record it, that is the one in ``config.json``, else float16.
        max_shard_size: As for `quantize_checkpoint`, like all that follow.
        overwrite: As there.
        resume: As there.
        threads: As there.
        fsync: As there.
        progress: As there.
        revision: As there.
        token: As there.
        cache_dir: As there.

    Raises:
        ValueError: As `quantize_checkpoint`.
        CheckpointError: As `quantize_checkpoint`; or the source has no quantized weight.
        OSError: As `quantize_checkpoint`.
        Interrupted: As `quantize_checkpoint`.
    """
    options = DequantizeOptions(dtype=dtype, max_shard_size=max_shard_size)  # type: ignore[arg-type]
    how = RunOptions(overwrite=overwrite, resume=resume, threads=threads, fsync=fsync)
    return run_dequantize(prepare_dequantize(src, options, Hub(revision, token, cache_dir)), dst, how, progress)


def prepare_dequantize(src: StrPath, options: DequantizeOptions, hub: Hub) -> Prepared:
    """Plan `dequantize_checkpoint`."""
    folder = resolve_source(src, hub)
    config = config_json.read_config(folder if folder.is_dir() else folder.parent)
    native = _native.plan_dequantize(str(folder), config_json.native_text(config), options.to_dict())
    return Prepared(CheckpointPlan.of(native), config, None, options.dtype)


def run_dequantize(prepared: Prepared, dst: StrPath, options: RunOptions, progress: Progress) -> DequantizeReport:
    """Carry out what `prepare_dequantize` has planned."""
    return DequantizeReport(**run(prepared, dst, options, progress, "dequantizing"))
