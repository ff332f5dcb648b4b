"""Amounts, tables, the plan and what is found, as text."""

from __future__ import annotations

import re

import pytest
from halfbyte._terminal import format_bytes, format_count, format_seconds, parse_size, printable, table, wrap
from halfbyte.offline.plan import CheckpointPlan, TensorPlan, group_tensors, ranges
from halfbyte.offline.report import InspectReport, VerifyReport
from rich.cells import cell_len

# -------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5GB", 5 * 10**9),
        ("500MB", 500 * 10**6),
        ("2GiB", 2 * 2**30),
        ("1.5 GB", 1_500_000_000),
        ("64KiB", 65536),
        ("7", 7),
        ("7B", 7),
        (123, 123),
        ("9007199254740993", 9007199254740993),
        ("1TB", 10**12),
    ],
)
def test_parse_size(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "text", ["", "GB", "5gb", "5Gb", "5G", "-1GB", "0", "0.0GB", "1e3", "1.5", "5 G B", "٥GB", True, 0]
)
def test_parse_size_refuses(text):
    with pytest.raises(ValueError, match=f"size must be .*, got {re.escape(repr(text))}"):
        parse_size(text)


def test_parse_size_agrees_with_the_hub():
    convert = pytest.importorskip("huggingface_hub.serialization._base").parse_size_to_int
    for text in ("5GB", "500MB", "3KB", "1TB"):
        assert parse_size(text) == convert(text)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (2_471_645_608, "2.47 GB"),
        (10**18, "1000 PB"),
    ],
)
def test_format_bytes(count, expected):
    assert format_bytes(count) == expected


def test_format_others():
    assert format_count(1_235_814_400) == "1.24 B"
    assert format_count(7) == "7"
    assert [format_seconds(s) for s in (0.123, 9.996, 59.96, 3725)] == ["0.12 s", "10.0 s", "1:00", "1:02:05"]


# ------------------------------------------------------------------------------------------------------ text and tables


def test_text():
    assert printable("a\nb\x1b[1m\u202e→é") == "a\\nb\\x1b[1m\\u202e→é"
    assert printable("\udcff") == "\\udcff"
    assert wrap("one two three", 10, "  ") == "one two\n  three"
    assert wrap("one two three", 12, "", used=4) == "one two\nthree"
    assert wrap("", 12) == ""


