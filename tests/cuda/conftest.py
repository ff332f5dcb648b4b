"""Tests that need a GPU skip here, with the reason."""

from __future__ import annotations

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
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder, and skip it where no GPU is."""
    reason = reason_to_skip()
    for item in items:
        if Path(__file__).parent in item.path.parents and "no_gpu" not in item.name:
            item.add_marker(pytest.mark.gpu)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
