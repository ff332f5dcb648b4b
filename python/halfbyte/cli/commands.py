"""The commands: each takes the parsed arguments and returns the exit code."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any, TypeVar

from halfbyte import _terminal
from halfbyte.cli.exit_codes import EXIT_DIFFERENT, EXIT_OK, EXIT_USAGE, PROG
from halfbyte.cli.output import complain, print_json, print_text, progress, say

if TYPE_CHECKING:
    from halfbyte.offline.hub import Hub
    from halfbyte.offline.options import DequantizeOptions, QuantizeOptions, RunOptions
    from halfbyte.offline.plan import CheckpointPlan

_Options = TypeVar("_Options", "QuantizeOptions", "DequantizeOptions", "RunOptions")

# How many files that are not copied a run lists: folders of exports hold many.
_LEFT_OUT_SHOWN = 5


def quantize(args: argparse.Namespace) -> int:
    """Quantize a checkpoint, or show the plan."""
    from halfbyte.offline.options import QuantizeOptions
    from halfbyte.offline.quantize import prepare_quantize, run_quantize

    _check_destination(args)
    options = _options(QuantizeOptions, args)
    _check_format(args, options)
    return _convert(args, prepare_quantize(args.source, options, _hub(args)), run_quantize)


def dequantize(args: argparse.Namespace) -> int:
    """Dequantize a checkpoint, or show the plan."""
    from halfbyte.offline.dequantize import prepare_dequantize, run_dequantize
    from halfbyte.offline.options import DequantizeOptions

    _check_destination(args)
    return _convert(
        args, prepare_dequantize(args.source, _options(DequantizeOptions, args), _hub(args)), run_dequantize
    )


def _options(cls: type[_Options], args: argparse.Namespace) -> _Options:
    """The options of the command line: each field has the name of an argument, which is None where it is not given."""
    from dataclasses import fields

    given = {field.name: getattr(args, field.name) for field in fields(cls)}
    return cls(**{name: value for name, value in given.items() if value is not None})


def _hub(args: argparse.Namespace) -> Hub:
    from halfbyte.offline.hub import Hub

    return Hub(args.revision, args.token, args.cache_dir, progress(args))


def _convert(args: argparse.Namespace, prepared: Any, run: Any) -> int:
    """Show the plan, or carry it out and show the report."""
    from halfbyte.offline.options import RunOptions

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
    report = run(prepared, args.destination, _options(RunOptions, args), progress(args))
    if args.json:
        print_json(report.to_dict())
    elif not args.quiet:
        print_text(str(report))
    return EXIT_OK


def _check_destination(args: argparse.Namespace) -> None:
    if args.destination is None and not args.plan:
        raise ValueError("DST must be a folder to write to, got none; --plan shows what would be done without one")


# What applies to weights of one kind: the types, how messages call them, and the options.
_OF_A_KIND: tuple[tuple[set[str], str, tuple[str, ...]], ...] = (
    ({"nf4", "fp4"}, "a type of 4 bits", ("double_quant", "blocksize", "storage", "compute_dtype")),
    ({"int8"}, "the type int8", ("threshold",)),
)


def _check_format(args: argparse.Namespace, options: QuantizeOptions) -> None:
    """Refuse options of a kind of weights that neither --type nor a rule asks for: they would do nothing."""
    types = {options.quant_type, *(rule.rpartition("=")[2].strip() for rule in options.rules)}
    for kinds, called, names in _OF_A_KIND:
        for name in names:
            value = getattr(args, name)
            if value is not None and not types & kinds:
                raise ValueError(
                    f"--{name.replace('_', '-')} must only be given with {called} (in --type or a --rule), got {value}"
                )


def inspect(args: argparse.Namespace) -> int:
    """Show what a checkpoint holds."""
    from halfbyte.offline.inspect import inspect_checkpoint

    report = inspect_checkpoint(args.path, revision=args.revision, token=args.token, cache_dir=args.cache_dir)
    if args.json:
        print_json(report.to_dict())
    else:
        print_text(report.table(_terminal.stream_width(sys.stdout)))
    return EXIT_OK


def verify(args: argparse.Namespace) -> int:
    """Compare two checkpoints."""
    from halfbyte.offline.verify import verify_checkpoint

    report = verify_checkpoint(
        args.a,
        args.b,
        threads=args.threads,
        progress=progress(args),
        revision=args.revision,
        token=args.token,
        cache_dir=args.cache_dir,
    )
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
