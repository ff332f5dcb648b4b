"""The command `halfbyte`.

Only the standard library is imported before the arguments are read: `--help` and completion answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from halfbyte import _terminal

if TYPE_CHECKING:
    from halfbyte.offline.plan import CheckpointPlan

PROG = "halfbyte"

EXIT_OK = 0
EXIT_DIFFERENT = 1
EXIT_USAGE = 2
EXIT_INPUT = 3
EXIT_SYSTEM = 4
EXIT_INTERNAL = 70
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141

EXIT_CODES = """\
exit codes:
  0    done
  1    verify: the checkpoints differ
  2    wrong usage: an option, an argument, a destination in use
  3    wrong input: a checkpoint that is missing, broken, or unsuitable
  4    the system refused: permissions, disk, memory, network, a missing package
  70   an error in halfbyte itself
  130  interrupted by Ctrl-C or SIGTERM
  141  the reader of the output went away

HALFBYTE_TRACEBACK=1 shows where an error came from."""

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STORAGE_DTYPES = ("uint8", "int8", "float16", "bfloat16", "float32", "float64")
FLOAT_DTYPES = ("bfloat16", "float16", "float32")

# Files that are not copied, of which a run tells: the folders of exports hold many.
_LEFT_OUT_SHOWN = 5


# ------------------------------------------------------------------------------------------------------------- parser


class _Parser(argparse.ArgumentParser):
    """Errors in the form of all of this command's errors: one line."""

    def error(self, message: str) -> NoReturn:
        _complain(f"{message} (see: {self.prog} --help)")
        sys.exit(EXIT_USAGE)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written, and a first column wide enough for every command's name."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26)


