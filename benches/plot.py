"""Draws the time of a product against its rows, from what `cuda_linear.py --json` wrote.

    python benches/plot.py benches/data/linear-h200.json [--to docs/images]

One SVG file for each shape, `linear-NxK.svg`: both axes logarithmic, a line for each contender, its figures as titles
of the marks. The same data give the same bytes. Colors are legible on white and on black; lines differ by their dashes
and marks too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 132, 56, 372
INK = "#7f8790"


@dataclass(frozen=True)
class Style:
    """How a contender is drawn."""

    label: str
    color: str
    dashes: str = "none"
    mark: str = "circle"


STYLES = {
    "bitsandbytes": Style("bitsandbytes", "#c2701c", "7 3", "square"),
    "humming": Style("humming", "#9a63cf", "2 3", "diamond"),
    "cublas": Style("cuBLAS, bfloat16", "#2f9a68", "10 3 2 3", "triangle"),
    "halfbyte": Style("halfbyte", "#2f80d8"),
    "floor": Style("reading the weight", INK, "1 4", "none"),
}


@dataclass(frozen=True)
class Axis:
    """A logarithmic scale between two values."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The place of a value."""
        part = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + part * (self.end - self.start)


def powers(low: float, high: float) -> tuple[float, float]:
    """The powers of two around an interval."""
    return 2.0 ** math.floor(math.log2(low)), 2.0 ** math.ceil(math.log2(high))


def ticks(axis: Axis) -> list[int]:
    """The powers of two of an axis, each second one where there are many."""
    found = [2**i for i in range(round(math.log2(axis.low)), round(math.log2(axis.high)) + 1)]
    return found[::2] if len(found) > 12 else found


def mark(kind: str, x: float, y: float, color: str, title: str) -> str:
    """A mark with its figure as its title."""
    inside = f"<title>{escape(title)}</title>"
    if kind == "square":
        return f'<rect x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6" fill="{color}">{inside}</rect>'
    if kind in ("diamond", "triangle"):
        corners = [(0, -4), (4, 0), (0, 4), (-4, 0)] if kind == "diamond" else [(0, -4), (4, 3), (-4, 3)]
        points = " ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners)
        return f'<polygon points="{points}" fill="{color}">{inside}</polygon>'
    radius = 0.5 if kind == "none" else 3.5
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{color}">{inside}</circle>'


def text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 12, color: str = INK) -> str:
    """A line of text."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{color}">{escape(words)}</text>'
    )


def figure(number: int, value: float) -> str:
    """What the title of a mark says."""
    return f"{number} {'row' if number == 1 else 'rows'}: {value:g} µs"


def apart(places: list[float], least: float) -> list[float]:
    """Places moved down until none is nearer than `least` to the one above it."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for above, below in itertools.pairwise(order):
        moved[below] = max(moved[below], moved[above] + least)
    over = max([0.0, *(place - BOTTOM for place in moved)])
    return [place - over for place in moved]


def lines(data: dict[str, Any], n: int, k: int) -> Iterator[str]:
    """The SVG file of one shape, line by line."""
    rows = sorted((row for row in data["rows"] if (row["n"], row["k"]) == (n, k)), key=lambda row: row["m"])
    drawn = {name: style for name, style in STYLES.items() if any(name in row for row in rows)}
    values = [row[name] for row in rows for name in drawn if name in row]
    across = Axis(rows[0]["m"], rows[-1]["m"], LEFT, WIDTH - RIGHT)
    up = Axis(*powers(min(values), max(values)), BOTTOM, TOP)
    device, *_ = data["device"].split(", driver")

    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">'
    )
    yield f"<title>Time of a product with a weight of {n} x {k} against the rows of x, {escape(device)}</title>"
    yield f"<desc>{escape(data['what'])}; {escape(data['device'])}; {escape(data['date'])}</desc>"
    yield text(LEFT, 22, f"y = x · Wᵀ, W {n} × {k}: microseconds against rows of x", size=15)
    yield text(LEFT, 41, f"{device}; {data['what']}; lower is better")

    yield f'<g stroke="{INK}" stroke-opacity="0.3" stroke-width="1">'
    for value in ticks(up):
        yield f'<line x1="{LEFT}" y1="{up.at(value):.1f}" x2="{WIDTH - RIGHT}" y2="{up.at(value):.1f}"/>'
    for value in ticks(across):
        yield f'<line x1="{across.at(value):.1f}" y1="{TOP}" x2="{across.at(value):.1f}" y2="{BOTTOM}"/>'
    yield "</g>"
    for value in ticks(up):
        yield text(LEFT - 8, up.at(value) + 4, f"{value} µs", anchor="end")
    for value in ticks(across):
        yield text(across.at(value), BOTTOM + 18, str(value), anchor="middle")
    yield text((LEFT + WIDTH - RIGHT) / 2, BOTTOM + 38, "rows of x (tokens of a call)", anchor="middle")
    yield text(LEFT, BOTTOM + 58, f"{data['device']}; {data['date']}", size=10)

    ends = []
    for name, style in drawn.items():
        points = [(row["m"], row[name]) for row in rows if name in row]
        places = [(across.at(m), up.at(value)) for m, value in points]
        ends.append(places[-1][1])
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        width = 2.5 if name == "halfbyte" else 1.8
        dashes = "" if style.dashes == "none" else f' stroke-dasharray="{style.dashes}"'
        yield f'<g id="{name}">'
        yield f'<polyline points="{path}" fill="none" stroke="{style.color}" stroke-width="{width}"{dashes}/>'
        for (m, value), (x, y) in zip(points, places, strict=True):
            yield mark(style.mark, x, y, style.color, figure(m, value))
        yield "</g>"
    for style, place in zip(drawn.values(), apart(ends, 15), strict=True):
        yield text(WIDTH - RIGHT + 10, place + 4, style.label, color=style.color)
    yield "</svg>"


def draw(data: dict[str, Any]) -> dict[str, str]:
    """Names of the files, and what is in them."""
    shapes = dict.fromkeys((row["n"], row["k"]) for row in data["rows"])
    return {f"linear-{n}x{k}.svg": "".join(f"{line}\n" for line in lines(data, n, k)) for n, k in shapes}


def main() -> None:
    """Draw a file of measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="what cuda_linear.py --json wrote")
    parser.add_argument("--to", type=Path, default=IMAGES, help="the folder of the images (default: docs/images)")
    options = parser.parse_args()
    options.to.mkdir(parents=True, exist_ok=True)
    for name, content in draw(json.loads(options.data.read_text(encoding="utf-8"))).items():
        (options.to / name).write_text(content, encoding="utf-8")
        print(options.to / name)


if __name__ == "__main__":
    main()
