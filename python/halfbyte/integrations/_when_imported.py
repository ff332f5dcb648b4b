"""Do something as soon as another library is imported, without importing it."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def when_imported(name: str, callback: Callable[[ModuleType], None]) -> None:
    """Call `callback(module)` when the module `name` has been imported: at once if it has been already.

    Args:
        name: Full name of the module.
        callback: Called once. What it raises reaches whoever imports the module.
    """
    module = sys.modules.get(name)
    if module is not None and not _is_being_imported(module):
        callback(module)
    else:
        sys.meta_path.insert(0, _Finder(name, callback))


def _is_being_imported(module: ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))


class _Finder:
    """Finds one module as the others do, and leaves once it is found.

    Without the base class `importlib.abc.MetaPathFinder`, whose module is slow to import.
    """

    def __init__(self, name: str, callback: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.callback = callback

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        # Away first: the search goes through all finders again.
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            sys.meta_path.insert(0, self)
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.callback(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
