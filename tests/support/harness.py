"""Kernels on the processor: launches as data, run in this process or in a program with a sanitizer.

A `Case` has buffers and the launches that use them. `Library` runs it with the arrays of this process; `Program`
writes it to a file, for a build with AddressSanitizer or ThreadSanitizer to run. Both give what is in the buffers
afterwards.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import build_emulator
import numpy as np
import pytest
from compiler.modules import sources_of
from numpy.typing import NDArray

GUARD = 64
CANARY = 0xA5
# A report of a sanitizer ends the program with this.
SANITIZER_EXIT = 66


class KernelError(Exception):
    """What the engine found wrong with a kernel, or with its launch."""


class SanitizerError(Exception):
    """What a sanitizer reported."""


@dataclass(eq=False)
class Buffer:
    """Memory of a device: the bytes of `data`, `shift` bytes behind a multiple of 256.

    `addresses`: at which bytes of it the addresses of others are; afterwards these are zeros.
    """

    data: np.ndarray
    shift: int = 0
    addresses: Sequence[tuple[int, Buffer]] = ()

    def without_addresses(self, data: np.ndarray) -> np.ndarray:
        """What a run left in it, fit to be compared with another run's."""
        for at, _ in self.addresses:
            data.reshape(-1).view(np.uint8)[at : at + 8] = 0
        return data


@dataclass(frozen=True)
class Argument:
    """The bytes of one argument, and the buffers whose addresses are in it, by their place."""

    data: bytes
    addresses: tuple[tuple[int, Buffer], ...] = ()


def int32(value: int) -> Argument:
    """An `int` or, of the same bits, a `u32`."""
    return Argument(struct.pack("<I", value & 0xFFFFFFFF))


def int64(value: int) -> Argument:
    """An `i64`."""
    return Argument(struct.pack("<q", value))


def pointers(*buffers: Buffer | None) -> Argument:
    """A pointer, or a struct of several. None is null."""
    places = tuple((8 * i, buffer) for i, buffer in enumerate(buffers) if buffer is not None)
    return Argument(bytes(8 * len(buffers)), places)