class _Version(argparse.Action):
    """Prints the version; the compiled core is imported for that alone."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        try:
            from halfbyte._native import __version__
        except ImportError as error:
            code, message = describe(error)
            _complain(message)
            parser.exit(code)
        _print(f"{PROG} {__version__}")
        parser.exit(EXIT_OK)


def _size(text: str) -> int:
    try:
        return _terminal.parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 7 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    parser = _Parser(
        prog=PROG,
        description="Quantize model checkpoints to 4 bits on disk, in the format of bitsandbytes: without a GPU,\n"
        "without torch, in little memory. Stock transformers, PEFT and vLLM load the result.",
        epilog="examples:\n"
        "  halfbyte quantize Llama-3.2-1B Llama-3.2-1B-nf4\n"
        "  halfbyte quantize Llama-3.2-1B --plan\n"
        "  halfbyte verify Llama-3.2-1B Llama-3.2-1B-nf4\n"
        "  halfbyte COMMAND --help\n\n" + EXIT_CODES,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")

    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on standard output, nothing else")
    quiet = _Parser(add_help=False)
    quiet.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    threads = _Parser(add_help=False)
    threads.add_argument("--threads", type=_positive, metavar="N", help="threads to use (default: one per usable core)")

    def add(name: str, parents: Sequence[_Parser], summary: str, text: str, examples: str) -> Any:
        return commands.add_parser(
            name,
            parents=parents,
            help=summary,
            description=text,
            epilog=f"examples:\n{examples}\n\n{EXIT_CODES}",
            formatter_class=_Formatter,
            allow_abbrev=False,
        )

    _add_quantize(add("quantize", [threads, quiet, common], *_QUANTIZE_TEXT))
    _add_dequantize(add("dequantize", [threads, quiet, common], *_DEQUANTIZE_TEXT))

    sub = add("inspect", [common], *_INSPECT_TEXT)
    sub.add_argument("path", metavar="PATH", help="a checkpoint's folder, a .safetensors file, or a name on the hub")
    sub.set_defaults(run=_inspect)

    sub = add("verify", [threads, quiet, common], *_VERIFY_TEXT)
    sub.add_argument("a", metavar="A", help="the original, or a quantized checkpoint")
    sub.add_argument("b", metavar="B", help="the quantized checkpoint to be checked")
    sub.set_defaults(run=_verify)

    sub = add("run", [], *_RUN_TEXT)
    sub.add_argument("program", metavar="PROGRAM", nargs=argparse.REMAINDER, help="script.py ARG…, or -m MODULE ARG…")

    sub = add("doctor", [common], *_DOCTOR_TEXT)
    sub.set_defaults(run=_doctor)

    sub = add("completion", [], *_COMPLETION_TEXT)
    sub.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell to complete in")
    sub.set_defaults(run=_completion)
    return parser


_QUANTIZE_TEXT = (
    "turn a 16- or 32-bit checkpoint into a 4-bit one",
    "Quantize the linear layers of a safetensors checkpoint to NF4 or FP4: those that transformers would quantize.\n"
    "Files appear when they are complete; an interrupted run goes on with --resume. The source is never changed.",
    "  halfbyte quantize Llama-3.2-1B Llama-3.2-1B-nf4\n"
    "  halfbyte quantize Llama-3.2-1B --plan\n"
    "  halfbyte quantize meta-llama/Llama-3.2-1B out --type fp4 --no-double-quant\n"
    "  halfbyte quantize model out --rule 'layers\\.(0|31)\\.=keep' --rule 'mlp=fp4' --max-shard-size 2GB",
)
_DEQUANTIZE_TEXT = (
    "turn a 4-bit checkpoint back into a 16- or 32-bit one",
    "Write the values that a 4-bit checkpoint stands for, so that any tool can read it.",
    "  halfbyte dequantize Llama-3.2-1B-nf4 Llama-3.2-1B-back --dtype bfloat16",
)
_INSPECT_TEXT = (
    "show what a checkpoint holds: what is quantized, how, sizes",
    "Show what a folder or a single .safetensors file of any origin holds. Only headers and states are read.",
    "  halfbyte inspect Llama-3.2-1B-nf4\n  halfbyte inspect model.safetensors --json",
)
_VERIFY_TEXT = (
    "compare a quantized checkpoint with its original",
    "Compare every quantized weight of B with a fresh quantization of A, byte for byte; where they differ, the error\n"
    "of the dequantized values is shown. A may be quantized too.",
    "  halfbyte verify Llama-3.2-1B Llama-3.2-1B-nf4",
)
_RUN_TEXT = (
    "run a Python program with halfbyte in place of bitsandbytes",
    "Run a script or a module as python would. There and in child processes,\n`import bitsandbytes` is halfbyte.",
    "  halfbyte run train.py --epochs 3\n  halfbyte run -m torch.distributed.run --nproc-per-node 2 train.py",
)
_DOCTOR_TEXT = (
    "show what this machine offers and which libraries it has",
    "Show the processor and the kernels chosen for it, memory, disk, GPU and driver, and versions of libraries.",
    "  halfbyte doctor --json",
)
_COMPLETION_TEXT = (
    "print a completion script for a shell",
    "Print a script that completes this command's arguments.",
    '  eval "$(halfbyte completion bash)"\n  halfbyte completion fish > ~/.config/fish/completions/halfbyte.fish',
)


def _add_quantize(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("source", metavar="SRC", help="a folder of safetensors, or a name on the hub (org/name)")
    sub.add_argument("destination", metavar="DST", nargs="?", help="folder to write (not needed with --plan)")
    form = sub.add_argument_group("format")
    form.add_argument("--type", choices=("nf4", "fp4"), default="nf4", help="codebook (default: nf4)")
    form.add_argument(
        "--double-quant",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="quantize the scales too, which saves 0.37 bits per weight (default: yes)",
    )
    form.add_argument(
        "--blocksize",
        type=int,
        choices=BLOCK_SIZES,
        default=64,
        metavar="N",
        help=f"weights per scale: {', '.join(map(str, BLOCK_SIZES))} (default: 64, as transformers quantizes; the "
        "others load as well, but on a CPU bitsandbytes multiplies only when N divides the width of every layer)",
    )
    form.add_argument(
        "--storage",
        choices=STORAGE_DTYPES,
        default="uint8",
        help="dtype that packed bytes are stored as (default: uint8; FSDP wants the compute dtype)",
    )
    form.add_argument(
        "--compute-dtype",
        choices=FLOAT_DTYPES,
        default=None,
        help="dtype that loaders multiply in, written to config.json (default: the model's)",
    )
    form.add_argument(
        "--dtype",
        choices=FLOAT_DTYPES,
        help="dtype to cast weights to before they are quantized or kept (default: that of config.json, which is what "
        "transformers loads a model in)",
    )
    which = sub.add_argument_group("which tensors")
    which.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="REGEX=nf4|fp4|keep",
        help="decide for tensors whose name REGEX is found in; repeatable, the first match wins",
    )
    which.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="NAME",
        help="keep a module, in addition to those that transformers keeps; repeatable",
    )
    which.add_argument(
        "--selection",
        choices=("rules", "transformers"),
        default="rules",
        help="who decides what is a linear layer. rules: config, names and shapes (default); transformers: the "
        "installed one is asked",
    )
    which.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="with --selection transformers: run the code that comes with the checkpoint",
    )
    which.add_argument("--allow-nonfinite", action="store_true", help="go on when a weight holds NaN or infinities")
    which.add_argument("--plan", action="store_true", help="show what would be done, and do nothing")
    _add_output(sub)
    sub.set_defaults(run=_quantize)


def _add_dequantize(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("source", metavar="SRC", help="a folder with 4-bit weights, or a name on the hub (org/name)")
    sub.add_argument("destination", metavar="DST", nargs="?", help="folder to write (not needed with --plan)")
    sub.add_argument("--dtype", choices=FLOAT_DTYPES, help="dtype to write (default: what each weight was before)")
    sub.add_argument("--plan", action="store_true", help="show what would be done, and do nothing")
    _add_output(sub)
    sub.set_defaults(run=_dequantize)


def _add_output(sub: argparse.ArgumentParser) -> None:
    output = sub.add_argument_group("output")
    output.add_argument(
        "--max-shard-size", type=_size, metavar="SIZE", help="most bytes of an output file: 500MB, 2GiB (default: 5GB)"
    )
    state = output.add_mutually_exclusive_group()
    state.add_argument("--overwrite", action="store_true", help="replace an earlier output in DST")
    state.add_argument("--resume", action="store_true", help="go on with an interrupted run of the same arguments")
    output.add_argument("--no-fsync", action="store_true", help="do not wait for the disk after each file")


# ----------------------------------------------------------------------------------------------------------- commands


def _quantize(args: argparse.Namespace) -> int:
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
        hub_progress=_progress(args),
    )
    return _convert(args, prepared, run_quantize)


def _dequantize(args: argparse.Namespace) -> int:
    from halfbyte.offline.dequantize import prepare_dequantize, run_dequantize

    _check_destination(args)
    prepared = prepare_dequantize(
        args.source, dtype=args.dtype, max_shard_size=args.max_shard_size, hub_progress=_progress(args)
    )
    return _convert(args, prepared, run_dequantize)


def _convert(args: argparse.Namespace, prepared: Any, run: Any) -> int:
    """Show the plan, or carry it out and show the report."""
    plan: CheckpointPlan = prepared.plan
    if args.plan:
        if args.json:
            _print_json(plan.to_dict())
        elif not args.quiet:
            _print(plan.table(_terminal.stream_width(sys.stdout)))
        return EXIT_OK
    if not args.quiet and not args.json:
        for note in plan.notes:
            _say(f"note: {note}")
        for left in plan.left_out[:_LEFT_OUT_SHOWN]:
            _say(f"left out: {left}")
        if len(plan.left_out) > _LEFT_OUT_SHOWN:
            _say(f"left out: {len(plan.left_out) - _LEFT_OUT_SHOWN} more files, which --plan lists")
    report = run(
        prepared,
        args.destination,
        overwrite=args.overwrite,
        resume=args.resume,
        threads=args.threads,
        fsync=not args.no_fsync,
        progress=_progress(args),
    )
    if args.json:
        _print_json(report.to_dict())
    elif not args.quiet:
        _print(str(report))
    return EXIT_OK


def _check_destination(args: argparse.Namespace) -> None:
    if args.destination is None and not args.plan:
        raise ValueError("DST is missing: name a folder to write to, or add --plan to see what would be done")


def _inspect(args: argparse.Namespace) -> int:
    from halfbyte.offline.inspect import inspect_checkpoint

    report = inspect_checkpoint(args.path)
    if args.json:
        _print_json(report.to_dict())
    else:
        _print(report.table(_terminal.stream_width(sys.stdout)))
    return EXIT_OK


def _verify(args: argparse.Namespace) -> int:
    from halfbyte.offline.verify import verify_checkpoint

    report = verify_checkpoint(args.a, args.b, threads=args.threads, progress=_progress(args))
    if args.json:
        _print_json(report.to_dict())
    elif not args.quiet:
        _print(report.table(_terminal.stream_width(sys.stdout)))
    return EXIT_OK if report.ok else EXIT_DIFFERENT


def _doctor(args: argparse.Namespace) -> int:
    from halfbyte.cli import doctor

    found = doctor.examine()
    if args.json:
        _print_json(found)
    else:
        _print(doctor.render(found))
    return EXIT_OK


def _completion(args: argparse.Namespace) -> int:
    from halfbyte.cli import completion

    _print(completion.script(args.shell, build_parser()).rstrip("\n"))
    return EXIT_OK


def _run(program: list[str]) -> int:
    """Run another program: before the parser, and outside of what reports errors, which are the program's own."""
    if program[0].startswith("-") and (program[0] != "-m" or len(program) < 2):
        _complain(f"run: expected script.py or -m MODULE, got {program[0]!r} (see: {PROG} run --help)")
        return EXIT_USAGE
    from halfbyte.compat.run import run

    run(program)
    return EXIT_OK


