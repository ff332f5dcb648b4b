"""Where a real bitsandbytes is installed: layers of this package that its `isinstance` accepts.

Libraries such as PEFT ask `isinstance(layer, bitsandbytes.nn.Linear4bit)`. `promote` makes the layers and weights of a
model answer yes, without a copy and without a patch of anybody's code: their class becomes one of the same name whose
method resolution order ends with bitsandbytes' class, after torch's. So nothing of bitsandbytes' is reached that this
package or torch has, and none of its constructors runs. Where there is no bitsandbytes, nothing happens.

Pickles name this package's own classes, and can be read where there is no bitsandbytes. bitsandbytes takes seconds to
import, so `promote` does not: of a model that it was called with, layers are promoted when somebody imports it.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import weakref
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn

from halfbyte import nn as own_nn
from halfbyte.nn._joint import JOINT, STANDS_FOR
from halfbyte.nn._quantized import Quantized
from halfbyte.nn._quantized_rows import QuantizedRows
from halfbyte.ops.dispatch import PLAIN_TYPES

_logger = logging.getLogger(__name__)

_NAMES = (
    "Linear4bit",
    "LinearNF4",
    "LinearFP4",
    "Linear8bitLt",
    "Embedding4bit",
    "EmbeddingNF4",
    "EmbeddingFP4",
    "Embedding8bit",
    "Params4bit",
    "Int8Params",
)
_THEIRS = "_theirs"


class _Joint(type):
    """A class that also is, for `issubclass` and `isinstance`, the classes named in its `_theirs`."""

    def mro(cls) -> list[type]:
        """The order of the one real base; what the others add comes last."""
        *own, last = super().mro()
        added = [base for other in cls.__dict__[_THEIRS] for base in other.__mro__]
        return [*own, *dict.fromkeys(base for base in added if base not in own and base is not last), last]


class _JointParameter(_Joint, type(nn.Parameter)):  # type: ignore[misc]
    """The same of a parameter's class, which has a metaclass already."""


def _installed() -> bool:
    try:
        return importlib.util.find_spec("bitsandbytes") is not None
    except ValueError:
        # A module without a spec has that name.
        return False


def find(load: bool = True) -> ModuleType | None:
    """The real bitsandbytes; None where it is absent, broken, or this package stands in for it.

    It is imported if need be, unless `load` is False.
    """
    module = sys.modules.get("bitsandbytes")
    if module is None:
        if not load or not _installed():
            return None
        try:
            module = import_module("bitsandbytes")
        except Exception as error:  # whatever a broken installation raises
            _logger.info("bitsandbytes cannot be imported, and is taken for absent: %s", error)
            return None
    classes = getattr(module, "nn", None)
    found = getattr(classes, "Linear4bit", None), getattr(classes, "Params4bit", None)
    if getattr(module, "__halfbyte__", None) or not all(isinstance(cls, type) for cls in found):
        return None
    return None if issubclass(cast(type, found[0]), own_nn.Linear4bit) else module


def join(load: bool = True) -> bool:
    """Make the joint classes, once; whether there are any, which takes a real bitsandbytes, imported if need be."""
    if JOINT:
        return True
    module = find(load)
    if module is None:
        return False
    for name in _NAMES:
        own = getattr(own_nn, name)
        if hasattr(module.nn, name):
            globals()[name] = _joint(own, module)
    return True


def _joint(own: type, module: ModuleType) -> type:
    """The joint class of one of this package's classes, or of a class derived from one."""
    known = JOINT.get(own)
    if known is not None:
        return known
    matching = [name for name in _NAMES if issubclass(own, getattr(own_nn, name)) and hasattr(module.nn, name)]
    # The most special first, as in any order of resolution.
    matching.sort(key=lambda name: -len(getattr(own_nn, name).__mro__))
    others = tuple(getattr(module.nn, name) for name in matching)
    parameter = issubclass(own, nn.Parameter)
    namespace: dict[str, Any] = {
        _THEIRS: others,
        STANDS_FOR: own,
        "__doc__": own.__doc__,
        # Importable by name where it can be.
        "__module__": __name__ if own is getattr(own_nn, own.__name__, None) else own.__module__,
        "__qualname__": own.__qualname__,
    }
    made: type = (_JointParameter if parameter else _Joint)(own.__name__, (own,), namespace)
    if own in PLAIN_TYPES:
        PLAIN_TYPES.add(made)
        # Files name the class that it stands for; what is rebuilt from them is of this one.
        torch.serialization.add_safe_globals([made])
    JOINT[own] = made
    return made


def linear4bit_class() -> type[own_nn.Linear4bit]:
    """The class for 4-bit layers: the joint one where there is a real bitsandbytes, which it imports, else our own."""
    return cast("type[own_nn.Linear4bit]", JOINT[own_nn.Linear4bit] if join() else own_nn.Linear4bit)


def params4bit_class() -> type[own_nn.Params4bit]:
    """The class for 4-bit weights, likewise."""
    return cast("type[own_nn.Params4bit]", JOINT[own_nn.Params4bit] if join() else own_nn.Params4bit)


def linear8bit_class() -> type[own_nn.Linear8bitLt]:
    """The class for 8-bit layers, likewise."""
    return cast("type[own_nn.Linear8bitLt]", _joint_of(own_nn.Linear8bitLt))


def int8params_class() -> type[own_nn.Int8Params]:
    """The class for 8-bit weights, likewise."""
    return cast("type[own_nn.Int8Params]", _joint_of(own_nn.Int8Params))


def _joint_of(own: type) -> type:
    return JOINT.get(own, own) if join() else own


def promote(model: nn.Module) -> None:
    """Make all quantized layers and weights of a model answer `isinstance` of bitsandbytes' classes, where it is real.

    In place: modules and parameters stay the objects that they are, and their numbers where they are. Classes derived
    from this package's are promoted too. Where bitsandbytes is installed but not imported, it happens when that is;
    where there is none, nothing happens.
    """
    if join(load=False):
        _promote(model)
    elif "bitsandbytes" not in sys.modules and _installed():
        _AWAITING.add(model)
        if _FINDER not in sys.meta_path:
            sys.meta_path.insert(0, _FINDER)


def _promote(model: nn.Module) -> None:
    module = find(load=False)
    assert module is not None
    for layer in model.modules():
        if isinstance(layer, (Quantized, QuantizedRows)):
            _become(layer, module)
        for parameter in layer._parameters.values():
            if isinstance(parameter, (own_nn.Params4bit, own_nn.Int8Params)):
                _become(parameter, module)


def _become(thing: nn.Module | torch.Tensor, module: ModuleType) -> None:
    cls = type(thing)
    if STANDS_FOR not in cls.__dict__:
        thing.__class__ = _joint(cls, module)


# ---- when bitsandbytes is imported later -----------------------------------------------------------------------------

_AWAITING: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class _Finder(MetaPathFinder):
    """Finds bitsandbytes as the other finders do, and promotes what awaits it once it is there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "bitsandbytes":
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Telling(spec.loader)
                return spec
        return None


class _Telling(Loader):
    """A loader that tells when its work is done, and leaves no trace of itself."""

    def __init__(self, real: Loader) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._real
        self._real.exec_module(module)
        if _FINDER in sys.meta_path:
            sys.meta_path.remove(_FINDER)
        models = list(_AWAITING)
        _AWAITING.clear()
        if join(load=False):
            for model in models:
                _promote(model)


_FINDER = _Finder()


def __getattr__(name: str) -> type:
    """The joint classes by their names, made when first asked for; this package's own where there are none."""
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _joint_of(getattr(own_nn, name))
