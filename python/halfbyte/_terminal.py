"""What the command shows: sizes, durations, tables and progress, on terminals of any width and on pipes.

Standard library only: the command starts in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TextIO

_DECIMAL = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BINARY = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", re.ASCII)


# ---------------------------------------------------------------------------------------------------- sizes and times


def parse_size(text: str | int) -> int:
    """A number of bytes from ``5000000000``, ``"5GB"`` (10^9), ``"500MB"``, ``"1.5GB"`` or ``"2GiB"`` (2^30).

    The units are those of ``save_pretrained(max_shard_size=…)``. A final small ``b`` means bits there, which nobody
    wants here: it is refused.

    Raises
    ------
    ValueError
        The text is no size, or is less than one byte.
    """
    expected = "expected bytes, or a number with KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (of 1024)"
    if isinstance(text, bool) or not isinstance(text, (int, str)):
        raise ValueError(f"size is {text!r}: {expected}")
    if isinstance(text, int):
        value = text
    else:
        match = _SIZE.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"size is {text!r}: {expected}")
        number, unit = match.groups()
        scale = 1 if unit == "" else _DECIMAL.get(unit) or _BINARY.get(unit)
        if scale is None or (unit in ("", "B") and "." in number):
            raise ValueError(f"size is {text!r}: {expected}")
        # Exact for whole numbers of any length; a fraction is rounded down to a byte.
        value = int(number) * scale if "." not in number else int(float(number) * scale)
    if value < 1:
        raise ValueError(f"size is {text!r}: expected at least one byte")
    return value


def format_bytes(count: float) -> str:
    """``2.47 GB``: three digits and a decimal unit (powers of 1000), as disks and the hub count."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB", "PB"))


def format_count(count: float) -> str:
    """``1.24 B``: a number of weights in thousands, millions, billions."""
    return _scaled(count, ("", "K", "M", "B", "T")).rstrip()


def format_weights(count: float) -> str:
    """``1.24 B weights``."""
    return f"{format_count(count)} weights"


def _scaled(count: float, units: Sequence[str]) -> str:
    value, power = float(count), 0
    # 999.5 would be rounded to a fourth digit: the next unit starts there.
    while abs(value) >= 999.5 and power + 1 < len(units):
        value /= 1000
        power += 1
    unit = units[power]
    if power == 0:
        return f"{count:.0f} {unit}"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def format_seconds(seconds: float) -> str:
    """``0.82 s``, ``12.3 s``, ``2:05``, ``1:02:05``."""
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def plural(count: int, noun: str) -> str:
    """``1 file``, ``3 files``, ``1,024 tensors``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


# --------------------------------------------------------------------------------------------------------------- text


def printable(text: str) -> str:
    """The text on one line, with control characters and escape sequences spelled out.

    Names of tensors and files come from other people's checkpoints: none of them may move the cursor.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii") for c in text
    )


def shorten(text: str, width: int) -> str:
    """At most ``width`` characters, the middle of a longer text replaced by one ``…``."""
    if len(text) <= width:
        return text
    if width <= 1:
        return "…"[:width]
    tail = (width - 1) // 2
    return text[: width - 1 - tail] + "…" + (text[-tail:] if tail else "")


def wrap(text: str, width: int, indent: str = "", used: int = 0) -> str:
    """Words filled into lines of ``width`` characters; lines after the first start with ``indent``.

    ``used`` columns of the first line are taken. A word longer than a line is shortened.
    """
    lines: list[str] = []
    line = ""
    for whole in text.split():
        limit = max(width - (len(indent) if lines else used), 8)
        word = shorten(whole, limit)
        if line and len(line) + 1 + len(word) > limit:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    lines.append(line)
    return ("\n" + indent).join(lines)


def prepare_streams() -> None:
    """Let standard output and error print any name: what the encoding lacks is spelled out, never an exception."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            with contextlib.suppress(ValueError, OSError):
                reconfigure(errors="backslashreplace")


def plain_if_needed(text: str, stream: TextIO | None) -> str:
    """The text with arrows, dashes and ellipses in ASCII when the stream's encoding has none."""
    encoding = getattr(stream, "encoding", None) or "ascii"
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        for fancy, plain in (("→", "->"), ("…", "..."), ("·", "-"), ("█", "#"), ("░", "."), ("≥", ">="), ("×", "x")):
            text = text.replace(fancy, plain)
    return text


def stream_width(stream: TextIO | None) -> int | None:
    """Columns of the terminal behind ``stream`` (``COLUMNS`` first); None for files and pipes, which have no edge."""
    if not is_terminal(stream):
        return None
    return max(shutil.get_terminal_size((80, 24)).columns, 20)


def is_terminal(stream: TextIO | None) -> bool:
    """True when ``stream`` is a terminal that understands carriage returns."""
    if stream is None:  # closed before the interpreter started
        return False
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # closed
        return False


