# PYTHON_ARGCOMPLETE_OK
"""The command `halfbyte`.

Only the standard library is imported before the arguments are parsed, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from halfbyte import _terminal
from halfbyte.cli.commands import run_program
from halfbyte.cli.completion import answer_shell
from halfbyte.cli.exit_codes import EXIT_PIPE, EXIT_SYSTEM, EXIT_USAGE, PROG, describe
from halfbyte.cli.output import OutputError, complain, say
from halfbyte.cli.parser import build_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and give its exit code. `--help`, `--version` and wrong options raise SystemExit."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["run"] and len(arguments) > 1 and arguments[1] not in ("-h", "--help"):
        return run_program(arguments[1:])
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
        complain(f"standard output: {error.strerror or error}")
        return EXIT_SYSTEM


def _main(arguments: list[str]) -> int:
    parser = build_parser()
    answer_shell(parser)
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
    except (BrokenPipeError, OutputError, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if os.environ.get("HALFBYTE_TRACEBACK") == "1":
            import traceback

            traceback.print_exc()
        code, message = describe(error, arguments)
        if isinstance(error, KeyboardInterrupt):
            say(f"{PROG}: {message}")
        else:
            complain(message)
        return code


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
