"""The command against broken input, full disks, signals, kill -9, and destinations that lead back to the source."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import halfbyte
import numpy as np
import pytest
from halfbyte.cli import main as cli
from safetensors import safe_open

PACKAGE = Path(halfbyte.__file__).parent
STAGE = ".halfbyte-partial"
LAYERS = 24
HIDDEN = 512
SHARDS = 15  # at least, of the sizes below
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}


# ------------------------------------------------------------------------------------------------------------ helpers


def bfloat16(rng: np.random.Generator, *shape: int) -> bytes:
    """Normal values, cut to 16 bits."""
    return (rng.standard_normal(shape, np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()


def write_tensors(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """A safetensors file, also of tensors that its libraries would not write."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for *_, data in tensors.values()))


def write_llama(folder: Path, layers: int = LAYERS, hidden: int = HIDDEN, seed: int = 0) -> Path:
    """A Llama of one shard per layer, with small files around it."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    weight_map = {}
    for layer in range(layers):
        tensors = {}
        for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            tensors[f"model.layers.{layer}.{module}.weight"] = ("BF16", [hidden, hidden], bfloat16(rng, hidden, hidden))
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = ("BF16", [hidden], bfloat16(rng, hidden))
        if layer == 0:
            tensors["model.embed_tokens.weight"] = ("BF16", [64, hidden], bfloat16(rng, 64, hidden))
        shard = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        write_tensors(folder / shard, tensors)
        weight_map.update(dict.fromkeys(tensors, shard))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {**CONFIG, "num_hidden_layers": layers, "hidden_size": hidden, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "sub").mkdir()
    (folder / "sub" / "template.jinja").write_text("{{ messages }}")
    return folder


def write_single(folder: Path, weight: bytes | None = None, config: dict[str, Any] | None = None) -> Path:
    """One small weight to quantize and one to keep, in one file."""
    folder.mkdir(parents=True)
    weight = bfloat16(np.random.default_rng(0), 64, 64) if weight is None else weight
    tensors = {
        "model.layers.0.mlp.up_proj.weight": ("BF16", [64, 64], weight),
        "model.norm.weight": ("BF16", [64], bytes(128)),
    }
    write_tensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    return folder


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "halfbyte", *map(str, arguments)]


def environment() -> dict[str, str]:
    paths = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}


def run(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 60, "env": environment()}
    return subprocess.run(command(*arguments), **{**options, **more})


Here = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str]) -> Here:
    """`run`, in this process: for the many cases that need no other."""

    def run_here(*arguments: object) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        code = cli.main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess([], code, out, err)

    return run_here


def start(*arguments: object) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command(*arguments), stdout=pipe, stderr=pipe, text=True, env=environment())


def quantize(src: Path, dst: Path, *more: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """A run slow enough to be hit: one thread, one file per layer, each flushed."""
    return run("quantize", src, dst, "--threads", "1", "--max-shard-size", "700KB", "-q", *more, **options)


def refused(done: subprocess.CompletedProcess[str], code: int, *words: object) -> str:
    """The one line of a refusal, after checking that it is one."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    one_line(done.stderr)
    for word in words:
        assert str(word) in done.stderr
    return done.stderr


def one_line(text: str) -> None:
    assert re.fullmatch("halfbyte: error: [^\n]+\n", text), text
    assert "Traceback" not in text
    assert "panicked" not in text
    assert "\x1b" not in text


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def identity(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Inode, time and hash of every file, and time of every folder: what nobody may change in a source."""
    everything = [folder, *sorted(folder.rglob("*"))]
    hashes = contents(folder)
    return {
        str(p): (p.stat().st_ino, p.stat().st_mtime_ns, hashes.get(str(p.relative_to(folder)), "")) for p in everything
    }


def complete_shards(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every finished file of weights, wherever it is."""
    found = {}
    for place in (folder, folder / STAGE / "files"):
        for path in place.glob("*.safetensors"):
            with contextlib.suppress(FileNotFoundError):
                found[path.name] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama") / "source")


@pytest.fixture(scope="module")
def whole(llama: Path) -> dict[str, str]:
    """What an uninterrupted run makes of the Llama, and how long it takes."""
    out = llama.parent / "whole"
    done = quantize(llama, out)
    assert (done.returncode, done.stderr) == (0, "")
    found = contents(out)
    assert len([n for n in found if n.endswith(".safetensors")]) >= SHARDS
    return found


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_single(tmp_path / "source")


@pytest.fixture(autouse=True)
def nothing_else_is_touched(tmp_path: Path) -> Iterator[None]:
    """Sources stay as they are and nothing appears beside destinations, in every test of this file."""
    yield
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith((".halfbyte", "lock", "journal"))]


