"""The products of many tokens' experts (experts_tile_sm90a) on the processor: bounds, bits, any order of threads."""

from __future__ import annotations

import itertools

import build_emulator
import experts_tiles
import pytest
from experts import Choices
from experts_tiles import Tile, Tokens
from harness import built, library, run_both_ways
from thorough import thorough

TOKENS = (16, 32, 64, 128)
# Tokens of each expert, n, k and the block size: experts with none, with one, with more than a tile; rows that end
# inside of a tile and a team's part of it; K of one unit and several, the last one short.
SHAPES = [
    ((0, 40, 0, 1, 200), 136, 256, 64),
    ((5,), 300, 320, 64),
    ((0, 0, 33, 0), 64, 576, 128),
    ((129, 0, 0, 3, 64, 0, 0, 31), 40, 192, 4096),
    ((17, *[0] * 60, 9), 256, 768, 64),
]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_products(dtype: str, nested: bool) -> None:
    """Within the bound of the arithmetic, each row where it belongs, nothing else written; the same in both orders."""
    source = library("experts_tile_sm90a")
    for i, (counts, n, k, blocksize) in enumerate(SHAPES):
        job = Tokens.random(
            counts, n, k, dtype, ("nf4", "fp4")[i % 2], blocksize, nested=(i % 2 == 1) != nested, bias=i % 3 != 0,
            beyond=i % 2 * 3,
        )  # fmt: skip
        plan = Tile(
            TOKENS[(i + nested) % 4], (1, 3, 7)[i % 3], ordered=i % 2 == 0, more=(0, 8, 3)[i % 3], shift=i % 2 * 2
        )
        check = experts_tiles.tile(source, job, plan)
        check.against(run_both_ways(source, check.case))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu2", "clamped_swiglu"])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_gates(dtype: str, activation: str) -> None:
    source = library("experts_tile_sm90a")
    for i, (counts, n, k, blocksize) in enumerate(SHAPES[:4]):
        job = Tokens.random(counts, n, k, dtype, "nf4", blocksize, gated=True, nested=i % 2 == 0, bias=i % 2 == 1)
        check = experts_tiles.tile(source, job, Tile(TOKENS[(i + len(dtype)) % 4], 2 + i, activation=activation))
        check.against(run_both_ways(source, check.case))


def test_without_a_gate() -> None:
    source = library("experts_tile_sm90a")
    job = Tokens.random((3, 70), 200, 128, "bf16", bias=True)
    for tokens in TOKENS:
        check = experts_tiles.tile(source, job, Tile(tokens, activation="relu2"))
        check.against(run_both_ways(source, check.case))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_an_identity_gives_the_dequantized_weight(dtype: str, quant_type: str, nested: bool) -> None:
    """Bit for bit: unpacked as dequantizing does it, each value of each expert at its place."""
    source = library("experts_tile_sm90a")
    for n, k, blocksize in [(264, 64, 64), (130, 256, 64), (72, 320, 128)]:
        job = Tokens.random((k, 0, 50), n, k, dtype, quant_type, blocksize, nested=nested, identity=True)
        check = experts_tiles.tile(source, job, Tile(128, ordered=True), exact=True)
        check.against(run_both_ways(source, check.case))


def test_blocks_share_the_tiles() -> None:
    """More blocks than tiles, as many, fewer; no tokens at all."""
    source = library("experts_tile_sm90a")
    for counts, blocks in itertools.product(((70, 0, 5), (0, 0)), (1, 2, 5, 40)):
        job = Tokens.random(counts, 300, 64, "bf16", beyond=2)
        check = experts_tiles.tile(source, job, Tile(32, blocks))
        check.against(run_both_ways(source, check.case))


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_blocks_share_parts_of_tiles(dtype: str) -> None:
    """More blocks than tiles, so that several have parts of one; blocks that end inside of one; some with nothing."""
    source = library("experts_tile_sm90a")
    cases = [
        ((3, 0, 5), 130, 1024, 7),
        ((1,), 100, 2304, 5),
        ((2, 40, 0, 1), 256, 576, 9),
        ((1,), 64, 1024, 11),
        ((1,), 64, 256, 3),
    ]
    for i, (counts, n, k, blocks) in enumerate(cases):
        gated = i % 2 == 0
        job = Tokens.random(counts, n, k, dtype, gated=gated, nested=i == 2, bias=i % 2 == 1)
        plan = Tile((16, 32)[i % 2], blocks, "silu" if gated else "none", ordered=not gated, shares=True)
        check = experts_tiles.tile(source, job, plan)
        check.against(run_both_ways(source, check.case))


def test_as_many_experts_as_there_may_be() -> None:
    source = library("experts_tile_sm90a")
    counts = [0] * 512
    counts[0], counts[31], counts[300], counts[511] = 1, 2, 40, 3
    job = Tokens.random(counts, 32, 64, "bf16")
    check = experts_tiles.tile(source, job, Tile(32, 5))
    check.against(run_both_ways(source, check.case))


@pytest.mark.parametrize("highest_first", thorough([False, True], quick=[False]))
def test_copies_and_matrix_units_read_what_is_there(highest_first: bool) -> None:
    """Each access to shared memory is known: none is made while a copy is on its way there or a product reads it."""
    source = built(build_emulator.source_of("experts_tile_sm90a"), "stores")
    for dtype, tokens, gated in itertools.product(("bf16", "f16"), TOKENS, (False, True)):
        job = Tokens.random((40, 0, 3), 260, 768, dtype, gated=gated, nested=gated)
        check = experts_tiles.tile(source, job, Tile(tokens, 2, "silu" if gated else "none"))
        check.against(source.run(check.case, highest_first))


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_columns_for_the_next_product(dtype: str) -> None:
    """In the order of permute.cuh, with a gate and without."""
    source = library("experts_tile_sm90a")
    for i, (tokens, gated) in enumerate(itertools.product(TOKENS, (False, True))):
        job = Tokens.random((3, 0, tokens + 5), 64 * (1 + i % 5), 128, dtype, gated=gated, bias=i % 2 == 0)
        plan = Tile(tokens, 2, "silu" if gated else "relu2", more=i % 2 * 64, permutes=True)
        check = experts_tiles.tile(source, job, plan)
        check.against(run_both_ways(source, check.case))


@pytest.mark.parametrize(
    ("tokens", "top_k", "columns", "missing", "ordered"),
    [(9, 3, 64, 5, True), (40, 2, 4160, 0, True), (1, 1, 128, 1, True), (11, 1, 320, 2, False)],
)
def test_rows_are_gathered(tokens: int, top_k: int, columns: int, missing: int, ordered: bool) -> None:
    """The token's row for each slot that has an expert; those of others are left alone."""
    source = library("experts_gather")
    check = experts_tiles.gather(source, tokens, top_k, columns, missing, ordered=ordered)
    check.against(run_both_ways(source, check.case))


@pytest.mark.parametrize(
    ("counts", "top_k", "none"),
    [
        ((3, 0, 9), 1, ()),
        ((1,), 1, ()),
        ((200, 0, 56), 8, ()),
        ((*[1] * 100, *[0] * 411, 20), 4, (-1, 512, 1 << 40, 600)),
    ],
)  # fmt: skip
def test_few_slots_are_sorted_and_gathered(counts: tuple[int, ...], top_k: int, none: tuple[int, ...]) -> None:
    """As many as there may be; more experts than threads; slots of no expert."""
    source = library("experts_gather_few")
    check = experts_tiles.gather_few(source, Choices.of_counts(counts, top_k, none), 320)
    check.against(run_both_ways(source, check.case))
