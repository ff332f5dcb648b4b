"""The command: how it starts, what it prints, what it exits with."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys

import numpy as np
import pytest
from command_line import COMMANDS, PACKAGE, environment, files, run, write_checkpoint
from halfbyte import _native
from halfbyte.cli import main as cli
from halfbyte.cli.exit_codes import EXIT_INTERNAL, EXIT_PIPE, EXIT_SYSTEM, EXIT_USAGE
from safetensors import safe_open
from safetensors.numpy import save_file

# ----------------------------------------------------------------------------------------------- start, help, version


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["quantize", "--help"], ["completion", "bash"]])
def test_start_imports_nothing_heavy(arguments):
    code = (
        "import sys\nfrom halfbyte.cli.main import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as e:\n    assert e.code == 0, e.code\n"
        "print(sorted({m.partition('.')[0] for m in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=600)
    assert done.returncode == 0, done.stderr
    loaded = set(eval(done.stderr.strip().splitlines()[-1]))
    heavy = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "asyncio", "email", "rich", "tempfile"}
    assert not loaded & (heavy if arguments[0] == "completion" else {*heavy, "argcomplete", "pydoc", "subprocess"})
    assert done.stdout
    # What one import adds is invisible to a reader, the sum is the start of the command: 0.1 s with some 130 modules.
    assert len([name for name in loaded if not name.startswith("_")]) < 140


def test_start_of_offline_tool_imports_neither_torch_nor_numpy(source, tmp_path):
    code = (
        "import sys\nfrom halfbyte.cli.main import main\n"
        f"assert main(['quantize', {str(source)!r}, {str(tmp_path / 'out')!r}, '-q']) == 0\n"
        f"assert main(['inspect', {str(source)!r}]) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub', 'rich', 'argcomplete'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=600)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert "up_proj" in done.stdout


def test_version():
    assert run("--version").stdout == f"halfbyte {_native.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert f"halfbyte {command}" in out.split("examples:")[1]
    assert "exit codes:" in out
    assert all(f"\n  {code} " in out for code in (0, 1, 2, 3, 4, 70, 130, 141))


def test_help_is_printed_without_a_command(capsys):
    assert cli.main([]) == EXIT_USAGE
    assert capsys.readouterr().out.startswith("usage: halfbyte")


# --------------------------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["quantize", "SRC"], 2, "DST must be a folder"),
        (["quantize", "SRC", "OUT", "--type", "int3"], 2, "invalid choice"),
        (["quantize", "SRC", "OUT", "--blocksize", "48"], 2, "invalid choice"),
        (["quantize", "SRC", "OUT", "--threads", "0"], 2, "at least 1"),
        (["quantize", "SRC", "OUT", "--max-shard-size", "5gb"], 2, "'5gb'"),
        (["quantize", "SRC", "OUT", "--rule", "x=int3"], 2, "x=int3"),
        (["quantize", "SRC", "OUT", "--rule", "(=nf4"], 2, "(=nf4"),
        (["quantize", "SRC", "OUT", "--overwrite", "--resume"], 2, "not allowed with"),
        (["quantize", "SRC", "SRC"], 2, "source"),
        (["quantize", "SRC", "USED"], 2, "not empty"),
        (["quan"], 2, "invalid choice"),
        (["quantize", "SRC", "OUT", "--thr", "2"], 2, "unrecognized arguments"),
        (["quantize", "./absent", "OUT"], 3, "absent: no such file or folder"),
        (["quantize", "EMPTY", "OUT"], 3, "model.safetensors"),
        (["quantize", "BROKEN", "OUT"], 3, "broken"),
        (["dequantize", "SRC", "OUT"], 3, "no 4-bit weight"),
        (["inspect", "BROKEN"], 3, "broken"),
        (["verify", "SRC", "EMPTY"], 3, "empty"),
        (["quantize", "org/absent", "OUT"], 4, "org/absent: no such folder"),
        (["quantize", "SRC", "/proc/nowhere/out"], 4, "/proc"),
    ],
)
def test_errors_are_one_line_with_a_code(arguments, code, words, source, tmp_path):
    places = {name: tmp_path / name.lower() for name in ("OUT", "EMPTY", "BROKEN", "USED")}
    for name in ("EMPTY", "BROKEN", "USED"):
        places[name].mkdir()
    (places["USED"] / "thesis.txt").write_text("precious")
    (places["BROKEN"] / "model.safetensors").write_bytes(b"\xff" * 64)
    before = files(source)
    done = run(*[{"SRC": source, **places}.get(a, a) for a in arguments])
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("halfbyte: error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert not places["OUT"].exists()
    assert files(source) == before
    assert files(places["USED"]) == {"thesis.txt": b"precious"}


def test_quantize_names_nonfinite_tensor_and_continues_when_allowed(tmp_path):
    source = write_checkpoint(tmp_path / "source")
    with safe_open(source / "model.safetensors", "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = np.inf
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    done = run("quantize", source, tmp_path / "out", "-q")
    assert done.returncode == 3
    assert "model.layers.1.mlp.up_proj.weight" in done.stderr
    assert str(2 * 128 + 3) in done.stderr
    assert not (tmp_path / "out").exists()
    assert run("quantize", source, tmp_path / "out", "--allow-nonfinite", "-q").returncode == 0


def test_errors_keep_hostile_names_on_one_line(tmp_path):
    source = tmp_path / "bad\n\x1b[2Jname"
    source.mkdir()
    done = run("quantize", source, tmp_path / "out")
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "\x1b" not in done.stderr
    # The command escapes as Python does, the core as Rust does: whoever finds the fault names it.
    assert re.search(r"bad\\n\\(x1b|u\{1b\})\[2Jname", done.stderr)


def test_traceback_on_request_only(tmp_path):
    assert "Traceback" not in run("inspect", "./absent").stderr
    shown = run("inspect", "./absent", HALFBYTE_TRACEBACK="1").stderr
    assert "Traceback" in shown
    assert shown.splitlines()[-1].startswith("halfbyte: error: ./absent")


@pytest.mark.parametrize("arguments", [["--version"], ["inspect", "."], ["doctor"]])
def test_errors_of_missing_compiled_module(arguments):
    code = (
        "import sys\nsys.modules['halfbyte._native'] = None\nfrom halfbyte.cli.main import main\n"
        f"sys.exit(main({arguments!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=600)
    assert (done.returncode, done.stdout) == (EXIT_SYSTEM, "")
    assert done.stderr.startswith("halfbyte: error: halfbyte's compiled module cannot be loaded")
    assert done.stderr.count("\n") == 1


def test_errors_of_halfbyte_itself_are_internal_errors(monkeypatch, capsys):
    def fail(*_: object) -> object:
        raise ZeroDivisionError("one over nothing")

    monkeypatch.setattr(_native, "inspect", fail)
    assert cli.main(["inspect", str(PACKAGE)]) == EXIT_INTERNAL
    assert "internal error: ZeroDivisionError: one over nothing" in capsys.readouterr().err


def test_stdout_reader_that_goes_away(source):
    command = [sys.executable, "-m", "halfbyte", "quantize", str(source), "--plan"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), bufsize=0
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(60) == EXIT_PIPE
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_stdout_on_a_full_disk(source):
    command = [sys.executable, "-m", "halfbyte", "quantize", str(source), "--plan"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), timeout=600)
    assert done.returncode == EXIT_SYSTEM
    assert done.stderr.startswith("halfbyte: error: standard output: ")
    assert done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------- output


def test_plan_is_a_table_and_does_nothing(source, tmp_path):
    done = run("quantize", source, tmp_path / "out", "--plan")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "up_proj" in line]
    cells = line.split("  ")
    assert cells[0] == "model.layers.{0-2}.mlp.up_proj.weight"
    assert "F16 → nf4" in line
    assert "bits per weight" in done.stdout
    assert done.stderr == ""
    assert not (tmp_path / "out").exists()


def test_plan_on_an_ascii_stream(source):
    done = run("quantize", source, "--plan", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "F16 -> nf4" in done.stdout


def test_json_is_one_object_and_nothing_else(source, tmp_path):
    out, back = tmp_path / "out", tmp_path / "back"
    plan = json.loads(run("quantize", source, "--plan", "--json").stdout)
    assert plan["totals"]["quantized_tensors"] == 6
    assert {t["name"]: t["to"] for t in plan["tensors"]}["lm_head.weight"] == "keep"
    for arguments in (
        ["quantize", source, out],
        ["inspect", out],
        ["verify", source, out],
        ["dequantize", out, back],
        ["doctor"],
    ):
        done = run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert isinstance(json.loads(done.stdout), dict)
    report = json.loads(run("quantize", source, out, "--overwrite", "--json").stdout)
    assert report["files"] == [
        {"file": "model.safetensors", "bytes": (out / "model.safetensors").stat().st_size},
    ]
    assert report["copied"] == ["tokenizer.json"]
    assert report["converted_tensors"] == 6
    assert report["quantization_config"] == json.loads((out / "config.json").read_text())["quantization_config"]


def test_quiet_prints_nothing(source, tmp_path):
    for arguments in (
        ["quantize", source, tmp_path / "out"],
        ["quantize", source, "--plan"],
        ["verify", source, tmp_path / "out"],
        ["dequantize", tmp_path / "out", tmp_path / "back"],
    ):
        done = run(*arguments, "--quiet")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_progress_is_lines_without_a_terminal(source, tmp_path):
    done = run("quantize", source, tmp_path / "out", "--max-shard-size", "20KB")
    plan = json.loads(run("quantize", source, "--plan", "--json", "--max-shard-size", "20KB").stdout)
    names = [shard["file"] for shard in plan["shards"]]
    assert len(names) > 2
    lines = done.stderr.splitlines()
    assert lines[0].startswith("quantizing ")
    assert [line.split()[0] for line in lines[1:]] == names
    assert "\r" not in done.stderr
    assert "quantized 6 of 11 tensors" in done.stdout
    assert "bits per weight" in done.stdout
    assert str(tmp_path / "out") in done.stdout


def test_progress_is_a_bar_on_a_terminal(source, tmp_path):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "halfbyte", "quantize", str(source), str(tmp_path / "out")]
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=theirs,
            env=environment(TERM="xterm", COLUMNS="60", PYTHONIOENCODING="utf-8"),
            timeout=600,
        )
        os.close(theirs)
        shown = os.read(ours, 65536).decode()
    finally:
        os.close(ours)
    assert done.returncode == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    drawn = [text.rstrip() for text in re.split(r"[\r\n]+", plain) if text.strip()]
    assert drawn[-1].startswith("quantizing 100%")
    assert all(len(text) <= 60 for text in drawn)
    # Wiped, and the cursor is back.
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1
    assert "\x1b[2K" in shown[shown.rindex("100%") :]
