"""The bar, and the lines that stand for it."""

from __future__ import annotations

import io
import itertools
import re
import sys

import pytest
from halfbyte._terminal import Bar, Lines, progress_display
from rich.cells import cell_len


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def screen(text: str) -> list[str]:
    """The states of a one-line display, without escape sequences."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()]


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_bar_fits_the_terminal(columns, terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    now = itertools.count()
    monkeypatch.setattr("time.monotonic", lambda: next(now) / 4)
    bar = Bar("quantizing", terminal)
    for done in (500_000_000, 750_000_000, 1_000_000_000):
        bar(done, 2_000_000_000, "model.layers.3.mlp.down_proj.weight")
    last = screen(terminal.getvalue())[-1]
    bar.close()
    assert cell_len(last) <= columns
    assert last.startswith("quantizing  50%"[:columns])
    if columns >= 80:
        assert "1.00 GB of 2.00 GB" in last
        assert "MB/s" in last
        assert re.search(r"\d:\d\d", last)
    if columns == 200:
        assert last.endswith("model.layers.3.mlp.down_proj.weight")


def test_bar_shows_hostile_labels_as_text(terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    bar = Bar("quantizing", terminal)
    bar(1, 2, "[red]a[/red]\x1b[2J\n:smile:")
    shown = terminal.getvalue()
    bar.close()
    assert "\x1b[2J" not in shown
    assert "[red]a[/red]\\x1b[2J\\n:smile:" in screen(shown)[-1]


def test_bar_obeys_no_color(terminal, monkeypatch):
    def colours() -> set[str]:
        stream = Terminal()
        bar = Bar("quantizing", stream)
        bar(1, 2, "x")
        bar.close()
        return {c for codes in re.findall(r"\x1b\[([0-9;]+)m", stream.getvalue()) for c in codes.split(";")} - {"0"}

    assert colours()
    monkeypatch.setenv("NO_COLOR", "1")
    assert colours() <= {"1", "2", "3", "4"}  # weight and slant are no colours


def test_bar_leaves_nothing_behind(terminal):
    bar = Bar("quantizing", terminal)
    bar(1, 2, "x")
    bar.close()
    bar.close()
    shown = terminal.getvalue()
    assert shown.endswith("\x1b[2K") or shown.rstrip("\n").endswith(("\x1b[2K", "\x1b[?25h"))
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h")


def test_bar_that_never_began_writes_nothing(terminal):
    Bar("quantizing", terminal).close()
    assert terminal.getvalue() == ""


def test_bar_without_work(terminal):
    bar = Bar("quantizing", terminal)
    bar(0, 0, "")
    assert "100%" in screen(terminal.getvalue())[-1]
    bar.close()


def test_bar_survives_a_lost_terminal(terminal):
    class Lost(Terminal):
        def write(self, text: str) -> int:
            raise OSError("gone")

    bar = Bar("quantizing", Lost())
    bar(1, 2, "x")
    bar(2, 2, "x")
    bar.close()


@pytest.mark.parametrize("variables", [{"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}, {"CI": "true"}])
def test_progress_is_lines_where_no_terminal_is(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    show = progress_display("quantizing", ["a"], lambda name: True, str)
    show(1, 2, "x")
    show.close()
    assert isinstance(show, Lines)
    assert "\x1b" not in stream.getvalue()


def test_lines_say_each_file_once():
    out, done = io.StringIO(), {"a"}
    lines = Lines("quantizing", ["a", "b", "c"], done.__contains__, out)
    lines(0, 10_000, "")
    assert out.getvalue() == ""
    lines(1000, 10_000, "x")
    done.add("b")
    lines(5000, 10_000, "x")
    lines(6000, 10_000, "x")
    done.add("c")
    lines(10_000, 10_000, "x")
    assert out.getvalue().splitlines() == [
        "quantizing 10.0 kB into 3 files, 1 complete already",
        "b complete (2 of 3, 50%)",
        "c complete (3 of 3, 100%)",
    ]
