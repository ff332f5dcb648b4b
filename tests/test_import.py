"""What `import halfbyte` loads, what works without the optional packages, and how their absence is reported."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import fresh
import halfbyte
import pytest
from halfbyte._extras import require

PACKAGE = Path(halfbyte.__file__).parent
HEAVY = ("torch", "transformers", "numpy")

# Makes every import of the named packages fail, as on a machine that lacks them.
BLOCK = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Absent())
"""

# Everything about the config that needs no other package.
USE = """
import copy, json, pickle, sys, tempfile
import halfbyte

dir(halfbyte)
config = halfbyte.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                     bnb_4bit_compute_dtype="torch.bfloat16", bnb_4bit_quant_storage="float16",
                                     llm_int8_skip_modules=["lm_head"])
assert config.bnb_4bit_compute_dtype == "bfloat16" and config.bnb_4bit_quant_storage == "float16"
assert config.to_json_string(use_diff=False) == json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\\n"
with tempfile.NamedTemporaryFile("r") as file:
    config.to_json_file(file.name)
    read = json.load(file)
assert halfbyte.BitsAndBytesConfig.from_dict(read) == config
assert halfbyte.BitsAndBytesConfig.coerce(read) == config
assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
assert type(config) is config.__class__ is halfbyte.BitsAndBytesConfig
for bad, kind in ({"bnb_4bit_compute_dtype": "bf16"}, ValueError), ({"bnb_4bit_quant_storage": 8}, ValueError), \
                 ({"load_in_4bit": 1}, TypeError):
    try:
        halfbyte.BitsAndBytesConfig(**bad)
    except kind as error:
        assert next(iter(bad)) in str(error)
    else:
        raise SystemExit(f"accepted {bad}")
"""

TELL = """
print(config.to_json_string(use_diff=False))
loaded = sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "transformers", "numpy"})
assert not loaded, f"halfbyte loaded {loaded}"
"""

EXPECTED = """{
  "_load_in_4bit": true,
  "_load_in_8bit": false,
  "bnb_4bit_compute_dtype": "bfloat16",
  "bnb_4bit_quant_storage": "float16",
  "bnb_4bit_quant_type": "nf4",
  "bnb_4bit_use_double_quant": true,
  "llm_int8_enable_fp32_cpu_offload": false,
  "llm_int8_has_fp16_weight": false,
  "llm_int8_skip_modules": [
    "lm_head"
  ],
  "llm_int8_threshold": 6.0,
  "load_in_4bit": true,
  "load_in_8bit": false,
  "quant_method": "bitsandbytes"
}"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds halfbyte where this one does."""
    paths = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=600)


