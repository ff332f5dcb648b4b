"""`BitsAndBytesConfig`: how a model is quantized, under the names and in the JSON that the field already uses.

The class has the signature, defaults, errors and serialized forms of transformers' class of the same name (compared
with transformers 5.23), and needs neither transformers nor torch. Neither is ever imported from here: both are looked
up among the modules that the process has already loaded, at the moment when they matter.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import sys
from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from halfbyte.dtypes import DTypeAttribute
from halfbyte.dtypes import UnknownDTypeError as UnknownDTypeError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

QUANT_TYPES = ("fp4", "nf4")
"""4-bit data types that bitsandbytes defines."""

QUANT_STORAGE_DTYPES = ("float16", "float32", "int8", "uint8", "float64", "bfloat16")
"""Data types that packed 4-bit codes may be stored under."""

_Config = TypeVar("_Config", bound="BitsAndBytesConfig")


class QuantizationMethod(str, Enum):
    """The family of quantization, as `quant_method` names it. Equal to transformers' member of the same name."""

    BITS_AND_BYTES = "bitsandbytes"


def _transformers_class() -> type[Any] | None:
    """Transformers' own BitsAndBytesConfig, if this process has loaded it."""
    found = getattr(sys.modules.get("transformers.utils.quantization_config"), "BitsAndBytesConfig", None)
    return found if isinstance(found, type) else None


