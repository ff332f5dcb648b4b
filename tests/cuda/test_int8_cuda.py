"""LLM.int8() on the GPU: exact sums, the processor's bits where nothing is an outlier, a bound where something is."""

from __future__ import annotations

import itertools

import pytest

torch = pytest.importorskip("torch")

from halfbyte import _native  # noqa: E402
from halfbyte.backends import cpu as _cpu  # noqa: E402
from halfbyte.backends import cuda as _cuda  # noqa: E402
from halfbyte.ops import registry as _registry  # noqa: E402, F401  (defines `torch.ops.halfbyte`)

import kernels as k  # noqa: E402

ops = torch.ops.halfbyte

# Rows of x, of W, and columns: of one piece, of parts that differ in length, of what the fast kernels do not take; rows
# for every kernel, and several passes; more rows of W than one wave of blocks has room for.
SHAPES = [
    (1, 1, 1),
    (1, 4096, 4096),
    (3, 70, 65),
    (8, 300, 272),
    (9, 129, 1040),
    (17, 1000, 4096),
    (33, 4096, 14_352),
    (64, 512, 2064),
    (65, 300, 4096),
    (200, 257, 528),
    (5, 128_256, 256),
    (130, 96, 100),
]


def weight(n: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales on the processor."""
    generator = torch.Generator().manual_seed(seed + n)
    codes = torch.randint(-127, 128, (n, columns), dtype=torch.int8, generator=generator)
    return codes, torch.rand(n, generator=generator) + 0.1


def activations(m: int, columns: int, dtype: torch.dtype, part: float = 0.0) -> torch.Tensor:
    """Normal values, of which a part of the columns has some beyond 6."""
    generator = torch.Generator().manual_seed(m + columns)
    x = torch.randn(m, columns, generator=generator).clamp_(-5, 5)
    if part:
        chosen = torch.randperm(columns, generator=generator)[: max(1, round(columns * part))]
        x[m // 2, chosen] = 20.0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", k.DTYPES)
@pytest.mark.parametrize(("m", "n", "columns"), SHAPES)
def test_linear_8bit_without_outliers_has_the_bits_of_the_processor(
    m: int, n: int, columns: int, dtype: torch.dtype
) -> None:
    codes, scales = weight(n, columns)
    x = activations(m, columns, dtype)
    for bias, threshold in ((None, 0.0), (torch.randn(n), 0.0), (torch.randn(n).to(dtype), 100.0)):
        expected = _cpu.linear_8bit(x, codes, scales, bias, threshold)
        shift = None if bias is None else bias.cuda()
        found = ops.linear_8bit(x.cuda(), codes.cuda(), scales.cuda(), shift, threshold)
        assert k.same_bits(found, expected), (bias is None, threshold)


@pytest.mark.parametrize("part", [0.01, 0.2, 1.0])
@pytest.mark.parametrize("dtype", k.DTYPES)
@pytest.mark.parametrize(("m", "n", "columns"), SHAPES)
def test_linear_8bit_with_outliers(m: int, n: int, columns: int, dtype: torch.dtype, part: float) -> None:
    """Within what float32 sums of the outlier columns differ by; the same from run to run."""
    codes, scales = weight(n, columns)
    x, bias = activations(m, columns, dtype, part), torch.randn(n)
    a, row_scales, outliers = _cpu.quantize_rows_outliers(_rounded(x), 6.0)
    assert 0 < outliers.sum() <= columns
    dense = codes[:, outliers].double().T
    some = x[:, outliers].double()
    exact = (a.double() @ codes.double().T) * (row_scales.double()[:, None] / 127) + some @ dense
    size = exact.abs() + some.abs() @ dense.abs()
    unit = float(outliers.sum() + 8) * 2.0**-24
    bound = size * (scales.double() / 127) * unit
    exact = exact * (scales.double() / 127) + bias.double()
    bound = bound + exact.abs() * (torch.finfo(dtype).eps + 2.0**-22) + 1e-30
    arguments = x.cuda(), codes.cuda(), scales.cuda(), bias.cuda(), 6.0
    found = ops.linear_8bit(*arguments)
    error = (found.cpu().double() - exact).abs()
    assert bool((error <= bound).all()), (error / bound).max()
    assert k.same_bits(ops.linear_8bit(*arguments), found.cpu())


def _rounded(x: torch.Tensor) -> torch.Tensor:
    if x.dtype is not torch.float32:
        return x
    bits = x.view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("dtype", k.DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (70, 3), (9, 255), (3, 1032), (300, 4096), (2, 20_001)])
def test_quantize_rows_outliers(rows: int, columns: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    plain = torch.randn(rows, columns, generator=generator)
    strange = plain.clone()
    strange.view(-1)[:: max(1, plain.numel() // 5)] = torch.inf
    strange.view(-1)[1 :: max(2, plain.numel() // 7)] = torch.nan
    for values, threshold in itertools.product((plain, strange), (2.5, 1e30, 1e-30)):
        x = values.to(dtype)
        expected = _cpu.quantize_rows_outliers(x, threshold)
        for wanted, found in zip(expected, ops.quantize_rows_outliers(x.cuda(), threshold), strict=True):
            assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("kernel", ["few", "tile", "plain"])
def test_every_kernel_makes_exact_sums(kernel: str) -> None:
    """The largest sums too; a kernel that takes no such product on this GPU says so."""
    for m, n, columns in ((1, 40, 16), (7, 300, 4096), (64, 257, 1040), (129, 300, 2048), (3, 20, 133_136)):
        a, b = weight(m, columns)[0], weight(n, columns, 5)[0]
        a[0], b[0] = 127, 127
        y = k.poisoned(m * n, torch.int32).view(m, n)
        on_gpu = a.cuda(), b.cuda()
        parts = map(k.raw, on_gpu)
        try:
            name = _native.cuda_int8_matmul(*k.here(), *parts, None, None, None, k.raw(y), m, n, columns, kernel)
        except ValueError as error:
            assert kernel != "plain" and "does not take these arguments" in str(error)  # noqa: PT017, PT018
            pytest.skip(f"no kernel {kernel!r} for this on {torch.cuda.get_device_name()}")
        assert name.startswith("int8_")
        assert torch.equal(y.cpu().double(), a.double() @ b.double().T), (m, n, columns)


def test_codes_at_any_address() -> None:
    """Strides and alignments that no kernel takes as they are."""
    codes, scales = weight(200, 512)
    memory = torch.empty(200 * 512 + 3, dtype=torch.int8, device="cuda")
    moved = memory[3:].view(200, 512).copy_(codes)
    x = activations(6, 512, torch.bfloat16)
    expected = _cpu.linear_8bit(x, codes, scales, None, 0.0)
    wide = torch.zeros(6, 1024, dtype=torch.bfloat16, device="cuda")
    wide[:, ::2] = x.cuda()
    for one, other in ((x.cuda(), moved), (wide[:, ::2], codes.cuda()), (x.cuda(), codes.cuda().t().contiguous().t())):
        assert k.same_bits(ops.linear_8bit(one, other, scales.cuda(), None, 0.0), expected)
    found = ops.int8_matmul(moved[:5], codes.cuda())
    assert torch.equal(found.cpu().double(), codes[:5].double() @ codes.double().T)


def test_what_has_no_elements() -> None:
    for m, n, columns in ((0, 5, 16), (3, 0, 16), (3, 5, 0)):
        x, codes = torch.zeros(m, columns, device="cuda"), torch.zeros(n, columns, dtype=torch.int8, device="cuda")
        bias = torch.arange(n, dtype=torch.float32, device="cuda")
        for threshold in (0.0, 6.0):
            found = ops.linear_8bit(x, codes, torch.ones(n, device="cuda"), bias, threshold)
            assert torch.equal(found, bias.expand(m, n))
        assert torch.equal(ops.int8_matmul(codes.new_zeros(m, columns), codes), found.new_zeros(m, n).int())


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_linear_8bit_in_a_graph(threshold: float, request: pytest.FixtureRequest) -> None:
    """Nothing waits; the outliers are those of the replayed values."""
    codes, scales = (t.cuda() for t in weight(512, 1024))
    x = activations(4, 1024, torch.float16, 0.05).cuda()
    other = activations(5, 1024, torch.float16, 0.3)[:4].cuda()
    request.getfixturevalue("no_waiting")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = [ops.linear_8bit(values, codes, scales, None, threshold) for values in (x, other, x)]
    torch.cuda.current_stream().wait_stream(stream)
    graph, place = torch.cuda.CUDAGraph(), torch.empty_like(x)
    with torch.cuda.graph(graph):
        found = ops.linear_8bit(place, codes, scales, None, threshold)
    replayed = []
    for values in (x, other, x):
        place.copy_(values)
        graph.replay()
        replayed.append(found.clone())
    torch.cuda.set_sync_debug_mode("default")
    for got, wanted in zip(replayed, expected, strict=True):
        assert k.same_bits(got, wanted.cpu())


@pytest.mark.parametrize("dtype", k.DTYPES)
def test_linear_8bit_backward(dtype: torch.dtype) -> None:
    codes, scales = weight(96, 300)
    grad = torch.randn(7, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    dense = _cpu.dequantize_rows(codes, scales, dtype).double()
    exact, size = grad.double() @ dense, grad.double().abs() @ dense.abs()
    found = _cuda.linear_8bit_backward(grad.cuda(), codes.cuda(), scales.cuda()).cpu().double()
    bound = size * (torch.finfo(dtype).eps + 104 * 2.0**-23)
    assert bool(((found - exact).abs() <= bound).all())
