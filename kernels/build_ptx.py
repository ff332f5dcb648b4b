"""Build kernels/ptx/ from kernels/*.cu with NVRTC alone: neither a CUDA toolkit nor a GPU is needed.

    python kernels/build_ptx.py               build every module, and the manifest
    python kernels/build_ptx.py --check       build again and compare with what is committed
    python kernels/build_ptx.py --assemble    assemble what is committed with ptxas, and compare registers, spills and
                                              shared memory with kernels/resources.json
    python kernels/build_ptx.py --assemble --accept     write that file anew

The packages of requirements/kernels.txt hold NVRTC, the headers and ptxas; --nvidia says where they are installed
(`pip install --target DIR -r requirements/kernels.txt`), else they are looked for on sys.path. NVRTC is of CUDA 12.0,
because PTX of a later version does not load on the drivers of CUDA 12.0: what is written here runs on every later one.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PTX = HERE / "ptx"
MANIFEST = PTX / "manifest.json"
RESOURCES = HERE / "resources.json"

# Contraction would change bits, as would flushing denormals; both are fixed here and not left to defaults.
FLAGS = ("--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")


@dataclass(frozen=True)
class Module:
    """One compiled module: a source for a virtual architecture, and the machines it is assembled for as a check.

    Of a source with one kernel, `instance` tells apart what `defines` make of it. An architecture with an "a" is for
    that machine alone.
    """

    source: str
    arch: int | str
    machines: tuple[int | str, ...]
    instance: str = ""
    defines: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The file's name without its suffix, as rust/cuda/src/ptx.rs embeds it."""
        return "_".join(filter(None, (self.source, self.instance, str(self.arch))))

    @property
    def flags(self) -> tuple[str, ...]:
        """NVRTC's options, without those that name folders."""
        defines = (f"--define-macro={define}" for define in self.defines)
        return (*FLAGS, f"--gpu-architecture=compute_{self.arch}", *defines)


def gemm(element: str, tokens: int) -> Module:
    """A module of gemm.cu: one kernel each, because the driver takes long to compile them all."""
    instance = f"{element.lower()}_{tokens}"
    defines = (f"GEMM_NAME=gemm_{instance}", f"GEMM_ELEMENT={element}", f"GEMM_TOKENS={tokens}")
    return Module("gemm", "90a", ("90a",), instance, defines)


MODULES = (
    # What benches compare with.
    Module("floor", 75, (75, 80, 86, 89, 90, 100, 120)),
    # Without packed conversions and bfloat16: cards of compute capability 7.5.
    Module("dequantize", 75, (75,)),
    Module("dequantize", 80, (80, 86, 89, 90, 100, 120)),
    Module("quantize", 75, (75, 80, 86, 89)),
    Module("nested", 75, (75, 80, 86, 89)),
    # One starts before the other has ended.
    Module("quantize", 90, (90, 100, 120)),
    Module("nested", 90, (90, 100, 120)),
    Module("expand", 75, (75, 80, 86, 89, 90, 100, 120)),
    Module("embedding", 75, (75,)),
    Module("embedding", 80, (80, 86, 89, 90, 100, 120)),
    Module("dequantize_8bit", 75, (75,)),
    Module("dequantize_8bit", 80, (80, 86, 89, 90, 100, 120)),
    Module("quantize_8bit", 75, (75, 80, 86, 89, 90, 100, 120)),
    Module("rows", 75, (75,)),
    Module("rows", 80, (80, 86, 89, 90, 100, 120)),
    Module("product", 75, (75, 80, 86, 89, 90, 100, 120)),
    Module("gemv", 75, (75, 80, 86, 89, 90, 100, 120)),
    # mma.m16n8k16 of bfloat16.
    Module("decode", 80, (80, 86, 89, 90, 100, 120)),
    # Takes more shared memory than others have.
    Module("decode_ring", 90, (90, 100)),
    Module("decode_ring_long", 90, (90, 100)),
    # Products of warpgroups.
    *(gemm(element, tokens) for element in ("Bf16", "F16") for tokens in (64, 128, 192, 256)),
)


