"""Compile and assemble every module, in parallel, with a cache: what was made of the same text is not made again."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from . import pack, ptx, tools
from .modules import MODULES, Module, digest, place_of, sources_of

_KEPT_SECONDS = 30 * 24 * 3600


@dataclass(frozen=True)
class Compiled:
    """A module's kernels and the constants of its source."""

    module: Module
    kernels: list[ptx.Kernel]
    constants: dict[str, int]


@dataclass(frozen=True)
class Assembled:
    """A kernel for one machine."""

    cubin: bytes
    registers: int
    spills: int
    shared: int
    """Static shared memory, in bytes."""


class Builder:
    """Compiles with these tools; `cache` is a folder that may be shared by several builds at a time."""

    def __init__(self, found: tools.Tools, cache: Path, jobs: int | None = None) -> None:
        self.tools = found
        self.cache = cache
        self.jobs = jobs or len(os.sched_getaffinity(0))
        cache.mkdir(parents=True, exist_ok=True)
        _remove_old(cache)

    def compile_all(self) -> list[Compiled]:
        """Every module."""
        with ProcessPoolExecutor(self.jobs) as pool:
            return list(pool.map(functools.partial(_compile, self.tools, self.cache), MODULES))

    def assemble_all(self, jobs: list[tuple[ptx.Kernel, str]], ptxas: Path | None = None) -> list[Assembled]:
        """Kernels for machines; with another assembler than the pinned one, where it is."""
        with ProcessPoolExecutor(self.jobs) as pool:
            work = functools.partial(_assemble, ptxas or self.tools.ptxas, self.cache)
            return list(pool.map(work, *zip(*jobs, strict=True), chunksize=4))

    def pack_all(self, families: list[list[pack.Image]]) -> list[bytes]:
        """A stream for each family."""
        with ProcessPoolExecutor(self.jobs) as pool:
            return list(pool.map(functools.partial(_pack, self.cache), families))


def _compile(found: tools.Tools, cache: Path, module: Module) -> Compiled:
    key = _key("ptx", digest(sources_of(module.path)), *module.flags, *sorted(tools.pinned().items()))
    path = cache / f"{key}.ptx"
    if path.exists():
        os.utime(path)
        text = path.read_text(encoding="utf-8")
    else:
        text = tools.Nvrtc(found).compile(module.path, module.flags)
        _write(path, text.encode())
    return Compiled(module, ptx.split(text), ptx.constants(text))


