"""Memory of the host that a GPU reads where it is: what does not fit on the GPU, and is not read often.

A region is ordinary memory whose pages the driver holds in place and maps (`cudaHostRegister`). With unified addressing
its address is the same for the GPU. Tensors in a region are therefore made as tensors *of the GPU*: every kernel reads
and writes their bytes over the bus, at its bandwidth, and nothing else has to know. `.to()` that GPU leaves them where
they are, `.cpu()` and `.clone()` copy them to ordinary memory of the CPU and of the GPU.

A region is released when the last tensor in it is gone, after the GPU has finished what was enqueued by then.
"""

from __future__ import annotations

import bisect
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from halfbyte import _native

ALIGNMENT = 256
"""In bytes, of tensors in a region: what memory of the GPU begins at multiples of."""

REGION_BYTES = 16 << 20
"""Of a region, where it is not known how much will come."""

_PAGE = 4096
_PORTABLE_AND_MAPPED = 0x1 | 0x2


def check_device(device: torch.device | str | int) -> torch.device:
    """The GPU that is meant, with its number.

    Raises:
        ValueError: It is no CUDA device, or none that torch sees here.
        RuntimeError: This build has no CUDA kernels.
    """
    target = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if target.type != "cuda":
        raise ValueError(f"device must be a CUDA device such as 'cuda' or 'cuda:0', got {str(target)!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count or torch.version.hip is not None:
        raise ValueError(f"device must be a CUDA device that torch sees, got {str(target)!r}, and it sees none")
    index = torch.cuda.current_device() if target.index is None else target.index
    if index >= count:
        raise ValueError(f"device must be one of cuda:0 to cuda:{count - 1}, got {str(target)!r}")
    if not hasattr(_native, "CudaExperts"):
        raise RuntimeError(f"device must have kernels, got {str(target)!r}: halfbyte was built without CUDA")
    return torch.device("cuda", index)


# ---- what the driver does: tests put others in their place -----------------------------------------------------------


def _runtime() -> Any:
    """CUDA's runtime as torch hands it on, without types."""
    cuda: Any = torch.cuda
    return cuda.cudart()


def _pin(address: int, nbytes: int, device: torch.device) -> None:
    with torch.cuda.device(device):
        status = int(_runtime().cudaHostRegister(address, nbytes, _PORTABLE_AND_MAPPED))
    if status:
        raise RuntimeError(
            f"{nbytes} bytes of host memory cannot be pinned for {device}: cudaHostRegister failed with error {status}"
            "; is there so much free memory, and may so much of it be pinned (of containers, the memory limit)?"
        )


def _unpin(address: int, device: torch.device) -> None:
    # Kernels that read by an address are unknown to torch's allocators.
    torch.cuda.synchronize(device)
    _runtime().cudaHostUnregister(address)


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class _Interface:
    """Bytes of a region by the protocol from which torch makes tensors of a GPU; they keep it, and so the region."""

    def __init__(self, region: Region, address: int, nbytes: int) -> None:
        self.region = region
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 2,
        }


def _alias(region: Region, begin: int, nbytes: int) -> Tensor:
    """Bytes of a region as a tensor of its GPU, with a storage of its own."""
    address = region.address + begin
    with torch.cuda.device(region.device):
        made = torch.as_tensor(_Interface(region, address, nbytes), device=region.device)
    if made.data_ptr() != address or made.device != region.device:
        raise RuntimeError(
            f"{region.device} must read host memory at its own address, {address:#x}, got {made.data_ptr():#x} on "
            f"{made.device}: this GPU or driver has no unified addressing"
        )
    return made


# ---- regions ---------------------------------------------------------------------------------------------------------


class Region:
    """Pinned bytes.

    Attributes:
        bytes: All of them, a tensor of the CPU.
        address: Where they begin, for the CPU and for the GPU.
        device: The GPU.
        used: How many are taken.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        """Allocate and pin so many bytes, whole pages that nothing else is in."""
        _unpin_waiting()
        nbytes = -(-nbytes // _PAGE) * _PAGE
        with torch.inference_mode(False):
            buffer = torch.empty(nbytes + _PAGE, dtype=torch.uint8)
        first = -buffer.data_ptr() % _PAGE
        self.bytes = buffer[first : first + nbytes]
        self.address = self.bytes.data_ptr()
        self.device = device
        self.used = 0
        _pin(self.address, nbytes, device)
        with _lock:
            bisect.insort(_begins, self.address)
            _regions[self.address] = weakref.ref(self)
        weakref.finalize(self, _release, self.bytes, self.address, device).atexit = False

    def taken(self) -> Tensor:
        """What is taken, as uint8 of the GPU: its copies are asynchronous, and a graph can hold them."""
        return _alias(self, 0, self.used)


_lock = threading.RLock()
_begins: list[int] = []
_regions: dict[int, weakref.ref[Region]] = {}


_waiting: list[tuple[Tensor, int, torch.device]] = []
"""Regions without tensors that are still pinned: no memory can be given back while a graph is captured."""


def _release(memory: Tensor, address: int, device: torch.device) -> None:
    with _lock:
        del _regions[address], _begins[bisect.bisect_left(_begins, address)]
        _waiting.append((memory, address, device))
    _unpin_waiting()


def _unpin_waiting() -> None:
    while _waiting and not _is_capturing():
        # The memory is freed behind this.
        memory, address, device = _waiting.pop()
        _unpin(address, device)
        del memory


def region_of(address: int) -> Region | None:
    """The region that an address is in."""
    with _lock:
        place = bisect.bisect_right(_begins, address) - 1
        region = _regions[_begins[place]]() if place >= 0 else None
    return region if region is not None and address < region.address + region.bytes.numel() else None


def is_there(tensor: Tensor) -> bool:
    """Whether a tensor is in pinned memory of the host."""
    return bool(_begins) and not tensor.is_meta and region_of(tensor.data_ptr()) is not None


def room(tensor: Tensor) -> int:
    """The bytes that a tensor takes of a region."""
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT


class HostMemory:
    """Places for tensors that belong together, one after the other."""

    def __init__(self, device: torch.device, nbytes: int | None = None) -> None:
        """For a GPU. With `nbytes`, there is one region of that size from the beginning; else they come as needed."""
        self.device = device
        self._region = Region(nbytes, device) if nbytes else None

    @torch.inference_mode(False)
    @torch.no_grad()
    def place(self, tensor: Tensor) -> Tensor:
        """A tensor of the GPU with the same values, dtype and shape, whose bytes are here."""
        nbytes = tensor.numel() * tensor.element_size()
        if not nbytes:
            return tensor.to(self.device)
        region = self._region
        if region is None or region.used + room(tensor) > region.bytes.numel():
            region = self._region = Region(max(room(tensor), REGION_BYTES), self.device)
        begin = region.used
        region.bytes[begin : begin + nbytes].copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))
        region.used += room(tensor)
        return _alias(region, begin, nbytes).view(tensor.dtype).view(tensor.shape)
