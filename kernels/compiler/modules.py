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

    `source` is a path below kernels/ without its suffix; two sources never have the same file name. Of a source with
    one kernel, `instance` tells apart what `defines` make of it. An architecture with an "a" is for that machine alone.
    """

    source: str
    arch: str
    machines: tuple[str, ...]
    instance: str = ""
    defines: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        """What the constants and kernels of the source are filed under, on every architecture."""
        return "_".join(filter(None, (self.path.stem, self.instance)))

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
        return self.path.parent.name == "bench" or "reference" in kernel.split("_")


def _tile(element: str, tokens: int) -> Module:
    """A module of gemm_4bit_tile_sm90a.cu, which has one kernel each."""
    instance = f"{element.lower()}_{tokens}"
    name = f"GEMM_NAME=gemm_4bit_tile_sm90a_{instance}"
    defines = (name, f"GEMM_ELEMENT={element}", f"GEMM_TOKENS={tokens}")
    return Module("gemm/tile_sm90a/gemm_4bit_tile_sm90a", "90a", ("90a",), instance, defines)


def _block_sums(element: str, tokens: int) -> Module:
    """A module of gemm_4bit_block_sums_sm90a.cu, which has one kernel each."""
    instance = f"{element.lower()}_{tokens}"
    name = f"GEMM_NAME=gemm_4bit_block_sums_sm90a_{instance}"
    defines = (name, f"GEMM_ELEMENT={element}", f"GEMM_TOKENS={tokens}")
    return Module("gemm/tile_sm90a/gemm_4bit_block_sums_sm90a", "90a", ("90a",), instance, defines)


def _dgrad(element: str, tokens: int) -> Module:
    """A module of gemm_4bit_dgrad_sm90a.cu, which has one kernel each."""
    instance = f"{element.lower()}_{tokens}"
    name = f"DGRAD_NAME=gemm_4bit_dgrad_sm90a_{instance}"
    defines = (name, f"DGRAD_ELEMENT={element}", f"DGRAD_TOKENS={tokens}")
    return Module("gemm/dgrad_sm90a/gemm_4bit_dgrad_sm90a", "90a", ("90a",), instance, defines)


def _experts_tile(element: str, tokens: int) -> Module:
    """A module of experts_tile_sm90a.cu, which has one kernel each."""
    instance = f"{element.lower()}_{tokens}"
    name = f"EXPERTS_NAME=experts_tile_sm90a_{instance}"
    defines = (name, f"EXPERTS_ELEMENT={element}", f"EXPERTS_TOKENS={tokens}")
    return Module("experts/tile_sm90a/experts_tile_sm90a", "90a", ("90a",), instance, defines)


def _int8_tile(tokens: int) -> Module:
    """A module of int8_tile_sm90a.cu, which has one kernel each."""
    defines = (f"INT8_TILE_NAME=int8_tile_sm90a_{tokens}", f"INT8_TILE_TOKENS={tokens}")
    return Module("int8/tile_sm90a/int8_tile_sm90a", "90a", ("90a",), str(tokens), defines)


_ALL = ("75", "80", "86", "89", "90", "100", "120")
_BEFORE_HOPPER = ("75", "80", "86", "89")
_SINCE_AMPERE = ("80", "86", "89", "90", "100", "120")
_SINCE_HOPPER = ("90", "100", "120")

MODULES = (
    # What benches compare with.
    Module("bench/floor", "75", _ALL),
    # Without packed conversions and bfloat16: cards of compute capability 7.5.
    Module("quant/dequantize_blockwise4", "75", ("75",)),
    Module("quant/dequantize_blockwise4", "80", _SINCE_AMPERE),
    Module("quant/quantize_blockwise4", "75", _BEFORE_HOPPER),
    Module("quant/quantize_absmax", "75", _BEFORE_HOPPER),
    # One starts before the other has ended.
    Module("quant/quantize_blockwise4", "90", _SINCE_HOPPER),
    Module("quant/quantize_absmax", "90", _SINCE_HOPPER),
    Module("quant/dequantize_absmax", "75", _ALL),
    Module("quant/embedding_4bit", "75", ("75",)),
    Module("quant/embedding_4bit", "80", _SINCE_AMPERE),
    Module("quant/dequantize_blockwise8", "75", ("75",)),
    Module("quant/dequantize_blockwise8", "80", _SINCE_AMPERE),
    Module("quant/quantize_blockwise8", "75", _ALL),
    Module("int8/int8_rowwise", "75", ("75",)),
    Module("int8/int8_rowwise", "80", _SINCE_AMPERE),
    Module("gemm/simt/gemm_4bit_simt", "75", _ALL),
    Module("gemm/simt/gemv_4bit", "75", _ALL),
    # The matrix units of compute capability 7.5, which have no bfloat16.
    Module("gemm/small_m_sm75/gemm_4bit_small_m_sm75", "75", ("75",)),
    Module("gemm/tile_sm75/gemm_4bit_tile_sm75", "75", ("75",)),
    # mma.m16n8k16 of bfloat16.
    Module("gemm/small_m_sm80/gemm_4bit_small_m_sm80", "80", _SINCE_AMPERE),
    Module("gemm/tile_sm80/gemm_4bit_tile_sm80", "80", _SINCE_AMPERE),
    # Takes more shared memory than others have.
    Module("gemm/small_m_sm90/gemm_4bit_small_m_sm90", "90", ("90", "100")),
    Module("gemm/small_m_sm90/gemm_4bit_small_m_sm90_long", "90", ("90", "100")),
    Module("gemm/small_m_sm90/gemm_4bit_small_m_sm90_one", "90", ("90", "100")),
    # 8-bit activations and products, which start early where that can be.
    *(
        Module(f"int8/{name}", arch, machines)
        for name in ("int8_activations", "int8_product")
        for arch, machines in (("75", ("75",)), ("80", _BEFORE_HOPPER[1:]), ("90", _SINCE_HOPPER))
    ),
    Module("int8/int8_plain", "75", _ALL),
    # Mixtures of experts, which start early where that can be.
    *(
        Module(f"experts/{name}", arch, machines)
        for name in ("experts_route", "experts_few", "experts_sum")
        for arch, machines in (("80", _BEFORE_HOPPER[1:]), ("90", _SINCE_HOPPER))
    ),
    # For training.
    Module("experts/experts_dequantize", "80", _SINCE_AMPERE),
    Module("lora/lora_down", "80", _SINCE_AMPERE),
    Module("lora/lora_up", "80", _SINCE_AMPERE),
    # Products of warpgroups, and what brings tokens together for them.
    Module("experts/experts_gather", "90", ("90",)),
    Module("experts/experts_gather_few", "90", ("90",)),
    *(_tile(element, tokens) for element in ("Bf16", "F16") for tokens in (64, 96, 128, 192, 256)),
    *(_block_sums(element, tokens) for element in ("Bf16", "F16") for tokens in (32, 48, 64)),
    *(_dgrad(element, tokens) for element in ("Bf16", "F16") for tokens in (64, 128, 256)),
    *(_experts_tile(element, tokens) for element in ("Bf16", "F16") for tokens in (16, 32, 64, 128)),
    *(_int8_tile(tokens) for tokens in (64, 128, 256)),
)


def sources_of(path: Path) -> list[Path]:
    """A source file and every file of kernels/ that it includes, directly or not; those of the emulator left out."""
    found = [path]
    for file in found:
        for name in re.findall(r'^#include "([^"]+)"', file.read_text(encoding="utf-8"), re.MULTILINE):
            included = KERNELS / name
            # What kernels are compiled to for the processor is no part of their PTX.
            if not name.startswith("emulator/") and included not in found:
                found.append(included)
    return sorted(found)


def place_of(file: Path) -> str:
    """Where a source is below kernels/; of a file elsewhere its name."""
    return file.relative_to(KERNELS).as_posix() if file.is_relative_to(KERNELS) else file.name


def digest(files: list[Path]) -> str:
    """SHA-256 over places and contents."""
    total = hashlib.sha256()
    for file in files:
        total.update(f"{place_of(file)}\0".encode() + file.read_bytes() + b"\0")
    return total.hexdigest()
