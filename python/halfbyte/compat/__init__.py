"""halfbyte under the name `bitsandbytes`, for code that imports that package.

`offer` provides the name where `bitsandbytes` is not installed. `install` provides it in any case, and in child
processes too. Neither imports torch: the layer itself is loaded by the first `import bitsandbytes`.

Two mechanisms start it in child processes. A wheel installs `halfbyte_bitsandbytes.pth`, whose single line calls
`install` at start-up if HALFBYTE_BITSANDBYTES=1 is set, also under `python -E` and `-I`. In a source tree on
PYTHONPATH, a folder added to PYTHONPATH does the same.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["install", "offer", "served", "version"]

NAME = "bitsandbytes"
# The release of bitsandbytes whose interface is served: libraries compare it with the oldest one they accept.
INTERFACE_VERSION = "0.50.2"
VARIABLE = "HALFBYTE_BITSANDBYTES"

_FOLDER = Path(__file__).with_name(NAME)
_STARTUP = Path(__file__).with_name("startup")


def version() -> str:
    """What `importlib.metadata.version("bitsandbytes")` answers, for example "0.50.2+halfbyte.0.1.0"."""
    from halfbyte._native import __version__

    return f"{INTERFACE_VERSION}+halfbyte.{__version__}"


class _Finder:
    """Finds the package and its metadata, which libraries look up separately."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.startswith(f"{NAME}.") and path is not None and any(Path(p).is_relative_to(_FOLDER) for p in path):
            # The parts too, where a finder behind this one forbids the name with all that begins with it.
            return PathFinder.find_spec(fullname, path, target)
        if fullname != NAME:
            return None
        from importlib.util import spec_from_file_location

        return spec_from_file_location(NAME, _FOLDER / "__init__.py", submodule_search_locations=[str(_FOLDER)])

    def find_distributions(self, context: Any = None) -> Iterable[Any]:
        # Imported here: it costs a third of an interpreter's start, and few programs ask.
        from importlib.metadata import Distribution

        wanted = getattr(context, "name", None)
        if wanted is not None and wanted.lower().replace("-", "_") != NAME:
            return []
        text = f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {version()}\nSummary: served by halfbyte\n"

        class _Served(Distribution):
            def read_text(self, filename: str) -> str | None:
                return text if filename in ("METADATA", "PKG-INFO") else None

            def locate_file(self, path: Any) -> Any:
                return _FOLDER.parent / path

        return [_Served()]

    def invalidate_caches(self) -> None:
        """There are none; `importlib.invalidate_caches` asks every finder."""


_finder = _Finder()


def served() -> bool:
    """Whether `import bitsandbytes` gives halfbyte's layer, or would."""
    loaded = sys.modules.get(NAME, _finder)
    if loaded is not _finder:
        return bool(getattr(loaded, "__halfbyte__", False))
    if _finder not in sys.meta_path:
        return False
    try:
        return not _elsewhere(sys.meta_path[: sys.meta_path.index(_finder)])
    except ImportError:
        return False


def _elsewhere(finders: Iterable[Any]) -> bool:
    """Whether one of `finders` has a `bitsandbytes`.

    Raises:
        ImportError: One forbids the name before any has it.
    """
    for finder in finders:
        find_spec = getattr(finder, "find_spec", None)
        if find_spec is not None and finder is not _finder and find_spec(NAME, None) is not None:
            return True
    return False


def offer() -> bool:
    """Answer to `import bitsandbytes` in this process, unless a package of that name is installed or loaded.

    Libraries that were told before that there is no bitsandbytes are asked to look again. Does nothing when
    HALFBYTE_BITSANDBYTES=0, and the same as `install` when it is 1, as a parent process sets it. May be
    called any number of times.

    Returns:
        Whether halfbyte answers to the name.
    """
    if os.environ.get(VARIABLE) == "0":
        return served()
    if NAME in sys.modules or _finder in sys.meta_path:
        return served()
    if os.environ.get(VARIABLE) == "1":
        install()
        return True
    try:
        if _elsewhere(sys.meta_path):
            return False
        sys.meta_path.append(_finder)
    except ImportError:
        # A finder forbids the name: bitsandbytes cannot be had, and libraries that import it for a 4-bit model would
        # fail there.
        sys.meta_path.insert(0, _finder)
    _tell_libraries()
    return True


def install() -> None:
    """Answer to `import bitsandbytes` here and in child processes, also where bitsandbytes itself is installed.

    Its files are left alone: without HALFBYTE_BITSANDBYTES=1, which this sets, other processes get the real one.

    Raises:
        ImportError: The real bitsandbytes is loaded already. Code that holds it cannot be given another.
    """
    loaded = sys.modules.get(NAME)
    if loaded is not None and not getattr(loaded, "__halfbyte__", False):
        raise ImportError(
            f"bitsandbytes must not be imported before halfbyte stands in for it, got {NAME} "
            f"{getattr(loaded, '__version__', '')} from {getattr(loaded, '__file__', None)}; "
            "call halfbyte.compat.install() first, or start the script with `halfbyte run`"
        )
    _serve_first()
    os.environ[VARIABLE] = "1"
    _reach_children()


def _serve_first() -> None:
    """Put the finder before all others."""
    if sys.meta_path[:1] != [_finder]:
        if _finder in sys.meta_path:
            sys.meta_path.remove(_finder)
        sys.meta_path.insert(0, _finder)
    _tell_libraries()


def _reach_children() -> None:
    """Let PYTHONPATH lead children to a package that installs the finder when it is imported."""
    folder = str(_STARTUP)
    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    if folder not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, *paths])
    if folder not in sys.path:
        # A spawned child gets this list, after its own start. Behind the script's folder, before site-packages.
        sys.path.insert(1, folder)


def _tell_libraries() -> None:
    """Have libraries that are imported already look for bitsandbytes again."""
    for module, names in (
        ("transformers.utils.import_utils", ("is_bitsandbytes_available",)),
        ("peft.import_utils", ("is_bnb_available", "is_bnb_4bit_available")),
    ):
        for name in names:
            clear = getattr(getattr(sys.modules.get(module), name, None), "cache_clear", None)
            if clear is not None:
                clear()
    for name, loaded in list(sys.modules.items()):
        if name.startswith("peft.tuners.") and name.endswith(".bnb"):
            # Their classes are defined only where bitsandbytes is found; they are imported again when needed.
            if not any(hasattr(value, "merge") for value in vars(loaded).values()):
                del sys.modules[name]
        elif _asks(name, loaded) and not hasattr(loaded, "bnb"):
            loaded.bnb = importlib.import_module(NAME)  # type: ignore[attr-defined]


def _asks(name: str, module: ModuleType) -> bool:
    """Whether the module binds `bnb` when it is imported, if bitsandbytes is found."""
    if name == "transformers.integrations.bitsandbytes":
        return True
    return name.startswith("peft.") and "is_bnb_available" in getattr(module, "__dict__", {})