def _assemble(ptxas: Path, cache: Path, kernel: ptx.Kernel, machine: str) -> Assembled:
    key = _key("cubin", kernel.ptx, machine, _version_of(ptxas))
    cubin, said = cache / f"{key}.cubin", cache / f"{key}.txt"
    if not (cubin.exists() and said.exists()):
        source, partial = cache / f"{key}.{os.getpid()}.ptx", cache / f"{key}.{os.getpid()}.partial"
        source.write_text(kernel.ptx, encoding="utf-8")
        try:
            words = tools.assemble(ptxas, source, machine, partial)
            partial.replace(cubin)
        except tools.CompileError as error:
            raise tools.CompileError(f"{kernel.name}: {error}") from None
        finally:
            source.unlink()
        _write(said, words.encode())
    os.utime(cubin)
    os.utime(said)
    words = said.read_text(encoding="utf-8")

    def number(pattern: str) -> int:
        found = re.search(pattern, words)
        return sum(map(int, found.groups())) if found else 0

    return Assembled(
        cubin.read_bytes(),
        registers=number(r"Used (\d+) registers"),
        spills=number(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"),
        shared=number(r"(\d+) bytes smem"),
    )


def _pack(cache: Path, family: list[pack.Image]) -> bytes:
    content, kind = b"".join(image.content for image in family), family[0].kind
    key = _key("lzma2", pack.filters(kind, len(content)), hashlib.sha256(content).hexdigest())
    path = cache / f"{key}.lzma2"
    if path.exists():
        os.utime(path)
        return path.read_bytes()
    stream = pack.compress(kind, content)
    _write(path, stream)
    return stream


@functools.cache
def _version_of(ptxas: Path) -> str:
    return hashlib.sha256(ptxas.read_bytes()).hexdigest()


def _key(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:32]


def _write(path: Path, content: bytes) -> None:
    """By rename: another build may be reading."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)


def _remove_old(cache: Path) -> None:
    limit = time.time() - _KEPT_SECONDS
    for path in cache.iterdir():
        try:
            if path.stat().st_mtime < limit:
                path.unlink()
        except FileNotFoundError:
            continue  # by another build


def describe(compiled: list[Compiled]) -> dict[str, object]:
    """What kernels.lock.json holds: everything about the compiled kernels but their code.

    A build without the tools takes names, constants and architectures from it.
    """
    constants: dict[str, dict[str, int]] = {}
    modules = {}
    for one in compiled:
        module = one.module
        # Of one source on every architecture the same.
        known = constants.setdefault(module.stem, one.constants)
        if known != one.constants:
            differing = sorted(set(known.items()) ^ set(one.constants.items()))
            raise tools.CompileError(f"{module.name} has other constants than {module.stem} elsewhere: {differing}")
        modules[module.name] = {
            "arch": module.arch,
            "cubins": list(module.cubins),
            "flags": list(module.flags),
            "sources": [place_of(file) for file in sources_of(module.path)],
            "sources_sha256": digest(sources_of(module.path)),
            "kernels": {
                kernel.name: {
                    "threads": kernel.threads,
                    "dynamic_shared": kernel.dynamic_shared,
                    "for_tests": module.is_for_tests(kernel.name),
                    "ptx_sha256": hashlib.sha256(kernel.ptx.encode()).hexdigest(),
                }
                for kernel in one.kernels
            },
        }
    return {"tools": tools.pinned(), "constants": constants, "modules": modules}


def write_build(builder: Builder, out: Path, *, for_tests: bool, capabilities: set[tuple[int, int]] | None) -> str:
    """Write what rust/cuda/build.rs embeds to `out`; gives a line for people.

    kernels.json is what `describe` gives. kernels.bin holds one packed family after another, and images.json lists what
    is where: PTX (that ends with a zero, as the driver wants it) and cubins: for all machines, or for those of
    `capabilities`.
    """
    compiled = builder.compile_all()
    every = [(one.module, kernel) for one in compiled for kernel in one.kernels]
    shipped = [(module, kernel) for module, kernel in every if not module.is_for_tests(kernel.name)]
    wanted = every if for_tests else shipped
    # What is for tests alone may take its time to load.
    pairs = [(m, k, machine) for m, k in shipped for machine in m.cubins if is_for(machine, capabilities)]
    cubins = builder.assemble_all([(k, machine) for _, k, machine in pairs])
    images = [pack.Image(k.name, m.source, "ptx", m.arch, k.ptx.encode() + b"\0") for m, k in wanted]
    images += [
        pack.Image(k.name, m.source, "cubin", machine, made.cubin)
        for (m, k, machine), made in zip(pairs, cubins, strict=True)
    ]
    families = pack.group(images)
    streams = builder.pack_all(families)
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "kernels.bin", b"".join(streams))
    _write(out / "images.json", json.dumps(pack.index(families, streams)).encode())
    _write(out / "kernels.json", json.dumps(describe(compiled)).encode())
    raw, packed = sum(len(image.content) for image in images), sum(map(len, streams))
    return f"{len(wanted)} kernels, {len(cubins)} cubins: {raw >> 10} KiB, {packed >> 10} KiB packed"


def is_for(machine: str, capabilities: set[tuple[int, int]] | None) -> bool:
    """Whether code for a machine runs on a GPU of one of these compute capabilities."""
    major, minor = divmod(int(machine.rstrip("a")), 10)
    return capabilities is None or any(major == own and minor <= its_minor for own, its_minor in capabilities)


def cache_folder(asked: str | None, out: str | None) -> Path:
    """Where compiled code is kept: .cache/kernels of the repository, or `out` when that is read-only."""
    if asked:
        return Path(asked)
    folder = tools.ROOT / ".cache" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        if out is None:
            raise
        return Path(out) / "cache"
    writable = os.access(folder, os.W_OK) or out is None
    return folder if writable else Path(out) / "cache"