# ------------------------------------------------------------------------------------------------------------- output


def _progress(args: argparse.Namespace) -> bool:
    """Whether to show progress: lines would disturb a program that reads the JSON, a bar on a terminal does not."""
    return not args.quiet and (not args.json or _terminal.is_terminal(sys.stderr))


class _OutputError(OSError):
    """Standard output cannot be written to."""


def _print(text: str) -> None:
    if sys.stdout is None:
        return
    try:
        print(_terminal.plain_if_needed(text, sys.stdout))
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _OutputError(error.errno, error.strerror) from error


def _print_json(value: dict[str, Any]) -> None:
    _print(json.dumps(value, indent=2))


def _say(text: str, stream: TextIO | None = None) -> None:
    """One line on standard error, whatever the text holds."""
    stream = stream if stream is not None else sys.stderr
    if stream is not None:
        with suppress(OSError, ValueError):
            print(_terminal.plain_if_needed(_terminal.printable(text), stream), file=stream)


def _complain(message: str) -> None:
    _say(f"{PROG}: error: {message}")


# --------------------------------------------------------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and give its exit code. `--help`, `--version` and wrong options raise SystemExit."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["run"] and len(arguments) > 1 and arguments[1] not in ("-h", "--help"):
        return _run(arguments[1:])
    _terminal.prepare_streams()
    try:
        try:
            return _main(arguments)
        finally:
            # Here, where a pipe that broke or a disk that is full can still be answered for.
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        _detach_stdout()
        return EXIT_PIPE
    except OSError as error:
        _detach_stdout()
        _complain(f"standard output: {error.strerror or error}")
        return EXIT_SYSTEM