# ------------------------------------------------------------------------------------------------------- kill and stop


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 30
    while not what() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)


@contextlib.contextmanager
def paused(what: Callable[[], bool], process: subprocess.Popen[str]) -> Iterator[None]:
    """The process stands still inside the block, where `what` has just become true."""
    wait_for(what, process)
    process.send_signal(signal.SIGSTOP)
    if process.returncode is None:
        # A signal is not yet a stop: wait until the process stands still, or has ended.
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def kill(process: subprocess.Popen[str], out: Path, shards: int, moment: float) -> bool:
    """Kill a run when so many shards are complete and so many seconds have passed; true when it was not over yet.

    Counted in shards, because how long a run takes differs tenfold with what else the machine does.
    """
    wait_for(lambda: (out / STAGE).exists() and len(complete_shards(out)) >= shards, process)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(moment)
    process.kill()
    process.communicate(timeout=60)
    return process.returncode == -signal.SIGKILL


def test_killed_runs_resume_to_the_same_bytes(llama, whole, tmp_path):
    before = identity(llama)
    killed = kept = 0
    rng = random.Random(0)
    for shards in (0, 0, 1, 4, 8, 12, SHARDS, SHARDS + 4):
        out = tmp_path / "out"
        process = start("quantize", llama, out, "--threads", "1", "--max-shard-size", "700KB", "-q")
        killed += kill(process, out, shards, rng.uniform(0, 0.02))
        if (out / "config.json").exists():
            assert set(whole) <= set(contents(out)), "config.json without the rest"
        finished = complete_shards(out)
        kept += len(finished)
        # Killed once more on the way.
        process = start("quantize", llama, out, "--threads", "1", "--max-shard-size", "700KB", "-q", "--resume")
        kill(process, out, shards + 2, rng.uniform(0, 0.01))
        finished |= complete_shards(out)
        done = quantize(llama, out, "--resume")
        assert (done.returncode, done.stderr) == (0, "")
        assert contents(out) == whole
        now = complete_shards(out)
        assert {name: now[name] for name in finished} == finished, "a finished shard was made again"
        shutil.rmtree(out)
    assert min(killed / 4, kept / SHARDS) >= 1, "the runs were not hit while they were writing"
    assert identity(llama) == before


def test_killed_overwriting_leaves_the_old_output_whole_until_the_commit(llama, whole, tmp_path):
    old = tmp_path / "old"
    other = write_single(tmp_path / "other")
    assert run("quantize", other, old, "-q").returncode == 0
    before = contents(old)
    arguments = ("--threads", "1", "--max-shard-size", "700KB", "-q")
    hit = 0
    rng = random.Random(0)
    for shards in (0, 7, SHARDS, SHARDS + 4):
        out = tmp_path / "out"
        shutil.copytree(old, out)
        process = start("quantize", llama, out, *arguments, "--overwrite")
        kill(process, out, shards, rng.uniform(0, 0.01))
        now = contents(out)
        outside = {name: value for name, value in now.items() if not name.startswith(STAGE)}
        if outside == before:
            hit += 1
            with safe_open(out / "model.safetensors", "np") as file:
                assert "model.layers.0.mlp.up_proj.weight.absmax" in file.keys()  # noqa: SIM118
        elif "config.json" in outside:
            assert outside == whole
        done = quantize(llama, out, "--resume")
        assert (done.returncode, done.stderr) == (0, "")
        assert contents(out) == whole
        shutil.rmtree(out)
    assert hit, "no run was hit before its commit"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_runs_say_how_to_go_on(llama, whole, tmp_path, number):
    out = tmp_path / "out put"
    # A signal is looked at every fiftieth of a second; a fast machine may be done by then.
    for _ in range(20):
        process = start("quantize", llama, out, "--threads", "1", "--max-shard-size", "700KB", "-q")
        with paused(lambda: len(complete_shards(out)) >= 2, process):
            process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
        if (out / STAGE).exists():
            break
        assert contents(out) == whole
        shutil.rmtree(out)
    else:
        pytest.skip("every run was done before the signal was looked at")
    assert process.returncode == 130
    assert stdout == ""
    assert re.fullmatch(rf"halfbyte: interrupted: \d+ of \d+ shards are complete; continue with: .*'{out}'.*\n", stderr)
    assert not list((out / STAGE / "files").glob("*.partial"))
    assert [p.name for p in out.iterdir()] == [STAGE]
    finished = complete_shards(out)
    refused(quantize(llama, out), 2, out, "--resume", "--overwrite")
    refused(quantize(llama, out, "--resume", "--type", "fp4"), 2, "options", "--overwrite")
    assert complete_shards(out) == finished
    assert quantize(llama, out, "--resume").returncode == 0
    assert contents(out) == whole
    assert complete_shards(out).items() >= finished.items()
    # Nothing left to do.
    assert quantize(llama, out, "--resume").returncode == 0
    assert contents(out) == whole