def _joint_class(own: type, theirs: type) -> type:
    """Return the class, under `own`'s name, that derives from both; made once for each pair.

    It only answers `isinstance` and `__class__.__name__`: calling it gives an instance of `own`.
    """
    known: type | None = own.__dict__.get("_joint")
    if known is not None and known.__bases__[1] is theirs:
        return known

    def new(cls: type, *args: Any, **kwargs: Any) -> object:
        return own(*args, **kwargs)

    namespace = {"__new__": new, "__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    made = type(own.__name__, (own, theirs), namespace)
    own._joint = made  # type: ignore[attr-defined]
    return made


def _restore(cls: type[_Config], state: dict[str, Any], defaults: frozenset[str] = frozenset()) -> _Config:
    """Rebuild a pickled or copied config."""
    config = cls.__new__(cls)
    config.__dict__.update(state)
    config._defaults = defaults
    return config


class BitsAndBytesConfig:
    """Which of a model's weights are kept in 4 or 8 bits, and how.

    Accepted by transformers wherever it takes its own class of this name (`from_pretrained(quantization_config=...)`),
    whether transformers is imported before or after the config is made.

    Args:
        load_in_8bit: Replace linear layers by LLM.int8() ones. Not together with `load_in_4bit`.
        load_in_4bit: Replace linear layers by 4-bit ones.
        llm_int8_threshold: 8-bit: input columns holding an absolute value of at least this are multiplied in float16;
            0.0 for none.
        llm_int8_skip_modules: Names of modules to leave unquantized, in 4-bit as in 8-bit. None leaves the choice to
            the loader (which keeps the output embedding).
        llm_int8_enable_fp32_cpu_offload: Allow a device map that leaves some modules on the CPU, unquantized in
            float32.
        llm_int8_has_fp16_weight: 8-bit: keep float16 weights as well, for training them.
        bnb_4bit_compute_dtype: 4-bit: the data type of the product, a `torch.dtype` or its name ("bfloat16",
            "torch.bfloat16"). None leaves it to the input, whose type the product then has; the attribute and
            `config.json` say float32 for it, as those of transformers do, and `compute_dtype()` tells the two apart.
        bnb_4bit_quant_type: 4-bit: the codebook, "nf4" or "fp4".
        bnb_4bit_use_double_quant: 4-bit: quantize the blocks' absmax as well, which saves 0.37 bits per weight.
        bnb_4bit_quant_storage: 4-bit: the data type that the packed bytes are stored under, a `torch.dtype` or one of
            "float16", "float32", "int8", "uint8", "float64", "bfloat16"; None for uint8.
        **kwargs: Ignored, and named in a log record of level INFO, so that `config.json` files of other versions can be
            read.

    Raises:
        ValueError: Both `load_in_4bit` and `load_in_8bit` are true, or a data type is neither a `torch.dtype` nor a
            legal name.
        TypeError: Any other argument is not of its type; flags must be `bool`, the threshold `float` (6.0, not 6).

    Note:
        Two configs are equal when they serialize to the same dictionary; one of transformers' class counts. The two
        attributes that hold a data type give a `torch.dtype` where the process has loaded torch, else its name.

    Examples:
        >>> config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
        >>> config.quantization_method()
        'nf4'
        >>> config.to_dict()["bnb_4bit_compute_dtype"]
        'bfloat16'
    """

    # What was left to its default. No attribute among the others: those are what `config.json` holds.
    __slots__ = ("__dict__", "__weakref__", "_defaults")
    _defaults: frozenset[str]

    bnb_4bit_compute_dtype = DTypeAttribute("float32")
    bnb_4bit_quant_storage = DTypeAttribute("uint8", QUANT_STORAGE_DTYPES)

    def __init__(
        self,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        llm_int8_threshold: float = 6.0,
        llm_int8_skip_modules: list[str] | None = None,
        llm_int8_enable_fp32_cpu_offload: bool = False,
        llm_int8_has_fp16_weight: bool = False,
        bnb_4bit_compute_dtype: torch.dtype | str | None = None,
        bnb_4bit_quant_type: str = "fp4",
        bnb_4bit_use_double_quant: bool = False,
        bnb_4bit_quant_storage: torch.dtype | str | None = None,
        **kwargs: Any,
    ) -> None:
        # `vars(self)` holds the keys of config.json in the order in which transformers' class writes them.
        self._defaults = frozenset()
        self.quant_method = QuantizationMethod.BITS_AND_BYTES
        if load_in_4bit and load_in_8bit:
            raise _both_error()
        self._load_in_8bit = load_in_8bit
        self._load_in_4bit = load_in_4bit
        self.llm_int8_threshold = llm_int8_threshold
        self.llm_int8_skip_modules = llm_int8_skip_modules
        self.llm_int8_enable_fp32_cpu_offload = llm_int8_enable_fp32_cpu_offload
        self.llm_int8_has_fp16_weight = llm_int8_has_fp16_weight
        self.bnb_4bit_quant_type = bnb_4bit_quant_type
        self.bnb_4bit_use_double_quant = bnb_4bit_use_double_quant
        self.bnb_4bit_compute_dtype = bnb_4bit_compute_dtype
        self.bnb_4bit_quant_storage = bnb_4bit_quant_storage
        if kwargs:
            logger.info("Unused kwargs: %s. %s does not know these names.", list(kwargs), type(self).__name__)
        self.post_init()

    @property
    def load_in_4bit(self) -> bool:
        """Whether linear layers become 4-bit. Setting it raises as the constructor does."""
        return self._load_in_4bit

    @load_in_4bit.setter
    def load_in_4bit(self, value: bool) -> None:
        _check_type("load_in_4bit", value, bool)
        if self.load_in_8bit and value:
            raise _both_error()
        self._load_in_4bit = value

    @property
    def load_in_8bit(self) -> bool:
        """Whether linear layers become 8-bit. Setting it raises as the constructor does."""
        return self._load_in_8bit

    @load_in_8bit.setter
    def load_in_8bit(self, value: bool) -> None:
        _check_type("load_in_8bit", value, bool)
        if self.load_in_4bit and value:
            raise _both_error()
        self._load_in_8bit = value

    def post_init(self) -> None:
        """Check the type of every attribute that holds no data type.

        Raises:
            TypeError: Names the attribute, its value and the type it must have.
        """
        _check_type("load_in_4bit", self.load_in_4bit, bool)
        _check_type("load_in_8bit", self.load_in_8bit, bool)
        _check_type("llm_int8_threshold", self.llm_int8_threshold, float)
        if self.llm_int8_skip_modules is not None:
            _check_type("llm_int8_skip_modules", self.llm_int8_skip_modules, list)
        _check_type("llm_int8_enable_fp32_cpu_offload", self.llm_int8_enable_fp32_cpu_offload, bool)
        _check_type("llm_int8_has_fp16_weight", self.llm_int8_has_fp16_weight, bool)
        _check_type("bnb_4bit_quant_type", self.bnb_4bit_quant_type, str)
        _check_type("bnb_4bit_use_double_quant", self.bnb_4bit_use_double_quant, bool)

    def is_quantizable(self) -> bool:
        """Return whether this config quantizes anything."""
        return self.load_in_8bit or self.load_in_4bit

    def compute_dtype(self) -> torch.dtype | str | None:
        """Return the data type of the product that was chosen, None when that was left to the input.

        A `torch.dtype` where the process has loaded torch, else its name. A config that was read from a dictionary that
        says float32, and one of transformers' class, count as having chosen it: there the two cannot be told apart, and
        transformers computes in float32.
        """
        return None if "bnb_4bit_compute_dtype" in self._defaults else self.bnb_4bit_compute_dtype

    def quantization_method(self) -> str | None:
        """Return "llm_int8", "fp4" or "nf4"; None when nothing is quantized, or to a 4-bit type of another name."""
        if self.load_in_8bit:
            return "llm_int8"
        if self.load_in_4bit and self.bnb_4bit_quant_type in QUANT_TYPES:
            return self.bnb_4bit_quant_type
        return None

    @classmethod
    def coerce(cls: type[_Config], config: object) -> _Config:
        """Give a config of this class from one of this class, one of transformers' class, or a dictionary.

        Stricter than `from_dict`, because it stands where a person's argument comes in: unknown keys, another
        `quant_method`, a 4-bit type or storage type that no loader reads are errors.

        Args:
            config: An instance of this class (returned as it is), of transformers' `BitsAndBytesConfig`, or a
                dictionary: the constructor's arguments by name, or what either class' `to_dict` returned.

        Raises:
            TypeError: `config` is something else, or holds a value of a wrong type.
            ValueError: A key or value is not a legal one; the message lists those that are.
        """
        theirs = _transformers_class()
        if isinstance(config, cls):
            made = config
        elif isinstance(config, BitsAndBytesConfig) or (theirs is not None and isinstance(config, theirs)):
            made = cls.from_dict(config.to_dict())
            made._defaults = getattr(config, "_defaults", made._defaults)
        elif isinstance(config, dict):
            method = config.get("quant_method", "bitsandbytes")
            if method != "bitsandbytes":
                raise ValueError(f"quant_method must be 'bitsandbytes', got {method!r}")
            legal = cls().to_dict()
            unknown = [key for key in config if key not in legal]
            if unknown:
                names = ", ".join(name for name in legal if not name.startswith("_"))
                raise ValueError(f"config has unknown keys {unknown}; the legal ones are {names}")
            made = cls.from_dict(config)
        else:
            raise TypeError(
                "config must be a halfbyte or transformers BitsAndBytesConfig, or a dict of its arguments, "
                f"got {config!r} ({type(config).__name__})"
            )
        for module in made.llm_int8_skip_modules or ():
            if not isinstance(module, str):
                raise TypeError(
                    f"llm_int8_skip_modules must be a list of strings, got {made.llm_int8_skip_modules!r} "
                    f"({type(module).__name__} in it)"
                )
        if made.load_in_8bit and not made.llm_int8_threshold >= 0:  # NaN too
            raise ValueError(
                "llm_int8_threshold must be a number of at least 0.0 (0.0 turns it off), "
                f"got {made.llm_int8_threshold!r}"
            )
        if made.load_in_4bit:
            for name, value, values in (
                ("bnb_4bit_quant_type", made.bnb_4bit_quant_type, QUANT_TYPES),
                ("bnb_4bit_quant_storage", made.__dict__["bnb_4bit_quant_storage"], QUANT_STORAGE_DTYPES),
            ):
                if value not in values:
                    raise ValueError(f"{name} must be one of {', '.join(map(repr, values))}, got {value!r}")
        return made

    @overload
    @classmethod
    def from_dict(
        cls: type[_Config], config_dict: dict[str, Any], return_unused_kwargs: Literal[False] = False, **kwargs: Any
    ) -> _Config: ...
    @overload
    @classmethod
    def from_dict(
        cls: type[_Config], config_dict: dict[str, Any], return_unused_kwargs: Literal[True], **kwargs: Any
    ) -> tuple[_Config, dict[str, Any]]: ...
    @classmethod
    def from_dict(
        cls: type[_Config], config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> _Config | tuple[_Config, dict[str, Any]]:
        """Make a config from a dictionary, such as `quantization_config` of a `config.json`.

        Args:
            config_dict: The constructor's arguments by name; other keys are ignored.
            return_unused_kwargs: Return `(config, rest)`, where `rest` holds those of `kwargs` that name no attribute.
            **kwargs: Attributes to set afterwards, in place of those of `config_dict`.
        """
        config = cls(**config_dict)
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Set those of the attributes named that this config has; return the others.

        Attributes that hold a data type take what the constructor takes, `load_in_4bit` and `load_in_8bit` are checked
        as on assignment; other values are set as they are.
        """
        unused = {}
        for name, value in kwargs.items():
            if hasattr(self, name):
                setattr(self, name, value)
            else:
                unused[name] = value
        return unused

    def to_dict(self) -> dict[str, Any]:
        """Return all attributes as `config.json` holds them: data types by name, nothing shared with this config."""
        values = copy.deepcopy(self.__dict__)
        values["load_in_4bit"] = self.load_in_4bit
        values["load_in_8bit"] = self.load_in_8bit
        return values

    def to_diff_dict(self) -> dict[str, Any]:
        """Return those items of `to_dict` that differ from a default config's."""
        default = BitsAndBytesConfig().to_dict()
        return {name: value for name, value in self.to_dict().items() if name not in default or value != default[name]}

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return `to_diff_dict` (or `to_dict`, without `use_diff`) as JSON with sorted keys, and a line end."""
        return _to_json(self.to_diff_dict() if use_diff else self.to_dict()) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write `to_dict` as JSON with sorted keys to a file (UTF-8), in place of what it held."""
        text = self.to_json_string(use_diff=False)
        with open(json_file_path, "w", encoding="utf-8") as file:
            file.write(text)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Yield names and values of the attributes, so that `dict(config)` works."""
        for name in self.__dict__:
            yield name, copy.deepcopy(getattr(self, name))

    def __repr__(self) -> str:
        """Return the class' name and `to_dict` as JSON."""
        return f"{type(self).__name__} {_to_json(self.to_dict())}\n"

    def __eq__(self, other: object) -> bool:
        """Compare with another config, of this class or of transformers', by what they serialize to."""
        theirs = _transformers_class()
        if isinstance(other, BitsAndBytesConfig):
            return self.to_dict() == other.to_dict()
        if theirs is not None and isinstance(other, theirs):
            try:
                values = other.to_dict()
            except (AttributeError, IndexError):
                # Their attributes may have been assigned values that they cannot serialize.
                return False
            return bool(self.to_dict() == values)
        return NotImplemented

    # Mutable and compared by value.
    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        # The default refuses objects whose `__class__` is not their type.
        return _restore, (type(self), self.__dict__.copy(), self._defaults)

    @property  # type: ignore[misc]
    def __class__(self) -> type[BitsAndBytesConfig]:
        """The class as `isinstance` sees it: also transformers' own, once the process has loaded that.

        transformers dispatches on `isinstance(config, its BitsAndBytesConfig)`, which consults this attribute when the
        object's real type does not match. Deriving from its class instead would import transformers with this module,
        and could not reach configs that were made before transformers was loaded.
        """
        own = type(self)
        theirs = _transformers_class()
        return own if theirs is None or issubclass(own, theirs) else _joint_class(own, theirs)


def _to_json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True)


def _both_error() -> ValueError:
    return ValueError("load_in_4bit and load_in_8bit are both True: only one of them can be")


def _check_type(name: str, value: object, expected: type) -> None:
    if not isinstance(value, expected):
        kinds = {bool: "a boolean, True or False", float: "a float", list: "a list of strings", str: "a string"}
        raise TypeError(f"{name} must be {kinds[expected]}, got {value!r} ({type(value).__name__})")
