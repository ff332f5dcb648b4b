"""What is kept beside packed 4-bit (or 8-bit) codes: scales, shape, block size; and its form in a state dict.

The keys are those of bitsandbytes, so that either library reads what the other wrote: `absmax`, `quant_map`, when
nested `nested_absmax` and `nested_quant_map`, and everything that is not a tensor as the UTF-8 bytes of a JSON object
under `quant_state.bitsandbytes__nf4` or `…__fp4`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from halfbyte import _native
from halfbyte.geometry import NESTED_BLOCKSIZE, QUANT_TYPES
from halfbyte.geometry import PACKED_KEYS as PACKED_KEYS
from halfbyte.geometry import TENSOR_KEYS as TENSOR_KEYS
from halfbyte.ops.checks import FLOAT_DTYPES, check_blocksize, check_quant_type
from halfbyte.ops.packed import Memo, PackedWeight, Packing, Scalars, packed_pair

_SCALAR_KEYS = (
    "quant_type",
    "blocksize",
    "dtype",
    "shape",
    "nested_blocksize",
    "nested_dtype",
    "nested_offset",
)
_CONVERTED = (torch.float16, torch.bfloat16, torch.float64)
_is_compiling = torch.compiler.is_compiling
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}


class QuantState:
    """What turns packed codes back into a tensor.

    Attributes:
        absmax: Scales, float32 `[blocks]`; or uint8 codes of them when `nested`.
        shape: Of the tensor that was quantized; None for 8-bit states.
        code: The value of each code, float32 `[16]` (or `[256]`). 4-bit codes are always read with the built-in values
            of `quant_type`; this is what a state dict carries.
        dtype: Of the tensor that was quantized, hence of what is dequantized.
        blocksize: How many consecutive values share a scale.
        quant_type: "nf4" or "fp4"; None for 8-bit states.
        offset: When nested, what was taken off the scales before they were quantized: float32 `[]`.
        state2: When nested, the state of the scales: its `absmax` is float32 `[ceil(blocks / 256)]`.
        nested: Whether the scales are quantized themselves.

    All are plain attributes and may be assigned. Scales and offsets of another floating dtype become float32.
    """

    valid_quant_types = QUANT_TYPES
    valid_qs_type_keys: ClassVar = [f"bitsandbytes__{quant_type}" for quant_type in QUANT_TYPES]
    valid_qs_keys: ClassVar = [*TENSOR_KEYS, "quant_state", *_SCALAR_KEYS]
    _packing: Packing | None = None

    def __init__(
        self,
        absmax: Tensor,
        shape: torch.Size | tuple[int, ...] | None = None,
        code: Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: Tensor | None = None,
        state2: QuantState | None = None,
    ) -> None:
        """Keep the arguments: nothing is copied or checked here; the operations check what they use."""
        self.absmax = absmax
        self.shape = shape
        self.code = code
        self.dtype = dtype
        self.blocksize = blocksize
        self.quant_type = quant_type
        self.offset = offset
        self.state2 = state2
        self.nested = state2 is not None

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign; here, and not in each product, scales of 16 or 64 bits become the float32 that kernels read."""
        if name in ("absmax", "offset") and isinstance(value, Tensor) and value.dtype in _CONVERTED:
            value = value.to(torch.float32)
        object.__setattr__(self, name, value)
        if "_packing" in self.__dict__:
            # It was derived from the old ones.
            del self.__dict__["_packing"]

    def __getstate__(self) -> dict[str, Any]:
        """The attributes, without what is derived from them."""
        return {name: value for name, value in self.__dict__.items() if name != "_packing"}

    def __getattr__(self, name: str) -> Any:
        """Resolve the last part of a packed state-dict key, as code that walks dotted names does."""
        if name.startswith("bitsandbytes__"):
            packed = self.as_dict(packed=True)
            if f"quant_state.{name}" in packed:
                return packed[f"quant_state.{name}"]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getitem__(self, index: int) -> Any:
        """The state as the list it was in old releases: absmax, shape, dtype, blocksize, nested part, quant_type."""
        nested = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type][index]

    def __repr__(self) -> str:
        """Everything but the numbers."""
        shape = None if self.shape is None else list(self.shape)
        return (
            f"QuantState(quant_type={self.quant_type!r}, shape={shape}, dtype={self.dtype}, "
            f"blocksize={self.blocksize}, nested={self.nested}, device={self.absmax.device})"
        )

    def __eq__(self, other: object) -> bool:
        """Whether both read the same codes as the same values, up to 1e-6, on whatever device."""
        if not isinstance(other, QuantState):
            return NotImplemented
        return (
            (self.dtype, self.blocksize, self.quant_type, self.nested)
            == (other.dtype, other.blocksize, other.quant_type, other.nested)
            and (None if self.shape is None else tuple(self.shape))
            == (None if other.shape is None else tuple(other.shape))
            and _equal(self.absmax, other.absmax)
            and _equal(self.code, other.code)
            and _equal(self.offset, other.offset)
            and self.state2 == other.state2
        )

    __hash__ = None  # type: ignore[assignment]

    # ---- for the operations ------------------------------------------------------------------------------------------

    def scales(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`absmax, absmax2, offset` as the operations take them: both None unless the scales are nested."""
        if not self.nested or self.state2 is None:
            return self.absmax, None, None
        if self.state2.blocksize != NESTED_BLOCKSIZE:
            raise ValueError(
                f"quant_state.state2.blocksize: {self.state2.blocksize} is not {NESTED_BLOCKSIZE}, "
                "the only one that nested scales have"
            )
        return self.absmax, self.state2.absmax, self.offset

    def weight(self) -> Scalars:
        """`shape, blocksize, quant_type` as the operations take them."""
        shape, blocksize, quant_type = self.shape, self.blocksize, self.quant_type
        if shape is None or blocksize is None or quant_type is None:
            missing = [name for name in ("shape", "blocksize", "quant_type") if getattr(self, name) is None]
            raise ValueError(f"quant_state: has no {', '.join(missing)}; a 4-bit state has all of them")
        return shape if isinstance(shape, tuple) else tuple(shape), blocksize, quant_type

    def packed(self, codes: Tensor) -> PackedWeight:
        """The codes of a 4-bit weight and this state as one value, as the operations take them."""
        if _is_compiling():
            # Graphs are not to depend on what is remembered.
            return PackedWeight(codes, Packing(*self.scales(), *self.weight()))
        return packed_pair((codes, self.packing()))

    def packing(self) -> Packing:
        """How the codes of a 4-bit weight are read, remembered until the state changes; not for compilers."""
        known, second = self._packing, self.state2
        if known is None or (
            known.absmax2 is not None
            if second is None
            else (known.absmax2 is not second.absmax or second.blocksize != NESTED_BLOCKSIZE)
        ):
            known = self.__dict__["_packing"] = Packing(*self.scales(), *self.weight(), Memo())
        return known

    # ---- devices -----------------------------------------------------------------------------------------------------

    def tensors(self) -> list[Tensor]:
        """The tensors of the state, those of `state2` included."""
        own = [t for t in (self.absmax, self.code, self.offset) if isinstance(t, Tensor)]
        return own + (self.state2.tensors() if self.state2 is not None else [])

    def map(self, function: Callable[[Tensor], Tensor]) -> QuantState:
        """A state whose tensors are `function` of these."""
        return QuantState(
            absmax=function(self.absmax),
            shape=self.shape,
            code=None if self.code is None else function(self.code),
            blocksize=self.blocksize,
            quant_type=self.quant_type,
            dtype=self.dtype,
            offset=None if self.offset is None else function(self.offset),
            state2=None if self.state2 is None else self.state2.map(function),
        )

    def to(self, device: torch.device | str | int | None, non_blocking: bool = False) -> QuantState:
        """Move the state, in place, to `device`; returns it."""
        self.absmax = self.absmax.to(device, non_blocking=non_blocking)
        if self.code is not None:
            self.code = self.code.to(device, non_blocking=non_blocking)
        if self.offset is not None:
            self.offset = self.offset.to(device, non_blocking=non_blocking)
        if self.state2 is not None:
            self.state2.to(device, non_blocking=non_blocking)
        return self

    # ---- state dicts -------------------------------------------------------------------------------------------------

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The state under the keys of a state dict.

        With `packed`, every value is a tensor: what is none goes, as JSON, into one uint8 tensor. A state without
        `quant_type` (8-bit) has no packed form, and is given unpacked. The maps are copies: a writer that drops one of
        two tensors that share memory drops nothing.
        """
        if self.dtype is None:
            raise ValueError("quant_state.dtype: None cannot be written; legal are " + ", ".join(_DTYPES))
        tensors = {"absmax": self.absmax}
        if self.code is not None:
            tensors["quant_map"] = self.code
        scalars: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.nested and self.state2 is not None and self.offset is not None:
            tensors["nested_absmax"] = self.state2.absmax
            if self.state2.code is not None:
                tensors["nested_quant_map"] = self.state2.code.clone()
            scalars["nested_blocksize"] = self.state2.blocksize
            scalars["nested_dtype"] = str(self.state2.dtype or torch.float32).removeprefix("torch.")
            # On the meta device there is no number to write.
            scalars["nested_offset"] = 0.0 if self.offset.is_meta else self.offset.item()
        if not packed or self.quant_type is None:
            return {**scalars, **tensors}
        text = json.dumps(scalars).encode()
        blob = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return {**tensors, f"quant_state.bitsandbytes__{self.quant_type}": blob}

    @classmethod
    def from_dict(cls, qs_dict: Mapping[str, Any], device: torch.device | str | int | None = None) -> QuantState:
        """Read what `as_dict` gave, packed or not; keys may have a prefix such as `model.layers.0.mlp.weight.`.

        `device` is where the tensors go; None leaves them where they are. Raises ValueError that names the key when one
        is missing, unknown, or holds what cannot be.
        """
        fields = _unpack(qs_dict)
        quant_type, blocksize = fields.get("quant_type"), fields.get("blocksize")
        required = ["absmax", "quant_map", "blocksize", "dtype"]
        nested = [key for key in fields if key.startswith("nested_")]
        if nested:
            required += ["nested_absmax", "nested_quant_map", "nested_blocksize", "nested_dtype", "nested_offset"]
        missing = [key for key in required if fields.get(key) is None]
        if missing:
            raise ValueError(f"quant state: missing {', '.join(missing)}; it has {', '.join(sorted(fields))}")
        if quant_type is not None:
            check_quant_type(quant_type)
            check_blocksize(blocksize)
            _check_codebook(fields["quant_map"], quant_type)
        shape = fields.get("shape")
        if shape is not None:
            if not isinstance(shape, (list, tuple)) or any(type(n) is not int or n < 0 for n in shape):
                raise ValueError(f"shape: {shape!r} is not a list of non-negative integers")
            shape = torch.Size(shape)
        absmax, code = _tensor(fields, "absmax", device), _tensor(fields, "quant_map", device)
        offset = state2 = None
        if nested:
            if not isinstance(fields["nested_offset"], (int, float)):
                raise ValueError(f"nested_offset: {fields['nested_offset']!r} is not a number")
            absmax2 = _tensor(fields, "nested_absmax", device)
            offset = torch.tensor(float(fields["nested_offset"]), dtype=torch.float32, device=absmax2.device)
            state2 = cls(
                absmax=absmax2,
                code=_tensor(fields, "nested_quant_map", device),
                blocksize=fields["nested_blocksize"],
                dtype=_dtype(fields, "nested_dtype"),
            )
            if quant_type is not None:
                _check_dynamic(state2)
        return cls(
            absmax=absmax,
            shape=shape,
            code=code,
            blocksize=blocksize,
            quant_type=quant_type,
            dtype=_dtype(fields, "dtype"),
            offset=offset,
            state2=state2,
        )


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    b = b.to(a.device)
    return torch.equal(a, b) or (a.is_floating_point() and torch.allclose(a, b, rtol=0, atol=1e-6))


def _unpack(qs_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by their own names, the JSON ones among them. `qs_dict` is left as it is."""
    packed = {key: value for key, value in qs_dict.items() if "bitsandbytes__" in key}
    fields = {key.rpartition(".")[2]: value for key, value in qs_dict.items() if key not in packed}
    if packed:
        if len(packed) > 1 or not next(iter(packed)).endswith(tuple(QuantState.valid_qs_type_keys)):
            found = ", ".join(sorted(packed))
            raise ValueError(f"quant state: {found}; expected exactly one of {', '.join(PACKED_KEYS)}")
        ((key, blob),) = packed.items()
        scalars = _parse(key, blob)
        declared = key.rpartition("bitsandbytes__")[2]
        if scalars.get("quant_type", declared) != declared:
            raise ValueError(f"{key}: says quant_type {scalars['quant_type']!r}")
        fields.update(scalars)
    elif "blocksize" not in fields:
        raise ValueError(
            f"quant state: missing {' or '.join(PACKED_KEYS)}; it has {', '.join(sorted(qs_dict)) or 'no key'}"
        )
    unknown = sorted(set(fields) - set(QuantState.valid_qs_keys))
    if unknown:
        raise ValueError(
            f"quant state: unknown {', '.join(unknown)}; legal are {', '.join(TENSOR_KEYS)}, {', '.join(_SCALAR_KEYS)}"
        )
    return fields


def _parse(key: str, blob: object) -> dict[str, Any]:
    """The JSON object in a uint8 tensor."""
    if not isinstance(blob, Tensor) or blob.dtype is not torch.uint8:
        kind = blob.dtype if isinstance(blob, Tensor) else type(blob).__name__
        raise ValueError(f"{key}: is {kind}, expected the torch.uint8 bytes of a JSON object")
    if blob.is_meta:
        raise ValueError(f"{key}: is on the meta device, where there are no bytes to read")
    try:
        scalars = json.loads(bytes(blob.flatten().tolist()))
    except (ValueError, RecursionError) as error:
        # Nested too deep, or with numbers too long, are kinds of broken too.
        raise ValueError(f"{key}: is not the JSON of a quantization state: {error}") from None
    if not isinstance(scalars, dict):
        raise ValueError(f"{key}: holds a JSON {type(scalars).__name__}, expected an object")
    return scalars


def _tensor(fields: Mapping[str, Any], key: str, device: torch.device | str | int | None) -> Tensor:
    value = fields[key]
    if not isinstance(value, Tensor):
        raise ValueError(f"{key}: is {type(value).__name__}, expected a tensor")
    value = value.detach()
    return value if device is None else value.to(device)


def _dtype(fields: Mapping[str, Any], key: str) -> torch.dtype:
    value = fields[key]
    if isinstance(value, torch.dtype):
        value = str(value).removeprefix("torch.")
    if not isinstance(value, str) or value not in _DTYPES:
        raise ValueError(f"{key}: {value!r} is not one of {', '.join(map(repr, _DTYPES))}")
    return _DTYPES[value]


def _check_codebook(code: object, quant_type: str) -> None:
    """4-bit codes are read with the built-in values: the stored ones must be these, up to how they were rounded."""
    if not isinstance(code, Tensor) or code.is_meta:
        return
    known = _native.quant_map(quant_type)
    if code.shape != (16,) or not all(abs(a - b) <= 1e-2 for a, b in zip(code.tolist(), known, strict=True)):
        raise ValueError(f"quant_map: is not the 16 values of {quant_type}, the only ones that it has")


def _check_dynamic(state2: QuantState) -> None:
    """Nested scales are read with the built-in map: the stored one must be it, up to how it was rounded."""
    code = state2.code
    if code is None or code.is_meta:
        return
    known = _native.dynamic_map()
    if code.shape != (256,) or not all(abs(a - b) <= 1e-6 for a, b in zip(code.tolist(), known, strict=True)):
        raise ValueError("nested_quant_map: is not the signed 8-bit dynamic map, the only one that nested scales have")
    if state2.blocksize != NESTED_BLOCKSIZE:
        raise ValueError(f"nested_blocksize: {state2.blocksize!r} is not {NESTED_BLOCKSIZE}")


torch.serialization.add_safe_globals([QuantState])
