"""Tests that need a GPU skip here, with the reason."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from halfbyte import _native


def reason_to_skip() -> str | None:
    """Why no kernel can run here, or None."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if not hasattr(_native, "cuda_device"):
        return "halfbyte was built without CUDA"
    if not _native.cuda_kernels():
        return "halfbyte was built without CUDA kernels"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder, and skip it where no GPU is, or no kernel for it."""
    reason = reason_to_skip()
    names = _native.cuda_kernels() if hasattr(_native, "cuda_kernels") else []
    defined = any("reference" in name.split("_") for name in names)
    for item in items:
        if Path(__file__).parent in item.path.parents and "no_gpu" not in item.name:
            item.add_marker(pytest.mark.gpu)
            parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
            elif parameters.get("reference") and not defined:
                item.add_marker(pytest.mark.skip(reason="halfbyte was built without the cargo feature test-kernels"))


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """An error for whatever makes the host wait for the GPU."""
    import torch

    try:
        with warnings.catch_warnings():
            # It has been set by then: an error that pytest makes of the warning would leave it so for all other tests.
            warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
