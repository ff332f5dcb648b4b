"""Quantize a checkpoint on disk, without torch and without the model.

    >>> import halfbyte
    >>> report = halfbyte.quantize_checkpoint("Llama-3.2-1B", "Llama-3.2-1B-nf4")       # doctest: +SKIP
    >>> print(report)                                                                  # doctest: +SKIP

The output is what transformers and bitsandbytes would have saved: ``AutoModelForCausalLM.from_pretrained`` loads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte import _native
from halfbyte._native import CheckpointError
from halfbyte.offline import config_json
from halfbyte.offline.choices import QUANT_TYPES
from halfbyte.offline.hub import Hub, resolve_source
from halfbyte.offline.options import (
    Config,
    Progress,
    QuantizeOptions,
    Rule,
    RunOptions,
    Selection,
    StrPath,
    coerce_config,
)
from halfbyte.offline.plan import CheckpointPlan
from halfbyte.offline.report import QuantizeReport
from halfbyte.offline.run import Prepared, run

if TYPE_CHECKING:
    from halfbyte._native import SelectedData


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
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: StrPath | None = None,
) -> CheckpointPlan:
    """What `quantize_checkpoint` would do with these arguments, in milliseconds: no weight is read.

    See there for the arguments and the errors.
    """
    options = QuantizeOptions.from_config(
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
    return prepare_quantize(src, options, Hub(revision, token, cache_dir), config).plan


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
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: StrPath | None = None,
) -> QuantizeReport:
    """Quantize a checkpoint of float32, float16 or bfloat16 weights to NF4, FP4 or int8, shard by shard.

    Args:
        src: A folder with ``config.json`` and ``model.safetensors`` or an index and shards; or a name on the hub. It is
            only read.
        dst: The folder to write: created, or empty, unless ``overwrite`` or ``resume`` is set.
        config: A ``BitsAndBytesConfig`` of halfbyte or transformers, or its dict, with ``load_in_4bit`` or
            ``load_in_8bit`` (LLM.int8(): weights are rounded to float16, then to int8 by rows). None stands for NF4
            with double quantization. ``llm_int8_skip_modules`` adds to what is kept anyway. Where it gives no
            compute dtype, the output's ``config.json`` says the model's: ``dtype``, else what the checkpoint has
            (transformers' own class says float32 where nothing was given).
        rules: ``"REGEX=nf4"``, ``"REGEX=fp4"``, ``"REGEX=int8"``, ``"REGEX=keep"`` or pairs of both sides: the first
            whose expression is found in a tensor's name decides. Rules come before everything else. A checkpoint that
            mixes 4 and 8 bits is read by `load_quantized` alone: transformers refuses it.
        skip: Names of modules to keep, in addition to those that transformers keeps.
        selection: ``"rules"``: which weights are linear layers is decided from config, names and shapes.
            ``"transformers"``: the installed transformers is asked (it and torch are imported).
        trust_remote_code: With ``selection="transformers"``: run the code that comes with the checkpoint
            (``auto_map``), if it has some. Without it such a checkpoint is refused; nothing is ever asked.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"`` (or torch's dtype): what weights are cast to before they
            are quantized or kept, written to ``config.json`` too. None for the dtype that ``config.json`` names, which
            is what transformers loads a model in; without one, weights are taken as they are stored.
        max_shard_size: Most bytes of an output file: ``"5GB"`` (10^9), ``"2GiB"`` (2^30) or an int. None is 5 GB.
        overwrite: Replace an earlier output in ``dst``.
        resume: Continue an interrupted run of the same arguments. Shards that are complete are not made again.
        allow_nonfinite: Quantize weights that hold NaN or infinities, instead of raising.
        blocksize: Weights per absmax: 32, 64, 128, 256, 512, 1024, 2048 or 4096. ``config.json`` has no place for it;
            each weight's state says it, and transformers with bitsandbytes 0.50 loads all of them. On a CPU with
            AVX-512, though, bitsandbytes 0.50 multiplies with wrong scales unless the blocksize, 64 too, divides the
            width of every layer.
        threads: How many to use; None for one per core that this process may run on.
        fsync: Wait until the disk has every file before it gets its final name.
        progress: True to show it (a bar on a terminal, else a line per file, on standard error), or a callable that is
            given (bytes done, bytes in all, what is being worked on) about ten times a second.
        revision: For a name on the hub: a branch, a tag or a commit; None for the main branch.
        token: For a name on the hub: an access token, or False to send none. None uses the one that ``hf auth login``
            has stored, if any.
        cache_dir: For a name on the hub: the folder of downloaded files; None for huggingface_hub's.

    Raises:
        ValueError: An argument is wrong, or ``dst`` is in use.
        CheckpointError: The checkpoint is broken, an adapter, quantized already (by ``config.json`` or by its tensors),
            holds a non-finite weight, or a value that ``dtype`` (or, of an int8 weight, float16) cannot hold. A
            ValueError too.
        OSError: The file system refused: permissions, space.
        Interrupted: Ctrl-C. A KeyboardInterrupt too.
    """
    options = QuantizeOptions.from_config(
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
    how = RunOptions(overwrite=overwrite, resume=resume, threads=threads, fsync=fsync)
    return run_quantize(prepare_quantize(src, options, Hub(revision, token, cache_dir), config), dst, how, progress)


def prepare_quantize(src: StrPath, options: QuantizeOptions, hub: Hub, config: Config = None) -> Prepared:
    """Plan `quantize_checkpoint`.

    Args:
        src: As there.
        options: How to quantize.
        hub: How to look up a name on the hub.
        config: The config that the options come from, if any: its other keys go into the output's ``config.json``.
    """
    folder = resolve_source(src, hub)
    model_config = config_json.read_config(folder if folder.is_dir() else folder.parent)
    if model_config is not None:
        _refuse_quantized(folder / config_json.FILE, model_config)
    selected: SelectedData | None = None
    if options.selection == "transformers":
        from halfbyte.offline.transformers_selection import selected_and_conv1d

        tensors, conv1d = selected_and_conv1d(folder, trust_remote_code=options.trust_remote_code)
        selected = {"tensors": tensors, "conv1d": conv1d}
    plan = CheckpointPlan.of(
        _native.plan_quantize(str(folder), config_json.native_text(model_config), options.to_dict(), selected)
    )
    dtype = options.dtype
    if dtype is None and model_config is not None and not config_json.names_dtype(model_config):
        # Loaders take the dtype of the first float tensor then, which may be the float32 of scales.
        dtype = plan.model_dtype if plan.model_dtype != "float32" else None
    return Prepared(plan, model_config, quantization_config(options, plan, config), dtype)


def quantization_config(options: QuantizeOptions, plan: CheckpointPlan, config: Config) -> dict[str, Any]:
    """``quantization_config`` of the output's ``config.json``, as transformers writes it.

    It has one of ``load_in_4bit`` and ``load_in_8bit``. Where weights of both kinds are there it has both, because both
    are true: transformers, which can load one kind, then refuses the checkpoint instead of misreading it.
    """
    types = [line["type"] for line in plan.types]
    four_bit = [name for name in types if name in QUANT_TYPES]
    eight_bit = "int8" in types
    base = coerce_config({"load_in_8bit": True} if config is None and not four_bit else config)
    # Through JSON, so that enumerations become the plain strings that config.json holds.
    written: dict[str, Any] = json.loads(json.dumps(base.to_dict()))
    for key, value in (("load_in_4bit", bool(four_bit)), ("load_in_8bit", eight_bit)):
        written[key] = written[f"_{key}"] = value
    written["llm_int8_skip_modules"] = plan.skip_modules
    if eight_bit:
        written["llm_int8_threshold"] = options.threshold
    if four_bit:
        written["bnb_4bit_quant_type"] = options.quant_type if options.quant_type in QUANT_TYPES else four_bit[0]
        written["bnb_4bit_use_double_quant"] = options.double_quant
        written["bnb_4bit_quant_storage"] = options.storage
        compute_dtype = options.compute_dtype or plan.model_dtype
        if compute_dtype is not None:
            written["bnb_4bit_compute_dtype"] = compute_dtype
    return written


def _refuse_quantized(file: Path, config: dict[str, Any]) -> None:
    method = config_json.existing_quantization(config)
    # Whether experts in MXFP4 can be decoded, the core says: by their tensors.
    if method in (None, "mxfp4"):
        return
    undo = "; undo it with: halfbyte dequantize" if method == "bitsandbytes" else ""
    raise CheckpointError(
        f"{file}: the checkpoint is quantized already ({method}): expected one of float32, float16 or bfloat16{undo}"
    )


def run_quantize(prepared: Prepared, dst: StrPath, options: RunOptions, progress: Progress) -> QuantizeReport:
    """Carry out what `prepare_quantize` has planned."""
    common = run(prepared, dst, options, progress, "quantizing")
    return QuantizeReport(**common, quantization_config=prepared.quantization or {})
