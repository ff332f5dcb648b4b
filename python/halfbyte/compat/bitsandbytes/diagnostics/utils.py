"""Headings and paragraphs of a report."""

from __future__ import annotations

import textwrap

from .._missing import missing_attribute

HEADER_WIDTH = 60


def print_header(txt: str, width: int = HEADER_WIDTH, filler: str = "=") -> None:
    """Print a heading."""
    print((f" {txt} " if txt else "").center(width, filler))


def print_dedented(text: str) -> None:
    """Print a paragraph without the indentation that it has in the source."""
    print(textwrap.dedent(text).strip())


__getattr__ = missing_attribute(__name__)