def _main(arguments: list[str]) -> int:
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.command is None:
        parser.print_help()
        return EXIT_USAGE
    if args.command == "run":
        parser.error("run: expected script.py or -m MODULE")
    try:
        with _sigterm_interrupts():
            code: int = args.run(args)
        return code
    except (BrokenPipeError, _OutputError, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if os.environ.get("HALFBYTE_TRACEBACK") == "1":
            import traceback

            traceback.print_exc()
        code, message = describe(error, arguments)
        if isinstance(error, KeyboardInterrupt):
            _say(f"{PROG}: {message}")
        else:
            _complain(message)
        return code


def describe(error: BaseException, arguments: Sequence[str] = ()) -> tuple[int, str]:
    """Exit code and message for what a command raised."""
    text = str(error)
    try:
        from halfbyte._native import CheckpointError
    except Exception as broken:  # nothing works without it, and this is why
        return EXIT_SYSTEM, f"halfbyte's compiled module cannot be loaded, reinstall halfbyte: {broken}"
    if isinstance(error, KeyboardInterrupt):
        if getattr(error, "total", None) is None:
            return EXIT_INTERRUPTED, "interrupted"
        return EXIT_INTERRUPTED, f"{text}; continue with: {resume_command(arguments)}"
    if isinstance(error, CheckpointError):
        return EXIT_INPUT, text
    if isinstance(error, (ValueError, TypeError)):
        return EXIT_USAGE, text
    if isinstance(error, MemoryError):
        return EXIT_SYSTEM, text or "not enough memory"
    if isinstance(error, OSError):
        if error.strerror:
            named = error.filename is not None
            text = f"{os.fsdecode(error.filename)}: {error.strerror}" if named else error.strerror
        return EXIT_SYSTEM, text or type(error).__name__
    if isinstance(error, ImportError):
        return EXIT_SYSTEM, text
    hint = "please report it with the output of HALFBYTE_TRACEBACK=1"
    return EXIT_INTERNAL, f"internal error: {type(error).__name__}: {text} ({hint})"


def resume_command(arguments: Sequence[str]) -> str:
    """The command line that goes on where this one stopped."""
    kept = [a for a in arguments if a not in ("--overwrite", "--resume")]
    # Behind a lone "--" it would be read as a path.
    place = kept.index("--") if "--" in kept else len(kept)
    return shlex.join([PROG, *kept[:place], "--resume", *kept[place:]])


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Inside the block, SIGTERM stops the work as cleanly as Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread: the signals are someone else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _detach_stdout() -> None:
    """Point standard output at nothing, so that the interpreter's last flush has nothing to fail on."""
    with suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)


if __name__ == "__main__":
    sys.exit(main())
