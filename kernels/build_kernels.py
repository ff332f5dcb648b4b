"""Compile the .cu files of kernels/ to PTX and assemble it to cubins: neither a CUDA toolkit nor a GPU is needed.

    python kernels/build_kernels.py build --out DIR     what rust/cuda/build.rs embeds into the extension module
    python kernels/build_kernels.py lock                write kernels.lock.json and resources.json anew
    python kernels/build_kernels.py check               compare with both; fails on spills and growth
    python kernels/build_kernels.py ptx KERNEL          print the PTX of one kernel, for every architecture

The packages of requirements/kernels.txt hold NVRTC, the headers and ptxas; --nvidia says where they are installed
(`pip install --target DIR -r requirements/kernels.txt`), or HALFBYTE_NVIDIA; else they are looked for on sys.path and
in .cache/nvidia.
Without them every command ends with status 3. What was compiled is kept in .cache/kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from compiler import build, tools
from compiler.modules import KERNELS, MODULES

LOCK = KERNELS / "kernels.lock.json"
RESOURCES = KERNELS / "resources.json"
MISSING_TOOLS = 3


def lock_text(compiled: list[build.Compiled]) -> str:
    """kernels.lock.json: a line for each kernel and for the constants of each source."""
    text = json.dumps(build.describe(compiled), indent=1)
    # Innermost objects and lists on one line.
    text = re.sub(r"([\[{])\s+([^\[\]{}]*?)\s+([\]}])", lambda m: m[1] + re.sub(r"\n\s*", " ", m[2]) + m[3], text)
    return text + "\n"


def compare_lock(text: str) -> list[str]:
    """In which modules kernels.lock.json differs from what the sources give."""
    committed = LOCK.read_text(encoding="utf-8") if LOCK.exists() else "{}"
    if committed == text:
        return []
    old, new = json.loads(committed), json.loads(text)
    found = []
    for part in sorted(old.keys() | new.keys()):
        a, b = old.get(part, {}), new.get(part, {})
        differing = (name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name))
        found += [f"kernels.lock.json: {part}: {name}" for name in differing]
    return found or ["kernels.lock.json: only its form differs"]


def resources(builder: build.Builder, compiled: list[build.Compiled]) -> dict[str, dict[str, build.Assembled]]:
    """What every kernel takes, by module and machine, then by kernel."""
    jobs = [(c.module, machine, k) for c in compiled for machine in c.module.machines for k in c.kernels]
    made = builder.assemble_all([(kernel, machine) for _, machine, kernel in jobs])
    table: dict[str, dict[str, build.Assembled]] = {}
    for (module, machine, kernel), one in zip(jobs, made, strict=True):
        table.setdefault(f"{module.name} sm_{machine}", {})[kernel.name] = one
    return table


def compare_resources(found: dict[str, dict[str, build.Assembled]]) -> list[str]:
    """Spills, and where a kernel takes more than is committed."""
    committed: dict[str, Any] = json.loads(RESOURCES.read_text(encoding="utf-8")) if RESOURCES.exists() else {}
    problems = []
    for where, kernels in found.items():
        for kernel, used in kernels.items():
            allowed = committed.get(where, {}).get(kernel)
            if used.spills:
                problems.append(f"{where}: {kernel} spills or has a stack: {used.spills} bytes")
            if allowed is None:
                problems.append(f"{where}: {kernel} is not in resources.json")
                continue
            for what, amount, most in zip(("registers", "shared"), (used.registers, used.shared), allowed, strict=True):
                if amount > most:
                    problems.append(f"{where}: {kernel} takes {amount} {what}, {most} are committed")
    return problems


def resources_text(found: dict[str, dict[str, build.Assembled]]) -> str:
    """resources.json: registers and static shared memory."""
    table = {
        where: {name: [used.registers, used.shared] for name, used in kernels.items()}
        for where, kernels in found.items()
    }
    return re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", json.dumps(table, indent=1)) + "\n"


def assemble_with_others(builder: build.Builder, compiled: list[build.Compiled], ptxas: list[str]) -> int:
    """Kernels with products of warpgroups, by other assemblers: drivers of their age have the same one.

    Whether such products overlap, or are serialized with warning C75xx, has differed from version to version.
    """
    jobs = [(k, machine) for c in compiled for machine in c.module.machines if machine.endswith("a") for k in c.kernels]
    for path in ptxas:
        builder.assemble_all(jobs, Path(path))
    return len(jobs)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("build", "lock", "check", "ptx"))
    parser.add_argument("kernel", nargs="?", help="of `ptx`: its name")
    nvidia = os.environ.get("HALFBYTE_NVIDIA") or None
    parser.add_argument("--nvidia", metavar="DIR", default=nvidia, help="where requirements/kernels.txt is installed")
    parser.add_argument("--out", metavar="DIR", help="of `build`: the folder to write to")
    parser.add_argument(
        "--test-kernels", action="store_true", help="of `build`: with those that are for tests and benches"
    )
    parser.add_argument(
        "--cubins",
        choices=("all", "native"),
        default=os.environ.get("HALFBYTE_CUBINS") or "all",
        help="of `build`: for all GPUs, or for those of this machine, others taking the PTX (HALFBYTE_CUBINS)",
    )
    parser.add_argument(
        "--ptxas", metavar="FILE", action="append", default=[], help="of `check`: another assembler to try"
    )
    parser.add_argument("--cache", metavar="DIR", help="where compiled code is kept (default: .cache/kernels)")
    parser.add_argument("--jobs", metavar="N", type=int, help="processes at a time (default: as many as processors)")
    arguments = parser.parse_args()
    if (arguments.command == "build") != (arguments.out is not None):
        parser.error("--out goes with build, and build with --out")
    if (arguments.command == "ptx") != (arguments.kernel is not None):
        parser.error("a kernel's name goes with ptx, and ptx with one")

    try:
        found = tools.find(arguments.nvidia)
    except tools.MissingToolsError as error:
        how = "pip install --target DIR -r requirements/kernels.txt, then HALFBYTE_NVIDIA=DIR"
        print(f"error: {error}: {how}", file=sys.stderr)
        raise SystemExit(MISSING_TOOLS) from None
    try:
        run(arguments, build.Builder(found, build.cache_folder(arguments.cache, arguments.out), arguments.jobs))
    except tools.CompileError as error:
        raise SystemExit(f"error: {error}") from None


def run(arguments: argparse.Namespace, builder: build.Builder) -> None:
    """One command."""
    if arguments.command == "build":
        capabilities = tools.local_capabilities() if arguments.cubins == "native" else None
        made = build.write_build(
            builder, Path(arguments.out), for_tests=arguments.test_kernels, capabilities=capabilities
        )
        print(made)
        return
    compiled = builder.compile_all()
    if arguments.command == "ptx":
        texts = [kernel.ptx for one in compiled for kernel in one.kernels if kernel.name == arguments.kernel]
        if not texts:
            raise SystemExit(
                f"error: KERNEL must be the name of a kernel in kernels.lock.json, got {arguments.kernel!r}"
            )
        print("\n".join(texts), end="")
        return
    used = resources(builder, compiled)
    if arguments.command == "lock":
        LOCK.write_text(lock_text(compiled), encoding="utf-8")
        RESOURCES.write_text(resources_text(used), encoding="utf-8")
    problems = [*compare_lock(lock_text(compiled)), *compare_resources(used)]
    if problems:
        raise SystemExit(
            "error: the kernels differ from what is committed (make kernels-lock writes it anew):\n  "
            + "\n  ".join(problems)
        )
    count = assemble_with_others(builder, compiled, arguments.ptxas)
    print(f"kernels: {len(MODULES)} modules as kernels.lock.json has them, {sum(map(len, used.values()))} assembled")
    if arguments.ptxas:
        print(f"ptxas: {count} kernels with each of {len(arguments.ptxas)} other versions, none serialized")


if __name__ == "__main__":
    main()
