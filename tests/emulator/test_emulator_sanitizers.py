"""The CUDA sources on the processor with AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

Buffers have their exact size: a read behind the end, which may do no harm elsewhere, is found here; as is what no
barrier orders, whatever the results.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import build_emulator
import experts
import experts_tiles
import int8
import int8_tiles
import launches
import launches_gemm
import launches_lora
import native
import numpy as np
import pytest
import values
from harness import program
from launches import Check, Described, Scales
from launches_gemm import Product
from launches_lora import Shape
from native import QUANT_TYPES, STORED


def of_quantize_blockwise4(source: Described) -> Iterator[Check]:
    """Every kernel; a ragged end, an odd number, nothing aligned; a block of values on many warps."""
    for dtype in STORED:
        item = STORED[dtype].itemsize
        for quant_type in QUANT_TYPES:
            for n, blocksize, shifts in (
                (16384 + 77, 64, (0, 0)),
                (333, 4096, (item, 3)),
                (8193, 512, (0, 0)),
                (1, 32, (0, 1)),
            ):
                yield launches.quantize(source, values.awkward(n, dtype), dtype, quant_type, blocksize, shifts)
            yield launches.quantize(source, values.normal(999, dtype), dtype, quant_type, 64, (item, 1), slow=True)


def of_dequantize_blockwise4(source: Described) -> Iterator[Check]:
    """Every kernel, with the same in mind."""
    for dtype in STORED:
        item = STORED[dtype].itemsize
        for nested in (False, True):
            for n, blocksize, shifts in (
                (8192 + 77, 64, (0, 0)),
                (333, 4096, (3, item)),
                (2049, 32, (4, 16)),
                (1, 32, (0, 0)),
            ):
                absmax = np.abs(values.normal(-(-n // blocksize), "f32"))
                scales = Scales.nested(absmax) if nested else Scales.plain(absmax)
                for slow in (False, True):
                    yield launches.dequantize(source, values.codes(n), scales, n, dtype, "nf4", blocksize, shifts, slow)


def of_quantize_absmax(source: Described) -> Iterator[Check]:
    """A warp with nothing to do or several groups, one that is not full, more levels than needed, nothing aligned."""
    for n, levels, grid, shifts in (
        (1, 1, 1, (0, 0)),
        (256, 1, 1, (0, 0)),
        (2500, 2, 1, (4, 1)),
        (9001, 1, 2, (0, 0)),
        (70001, 1, 9, (0, 0)),
    ):
        yield launches.compress(source, np.abs(values.normal(n, "f32")), levels, grid, shifts)
    yield launches.compress_slowly(source, np.abs(values.normal(600, "f32")))


def of_gemm_4bit_simt(source: Described) -> Iterator[Check]:
    """Every kernel."""
    for k, dtype in enumerate(STORED):
        for nested in (False, True):
            product = Product.random(3, 7, 65, dtype, QUANT_TYPES[k % 2], 32, nested=nested, bias=nested)
            yield launches_gemm.simt(source, product, shift=1)


def of_gemv_4bit(source: Described) -> Iterator[Check]:
    """Every kernel, by words with a rest and by single codes."""
    for dtype in STORED:
        yield launches_gemm.gemv(source, 9, 300, 152, dtype, 64)
        yield launches_gemm.gemv(source, 3, 65, 33, dtype, 32, shift=1)


def of_gemm_4bit_small_m_sm80(source: Described) -> Iterator[Check]:
    """Every kernel: parts of K for several warps, and enough of it for one warp to use each place twice."""
    for dtype in ("bf16", "f16"):
        for nested in (False, True):
            for m in (3, 11):
                for k, plan in ((320, (21, 4, 1)), (1088, (37, 1, 3))):
                    product = Product.random(m, 37, k, dtype, "nf4", 64, nested=nested, bias=nested)
                    yield launches_gemm.small_m_sm80(source, product, *plan)


def of_gemm_4bit_small_m_sm75(source: Described) -> Iterator[Check]:
    """The same."""
    for nested in (False, True):
        for m in (3, 11):
            for k, plan in ((320, (21, 4, 1)), (1088, (37, 1, 3))):
                product = Product.random(m, 37, k, "f16", "nf4", 64, nested=nested, bias=nested)
                yield launches_gemm.small_m_sm75(source, product, *plan)


def of_gemm_4bit_small_m_sm90(source: Described) -> Iterator[Check]:
    """The same by way of shared memory: scales one by one and by fours, one chunk and two, a short pass."""
    for dtype in ("bf16", "f16"):
        for nested in (False, True):
            for m in (3, 11):
                for k, plan in ((320, (21, 4, 1)), (1088 if m == 11 else 2112, (37, 4, 2)), (1024, (37, 8, 1))):
                    product = Product.random(m, 37, k, dtype, "nf4", 64, nested=nested, bias=nested)
                    yield launches_gemm.small_m_sm90(source, product, *plan)


def of_gemm_4bit_small_m_sm90_long(source: Described) -> Iterator[Check]:
    """Two rounds and three, the last of one chunk of two; sums of each warp, or of two or four together."""
    for dtype in ("bf16", "f16"):
        for nested in (False, True):
            for m in (3, 11, 21):
                for k, slots, sharing in ((2560, 2, 2), (1600, 1, 1), (6208, 4, 4)):
                    product = Product.random(m, 37, k, dtype, "nf4", 64, nested=nested, bias=nested)
                    yield launches_gemm.small_m_sm90(source, product, 37, slots, 0, sharing=sharing)


def of_gemm_4bit_small_m_sm90_one(source: Described) -> Iterator[Check]:
    """One k-tile and several, scales one by one and by fours, a short pass."""
    for dtype in ("bf16", "f16"):
        for nested in (False, True):
            for k, plan in ((320, (21, 4, 1)), (2112, (37, 4, 2)), (1024, (37, 2, 1)), (1024, (37, 8, 2))):
                product = Product.random(1, 37, k, dtype, "nf4", 64, nested=nested, bias=nested)
                yield launches_gemm.one_row_sm90(source, product, *plan)


def of_gemm_4bit_tile_sm80(source: Described) -> Iterator[Check]:
    """Every kernel: more k-tiles than stages, K in parts, rows and columns that are not there."""
    for dtype in ("bf16", "f16"):
        for tokens, (m, n, k, parts) in ((64, (70, 9, 1088, 2)), (128, (3, 130, 384, 1)), (128, (129, 7, 448, 3))):
            nested = (dtype == "bf16") == (parts == 1)
            product = Product.random(m, n, k, dtype, "nf4", 32 if m == 3 else 64, nested=nested, bias=nested)
            yield launches_gemm.tile_sm80(source, product, tokens, parts)


def of_gemm_4bit_tile_sm75(source: Described) -> Iterator[Check]:
    """Every kernel: one k-tile and more, K in parts, rows and columns that are not there."""
    for nested in (False, True):
        for tokens, (m, n, k, parts) in ((64, (70, 9, 320, 2)), (32, (3, 130, 64, 1)), (32, (35, 7, 448, 3))):
            product = Product.random(m, n, k, "f16", "nf4", 64, nested=nested, bias=nested)
            yield launches_gemm.tile_sm75(source, product, tokens, parts)


def of_gemm_4bit_tile_sm90a(source: Described) -> Iterator[Check]:
    """Every kernel: scales one by one and by fours, K in parts, rows and columns that are not there."""
    shapes = [(33, 130, 288, 32), (70, 9, 256, 64), (3, 7, 256, 64), (20, 9, 544, 4096), (65, 40, 32, 128)]
    for dtype in ("bf16", "f16"):
        for (m, n, k, blocksize), tokens in zip(shapes, (64, 96, 128, 192, 256), strict=True):
            nested = (dtype == "bf16") == (tokens > 64)
            product = Product.random(m, n, k, dtype, "nf4", blocksize, nested=nested, bias=nested)
            yield launches_gemm.tile_sm90a(source, product, launches_gemm.Tile(tokens, parts=2 if k > 512 else 1))
        # Blocks that add up what others left.
        product = Product.random(20, 130, 768, dtype, "nf4", 64)
        yield launches_gemm.tile_sm90a(source, product, launches_gemm.Tile(192, ranges=4))


def of_gemm_4bit_block_sums_sm90a(source: Described) -> Iterator[Check]:
    """The same of every kernel with scales for sums, and several rounds of its main loop."""
    for dtype in ("bf16", "f16"):
        for (m, n, k, blocksize), tokens in zip(
            [(20, 130, 320, 64), (50, 9, 1344, 64), (70, 7, 2112, 128)], (32, 48, 64), strict=True
        ):
            nested = (dtype == "bf16") == (tokens > 32)
            product = Product.random(m, n, k, dtype, "nf4", blocksize, nested=nested, bias=nested)
            for how in ({"parts": 2}, {"ranges": 2 * -(-m // tokens) * -(-n // 128)}):
                yield launches_gemm.tile_sm90a(source, product, launches_gemm.Tile(tokens, block_sums=True, **how))


def of_floor(source: Described) -> Iterator[Check]:
    """Shares of different sizes, and none; the one sum that is written."""
    words = np.random.default_rng(8).integers(0, 1 << 32, (2600, 4), np.uint32)
    for count, out_count, grid in ((2600, 3000, 3), (5, 2, 3), (1, 700, 1)):
        yield launches_gemm.floor(source, words[:count], out_count, grid)
    yield launches_gemm.floor_read(source, words, 2, 7)
    magic = np.array([[0, 0, 0x9E3779B9, 0]], np.uint32)
    yield launches_gemm.floor_read(source, magic, 1, 0x9E3779B9)


def of_dequantize_absmax(source: Described) -> Iterator[Check]:
    """Both kernels; a ragged end, nothing aligned."""
    for n, shifts in ((4096 + 259, (0, 0)), (1030, (1, 4)), (1, (3, 0))):
        for slow in (False, True):
            yield launches.expand(source, np.abs(values.normal(n, "f32")), shifts, slow)


def of_embedding_4bit(source: Described) -> Iterator[Check]:
    """Every kernel; rows that share bytes and blocks, and indices that are no rows."""
    for dtype in STORED:
        item = STORED[dtype].itemsize
        for nested in (False, True):
            for columns, blocksize, shifts in ((24, 64, (0, 0)), (37, 32, (1, item)), (4104, 4096, (0, 0))):
                table = values.table(7, columns, "nf4", blocksize, nested)
                for slow in (False, True):
                    kind = np.int32 if slow else np.int64
                    indices = np.array([6, 0, -1, 3, 7, 6, np.iinfo(kind).min], kind)
                    yield launches.embedding(source, table, indices, dtype, shifts, slow)


def of_dequantize_blockwise8(source: Described) -> Iterator[Check]:
    """Every kernel; blocks that begin anywhere."""
    map_ = values.maps()["dynamic"]
    for dtype in STORED:
        item = STORED[dtype].itemsize
        for n, blocksize, shifts in (
            (16384 + 77, 64, (0, 0)),
            (1500, 7, (0, 0)),
            (333, 4096, (3, item)),
            (5, 1, (0, 0)),
        ):
            codes, absmax = values.codes(2 * n), np.abs(values.normal(-(-n // blocksize), "f32"))
            for slow in (False, True):
                yield launches.dequantize_8bit(source, codes, absmax, map_, dtype, blocksize, shifts, slow)


def of_quantize_blockwise8(source: Described) -> Iterator[Check]:
    """Every kernel: several tiles or blocks for one block of threads, blocks of a lane's values to all of them."""
    maps = values.maps()
    for dtype in STORED:
        item = STORED[dtype].itemsize
        for n, blocksize, shifts in (
            (3 * 4096 + 77, 64, (0, 0)),
            (4 * 4096 + 5, 4096, (item, 3)),
            (2000, 100, (0, 1)),
            (5000, 1500, (0, 0)),
            (3, 1, (0, 0)),
        ):
            data = values.awkward(n, dtype)
            yield launches.quantize_8bit(source, data, dtype, maps["dynamic"], blocksize, shifts)
        yield launches.quantize_8bit(source, values.normal(999, dtype), dtype, maps["crowded"], 128)
        yield launches.quantize_8bit(source, values.normal(99, dtype), dtype, maps["dynamic"], 10, slow=True)


