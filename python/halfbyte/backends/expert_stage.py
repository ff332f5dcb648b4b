"""Experts in host memory, for many tokens: copied to the GPU before they are used.

Kernels read packed weights by a table of addresses (`halfbyte.ops.experts`), which may be in host memory
(`halfbyte.backends.host_memory`). Few tokens read just the experts that were chosen there, each once for every eight of
its tokens. Many tokens would read the same bytes several times over the bus. For them, all of the layer's regions are
copied, in a few large asynchronous copies on torch's stream, to the stage: one buffer for all layers of a GPU. A second
table has the addresses there. Experts that are on the GPU have the same addresses in both.

`Staging.few` is the number of choices up to which nothing is copied: as many as there are experts in host memory, so
that reading in place never takes more of the bus than the copy. Nothing here waits for the GPU, or depends on what the
router chose, so that a CUDA graph can hold both ways. The kernels and what they compute are the same.

The stage is overwritten by the next layer. Calls hold its lock while they enqueue their work, and a call on another
stream than the one before waits for that stream. A graph that was captured waits for none: replay it where no other
stream runs offloaded experts.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.backends.host_memory import ALIGNMENT, Region, region_of

Rows = Sequence[Sequence[Sequence[int]]]
"""Addresses `[projections][experts][4]`."""


class Plan(NamedTuple):
    """What is copied, and where to.

    Attributes:
        regions: Of the host, each once.
        offsets: Where each begins in the stage.
        nbytes: Of the stage that they take.
        experts: How many have a tensor in one of them.
    """

    regions: list[Region]
    offsets: list[int]
    nbytes: int
    experts: int

    def moved(self, rows: Rows, base: int) -> list[list[list[int]]]:
        """The addresses when the stage begins at `base`; those that are in no region stay."""

        def of(address: int) -> int:
            for region, offset in zip(self.regions, self.offsets, strict=True):
                if region.address <= address < region.address + region.used:
                    return base + offset + address - region.address
            return address

        return [[[of(address) for address in row] for row in projection] for projection in rows]


def plan(rows: Rows) -> Plan | None:
    """What a table needs copied; None where all that it names is on the GPU."""
    regions: dict[int, Region] = {}
    experts = set[int]()
    for projection in rows:
        for index, row in enumerate(projection):
            for address in row:
                region = region_of(address) if address else None
                if region is not None:
                    regions[region.address] = region
                    experts.add(index)
    if not regions:
        return None
    offsets, end = [], 0
    for region in regions.values():
        offsets.append(end)
        end += -(-region.used // ALIGNMENT) * ALIGNMENT
    return Plan(list(regions.values()), offsets, end, len(experts))


class Stage:
    """The buffer of a GPU. When a layer needs a larger one, those before keep theirs."""

    def __init__(self, device: torch.device) -> None:
        """Without a buffer."""
        self.device = device
        self.lock = threading.Lock()
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self._stream: torch.cuda.Stream | None = None

    def reserve(self, nbytes: int) -> Tensor:
        """A buffer of at least so many bytes, which begins at a multiple of `ALIGNMENT`."""
        if self.buffer.numel() < nbytes:
            with torch.inference_mode(False):
                buffer = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, device=self.device)
            self.buffer = buffer[-buffer.data_ptr() % ALIGNMENT :]
        return self.buffer

    def follow(self) -> None:
        """Have the current stream wait for the one that used the buffer before."""
        if self.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return
        stream = torch.cuda.current_stream(self.device)
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream


_stages: weakref.WeakValueDictionary[torch.device, Stage] = weakref.WeakValueDictionary()


def reserve(device: torch.device, nbytes: int) -> Stage:
    """The stage of a device, with so many bytes at least."""
    stage = _stages.get(device)
    if stage is None:
        stage = _stages[device] = Stage(device)
    stage.reserve(nbytes)
    return stage


class Staging:
    """The second table of a layer.

    Attributes:
        few: Choices up to which the first one is used.
        addresses: int64 `[projections, experts, 4]`.
        maps: As `halfbyte.backends.cuda_experts.tensor_maps` makes them of the codes in the stage, or None.
    """

    def __init__(self, rows: Rows, found: Plan, device: torch.device, maps: Callable[[Rows], Tensor | None]) -> None:
        """Of the first one's addresses, and what is to be copied."""
        self.few = found.experts
        self._plan = found
        self._sources = [region.taken() for region in found.regions]
        self._stage = reserve(device, found.nbytes)
        self._buffer = self._stage.buffer
        moved = found.moved(rows, self._buffer.data_ptr())
        self.addresses = torch.tensor(moved, dtype=torch.int64).to(device)
        self.maps = maps(moved)

    def __enter__(self) -> tuple[Tensor, Tensor | None]:
        """Enqueue the copies. What is enqueued until the end reads the stage."""
        self._stage.lock.acquire()
        try:
            self._stage.follow()
            for source, offset in zip(self._sources, self._plan.offsets, strict=True):
                self._buffer[offset : offset + source.numel()].copy_(source)
        except BaseException:
            self._stage.lock.release()
            raise
        return self.addresses, self.maps

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let others have the stage."""
        self._stage.lock.release()


def attach(table: Tensor, staging: Staging) -> None:
    """Have a table be followed by its second one, wherever it is given."""
    vars(table)["staging"] = staging


def reading(
    table: Tensor, maps: Tensor | None, slots: int
) -> contextlib.AbstractContextManager[tuple[Tensor, Tensor | None]]:
    """The table, and its maps, by which a call with so many choices reads, while its work is enqueued."""
    staging: Staging | None = vars(table).get("staging")
    return contextlib.nullcontext((table, maps)) if staging is None or slots <= staging.few else staging
