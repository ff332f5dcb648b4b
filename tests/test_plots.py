"""The plots in docs/images show what is in benches/data."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "benches" / "data").glob("linear*.json"))
SVG = "{http://www.w3.org/2000/svg}"


def rows_of(data: dict[str, Any], name: str) -> list[dict[str, Any]]:
    n, k = re.fullmatch(r"linear-(\d+)x(\d+)\.svg", name).groups()
    return [row for row in data["rows"] if (row["n"], row["k"]) == (int(n), int(k))]


def shown() -> list[tuple[Path, Path]]:
    """Each plot of the documentation with its data."""
    found = []
    for file in FILES:
        shapes = dict.fromkeys((row["n"], row["k"]) for row in json.loads(file.read_text(encoding="utf-8"))["rows"])
        found += [(file, ROOT / "docs" / "images" / f"linear-{n}x{k}.svg") for n, k in shapes]
    return found


def ids(value: object) -> str | None:
    return value.stem if isinstance(value, Path) else None


def draw(data: Path, folder: Path) -> None:
    command = [sys.executable, str(ROOT / "benches" / "plot.py"), str(data), "--to", str(folder)]
    subprocess.run(command, check=True, capture_output=True)


def test_plots_are_drawn_from_their_data(tmp_path: Path) -> None:
    assert shown()
    for file in FILES:
        draw(file, tmp_path)
    for _, image in shown():
        assert (tmp_path / image.name).read_bytes() == image.read_bytes(), f"python benches/plot.py: {image.name}"
    drawn = {path.name for path in (ROOT / "docs" / "images").glob("linear-*.svg")}
    assert drawn == {image.name for _, image in shown()}


@pytest.mark.parametrize(("file", "image"), shown(), ids=ids)
def test_plots_give_the_figures_of_their_data(file: Path, image: Path) -> None:
    data = json.loads(file.read_text(encoding="utf-8"))
    root = ElementTree.parse(image).getroot()
    lines = {group.get("id"): group for group in root.iter(f"{SVG}g") if group.get("id")}
    assert {"halfbyte", "bitsandbytes", "cublas", "floor"} <= lines.keys()
    for name, group in lines.items():
        titles = [title.text for title in group.iter(f"{SVG}title")]
        said = [tuple(map(float, re.fullmatch(r"(\d+) rows?: ([\d.]+) µs", title).groups())) for title in titles]
        assert said == [(row["m"], row[name]) for row in rows_of(data, image.name) if name in row]
    assert data["date"] in root.find(f"{SVG}desc").text
    assert data["device"] in root.find(f"{SVG}desc").text


@pytest.mark.parametrize(("file", "image"), shown(), ids=ids)
def test_plots_have_their_lines_where_the_axes_say(file: Path, image: Path) -> None:
    root = ElementTree.parse(image).getroot()
    # The numbers at the axes, and where they stand.
    up, across = {}, {}
    for label in root.iter(f"{SVG}text"):
        if match := re.fullmatch(r"([\d.]+) µs", label.text):
            up[float(match[1])] = float(label.get("y")) - 4
        elif re.fullmatch(r"\d+", label.text):
            across[float(label.text)] = float(label.get("x"))

    def value(place: float, ticks: dict[float, float]) -> float:
        (a, at_a), (b, at_b) = min(ticks.items()), max(ticks.items())
        return a * math.exp((place - at_a) / (at_b - at_a) * math.log(b / a))

    rows = rows_of(json.loads(file.read_text(encoding="utf-8")), image.name)
    for group in (group for group in root.iter(f"{SVG}g") if group.get("id")):
        places = [tuple(map(float, point.split(","))) for point in group.find(f"{SVG}polyline").get("points").split()]
        expected = [(row["m"], row[group.get("id")]) for row in rows if group.get("id") in row]
        assert len(places) == len(expected)
        for (x, y), (m, microseconds) in zip(places, expected, strict=True):
            assert value(x, across) == pytest.approx(m, rel=0.01)
            assert value(y, up) == pytest.approx(microseconds, rel=0.01)


def test_plots_are_shown_with_words_for_those_who_do_not_see_them() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    images = {target: alt for alt, target in re.findall(r"!\[([^\]]*)\]\((images/[^)]+)\)", text)}
    assert images.keys() == {f"images/{image.name}" for _, image in shown()}
    assert all(len(alt) > 80 for alt in images.values())
    assert len(set(images.values())) == len(images)


def test_plots_leave_out_who_was_not_measured(tmp_path: Path) -> None:
    about = {"device": "a <card> & co., driver 1", "date": "2026-01-01", "what": "anything"}
    rows = [{"n": 64, "k": 32, "m": m, "floor": 1.0, "halfbyte": 2.0 * m, "humming": 3.0} for m in (1, 8)]
    del rows[1]["humming"]
    (tmp_path / "data.json").write_text(json.dumps({**about, "rows": rows}), encoding="utf-8")
    draw(tmp_path / "data.json", tmp_path)
    root = ElementTree.parse(tmp_path / "linear-64x32.svg").getroot()
    found = {group.get("id"): len(list(group.iter(f"{SVG}title"))) for group in root.iter(f"{SVG}g") if group.get("id")}
    assert found == {"humming": 1, "halfbyte": 2, "floor": 2}