def of_int8_rowwise(source: Described) -> Iterator[Check]:
    """Every kernel: rows for a warp, for a block of threads, and longer ones than it has registers for."""
    for dtype in STORED:
        item = STORED[dtype].itemsize
        for rows, columns, shifts in ((19, 72, (0, 0)), (3, 1032, (0, 0)), (3, 8200 + 61, (item, 1)), (5, 1, (0, 0))):
            data = values.awkward(rows * columns, dtype).reshape(rows, columns)
            yield launches.quantize_rows(source, data, dtype, shifts)
            codes = values.codes(2 * rows * columns).view(np.int8).reshape(rows, columns)
            scales = np.abs(values.normal(rows, "f32"))
            yield launches.dequantize_rows(source, codes, scales, dtype, shifts[::-1])
        small = values.normal(6 * 50, dtype).reshape(6, 50)
        yield launches.quantize_rows(source, small, dtype, slow=True)
        codes = values.codes(600).view(np.int8).reshape(6, 50)
        yield launches.dequantize_rows(source, codes, np.ones(6, np.float32), dtype, slow=True)


def of_int8_activations(source: Described) -> Iterator[Check]:
    """Every kernel: rows for a warp and for a block of threads, several panels, more groups of rows than one."""
    for dtype in STORED:
        for rows, columns, shift in ((19, 72, 0), (3, 1032, 0), (3, 8200 + 61, STORED[dtype].itemsize), (5, 1, 0)):
            data = values.awkward(rows * columns, dtype).reshape(rows, columns)
            yield int8.activations(source, data, dtype, 0, 2, shift)
            for exact in (False, True):
                yield int8.activations(source, data, dtype, 2.5, 2, shift, exact)
            yield int8.taken_out(source, data, dtype, 2.5, 2, shift)


