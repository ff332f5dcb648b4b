"""The products of LoRA adapters (lora_down, lora_up) on the processor: bounds, copies, any order of threads."""

from __future__ import annotations

import itertools

import launches_lora
import pytest
from harness import library, run_both_ways
from launches_lora import Shape
from thorough import thorough

# Rows, columns, ranks: tails of each, ranks that fill no tile, several steps of a warp and of a block.
SHAPES = [
    (1, 8, 2), (16, 32, 16), (17, 40, 8), (33, 520, 6), (40, 1096, 16), (16, 72, 24), (50, 544, 32), (5, 96, 34),
    (20, 1032, 64),
]  # fmt: skip


@pytest.mark.parametrize("dtype", thorough(["bf16", "f16"], quick=("bf16",)))
def test_down(dtype: str) -> None:
    source = library("lora_down")
    types = itertools.cycle(itertools.product((dtype, "f32"), repeat=2))
    for rows, columns, rank in SHAPES:
        for row_tiles in (1, 2) if rank <= 16 else (2,):
            for _ in range(3):
                shape = Shape(rows, columns, rank, dtype, *next(types))
                check = launches_lora.down(source, shape, row_tiles)
                check.against(run_both_ways(source, check.case))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", thorough(["bf16", "f16"], quick=("bf16",)))
def test_up(dtype: str, transposed: bool) -> None:
    source = library("lora_up")
    types = itertools.cycle(((dtype, dtype), (dtype, "f32"), ("f32", "f32")))
    for i, (rows, columns, rank) in enumerate(SHAPES):
        for rows_of_block in (16, 32):
            shape = Shape(rows, columns, rank, dtype, *next(types))
            factor_type = ("f32", dtype)[i % 2]
            check = launches_lora.up(source, shape, transposed, rows_of_block, factor_type, zeros=i % 4 == 3)
            check.against(run_both_ways(source, check.case))
