"""The options of the offline tool: one class for each operation, checked when it is made.

`QuantizeOptions` is what the command line builds, what the Python functions hand on, and what the compiled core reads:
it has the same fields, by the same names, in ``rust/core/src/checkpoint/options.rs``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from halfbyte._terminal import parse_size
from halfbyte.offline.choices import BLOCK_SIZES, FLOAT_DTYPES, SELECTIONS, STORAGE_DTYPES, WEIGHT_TYPES

if TYPE_CHECKING:
    from halfbyte.config import BitsAndBytesConfig

StrPath: TypeAlias = "str | os.PathLike[str]"
Config: TypeAlias = "BitsAndBytesConfig | dict[str, Any] | object | None"
Rule: TypeAlias = "str | tuple[str, str]"
Progress: TypeAlias = "Callable[[int, int, str], None] | bool | None"
Selection: TypeAlias = Literal["rules", "transformers"]

DEFAULT_SHARD_SIZE = 5_000_000_000
DEFAULT_THRESHOLD = 6.0


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """How to quantize a checkpoint. `quantize_checkpoint` explains each field.

    Arguments are converted and checked: `rules` may hold pairs, `max_shard_size` may be a text such as ``"5GB"`` or
    None, dtypes may be torch's. Every attribute then has the type that is declared here.

    Attributes:
        quant_type: What weights that no rule names become: ``"nf4"``, ``"fp4"`` or ``"int8"``.
        double_quant: Of 4-bit weights, quantize the absmax too.
        blocksize: Of 4-bit weights, how many share an absmax.
        storage: Of 4-bit weights, the dtype that packed codes are stored as.
        compute_dtype: Of 4-bit weights, the dtype that loaders multiply in; None for the model's.
        threshold: Of 8-bit weights, the size from which on inputs are multiplied in 16 bits; 0 for none.
        dtype: The dtype to cast weights to first; None for the one that ``config.json`` names.
        max_shard_size: Most bytes of an output file.
        rules: ``"REGEX=nf4|fp4|int8|keep"``; the first that matches a tensor decides.
        skip: Names of modules to keep besides the defaults.
        selection: Who decides which weights are linear layers.
        trust_remote_code: With ``selection="transformers"``, run the code that comes with the checkpoint.
        allow_nonfinite: Quantize weights that hold NaN or infinities.

    Raises:
        ValueError: An argument is not legal; the message names it, the legal values and the value given.
    """

    quant_type: str = "nf4"
    double_quant: bool = True
    blocksize: int = 64
    storage: str = "uint8"
    compute_dtype: str | None = None
    threshold: float = DEFAULT_THRESHOLD
    dtype: str | None = None
    max_shard_size: int = DEFAULT_SHARD_SIZE
    rules: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    selection: Selection = "rules"
    trust_remote_code: bool = False
    allow_nonfinite: bool = False

    def __post_init__(self) -> None:
        """Convert and check every field."""
        _one_of("quant_type", self.quant_type, WEIGHT_TYPES)
        if isinstance(self.blocksize, bool):
            raise ValueError(f"blocksize must be an int, got {self.blocksize!r}")
        _one_of("blocksize", self.blocksize, BLOCK_SIZES)
        _one_of("storage", self.storage, STORAGE_DTYPES)
        _one_of("selection", self.selection, SELECTIONS)
        if self.trust_remote_code and self.selection != "transformers":
            raise ValueError(
                "trust_remote_code must be False unless selection='transformers', which alone runs any code, got True"
            )
        self._set(
            double_quant=bool(self.double_quant),
            compute_dtype=None if self.compute_dtype is None else _bare(self.compute_dtype),
            threshold=_threshold(self.threshold),
            dtype=dtype_name(self.dtype),
            max_shard_size=shard_size(self.max_shard_size),
            rules=rule_texts(self.rules),
            skip=module_names("skip", self.skip),
            trust_remote_code=bool(self.trust_remote_code),
            allow_nonfinite=bool(self.allow_nonfinite),
        )

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_config(cls, config: Config, *, skip: Iterable[str] = (), **fields: Any) -> QuantizeOptions:
        """The options that a `BitsAndBytesConfig` stands for, and what it has no attribute for.

        Args:
            config: See `quantize_checkpoint`.
            skip: Names of modules to keep besides those in the config.
            **fields: Further fields of this class.
        """
        made = coerce_config(config)
        listed = module_names("llm_int8_skip_modules", made.llm_int8_skip_modules or ())
        # By the names that `config.json` has, not as torch's dtypes.
        plain = made.to_dict()
        given: Any = made.compute_dtype()
        return cls(
            quant_type="int8" if made.load_in_8bit else plain["bnb_4bit_quant_type"],
            threshold=made.llm_int8_threshold,
            double_quant=plain["bnb_4bit_use_double_quant"],
            storage=plain["bnb_4bit_quant_storage"],
            compute_dtype=given,
            skip=(*listed, *module_names("skip", skip)),
            **fields,
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields by their names, as the compiled core takes them."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class DequantizeOptions:
    """How to dequantize a checkpoint.

    Attributes:
        dtype: The dtype to write; None for the one that each weight had.
        max_shard_size: Most bytes of an output file.

    Raises:
        ValueError: As for `QuantizeOptions`.
    """

    dtype: str | None = None
    max_shard_size: int = DEFAULT_SHARD_SIZE

    def __post_init__(self) -> None:
        """Convert and check every field."""
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        object.__setattr__(self, "max_shard_size", shard_size(self.max_shard_size))

    def to_dict(self) -> dict[str, Any]:
        """The fields by their names, as the compiled core takes them."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How to carry a plan out. `quantize_checkpoint` explains each field."""

    overwrite: bool = False
    resume: bool = False
    threads: int | None = None
    fsync: bool = True

    def __post_init__(self) -> None:
        """Convert and check every field."""
        if self.overwrite and self.resume:
            raise ValueError("overwrite and resume must not both be True, got overwrite=True, resume=True")
        object.__setattr__(self, "threads", thread_count(self.threads))

    @property
    def mode(self) -> Literal["new", "overwrite", "resume"]:
        """What to do about a destination that holds something."""
        return "overwrite" if self.overwrite else "resume" if self.resume else "new"


