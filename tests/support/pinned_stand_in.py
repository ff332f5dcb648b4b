"""Pinned host memory where there is no GPU: regions are ordinary memory, and their tensors are of the CPU.

What is tested so is everything but the driver: what goes to host memory, what is copied, addresses, budgets, errors.
"""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from halfbyte.backends import expert_stage, host_memory


class Pinned:
    """What is pinned, by address, and how many bytes; `failing` has the next attempt fail."""

    def __init__(self) -> None:
        self.bytes: dict[int, int] = {}
        self.failing = False

    def pin(self, address: int, nbytes: int, device: torch.device) -> None:
        """As the driver."""
        assert address % 4096 == 0
        assert nbytes % 4096 == 0
        if self.failing:
            raise RuntimeError(f"{nbytes} bytes of host memory cannot be pinned for {device}")
        assert address not in self.bytes
        self.bytes[address] = nbytes

    def unpin(self, address: int, device: torch.device) -> None:
        """As the driver."""
        del self.bytes[address]


def alias(region: host_memory.Region, begin: int, nbytes: int) -> torch.Tensor:
    """A tensor with a storage of its own, which keeps the region."""
    memory = (ctypes.c_char * nbytes).from_address(region.address + begin)
    vars(memory)["region"] = region
    return torch.frombuffer(memory, dtype=torch.uint8)


def pinned(patch: pytest.MonkeyPatch) -> Pinned:
    """Put the stand-in in the driver's place; "cuda" devices are the CPU."""
    made = Pinned()
    patch.setattr(host_memory, "_pin", made.pin)
    patch.setattr(host_memory, "_unpin", made.unpin)
    patch.setattr(host_memory, "_alias", alias)
    patch.setattr(host_memory, "check_device", lambda device: torch.device("cpu"))
    return made


def copies(patch: pytest.MonkeyPatch) -> list[int]:
    """The bytes that each call copies to the stage, as they come."""
    found: list[int] = []
    enter = expert_stage.Staging.__enter__

    def counted(self: Any) -> Any:
        found.append(self._plan.nbytes)
        return enter(self)

    patch.setattr(expert_stage.Staging, "__enter__", counted)
    return found
