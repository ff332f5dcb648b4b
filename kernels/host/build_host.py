"""Compile a kernel source of this folder's parent, or of tests/, for the processor.

    python kernels/host/build_host.py                   every kernels/*.cu, in every mode
    python kernels/host/build_host.py SOURCE.cu MODE    one; prints where it is

A mode is "library" (a shared library, for many launches), "asan" (a program with AddressSanitizer and
UndefinedBehaviorSanitizer), "tsan" (a program with ThreadSanitizer, whose threads are those of the kernel), or
"ucontext" (a library with the portable way to switch stacks). What was built of the same files in the same way is not
built again: .cache/kernels-host/ of the repository keeps it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent
CACHE = KERNELS.parent / ".cache" / "kernels-host"

# Aliasing as CUDA's compilers treat it; contraction would change bits.
COMMON = ("-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Wextra", "-pthread")
# `#pragma unroll` is for CUDA; a parameter that one instance of a template does not need is not a mistake.
KERNEL_ONLY = ("-DHALFBYTE_HOST", "-Wno-unknown-pragmas", "-Wno-unused-parameter", "-Wno-unused-but-set-parameter")
SANITIZED = ("-O1", "-g1", "-fno-omit-frame-pointer")


@dataclass(frozen=True)
class Mode:
    """How kernels are compiled: `flags` for them, `defines` for the engine, which no sanitizer touches."""

    flags: tuple[str, ...]
    link: tuple[str, ...]
    defines: tuple[str, ...] = ()


MODES = {
    "library": Mode(("-O2", "-g1"), ("-shared",)),
    "ucontext": Mode(("-O2", "-g1"), ("-shared",), ("-DHOST_UCONTEXT=1",)),
    "asan": Mode(
        (*SANITIZED, "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
        ("-fsanitize=address,undefined",),
        ("-DHOST_ASAN=1",),
    ),
    "tsan": Mode((*SANITIZED, "-fsanitize=thread"), ("-fsanitize=thread",), ("-DHOST_TSAN=1",)),
}


class BuildError(RuntimeError):
    """The compiler refused; the message is what it said."""


def compiler() -> list[str]:
    """The command of the C++ compiler: the environment's CXX, else g++."""
    return shlex.split(os.environ.get("CXX", "g++"))


def execute(command: list[str]) -> str:
    """Run a command; gives its standard output."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{shlex.join(command)}\n{done.stderr}")
    return done.stdout


@functools.cache
def version(command: tuple[str, ...]) -> str:
    """What the compiler says it is. OSError when it is not there."""
    return execute([*command, "--version"])


def digest(files: list[Path], *more: str) -> str:
    """SHA-256 over files and words, shortened."""
    total = hashlib.sha256("\0".join(more).encode())
    for file in files:
        total.update(f"\0{file.name}\0".encode() + file.read_bytes())
    return total.hexdigest()[:20]


def listing(source: Path, command: list[str]) -> str:
    """A C++ file with tables of the kernels of a source, and of its whole-number constants."""
    text = execute(
        [*command, "-E", "-P", *COMMON, *KERNEL_ONLY, "-DHALFBYTE_HOST_LISTING", f"-I{KERNELS}", "-xc++", str(source)]
    )
    kernels = re.findall(
        r"\b__global__\s+void\s+__launch_bounds__\s*\(\s*([^(),]+?)\s*(?:,[^()]*)?\)\s*(\w+)\s*\(", text
    )
    if len(kernels) != text.count("__global__"):
        raise BuildError(f"{source.name}: a kernel is not of the form: __global__ void __launch_bounds__(...) name(")
    constants = re.findall(r"(?<!>\n)^constexpr (?:int|u32|i64) (\w+) =", text, re.MULTILINE)
    entries = "".join(f'    Unpack<{name}>::entry("{name}", {threads}),\n' for threads, name in kernels)
    values = "".join(f'    {{"{name}", {name}}},\n' for name in constants)
    return (
        f'#include "{source}"\n#include "host/registry.h"\n\nnamespace host {{\n'
        f"const Entry entries[] = {{\n{entries}    {{nullptr, nullptr, 0, nullptr, 0}},\n}};\n"
        f"const Constant constants[] = {{\n{values}    {{nullptr, 0}},\n}};\n}}  // namespace host\n"
    )


def place(output: Path, command: list[str]) -> None:
    """Run the command that ends with where to write, and put what it wrote to `output` in one step."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.stem}.{os.getpid()}{output.suffix}")
    try:
        execute([*command, str(partial)])
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


def engine(mode: Mode, command: list[str]) -> list[Path]:
    """The objects of the engine."""
    headers = sorted(HERE.glob("*.h"))
    objects = []
    for source in sorted(HERE.glob("*.cpp")):
        # The others do not know what kernels are compiled with.
        defines = mode.defines if source.stem == "fibers" else ()
        words = [*command, "-O2", *COMMON, "-fvisibility=hidden", *defines]
        name = digest([source, *headers], version(tuple(command)), *words)
        target = CACHE / f"{source.stem}-{name}.o"
        if not target.exists():
            place(target, [*words, "-c", str(source), "-o"])
        objects.append(target)
    return objects


def build(source: Path, mode_name: str, command: list[str] | None = None) -> Path:
    """Compile a source in a mode, unless that has been done; gives the library or the program.

    BuildError with the compiler's words when it fails, OSError when there is no compiler.
    """
    command = command or compiler()
    mode = MODES[mode_name]
    words = [*command, *COMMON, *KERNEL_ONLY, *mode.flags, "-fvisibility=hidden", f"-I{KERNELS}"]
    files = sorted({*KERNELS.glob("*.cuh"), *HERE.glob("*.h"), *HERE.glob("*.cpp"), Path(__file__), source})
    name = digest(files, version(tuple(command)), *words, *mode.link, *mode.defines)
    shared = "-shared" in mode.link
    target = CACHE / f"{source.stem}-{mode_name}-{name}{'.so' if shared else ''}"
    if target.exists():
        return target
    table = CACHE / f"{source.stem}-{name}.cpp"
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(listing(source, command), encoding="utf-8")
    objects = [str(path) for path in engine(mode, command)]
    place(target, [*words, *mode.link, str(table), *objects, "-o"])
    return target


NOT_HERE = {"gemm": "the engine has no products of warpgroups, no copies of tiles and no clusters"}
"""Sources that are for a GPU alone, and why."""


def sources() -> list[Path]:
    """The kernels' sources, and those that test the engine."""
    kernels = (path for path in sorted(KERNELS.glob("*.cu")) if path.stem not in NOT_HERE)
    return [*kernels, *sorted((HERE / "tests").glob("*.cu"))]


def build_all(pairs: list[tuple[Path, str]]) -> dict[tuple[Path, str], Path | BuildError]:
    """Build several, two at a time."""

    def attempt(pair: tuple[Path, str]) -> Path | BuildError:
        try:
            return build(*pair)
        except BuildError as error:
            return error

    for mode_name in sorted({mode_name for _, mode_name in pairs}):
        engine(MODES[mode_name], compiler())
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(pairs, pool.map(attempt, pairs), strict=True))


def main() -> None:
    """The command line."""
    if len(sys.argv) == 3:
        pairs = [(Path(sys.argv[1]).resolve(), sys.argv[2])]
    elif len(sys.argv) == 1:
        pairs = [(source, mode_name) for source in sources() for mode_name in MODES]
    else:
        raise SystemExit(__doc__)
    for built in build_all(pairs).values():
        if isinstance(built, BuildError):
            raise SystemExit(f"error: {built}")
        print(built)


if __name__ == "__main__":
    main()
