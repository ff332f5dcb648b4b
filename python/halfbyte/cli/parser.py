"""The command line: commands, options and their help."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from halfbyte import _terminal
from halfbyte.cli import commands
from halfbyte.cli.completion import SHELLS
from halfbyte.cli.exit_codes import EXIT_CODES, EXIT_OK, EXIT_USAGE, PROG, describe
from halfbyte.cli.output import complain, print_text
from halfbyte.offline.choices import BLOCK_SIZES, FLOAT_DTYPES, SELECTIONS, STORAGE_DTYPES, WEIGHT_TYPES


class _Parser(argparse.ArgumentParser):
    """Errors in the form of all of this command's errors: one line."""

    def error(self, message: str) -> NoReturn:
        complain(f"{message} (see: {self.prog} --help)")
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
            complain(message)
            parser.exit(code)
        print_text(f"{PROG} {__version__}")
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


def _threshold(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a finite number of at least 0")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    parser = _Parser(
        prog=PROG,
        description="Quantize model checkpoints to 4 or 8 bits on disk, in the format of bitsandbytes: without a GPU,\n"
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
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")

    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on standard output, nothing else")
    quiet = _Parser(add_help=False)
    quiet.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    threads = _Parser(add_help=False)
    threads.add_argument("--threads", type=_positive, metavar="N", help="threads to use (default: one per usable core)")

    hub = _Parser(add_help=False)
    names = hub.add_argument_group("names on the hub")
    names.add_argument("--revision", metavar="REV", help="branch, tag or commit (default: the main branch)")
    names.add_argument("--token", help="access token (default: the one that hf auth login has stored)")
    names.add_argument("--cache-dir", metavar="DIR", help="folder of downloaded files (default: huggingface_hub's)")

    def add(name: str, parents: Sequence[_Parser], summary: str, text: str, examples: str) -> Any:
        return subparsers.add_parser(
            name,
            parents=parents,
            help=summary,
            description=text,
            epilog=f"examples:\n{examples}\n\n{EXIT_CODES}",
            formatter_class=_Formatter,
            allow_abbrev=False,
        )

    _add_quantize(add("quantize", [hub, threads, quiet, common], *_QUANTIZE_TEXT))
    _add_dequantize(add("dequantize", [hub, threads, quiet, common], *_DEQUANTIZE_TEXT))

    sub = add("inspect", [hub, common], *_INSPECT_TEXT)
    sub.add_argument("path", metavar="PATH", help="a checkpoint's folder, a .safetensors file, or a name on the hub")
    sub.set_defaults(run=commands.inspect)

    sub = add("verify", [hub, threads, quiet, common], *_VERIFY_TEXT)
    sub.add_argument("a", metavar="A", help="the original, or a quantized checkpoint")
    sub.add_argument("b", metavar="B", help="the quantized checkpoint to be checked")
    sub.set_defaults(run=commands.verify)

    sub = add("run", [], *_RUN_TEXT)
    sub.add_argument("program", metavar="PROGRAM", nargs=argparse.REMAINDER, help="script.py ARG…, or -m MODULE ARG…")

    sub = add("doctor", [common], *_DOCTOR_TEXT)
    sub.set_defaults(run=commands.examine)

    sub = add("completion", [], *_COMPLETION_TEXT)
    sub.add_argument("shell", choices=SHELLS, help="the shell to complete in")
    sub.set_defaults(run=commands.complete)
    return parser


_QUANTIZE_TEXT = (
    "quantize a 16- or 32-bit checkpoint to 4 or 8 bits",
    "Quantize the linear layers of a safetensors checkpoint to NF4, FP4 or int8 (LLM.int8()): the ones that\n"
    "transformers would quantize.\n"
    "Files appear when they are complete. --resume continues an interrupted run. The source is never changed.",
    "  halfbyte quantize Llama-3.2-1B Llama-3.2-1B-nf4\n"
    "  halfbyte quantize Llama-3.2-1B --plan\n"
    "  halfbyte quantize meta-llama/Llama-3.2-1B out --type fp4 --no-double-quant\n"
    "  halfbyte quantize Llama-3.2-1B Llama-3.2-1B-int8 --type int8\n"
    "  halfbyte quantize model out --rule 'layers\\.(0|31)\\.=keep' --rule 'mlp=fp4' --max-shard-size 2GB",
)
_DEQUANTIZE_TEXT = (
    "write the values of a quantized checkpoint as a 16- or 32-bit one",
    "Dequantize a 4- or 8-bit checkpoint, so that any tool can read it. What quantization lost does not come back.",
    "  halfbyte dequantize Llama-3.2-1B-nf4 Llama-3.2-1B-back --dtype bfloat16",
)
_INSPECT_TEXT = (
    "show what a checkpoint holds: what is quantized, how, sizes",
    "Show what a folder or a .safetensors file holds. Only headers and quantization states are read.",
    "  halfbyte inspect Llama-3.2-1B-nf4\n  halfbyte inspect model.safetensors --json",
)
_VERIFY_TEXT = (
    "compare a quantized checkpoint with its original",
    "Compare every quantized weight of B with a fresh quantization of A, byte for byte. Where they differ, show the\n"
    "error of the dequantized values. A may be quantized too.",
    "  halfbyte verify Llama-3.2-1B Llama-3.2-1B-nf4",
)
_RUN_TEXT = (
    "run a Python program with halfbyte in place of bitsandbytes",
    "Run a script or a module as python would. There and in child processes,\n`import bitsandbytes` is halfbyte.",
    "  halfbyte run train.py --epochs 3\n  halfbyte run -m torch.distributed.run --nproc-per-node 2 train.py",
)
_DOCTOR_TEXT = (
    "show what this machine offers and which libraries it has",
    "Show the processor and the kernels chosen for it, memory, disk, GPUs and driver, and library versions.",
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
    form.add_argument(
        "--type", dest="quant_type", choices=WEIGHT_TYPES, help="what weights become: 4 bits, or 8 (default: nf4)"
    )
    form.add_argument(
        "--double-quant",
        action=argparse.BooleanOptionalAction,
        help="4 bits: quantize the scales too, which saves 0.37 bits per weight (default: yes)",
    )
    form.add_argument(
        "--blocksize",
        type=int,
        choices=BLOCK_SIZES,
        metavar="N",
        help=f"4 bits: weights per scale: {', '.join(map(str, BLOCK_SIZES))} (default: 64, as transformers quantizes; "
        "the others load too, but on a CPU bitsandbytes only multiplies correctly when N divides every layer's width)",
    )
    form.add_argument(
        "--storage",
        choices=STORAGE_DTYPES,
        help="4 bits: dtype label of the packed bytes (default: uint8; for FSDP, use the compute dtype)",
    )
    form.add_argument(
        "--compute-dtype",
        choices=FLOAT_DTYPES,
        help="4 bits: dtype that loaders compute in, written to config.json (default: the model's)",
    )
    form.add_argument(
        "--threshold",
        type=_threshold,
        metavar="X",
        help="8 bits: loaders multiply inputs of at least X in 16 bits, written to config.json (default: 6.0; 0: none)",
    )
    form.add_argument(
        "--dtype",
        choices=FLOAT_DTYPES,
        help="dtype to cast weights to before they are quantized or kept (default: the dtype in config.json, in which "
        "transformers loads the model)",
    )
    which = sub.add_argument_group("which tensors")
    which.add_argument(
        "--rule",
        dest="rules",
        action="append",
        metavar="REGEX=nf4|fp4|int8|keep",
        help="decide for tensors whose name matches REGEX anywhere; repeatable, the first match wins",
    )
    which.add_argument(
        "--skip",
        action="append",
        metavar="NAME",
        help="keep a module, in addition to transformers' defaults; repeatable",
    )
    which.add_argument(
        "--selection",
        choices=SELECTIONS,
        help="how linear layers are found. rules: from config, names and shapes (default); transformers: by the "
        "installed transformers",
    )
    which.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="with --selection transformers: run the code that comes with the checkpoint",
    )
    which.add_argument("--allow-nonfinite", action="store_true", help="continue when a weight holds NaN or Inf")
    which.add_argument("--plan", action="store_true", help="show what would be done and write nothing")
    _add_output(sub)
    sub.set_defaults(run=commands.quantize)


def _add_dequantize(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("source", metavar="SRC", help="a folder with quantized weights, or a name on the hub (org/name)")
    sub.add_argument("destination", metavar="DST", nargs="?", help="folder to write (not needed with --plan)")
    sub.add_argument(
        "--dtype",
        choices=FLOAT_DTYPES,
        help="dtype to write (default: what each weight was before; of 8-bit ones, that in config.json)",
    )
    sub.add_argument("--plan", action="store_true", help="show what would be done and write nothing")
    _add_output(sub)
    sub.set_defaults(run=commands.dequantize)


def _add_output(sub: argparse.ArgumentParser) -> None:
    output = sub.add_argument_group("output")
    output.add_argument(
        "--max-shard-size", type=_size, metavar="SIZE", help="most bytes of an output file: 500MB, 2GiB (default: 5GB)"
    )
    state = output.add_mutually_exclusive_group()
    state.add_argument("--overwrite", action="store_true", help="replace an earlier output in DST")
    state.add_argument("--resume", action="store_true", help="continue an interrupted run with the same arguments")
    output.add_argument(
        "--no-fsync", dest="fsync", action="store_false", help="do not wait for the disk after each file"
    )
