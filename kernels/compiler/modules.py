"""Which kernel sources are compiled, for which virtual architectures, and for which GPUs they are assembled."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

KERNELS = Path(__file__).resolve().parent.parent

# Contraction would change bits, as would flushing denormals; both are fixed here and not left to defaults.
FLAGS = ("--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")

SHIPPED = ("75", "80", "90", "90a", "100", "120")
"""Machines that get cubins. One for 8.0 runs on 8.6 to 8.9 too, one for 12.0 on 12.1; the others take the PTX."""


@dataclass(frozen=True)
class Module:
    """One compilation: a source for a virtual architecture, and the machines whose resources are checked.

    Of a source with one kernel, `instance` tells apart what `defines` make of it. An architecture with an "a" is for
    that machine alone.
    """

    source: str
    arch: str
    machines: tuple[str, ...]
    instance: str = ""
    defines: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        """What the constants and kernels of the source are filed under, on every architecture."""
        return "_".join(filter(None, (self.source, self.instance)))

    @property
    def name(self) -> str:
        """The stem and the architecture."""
        return f"{self.stem}_{self.arch}"

    @property
    def path(self) -> Path:
        """The source file."""
        return KERNELS / f"{self.source}.cu"

    @property
    def flags(self) -> tuple[str, ...]:
        """NVRTC's options, without those that name folders."""
        defines = (f"--define-macro={define}" for define in self.defines)
        return (*FLAGS, f"--gpu-architecture=compute_{self.arch}", *defines)

    @property
    def cubins(self) -> tuple[str, ...]:
        """The machines that it is assembled for in a build."""
        return tuple(machine for machine in self.machines if machine in SHIPPED)

    def is_for_tests(self, kernel: str) -> bool:
        """Whether a kernel is for tests and benches alone: definitions, and floors to compare with."""
        return self.source == "floor" or "reference" in kernel.split("_")


def _gemm(element: str, tokens: int) -> Module:
    """A module of gemm.cu, which has one kernel each."""
    instance = f"{element.lower()}_{tokens}"
    defines = (f"GEMM_NAME=gemm_{instance}", f"GEMM_ELEMENT={element}", f"GEMM_TOKENS={tokens}")
    return Module("gemm", "90a", ("90a",), instance, defines)


def _int8_tile(tokens: int) -> Module:
    """A module of int8_tile.cu, which has one kernel each."""
    defines = (f"INT8_TILE_NAME=int8_tile_{tokens}", f"INT8_TILE_TOKENS={tokens}")
    return Module("int8_tile", "90a", ("90a",), str(tokens), defines)


_ALL = ("75", "80", "86", "89", "90", "100", "120")
_BEFORE_HOPPER = ("75", "80", "86", "89")
_SINCE_AMPERE = ("80", "86", "89", "90", "100", "120")
_SINCE_HOPPER = ("90", "100", "120")

MODULES = (
    # What benches compare with.
    Module("floor", "75", _ALL),
    # Without packed conversions and bfloat16: cards of compute capability 7.5.
    Module("dequantize", "75", ("75",)),
    Module("dequantize", "80", _SINCE_AMPERE),
    Module("quantize", "75", _BEFORE_HOPPER),
    Module("nested", "75", _BEFORE_HOPPER),
    # One starts before the other has ended.
    Module("quantize", "90", _SINCE_HOPPER),
    Module("nested", "90", _SINCE_HOPPER),
    Module("expand", "75", _ALL),
    Module("embedding", "75", ("75",)),
    Module("embedding", "80", _SINCE_AMPERE),
    Module("dequantize_8bit", "75", ("75",)),
    Module("dequantize_8bit", "80", _SINCE_AMPERE),
    Module("quantize_8bit", "75", _ALL),
    Module("rows", "75", ("75",)),
    Module("rows", "80", _SINCE_AMPERE),
    Module("product", "75", _ALL),
    Module("gemv", "75", _ALL),
    # mma.m16n8k16 of bfloat16.
    Module("decode", "80", _SINCE_AMPERE),
    # Takes more shared memory than others have.
    Module("decode_ring", "90", ("90", "100")),
    Module("decode_ring_long", "90", ("90", "100")),
    # 8-bit activations and products, which start early where that can be.
    *(Module(f"int8_{name}", arch, machines) for name in ("activations", "product") for arch, machines in (
        ("75", ("75",)), ("80", _BEFORE_HOPPER[1:]), ("90", _SINCE_HOPPER),
    )),
    Module("int8_plain", "75", _ALL),
    # Products of warpgroups.
    *(_gemm(element, tokens) for element in ("Bf16", "F16") for tokens in (64, 96, 128, 192, 256)),
    *(_int8_tile(tokens) for tokens in (64, 128, 256)),
)


def sources_of(path: Path) -> list[Path]:
    """A source file and every file of kernels/ that it includes, directly or not."""
    found = [path]
    for file in found:
        for name in re.findall(r'^#include "([^"]+)"', file.read_text(encoding="utf-8"), re.MULTILINE):
            included = KERNELS / name
            # What is in a folder is for the processor alone.
            if "/" not in name and included not in found:
                found.append(included)
    return sorted(found)


def digest(files: list[Path]) -> str:
    """SHA-256 over names and contents."""
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.name}\0".encode() + file.read_bytes() + b"\0")
    return total.hexdigest()
