"""The report about CUDA. halfbyte uses the driver alone, so there are no runtime libraries to look for."""

from __future__ import annotations

import torch

from .._missing import missing_attribute
from ..cuda_specs import CUDASpecs


def print_diagnostics(cuda_specs: CUDASpecs) -> None:
    """Say what torch was built for and what the best device is."""
    print(
        f"PyTorch settings found: CUDA_VERSION={cuda_specs.cuda_version_string}, "
        f"Highest Compute Capability: {cuda_specs.highest_compute_capability}."
    )


def print_runtime_diagnostics() -> None:
    """Say which runtime is used."""
    print(f"CUDA SETUP: torch's runtime ({torch.version.cuda}); halfbyte's kernels need the driver alone.")


__getattr__ = missing_attribute(__name__)
