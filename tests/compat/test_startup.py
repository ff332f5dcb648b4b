"""The line that a wheel has Python run when it starts, in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import halfbyte
import pytest

ROOT = Path(__file__).parents[2]
LINE = ROOT / "halfbyte.data" / "purelib" / "halfbyte_bitsandbytes.pth"
FOUND = (
    "import importlib.util, importlib.metadata\n"
    "assert importlib.util.find_spec('bitsandbytes') is not None\n"
    "assert importlib.metadata.version('bitsandbytes').startswith('0.50.2+halfbyte')\n"
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the line, and with halfbyte where the tests have it; not what halfbyte needs."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / LINE.name).write_bytes(LINE.read_bytes())
    # Comes before it, as that of an editable install does.
    (site / "halfbyte.pth").write_text(str(Path(halfbyte.__file__).parents[1]))
    return folder / "bin" / "python"


def python(interpreter: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("HALFBYTE_BITSANDBYTES", "PYTHONPATH")}
    return subprocess.run(
        [interpreter, *arguments], capture_output=True, text=True, env={**kept, **variables}, check=False
    )


@pytest.mark.parametrize("option", ["-I", "-E", "-s"])
def test_startup_serves_the_name_when_asked(environment: Path, option: str) -> None:
    done = python(environment, option, "-c", FOUND, HALFBYTE_BITSANDBYTES="1")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("variables", [{}, {"HALFBYTE_BITSANDBYTES": "0"}, {"HALFBYTE_BITSANDBYTES": ""}])
def test_startup_does_nothing_unasked(environment: Path, variables: dict[str, str]) -> None:
    ask = (
        "import sys; print([m for m in sys.modules if m.startswith(('halfbyte', 'bitsandbytes'))], len(sys.meta_path))"
    )
    done = python(environment, "-c", ask, **variables)
    assert (done.stdout, done.stderr) == ("[] 3\n", "")


def test_startup_follows_to_isolated_children(environment: Path) -> None:
    parent = "import halfbyte.compat, subprocess, sys\nhalfbyte.compat.install()\n"
    child = f"subprocess.run([sys.executable, '-I', '-c', {FOUND!r}], check=True)"
    done = python(environment, "-c", parent + child)
    assert (done.returncode, done.stderr) == (0, "")


def test_startup_is_one_line_that_imports_nothing_of_its_own() -> None:
    text = LINE.read_text()
    assert text.count("\n") == 1
    # `site` runs only lines that begin so; os is imported before it comes to them.
    assert text.startswith("import os; ")
    assert "os" in sys.modules


@pytest.mark.skipif("HALFBYTE_WHEEL" not in os.environ, reason="HALFBYTE_WHEEL names no wheel")
def test_startup_is_in_the_wheel() -> None:
    with zipfile.ZipFile(os.environ["HALFBYTE_WHEEL"]) as wheel:
        found = [n for n in wheel.namelist() if n.endswith(f".data/purelib/{LINE.name}")]
        assert len(found) == 1
        assert wheel.read(found[0]) == LINE.read_bytes()
