"""Runs that are killed, stopped, or meet one another; sources that change meanwhile."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from offline_runs import (
    LAYERS,
    SHARDS,
    STAGE,
    complete_shards,
    contents,
    identity,
    one_line,
    paused,
    quantize,
    refused,
    run,
    start,
    wait_for,
    write_single,
)
from safetensors import safe_open

pytestmark = pytest.mark.usefixtures("nothing_else_is_touched")


def kill(process: subprocess.Popen[str], out: Path, shards: int, moment: float) -> bool:
    """Kill a run when so many shards are complete and so many seconds have passed; true when it was not over yet.

    Counted in shards, because how long a run takes differs tenfold with what else the machine does.
    """
    wait_for(lambda: (out / STAGE).exists() and len(complete_shards(out)) >= shards, process)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(moment)
    process.kill()
    process.communicate(timeout=600)
    return process.returncode == -signal.SIGKILL


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_runs_say_how_to_go_on(llama, whole, tmp_path, number):
    out = tmp_path / "out put"
    # A signal is looked at every fiftieth of a second; a fast machine may be done by then.
    for _ in range(20):
        process = start("quantize", llama, out, "--threads", "1", "--max-shard-size", "700KB", "-q")
        with paused(lambda: len(complete_shards(out)) >= 2, process):
            process.send_signal(number)
        stdout, stderr = process.communicate(timeout=600)
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
    assert first.communicate(timeout=600) == ("", "")
    assert first.returncode == 0
    assert contents(out) == whole


def test_many_that_start_together_leave_one_output(single, tmp_path):
    out = tmp_path / "out"
    processes = [start("quantize", single, out, "-q") for _ in range(6)]
    ends = [(p.communicate(timeout=600), p.returncode) for p in processes]
    assert [code for _, code in ends].count(0) == 1, ends
    for (_, stderr), code in ends:
        if code:
            assert code == 2, stderr
            one_line(stderr)
    assert sorted(contents(out)) == ["config.json", "model.safetensors"]


def change_while_reading(source: Path, out: Path, change: Callable[[], None]) -> subprocess.CompletedProcess[str]:
    process = start("quantize", source, out, "--threads", "1", "--max-shard-size", "700KB", "-q")
    with paused(lambda: bool(complete_shards(out)), process):
        change()
    stdout, stderr = process.communicate(timeout=600)
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
