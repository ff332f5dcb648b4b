"""The device that a caller names for a model."""

from __future__ import annotations

import torch


def device_with_storage(device: torch.device | str | int) -> torch.device:
    """A device that can hold the tensors of a model.

    Args:
        device: A device, its name or its CUDA ordinal.

    Returns:
        The device.

    Raises:
        TypeError: `device` is none of these.
        ValueError: It is no device that torch knows, or "meta", which has no storage.
    """
    if isinstance(device, bool) or not isinstance(device, (torch.device, str, int)):
        raise TypeError(f"device must be a torch.device, a name such as 'cuda:0' or an ordinal, got {device!r}")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be a device with storage, such as 'cpu' or 'cuda', got {device!r}") from None
    if found.type == "meta":
        raise ValueError("device must be a device with storage, such as 'cpu' or 'cuda', got 'meta'")
    return found
