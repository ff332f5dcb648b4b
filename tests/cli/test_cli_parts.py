"""What the command is made of: sizes, tables, progress, groups, config.json, model names, and the Python interface."""

from __future__ import annotations

import io
import itertools
import json
import re
import sys
import types
from pathlib import Path

import halfbyte
import pytest
from halfbyte import _native
from halfbyte._terminal import (
    Bar,
    Lines,
    format_bytes,
    format_count,
    format_seconds,
    parse_size,
    printable,
    progress_display,
    table,
    wrap,
)
from halfbyte.cli import doctor
from halfbyte.offline import config_json as _config_json
from halfbyte.offline import hub
from halfbyte.offline.dequantize import plan_dequantize
from halfbyte.offline.options import QuantizeOptions
from halfbyte.offline.plan import CheckpointPlan, TensorPlan, group_tensors, ranges
from halfbyte.offline.quantize import plan_checkpoint, quantization_config, quantize_checkpoint
from halfbyte.offline.report import InspectReport, VerifyReport
from halfbyte.offline.run import Interrupted
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
        "nf4         15 tensors, 252 M weights, ",
        "int8        1 tensor, 16.8 M weights, ",
        "pytorch_model.bin: weights in another file",
        "a long remark",
        "1 other file copied",
    ):
        assert words in text


# ----------------------------------------------------------------------------------------------------------- progress


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


# -------------------------------------------------------------------------------------------------------- config.json


def folder_with(tmp_path: Path, data: bytes) -> Path:
    (tmp_path / "config.json").write_bytes(data)
    return tmp_path


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b'{"a": NaN}',
        b"\xef\xbb\xbf{}",
        b'{"a": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
)
def test_config_json_that_is_bad_is_named(data, tmp_path):
    with pytest.raises(halfbyte.CheckpointError, match=r"config\.json: ") as caught:
        _config_json.read_config(folder_with(tmp_path, data))
    assert "\n" not in str(caught.value)


def test_config_json_keeps_infinity_and_gives_the_core_null(tmp_path):
    config = _config_json.read_config(
        folder_with(tmp_path, b'{"limit": [0.0, Infinity], "low": -Infinity, "b": 1e999}')
    )
    assert config is not None
    assert json.loads(_config_json.native_text(config)) == {"limit": [0.0, None], "low": None, "b": None}
    assert '"limit": [\n    0.0,\n    Infinity\n  ]' in _config_json.dump(config)


def test_config_json_may_be_absent(tmp_path):
    assert _config_json.read_config(tmp_path) is None


def test_config_json_has_quantization_config_where_transformers_puts_it():
    quantization = {"quant_method": "bitsandbytes", "_load_in_4bit": True}
    ordered = {"architectures": ["A"], "id2label": {"0": "x", "10": "y", "2": "z"}, "vocab_size": 3}
    text = _config_json.with_quantization(ordered, quantization)
    assert list(json.loads(text)) == ["architectures", "id2label", "quantization_config", "vocab_size"]
    assert list(json.loads(text)["id2label"]) == ["0", "10", "2"]
    assert list(json.loads(text)["quantization_config"]) == ["_load_in_4bit", "quant_method"]
    unordered = {"model_type": "llama", "architectures": ["A"]}
    text = _config_json.with_quantization(unordered, quantization)
    assert list(json.loads(text)) == ["model_type", "architectures", "quantization_config"]
    assert text.endswith("\n}\n")


def test_config_json_dtype_keys():
    quantized = {"dtype": "bfloat16", "quantization_config": {}, "text_config": {"dtype": "bfloat16"}, "x": None}
    assert json.loads(_config_json.without_quantization(quantized, "float16")) == {
        "dtype": "float16",
        "text_config": {"dtype": "float16"},
        "x": None,
    }
    assert quantized["text_config"] == {"dtype": "bfloat16"}, "the source's config is left alone"
    assert "dtype" not in json.loads(_config_json.without_quantization({"quantization_config": {}}, None))
    assert json.loads(_config_json.without_quantization({}, "float32")) == {"torch_dtype": "float32"}


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({}, None),
        ({"quantization_config": None}, None),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        ({"quantization_config": "strange"}, "unknown method"),
    ],
)
def test_config_json_with_existing_quantization(config, method):
    assert _config_json.existing_quantization(config) == method


