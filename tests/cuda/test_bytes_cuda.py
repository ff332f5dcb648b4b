"""8-bit codes, rows, embeddings and expanded scales on the GPU: bits equal to the processor's, for every input."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from halfbyte import _native  # noqa: E402
from halfbyte.backends import cpu as _cpu  # noqa: E402
from safetensors import safe_open  # noqa: E402
from test_blockwise_cuda import SIZES, all_patterns, extremes, scales_of  # noqa: E402

import kernels as k  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden" / "int8.safetensors"
# Of one value, of a thread's share, of about a warp's or a block's, of everything, of more than 32 bits count.
ODD_SIZES = (1, 2, 7, 8, 24, 33, 100, 1000, 1032, 1025, 4095, 8192, 10_000, 2**31, 2**40 + 1)


def maps() -> dict[str, torch.Tensor]:
    """Maps of 256 ascending values, among them some that crowd a few cells of the search."""
    generator = torch.Generator().manual_seed(11)
    dynamic = torch.tensor(_native.dynamic_map())
    some = torch.rand(56, generator=generator) * 2 - 1
    sizes = torch.exp2(torch.rand(256, generator=generator) * 270 - 145)
    signs = torch.randint(2, (256,), generator=generator) * 2 - 1
    return {
        "dynamic": dynamic,
        "linear": torch.linspace(-1, 1, 256),
        "unsigned": torch.linspace(0, 1, 256),
        "padded": torch.cat([torch.linspace(-1, 1, 16), torch.zeros(240)]).sort().values,
        "crowded": torch.cat([torch.linspace(0.5, 0.5001, 200), some]).sort().values,
        "sizes": (sizes * signs).sort().values,
    }


def quantize_8bit(
    values: torch.Tensor, code: torch.Tensor, blocksize: int, offset: int = 0, reference: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """On the GPU, the codes `offset` bytes behind an aligned address."""
    codes = k.poisoned(values.numel(), torch.uint8, offset)
    absmax = k.poisoned(-(-values.numel() // blocksize), torch.float32)
    _native.cuda_quantize_8bit(*k.here(), *map(k.raw, (values, code.cuda(), codes, absmax)), blocksize, reference)
    return codes, absmax


def dequantize_8bit(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    dtype: torch.dtype,
    blocksize: int,
    offset: int = 0,
    reference: bool = False,
) -> torch.Tensor:
    """On the GPU, to memory `offset` elements behind an aligned address."""
    out = k.poisoned(codes.numel(), dtype, offset)
    _native.cuda_dequantize_8bit(*k.here(), *map(k.raw, (codes, absmax, code.cuda(), out)), blocksize, reference)
    return out


def check_quantize_8bit(
    values: torch.Tensor, code: torch.Tensor, blocksize: int, offset: int = 0, reference: bool = False
) -> None:
    # The processor fills up the last block with zeros: a huge one has the same result as one that is too long already.
    limited = min(blocksize, 2 * values.numel() + 1) if blocksize > 10_000 else blocksize
    expected_codes, expected_absmax = _cpu.quantize_blockwise(values, code, limited)
    codes, absmax = quantize_8bit(values.cuda(), code, blocksize, offset, reference)
    assert k.same_bits(absmax, expected_absmax), "absmax"
    assert k.same_bits(codes, expected_codes), "codes"


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("dtype", k.DTYPES)
@pytest.mark.parametrize("name", maps())
def test_quantize_8bit(name: str, dtype: torch.dtype, reference: bool) -> None:
    for blocksize in (*k.BLOCK_SIZES, *ODD_SIZES):
        for n in (*SIZES, 12_289):
            if not (reference and n > 20_000):
                check_quantize_8bit(extremes(n, dtype), maps()[name], blocksize, reference=reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", maps())
def test_quantize_8bit_every_pattern(name: str, dtype: torch.dtype) -> None:
    patterns = all_patterns(dtype)
    shuffled = patterns[torch.randperm(2**16, generator=torch.Generator().manual_seed(1))]
    for blocksize in (64, 256, 4096, 48, 2000):
        check_quantize_8bit(patterns, maps()[name], blocksize)
        check_quantize_8bit(shuffled, maps()[name], blocksize)
        for largest in (1.0, 0.75, 2.0**-14, 65504.0):
            blocks = torch.nn.functional.pad(patterns, (0, -patterns.numel() % blocksize)).view(-1, blocksize)
            blocks = torch.where(blocks.float().abs() <= largest, blocks, torch.zeros((), dtype=dtype))
            blocks[:, 0] = largest
            check_quantize_8bit(blocks.reshape(-1), maps()[name], blocksize)


@pytest.mark.parametrize("name", maps())
def test_quantize_8bit_around_every_boundary(name: str) -> None:
    """float32 values within four steps of each value of the map, each middle, and each edge of a cell near one."""
    code = maps()[name]
    powers = torch.exp2(torch.arange(-24, 1.0))
    points = torch.cat([code, (code[1:] + code[:-1]) * 0.5, powers, torch.arange(64, 129) / 128])
    points = torch.cat([points, -points])
    steps = torch.arange(-4, 5, dtype=torch.int32)
    near = (points.view(torch.int32)[:, None] + steps).view(torch.float32).reshape(-1)
    near = near[near.abs() <= 1]
    for largest in (1.0, 0.1, 3.0, 1e-30, 2.0**-126, 2.0**-129, 1e-44, 3e38):
        blocks = torch.nn.functional.pad(near, (0, -near.numel() % 63)).reshape(-1, 63) * largest
        values = torch.cat([torch.full((len(blocks), 1), largest), blocks], 1).reshape(-1)
        check_quantize_8bit(values, code, 64)
        check_quantize_8bit(values, code, 192)


@pytest.mark.parametrize("dtype", k.DTYPES)
def test_quantize_8bit_unaligned(dtype: torch.dtype) -> None:
    values, code = extremes(50_000, dtype), maps()["dynamic"]
    on_gpu = values.cuda()
    for start, offset in itertools.product(range(1, 9), range(8)):
        for blocksize in (256, 100):
            expected = _cpu.quantize_blockwise(values[start:].clone(), code, blocksize)
            found = quantize_8bit(on_gpu[start:], code, blocksize, offset)
            assert all(map(k.same_bits, found, expected)), (start, offset, blocksize)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("dtype", k.DTYPES)
def test_dequantize_8bit(dtype: torch.dtype, reference: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    for (name, code), blocksize in itertools.product(maps().items(), (*k.BLOCK_SIZES, *ODD_SIZES)):
        for n in (1, 7, 8, 9, 8191, 16_385, 100_003):
            codes = torch.randint(256, (n,), dtype=torch.uint8, generator=generator)
            absmax = torch.rand(-(-n // blocksize), generator=generator) * 4
            special = torch.tensor([0.0, 1e-42, 1e38, float("inf"), float("nan")])
            absmax[torch.randint(absmax.numel(), (5,), generator=generator)] = special
            # torch's own gather, product and rounding: `_cpu` repeats scales, which takes memory for huge blocks.
            scales = absmax[torch.arange(n) // blocksize]
            expected = (code[codes.long()] * scales).to(dtype)
            for offset in (0, 1, 4):
                found = dequantize_8bit(codes.cuda(), absmax.cuda(), code, dtype, blocksize, offset, reference)
                assert k.same_bits(found, expected), (name, blocksize, n, offset)


def test_eight_bits_there_and_back_as_on_the_processor() -> None:
    values, code = torch.randn(70_000), maps()["dynamic"]
    for blocksize, dtype in itertools.product((64, 4096, 96), k.DTYPES):
        codes, absmax = quantize_8bit(values.to(dtype).cuda(), code, blocksize)
        expected = _cpu.dequantize_blockwise(codes.cpu(), absmax.cpu(), code, blocksize, dtype)
        assert k.same_bits(dequantize_8bit(codes, absmax, code, dtype, blocksize), expected)


@pytest.mark.parametrize("blocksize", [4096, 100])
def test_eight_bits_of_more_than_two_to_the_31_values(blocksize: int) -> None:
    n = 2**31 + 12_345
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of GPU memory")
    code = maps()["dynamic"]
    values = torch.empty(n, dtype=torch.bfloat16, device="cuda").normal_()
    codes, absmax = quantize_8bit(values, code, blocksize)
    last = (n // blocksize - 1000) * blocksize
    for start, end in ((0, 1000 * blocksize), (last, n)):
        expected = _cpu.quantize_blockwise(values[start:end].cpu(), code, blocksize)
        assert k.same_bits(codes[start:end], expected[0])
        assert k.same_bits(absmax[start // blocksize : -(-end // blocksize)], expected[1])
    del values
    out = dequantize_8bit(codes, absmax, code, torch.bfloat16, blocksize)
    for start, end in ((0, 1000 * blocksize), (last, n)):
        part = codes[start:end].cpu(), absmax[start // blocksize : -(-end // blocksize)].cpu()
        assert k.same_bits(out[start:end], _cpu.dequantize_blockwise(*part, code, blocksize, torch.bfloat16))


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("n", [1, 3, 255, 256, 257, 4095, 4097, 100_003, 5_000_001])
def test_expand(n: int, reference: bool) -> None:
    generator = torch.Generator().manual_seed(n)
    absmax = torch.rand(n, generator=generator) * 0.2
    codes, absmax2, offset = _cpu.compress_absmax(absmax)
    expected = _cpu.expand_absmax(codes, absmax2, offset)
    for start, shift in ((0, 0), (1, 0), (0, 1), (4, 3)):
        moved = k.poisoned(n, torch.uint8, start)
        moved.copy_(codes)
        out = k.poisoned(n, torch.float32, shift)
        parts = (moved, absmax2.cuda(), offset.reshape(1).cuda(), out)
        _native.cuda_expand_absmax(*k.here(), *map(k.raw, parts), reference)
        assert k.same_bits(out, expected), (start, shift)


def embedding(
    indices: torch.Tensor,
    table: k.Quantized,
    shape: tuple[int, int],
    dtype: torch.dtype,
    quant_type: str,
    blocksize: int,
    offset: int = 0,
    reference: bool = False,
) -> torch.Tensor:
    """On the GPU, to memory `offset` elements behind an aligned address."""
    out = k.poisoned(indices.numel() * shape[1], dtype, offset)
    scales = [None if t is None else k.raw(t) for t in table.parts[1:]]
    _native.cuda_embedding_4bit(
        *k.here(), k.raw(indices), k.raw(table.packed), *scales, k.raw(out), *shape, quant_type, blocksize, reference
    )
    return out.view(indices.numel(), shape[1])


def table_of(rows: int, columns: int, blocksize: int, nested: bool) -> k.Quantized:
    """Random codes and scales of a table."""
    everything = scales_of(max(rows * columns, 1), nested)
    blocks = -(-rows * columns // blocksize)
    absmax2 = None if everything.absmax2 is None else everything.absmax2[: -(-blocks // 256)].clone()
    packed = everything.packed[: -(-rows * columns // 2)].clone()
    return k.Quantized(packed, everything.absmax[:blocks].clone(), absmax2, everything.offset)


def on_gpu(table: k.Quantized) -> k.Quantized:
    return k.Quantized(*(None if t is None else t.cuda() for t in table.parts))


TABLES = [
    (1, 1),
    (90, 1),
    (501, 3),
    (77, 37),
    (40, 8),
    (1000, 24),
    (300, 64),
    (33, 1000),
    (100, 4096),
    (5, 8200),
    (7, 12_345),
]


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", k.DTYPES)
@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_embedding(kind: torch.dtype, dtype: torch.dtype, nested: bool, reference: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    for (rows, columns), blocksize in itertools.product(TABLES, k.BLOCK_SIZES):
        quant_type = k.QUANT_TYPES[(rows + blocksize) % 2]
        table = table_of(rows, columns, blocksize, nested)
        values = k.cpu_dequantize(table, rows * columns, dtype, quant_type, blocksize).view(rows, columns)
        for count in (1, 5, 700):
            indices = torch.randint(rows, (count,), generator=generator)
            for offset in (0, 1):
                found = embedding(
                    indices.to(kind).cuda(),
                    on_gpu(table),
                    (rows, columns),
                    dtype,
                    quant_type,
                    blocksize,
                    offset,
                    reference,
                )
                assert k.same_bits(found, values[indices]), (rows, columns, blocksize, count, offset)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_embedding_of_indices_that_are_no_rows(kind: torch.dtype, reference: bool) -> None:
    """NaN for them, their neighbours as ever, and no error that stays."""
    limits = torch.iinfo(kind)
    for columns, nested, dtype in itertools.product((7, 64, 4096), (False, True), k.DTYPES):
        table = table_of(10, columns, 64, nested)
        values = k.cpu_dequantize(table, 10 * columns, dtype, "nf4", 64).view(10, columns)
        indices = torch.tensor([0, -1, 9, 10, limits.max, 3, limits.min, 3, 1 << 30], dtype=kind)
        there = (indices >= 0) & (indices < 10)
        expected = values[torch.where(there, indices, 0).long()]
        expected[~there] = float("nan")
        found = embedding(indices.cuda(), on_gpu(table), (10, columns), dtype, "nf4", 64, reference=reference)
        assert k.same_bits(found, expected)
        torch.cuda.synchronize()
    none = embedding(
        torch.zeros(3, dtype=kind).cuda(), on_gpu(table_of(0, 8, 64, False)), (0, 8), torch.float32, "nf4", 64
    )
    assert none.isnan().all()
    assert none.shape == (3, 8)


def test_embedding_of_more_than_two_to_the_31_values() -> None:
    rows, columns = 600_000, 4096
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    blocks = rows * columns // 64
    table = k.Quantized(
        torch.randint(256, (rows * columns // 2,), dtype=torch.uint8, device="cuda"), torch.rand(blocks, device="cuda")
    )
    indices = torch.cat([torch.tensor([rows - 1, 0, rows - 2]), torch.randint(rows, (600_000,))]).cuda()
    out = embedding(indices, table, (rows, columns), torch.bfloat16, "nf4", 64)
    some = [0, 1, 2, *range(0, indices.numel(), 60_001), indices.numel() - 1]
    for i in some:
        row = int(indices[i])
        packed = table.packed[row * columns // 2 : (row + 1) * columns // 2].cpu()
        absmax = table.absmax[row * columns // 64 : (row + 1) * columns // 64].cpu()
        expected = k.cpu_dequantize(k.Quantized(packed, absmax), columns, torch.bfloat16, "nf4", 64)
        assert k.same_bits(out[i], expected), i


def quantize_rows(matrix: torch.Tensor, offset: int = 0, reference: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """On the GPU, the codes `offset` bytes behind an aligned address."""
    codes, scales = k.poisoned(matrix.numel(), torch.int8, offset), k.poisoned(len(matrix), torch.float32)
    _native.cuda_quantize_rows(*k.here(), *map(k.raw, (matrix, codes, scales)), *matrix.shape, reference)
    return codes.view(matrix.shape), scales


def cpu_quantize_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = torch.empty(matrix.shape, dtype=torch.int8), torch.empty(len(matrix))
    _native.quantize_rows(*map(k.raw, (matrix, codes, scales)), *matrix.shape)
    return codes, scales


def dequantize_rows(
    codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, offset: int = 0, reference: bool = False
) -> torch.Tensor:
    """On the GPU, to memory `offset` elements behind an aligned address."""
    out = k.poisoned(codes.numel(), dtype, offset)
    _native.cuda_dequantize_rows(*k.here(), *map(k.raw, (codes, scales, out)), *codes.shape, reference)
    return out.view(codes.shape)


def cpu_dequantize_rows(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(codes.shape, dtype=dtype)
    _native.dequantize_rows(*map(k.raw, (codes, scales, out)), *codes.shape)
    return out


ROWS = [(1, 1), (700, 3), (333, 8), (90, 255), (200, 256), (5, 1000), (1000, 1024), (30, 1025), (30, 1032), (300, 4096),
        (20, 8192), (30, 8200), (20, 20_001), (2, 300_000)]  # fmt: skip


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("dtype", k.DTYPES)
def test_rows(dtype: torch.dtype, reference: bool) -> None:
    for rows, columns in ROWS:
        if reference and rows * columns > 300_000:
            continue
        for matrix in (torch.randn(rows, columns).to(dtype), extremes(rows * columns, dtype).view(rows, columns)):
            expected = cpu_quantize_rows(matrix)
            for offset in (0, 3):
                found = quantize_rows(matrix.cuda(), offset, reference)
                assert all(map(k.same_bits, found, expected)), (rows, columns, offset)
            back = cpu_dequantize_rows(*expected, dtype)
            for offset in (0, 1):
                found = dequantize_rows(expected[0].cuda(), expected[1].cuda(), dtype, offset, reference)
                assert k.same_bits(found, back), (rows, columns, offset)


@pytest.mark.parametrize("dtype", k.DTYPES)
def test_rows_that_are_not_aligned(dtype: torch.dtype) -> None:
    values = extremes(40_000, dtype)
    for start, (rows, columns) in itertools.product(range(1, 9), ((30, 1000), (3, 9000))):
        part = values[start : start + rows * columns]
        found = quantize_rows(values.cuda()[start : start + rows * columns].view(rows, columns))
        assert all(map(k.same_bits, found, cpu_quantize_rows(part.clone().view(rows, columns)))), start


def test_rows_where_codes_change() -> None:
    """Products and quotients within some steps of a half, in rows of all sizes, the largest included."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for exponent in (*range(-149, 128, 5), 119, 120, 121, 126, 127):
        mantissa = 1 + float(torch.rand((), generator=generator)) if exponent > -126 else 1.0
        scale = torch.tensor(mantissa * 2.0**exponent)
        halves = (torch.randint(-127, 127, (2000,), generator=generator) + 0.5) / 127 * scale
        steps = torch.randint(-3, 4, (2000,), generator=generator, dtype=torch.int32)
        row = torch.where(halves == 0, halves, (halves.view(torch.int32) + steps).view(torch.float32))
        row = row.clamp(-scale, scale)
        row[0] = scale
        rows.append(row)
    matrix = torch.stack(rows)
    expected = cpu_quantize_rows(matrix)
    for reference in (False, True):
        assert all(map(k.same_bits, quantize_rows(matrix.cuda(), reference=reference), expected))


