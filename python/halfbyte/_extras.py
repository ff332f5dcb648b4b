"""Optional dependencies: imported where they are used, with an error that says how to get them."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str, why: str) -> ModuleType:
    """Import an optional dependency, or say which package is missing and which extra installs it.

    Args:
        module: Dotted name of the module to import, e.g. ``"torch"`` or ``"transformers.quantizers"``.
        extra: The extra of halfbyte that brings it, e.g. ``"torch"``.
        why: What needs it, as the subject of the message, e.g. ``"--selection transformers"``.

    Returns:
        The module that the whole name means: ``transformers.quantizers``, not ``transformers``.

    Raises:
        ImportError: The package is not installed. The message names it and the command that installs it, the attribute
            ``name`` holds the package. A package that is installed but broken (one of *its* imports fails) raises its
            own error unchanged, because installing the extra again would not help.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        message = f"{why} needs the package {package!r}, which is not installed: pip install 'halfbyte[{extra}]'"
        raise ImportError(message, name=package) from error