def find(folder: str | None, *parts: str) -> Path:
    """A file or folder of NVIDIA's Python packages."""
    for base in [folder] if folder else sys.path:
        path = Path(base or ".", "nvidia", *parts)
        if path.exists():
            return path
    where = folder or "sys.path"
    raise SystemExit(
        f"error: {'/'.join(('nvidia', *parts))} is not in {where}: "
        "pip install --target DIR -r requirements/kernels.txt, then --nvidia DIR"
    )


class Nvrtc:
    """CUDA's run-time compiler, through ctypes."""

    def __init__(self, folder: str | None) -> None:
        self.include = find(folder, "cuda_runtime", "include")
        self.library = ctypes.CDLL(str(find(folder, "cuda_nvrtc", "lib", "libnvrtc.so.12")))
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self.library, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name}: {self.library.nvrtcGetErrorString(status).decode()}")

    def _text(self, program: ctypes.c_void_p, what: str) -> str:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, text)
        return text.value.decode()

    def compile(self, path: Path, flags: tuple[str, ...]) -> str:
        """The PTX of one source file."""
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), path.read_bytes(), path.name.encode(), 0, None, None)
        try:
            folders = (f"--include-path={path.parent}", f"--include-path={HERE}", f"--include-path={self.include}")
            options = [option.encode() for option in (*flags, *folders)]
            array = (ctypes.c_char_p * len(options))(*options)
            try:
                self._call("nvrtcCompileProgram", program, len(options), array)
            except RuntimeError as error:
                raise SystemExit(f"error: {path.name}: {error}\n{self._text(program, 'ProgramLog')}") from None
            log = self._text(program, "ProgramLog").strip()
            if log:
                raise SystemExit(f"error: {path.name} compiles with warnings:\n{log}")
            return self._text(program, "PTX")
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))


def sources_of(path: Path) -> list[Path]:
    """A source file and every file of this folder that it includes, directly or not."""
    found = [path]
    for file in found:
        for name in re.findall(r'^#include "([^"]+)"', file.read_text(encoding="utf-8"), re.MULTILINE):
            included = HERE / name
            # What is under emulator/ is for the processor alone.
            if not name.startswith("emulator/") and included not in found:
                found.append(included)
    return sorted(found)


def digest(files: list[Path]) -> str:
    """SHA-256 over names and contents."""
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.name}\0".encode() + file.read_bytes() + b"\0")
    return total.hexdigest()


def build(nvrtc: Nvrtc) -> dict[Path, str]:
    """The text of every file of kernels/ptx/."""
    files: dict[Path, str] = {}
    modules = {}
    for module in MODULES:
        source = HERE / f"{module.source}.cu"
        ptx = nvrtc.compile(source, module.flags)
        # The comment at the top names the compiler's build; the manifest says it once.
        ptx = re.sub(r"\A(//.*\n|\n)+", "", ptx)
        files[PTX / f"{module.name}.ptx"] = ptx
        modules[module.name] = {
            "flags": list(module.flags),
            "sources": [file.name for file in sources_of(source)],
            "sources_sha256": digest(sources_of(source)),
            "ptx_sha256": hashlib.sha256(ptx.encode()).hexdigest(),
        }
    manifest = {"nvrtc": nvrtc.version, "modules": modules}
    files[MANIFEST] = json.dumps(manifest, indent=2) + "\n"
    return files


def check(files: dict[Path, str]) -> None:
    """Fail unless kernels/ptx/ holds exactly these files."""
    present = set(PTX.glob("*"))
    problems = [f"{path.name} is not built from any source" for path in sorted(present - set(files))]
    for path, text in files.items():
        if path not in present:
            problems.append(f"{path.name} is missing")
        elif path.read_text(encoding="utf-8") != text:
            problems.append(f"{path.name} differs from what its sources give")
    if problems:
        raise SystemExit("error: kernels/ptx is not up to date (make ptx builds it):\n  " + "\n  ".join(problems))
    print(f"kernels/ptx: {len(files) - 1} modules, as their sources give them")


