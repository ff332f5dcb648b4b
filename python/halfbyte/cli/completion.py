"""Completion in bash, zsh and fish, by argcomplete: the shell asks the command, which asks its own parser."""

from __future__ import annotations

import argparse
import os

from halfbyte.cli.exit_codes import PROG

SHELLS = ("bash", "zsh", "fish")


def script(shell: str) -> str:
    """The lines that a shell evaluates to complete this command's arguments."""
    from argcomplete.shell_integration import shellcode

    text: str = shellcode([PROG], shell=shell)
    return text


def answer_shell(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks for completions, and exit; return at once when none does."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)
