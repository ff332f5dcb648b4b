"""The commands: each takes the parsed arguments and returns the exit code."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from halfbyte import _terminal
from halfbyte.cli.exit_codes import EXIT_DIFFERENT, EXIT_OK, EXIT_USAGE, PROG
from halfbyte.cli.output import complain, print_json, print_text, progress, say

if TYPE_CHECKING:
    from halfbyte.offline.plan import CheckpointPlan

# Files that are not copied, of which a run tells: the folders of exports hold many.
_LEFT_OUT_SHOWN = 5


def quantize(args: argparse.Namespace) -> int:
    """Quantize a checkpoint, or show the plan."""
    from halfbyte.config import BitsAndBytesConfig
    from halfbyte.offline.quantize import prepare_quantize, run_quantize

    _check_destination(args)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=args.type,
        bnb_4bit_use_double_quant=args.double_quant,
        bnb_4bit_compute_dtype=args.compute_dtype,
        bnb_4bit_quant_storage=args.storage,
    )
    prepared = prepare_quantize(
        args.source,
        config,
        rules=args.rule,
        skip=args.skip,
        selection=args.selection,
        trust_remote_code=args.trust_remote_code,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        allow_nonfinite=args.allow_nonfinite,
        blocksize=args.blocksize,
        hub_progress=progress(args),
    )
    return _convert(args, prepared, run_quantize)


def dequantize(args: argparse.Namespace) -> int:
    """Dequantize a 4-bit checkpoint, or show the plan."""
    from halfbyte.offline.dequantize import prepare_dequantize, run_dequantize

    _check_destination(args)
    prepared = prepare_dequantize(
        args.source, dtype=args.dtype, max_shard_size=args.max_shard_size, hub_progress=progress(args)
    )
    return _convert(args, prepared, run_dequantize)


def _convert(args: argparse.Namespace, prepared: Any, run: Any) -> int:
    """Show the plan, or carry it out and show the report."""
    plan: CheckpointPlan = prepared.plan
    if args.plan:
        if args.json:
            print_json(plan.to_dict())
        elif not args.quiet:
            print_text(plan.table(_terminal.stream_width(sys.stdout)))
        return EXIT_OK
    if not args.quiet and not args.json:
        for note in plan.notes:
            say(f"note: {note}")
        for left in plan.left_out[:_LEFT_OUT_SHOWN]:
            say(f"left out: {left}")
        if len(plan.left_out) > _LEFT_OUT_SHOWN:
            say(f"left out: {len(plan.left_out) - _LEFT_OUT_SHOWN} more files, which --plan lists")
    report = run(
        prepared,
        args.destination,
        overwrite=args.overwrite,
        resume=args.resume,
        threads=args.threads,
        fsync=not args.no_fsync,
        progress=progress(args),
    )
    if args.json:
        print_json(report.to_dict())
    elif not args.quiet:
        print_text(str(report))
    return EXIT_OK


def _check_destination(args: argparse.Namespace) -> None:
    if args.destination is None and not args.plan:
        raise ValueError("DST must be a folder to write to, got none; --plan shows what would be done without one")


def inspect(args: argparse.Namespace) -> int:
    """Show what a checkpoint holds."""
    from halfbyte.offline.inspect import inspect_checkpoint

    report = inspect_checkpoint(args.path)
    if args.json:
        print_json(report.to_dict())
    else:
        print_text(report.table(_terminal.stream_width(sys.stdout)))
    return EXIT_OK


def verify(args: argparse.Namespace) -> int:
    """Compare two checkpoints."""
    from halfbyte.offline.verify import verify_checkpoint

    report = verify_checkpoint(args.a, args.b, threads=args.threads, progress=progress(args))
    if args.json:
        print_json(report.to_dict())
    elif not args.quiet:
        print_text(report.table(_terminal.stream_width(sys.stdout)))
    return EXIT_OK if report.ok else EXIT_DIFFERENT


def examine(args: argparse.Namespace) -> int:
    """Show what this machine has."""
    from halfbyte.cli import doctor

    found = doctor.examine()
    if args.json:
        print_json(found)
    else:
        print_text(doctor.render(found))
    return EXIT_OK


def complete(args: argparse.Namespace) -> int:
    """Print a completion script."""
    from halfbyte.cli import completion

    print_text(completion.script(args.shell).rstrip("\n"))
    return EXIT_OK


def run_program(program: list[str]) -> int:
    """Run another program: before the parser, and outside of what reports errors, which are the program's own."""
    if program[0].startswith("-") and (program[0] != "-m" or len(program) < 2):
        complain(f"run: expected script.py or -m MODULE, got {program[0]!r} (see: {PROG} run --help)")
        return EXIT_USAGE
    from halfbyte.compat.run import run

    run(program)
    return EXIT_OK