def test_config_works_where_the_others_are_absent():
    done = run_python(BLOCK.format(blocked=HEAVY) + USE + TELL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == EXPECTED


@pytest.mark.parametrize("package", HEAVY)
def test_the_block_blocks(package):
    """The test above would be void otherwise."""
    done = run_python(BLOCK.format(blocked=HEAVY) + f"import {package}")
    assert done.returncode != 0
    assert f"No module named '{package}'" in done.stderr


def test_config_loads_none_of_the_others_where_they_are_installed():
    for package in HEAVY:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    done = run_python(USE + TELL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == EXPECTED


def test_import_alone_loads_what_registers_and_nothing_heavy():
    done = run_python("import sys, halfbyte; print(*sorted(name for name in sys.modules if 'halfbyte' in name))")
    assert done.stdout.split() == [
        "halfbyte",
        "halfbyte.config",
        "halfbyte.dtypes",
        "halfbyte.integrations",
        "halfbyte.integrations._when_imported",
        "halfbyte.integrations.register",
        "halfbyte.integrations.saved_config",
        "halfbyte.integrations.served",
        "halfbyte.models",
        "halfbyte.models.observers",
    ], done.stderr


def test_dtypes_become_torchs_once_torch_is_loaded():
    pytest.importorskip("torch")
    code = "\nimport torch\nassert config.bnb_4bit_compute_dtype is torch.bfloat16\n"
    code += "assert config.bnb_4bit_quant_storage is torch.float16\n"
    code += "assert config == halfbyte.BitsAndBytesConfig.from_dict(read, bnb_4bit_compute_dtype=torch.bfloat16)\n"
    code += "print(config.to_json_string(use_diff=False))\nassert b'torch' not in pickle.dumps(config)"
    done = run_python(USE + code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == EXPECTED


def test_public_names_agree():
    """`__all__`, the table of lazy names, `dir` and what type checkers see are one list."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.asname: (node.module, alias.name) for node in checked.body for alias in node.names}
    assert seen == {name: (home, name) for name, home in halfbyte._HOME.items()}
    assert list(halfbyte._HOME) == halfbyte.__all__ == sorted(halfbyte.__all__)
    assert set(halfbyte.__all__) <= set(dir(halfbyte))


@pytest.mark.parametrize("name", halfbyte.__all__)
def test_every_public_name_resolves(name):
    home = pytest.importorskip(halfbyte._HOME[name])
    assert getattr(halfbyte, name) is getattr(home, name)
    assert vars(halfbyte)[name] is getattr(home, name)


def test_unknown_name():
    with pytest.raises(AttributeError, match=r"'halfbyte' has no attribute 'BitsAndByteConfig'.*BitsAndBytesConfig"):
        halfbyte.BitsAndByteConfig  # noqa: B018
    assert not hasattr(halfbyte, "torch")


def test_version_is_the_crates():
    pytest.importorskip("halfbyte._native")
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", halfbyte.__version__)
    manifest = PACKAGE.parents[1] / "Cargo.toml"
    if manifest.exists():
        assert f'\nversion = "{halfbyte.__version__}"\n' in manifest.read_text("utf-8")


def test_require_gives_the_module():
    assert require("json", "torch", "this test") is sys.modules["json"]
    assert require("os.path", "torch", "this test") is os.path


def test_require_names_package_and_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError) as caught:
        require("transformers", "transformers", "--selection transformers")
    assert str(caught.value) == (
        "--selection transformers needs the package 'transformers', which is not installed: "
        "pip install 'halfbyte[transformers]'"
    )
    assert caught.value.name == "transformers"
    with pytest.raises(ImportError, match=r"'no_such_package'.*halfbyte\[torch\]"):
        require("no_such_package.part", "torch", "this test")


def test_require_leaves_errors_of_broken_packages(tmp_path, monkeypatch):
    """A package that is there but lacks one of its own imports is not helped by our advice."""
    (tmp_path / "broken_package.py").write_text("import absent_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'absent_dependency'$"):
        require("broken_package", "torch", "this test")
    with pytest.raises(ModuleNotFoundError, match=r"json\.absent"):
        require("json.absent", "torch", "this test")


def test_extras_named_in_messages_exist():
    """Every `require(..., extra, ...)` of the package names an extra that pyproject.toml defines."""
    manifest = PACKAGE.parents[1] / "pyproject.toml"
    if not manifest.exists():
        pytest.skip("not run from a source tree")
    section = manifest.read_text("utf-8").split("[project.optional-dependencies]")[1].split("\n[")[0]
    defined = set(re.findall(r"^([\w-]+) = \[", section, flags=re.MULTILINE))
    assert "torch" in defined
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require":
                assert isinstance(node.args[1], ast.Constant), f"{path}:{node.lineno}: give the extra literally"
                assert node.args[1].value in defined, f"{path}:{node.lineno}"


@pytest.mark.parametrize("folder", ["halfbyte/.venv/site-packages", "site-packages"])
def test_bitsandbytes_is_real_wherever_it_is_installed(tmp_path, folder):
    pytest.importorskip("torch")
    place = tmp_path / folder / "bitsandbytes"
    place.mkdir(parents=True)
    (place / "__init__.py").write_text("")
    done = run_python(
        f"import sys\nsys.path.insert(0, {str(place.parent)!r})\n"
        "from halfbyte.integrations.served import has_bitsandbytes\nprint(has_bitsandbytes())"
    )
    assert done.stdout == "True\n", done.stderr


def test_bitsandbytes_that_is_served_is_not_the_real_one():
    pytest.importorskip("torch")
    done = fresh.run(
        "import halfbyte.compat\n"
        "from halfbyte.integrations.served import has_bitsandbytes\n"
        "halfbyte.compat.install()\nprint(has_bitsandbytes())\nimport bitsandbytes\nprint(has_bitsandbytes())"
    )
    assert done.stdout == "False\nFalse\n", done.stderr