def test_two_runs_at_once(llama, whole, tmp_path):
    out = tmp_path / "out"
    arguments = ("quantize", llama, out, "--threads", "1", "--max-shard-size", "700KB", "-q")
    first = start(*arguments)
    # It stands still meanwhile: on a busy machine it would be over before the others look.
    with paused(lambda: (out / STAGE / "journal.json").exists(), first):
        assert first.poll() is None
        for more in ([], ["--resume"], ["--overwrite"]):
            refused(run(*arguments, *more), 2, out, "another halfbyte process")
    assert first.communicate(timeout=60) == ("", "")
    assert first.returncode == 0
    assert contents(out) == whole


def test_many_that_start_together_leave_one_output(single, tmp_path):
    out = tmp_path / "out"
    processes = [start("quantize", single, out, "-q") for _ in range(6)]
    ends = [(p.communicate(timeout=60), p.returncode) for p in processes]
    assert [code for _, code in ends].count(0) == 1, ends
    for (_, stderr), code in ends:
        if code:
            assert code == 2, stderr
            one_line(stderr)
    assert sorted(contents(out)) == ["config.json", "model.safetensors"]


# ---------------------------------------------------------------------------------------------- a source that changes


def change_while_reading(source: Path, out: Path, change: Callable[[], None]) -> subprocess.CompletedProcess[str]:
    process = start("quantize", source, out, "--threads", "1", "--max-shard-size", "700KB", "-q")
    with paused(lambda: bool(complete_shards(out)), process):
        change()
    stdout, stderr = process.communicate(timeout=60)
    return subprocess.CompletedProcess([], process.returncode, stdout, stderr)


@pytest.mark.parametrize("how", ["truncated", "modified"])
def test_a_source_that_changes_while_it_is_read(llama, tmp_path, how):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(llama, source)
    last = source / f"model-{LAYERS:05}-of-{LAYERS:05}.safetensors"

    def change() -> None:
        if how == "truncated":
            os.truncate(last, 5000)
        else:
            with open(last, "r+b") as file:
                file.seek(-100, os.SEEK_END)
                file.write(bytes(100))

    refused(change_while_reading(source, out, change), 3, last.name)
    assert not out.exists()


# ----------------------------------------------------------------------------------------------------- full, read-only


@contextlib.contextmanager
def small_disk(where: Path, size: str) -> Iterator[Path]:
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(where)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs to mount a tmpfs, which takes root with CAP_SYS_ADMIN")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)


def test_a_disk_that_is_too_small_is_found_first(llama, tmp_path):
    with small_disk(tmp_path / "disk", "2m") as disk:
        refused(quantize(llama, disk / "out"), 4, disk / "out", "bytes", "free")
        assert not list(disk.iterdir())