def of_int8_product(source: Described) -> Iterator[Check]:
    """Every kernel: one round and several, one stage and several, columns put aside and some more."""
    for m, dtype in ((3, "bf16"), (11, "f16"), (21, "f32"), (50, "bf16"), (33, "i32")):
        for n, k, plan in (
            (37, 320, int8.Plan(21, 2, 2, 32)),
            (37, 2320, int8.Plan(37, 4, 1, 32, ahead=5)),
            (21, 1296, int8.Plan(21, 1, 3, 32)),
        ):
            outliers = 0.0 if dtype == "i32" else 0.05
            product = int8.Product.random(m, n, k, dtype, outliers, None if dtype == "i32" else dtype)
            yield int8.product(source, product, plan)


def of_gemm_4bit_dgrad_sm90a(source: Described) -> Iterator[Check]:
    """All forms; tails of each size, parts of N, scales of each kind."""
    for dtype, tokens in itertools.product(("bf16", "f16"), (64, 128, 256)):
        nested = tokens == 128
        for m, n, k, blocksize in ((tokens + 1, 136, 160, 64), (2, 520, 256, 64), (3, 8, 32, 32)):
            product = Product.random(m, n, k, dtype, "nf4", blocksize, nested).with_gradient()
            yield launches_gemm.dgrad_sm90a(source, product, tokens, parts=2 if n > 512 else 1)


