"""Text for terminals and pipes: sizes, durations, tables and progress.

rich draws tables and bars. It is imported by the functions that draw, so that `halfbyte --help` starts without it.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_DECIMAL = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BINARY = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", re.ASCII)


# ---------------------------------------------------------------------------------------------------- sizes and times


def parse_size(text: str | int) -> int:
    """Parse a number of bytes: ``5000000000``, ``"5GB"`` (10^9), ``"500MB"``, ``"1.5GB"`` or ``"2GiB"`` (2^30).

    The units are those of ``save_pretrained(max_shard_size=…)``. That function reads a final lower-case ``b`` as bits;
    here it is an error.

    Args:
        text: A number of bytes, or a number with a unit.

    Returns:
        The number of bytes, at least 1. Fractions are rounded down.

    Raises:
        ValueError: The text is not a size, or is less than one byte.
    """
    units = "KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024)"
    expected = f"a number of bytes, or a number with {units}"
    if isinstance(text, bool) or not isinstance(text, (int, str)):
        raise ValueError(f"size must be {expected}, got {text!r}")
    if isinstance(text, int):
        value = text
    else:
        match = _SIZE.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"size must be {expected}, got {text!r}")
        number, unit = match.groups()
        scale = 1 if unit == "" else _DECIMAL.get(unit) or _BINARY.get(unit)
        if scale is None or (unit in ("", "B") and "." in number):
            raise ValueError(f"size must be {expected}, got {text!r}")
        # Exact for whole numbers of any length; a fraction is rounded down to a byte.
        value = int(number) * scale if "." not in number else int(float(number) * scale)
    if value < 1:
        raise ValueError(f"size must be at least one byte, got {text!r}")
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

    Names of tensors and files come from untrusted checkpoints and must not control the terminal.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii") for c in text
    )


def wrap(text: str, width: int, indent: str = "", used: int = 0) -> str:
    """Fill words into lines of at most ``width`` columns; lines after the first start with ``indent``.

    Args:
        text: Words. Words longer than a line are broken.
        width: Columns of a line.
        indent: Start of every line but the first.
        used: Columns of the first line that are already taken.
    """
    width = max(width, len(indent) + 8, used + 8)
    lines = textwrap.wrap(text, width, initial_indent=" " * used, subsequent_indent=indent)
    return "\n".join(lines)[used:]


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
        for fancy, plain in (("→", "->"), ("…", "..."), ("·", "-"), ("─", "-"), ("≥", ">="), ("×", "x")):
            text = text.replace(fancy, plain)
    return text


def stream_width(stream: TextIO | None) -> int | None:
    """Columns of the terminal behind ``stream`` (``COLUMNS`` first); None for files and pipes, which have no edge."""
    if stream is None or not is_terminal(stream):
        return None
    return max(terminal_console(stream).width, 20)


def terminal_console(stream: TextIO) -> Console:
    """A rich console for a stream of which `is_terminal` is true.

    The decision is not left to rich: it takes ``FORCE_COLOR``, which many CI systems set, for a terminal.
    """
    from rich.console import Console

    return Console(file=stream, force_terminal=True, force_jupyter=False, markup=False, emoji=False, highlight=False)


def is_terminal(stream: TextIO | None) -> bool:
    """True when ``stream`` is a terminal that understands carriage returns."""
    if stream is None:  # closed before the interpreter started
        return False
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # closed
        return False


# ------------------------------------------------------------------------------------------------------------- tables


# rich takes about a millisecond for each row; nobody reads this many on a terminal.
_MOST_DRAWN = 500


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Sequence[int] = (),
    shrink: Sequence[tuple[int, int]] = (),
    width: int | None = None,
) -> str:
    """Lay out a plain text table: two spaces between columns, a rule under the headers.

    Cells are text, never rich's markup. Control characters in them are escaped.

    Args:
        headers: One text for each column.
        rows: Texts; every row has as many cells as there are headers.
        right: Columns set flush right.
        shrink: ``(column, least width)`` of the columns whose cells may wrap when the table is wider than ``width``.
        width: Columns of the terminal, or None for a file or pipe: nothing is wrapped, and rich is not imported, as for
            tables of more than 500 rows. When even the least widths do not fit, each row becomes a paragraph.

    Returns:
        Lines without control characters and without trailing spaces.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    if width is None or len(cells) > _MOST_DRAWN:
        return _columns(headers, cells, right)

    import io

    from rich.box import SIMPLE
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    widths = [max([len(header), *(cell_len(row[i]) for row in cells)]) for i, header in enumerate(headers)]
    least = dict(shrink)
    needed = sum(min(w, least.get(i, w)) for i, w in enumerate(widths)) + 2 * (len(widths) - 1)
    if needed > width:
        return _paragraphs(headers, cells, width)
    drawn = Table(box=SIMPLE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="")
    for i, header in enumerate(headers):
        drawn.add_column(
            Text(header), justify="right" if i in right else "left", no_wrap=i not in least, overflow="fold"
        )
    for row in cells:
        drawn.add_row(*map(Text, row))
    out = io.StringIO()
    Console(file=out, width=width, color_system=None, force_terminal=False, force_jupyter=False).print(drawn)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _columns(headers: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    """One line a row: what `grep` and `diff` expect of a file."""
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        pairs = enumerate(zip(row, widths, strict=True))
        return "  ".join(cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in pairs).rstrip()

    return "\n".join([line(headers), "  ".join("-" * w for w in widths), *map(line, cells)])


def _paragraphs(headers: Sequence[str], rows: Iterable[Sequence[str]], width: int) -> str:
    """The first cell on a line of its own, the others below it as ``header value`` pairs."""
    out: list[str] = []
    for row in rows:
        out.append(wrap(row[0], width, "  "))
        pairs = " · ".join(f"{h} {c}".strip() for h, c in zip(headers[1:], row[1:], strict=True) if c)
        out.append("  " + wrap(pairs, max(width, 12), "  ", used=2))
    return "\n".join(out)


# ----------------------------------------------------------------------------------------------------------- progress


class Bar:
    """A progress bar on a terminal: percentage, amount, throughput and time left, as wide as the terminal allows.

    Call it with ``(done, total, what is being worked on)``. It redraws at most ten times a second, from the thread that
    calls. Throughput is the average of the last few seconds.
    """

    INTERVAL = 0.1
    WINDOW = 3.0

    def __init__(self, verb: str, stream: TextIO | None = None, unit: Callable[[float], str] = format_bytes) -> None:
        self._verb = verb
        self._unit = unit
        self._stream: TextIO | None = stream if stream is not None else sys.stderr
        self._progress: Progress | None = None
        self._drawn = -self.INTERVAL

    def __call__(self, done: int, total: int, label: str) -> None:
        """Show the state; see the class."""
        now = time.monotonic()
        if self._stream is None or (now - self._drawn < self.INTERVAL and done < total):
            return
        self._drawn = now
        # A terminal that went away must not stop the work.
        try:
            if self._progress is None:
                self._progress = self._begin(self._stream, total)
            task = self._progress.task_ids[0]
            # rich calls work of size 0 unfinished.
            completed, whole = (done, total) if total > 0 else (1, 1)
            amount = self._amount(done, total)
            self._progress.update(task, completed=completed, total=whole, amount=amount, label=printable(label))
            speed = self._progress.tasks[0].speed
            self._progress.update(task, rate=f"{self._unit(speed)}/s" if speed else "", refresh=True)
        except (OSError, ValueError):
            self._stream = None

    def _amount(self, done: int, total: int) -> str:
        return f"{self._unit(done)} of {self._unit(total)}"

    def _begin(self, stream: TextIO, total: int) -> Progress:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        console = terminal_console(stream)
        columns: list[str | BarColumn | TextColumn | TimeRemainingColumn] = [
            TextColumn("{task.description}", markup=False),
            TextColumn("{task.percentage:>3.0f}%", markup=False),
        ]
        if console.width >= 40:
            columns.append(BarColumn(bar_width=24 if console.width >= 80 else 10))
        if console.width >= 72:
            columns.append(TextColumn("{task.fields[amount]}", markup=False))
            columns.append(TextColumn("{task.fields[rate]}", markup=False))
            columns.append(TimeRemainingColumn(compact=True))
        if console.width >= 100:
            name = Column(no_wrap=True, overflow="ellipsis", ratio=1)
            columns.append(TextColumn("{task.fields[label]}", markup=False, table_column=name))
        progress = Progress(
            *columns,
            console=console,
            auto_refresh=False,
            get_time=time.monotonic,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            speed_estimate_period=self.WINDOW,
            expand=console.width >= 100,
        )
        progress.add_task(self._verb, total=total, amount=self._amount(0, total), rate="", label="")
        progress.start()
        return progress

    def close(self) -> None:
        """Wipe the bar and show the cursor again."""
        if self._progress is not None:
            with contextlib.suppress(OSError, ValueError):
                self._progress.stop()
            self._progress = None


class Lines:
    """Progress where no line can be redrawn: one line at the start and one for each file that is complete.

    Args:
        verb: What is being done: ``"quantizing"``.
        files: Names of the files that will be made.
        complete: Tells whether the file of a name is complete.
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