@pytest.mark.parametrize("width", [20, 40, 60, 79, 80, 120, 200])
def test_table_fits_the_terminal(width, plan):
    text = plan.table(width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert "nf4" in text


def test_table_without_limit_cuts_nothing():
    text = table(("name", "n"), [("x" * 300, "1"), ("y", "22")], right=(1,))
    assert text.splitlines()[2] == "x" * 300 + "   1"
    assert text.splitlines()[3].endswith("  22")
    assert len(text.splitlines()) == 4


def test_table_of_many_rows_is_plain_lines():
    text = table(("name", "n"), [("x" * 90, str(i)) for i in range(2000)], right=(1,), shrink=((0, 16),), width=80)
    assert len(text.splitlines()) == 2002


@pytest.mark.parametrize("width", [None, 30, 60, 200])
def test_table_shows_hostile_names_as_text(width):
    name = "[red]a[/red]:smile:[link=x]\x1b[2J\n\r\u202e\x07"
    text = table(("tensor", "n"), [(name, "1"), ("plain", "2")], right=(1,), shrink=((0, 16),), width=width)
    assert all(c.isprintable() or c == "\n" for c in text)
    joined = "".join(line[: line.rfind("  1") if line.endswith("  1") else None].strip() for line in text.splitlines())
    assert "[red]a[/red]:smile:[link=x]\\x1b[2J\\n\\r\\u202e\\x07" in joined


@pytest.mark.parametrize("width", [40, 60, 200])
def test_table_counts_columns_of_wide_characters(width):
    text = table(("tensor", "n"), [("日本語" * 8, "1"), ("plain", "2")], right=(1,), shrink=((0, 16),), width=width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert text.replace("\n", "").count("日") == 8
    ends = {cell_len(line) for line in text.splitlines() if line.endswith((" 1", " 2"))}
    assert len(ends) == 1


# ------------------------------------------------------------------------------------------------------------- groups


def tensor(name: str, shape: tuple[int, ...] = (4, 4), target: str = "nf4", reason: str = "linear") -> TensorPlan:
    return TensorPlan(name, shape, "BF16", target, 32, 9, reason, "model.safetensors")


def test_group_tensors_collapses_layers():
    tensors = [tensor(f"model.layers.{i}.mlp.up.weight") for i in (0, 1, 2, 10, 11)]
    tensors += [tensor(f"model.layers.{i}.mlp.experts.{e}.w1.weight") for i in range(2) for e in range(3)]
    groups = group_tensors(tensors)
    assert [(g.pattern, g.count, g.bytes_in, g.bytes_out) for g in groups] == [
        ("model.layers.{0-2,10-11}.mlp.up.weight", 5, 160, 45),
        ("model.layers.{0-1}.mlp.experts.{0-2}.w1.weight", 6, 192, 54),
    ]


def test_group_tensors_keeps_what_differs_apart():
    tensors = [
        tensor("h.0.w"),
        tensor("h.1.w", shape=(8, 4)),
        tensor("h.2.w", target="keep"),
        tensor("h.3.w", reason="rule"),
        tensor("h.norm1.w"),
        tensor("h.norm2.w"),
        tensor("h.0.w.x"),
    ]
    assert [g.count for g in group_tensors(tensors)] == [1] * 7
    assert group_tensors(tensors)[0].pattern == "h.0.w"


def test_group_tensors_of_odd_names():
    names = ["", ".", "0", "1", "a..0", "a..1", "٣.w", "9" * 5000]
    groups = group_tensors([tensor(name) for name in names])
    assert sum(g.count for g in groups) == len(names)
    assert "{0-1}" in {g.pattern for g in groups}
    assert "a..{0-1}" in {g.pattern for g in groups}


def test_ranges():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert ranges(range(0, 40, 2)) == "0,2,4,…,38"


class FakePlan:
    def __init__(self, data: dict) -> None:
        self.data = data

    def report(self) -> dict:
        return self.data


@pytest.fixture
def plan() -> CheckpointPlan:
    def line(name: str, to: str) -> dict:
        facts = {"shape": [2048, 8192], "from": "BF16", "to": to, "bytes_in": 33554432, "bytes_out": 8_700_000}
        return {"name": name, **facts, "reason": f"{to}: as transformers does", "shard": "model.safetensors"}

    return CheckpointPlan.of(
        FakePlan(
            {
                "operation": "quantize",
                "source": "a",
                "architecture": "LlamaForCausalLM",
                "known_architecture": False,
                "notes": ["a long remark about this model that does not fit into one line of a narrow terminal"],
                "tensors": [
                    *(line(f"model.layers.{i}.mlp.down_proj.weight", "nf4") for i in range(16)),
                    line("model.embed_tokens.weight", "keep"),
                ],
                "shards": [{"file": "model.safetensors", "bytes": 9, "tensors": 17}],
                "copies": [{"file": "tokenizer.json", "bytes": 2}],
                "left_out": [{"file": "pytorch_model.bin", "reason": "weights in another file"}],
                "skip_modules": None,
                "model_dtype": "bfloat16",
                "types": [
                    {"type": to, "tensors": n, "weights": n * 2**24, "bytes_in": n * 2**25, "bytes_out": n * 8_700_000}
                    for to, n in (("nf4", 15), ("int8", 1), ("keep", 1))
                ],
                "totals": {
                    "weights": 17 * 2**24,
                    "quantized_weights": 2**28,
                    "bytes_in": 17 * 2**25,
                    "bytes_out": 16 * 8_700_000 + 2**25,
                    "bits_per_weight": 4.85,
                    "quantized_tensors": 16,
                    "tensors": 17,
                },
            }
        )
    )


def test_plan_table_tells_everything(plan):
    text = str(plan)
    assert "model.layers.{0-15}.mlp.down_proj.weight" in text
    for words in (
        "not known here: planned by shape",
        "2048×8192",
        "BF16 → nf4",
        "as transformers does",
        "16 of 17 tensors",
        "4.85 bits per weight",
        "nf4        15 tensors, 252 M weights, ",
        "int8       1 tensor, 16.8 M weights, ",
        "pytorch_model.bin: weights in another file",
        "a long remark",
        "1 other file copied",
    ):
        assert words in text


def test_verify_report_shows_what_differs():
    def row(name: str, status: str, kind: str, rmse: float | None) -> dict:
        facts = {"shape": [2, 2], "rmse": rmse, "max_error": rmse, "differing_bytes": None, "detail": ""}
        return {"name": name, "status": status, "kind": kind, **facts}

    rows = [row(f"w.{i}", "differs", "nf4", 0.5) for i in range(60)]
    rows += [row("x", "equal-codes", "nf4", None), row("y", "missing", "", None)]
    report = VerifyReport.of({"a": "a", "b": "b", "tensors": rows, "notes": []}, 1.0)
    assert not report.ok
    assert report.counts == {"differs": 60, "equal-codes": 1, "missing": 1}
    assert "… and 11 more" in str(report)
    assert "62 tensors: 60 differs, 1 equal-codes, 1 missing" in str(report)
    report = VerifyReport.of({"a": "a", "b": "b", "tensors": rows[60:61], "notes": ["b: a\nremark"]}, 1.0)
    assert report.ok
    assert str(report).endswith("\nnote: b: a\\nremark")


def test_inspect_report_of_strange_config():
    data = {
        "path": "p",
        "files": [{"file": None, "bytes": 1, "tensors": 0, "metadata": {}}],
        "weights": [],
        "tensors": [],
        "groups": [],
        "totals": {"weights": 0, "bytes": 0, "quantized_tensors": 0, "bits_per_weight": 0.0},
        "notes": ["a\nb"],
        "quantization_config": ["what"],
    }
    assert "note: a\\nb" in InspectReport(data).table(40)
