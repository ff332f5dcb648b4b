"""The packed weights of a checkpoint: which tensors belong to one, and the parameter that they make.

A 4-bit weight `W` has its scales under `W.absmax` and other names that begin with its own. A weight of LLM.int8() has
them under `SCB`, and a mark of its layout under `weight_format`, both beside `weight` in the same module. The names
tell them apart, so that a checkpoint may hold both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
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


def find(names: Collection[str], dtype: Callable[[str], torch.dtype]) -> dict[str, Packed]:
    """The packed weights among the tensors of a checkpoint by their names, complete or not.

    A module may have a tensor of its own that is called as a part of a packed weight is: see `_is_packed`.

    Args:
        names: Of all tensors.
        dtype: Of a tensor.

    Raises:
        ValueError: A weight has the parts of 4 bits and those of 8; the message names both.
    """
    candidates: dict[tuple[str, int], Packed] = {}
    for name in names:
        weight, key, bits = _part(name)
        if key is not None:
            candidates.setdefault((weight, bits), Packed(weight, bits)).parts[key] = name
    known = frozenset(names)
    found: dict[str, Packed] = {}
    for one in candidates.values():
        if not _is_packed(one, dtype(one.weight) if one.weight in known else None):
            continue
        other = found.setdefault(one.weight, one)
        if other is not one:
            first, second = (next(iter(each.parts.values())) for each in (other, one))
            raise ValueError(f"{one.weight}: has the parts of 4 bits and of 8 bits: {first} and {second}")
    return found


def _is_packed(one: Packed, dtype: torch.dtype | None) -> bool:
    """Whether these are the parts of a packed weight; `dtype` is that of the weight, None where there is none.

    4 bits: the JSON of a state tells; without it, only what stands beside a weight of floats is something else. 8 bits:
    two of the codes, the scales and the mark.
    """
    if one.bits == 4:
        return one.mark is not None or dtype is None or not dtype.is_floating_point
    return dtype is torch.int8 or len(one.parts) == len(KEYS_8BIT)


def is_called_a_part(name: str) -> bool:
    """Whether a tensor has the name of what stands beside a packed weight."""
    return _part(name)[1] is not None


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
        # `dequantize_4bit` takes a packed weight of shape [1, n] for a transposed one.
        return Params4bit.from_prequantized(aligned(data).reshape(-1, 1), float_parts(parts), device=device)
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


def odd_scales(one: Packed, weight: PackedParameter, parts: Mapping[str, Tensor]) -> str | None:
    """The part of a packed weight with scales that no finite weight has (NaN, infinite, negative), and how many.

    Single scales of 4-bit weights are not looked at: there are so many that reading them would slow a load down.

    Args:
        one: The weight.
        weight: The parameter made of it.
        parts: What is beside its codes, on the CPU.

    Returns:
        The name of the tensor in the checkpoint, and what is wrong; None where nothing is.
    """
    key = SCB
    if isinstance(weight, Params4bit):
        state = weight.quant_state
        if state is None or state.offset is None:
            return None
        offset = float(state.offset)
        if not 0 <= offset < math.inf:
            return f"{one.mark} (nested_offset is {offset})"
        key = "nested_absmax"
    scales = parts[key].detach()
    if not scales.numel():
        return None
    low, high = (float(bound) for bound in scales.aminmax())
    if low >= 0 and high < math.inf:
        return None
    odd = int((~((scales >= 0) & (scales < math.inf))).sum())
    return f"{one.parts[key]} ({odd} of {scales.numel()})"


def odd_scales_note(odd: Sequence[str], total: int) -> str:
    """What to say of weights with such scales among all that are packed."""
    named = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
    return (
        f"{len(odd)} of {total} quantized weights have scales that no finite weight has (NaN, infinite or negative): "
        f"{named}"
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