def test_rows_every_code_at_every_scale() -> None:
    exponents = torch.arange(256, dtype=torch.int32).repeat_interleave(4)
    mantissas = torch.randint(1 << 23, exponents.shape, dtype=torch.int32, generator=torch.Generator().manual_seed(4))
    scales = (exponents << 23 | mantissas).view(torch.float32)
    codes = torch.arange(-128, 128, dtype=torch.int8).repeat(scales.numel(), 1)
    for dtype, reference in itertools.product(k.DTYPES, (False, True)):
        found = dequantize_rows(codes.cuda(), scales.cuda(), dtype, reference=reference)
        assert k.same_bits(found, cpu_dequantize_rows(codes, scales, dtype))


def test_golden_rows() -> None:
    with safe_open(GOLDEN, "pt") as file:
        for name in ("r0", "r1", "r2"):
            matrix, codes, scales, back = (
                file.get_tensor(f"{name}.{part}") for part in ("input", "CB", "SCB", "dequantized")
            )
            assert all(map(k.same_bits, quantize_rows(matrix.cuda()), (codes, scales))), name
            assert k.same_bits(dequantize_rows(codes.cuda(), scales.cuda(), torch.float32), back), name


def test_in_a_graph() -> None:
    values, code = torch.randn(1 << 18, dtype=torch.float16), maps()["dynamic"]
    matrix, zeros = values.view(256, 1024), torch.zeros(1 << 18, dtype=torch.float16, device="cuda")
    on_device = code.cuda()
    _native.cuda_prepare(torch.cuda.current_device())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes, absmax = quantize_8bit(zeros, on_device, 256)
        back = dequantize_8bit(codes, absmax, on_device, torch.float16, 256)
        row_codes, scales = quantize_rows(zeros.view(256, 1024))
    zeros.copy_(values)
    graph.replay()
    expected = _cpu.quantize_blockwise(values, code, 256)
    assert k.same_bits(codes, expected[0])
    assert k.same_bits(absmax, expected[1])
    assert k.same_bits(back, _cpu.dequantize_blockwise(*expected, code, 256, torch.float16))
    assert all(map(k.same_bits, (row_codes, scales), cpu_quantize_rows(matrix)))