def test_config_json_is_what_transformers_writes(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaConfig(hidden_size=64, num_hidden_layers=1)
    theirs.save_pretrained(tmp_path)
    config = _config_json.read_config(tmp_path)
    assert config is not None
    text = _config_json.with_quantization(config, quantization_config(QuantizeOptions(), None, None))
    theirs.quantization_config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
    )
    assert text == theirs.to_json_string()


# -------------------------------------------------------------------------------------------------------- model names


@pytest.mark.parametrize("name", ["gpt2", "org/name", "meta-llama/Llama-3.2-1B", "a_b/c.d-e"])
def test_hub_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_model_name(name)


@pytest.mark.parametrize(
    "text",
    [
        "./org/name",
        "../x",
        "/abs",
        "~/x",
        "a/b/c",
        "a//b",
        "a/",
        "x.safetensors",
        "org/model.bin",
        "a b",
        "",
        ".",
        "a..b",
        "here/absent",
        "here",
        "é",
    ],
)
def test_hub_names_are_never_paths(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert not hub.is_model_name(text)


def test_hub_is_never_asked_for_path_objects(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(halfbyte.CheckpointError, match="no such file or folder"):
        hub.resolve_source(Path("org/name"))


def fake_hub(monkeypatch: pytest.MonkeyPatch, outcome: object) -> list[tuple[tuple, dict]]:
    """Put a huggingface_hub in place whose download gives or raises `outcome`; the calls made to it."""
    calls: list[tuple[tuple, dict]] = []
    errors = types.ModuleType("huggingface_hub.errors")
    for name, base in (
        ("RepositoryNotFoundError", OSError),
        ("RevisionNotFoundError", OSError),
        ("HFValidationError", ValueError),
        ("LocalEntryNotFoundError", FileNotFoundError),
        ("OfflineModeIsEnabled", ConnectionError),
    ):
        setattr(errors, name, type(name, (base,), {}))
    errors.GatedRepoError = type("GatedRepoError", (errors.RepositoryNotFoundError,), {})
    utils = types.ModuleType("huggingface_hub.utils")
    state = {"disabled": False}
    utils.are_progress_bars_disabled = lambda: state["disabled"]
    utils.disable_progress_bars = lambda: state.update(disabled=True)
    utils.enable_progress_bars = lambda: state.update(disabled=False)
    module = types.ModuleType("huggingface_hub")

    def snapshot_download(*args: object, **kwargs: object) -> object:
        calls.append((args, {**kwargs, "bars": not state["disabled"]}))
        found = outcome(errors) if callable(outcome) else outcome
        if isinstance(found, BaseException):
            raise found
        return found

    module.snapshot_download = snapshot_download
    module.errors = errors
    module.utils = utils
    for name, value in (("", module), (".errors", errors), (".utils", utils)):
        monkeypatch.setitem(sys.modules, f"huggingface_hub{name}", value)
    return calls


def test_hub_download_takes_no_pickles(tmp_path, monkeypatch):
    import fnmatch

    calls = fake_hub(monkeypatch, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert hub.resolve_source("org/name") == tmp_path
    ((name,), options) = calls[0]
    assert name == "org/name"
    assert options["bars"] is False

    def taken(file: str) -> bool:
        return any(fnmatch.fnmatch(file, p) for p in options["allow_patterns"]) and not any(
            fnmatch.fnmatch(file, p) for p in options["ignore_patterns"]
        )

    for file in (
        "model-00001-of-00002.safetensors",
        "config.json",
        "tokenizer.model",
        "chat_template.jinja",
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
    ):
        assert taken(file), file
    for file in (
        "pytorch_model.bin",
        "model.pt",
        "x.ckpt",
        "x.pkl",
        "consolidated.safetensors",
        "onnx/model.json",
        "fp16/model.safetensors",
    ):
        assert not taken(file), file


@pytest.mark.parametrize(
    ("outcome", "kind", "words"),
    [
        (
            lambda e: e.RepositoryNotFoundError("404\nlong"),
            halfbyte.CheckpointError,
            "the hub has no model of that name",
        ),
        (lambda e: e.GatedRepoError("403"), halfbyte.CheckpointError, "licence"),
        (lambda e: e.HFValidationError("bad"), halfbyte.CheckpointError, "no name for a model"),
        (lambda e: e.LocalEntryNotFoundError("offline"), OSError, "cannot be reached"),
        (lambda e: e.OfflineModeIsEnabled("offline"), OSError, "cannot be reached"),
        (lambda e: RuntimeError("\nfirst\nsecond"), OSError, "failed: first"),
        (lambda e: RuntimeError(), OSError, "failed: RuntimeError"),
    ],
)
def test_hub_errors_are_one_line(outcome, kind, words, tmp_path, monkeypatch):
    fake_hub(monkeypatch, outcome)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=words) as caught:
        hub.resolve_source("org/name")
    assert str(caught.value).startswith("org/name: no such folder") or "licence" in words
    assert "\n" not in str(caught.value)


def test_hub_not_installed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(halfbyte.CheckpointError, match=r"no such folder; .*pip install 'halfbyte\[hub\]'"):
        hub.resolve_source("org/name")


# --------------------------------------------------------------------------------------------------- Python interface


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"config": {"load_in_8bit": True}}, "load_in_4bit"),
        ({"config": {"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}}, "bnb_4bit_quant_type"),
        ({"config": {"load_in_4bit": True, "typo": 1}}, "typo"),
        ({"skip": "lm_head"}, "skip must be a list of module names, got 'lm_head'"),
        ({"skip": [1]}, "skip must hold module names, got 1"),
        ({"rules": "x=keep"}, "rules must be a list of rules, got 'x=keep'"),
        ({"rules": ["x"]}, 'rule is "x": expected REGEX=nf4'),
        ({"rules": ["(=nf4"]}, 'rule is "(=nf4": expected a regular expression'),
        ({"rules": [("x", "nf4", "y")]}, "rules must hold 'REGEX=nf4'"),
        ({"selection": "guess"}, "selection must be one of rules, transformers, got 'guess'"),
        ({"trust_remote_code": True}, "trust_remote_code must be False unless selection='transformers'"),
        ({"dtype": "int8"}, "dtype must be one of bfloat16, float16, float32, got 'int8'"),
        ({"max_shard_size": "5gb"}, "max_shard_size must be a size of at least one byte"),
        ({"max_shard_size": 0}, "'2GiB', got 0"),
        ({"blocksize": 48}, "blocksize must be one of 32, 64, 128, 256, 512, 1024, 2048, 4096, got 48"),
        ({"blocksize": True}, "blocksize must be an int, got True"),
        ({"threads": 0}, "threads must be an int of at least 1, or None for one per core, got 0"),
        ({"threads": True}, "got True"),
        ({"overwrite": True, "resume": True}, "overwrite and resume must not both be True"),
        ({"progress": 7}, "progress must be None, True, or a callable(done, total, label), got 7"),
        ({"revision": "main"}, "revision must be None for a file or folder on this disk"),
    ],
)
def test_wrong_arguments(arguments, words, tmp_path):
    from test_cli import write_checkpoint

    source = write_checkpoint(tmp_path / "source", layers=1)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        quantize_checkpoint(source, tmp_path / "out", **arguments)
    assert not isinstance(caught.value, halfbyte.CheckpointError)
    assert not (tmp_path / "out").exists()


def test_api_end_to_end(tmp_path):
    from test_cli import files, write_checkpoint

    source = write_checkpoint(tmp_path / "source")
    config = halfbyte.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", llm_int8_skip_modules=["model.layers.0"]
    )
    seen: list[tuple[int, int, str]] = []
    rules = [("layers.2.mlp", "keep")]
    plan = plan_checkpoint(source, config, rules=rules)
    report = halfbyte.quantize_checkpoint(
        source, tmp_path / "out", config, rules=rules, threads=1, progress=lambda *a: seen.append(a)
    )
    assert report.converted_tensors == plan.totals["quantized_tensors"] == 3
    assert report.quantization_config["bnb_4bit_compute_dtype"] == "float16"
    assert seen[-1][0] == seen[-1][1] == plan.totals["bytes_in"]
    assert json.loads(json.dumps(report.to_dict()))["files"][0]["file"] == "model.safetensors"
    assert "quantized 3 of 11 tensors" in str(report)
    # A dict and more threads: the same bytes.
    given = {key: value for key, value in config.to_dict().items() if key != "bnb_4bit_compute_dtype"}
    halfbyte.quantize_checkpoint(source, tmp_path / "more", given, rules=["layers.2.mlp=keep"], threads=4)
    assert files(tmp_path / "more") == files(tmp_path / "out")
    verified = halfbyte.verify_checkpoint(source, tmp_path / "out")
    assert verified.ok
    assert verified.counts == {"identical": 11}
    inspected = halfbyte.inspect_checkpoint(tmp_path / "out")
    assert {w["quant_type"] for w in inspected.data["weights"]} == {"fp4"}
    assert "fp4, blocks of 64, was float16" in str(inspected)
    back = halfbyte.dequantize_checkpoint(tmp_path / "out", tmp_path / "back")
    assert back.converted_tensors == 3
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("config", "dtype", "named", "written"),
    [
        (None, None, "float16", "float16"),
        (NF4, None, "float16", "float16"),
        (halfbyte.BitsAndBytesConfig(**NF4), None, "float16", "float16"),
        (None, None, "torch.bfloat16", "bfloat16"),
        (None, "bfloat16", "float16", "bfloat16"),
        (None, None, None, "float16"),
        (NF4 | {"bnb_4bit_compute_dtype": "float32"}, None, "float16", "float32"),
        (halfbyte.BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype="bfloat16"), "float32", "float16", "bfloat16"),
    ],
)
def test_compute_dtype_that_was_not_given_is_written_as_the_checkpoints(tmp_path, config, dtype, named, written):
    from test_cli import write_checkpoint

    source = write_checkpoint(tmp_path / "source")
    file = source / "config.json"
    said = {key: value for key, value in json.loads(file.read_text()).items() if key not in ("dtype", "torch_dtype")}
    file.write_text(json.dumps(said | ({} if named is None else {"torch_dtype": named})))
    report = halfbyte.quantize_checkpoint(source, tmp_path / "out", config, dtype=dtype)
    assert report.quantization_config["bnb_4bit_compute_dtype"] == written
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored["bnb_4bit_compute_dtype"] == written
    # A dense copy again knows nothing of it.
    assert plan_dequantize(tmp_path / "out").model_dtype is None


