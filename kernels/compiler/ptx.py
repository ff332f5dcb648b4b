"""PTX as text: a compiled source taken apart into one module for each kernel, and the constants that it has.

Each kernel is a module of its own because the driver compiles or loads whole modules: a first product waits for one
kernel, not for all that were written in the same file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = r"[A-Za-z_$][\w$]*"
_DIRECTIVES = (".version", ".target", ".address_size")
# The value of `constexpr int NAME`, and of `Template<1, true>::NAME`; none is a zero.
_CONSTANT = re.compile(rf"\.global \.align \d+ \.u(32|64) ({_NAME})(?: = (-?\d+))?;")
_MEMBER = re.compile(r"_ZN(\d+)([A-Z].*)")


@dataclass(frozen=True)
class Kernel:
    """One entry function as a module of its own."""

    name: str
    ptx: str
    threads: int
    """Of a block, at most; all that are launched have as many."""
    dynamic_shared: bool
    """Whether it takes dynamic shared memory."""


def statements(ptx: str) -> list[str]:
    """The statements outside of all functions, each with its lines; comments at the top are left out."""
    found, current, depth = [], [], 0
    for line in ptx.splitlines():
        code = line.split("//")[0].rstrip()
        if not current and not code:
            continue
        current.append(line)
        depth += code.count("{") - code.count("}")
        ends = code.startswith(_DIRECTIVES) or code.endswith(";") or code == "}"
        if depth == 0 and ends:
            found.append("\n".join(current))
            current = []
    if current:
        raise ValueError(f"PTX ends within a statement: {current[0]}")
    return found


def _symbol(statement: str) -> str | None:
    """The name of the variable or function that a statement declares."""
    head = re.split(r"[=({;]", re.sub(r"\.func\s*\([^)]*\)", ".func", statement), maxsplit=1)[0]
    names = re.findall(rf"(?<![.\w$]){_NAME}", head)
    return names[-1] if names else None


def split(ptx: str) -> list[Kernel]:
    """The kernels of a compiled source, each with the tables and functions that it uses."""
    parts = statements(ptx)
    directives = [part for part in parts if part.startswith(_DIRECTIVES)]
    declared: dict[str, list[int]] = {}
    entries = []
    for at, part in enumerate(parts):
        if ".entry" in part.split("(")[0]:
            entries.append(at)
        elif part not in directives:
            name = _symbol(part)
            if name is None:
                raise ValueError(f"a statement without a name: {part.splitlines()[0]}")
            # A function may be declared before it is defined.
            declared.setdefault(name, []).append(at)
    return [_alone(parts, entry, directives, declared) for entry in entries]


def _alone(parts: list[str], entry: int, directives: list[str], declared: dict[str, list[int]]) -> Kernel:
    needed, new = set[int](), {entry}
    while new:
        needed |= new
        names = {name for at in new for name in re.findall(_NAME, parts[at])}
        new = {at for name in names for at in declared.get(name, ())} - needed
    text = parts[entry]
    name = _symbol(text.replace(".entry", ""))
    threads = re.search(r"^\.maxntid (\d+), 1, 1$", text, re.MULTILINE)
    if name is None or threads is None:
        raise ValueError(f"a kernel without a name or __launch_bounds__: {text.splitlines()[0]}")
    dynamic = any(parts[at].startswith(".extern .shared") for at in needed)
    module = "\n".join([*directives, *(parts[at] for at in sorted(needed))]) + "\n"
    return Kernel(name, module, int(threads[1]), dynamic)


def constants(ptx: str) -> dict[str, int]:
    """Whole numbers from 0 on that a source names: `constexpr`, of its namespace or a member of a template's instance.

    `Shape<64>::BYTES` is SHAPE_64_BYTES here.
    """
    found = {}
    for part in statements(ptx):
        constant = _CONSTANT.fullmatch(part)
        if constant is None:
            continue
        name = _readable(constant[2])
        if name is not None and int(constant[3] or 0) >= 0:
            found[name] = int(constant[3] or 0)
    return found


def _readable(name: str) -> str | None:
    if not name.startswith("_Z"):
        return name
    member = _MEMBER.fullmatch(name)
    if member is None:
        return None
    length = int(member[1])
    template, rest = member[2][:length], member[2][length:]
    instance = re.fullmatch(r"I((?:L[ib]\d+E)+)E\d+([A-Z]\w*)E", rest)
    if instance is None:
        return None
    return "_".join((template.upper(), *re.findall(r"L[ib](\d+)E", instance[1]), instance[2]))
