"""The packed weights of a checkpoint: which tensors belong to one, and the parameter that they make.

A 4-bit weight `W` has its scales under `W.absmax` and other names that begin with its own. A weight of LLM.int8() has
them under `SCB`, and a mark of its layout under `weight_format`, both beside `weight` in the same module. The names
tell them apart, so that a checkpoint may hold both.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halfbyte.backends.cpu import aligned
from halfbyte.functional import dequantize_4bit, int8_vectorwise_dequant
from halfbyte.models.recipe import PackedParameter
from halfbyte.nn import Int8Params, Params4bit
from halfbyte.state import PACKED_KEYS, TENSOR_KEYS

KEYS_4BIT = (*TENSOR_KEYS, *PACKED_KEYS)
"""What is beside a 4-bit weight: each behind the name of the weight."""

SCB, WEIGHT_FORMAT = "SCB", "weight_format"
KEYS_8BIT = (SCB, WEIGHT_FORMAT)
"""What is beside an 8-bit weight: each in the place of the last part of its name, which is `weight`."""

_STATE = f"{PACKED_KEYS[0]} (or {PACKED_KEYS[1].rpartition('.')[2]})"


@dataclass
class Packed:
    """One packed weight.

    Attributes:
        weight: Its name.
        bits: 4 or 8.
        parts: The tensors beside it: what each is, and its name in the checkpoint.
    """

    weight: str
    bits: int
    parts: dict[str, str] = field(default_factory=dict)

    def lacking(self, names: Collection[str]) -> list[str]:
        """What a loader needs and `names`, those of the checkpoint, have not."""
        if self.bits == 8:
            missing = [] if SCB in self.parts else [beside(self.weight, SCB)]
        else:
            wanted = {"absmax", "quant_map"}
            if any(key.startswith("nested_") for key in self.parts):
                wanted |= {"nested_absmax", "nested_quant_map"}
            missing = [f"{self.weight}.{key}" for key in TENSOR_KEYS if key in wanted and key not in self.parts]
            if not any(key in self.parts for key in PACKED_KEYS):
                missing.append(f"{self.weight}.{_STATE}")
        return missing if self.weight in names else [self.weight, *missing]

    @property
    def mark(self) -> str | None:
        """The tensor that says that the weight is packed; None where there is none: `absmax` may belong to others."""
        keys = PACKED_KEYS if self.bits == 4 else KEYS_8BIT
        return next((self.parts[key] for key in keys if key in self.parts), None)


def beside(weight: str, key: str) -> str:
    """The name of what belongs to an 8-bit weight."""
    return f"{weight.removesuffix('weight')}{key}"


def find(names: Collection[str]) -> dict[str, Packed]:
    """The packed weights among the tensors of a checkpoint by their names, complete or not.

    Raises:
        ValueError: A weight has the parts of 4 bits and those of 8; the message names both.
    """
    found: dict[str, Packed] = {}
    for name in names:
        weight, key, bits = _part(name)
        if key is None:
            continue
        one = found.setdefault(weight, Packed(weight, bits))
        if one.bits != bits:
            other = next(iter(one.parts.values()))
            raise ValueError(f"{weight}: has the parts of 4 bits and of 8 bits: {other} and {name}")
        one.parts[key] = name
    return found


def _part(name: str) -> tuple[str, str | None, int]:
    """The weight that a tensor belongs to, what it is, and the bits; None where it is no part of a weight."""
    for key in KEYS_4BIT:
        if name.endswith(f".{key}"):
            return name[: -len(key) - 1], key, 4
    path, _, leaf = name.rpartition(".")
    return (f"{path}.weight" if path else "weight"), (leaf if leaf in KEYS_8BIT else None), 8


def parameter(
    bits: int, data: Tensor, parts: Mapping[str, Tensor], device: torch.device | None = None
) -> PackedParameter:
    """The parameter of a packed weight.

    Args:
        bits: 4 or 8.
        data: The codes.
        parts: What is beside them, by its key.
        device: Where everything goes; None leaves it where `data` is.

    Raises:
        ValueError: The parts do not fit each other, or have values that do not exist.
        TypeError: A part has a wrong dtype.
    """
    if bits == 4:
        return Params4bit.from_prequantized(aligned(data), float_parts(parts), device=device)
    return _int8(data, parts, data.device if device is None else device)


def _int8(data: Tensor, parts: Mapping[str, Tensor], device: torch.device) -> Int8Params:
    if data.dtype is not torch.int8:
        raise TypeError(f"weight must be torch.int8, which {SCB} belongs to, got {data.dtype}")
    if data.dim() != 2:
        raise ValueError(f"weight must have two dimensions, got shape {list(data.shape)}")
    scales = parts[SCB]
    if scales.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"{SCB} must be torch.float32, got {scales.dtype}")
    if tuple(scales.shape) != (data.shape[0],):
        raise ValueError(f"{SCB} must have one scale per row, shape [{data.shape[0]}], got {list(scales.shape)}")
    layout = parts.get(WEIGHT_FORMAT)
    if layout is not None and (layout.numel() != 1 or int(layout) != 0):
        raise ValueError(f"{WEIGHT_FORMAT} must be 0 (rows), got {layout.tolist()}")
    return Int8Params(
        data.detach().to(device).contiguous(),
        requires_grad=False,
        has_fp16_weights=False,
        SCB=aligned(scales.detach()).to(device, torch.float32),
    )


def dense(weight: PackedParameter, dtype: torch.dtype) -> Tensor:
    """The values of a packed weight: of 4 bits in the dtype that it was quantized from, of 8 bits in `dtype`."""
    if isinstance(weight, Params4bit):
        assert weight.quant_state is not None
        return dequantize_4bit(weight.data, weight.quant_state)
    assert weight.SCB is not None
    return int8_vectorwise_dequant(weight.data, weight.SCB).to(dtype)


def float_parts(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts beside a packed weight, aligned and in float32: some tools cast all that is not packed to 16 bits."""
    half = (torch.float16, torch.bfloat16)
    return {key: value.float() if value.dtype in half else aligned(value) for key, value in parts.items()}