def test_transformers_selection_agrees(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    pytest.importorskip("halfbyte.offline.transformers_selection")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    asked = plan_checkpoint(tmp_path / "source", selection="transformers")
    ruled = plan_checkpoint(tmp_path / "source")
    assert [(t.name, t.target) for t in asked.tensors] == [(t.name, t.target) for t in ruled.tensors]
    assert asked.totals["quantized_tensors"] == 14


def test_interrupted_is_a_keyboard_interrupt():
    error = Interrupted(2, 5)
    assert isinstance(error, KeyboardInterrupt)
    assert str(error) == "interrupted: 2 of 5 shards are complete"


def test_verify_report_shows_what_differs():
    def row(name: str, status: str, kind: str, rmse: float | None) -> dict:
        facts = {"shape": [2, 2], "rmse": rmse, "max_error": rmse, "differing_bytes": None, "detail": ""}
        return {"name": name, "status": status, "kind": kind, **facts}

    rows = [row(f"w.{i}", "differs", "nf4", 0.5) for i in range(60)]
    rows += [row("x", "equal-codes", "nf4", None), row("y", "missing", "", None)]
    report = VerifyReport.of({"a": "a", "b": "b", "tensors": rows}, 1.0)
    assert not report.ok
    assert report.counts == {"differs": 60, "equal-codes": 1, "missing": 1}
    assert "… and 11 more" in str(report)
    assert "62 tensors: 60 differs, 1 equal-codes, 1 missing" in str(report)
    assert VerifyReport.of({"a": "a", "b": "b", "tensors": rows[60:61]}, 1.0).ok


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


# ------------------------------------------------------------------------------------------------------------- doctor


class Driver:
    """What the compiled core answers about GPUs, in the place of its functions."""

    def __init__(self, monkeypatch, version: object, count: object = 0, devices: object = ()) -> None:
        self.answers = {
            "cuda_driver_version": lambda: version,
            "cuda_device_count": lambda: count,
            "cuda_device": lambda number: devices[number],
            "cuda_device_memory": lambda number: 80 * 10**9,
        }
        for name in self.answers:
            monkeypatch.setattr(_native, name, self.answer(name))

    def answer(self, name: str) -> object:
        def call(*arguments: int) -> object:
            found = self.answers[name](*arguments)
            if isinstance(found, Exception):
                raise found
            return found

        return call


def test_doctor_names_gpus_as_the_driver_does(monkeypatch):
    old = RuntimeError("device 1 (Tesla P100): compute capability 6.0: the kernels need 7.5 or later")
    Driver(monkeypatch, (13, 0), 2, [("NVIDIA H100 80GB HBM3", (9, 0), 132, 232448), old])
    found = doctor.examine()
    assert found["gpu"]["cuda"] == "13.0"
    assert found["gpu"]["devices"] == [
        {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 80 * 10**9, "compute_capability": "9.0"},
        {"name": "unsupported", "memory_bytes": 80 * 10**9, "compute_capability": None},
    ]
    text = doctor.render(found)
    assert "NVIDIA H100 80GB HBM3, 80.0 GB, compute capability 9.0" in text
    assert "Tesla P100" in text
    assert "CUDA up to 13.0" in text


def test_doctor_without_a_driver(monkeypatch):
    absent = getattr(_native, "NoCudaDriverError", RuntimeError)("CUDA: the NVIDIA driver is not installed")
    Driver(monkeypatch, absent, absent)
    found = doctor.examine()["gpu"]
    assert (found["cuda"], found["devices"], found["kernels"]) == (None, [], [])


def test_doctor_survives_a_broken_driver(monkeypatch):
    Driver(monkeypatch, (13, 0), RuntimeError("CUDA: cuInit failed: driver half installed"))
    found = doctor.examine()
    assert found["gpu"]["devices"] == []
    assert "driver half installed" in doctor.render(found)


def test_doctor_starts_no_other_program(monkeypatch):
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError(arguments)

    monkeypatch.setattr("subprocess.Popen", refuse)
    doctor.render(doctor.examine())


def test_doctor_survives_a_wrong_switch(monkeypatch):
    def refuse() -> str:
        raise ValueError("HALFBYTE_SIMD is 'mmx': expected another")

    monkeypatch.setattr(_native, "simd", refuse)
    monkeypatch.setenv("HALFBYTE_SIMD", "mmx")
    assert doctor.render(doctor.examine()).count("mmx") == 2


@pytest.mark.parametrize(
    ("error", "kernels"),
    [(_native.NoCudaDriverError("no driver"), []), (RuntimeError("driver too old"), ["driver too old"])],
)
def test_doctor_says_why_kernels_cannot_be_used_unless_there_is_no_driver(error, kernels, monkeypatch):
    def fail() -> int:
        raise error

    monkeypatch.setattr(_native, "cuda_device_count", fail)
    assert doctor.examine()["gpu"]["kernels"] == kernels


def test_doctor_reads_this_machine():
    found = doctor.examine()
    assert found["halfbyte"]["version"] == _native.__version__
    assert found["cpu"]["usable"] >= 1
    assert found["cpu"]["simd"] == _native.simd()
    assert found["disk"]["free_bytes"] > 0
    assert found["packages"]["safetensors"]
    json.dumps(found)
