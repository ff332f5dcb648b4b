"""The exit codes, and the code and message of each failure."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence

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
    # After a lone "--" it would be read as a path.
    place = kept.index("--") if "--" in kept else len(kept)
    return shlex.join([PROG, *kept[:place], "--resume", *kept[place:]])