def test_a_disk_that_fills_up(llama, whole, tmp_path):
    with small_disk(tmp_path / "disk", "24m") as disk:
        out = disk / "out"
        process = start("quantize", llama, out, "--threads", "1", "--max-shard-size", "700KB", "-q")
        hungry = contextlib.suppress(OSError)
        with paused(lambda: bool(complete_shards(out)), process), hungry, open(disk / "hog", "wb", buffering=0) as hog:
            while hog.write(bytes(4096)):
                pass
        stdout, stderr = process.communicate(timeout=60)
        refused(subprocess.CompletedProcess([], process.returncode, stdout, stderr), 4, "No space left", out)
        finished = complete_shards(out)
        assert finished
        assert [p.name for p in out.iterdir()] == [STAGE]
        (disk / "hog").unlink()
        done = quantize(llama, out, "--resume")
        assert (done.returncode, done.stderr) == (0, "")
        assert contents(out) == whole
        assert complete_shards(out).items() >= finished.items()


def test_a_limit_on_the_size_of_files(llama, tmp_path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    refused(quantize(llama, tmp_path / "out", preexec_fn=limit), 4, "File too large", "model-00001-of-")
    assert not (tmp_path / "out").exists()


def test_a_limit_on_open_files(llama, tmp_path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))

    refused(quantize(llama, tmp_path / "out", preexec_fn=limit), 4, "Too many open files", llama)
    assert not (tmp_path / "out").exists()


