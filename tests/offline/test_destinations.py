"""Where the output goes: full disks, limits, permissions, links and odd paths."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from offline_runs import STAGE, complete_shards, contents, identity, paused, quantize, refused, run, start, write_single

pytestmark = pytest.mark.usefixtures("nothing_else_is_touched")

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
        stdout, stderr = process.communicate(timeout=600)
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
