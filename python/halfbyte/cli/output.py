"""Output of the command: results on standard output, everything else on standard error."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import suppress
from typing import Any, TextIO

from halfbyte import _terminal
from halfbyte.cli.exit_codes import PROG


def progress(args: argparse.Namespace) -> bool:
    """Whether to show progress. With --json only as a bar on a terminal, which does not disturb a program."""
    return not args.quiet and (not args.json or _terminal.is_terminal(sys.stderr))


class OutputError(OSError):
    """Standard output cannot be written to."""


def print_text(text: str) -> None:
    """A result on standard output."""
    if sys.stdout is None:
        return
    try:
        print(_terminal.plain_if_needed(text, sys.stdout))
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(error.errno, error.strerror) from error


def print_json(value: dict[str, Any]) -> None:
    """A result as JSON."""
    print_text(json.dumps(value, indent=2))


def say(text: str, stream: TextIO | None = None) -> None:
    """One line on standard error, whatever the text holds."""
    stream = stream if stream is not None else sys.stderr
    if stream is not None:
        with suppress(OSError, ValueError):
            print(_terminal.plain_if_needed(_terminal.printable(text), stream), file=stream)


def complain(message: str) -> None:
    """An error, as one line on standard error."""
    say(f"{PROG}: error: {message}")
