"""Quantize a checkpoint on disk, without torch and without the model.

    >>> import halfbyte
    >>> report = halfbyte.quantize_checkpoint("Llama-3.2-1B", "Llama-3.2-1B-nf4")       # doctest: +SKIP
    >>> print(report)                                                                  # doctest: +SKIP

The output is what transformers and bitsandbytes would have saved: ``AutoModelForCausalLM.from_pretrained`` loads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from halfbyte import _native
from halfbyte._native import CheckpointError
from halfbyte.offline import config_json
from halfbyte.offline.hub import resolve_source
from halfbyte.offline.options import (
    Config,
    Progress,
    Rule,
    Selection,
    StrPath,
    dtype_name,
    quantization_dict,
    rule_text,
    shard_size,
    strings,
)
from halfbyte.offline.plan import CheckpointPlan
from halfbyte.offline.report import QuantizeReport
from halfbyte.offline.run import Prepared, run


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
    """Plan `quantize_checkpoint`; see there for the arguments."""
    quantization, compute_dtype_given = quantization_dict(config)
    if selection not in ("rules", "transformers"):
        raise ValueError(f"selection is {selection!r}: expected 'rules' or 'transformers'")
    if trust_remote_code and selection != "transformers":
        raise ValueError("trust_remote_code is True: expected selection='transformers' with it")
    skip_names = strings("skip", skip)
    options: dict[str, Any] = {
        "quant_type": quantization["bnb_4bit_quant_type"],
        "blocksize": blocksize,
        "double_quant": quantization["bnb_4bit_use_double_quant"],
        "storage": quantization["bnb_4bit_quant_storage"],
        "dtype": (name := dtype_name(dtype)),
        "max_shard_size": shard_size(max_shard_size),
        "rules": [rule_text(rule) for rule in rules],
        "skip": [*(quantization["llm_int8_skip_modules"] or ()), *skip_names],
        "explicit": None,
        "explicit_conv1d": None,
        "allow_nonfinite": bool(allow_nonfinite),
    }
    folder = resolve_source(src, progress=hub_progress)
    model_config = config_json.read_config(folder if folder.is_dir() else folder.parent)
    if model_config is not None and (method := config_json.existing_quantization(model_config)):
        if config_json.is_eight_bit(model_config):
            method, undo = (
                f"{method}, 8 bits",
                "; start from the original model: halfbyte dequantize undoes 4 bits alone",
            )
        else:
            undo = "; undo it with: halfbyte dequantize" if method == "bitsandbytes" else ""
        raise CheckpointError(
            f"{folder / config_json.FILE}: the checkpoint is quantized already ({method}): expected one of float32, "
            f"float16 or bfloat16{undo}"
        )
    if selection == "transformers":
        from halfbyte.offline.transformers_selection import selected_and_conv1d

        selected = selected_and_conv1d(folder, trust_remote_code=trust_remote_code)
        options["explicit"], options["explicit_conv1d"] = selected
    plan = CheckpointPlan.of(
        _native.plan_quantize(str(folder), config_json.native_text(model_config), json.dumps(options))
    )
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
    common = run(prepared, dst, overwrite, resume, threads, fsync, progress, "quantizing")
    return QuantizeReport(**common, quantization_config=prepared.quantization or {})
