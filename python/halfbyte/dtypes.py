"""Data types by their names, for code that must work before torch is loaded, and without it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Protocol, overload

if TYPE_CHECKING:
    import torch

# torch's second names for some data types, which `to_dict` replaces by the first.
_DTYPE_ALIASES = {
    "bit": "uint1",
    "cdouble": "complex128",
    "cfloat": "complex64",
    "chalf": "complex32",
    "double": "float64",
    "float": "float32",
    "half": "float16",
    "int": "int32",
    "long": "int64",
    "short": "int16",
}

# Names of data types (torch 2.15), for as long as there is no torch to ask.
# fmt: off
_DTYPE_NAMES = frozenset((
    "bcomplex32", "bfloat16", "bits16", "bits1x8", "bits2x4", "bits4x2", "bits8", "bool", "complex128",
    "complex32", "complex64", "float16", "float32", "float4_e2m1fn_x2", "float64", "float8_e4m3fn",
    "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "int1", "int16", "int2", "int3",
    "int32", "int4", "int5", "int6", "int64", "int7", "int8", "qint32", "qint8", "quint2x4", "quint4x2",
    "quint8", "uint1", "uint16", "uint2", "uint3", "uint32", "uint4", "uint5", "uint6", "uint64", "uint7",
    "uint8",
))
# fmt: on


class UnknownDTypeError(ValueError, AttributeError):
    """A string that names no data type.

    An `AttributeError` too, because that is what transformers' class raises for it.
    """


def is_torch_dtype(value: object) -> bool:
    """Is this a `torch.dtype`? Never without torch."""
    dtype = getattr(sys.modules.get("torch"), "dtype", None)
    return isinstance(dtype, type) and isinstance(value, dtype)


def named_dtype(argument: str, name: str) -> str:
    """Return torch's first name of the data type called `name` ("half", "torch.float16" -> "float16")."""
    bare = name.removeprefix("torch.")
    torch = sys.modules.get("torch")
    if hasattr(torch, "dtype"):
        found = getattr(torch, bare, None)
        if is_torch_dtype(found):
            return str(found).removeprefix("torch.")
        if found is not None:
            raise TypeError(f"{argument} must be a torch.dtype or the name of one; torch.{bare} is none: {found!r}")
    else:
        bare = _DTYPE_ALIASES.get(bare, bare)
        if bare in _DTYPE_NAMES:
            return bare
    raise UnknownDTypeError(
        f"{argument} must be a torch.dtype or the name of one, such as 'bfloat16', 'float16' or 'float32', got {name!r}"
    )


def dtype_name(argument: str, value: object, default: str, strings: tuple[str, ...] | None = None) -> str:
    """Return the name of a data type given as an argument.

    `value` is None for `default`, a string ("bfloat16", "torch.bfloat16"), which must be one of `strings` where those
    are given, or a `torch.dtype`. Raises a ValueError that names `argument`, or for a string that names something else
    than a data type of a loaded torch, TypeError.
    """
    if value is None:
        return default
    if isinstance(value, str):
        if strings is None:
            return named_dtype(argument, value)
        bare = value.removeprefix("torch.")
        if bare not in strings:
            legal = ", ".join(repr(name) for name in strings)
            raise ValueError(f"{argument} must be a torch.dtype or one of the strings {legal}, got {value!r}")
        return bare
    if is_torch_dtype(value):
        return str(value).removeprefix("torch.")
    raise ValueError(f"{argument} must be a string or a torch.dtype, got {value!r} ({type(value).__name__})")


class _Holder(Protocol):
    """Remembers which of its data types were left to their defaults."""

    __dict__: dict[str, Any]
    _defaults: frozenset[str]


class DTypeAttribute:
    """An attribute that holds a data type.

    It takes what the constructor takes, and gives a `torch.dtype` once the process has loaded torch and the type's name
    ("bfloat16") before that. What is stored, under the attribute's own name in `vars(config)`, is always the name: a
    config made before `import torch` then serves torch code, and a pickle is read where torch is absent.
    """

    def __init__(self, default: str, strings: tuple[str, ...] | None = None) -> None:
        self.default = default
        self.strings = strings

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> DTypeAttribute: ...
    @overload
    def __get__(self, instance: object, owner: type | None = None) -> torch.dtype | str: ...
    def __get__(self, instance: object, owner: type | None = None) -> torch.dtype | str | DTypeAttribute:
        if instance is None:
            return self
        try:
            name: str = instance.__dict__[self.name]
        except KeyError:
            raise AttributeError(f"{type(instance).__name__!r} object has no attribute {self.name!r}") from None
        found: torch.dtype | str | None = getattr(sys.modules.get("torch"), name, None)
        return found if found is not None and is_torch_dtype(found) else name

    def __set__(self, instance: _Holder, value: torch.dtype | str | None) -> None:
        instance.__dict__[self.name] = dtype_name(self.name, value, self.default, self.strings)
        instance._defaults = instance._defaults | {self.name} if value is None else instance._defaults - {self.name}