def tensor_map(
    buffer: Buffer, item: int, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int], swizzle: int
) -> Argument:
    """A tensor map as kernels/emulator/engine.h has it: elements of `item` bytes, the innermost dimension first."""
    rank = len(sizes)
    dimensions = [*sizes, *[0] * (5 - rank), *box, *[0] * (5 - rank)]
    data = struct.pack("<Q4I10I4Q", 0, 0x70616D74, rank, item, swizzle, *dimensions, *strides, *[0] * (5 - rank))
    return Argument(data.ljust(128, b"\0"), ((0, buffer),))


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid and its arguments.

    `window`: the first of the blocks that are run, and how many; None: all. `cluster`: the blocks of one. `in_order`:
    whether blocks wait for what those that start before them do.
    """

    kernel: str
    grid: int
    block: int
    arguments: Sequence[Argument]
    shared: int = 0
    window: tuple[int, int] | None = None
    cluster: int = 1
    in_order: bool = False

    def order(self, highest_first: bool) -> int:
        """Which threads and blocks come first, as kernels/emulator/launch.h has it."""
        return 2 if highest_first and self.in_order else int(highest_first)

    def blocks(self) -> tuple[int, int]:
        """The first block that is run, and how many are."""
        return self.window or (0, self.grid)


@dataclass(frozen=True)
class Case:
    """Launches one after another."""

    launches: Sequence[Launch]
    buffers: list[Buffer] = field(init=False)

    def __post_init__(self) -> None:
        """Finds the buffers, each once."""
        found: dict[int, Buffer] = {}
        for launch in self.launches:
            for argument in launch.arguments:
                for _, buffer in argument.addresses:
                    found[id(buffer)] = buffer
                    found |= {id(other): other for _, other in buffer.addresses}
        object.__setattr__(self, "buffers", list(found.values()))


class _Launch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint64),
        ("first_block", ctypes.c_uint64),
        ("blocks", ctypes.c_uint64),
        ("cluster", ctypes.c_uint32),
        ("highest_first", ctypes.c_uint32),
        ("count", ctypes.c_uint32),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("sizes", ctypes.POINTER(ctypes.c_uint64)),
    )


def _describe(text: str) -> tuple[dict[str, int], dict[str, int]]:
    kernels = {match[1]: int(match[2]) for match in re.finditer(r"^kernel (\w+) (\d+)", text, re.MULTILINE)}
    constants = {match[1]: int(match[2]) for match in re.finditer(r"^constant (\w+) (-?\d+)$", text, re.MULTILINE)}
    return kernels, constants


class Library:
    """A source as a shared library in this process. Writes outside of a buffer are found when they are close to it."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.halfbyte_emulator_launch.restype = ctypes.c_char_p
        self._library.halfbyte_emulator_describe.restype = ctypes.c_char_p
        self.description: str = self._library.halfbyte_emulator_describe().decode()
        self.threads, self.constants = _describe(self.description)

    def run(self, case: Case, highest_first: bool = False) -> list[np.ndarray]:
        """The buffers of a case afterwards, in their order."""
        memory = []
        for buffer in case.buffers:
            data = np.ascontiguousarray(buffer.data)
            outer = np.full(data.nbytes + buffer.shift + 2 * GUARD + 256, CANARY, np.uint8)
            begin = GUARD + -(outer.ctypes.data + GUARD) % 256 + buffer.shift
            outer[begin : begin + data.nbytes] = data.reshape(-1).view(np.uint8)
            memory.append((outer, begin, data))
        addresses = {id(b): m[0].ctypes.data + m[1] for b, m in zip(case.buffers, memory, strict=True)}
        for buffer, (outer, begin, _) in zip(case.buffers, memory, strict=True):
            for at, other in buffer.addresses:
                struct.pack_into("<Q", outer, begin + at, addresses[id(other)])
        for launch in case.launches:
            self.launch(launch, addresses, highest_first)
        results = []
        for k, (outer, begin, data) in enumerate(memory):
            end = begin + data.nbytes
            if not ((outer[:begin] == CANARY).all() and (outer[end:] == CANARY).all()):
                raise KernelError(f"a write outside of buffer {k}, which has {data.nbytes} bytes")
            result = outer[begin:end].copy().view(data.dtype).reshape(data.shape)
            results.append(case.buffers[k].without_addresses(result))
        return results

    def launch(self, launch: Launch, addresses: dict[int, int], highest_first: bool = False) -> None:
        """Run one launch on memory of this process: `addresses` has that of each buffer by the buffer's id."""
        values = []
        for argument in launch.arguments:
            data = bytearray(argument.data)
            for at, buffer in argument.addresses:
                struct.pack_into("<Q", data, at, addresses[id(buffer)])
            # At a multiple of 64, as a tensor map needs.
            outer = np.zeros(len(data) + 64, np.uint8)
            begin = -outer.ctypes.data % 64
            outer[begin : begin + len(data)] = np.frombuffer(bytes(data), np.uint8)
            values.append(outer[begin:])
        first, blocks = launch.blocks()
        raw = _Launch(
            kernel=launch.kernel.encode(),
            grid=(launch.grid, 1, 1),
            block=(launch.block, 1, 1),
            shared=launch.shared,
            first_block=first,
            blocks=blocks,
            cluster=launch.cluster,
            highest_first=launch.order(highest_first),
            count=len(values),
            arguments=(ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values)),
            sizes=(ctypes.c_uint64 * len(values))(*(len(argument.data) for argument in launch.arguments)),
        )
        error = self._library.halfbyte_emulator_launch(ctypes.byref(raw))
        if error:
            raise KernelError(error.decode())


# What the sanitizers are told. A leak of the engine is none of a kernel; one report is enough.
OPTIONS = {
    "ASAN_OPTIONS": f"detect_leaks=0:exitcode={SANITIZER_EXIT}",
    "UBSAN_OPTIONS": f"print_stacktrace=1:exitcode={SANITIZER_EXIT}",
    "TSAN_OPTIONS": f"halt_on_error=1:exitcode={SANITIZER_EXIT}:atexit_sleep_ms=0",
}


def _fixed_addresses() -> None:
    # Older race detectors do not start where addresses are too random. Without the permission they may still.
    ctypes.CDLL(None).personality(0x0040000)


