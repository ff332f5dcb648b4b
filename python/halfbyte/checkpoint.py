"""The offline tool: quantize, dequantize, inspect and verify checkpoints on disk, without torch and without the model.

    >>> import halfbyte
    >>> report = halfbyte.quantize_checkpoint("Llama-3.2-1B", "Llama-3.2-1B-nf4")       # doctest: +SKIP
    >>> print(report)                                                                  # doctest: +SKIP

The output is what transformers and bitsandbytes would have saved: ``AutoModelForCausalLM.from_pretrained`` loads it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from halfbyte import _config_json, _native
from halfbyte._native import CheckpointError
from halfbyte._plan import CheckpointPlan, TensorPlan
from halfbyte._report import (
    ConvertReport,
    DequantizeReport,
    InspectReport,
    QuantizeReport,
    TensorComparison,
    VerifyReport,
)
from halfbyte._terminal import format_bytes, format_weights, parse_size, progress_display
from halfbyte.hub import resolve_source

if TYPE_CHECKING:
    from halfbyte.config import BitsAndBytesConfig

__all__ = [
    "CheckpointError",
    "CheckpointPlan",
    "ConvertReport",
    "DequantizeReport",
    "InspectReport",
    "Interrupted",
    "QuantizeReport",
    "TensorComparison",
    "TensorPlan",
    "VerifyReport",
    "dequantize_checkpoint",
    "inspect_checkpoint",
    "plan_checkpoint",
    "plan_dequantize",
    "quantize_checkpoint",
    "verify_checkpoint",
]

StrPath: TypeAlias = "str | os.PathLike[str]"
Config: TypeAlias = "BitsAndBytesConfig | dict[str, Any] | object | None"
Rule: TypeAlias = "str | tuple[str, str]"
Progress: TypeAlias = "Callable[[int, int, str], None] | bool | None"
Selection: TypeAlias = Literal["rules", "transformers"]

FLOAT_DTYPES = ("bfloat16", "float16", "float32")
# Python looks at signals between two waits.
_POLL_SECONDS = 0.02
_SHOW_SECONDS = 0.1
# Where the compiled core keeps complete files until all of them are there (rust/core/src/checkpoint/stage.rs).
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


# ----------------------------------------------------------------------------------------------------------- quantize


@dataclass(frozen=True)
class Prepared:
    """A plan with what its execution needs besides."""

    plan: CheckpointPlan
    config: dict[str, Any] | None
    quantization: dict[str, Any] | None
    dtype: str | None = None

    def config_text(self) -> str | None:
        if self.config is None:
            return None
        if self.quantization is None:
            return _config_json.without_quantization(self.config, self.dtype)
        return _config_json.with_quantization(self.config, self.quantization, self.dtype)


def plan_checkpoint(
    src: StrPath,
    config: Config = None,
    *,
    rules: Iterable[Rule] = (),
    skip: Iterable[str] = (),
    selection: Selection = "rules",
    trust_remote_code: bool = False,
    dtype: object = None,
    max_shard_size: int | str | None = None,
    allow_nonfinite: bool = False,
    blocksize: int = 64,
) -> CheckpointPlan:
    """What `quantize_checkpoint` would do with these arguments, in milliseconds: no weight is read.

    See there for the arguments and the errors.
    """
    return prepare_quantize(
        src,
        config,
        rules=rules,
        skip=skip,
        selection=selection,
        trust_remote_code=trust_remote_code,
        dtype=dtype,
        max_shard_size=max_shard_size,
        allow_nonfinite=allow_nonfinite,
        blocksize=blocksize,
    ).plan


def quantize_checkpoint(
    src: StrPath,
    dst: StrPath,
    config: Config = None,
    *,
    rules: Iterable[Rule] = (),
    skip: Iterable[str] = (),
    selection: Selection = "rules",
    trust_remote_code: bool = False,
    dtype: object = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    allow_nonfinite: bool = False,
    blocksize: int = 64,
    threads: int | None = None,
    fsync: bool = True,
    progress: Progress = None,
) -> QuantizeReport:
    """Quantize a checkpoint of float32, float16 or bfloat16 weights to NF4 or FP4, file by file.

    Parameters
    ----------
    src
        Folder with ``config.json`` and ``model.safetensors`` or an index and shards; or a name on the hub.
        It is only read.
    dst
        Folder to write: created, or empty, unless ``overwrite`` or ``resume`` is set.
    config
        ``BitsAndBytesConfig`` of halfbyte or transformers, or its dict, with ``load_in_4bit``. None stands for NF4 with
        double quantization. ``llm_int8_skip_modules`` adds to what is kept anyway. Where it gives no compute dtype, the
        output's ``config.json`` says the model's: ``dtype``, else what the checkpoint has (transformers' own class says
        float32 where nothing was given).
    rules
        ``"REGEX=nf4"``, ``"REGEX=fp4"``, ``"REGEX=keep"`` or pairs of both sides: the first whose expression is found
        in a tensor's name decides. They come before everything else.
    skip
        Names of modules to keep, in addition to those that transformers keeps.
    selection
        ``"rules"``: which weights are linear layers is decided from config, names and shapes.
        ``"transformers"``: the installed transformers is asked (it and torch are imported).
    trust_remote_code
        With ``selection="transformers"``: run the code that comes with the checkpoint (``auto_map``), if it has some.
        Without it such a checkpoint is refused; nothing is ever asked.
    dtype
        ``"bfloat16"``, ``"float16"`` or ``"float32"`` (or torch's dtype): what weights are cast to before they are
        quantized or kept, written to ``config.json`` too. None for the dtype that ``config.json`` names, which is what
        transformers loads a model in; without one, weights are taken as they are stored.
    max_shard_size
        Most bytes of an output file: ``"5GB"`` (10^9), ``"2GiB"`` (2^30) or an int. None is 5 GB.
    overwrite
        Replace an earlier output in ``dst``.
    resume
        Go on with an interrupted run of the same arguments. Finished files are not made again.
    allow_nonfinite
        Quantize weights that hold NaN or infinities, instead of raising.
    blocksize
        Weights per scale: 32, 64, 128, 256, 512, 1024, 2048 or 4096. ``config.json`` has no place for it; each weight's
        state says it, and transformers with bitsandbytes 0.50 loads all of them. On a CPU with AVX-512, though,
        bitsandbytes 0.50 multiplies with wrong scales unless the blocksize, 64 too, divides the width of every layer.
    threads
        How many to use; None for one per core that this process may run on.
    fsync
        Wait until the disk has every file before it gets its final name.
    progress
        True to show it (a bar on a terminal, else a line per file, on standard error), or a callable that is given
        (bytes done, bytes in all, what is being worked on) about ten times a second.

    Raises
    ------
    ValueError
        An argument is wrong, or ``dst`` is in use.
    CheckpointError
        The checkpoint is broken, an adapter, quantized already (by ``config.json`` or by its tensors), holds a
        non-finite weight, or a value that ``dtype`` cannot hold. A ValueError too.
    OSError
        The file system refused: permissions, space.
    Interrupted
        Ctrl-C. A KeyboardInterrupt too.
    """
    prepared = prepare_quantize(
        src,
        config,
        rules=rules,
        skip=skip,
        selection=selection,
        trust_remote_code=trust_remote_code,
        dtype=dtype,
        max_shard_size=max_shard_size,
        allow_nonfinite=allow_nonfinite,
        blocksize=blocksize,
    )
    return run_quantize(
        prepared, dst, overwrite=overwrite, resume=resume, threads=threads, fsync=fsync, progress=progress
    )


def prepare_quantize(
    src: StrPath,
    config: Config = None,
    *,
    rules: Iterable[Rule] = (),
    skip: Iterable[str] = (),
    selection: Selection = "rules",
    trust_remote_code: bool = False,
    dtype: object = None,
    max_shard_size: int | str | None = None,
    allow_nonfinite: bool = False,
    blocksize: int = 64,
    hub_progress: bool = False,
) -> Prepared:
    quantization, compute_dtype_given = _quantization_dict(config)
    if selection not in ("rules", "transformers"):
        raise ValueError(f"selection is {selection!r}: expected 'rules' or 'transformers'")
    if trust_remote_code and selection != "transformers":
        raise ValueError("trust_remote_code is True: expected selection='transformers' with it")
    skip_names = _strings("skip", skip)
    options: dict[str, Any] = {
        "quant_type": quantization["bnb_4bit_quant_type"],
        "blocksize": blocksize,
        "double_quant": quantization["bnb_4bit_use_double_quant"],
        "storage": quantization["bnb_4bit_quant_storage"],
        "dtype": (name := _dtype_name(dtype)),
        "max_shard_size": _shard_size(max_shard_size),
        "rules": [_rule_text(rule) for rule in rules],
        "skip": [*(quantization["llm_int8_skip_modules"] or ()), *skip_names],
        "explicit": None,
        "explicit_conv1d": None,
        "allow_nonfinite": bool(allow_nonfinite),
    }
    folder = resolve_source(src, progress=hub_progress)
    model_config = _config_json.read_config(folder if folder.is_dir() else folder.parent)
    if model_config is not None and (method := _config_json.existing_quantization(model_config)):
        if _config_json.is_eight_bit(model_config):
            method, undo = (
                f"{method}, 8 bits",
                "; start from the original model: halfbyte dequantize undoes 4 bits alone",
            )
        else:
            undo = "; undo it with: halfbyte dequantize" if method == "bitsandbytes" else ""
        raise CheckpointError(
            f"{folder / _config_json.FILE}: the checkpoint is quantized already ({method}): expected one of float32, "
            f"float16 or bfloat16{undo}"
        )
    if selection == "transformers":
        from halfbyte.integrations.selection import selected_and_conv1d

        selected = selected_and_conv1d(folder, trust_remote_code=trust_remote_code)
        options["explicit"], options["explicit_conv1d"] = selected
    plan = CheckpointPlan.of(_native.plan_quantize(str(folder), _json_or_none(model_config), json.dumps(options)))
    quantization["llm_int8_skip_modules"] = plan.skip_modules
    if not compute_dtype_given and plan.model_dtype is not None:
        quantization["bnb_4bit_compute_dtype"] = plan.model_dtype
    return Prepared(plan, model_config, quantization, name)


def run_quantize(
    prepared: Prepared,
    dst: StrPath,
    *,
    overwrite: bool = False,
    resume: bool = False,
    threads: int | None = None,
    fsync: bool = True,
    progress: Progress = None,
) -> QuantizeReport:
    """Carry out what `prepare_quantize` has planned."""
    common = _run(prepared, dst, overwrite, resume, threads, fsync, progress, "quantizing")
    return QuantizeReport(**common, quantization_config=prepared.quantization or {})


def _quantization_dict(config: Config) -> tuple[dict[str, Any], bool]:
    """``quantization_config`` as transformers writes it, from whatever the caller gave; was a compute dtype given?"""
    from halfbyte.config import BitsAndBytesConfig

    if config is None:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    coerced = BitsAndBytesConfig.coerce(config)
    if not coerced.load_in_4bit:
        raise ValueError("config has load_in_4bit=False: expected True, the offline tool writes 4-bit weights")
    # Through JSON, so that enumerations become the plain strings that config.json holds.
    plain: dict[str, Any] = json.loads(json.dumps(coerced.to_dict()))
    _strings("llm_int8_skip_modules", plain["llm_int8_skip_modules"] or ())
    return plain, coerced.compute_dtype() is not None


# --------------------------------------------------------------------------------------------------------- dequantize


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
    name = _dtype_name(dtype)
    options = {"dtype": name, "max_shard_size": _shard_size(max_shard_size)}
    folder = resolve_source(src, progress=hub_progress)
    config = _config_json.read_config(folder if folder.is_dir() else folder.parent)
    plan = CheckpointPlan.of(_native.plan_dequantize(str(folder), _json_or_none(config), json.dumps(options)))
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
    return DequantizeReport(**_run(prepared, dst, overwrite, resume, threads, fsync, progress, "dequantizing"))


# -------------------------------------------------------------------------------------------------- inspect and verify


def inspect_checkpoint(path: StrPath) -> InspectReport:
    """What a folder or a ``.safetensors`` file holds: which weights are quantized, how, and how large.

    Only headers and quantization states are read. The checkpoint may be of any origin.

    Raises
    ------
    CheckpointError
        The files break their format.
    OSError
        They cannot be read.
    """
    folder = resolve_source(path)
    data = json.loads(_native.inspect(str(folder)))
    # A single file is inspected as it is: a config.json beside it may be another model's.
    config = _config_json.read_config(folder) if folder.is_dir() else None
    data["quantization_config"] = (config or {}).get("quantization_config")
    return InspectReport(data)


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
    config = _config_json.read_config(folders[0] if folders[0].is_dir() else folders[0].parent)
    job = _native.verify(str(folders[0]), str(folders[1]), _json_or_none(config), _threads(threads))
    with _display(progress, "verifying", unit=format_weights) as show:
        data = json.loads(_wait(job, show))
    return VerifyReport.of(data, time.monotonic() - started)


# ---------------------------------------------------------------------------------------------------------------- run


def _run(
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

    with _display(progress, verb, names, complete) as show:
        job = _native.run_plan(plan.native, str(destination), mode, prepared.config_text(), _threads(threads), fsync)
        try:
            data = json.loads(_wait(job, show))
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


def _wait(job: _native.Job, show: Callable[[int, int, str], None]) -> str:
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
def _display(
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


# ---------------------------------------------------------------------------------------------------------- arguments


def _threads(threads: int | None) -> int:
    if threads is None:
        # Containers and job schedulers give a process fewer cores than the machine has.
        affinity = getattr(os, "sched_getaffinity", None)
        return len(affinity(0)) if affinity else os.cpu_count() or 1
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads is {threads!r}: expected an int of at least 1, or None for one per core")
    return threads


def _dtype_name(dtype: object) -> str | None:
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None and name not in FLOAT_DTYPES:
        raise ValueError(f"dtype is {dtype!r}: expected {', '.join(FLOAT_DTYPES)}")
    return name


def _shard_size(value: int | str | None) -> int | None:
    if value is None:
        return None
    try:
        return parse_size(value)
    except ValueError as error:
        raise ValueError(f"max_shard_size: {error}") from None


def _rule_text(rule: Rule) -> str:
    if isinstance(rule, str):
        return rule
    if isinstance(rule, tuple) and len(rule) == 2 and all(isinstance(part, str) for part in rule):
        return f"{rule[0]}={rule[1]}"
    raise ValueError(f"rule is {rule!r}: expected 'REGEX=nf4', 'REGEX=fp4', 'REGEX=keep', or a pair of both sides")


def _strings(name: str, values: Iterable[str]) -> list[str]:
    if isinstance(values, str):
        raise ValueError(f"{name} is {values!r}: expected a list of module names")
    out = list(values)
    for value in out:
        if not isinstance(value, str):
            raise ValueError(f"{name} holds {value!r}: expected module names")
    return out


def _json_or_none(config: dict[str, Any] | None) -> str | None:
    return None if config is None else _config_json.native_text(config)