# ------------------------------------------------------------------------------------------------------------- tables


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Sequence[int] = (),
    shrink: Sequence[tuple[int, int]] = (),
    width: int | None = None,
) -> str:
    """A plain text table: two spaces between columns, a rule under the headers.

    Parameters
    ----------
    headers, rows
        Texts; every row has as many cells as there are headers.
    right
        Columns set flush right.
    shrink
        ``(column, least width)`` in the order in which columns give way when the table is wider than ``width``.
    width
        Columns of the terminal, or None for no limit. A table that cannot be made to fit is set as one paragraph
        per row instead.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max([len(header), *(len(row[i]) for row in cells)]) for i, header in enumerate(headers)]
    if width is not None:
        for column, least in shrink:
            excess = sum(widths) + 2 * (len(widths) - 1) - width
            if excess <= 0:
                break
            widths[column] = max(widths[column] - excess, min(least, widths[column]))
        if sum(widths) + 2 * (len(widths) - 1) > width:
            return _paragraphs(headers, cells, width)

    def line(row: Sequence[str]) -> str:
        parts = (
            shorten(cell, w).rjust(w) if i in right else shorten(cell, w).ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(parts).rstrip()

    rule = "  ".join("-" * w for w in widths)
    return "\n".join([line(headers), rule, *(line(row) for row in cells)])


def _paragraphs(headers: Sequence[str], rows: Iterable[Sequence[str]], width: int) -> str:
    """The first cell on a line of its own, the others below it as ``header value`` pairs."""
    out: list[str] = []
    for row in rows:
        out.append(shorten(row[0], width))
        pairs = " · ".join(f"{h} {c}".strip() for h, c in zip(headers[1:], row[1:], strict=True) if c)
        out.append("  " + wrap(pairs, max(width - 2, 10), "  "))
    return "\n".join(out)


# ----------------------------------------------------------------------------------------------------------- progress


class Bar:
    """One line on a terminal that shows how far the work is: share, bar, bytes, throughput, time left, subject.

    Call it with ``(bytes done, bytes in all, what is being worked on)``; it redraws at most ten times a second.
    Throughput is that of the last few seconds, so that the time left follows the machine.
    """

    INTERVAL = 0.1
    WINDOW = 3.0

    def __init__(self, verb: str, stream: TextIO | None = None, unit: Callable[[float], str] = format_bytes) -> None:
        self._verb = verb
        self._unit = unit
        self._stream: TextIO | None = stream if stream is not None else sys.stderr
        self._seen: deque[tuple[float, int]] = deque()
        self._drawn = -self.INTERVAL
        self._visible = False

    def __call__(self, done: int, total: int, label: str) -> None:
        """Show the state; see the class."""
        now = time.monotonic()
        if now - self._drawn < self.INTERVAL and done < total:
            return
        self._drawn = now
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[0][0] > self.WINDOW:
            self._seen.popleft()
        self._write("\r" + self.line(done, total, label) + "\x1b[K")
        self._visible = True

    def line(self, done: int, total: int, label: str) -> str:
        """The text of the bar, one column narrower than the terminal."""
        width = (stream_width(self._stream) or 80) - 1
        share = min(done / total, 1.0) if total > 0 else 1.0
        (t0, d0), (t1, d1) = (self._seen[0], self._seen[-1]) if self._seen else ((0.0, 0), (0.0, 0))
        rate = (d1 - d0) / (t1 - t0) if t1 > t0 else 0.0
        parts = [f"{self._verb} {share:4.0%}"]
        numbers = [f"{self._unit(done)} of {self._unit(total)}"]
        if rate > 0:
            numbers.append(f"{self._unit(rate)}/s")
            if done < total:
                minutes, seconds = divmod(round((total - done) / rate), 60)
                numbers.append(f"{minutes}:{seconds:02} left")
        used = len(parts[0]) + sum(len(n) + 2 for n in numbers)
        if width - used >= 14:
            cells = min(24, width - used - 2)
            filled = int(share * cells)
            parts.append("█" * filled + "░" * (cells - filled))
            used += cells + 2
        for number in numbers:
            parts.append(number)
        if label and width - used >= 14:
            parts.append(shorten(printable(label), width - used - 2))
        return plain_if_needed(shorten("  ".join(parts), width), self._stream)

    def close(self) -> None:
        """Wipe the line."""
        if self._visible:
            self._write("\r\x1b[K")
            self._visible = False

    def _write(self, text: str) -> None:
        # A terminal that went away must not stop the work.
        if self._stream is None:
            return
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()


class Lines:
    """Progress where no line can be redrawn: one line at the start and one for each file that is complete.

    Parameters
    ----------
    verb
        What is being done: ``"quantizing"``.
    files
        Names of the files that will be made.
    complete
        Tells whether the file of a name is complete.
    """

    def __init__(
        self,
        verb: str,
        files: Sequence[str],
        complete: Callable[[str], bool],
        stream: TextIO | None = None,
        unit: Callable[[float], str] = format_bytes,
    ) -> None:
        self._verb = verb
        self._unit = unit
        self._count = len(files)
        # A resumed run finds some.
        self._pending = [name for name in files if not complete(name)]
        self._before = self._count - len(self._pending)
        self._complete = complete
        self._stream: TextIO | None = stream if stream is not None else sys.stderr
        self._started = False

    def __call__(self, done: int, total: int, label: str) -> None:
        """Say what is new; see the class."""
        if not self._started:
            # Work that is refused at once is never announced.
            if done == 0 and not label:
                return
            self._started = True
            made = f" into {plural(self._count, 'file')}" if self._count else ""
            made += f", {self._before:,} complete already" if self._before else ""
            self._say(f"{self._verb} {self._unit(total)}{made}")
        share = f", {min(done / total, 1):.0%}" if total > 0 else ""
        for name in [name for name in self._pending if self._complete(name)]:
            self._pending.remove(name)
            self._say(f"{printable(name)} complete ({self._count - len(self._pending):,} of {self._count:,}{share})")

    def close(self) -> None:
        """Nothing is left to do."""

    def _say(self, text: str) -> None:
        if self._stream is None:
            return
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(plain_if_needed(text, self._stream) + "\n")
            self._stream.flush()


def progress_display(
    verb: str, files: Sequence[str], complete: Callable[[str], bool], unit: Callable[[float], str]
) -> Bar | Lines:
    """A `Bar` when standard error is a terminal, else `Lines`."""
    return Bar(verb, unit=unit) if is_terminal(sys.stderr) else Lines(verb, files, complete, unit=unit)