class Program:
    """A source as a program with a sanitizer; a process for each run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.description = self._execute([]).decode()
        self.threads, self.constants = _describe(self.description)

    def _execute(self, arguments: list[str]) -> bytes:
        done = subprocess.run(
            [self.path, *arguments],
            capture_output=True,
            check=False,
            env={**os.environ, **OPTIONS},
            preexec_fn=_fixed_addresses,
            timeout=600,
        )
        text = done.stderr.decode(errors="replace")
        if done.returncode == 1 and "runtime error" not in text:
            raise KernelError(text.strip())
        if done.returncode != 0:
            raise SanitizerError(f"exit status {done.returncode}\n{text}")
        return done.stdout

    def run_all(self, cases: Sequence[Case], highest_first: bool = False) -> list[list[np.ndarray]]:
        """The buffers of each case afterwards, in their order."""
        with tempfile.TemporaryDirectory() as folder:
            source, output = Path(folder, "cases"), Path(folder, "output")
            source.write_bytes(b"".join(_encode(cases, highest_first)))
            self._execute([str(source), str(output)])
            data, at, results = output.read_bytes(), 0, []
            for case in cases:
                results.append([])
                for buffer in case.buffers:
                    array = np.frombuffer(data, buffer.data.dtype, buffer.data.size, at).copy()
                    results[-1].append(buffer.without_addresses(array.reshape(buffer.data.shape)))
                    at += buffer.data.nbytes
            assert at == len(data)
            return results

    def run(self, case: Case, highest_first: bool = False) -> list[np.ndarray]:
        """The buffers of a case afterwards, in their order."""
        return self.run_all([case], highest_first)[0]


def _encode(cases: Sequence[Case], highest_first: bool) -> Iterable[bytes]:
    """As kernels/emulator/program.cpp reads them."""

    def numbers(*values: int) -> bytes:
        return struct.pack(f"<{len(values)}q", *values)

    yield numbers(len(cases))
    for case in cases:
        yield numbers(len(case.buffers))
        for buffer in case.buffers:
            yield numbers(buffer.data.nbytes, buffer.shift) + np.ascontiguousarray(buffer.data).tobytes()
        index = {id(buffer): k for k, buffer in enumerate(case.buffers)}
        for buffer in case.buffers:
            yield numbers(len(buffer.addresses))
            for at, target in buffer.addresses:
                yield numbers(at, index[id(target)])
        yield numbers(len(case.launches))
        for launch in case.launches:
            yield numbers(len(launch.kernel)) + launch.kernel.encode()
            yield numbers(
                launch.grid,
                1,
                1,
                launch.block,
                1,
                1,
                launch.shared,
                *launch.blocks(),
                launch.cluster,
                launch.order(highest_first),
            )
            yield numbers(len(launch.arguments))
            for argument in launch.arguments:
                yield numbers(len(argument.data)) + argument.data + numbers(len(argument.addresses))
                for at, target in argument.addresses:
                    yield numbers(at, index[id(target)])


@functools.cache
def _tried(mode: str) -> str:
    """Why builds of this mode do not run on this machine, or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cpp")
        source.write_text("int main() {}\n", encoding="utf-8")
        link = [word for word in build_emulator.MODES[mode].link if word != "-shared"]
        try:
            build_emulator.execute([*build_emulator.compiler(), *link, str(source), "-o", str(source.with_suffix(""))])
            Program._execute(_Bare(source.with_suffix("")), [])  # type: ignore[arg-type]
        except OSError as error:
            return f"no C++ compiler: {error}"
        except (build_emulator.BuildError, KernelError, SanitizerError) as error:
            return f"{mode} does not work with {build_emulator.compiler()[0]} here: {error}"
    return ""


@dataclass
class _Bare:
    path: Path


def need(mode: str) -> None:
    """Skip the test where this mode cannot be had, with the reason."""
    reason = _tried(mode)
    if reason:
        pytest.skip(reason)


def concerns(source: Path, mode: str) -> bool:
    """Whether a source is built in a mode.

    Only the engine's own kernels are tried with the portable way to switch stacks; and what copies and matrix units do
    in shared memory only where there are such.
    """
    if mode == "ucontext":
        return source.parent.name == "tests"
    return mode != "stores" or "wgmma.cuh" in {file.name for file in sources_of(source)}


@functools.cache
def _built(mode: str) -> dict[Path, Path | build_emulator.BuildError]:
    """The kernels' sources in a mode: all at once, for they are built side by side."""
    pairs = [(source, mode) for source in build_emulator.kernel_sources() if concerns(source, mode)]
    return {source: result for (source, _), result in build_emulator.build_all(pairs).items()}


@functools.cache
def built(source: Path, mode: str) -> Library | Program:
    """A source in a mode. A kernel that does not compile fails the test."""
    need(mode)
    # Each source that tests the engine has its own file of tests: those of the kernels are not built for it.
    of_engine = source in build_emulator.engine_sources()
    result = build_emulator.build(source, mode) if of_engine else _built(mode)[source]
    if isinstance(result, build_emulator.BuildError):
        raise result
    return Library(result) if result.suffix == ".so" else Program(result)


def library(name: str) -> Library:
    """The kernel source of this name, in this process."""
    found = built(build_emulator.source_of(name), "library")
    assert isinstance(found, Library)
    return found


def program(name: str, mode: str) -> Program:
    """The kernel source of this name, with a sanitizer."""
    found = built(build_emulator.source_of(name), mode)
    assert isinstance(found, Program)
    return found


def lines_of(source: Path, mistake: str) -> set[str]:
    """Where a report of a planted mistake may say that it is: the lines that name it in a comment."""
    lines = source.read_text(encoding="utf-8").splitlines()
    return {f"{source.name}:{k}" for k, line in enumerate(lines, 1) if re.search(rf"// .*\b{mistake}\b", line)}


def run_both_ways(library: Library, case: Case) -> list[NDArray]:
    """What both orders give, which must be the same bits."""
    lowest, highest = library.run(case), library.run(case, highest_first=True)
    for k, (a, b) in enumerate(zip(lowest, highest, strict=True)):
        assert a.tobytes() == b.tobytes(), f"buffer {k} depends on the order of the threads"
    return lowest
