"""Which names are those of models on the hub, and what can go wrong there."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import halfbyte
import pytest
from halfbyte.offline import hub


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