def test_a_read_only_target(single, tmp_path):
    with small_disk(tmp_path / "disk", "2m") as disk:
        (disk / "there").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for out in (disk / "out", disk / "a" / "b", disk / "there"):
            refused(run("quantize", single, out, "-q"), 4, disk, "Read-only file system")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_target_without_permission(single, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    refused(run("quantize", single, locked / "out", "-q"), 4, "Permission denied")


def test_a_read_only_source(tmp_path):
    with small_disk(tmp_path / "disk", "2m") as disk:
        source = write_single(disk / "source")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert run("quantize", source, tmp_path / "out", "-q").returncode == 0


# --------------------------------------------------------------------------------------------------------- destinations


@pytest.mark.parametrize(
    "place",
    ["source", "source/", "source/.", "source/new", "link", "link/new/deep", ".", "up/source", "source/../source"],
)
def test_the_source_is_no_destination(single, tmp_path, place, here, monkeypatch):
    (tmp_path / "link").symlink_to("source")
    (tmp_path / "up").symlink_to(".")
    before = identity(single)
    # Paths that are relative count too.
    monkeypatch.chdir(tmp_path)
    for mode in ([], ["--overwrite"], ["--resume"]):
        refused(here("quantize", "source", place, "-q", *mode), 2, "source")
    assert identity(single) == before


def test_a_bind_mount_of_the_source_is_no_destination(single, tmp_path):
    with small_disk(tmp_path / "disk", "1m"):
        mounted = tmp_path / "mounted"
        mounted.mkdir()
        subprocess.run(["mount", "--bind", str(single), str(mounted)], check=True)
        try:
            before = identity(single)
            refused(run("quantize", single, mounted, "-q", "--overwrite"), 2, "is the source itself")
            refused(run("quantize", single, mounted / "out", "-q"), 2, "is inside the source")
            assert identity(single) == before
        finally:
            subprocess.run(["umount", str(mounted)], check=True)


def test_files_hard_linked_into_the_destination_stay(single, tmp_path, here):
    out = tmp_path / "out"
    out.mkdir()
    for path in single.iterdir():
        os.link(path, out / path.name)
    before = identity(single)
    refused(here("quantize", single, out, "-q"), 2, out, "not empty", "--overwrite")
    assert here("quantize", single, out, "-q", "--overwrite").returncode == 0
    assert identity(single) == before
    assert contents(out) != contents(single)


def test_a_source_that_links_into_the_destination(single, tmp_path, here):
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in single.iterdir():
        (linked / path.name).symlink_to(path)
    before = identity(single)
    refused(here("quantize", linked, single, "-q", "--overwrite"), 2, "links to")
    assert identity(single) == before
    assert here("quantize", linked, tmp_path / "out", "-q").returncode == 0


def test_destinations_that_are_no_folders(single, tmp_path, here):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    refused(here("quantize", single, tmp_path / "file", "-q"), 2, "is a file")
    refused(here("quantize", single, tmp_path / "file", "-q", "--overwrite"), 2, "is a file")
    refused(here("quantize", single, tmp_path / "file" / "x", "-q"), 4, "Not a directory")
    refused(here("quantize", single, tmp_path / "dangling", "-q"), 2, "leads nowhere")
    refused(here("quantize", single, tmp_path / "loop" / "x", "-q"), 4, "symbolic links")
    refused(
        run("quantize", single, "", "-q", "--overwrite", cwd=tmp_path), 2, "dst must be the folder to write to, got ''"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "file", "loop", "source"]
    assert (tmp_path / "file").read_text() == "mine"


def test_odd_paths(single, tmp_path):
    odd = os.fsencode(tmp_path) + b"/a b\xff\n\xe2\x80\xae\x1b[31m"
    os.mkdir(odd)
    shutil.copytree(os.fsencode(single), odd + b"/s")
    with open(odd + b"/s/t\xfe\n.txt", "w") as file:
        file.write("x")
    done = run("quantize", os.fsdecode(odd + b"/s"), os.fsdecode(odd + b"/d/"))
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert sorted(os.listdir(odd + b"/d")) == [b"config.json", b"model.safetensors", b"t\xfe\n.txt"]
    os.truncate(odd + b"/s/model.safetensors", 20)
    refused(run("quantize", os.fsdecode(odd + b"/s"), os.fsdecode(odd + b"/e"), "-q"), 3, "cut short")
    assert not os.path.exists(odd + b"/e")


# --------------------------------------------------------------------------------------------------------------- input


def damaged(header: dict[str, Any] | bytes, data: int = 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def entry(dtype: str = "U8", shape: object = (8,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


FILES = {
    "empty": (b"", "0 bytes"),
    "short": (b"\x01", "1 bytes"),
    "long header": (b"\xff" * 40, "18446744073709551615"),
    "cut header": (damaged({"a": entry()})[:30], "cut short"),
    "cut data": (damaged({"a": entry()}, 7), "cut short"),
    "more data": (damaged({"a": entry()}, 9), "no tensor owns"),
    "zip": (b"PK\x03\x04" + bytes(60), "safetensors"),
    "bad JSON": (damaged(b'{"a":'), "EOF"),
    "bad text": (damaged(b'{"\xff":1}'), "UTF-8"),
    "deep": (damaged(b'{"a":' + b"[" * 100_000), "valid"),
    "overlap": (damaged({"a": entry(), "b": entry(offsets=(4, 12))}, 12), '"b"'),
    "reversed": (damaged({"a": entry(offsets=(8, 0))}), "reversed"),
    "overflow": (damaged({"a": entry(shape=(2**40, 2**40))}), "overflows"),
    "huge": (damaged({"a": entry(shape=(2**70,))}), '"a"'),
    "negative": (damaged({"a": entry(shape=(-8,))}), "-8"),
    "unknown dtype": (damaged({"a": entry("INT4")}), "INT4"),
    "duplicate": (damaged(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)), "two tensors"),
    "control characters": (damaged({"\n\x1b[2J": entry("\n\x1b[2J", (8,), (1, 9))}, 9), "\\n"),
    "unknown key": (damaged({"a": {**entry(), "\n\x1b[31m": 1}}), "unknown field"),
    "no tensors": (damaged({}, 0), "no tensor"),
    "long name": (damaged({"x" * 1_000_000: entry("?")}), "xxx"),
}


@pytest.mark.parametrize("case", FILES)
def test_broken_files_are_refused(tmp_path, case, here):
    data, word = FILES[case]
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.safetensors").write_bytes(data)
    (source / "config.json").write_text(json.dumps(CONFIG))
    text = refused(here("quantize", source, tmp_path / "out", "-q"), 3, "model.safetensors", word)
    assert len(text) < 3000
    refused(here("inspect", source / "model.safetensors"), 3, "model.safetensors")
    assert not (tmp_path / "out").exists()


INDICES = {
    "missing shard": ({"a": "no.safetensors"}, "no.safetensors"),
    "absent tensor": ({"a": "x.safetensors", "b\n": "x.safetensors"}, "b\\n"),
    "above": ({"a": "../x.safetensors"}, "../x.safetensors"),
    "absolute": ({"a": "/x.safetensors"}, "/x.safetensors"),
    "pickle": ({"a": "x.bin"}, "x.bin"),
    "empty": ({}, "empty"),
    "no names": ([], "weight_map"),
    "number": ({"a": 1}, "weight_map"),
}


@pytest.mark.parametrize("case", INDICES)
def test_broken_indices_are_refused(tmp_path, case, here):
    weight_map, word = INDICES[case]
    source = tmp_path / "source"
    source.mkdir()
    for folder in (source, tmp_path):
        write_tensors(folder / "x.safetensors", {"a": ("BF16", [64, 64], bytes(8192))})
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(here("quantize", source, tmp_path / "out", "-q"), 3, "model.safetensors.index.json", word)
    assert not (tmp_path / "out").exists()


def test_what_is_no_checkpoint(tmp_path, here):
    source, out = tmp_path / "source", tmp_path / "out"
    refused(here("quantize", source, out, "-q"), 3, source)
    source.mkdir()
    refused(here("quantize", source, out, "-q"), 3, source, "model.safetensors")
    (source / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    refused(here("quantize", source, out, "-q"), 3, source, "pickled", "save_pretrained")
    os.mkfifo(source / "model.safetensors")
    refused(here("quantize", source, out, "-q"), 3, "model.safetensors", "regular file")
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").mkdir()
    refused(here("quantize", source, out, "-q"), 3, "model.safetensors", "regular file")
    (source / "model.safetensors").rmdir()
    with socket.socket(socket.AF_UNIX) as listener:
        before = os.getcwd()
        os.chdir(source)  # the path of a socket is at most 108 bytes long
        listener.bind("model.safetensors")
        os.chdir(before)
        refused(here("quantize", source, out, "-q"), 3, "model.safetensors", "regular file")
    (source / "model.safetensors").unlink()
    for target in ("/dev/zero", "model.safetensors", "nowhere"):
        (source / "model.safetensors").symlink_to(target)
        done = here("quantize", source, out, "-q")
        refused(done, 3 if target == "/dev/zero" else 4, "model.safetensors")
        (source / "model.safetensors").unlink()
    assert not out.exists()


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (b"", "JSON"),
        (b"[]", "object"),
        (b"{" * 200_000, "config.json"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, "config.json"),
        (b'{"\xff": 1}', "config.json"),
        (
            json.dumps({**CONFIG, "quantization_config": {"quant_method": "gptq\n\x1b[2J"}}).encode(),
            "quantized already",
        ),
        (json.dumps({**CONFIG, "quantization_config": {"load_in_4bit": True}}).encode(), "dequantize"),
    ],
)
def test_broken_configs_are_refused(single, tmp_path, config, word, here):
    (single / "config.json").write_bytes(config)
    refused(here("quantize", single, tmp_path / "out", "-q"), 3, "config.json", word)
    assert not (tmp_path / "out").exists()


def test_a_config_that_is_no_file(single, tmp_path, here):
    (single / "config.json").unlink()
    (single / "config.json").mkdir()
    refused(here("quantize", single, tmp_path / "out", "-q"), 3, "config.json", "file")
    (single / "config.json").rmdir()
    with open(single / "config.json", "wb") as file:
        file.truncate(2**30)
    refused(here("quantize", single, tmp_path / "out", "-q"), 3, "config.json", 2**30)
    assert not (tmp_path / "out").exists()


def test_an_output_is_no_source(single, tmp_path, here):
    out = tmp_path / "out"
    assert here("quantize", single, out, "-q").returncode == 0
    refused(here("quantize", out, tmp_path / "again", "-q"), 3, "quantized already", "dequantize")
    (out / "config.json").unlink()
    refused(here("quantize", out, tmp_path / "again", "-q"), 3, "4-bit already", "dequantize")
    refused(here("dequantize", single, tmp_path / "again", "-q"), 3, single, "no 4-bit weight")
    assert not (tmp_path / "again").exists()


NONFINITE = {"NaN": 0x7FC0, "inf": 0x7F80, "-inf": 0xFF80}


@pytest.mark.parametrize("value", NONFINITE)
@pytest.mark.parametrize("at", [0, 1234, 4095])
def test_nonfinite_weights_are_named(tmp_path, value, at, here):
    weights = np.frombuffer(bfloat16(np.random.default_rng(0), 64, 64), np.uint16).copy()
    weights[at] = NONFINITE[value]
    source, out = write_single(tmp_path / "source", weights.tobytes()), tmp_path / "out"
    name = '"model.layers.0.mlp.up_proj.weight"'
    done = here("quantize", source, out, "-q")
    refused(
        done,
        3,
        "model.safetensors",
        name,
        f"element {at} ",
        f"must be finite, got {value};",
        "[64, 64]",
        "--allow-nonfinite",
    )
    assert not out.exists()
    assert here("quantize", source, out, "-q", "--rule", "up_proj=keep", "--rule", "norm=keep").returncode == 3
    for _ in range(2):
        assert here("quantize", source, out, "-q", "--allow-nonfinite", "--overwrite").returncode == 0
    assert here("verify", source, out).returncode == 0


def test_nonfinite_weights_of_a_transposed_layer_are_named_as_stored(tmp_path, here):
    # GPT-2 stores [in, out]: row 5, column 7 of 64 x 192 is element 5 * 192 + 7, whatever it becomes.
    weights = np.frombuffer(bfloat16(np.random.default_rng(0), 64, 192), np.uint16).copy().reshape(64, 192)
    weights[5, 7] = NONFINITE["NaN"]
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    name = "transformer.h.0.attn.c_attn.weight"
    write_tensors(source / "model.safetensors", {name: ("BF16", [64, 192], weights.tobytes())})
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    (source / "config.json").write_text(json.dumps(config))
    refused(here("quantize", source, out, "-q"), 3, name, f"element {5 * 192 + 7} ", "[64, 192]", "NaN")
    assert not out.exists()
    assert here("quantize", source, out, "-q", "--allow-nonfinite").returncode == 0


def test_names_and_tensors_of_all_kinds_survive(tmp_path, here):
    source, out, back = (tmp_path / name for name in ("source", "out", "back"))
    source.mkdir()
    rng = np.random.default_rng(0)
    odd = "model.layers.1.mlp.ev\x1b[2Jil\n\u202e.weight"
    tensors = {
        "model.layers.0.mlp.up_proj.weight": ("BF16", [64, 64], bfloat16(rng, 64, 64)),
        odd: ("F32", [3, 5], rng.standard_normal((3, 5), np.float32).tobytes()),
        "scalar": ("F32", [], bytes(4)),
        "empty.weight": ("F32", [0, 64], b""),
        "eight": ("F8_E4M3", [2, 2], b"abcd"),
        "four": ("F4", [2, 2], b"ab"),
        "flags": ("BOOL", [3], b"\0\1\0"),
        "": ("I64", [1], bytes(8)),
    }
    write_tensors(source / "model.safetensors", tensors)
    (source / "config.json").write_text(json.dumps(CONFIG))
    plan = here("quantize", source, "--plan")
    assert plan.returncode == 0
    assert "\x1b" not in plan.stdout
    assert "ev\\x1b[2Jil\\n\\u202e" in plan.stdout
    done = here("quantize", source, out)
    assert done.returncode == 0
    assert "\x1b" not in done.stderr + done.stdout
    with safe_open(out / "model.safetensors", "np") as file:
        assert set(file.keys()) >= set(tensors)
        assert f"{odd}.quant_state.bitsandbytes__nf4" in file.keys()  # noqa: SIM118
    for path in (out, out / "model.safetensors"):
        done = here("inspect", path)
        assert done.returncode == 0
        assert "\x1b" not in done.stdout
    assert here("verify", source, out, "-q").returncode == 0
    assert here("dequantize", out, back, "-q").returncode == 0
    raw = (back / "model.safetensors").read_bytes()
    for name in ("eight", "four", "flags"):
        assert tensors[name][2] in raw
    with safe_open(back / "model.safetensors", "np") as file:
        assert set(file.keys()) == set(tensors)


def test_a_small_file_that_changes_while_it_is_copied(llama, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(llama, source)

    def change() -> None:
        (source / "tokenizer.json").write_text("{} and more")

    refused(change_while_reading(source, out, change), 3, "tokenizer.json", "changed")
    assert not out.exists()


def test_a_run_that_is_watched_never_shows_half_an_output(llama, whole, tmp_path):
    """Another program that waits for config.json finds a whole checkpoint."""
    out = tmp_path / "out"
    seen: list[set[str]] = []

    def watch() -> None:
        while not (out / "config.json").exists() and len(seen) == 0:
            time.sleep(0)
        seen.append({p.name for p in out.glob("*.safetensors*")})

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    assert quantize(llama, out).returncode == 0
    watcher.join(10)
    assert seen == [{n for n in whole if ".safetensors" in n}]
