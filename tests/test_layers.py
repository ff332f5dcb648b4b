"""Imports within the package go downwards, and in no circle."""

from __future__ import annotations

import ast
from pathlib import Path

import halfbyte
import pytest

PACKAGE = Path(halfbyte.__file__).parent

# The lowest first. A module belongs to the longest name that it begins with.
LAYERS = (
    ("_native", "_extras", "_terminal", "dtypes", "geometry"),
    ("config",),
    ("ops._torch_internals", "ops.checks", "ops.checks_8bit", "ops.checks_experts", "ops.packed"),
    ("state",),
    ("backends",),
    ("ops",),
    ("codebooks",),
    ("functional",),
    ("nn",),
    ("compat",),
    ("offline",),
    ("arrays",),
    ("models",),
    ("integrations",),
    ("cli", "__main__"),
)


def modules() -> dict[str, Path]:
    """Every module of the package but the package itself, by its name in it."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        # What `compat` puts on the path of child processes is no part of the package.
        if name and not name.startswith("compat.startup"):
            found[name] = path
    return found


MODULES = modules()


def layer(name: str) -> int:
    """The index of a module's layer."""
    fits = [
        (len(start), index)
        for index, starts in enumerate(LAYERS)
        for start in starts
        if name == start or name.startswith(f"{start}.")
    ]
    assert fits, f"{name} is in no layer: add it to LAYERS"
    return max(fits)[1]


def imported(name: str, everywhere: bool) -> set[str]:
    """The modules of the package that a module imports: at its top, or `everywhere`, in functions and for types too."""
    path = MODULES[name]
    inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name.removeprefix("halfbyte.") for alias in node.names if alias.name.startswith("halfbyte.")]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = inside.split(".")
                start = ".".join(parts[: len(parts) - node.level + 1])
                base = f"{start}.{base}".strip(".")
            elif base == "halfbyte" or base.startswith("halfbyte."):
                base = base.removeprefix("halfbyte").strip(".")
            else:
                continue
            names = [f"{base}.{alias.name}".strip(".") for alias in node.names]
        else:
            continue
        for target in names:
            while target and target not in MODULES and target != "_native":
                target = target.rpartition(".")[0]
            if target and target != name:
                found.add(target)
    return found


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    above = {target for target in imported(name, everywhere=True) if layer(target) > layer(name)}
    assert not above, f"{name} imports {', '.join(sorted(above))} of a higher layer"


def test_imports_make_no_circle():
    graph = {name: imported(name, everywhere=True) & MODULES.keys() for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in graph[name]:
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_imports_are_seen():
    assert "ops.checks" in imported("ops.registry", everywhere=False)
    assert "models.quantize" in imported("integrations.transformers.quantizer", everywhere=True)
    assert "models.quantize" not in imported("integrations.transformers.quantizer", everywhere=False)
    assert layer("ops.checks") < layer("backends.cpu") < layer("ops.registry") < layer("cli.main")


def test_private_names_of_torch_are_in_one_module():
    found = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
                continue
            dotted = ast.unparse(node)
            # Its documented check of arguments, and an operation of its public library.
            known = dotted in ("torch._check", "torch._int_mm") or "ops.aten" in dotted
            if dotted.startswith("torch.") and not known:
                found.append(f"{name}:{node.lineno}: {dotted}")
    assert [entry for entry in found if not entry.startswith("ops._torch_internals:")] == []
    assert found, "the search finds those of ops._torch_internals"


def test_tests_import_from_their_folder_or_from_support():
    """Modules of another folder's tests are there only when that folder happens to be collected too."""
    root = Path(__file__).parent
    shared = {path.stem for path in [*root.glob("*.py"), *(root / "support").glob("*.py")]}
    homes: dict[str, set[Path]] = {}
    for path in root.rglob("*.py"):
        homes.setdefault(path.stem, set()).add(path.parent)
    found = []
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [
                f"{path.relative_to(root)}:{node.lineno}: {name}"
                for name in names
                if name in homes and name not in shared and path.parent not in homes[name]
            ]
    assert found == []
