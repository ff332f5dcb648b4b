"""Names on the hub: every reader of checkpoints takes a revision, a token and a cache folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import halfbyte
import pytest
from command_line import write_checkpoint
from halfbyte.cli import main as cli
from halfbyte.cli.exit_codes import EXIT_INPUT, EXIT_OK, EXIT_SYSTEM, EXIT_USAGE
from halfbyte.offline.hub import Hub, resolve_source, resolve_sources

huggingface_hub = pytest.importorskip("huggingface_hub")

NAME = "some-org/tiny"
# By what each revision is told from the others: its number of layers.
LAYERS = {"main": 1, "v2": 2}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with two revisions of a model; the tests run without a network."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cache" / f"models--{NAME.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    for number, (revision, layers) in enumerate(LAYERS.items()):
        commit = str(number) * 40
        (folder / "refs" / revision).write_text(commit)
        write_checkpoint(folder / "snapshots" / commit, layers=layers)
    return tmp_path / "cache"


def layers_of(tensors: list[str]) -> int:
    return len({name.split(".")[2] for name in tensors if name.startswith("model.layers.")})


@pytest.mark.parametrize("revision", [None, *LAYERS])
def test_revision_and_cache_dir_are_those_of_every_function(revision: str | None, cache: Path, tmp_path: Path) -> None:
    where: dict[str, Any] = {"revision": revision, "cache_dir": cache}
    expected = LAYERS[revision or "main"]
    plan = halfbyte.plan_checkpoint(NAME, **where)
    assert layers_of([tensor.name for tensor in plan.tensors]) == expected
    halfbyte.quantize_checkpoint(NAME, tmp_path / "out", **where)
    found = halfbyte.inspect_checkpoint(tmp_path / "out").data
    assert layers_of([weight["name"] for weight in found["weights"]]) == expected
    found = halfbyte.inspect_checkpoint(NAME, **where).data
    assert layers_of([tensor["name"] for tensor in found["tensors"]]) == expected
    report = halfbyte.verify_checkpoint(NAME, tmp_path / "out", **where)
    assert report.ok
    assert layers_of([tensor.name for tensor in report.tensors]) == expected
    with pytest.raises(halfbyte.CheckpointError, match="no 4-bit weight"):
        halfbyte.dequantize_checkpoint(NAME, tmp_path / "back", **where)


def test_dequantize_takes_a_quantized_revision(cache: Path, tmp_path: Path) -> None:
    snapshot = cache / f"models--{NAME.replace('/', '--')}" / "snapshots" / ("1" * 40)
    halfbyte.quantize_checkpoint(snapshot, tmp_path / "out")
    shutil.rmtree(snapshot)
    shutil.move(tmp_path / "out", snapshot)
    report = halfbyte.dequantize_checkpoint(NAME, tmp_path / "back", revision="v2", cache_dir=cache)
    assert report.converted_tensors > 0
    with pytest.raises(halfbyte.CheckpointError, match="no 4-bit weight"):
        halfbyte.dequantize_checkpoint(NAME, tmp_path / "other", cache_dir=cache)


def test_models_are_loaded_from_a_revision(cache: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    def model() -> Any:
        return torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 64))

    snapshots = cache / f"models--{NAME.replace('/', '--')}" / "snapshots"
    dense, packed = model(), halfbyte.quantize_model(model(), blocksize=128)
    for commit, holder in (("0", dense), ("1", packed)):
        shutil.rmtree(snapshots / (commit * 40))
        (snapshots / (commit * 40)).mkdir()
        save_file(holder.state_dict(), snapshots / (commit * 40) / "model.safetensors")
    with torch.device("meta"):
        first, second = model(), model()
    loaded = halfbyte.load_quantized(first, NAME, revision="v2", cache_dir=cache)
    assert loaded[0].weight.blocksize == 128
    filled = halfbyte.quantize_model(second, checkpoint=NAME, revision="main", cache_dir=cache, blocksize=32)
    assert filled[0].weight.quant_state.blocksize == 32
    x = torch.randn(3, 64)
    assert torch.equal(loaded(x), packed(x))


def test_the_command_takes_them_too(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--revision", "v2", "--cache-dir", str(cache)]
    assert cli.main(["quantize", NAME, str(tmp_path / "out"), "-q", *where]) == EXIT_OK
    assert cli.main(["inspect", NAME, "--json", *where]) == EXIT_OK
    assert layers_of([tensor["name"] for tensor in json.loads(capsys.readouterr().out)["tensors"]]) == LAYERS["v2"]
    assert cli.main(["verify", NAME, str(tmp_path / "out"), "-q", *where]) == EXIT_OK
    assert cli.main(["dequantize", NAME, "--plan", *where]) == EXIT_INPUT
    assert "no 4-bit weight" in capsys.readouterr().err
    assert cli.main(["inspect", NAME, "--revision", "v3", "--cache-dir", str(cache)]) == EXIT_SYSTEM
    assert "not in the hub's cache at revision 'v3'" in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path / "out"), "--revision", "v2"]) == EXIT_USAGE
    assert "revision must be None for a file or folder on this disk" in capsys.readouterr().err


def test_the_token_reaches_the_hub_and_no_message(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    calls: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        calls.append(options)
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub = Hub("v1", "hf_secret", cache)
    with pytest.raises(OSError, match="cannot be reached") as caught:
        resolve_source(NAME, hub)
    assert "hf_secret" not in str(caught.value) + repr(hub)
    assert (calls[0]["token"], calls[0]["revision"], calls[0]["cache_dir"]) == ("hf_secret", "v1", str(cache))


def test_a_revision_is_that_of_the_names_among_two_sources(cache: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "folder", layers=1)
    where = Hub("v2", None, cache)
    for sources in ((NAME, folder), (folder, NAME), (NAME, NAME)):
        found = resolve_sources(sources, where)
        named = [path.name for path, source in zip(found, sources, strict=True) if source == NAME]
        assert set(named) == {"1" * 40}
    with pytest.raises(ValueError, match="revision must be None"):
        resolve_sources((folder, folder), where)
