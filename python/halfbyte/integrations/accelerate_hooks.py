"""What accelerate's hooks on modules do."""

from __future__ import annotations

from typing import Any


def only_places(hook: Any) -> bool:
    """Whether this is accelerate's hook of a module that stays on its device, where the input is then too."""
    kind = type(hook)
    return (
        kind.__module__ == "accelerate.hooks"
        and kind.__name__ == "AlignDevicesHook"
        and not hook.offload
        and not hook.io_same_device
    )
