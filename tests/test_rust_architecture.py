"""The Rust crates: which depend on which, and no circle of files among their imports."""

import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CRATES = ("core", "cuda", "python")

Module = tuple[str, ...]


def _dependencies(package: str) -> set[str]:
    """All packages that `package` needs, in any way, as Cargo.lock lists them."""
    packages = {}
    for block in (ROOT / "Cargo.lock").read_text().split("[[package]]")[1:]:
        name = re.search(r'^name = "(.+)"', block, re.MULTILINE)
        assert name is not None
        needs = re.search(r"^dependencies = \[(.*?)\]", block, re.MULTILINE | re.DOTALL)
        packages.setdefault(name[1], set()).update(re.findall(r'^ "([^" ]+)', needs[1], re.MULTILINE) if needs else ())
    found: set[str] = set()
    new = {package}
    while new:
        found |= new
        new = set().union(*(packages[name] for name in new)) - found
    return found - {package}


def _trees(text: str) -> list[str]:
    """The paths of a use tree: `a::{b, c::{d, e}}` is `a::b`, `a::c::d` and `a::c::e`."""
    head, brace, rest = text.strip().partition("{")
    if not brace:
        return [head.split(" as ")[0].strip()]
    depth, parts = 0, [""]
    for character in rest.rstrip().removesuffix("}"):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [(head + path).removesuffix("::self") for part in parts if part.strip() for path in _trees(part)]


def _code(path: Path) -> str:
    """The text of a file without comments and without its tests."""
    text = re.sub(r"//.*", "", path.read_text())
    text = re.sub(r"#\[cfg\(test\)\]\s*(?:pub )?mod \w+(?:;| \{.*)", "", text, flags=re.DOTALL)
    text = re.sub(r"#\[cfg\(test\)\]\s*(pub )?use [^;]*;", "", text)
    inline = re.search(r"^ *(?:pub(?:\(.*?\))? )?mod (?!sealed\b)(\w+) \{", text, re.MULTILINE)
    assert inline is None, f"{path}: move mod {inline and inline[1]} to a file of its own"
    return text


def imports(crate: Path) -> dict[Module, set[Module]]:
    """Which files of a crate each of its files names. Tests are left out: they may look at everything."""
    files: dict[Module, Path] = {}
    for path in sorted(crate.rglob("*.rs")):
        parts = path.relative_to(crate).with_suffix("").parts
        if "tests" not in parts:
            files[parts if parts[-1] not in ("mod", "lib") else parts[:-1]] = path
    graph = {}
    for module, path in files.items():
        text = _code(path)
        names = [n for use in re.findall(r"\buse ([^;]+);", text) for n in _trees(use)]
        text = re.sub(r"\buse [^;]+;", "", text)
        names += re.findall(r"(?<![\w:])\w+(?:::\w+)+", text)
        graph[module] = {_file_of(name.split("::"), module, files) for name in names} - {None, module}
    return graph


def _file_of(name: list[str], module: Module, files: dict[Module, Path]) -> Module | None:
    """The file that a path names something of; `None` when it is none of the crate's."""
    if name[0] == "crate":
        at: Module = ()
    elif name[0] in ("self", "super"):
        at = module[: len(module) - name.count("super")]
    elif (*module, name[0]) in files:
        at, name = (*module, name[0]), name[1:]
    else:
        return None
    for part in name:
        if (*at, part) in files:
            at = (*at, part)
    return at


def _circle(graph: dict[Module, set[Module]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return ["::".join(("crate", *module)) for module in error.args[1]]
    return []


def test_core_needs_neither_python_nor_cuda() -> None:
    assert not _dependencies("halfbyte") & {"pyo3", "cudarc", "halfbyte-cuda", "halfbyte-python"}


def test_cuda_needs_no_python_and_python_needs_both() -> None:
    assert not _dependencies("halfbyte-cuda") & {"pyo3", "halfbyte-python"}
    assert {"halfbyte", "halfbyte-cuda", "pyo3", "cudarc"} <= _dependencies("halfbyte-python")


@pytest.mark.parametrize("crate", CRATES)
def test_imports_of_a_crate_go_in_no_circle(crate: str) -> None:
    graph = imports(ROOT / "rust" / crate / "src")
    assert sum(map(len, graph.values())) > len(graph), "imports are found"
    assert not _circle(graph), "these files import each other"


def test_imports_in_a_circle_are_found(tmp_path: Path) -> None:
    texts = {
        "lib.rs": "mod a;\nmod b;\nmod c;\n",
        "a.rs": "use crate::b::{self, c as d};\n// use super::c;\n",
        "b/mod.rs": "mod inner;\npub use inner::Inner;\n",
        "b/inner.rs": "use std::{fmt, io};\nuse crate::c;\n#[cfg(test)]\nmod tests {\n    use crate::a;\n}\n",
        "c.rs": "pub fn f() {}\n",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    graph = imports(tmp_path)
    assert graph[("a",)] == {("b",)}
    assert graph[("b", "inner")] == {("c",)}
    assert _circle(graph) == []
    (tmp_path / "c.rs").write_text("pub fn f() { super::a::g() }\n")
    assert set(_circle(imports(tmp_path))) == {"crate::a", "crate::b", "crate::b::inner", "crate::c"}