def assemble(ptxas: Path, module: Module, machine: int | str, folder: Path) -> dict[str, dict[str, int]]:
    """Registers, spilled bytes and static shared memory of every kernel of a module on one machine."""
    done = subprocess.run(
        [ptxas, "-v", f"-arch=sm_{machine}", "-o", folder / f"{module.name}.{machine}", PTX / f"{module.name}.ptx"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"error: ptxas, {module.name} for sm_{machine}:\n{done.stderr}")
    if found := re.search(r"\(C75\d\d\).*", done.stderr):
        # The products of a warpgroup one after another, each waited for.
        raise SystemExit(f"error: ptxas, {module.name} for sm_{machine}: {found[0]}")
    kernels: dict[str, dict[str, int]] = {}
    current: dict[str, int] = {}
    for line in done.stderr.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            current = kernels.setdefault(found[1], {"registers": 0, "spills": 0, "shared": 0})
        if found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            current["spills"] = sum(int(number) for number in found.groups())
        if found := re.search(r"Used (\d+) registers", line):
            current["registers"] = int(found[1])
        if found := re.search(r"(\d+) bytes smem", line):
            current["shared"] = int(found[1])
    return kernels


def assemble_all(ptxas: Path) -> dict[str, dict[str, dict[str, int]]]:
    """By module and machine, then by kernel."""
    pairs = [(module, machine) for module in MODULES for machine in module.machines]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda pair: assemble(ptxas, pair[0], pair[1], Path(name)), pairs)
        return {f"{m.name} sm_{machine}": kernels for (m, machine), kernels in zip(pairs, found, strict=True)}


def compare_resources(found: dict[str, dict[str, dict[str, int]]]) -> None:
    """Fail on a spill, and where a kernel takes more than is committed."""
    committed = json.loads(RESOURCES.read_text(encoding="utf-8"))
    problems = []
    for where, kernels in found.items():
        for kernel, used in kernels.items():
            allowed = committed.get(where, {}).get(kernel)
            if used["spills"]:
                problems.append(f"{where}: {kernel} spills or has a stack: {used['spills']} bytes")
            if allowed is None:
                problems.append(f"{where}: {kernel} is not in kernels/resources.json")
                continue
            for what, amount in zip(("registers", "shared"), allowed, strict=True):
                if used[what] > amount:
                    problems.append(f"{where}: {kernel} takes {used[what]} {what}, {amount} are committed")
    if problems:
        raise SystemExit(
            "error: kernels/resources.json (--assemble --accept writes it anew):\n  " + "\n  ".join(problems)
        )
    print(f"ptxas: {sum(map(len, found.values()))} kernels assembled, no spills, no growth")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvidia", metavar="DIR", help="where the packages of requirements/kernels.txt are installed")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--assemble", action="store_true", help="assemble what is committed")
    parser.add_argument("--accept", action="store_true", help="with --assemble: write kernels/resources.json")
    arguments = parser.parse_args()

    if arguments.check or not arguments.assemble:
        files = build(Nvrtc(arguments.nvidia))
        if arguments.check:
            check(files)
        else:
            PTX.mkdir(exist_ok=True)
            for path in set(PTX.glob("*")) - set(files):
                path.unlink()
            for path, text in files.items():
                path.write_text(text, encoding="utf-8")
            print(f"kernels/ptx: {len(files) - 1} modules, {sum(map(len, files.values())) // 1024} KiB")
    if arguments.assemble:
        found = assemble_all(find(arguments.nvidia, "cuda_nvcc", "bin", "ptxas"))
        if arguments.accept:
            table = {
                where: {kernel: [used["registers"], used["shared"]] for kernel, used in kernels.items()}
                for where, kernels in found.items()
            }
            text = json.dumps(table, indent=1)
            RESOURCES.write_text(re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text) + "\n", encoding="utf-8")
        compare_resources(found)


if __name__ == "__main__":
    main()