def coerce_config(config: Config) -> BitsAndBytesConfig:
    """The config that a caller's argument stands for: None for NF4 with double quantization.

    Raises:
        ValueError: It quantizes nothing, or keeps float weights beside 8-bit ones.
    """
    from halfbyte.config import BitsAndBytesConfig

    if config is None:
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    coerced = BitsAndBytesConfig.coerce(config)
    if not coerced.is_quantizable():
        raise ValueError("config must have load_in_4bit=True or load_in_8bit=True, got neither")
    if coerced.load_in_8bit and coerced.llm_int8_has_fp16_weight:
        raise ValueError(
            "llm_int8_has_fp16_weight must be False in the config of a quantized checkpoint, which holds int8 weights, "
            "got True"
        )
    return coerced


def thread_count(threads: int | None) -> int:
    """The number of threads that `threads` stands for: None is one for each core that this process may run on."""
    if threads is None:
        # Containers and job schedulers give a process fewer cores than the machine has.
        affinity = getattr(os, "sched_getaffinity", None)
        return len(affinity(0)) if affinity else os.cpu_count() or 1
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads must be an int of at least 1, or None for one per core, got {threads!r}")
    return threads


def dtype_name(dtype: object) -> str | None:
    """The name of a dtype that weights can be cast to."""
    name = None if dtype is None else _bare(dtype)
    if name is not None and name not in FLOAT_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(FLOAT_DTYPES)}, got {dtype!r}")
    return name


def shard_size(value: int | str | None) -> int:
    """The most bytes of an output file."""
    if value is None:
        return DEFAULT_SHARD_SIZE
    try:
        return parse_size(value)
    except ValueError:
        raise ValueError(
            f"max_shard_size must be a size of at least one byte: an int, or a text such as '500MB' or '2GiB', "
            f"got {value!r}"
        ) from None


def rule_texts(rules: Iterable[Rule]) -> tuple[str, ...]:
    """Rules as the compiled core reads them: `REGEX=type`."""
    if isinstance(rules, str):
        raise ValueError(f"rules must be a list of rules, got {rules!r}")
    texts = []
    for rule in rules:
        if isinstance(rule, tuple) and len(rule) == 2 and all(isinstance(part, str) for part in rule):
            texts.append(f"{rule[0]}={rule[1]}")
        elif isinstance(rule, str):
            texts.append(rule)
        else:
            raise ValueError(f"rules must hold 'REGEX=nf4|fp4|int8|keep', or pairs of both sides, got {rule!r}")
    return tuple(texts)


def module_names(argument: str, values: Iterable[str]) -> tuple[str, ...]:
    """A list of module names, checked."""
    if isinstance(values, str):
        raise ValueError(f"{argument} must be a list of module names, got {values!r}")
    found = tuple(values)
    for value in found:
        if not isinstance(value, str):
            raise ValueError(f"{argument} must hold module names, got {value!r}")
    return found


def _threshold(value: object) -> float:
    """A threshold of outliers, as `config.json` can hold it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"threshold must be a finite number of at least 0, got {value!r}")
    return float(value)


def _bare(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _one_of(argument: str, value: object, legal: tuple[object, ...]) -> None:
    if value not in legal:
        raise ValueError(f"{argument} must be one of {', '.join(map(str, legal))}, got {value!r}")
