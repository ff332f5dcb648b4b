"""Helpers of the GPU benches: rotated arguments, CUDA graphs, events, and floor kernels that only move memory."""

from __future__ import annotations

import ctypes
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from halfbyte import _native

T = TypeVar("T")

# More than the second-level cache of any card, so that no call finds its data there.
ROTATED_BYTES = 256 * 2**20
SHAPES = ((4096, 4096), (14336, 4096), (28672, 8192))


def device_line() -> str:
    """One line that names the GPU, the driver's CUDA, torch, and the rate of a large copy."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = eager_seconds([lambda: target.copy_(source)], count=20)
    major, minor = _native.cuda_driver_version()
    copied = 2 * source.numel() / seconds / 1e12
    name = torch.cuda.get_device_name()
    return f"{name}, driver for CUDA {major}.{minor}, torch {torch.__version__}; copies {copied:.2f} TB/s"


def raw(tensor: torch.Tensor | None) -> tuple[int, int, str] | None:
    """What the compiled core takes for a tensor."""
    if tensor is None:
        return None
    return tensor.data_ptr(), tensor.numel(), str(tensor.dtype).removeprefix("torch.")


def here() -> tuple[int, int]:
    """The current device and stream."""
    return torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream


def rotation(bytes_each: int) -> int:
    """How many copies of the arguments are rotated through."""
    return max(2, -(-ROTATED_BYTES // bytes_each))


def copies(count: int, make: Callable[[], T]) -> list[T]:
    """`count` sets of arguments in memory of their own."""
    return [make() for _ in range(count)]


def graph_seconds(calls: Sequence[Callable[[], object]], *, replays: int = 7) -> float:
    """Seconds of one call on average, all calls being replayed as one CUDA graph; the median of the replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    repeated = list(itertools.islice(itertools.cycle(calls), max(len(calls), 64)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in repeated:
            call()
    graph.replay()
    return _median(graph.replay, replays) / len(repeated)


def eager_seconds(calls: Sequence[Callable[[], object]], *, count: int = 64, repeats: int = 7) -> float:
    """Seconds of one call on average on the GPU's clock, launched one by one; the median of the repeats."""
    repeated = list(itertools.islice(itertools.cycle(calls), count))

    def work() -> None:
        for call in repeated:
            call()

    work()
    torch.cuda.synchronize()
    return _median(work, repeats) / count


def host_seconds(calls: Sequence[Callable[[], object]], *, count: int = 256, repeats: int = 5) -> float:
    """Seconds of the host for one call, the GPU not waited for; the least of the repeats."""
    repeated = list(itertools.islice(itertools.cycle(calls), count))
    best = float("inf")
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for call in repeated:
            call()
        best = min(best, (time.perf_counter() - start) / count)
    torch.cuda.synchronize()
    return best


def _median(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


class Floor:
    """kernels/bench/floor.cu: kernels that only move memory, launched through the driver's library."""

    def __init__(self) -> None:
        torch.cuda.init()
        torch.empty(1, device="cuda")
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._functions = {}
        for name in ("floor_read", "floor_traffic"):
            # Builds for users have none of it; `make develop` makes one that has.
            ptx = _native.cuda_kernel_ptx(name, torch.cuda.get_device_capability())
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            self._check(self._cuda.cuModuleLoadData(ctypes.byref(module), ptx + b"\0"))
            self._check(self._cuda.cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
            self._functions[name] = function
        self._sink = torch.zeros(1, dtype=torch.int32, device="cuda")

    @staticmethod
    def _check(status: int) -> None:
        if status != 0:
            raise RuntimeError(f"the CUDA driver's error {status}")

    def _launch(self, name: str, blocks: int, *values: int) -> None:
        words = [ctypes.c_int64(value) for value in values]
        addresses = (ctypes.c_void_p * len(words))(*(ctypes.addressof(word) for word in words))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        function = self._functions[name]
        self._check(self._cuda.cuLaunchKernel(function, blocks, 1, 1, 256, 1, 1, 0, stream, addresses, None))

    def read(self, source: torch.Tensor) -> None:
        """Read every byte."""
        count = source.numel() * source.element_size() // 16
        self._launch("floor_read", -(-count // 1024), source.data_ptr(), count, self._sink.data_ptr())

    def traffic(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Read every byte of one and write every byte of the other."""
        sizes = [tensor.numel() * tensor.element_size() // 16 for tensor in (source, target)]
        blocks = -(-max(sizes) // 1024)
        self._launch("floor_traffic", blocks, source.data_ptr(), sizes[0], target.data_ptr(), sizes[1])
