"""NVRTC and ptxas of NVIDIA's Python packages, in the versions that requirements/kernels.txt pins.

NVRTC is of CUDA 12.0 because PTX of a later version does not load on the drivers of CUDA 12.0; ptxas is of a CUDA that
knows newer cards, and cubins of any 12.x load on every driver of CUDA 12 and later.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .modules import KERNELS

ROOT = KERNELS.parent
NVRTC, HEADERS, PTXAS = "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-runtime-cu12", "nvidia-cuda-nvcc-cu12"


class MissingToolsError(Exception):
    """The packages are not installed where they were looked for."""


class CompileError(Exception):
    """A source does not compile, or does not assemble; the message is the compiler's."""


def pinned() -> dict[str, str]:
    """Package to version, of requirements/kernels.txt."""
    text = (ROOT / "requirements" / "kernels.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w-]+)==([\w.]+)", text, re.MULTILINE))


@dataclass(frozen=True)
class Tools:
    """Where the compilers are."""

    include: Path
    nvrtc: Path
    ptxas: Path


def find(folder: str | None) -> Tools:
    """The tools below `folder`, or without one those that are installed for this interpreter or in .cache/nvidia."""
    candidates = [folder] if folder else [*sys.path, str(ROOT / ".cache" / "nvidia")]
    places = [place for place in map(Path, candidates) if (place / "nvidia").is_dir()]
    where = {}
    for package, version in pinned().items():
        # A torch for CUDA 12 brings another NVRTC: the version counts, not only the name.
        has = (place for place in places if _version(package, place) == version)
        where[package] = next(has, None)
    missing = [f"{package}=={pinned()[package]}" for package, place in where.items() if place is None]
    if missing:
        raise MissingToolsError(f"{', '.join(missing)} not in {folder or 'sys.path or .cache/nvidia'}")
    found = {package: place / "nvidia" for package, place in where.items() if place is not None}
    return Tools(
        found[HEADERS] / "cuda_runtime" / "include",
        found[NVRTC] / "cuda_nvrtc" / "lib" / "libnvrtc.so.12",
        found[PTXAS] / "cuda_nvcc" / "bin" / "ptxas",
    )


def _version(package: str, place: Path) -> str | None:
    found = importlib.metadata.distributions(name=package, path=[str(place)])
    return next((distribution.version for distribution in found), None)


class Nvrtc:
    """CUDA's run-time compiler, through ctypes."""

    def __init__(self, tools: Tools) -> None:
        self.include = tools.include
        self.library = ctypes.CDLL(str(tools.nvrtc))
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p

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
        """The PTX of one source file, without the comment at its top that names the compiler's build."""
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), path.read_bytes(), path.name.encode(), 0, None, None)
        try:
            folders = (f"--include-path={KERNELS}", f"--include-path={self.include}")
            options = [option.encode() for option in (*flags, *folders)]
            array = (ctypes.c_char_p * len(options))(*options)
            try:
                self._call("nvrtcCompileProgram", program, len(options), array)
            except RuntimeError as error:
                raise CompileError(f"{path.name}: {error}\n{self._text(program, 'ProgramLog')}") from None
            log = self._text(program, "ProgramLog").strip()
            if log:
                raise CompileError(f"{path.name} compiles with warnings:\n{log}")
            return re.sub(r"\A(//.*\n|\n)+", "", self._text(program, "PTX"))
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))


def local_capabilities() -> set[tuple[int, int]]:
    """The compute capabilities of this machine's GPUs, as its driver says; without a driver none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return set()
    count, number = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return set()
    found = set()
    for device in range(count.value):
        parts = []
        for attribute in (75, 76):  # COMPUTE_CAPABILITY_MAJOR and _MINOR
            if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device) == 0:
                parts.append(number.value)
        if len(parts) == 2:
            found.add((parts[0], parts[1]))
    return found


def assemble(ptxas: Path, ptx: Path, machine: str, cubin: Path) -> str:
    """Write a cubin; gives what ptxas says of the kernel's resources."""
    command = [ptxas, "-v", f"-arch=sm_{machine}", "-o", cubin, ptx]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(f"ptxas, {ptx.stem} for sm_{machine}:\n{done.stderr}")
    if found := re.search(r"\(C75\d\d\).*", done.stderr):
        # The products of a warpgroup one after another, each waited for.
        raise CompileError(f"ptxas, {ptx.stem} for sm_{machine}: {found[0]}")
    return done.stderr