def of_int8_tile_sm90a(source: Described) -> Iterator[Check]:
    plans = [
        (int8_tiles.Tile(64, parts=3), "bf16", 17),
        (int8_tiles.Tile(128, sharing=2, workers=1), "f16", 3),
        (int8_tiles.Tile(256), "f32", 1),
        (int8_tiles.Tile(64, sharing=2), "i32", 0),
    ]
    for plan, dtype, outliers in plans:
        codes = int8_tiles.Codes.random(plan.tokens // 2 + 70, 260, 656, dtype, outliers, None if outliers else "bf16")
        yield int8_tiles.tile(source, codes, plan)


def of_int8_plain(source: Described) -> Iterator[Check]:
    """Rows and columns that are not there, nothing aligned."""
    for dtype, outliers in (("bf16", 0.1), ("f32", 0.0), ("i32", 0.0)):
        product = int8.Product.random(33, 35, 67, dtype, outliers, None if dtype == "i32" else "f16")
        yield int8.plain(source, product, shift=1, pitch=69)


def of_experts_tile_sm90a(source: Described) -> Iterator[Check]:
    """Every kernel: experts with nothing, more than a tile, rows and columns that are not there, with a gate."""
    for dtype in ("bf16", "f16"):
        for tokens, gated in ((16, False), (32, True), (64, False), (128, True)):
            job = experts_tiles.Tokens.random((0, tokens + 3, 1), 136, 320, dtype, gated=gated, nested=gated, bias=True)
            plan = experts_tiles.Tile(tokens, 2, "silu" if gated else "none", ordered=True)
            yield experts_tiles.tile(source, job, plan)


def of_experts_gather(source: Described) -> Iterator[Check]:
    """Slots without an expert; rows that are no multiple of what a warp copies at a time."""
    for tokens, top_k, columns, missing in ((9, 3, 64, 5), (5, 1, 2176, 0)):
        yield experts_tiles.gather(source, tokens, top_k, columns, missing)


def of_experts_gather_few(source: Described) -> Iterator[Check]:
    """As many slots as there may be, some without an expert."""
    for counts, none in (((100, 0, 150), (-1, 3, 9, 7, 3, 3)), ((5,), ())):
        yield experts_tiles.gather_few(source, experts.Choices.of_counts(counts, none=none), 2176)


def of_experts_route(source: Described) -> Iterator[Check]:
    """Warps with nothing, some, and several rounds of slots; slots of no expert."""
    for counts, none in (([1], []), ([0, 9, 40], [3, -1]), ([30] * 70, [70] * 30)):
        yield experts.route(source, experts.Choices.of_counts(counts, none=none), 8)


def of_experts_few(source: Described) -> Iterator[Check]:
    """Every kernel: sorted slots and others, both kinds of x, two k-tiles, several passes, segments in batches."""
    choices = experts.Choices.of_counts([0, 1, 9, *[1] * 16], none=[-1, 40])
    for dtype in ("bf16", "f16"):
        for nested in (False, True):
            for k, plan in ((192, experts.Plan(2, 2, 4, 4)), (1088, experts.Plan(1, 1, 8, 2, routes=False))):
                product = experts.Product.random(
                    choices,
                    64,
                    k,
                    dtype,
                    projections=1 + nested,
                    gathers=k == 192 or nested,
                    nested=nested,
                    bias=nested,
                )
                yield experts.few(source, product, plan, "silu" if nested else "none")


def of_experts_sum(source: Described) -> Iterator[Check]:
    """Both kernels, a block of threads that is not full."""
    for dtype in ("bf16", "f16"):
        choices = experts.Choices.of_counts([5, 4, 6], 3, none=[-1, 3, 9])
        yield experts.total(source, choices, 192, dtype, wide=dtype == "f16")


def of_experts_dequantize(source: Described) -> Iterator[Check]:
    """Every kernel: experts without slots, a tile that is not full."""
    for dtype in ("bf16", "f16"):
        for nested in (False, True):
            yield experts.dequantize(source, [0, 2, 0, 1], 192 * 64, dtype, "nf4", 64, nested)


def of_lora_down(source: Described) -> Iterator[Check]:
    """Every kernel: rows, columns and ranks that are not full."""
    for dtype in ("bf16", "f16"):
        for first, second in itertools.product((dtype, "f32"), repeat=2):
            for rank, row_tiles in ((6, 1), (16, 2), (24, 2), (50, 2)):
                yield launches_lora.down(source, Shape(35, 552, rank, dtype, first, second), row_tiles)


def of_lora_up(source: Described) -> Iterator[Check]:
    """The same, the factor either way round."""
    for dtype in ("bf16", "f16"):
        for first, second in ((dtype, dtype), (dtype, "f32"), ("f32", "f32")):
            for rank, transposed in ((6, True), (24, False), (50, True)):
                shape = Shape(35, 296, rank, dtype, first, second)
                yield launches_lora.up(source, shape, transposed, 32, ("f32", dtype)[rank == 24], zeros=rank == 24)


FAMILIES = {
    "lora_down": of_lora_down,
    "lora_up": of_lora_up,
    "experts_dequantize": of_experts_dequantize,
    "experts_tile_sm90a": of_experts_tile_sm90a,
    "experts_gather": of_experts_gather,
    "experts_gather_few": of_experts_gather_few,
    "experts_route": of_experts_route,
    "experts_few": of_experts_few,
    "experts_sum": of_experts_sum,
    "int8_activations": of_int8_activations,
    "int8_product": of_int8_product,
    "int8_plain": of_int8_plain,
    "int8_tile_sm90a": of_int8_tile_sm90a,
    "dequantize_absmax": of_dequantize_absmax,
    "embedding_4bit": of_embedding_4bit,
    "dequantize_blockwise8": of_dequantize_blockwise8,
    "quantize_blockwise8": of_quantize_blockwise8,
    "int8_rowwise": of_int8_rowwise,
    "quantize_blockwise4": of_quantize_blockwise4,
    "dequantize_blockwise4": of_dequantize_blockwise4,
    "quantize_absmax": of_quantize_absmax,
    "gemm_4bit_simt": of_gemm_4bit_simt,
    "gemv_4bit": of_gemv_4bit,
    "gemm_4bit_small_m_sm75": of_gemm_4bit_small_m_sm75,
    "gemm_4bit_tile_sm75": of_gemm_4bit_tile_sm75,
    "gemm_4bit_small_m_sm80": of_gemm_4bit_small_m_sm80,
    "gemm_4bit_small_m_sm90": of_gemm_4bit_small_m_sm90,
    "gemm_4bit_small_m_sm90_long": of_gemm_4bit_small_m_sm90_long,
    "gemm_4bit_small_m_sm90_one": of_gemm_4bit_small_m_sm90_one,
    "gemm_4bit_tile_sm80": of_gemm_4bit_tile_sm80,
    "floor": of_floor,
    "gemm_4bit_tile_sm90a": of_gemm_4bit_tile_sm90a,
    "gemm_4bit_block_sums_sm90a": of_gemm_4bit_block_sums_sm90a,
    "gemm_4bit_dgrad_sm90a": of_gemm_4bit_dgrad_sm90a,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("mode", "highest_first"), [("asan", False), ("asan", True), ("tsan", False)])
def test_no_sanitizer_complains(name: str, mode: str, highest_first: bool) -> None:
    source = program(name, mode)
    checks = list(FAMILIES[name](source))
    for check, results in zip(checks, source.run_all([c.case for c in checks], highest_first), strict=True):
        check.against(results)


@pytest.mark.slow
def test_every_kernel_is_run() -> None:
    for name, cases in FAMILIES.items():
        source = program(name, "asan")
        run = {launch.kernel for check in cases(source) for launch in check.case.launches}
        assert run == set(source.threads), name


@pytest.mark.slow
def test_every_source_is_here() -> None:
    found = {path for path in build_emulator.KERNELS.rglob("*.cu") if not path.is_relative_to(build_emulator.HERE)}
    assert found == set(build_emulator.kernel_sources())
    assert {path.stem for path in found} == set(FAMILIES)


@pytest.mark.slow
def test_what_is_compared_is_not_empty() -> None:
    """The comparison itself: one wrong bit is a difference, NaN for NaN is none."""
    ones = np.ones(4, np.float32)
    other = ones.copy()
    other[2] = np.nextafter(np.float32(1), np.float32(2))
    assert launches.bits(ones)(other)
    nans = np.array([0x7FC00000, 0x7FFFFFFF], np.uint32).view(np.float32)
    assert not launches.bits(nans)(nans[::-1].copy())
    assert not native.same_bits(ones, np.full(4, np.nan, np.float32))
