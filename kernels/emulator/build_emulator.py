"""Compile a kernel source of this folder's parent, or of tests/, for the processor.

    python kernels/emulator/build_emulator.py                   every kernel source, in every mode
    python kernels/emulator/build_emulator.py SOURCE.cu MODE    one; prints where it is

A mode is "library" (a shared library, for many launches), "asan" (a program with AddressSanitizer and
UndefinedBehaviorSanitizer), "tsan" (a program with ThreadSanitizer, whose threads are those of the kernel), "stores" (a
library that knows each access to shared memory, for what copies and matrix units do there), or "ucontext" (a library
with the portable way to switch stacks). What was built of the same files in the same way is not built again:
.cache/emulator/ of the repository keeps it, for any number of processes that build at the same time.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent
if str(KERNELS) not in sys.path:
    sys.path.append(str(KERNELS))

from compiler.modules import MODULES  # noqa: E402

CACHE = KERNELS.parent / ".cache" / "emulator"

# Aliasing as CUDA's compilers treat it; contraction would change bits.
COMMON = ("-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Wextra", "-pthread")
# `#pragma unroll` is for CUDA; a parameter that one instance of a template does not need is not a mistake.
KERNEL_ONLY = (
    "-DHALFBYTE_EMULATOR",
    "-Wno-unknown-pragmas",
    "-Wno-unused-parameter",
    "-Wno-unused-but-set-parameter",
    "-Wno-psabi",
)
SANITIZED = ("-O1", "-g1", "-fno-omit-frame-pointer")


@dataclass(frozen=True)
class Mode:
    """How kernels are compiled: `flags` for them, `defines` for the engine, which no sanitizer touches."""

    flags: tuple[str, ...]
    link: tuple[str, ...]
    defines: tuple[str, ...] = ()


MODES = {
    "library": Mode(("-O1", "-g1"), ("-shared",)),
    "ucontext": Mode(("-O2", "-g1"), ("-shared",), ("-DEMULATOR_UCONTEXT=1",)),
    "asan": Mode(
        (*SANITIZED, "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
        ("-fsanitize=address,undefined",),
        ("-DEMULATOR_ASAN=1",),
    ),
    "tsan": Mode(
        (*SANITIZED, "-fsanitize=thread", "-DHALFBYTE_EMULATOR_RACES"), ("-fsanitize=thread",), ("-DEMULATOR_TSAN=1",)
    ),
    # The engine has the functions that the compiler then calls before each access: stores.cpp.
    "stores": Mode(("-O1", "-g1", "-fsanitize=thread"), ("-shared", "-ldl"), ("-DEMULATOR_STORES=1",)),
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


def instances(source: Path) -> list[tuple[str, ...]]:
    """What is defined for each of the times that a source is compiled to PTX, where that is more than once."""
    return [module.defines for module in MODULES if module.path == source and module.defines]


def included(source: Path) -> str:
    """Lines that include a source, once for each of its instances."""
    line = f'#include "{source}"\n'
    text = ""
    for defines in instances(source):
        words = [define.partition("=") for define in defines]
        text += "".join(f"#define {name} {value}\n" for name, _, value in words)
        text += line + "".join(f"#undef {name}\n" for name, _, _ in words)
    return text or line


def listing(source: Path, command: list[str]) -> str:
    """A C++ file with tables of the kernels of a source, and of its whole-number constants."""
    with tempfile.TemporaryDirectory() as folder:
        all_of_it = Path(folder, source.name)
        all_of_it.write_text(included(source), encoding="utf-8")
        text = execute(
            [
                *command,
                "-E",
                "-P",
                *COMMON,
                *KERNEL_ONLY,
                "-DHALFBYTE_EMULATOR_LISTING",
                f"-I{KERNELS}",
                "-xc++",
                str(all_of_it),
            ]
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
        f'{included(source)}#include "emulator/registry.h"\n\nnamespace emulator {{\n'
        f"const Entry entries[] = {{\n{entries}    {{nullptr, nullptr, 0, nullptr, 0}},\n}};\n"
        f"const Constant constants[] = {{\n{values}    {{nullptr, 0}},\n}};\n}}  // namespace emulator\n"
    )


@contextmanager
def making(target: Path) -> Iterator[Path | None]:
    """A folder to make `target` in, which only this thread of this process does meanwhile; None when it is there.

    Others wait. The file that the caller leaves in the folder under the target's name then takes its place in one step.
    The system frees the lock of a process that is killed, and the next one throws away what that one had begun.
    """
    if target.exists():
        yield None
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            yield None
            return
        prefix = f"{target.name}.partial-"
        for abandoned in target.parent.glob(f"{prefix}*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        # A new name each time: a compiler that outlived its killed process may still write to the old one.
        with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent, ignore_cleanup_errors=True) as folder:
            yield Path(folder)
            Path(folder, target.name).replace(target)


def engine(mode: Mode, command: list[str]) -> list[Path]:
    """The objects of the engine."""
    own_headers = sorted(HERE.glob("*.h"))
    objects = []
    for source in sorted(HERE.glob("*.cpp")):
        # The others do not know what kernels are compiled with.
        defines = mode.defines if source.stem in ("fibers", "stores") else ()
        words = [*command, "-O3", *COMMON, "-fvisibility=hidden", *defines]
        name = digest([source, *own_headers], version(tuple(command)), *words)
        target = CACHE / f"{source.stem}-{name}.o"
        with making(target) as folder:
            if folder:
                execute([*words, "-c", str(source), "-o", str(folder / target.name)])
        objects.append(target)
    return objects


def source_of(name: str) -> Path:
    """The kernel source with this file name."""
    return next(path for path in kernel_sources() if path.stem == name)


def headers() -> list[Path]:
    """Every file that a kernel source may include."""
    return [path for path in KERNELS.rglob("*.cuh") if not path.is_relative_to(HERE)]


def build(source: Path, mode_name: str, command: list[str] | None = None) -> Path:
    """Compile a source in a mode, unless that has been done; gives the library or the program.

    BuildError with the compiler's words when it fails, OSError when there is no compiler.
    """
    command = command or compiler()
    mode = MODES[mode_name]
    words = [*command, *COMMON, *KERNEL_ONLY, *mode.flags, "-fvisibility=hidden", f"-I{KERNELS}"]
    files = sorted({*headers(), *HERE.glob("*.h"), *HERE.glob("*.cpp"), Path(__file__), source})
    name = digest(files, version(tuple(command)), *words, *mode.link, *mode.defines, *map(str, instances(source)))
    shared = "-shared" in mode.link
    target = CACHE / f"{source.stem}-{mode_name}-{name}{'.so' if shared else ''}"
    with making(target) as folder:
        if folder:
            table, compiled = folder / "kernels.cpp", folder / "kernels.o"
            table.write_text(listing(source, command), encoding="utf-8")
            execute([*words, "-c", str(table), "-o", str(compiled)])
            objects = [str(path) for path in [compiled, *engine(mode, command)]]
            # What a library is linked with comes behind what needs it.
            execute([*command, "-pthread", *objects, *mode.link, "-o", str(folder / target.name)])
    return target


def kernel_sources() -> list[Path]:
    """The sources that are compiled to PTX."""
    return sorted({module.path for module in MODULES})


def engine_sources() -> list[Path]:
    """The sources that test the engine."""
    return sorted((HERE / "tests").glob("*.cu"))


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
        pairs = [(source, mode_name) for source in kernel_sources() + engine_sources() for mode_name in MODES]
    else:
        raise SystemExit(__doc__)
    for built in build_all(pairs).values():
        if isinstance(built, BuildError):
            raise SystemExit(f"error: {built}")
        print(built)


if __name__ == "__main__":
    main()
