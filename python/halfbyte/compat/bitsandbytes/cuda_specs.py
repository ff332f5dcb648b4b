"""What torch says of the GPUs."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import torch

from ._missing import missing_attribute


@dataclasses.dataclass(frozen=True)
class CUDASpecs:
    """The version of CUDA that torch was built for, and the best of the devices."""

    highest_compute_capability: tuple[int, int]
    cuda_version_string: str
    cuda_version_tuple: tuple[int, int]

    @property
    def has_imma(self) -> bool:
        """Whether there are matrix units for int8."""
        return self.highest_compute_capability >= (7, 5)


def get_compute_capabilities() -> list[tuple[int, int]]:
    """The compute capabilities of all devices, ascending."""
    return sorted(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))


@lru_cache(None)
def get_cuda_version_tuple() -> tuple[int, int] | None:
    """The version of CUDA that torch was built for, or None."""
    version: str | None = torch.version.cuda
    if version is None:
        return None
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def get_cuda_version_string() -> str | None:
    """The same in the form "128", or None."""
    version = get_cuda_version_tuple()
    return None if version is None else f"{version[0]}{version[1]}"


def get_cuda_specs() -> CUDASpecs | None:
    """What there is, or None without a GPU."""
    version, string = get_cuda_version_tuple(), get_cuda_version_string()
    if version is None or string is None or not torch.cuda.is_available():
        return None
    return CUDASpecs(get_compute_capabilities()[-1], string, version)


def get_rocm_gpu_arch() -> str:
    """The architecture of an AMD GPU: "unknown", as none is supported."""
    return "unknown"


__getattr__ = missing_attribute(__name__)