def test_bytes_of_nothing() -> None:
    code, empty = maps()["dynamic"], torch.empty(0, device="cuda")
    codes, absmax = quantize_8bit(empty, code, 100)
    assert codes.numel() == absmax.numel() == 0
    assert dequantize_8bit(codes, absmax, code, torch.float16, 100).numel() == 0
    found = quantize_rows(torch.empty(3, 0, device="cuda"))
    assert found[0].shape == (3, 0)
    assert found[1].tolist() == [0, 0, 0]
    assert quantize_rows(torch.empty(0, 3, device="cuda"))[1].numel() == 0
    indices = torch.empty(0, dtype=torch.int64, device="cuda")
    table = on_gpu(table_of(4, 8, 64, False))
    assert embedding(indices, table, (4, 8), torch.float32, "nf4", 64).shape == (0, 8)


def test_wrong_calls_for_bytes() -> None:
    floats, codes = k.poisoned(128, torch.float32), k.poisoned(128, torch.uint8)
    code, scales = torch.zeros(256, device="cuda"), k.poisoned(2, torch.float32)
    with pytest.raises(ValueError, match=r"blocksize must be 1 or more.*, got 0"):
        _native.cuda_quantize_8bit(*k.here(), *map(k.raw, (floats, code, codes, scales)), 0)
    with pytest.raises(ValueError, match=r"absmax must be 3 elements long.*, got 2"):
        _native.cuda_dequantize_8bit(*k.here(), *map(k.raw, (codes, scales, code, floats)), 60)
    with pytest.raises(ValueError, match=r"code must be 256 elements long.*, got 128"):
        _native.cuda_quantize_8bit(*k.here(), *map(k.raw, (floats, floats, codes, scales)), 64)
    with pytest.raises(ValueError, match=r"codes must be of dtype .*, got uint8"):
        _native.cuda_quantize_rows(*k.here(), *map(k.raw, (floats, codes, scales)), 2, 64)
    indices = torch.zeros(1, dtype=torch.int32, device="cuda")
    table = (*map(k.raw, (codes[:64], scales)), None, None, k.raw(floats), 2, 64, "nf4", 64)
    with pytest.raises(ValueError, match=r"out must be 64 elements long.*, got 128"):
        _native.cuda_embedding_4bit(*k.here(), k.raw(indices), *table)
    with pytest.raises(ValueError, match=r"indices must be of dtype .*, got float32"):
        _native.cuda_embedding_4bit(*k.here(), k.raw(floats), *table)
