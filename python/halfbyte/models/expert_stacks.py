"""Packed weights that hold several matrices of experts, to one packed weight for each matrix: exactly, code by code.

Blocks of scales do not know of matrices. Where each matrix is whole blocks, its codes and scales are parts of those of
the stack. Nested scales stay nested where the blocks of scales (256) do not reach into another matrix; else they become
the float32 scales that they stand for, those of a layer all or none, because one operation computes such experts alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.codebooks import quant_map
from halfbyte.functional import dequantize_blockwise
from halfbyte.geometry import BLOCK_SIZES, NESTED_BLOCKSIZE
from halfbyte.models.experts import Fused
from halfbyte.nn.experts import Experts4bit
from halfbyte.state import QuantState

_INSTEAD = "make a 16-bit checkpoint of it by `halfbyte dequantize`, and load that"


@dataclass(frozen=True)
class Stacked:
    """One fused parameter of a module with experts, as packed weights stand for it.

    Attributes:
        how: How the module held its experts.
        parameter: `how.up` or `how.down`.
        count: Number of experts.
        shape: Of one expert's part, `[out, in]`.
    """

    how: Fused
    parameter: str
    count: int
    shape: tuple[int, int]

    @classmethod
    def of(cls, how: Fused, parameter: str, experts: Experts4bit) -> Stacked:
        """That of experts that were taken apart."""
        shape = how.shape(parameter, experts)
        return cls(how, parameter, experts.num_experts, shape[::-1] if how.transposed else shape)

    @property
    def rows(self) -> dict[int, slice]:
        """Which rows of one expert's part are each matrix, by its place in `projections`."""
        return self.how.rows(self.parameter, self.shape[0])

    def keeps_nested(self, blocksize: int) -> bool:
        """Whether nested scales of weights with these blocks stay nested; the same for both parameters of a layer."""
        out, width = self.shape
        scales = len(range(out)[next(iter(self.rows.values()))]) * width // blocksize
        return not self.how.interleaved and scales % NESTED_BLOCKSIZE == 0

    def split(self, codes: Tensor, state: QuantState) -> list[dict[int, tuple[Tensor, QuantState]]]:
        """The matrices of one packed weight that holds all experts, by expert and place.

        Raises:
            ValueError: The weight is of another shape, or matrices of it share a block.
        """
        expected = (self.count, *self.shape)
        if self.how.transposed:
            raise ValueError(
                f"is packed as {list(state.shape or ())}, all experts in one weight [experts, in, out]: its blocks lie "
                f"across the rows of the matrices, so no matrix can be taken out of it; {_INSTEAD}"
            )
        if tuple(state.shape or ()) != expected:
            raise ValueError(f"holds {list(state.shape or ())}, the model has {list(expected)}")
        return self._split(codes, state, self.count)

    def split_one(self, codes: Tensor, state: QuantState) -> dict[int, tuple[Tensor, QuantState]]:
        """The matrices of one expert, of a packed weight `[out, in]` that holds its part.

        Raises:
            ValueError: As in `split`.
        """
        self.check_shape(state.shape or ())
        return self._split(codes, state, 1)[0]

    def check_shape(self, shape: Sequence[int]) -> None:
        """That a weight holds one expert's part.

        Raises:
            ValueError: It does not.
        """
        if tuple(shape) != self.shape:
            raise ValueError(f"holds {list(shape)}, the model has {list(self.shape)}")

    def state(self, absmax: Tensor, codes: Tensor, quant_type: str, dtype: torch.dtype) -> QuantState:
        """The state of a weight that has nothing but codes and scales beside them, a row for each expert.

        Raises:
            ValueError: Codes or scales are not what so many experts of this shape have.
        """
        values = self.shape[0] * self.shape[1]
        if codes.dtype is not torch.uint8 or tuple(codes.shape) != (self.count, values // 2):
            raise ValueError(
                f"must be torch.uint8 [{self.count}, {values // 2}], got {codes.dtype} {list(codes.shape)}"
            )
        blocks = absmax.shape[1] if absmax.dim() == 2 else 0
        blocksize = values // blocks if blocks else 0
        if absmax.shape[0] != self.count or blocksize * blocks != values or blocksize not in BLOCK_SIZES:
            legal = ", ".join(str(values // size) for size in BLOCK_SIZES if values % size == 0)
            raise ValueError(
                f"its scales must be [{self.count}, n], n one of {legal or 'none'}, got {list(absmax.shape)}"
            )
        if absmax.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"its scales must be torch.float32, got {absmax.dtype}")
        return QuantState(
            absmax.flatten().float(),
            shape=torch.Size((self.count, *self.shape)),
            code=quant_map(quant_type, absmax.device),
            blocksize=blocksize,
            quant_type=quant_type,
            dtype=dtype,
        )

    def _split(self, codes: Tensor, state: QuantState, count: int) -> list[dict[int, tuple[Tensor, QuantState]]]:
        (out, width), blocksize, rows = self.shape, state.blocksize or 0, self.rows
        keeps = self.keeps_nested(blocksize)
        if count == 1 and len(rows) == 1:
            ((place, _),) = rows.items()
            return [{place: (codes, state if keeps else _plain(state))}]
        # Rows that do not lie together are taken out one by one.
        apart = any(picked.step for picked in rows.values())
        if (width if apart else out // len(rows) * width) % blocksize:
            raise ValueError(
                f"{f'a row has {width}' if apart else f'a matrix has {out // len(rows)} x {width}'} values, no "
                f"multiple of the block size {blocksize}, so a block belongs to two matrices; {_INSTEAD}"
            )
        storage = codes.dtype
        pieces = _pieces(codes.contiguous().view(torch.uint8).flatten()[: count * out * width // 2], count, out, rows)
        state = state if keeps else _plain(state)
        scales = _pieces(state.absmax.flatten(), count, out, rows)
        second = state.state2
        scales2 = None if second is None else _pieces(second.absmax.flatten(), count, out, rows)
        made: list[dict[int, tuple[Tensor, QuantState]]] = []
        for expert in range(count):
            made.append({})
            for place, picked in rows.items():
                part = QuantState(
                    scales[expert][place],
                    shape=torch.Size((len(range(out)[picked]), width)),
                    # Of its own: who saves a model drops what two tensors share.
                    code=None if state.code is None else state.code.clone(),
                    blocksize=blocksize,
                    quant_type=state.quant_type,
                    dtype=state.dtype,
                    offset=state.offset,
                    state2=None
                    if second is None or scales2 is None
                    else QuantState(
                        scales2[expert][place], code=second.code, blocksize=second.blocksize, dtype=second.dtype
                    ),
                )
                made[-1][place] = (pieces[expert][place].view(storage).unsqueeze(-1), part)
        return made


def _pieces(flat: Tensor, count: int, out: int, rows: Mapping[int, slice]) -> Sequence[Mapping[int, Tensor]]:
    """What belongs to each matrix of something that values have in equal shares."""
    if all(picked.step is None for picked in rows.values()):
        shares = flat.view(count * len(rows), -1)
        return [
            {place: _alone(shares[expert * len(rows) + index]) for index, place in enumerate(rows)}
            for expert in range(count)
        ]
    by_row = flat.view(count, out, -1)
    return [
        {place: by_row[expert, picked].clone().flatten() for place, picked in rows.items()} for expert in range(count)
    ]


def _alone(part: Tensor) -> Tensor:
    """The same memory, mapped or not, as a tensor that shares its storage with none: who saves a model copies those."""
    if not part.is_cpu:
        return part.clone()
    size = part.element_size()
    begin = part.storage_offset() * size
    alone = part.untyped_storage()[begin : begin + part.numel() * size]
    return part.new_empty(0).set_(alone, 0, part.shape)  # type: ignore[call-overload, no-any-return]


def _plain(state: QuantState) -> QuantState:
    """The state with scales that are not quantized themselves: the same values."""
    if not state.nested or state.state2 is None or state.offset is None:
        return state
    return QuantState(
        dequantize_blockwise(state.absmax, state.state2) + state.offset,
        shape=state.shape,
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )
