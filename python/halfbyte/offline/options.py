"""The arguments of the offline tool: their types, and what is checked before anything is read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from halfbyte._terminal import parse_size

if TYPE_CHECKING:
    from halfbyte.config import BitsAndBytesConfig

StrPath: TypeAlias = "str | os.PathLike[str]"
Config: TypeAlias = "BitsAndBytesConfig | dict[str, Any] | object | None"
Rule: TypeAlias = "str | tuple[str, str]"
Progress: TypeAlias = "Callable[[int, int, str], None] | bool | None"
Selection: TypeAlias = Literal["rules", "transformers"]

FLOAT_DTYPES = ("bfloat16", "float16", "float32")


def quantization_dict(config: Config) -> tuple[dict[str, Any], bool]:
    """``quantization_config`` as transformers writes it, from whatever the caller gave; was a compute dtype given?"""
    from halfbyte.config import BitsAndBytesConfig

    if config is None:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    coerced = BitsAndBytesConfig.coerce(config)
    if not coerced.load_in_4bit:
        raise ValueError("config has load_in_4bit=False: expected True, the offline tool writes 4-bit weights")
    # Through JSON, so that enumerations become the plain strings that config.json holds.
    plain: dict[str, Any] = json.loads(json.dumps(coerced.to_dict()))
    strings("llm_int8_skip_modules", plain["llm_int8_skip_modules"] or ())
    return plain, coerced.compute_dtype() is not None


def thread_count(threads: int | None) -> int:
    """The number of threads that `threads` stands for: None is one for each core that this process may run on."""
    if threads is None:
        # Containers and job schedulers give a process fewer cores than the machine has.
        affinity = getattr(os, "sched_getaffinity", None)
        return len(affinity(0)) if affinity else os.cpu_count() or 1
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads is {threads!r}: expected an int of at least 1, or None for one per core")
    return threads


def dtype_name(dtype: object) -> str | None:
    """The name of a dtype that weights can be cast to."""
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None and name not in FLOAT_DTYPES:
        raise ValueError(f"dtype is {dtype!r}: expected {', '.join(FLOAT_DTYPES)}")
    return name


def shard_size(value: int | str | None) -> int | None:
    """The most bytes of an output file."""
    if value is None:
        return None
    try:
        return parse_size(value)
    except ValueError as error:
        raise ValueError(f"max_shard_size: {error}") from None


def rule_text(rule: Rule) -> str:
    """A rule as the core reads it: `REGEX=type`."""
    if isinstance(rule, str):
        return rule
    if isinstance(rule, tuple) and len(rule) == 2 and all(isinstance(part, str) for part in rule):
        return f"{rule[0]}={rule[1]}"
    raise ValueError(f"rule is {rule!r}: expected 'REGEX=nf4', 'REGEX=fp4', 'REGEX=keep', or a pair of both sides")


def strings(name: str, values: Iterable[str]) -> list[str]:
    """A list of module names, checked."""
    if isinstance(values, str):
        raise ValueError(f"{name} is {values!r}: expected a list of module names")
    out = list(values)
    for value in out:
        if not isinstance(value, str):
            raise ValueError(f"{name} holds {value!r}: expected module names")
    return out
