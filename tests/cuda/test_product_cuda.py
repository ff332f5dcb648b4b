"""Products with 4-bit weights on the GPU, against float64."""

from __future__ import annotations

import functools

import pytest

torch = pytest.importorskip("torch")

from halfbyte import _native  # noqa: E402

import kernels as k  # noqa: E402

# What the names of kernels begin with.
SIMT, SMALL_M, BLOCK_SUMS, TILE = "gemm_4bit_simt", "gemm_4bit_small_m", "gemm_4bit_block_sums", "gemm_4bit_tile"
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
# On compute capability 7.5 the matrix units have float16 alone, and more than 16 rows go to other kernels.
TURING = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)
HALVES = [torch.float16] if TURING else [torch.bfloat16, torch.float16]
HALF, BY_REGISTERS, FEW = HALVES[0], "small_m_sm75" if TURING else "small_m_sm80", 16 if TURING else 32


@functools.lru_cache(maxsize=32)
def weight_of(n: int, columns: int, quant_type: str, blocksize: int, nested: bool) -> tuple[k.Quantized, torch.Tensor]:
    """A quantized weight on the GPU, and what it stands for in float64."""
    generator = torch.Generator().manual_seed(n * columns)
    values = torch.randn(n, columns, generator=generator) * torch.rand(n, 1, generator=generator)
    weight = k.cpu_quantize(values, quant_type, blocksize)
    if nested:
        weight = k.cpu_compress(weight)
    meant = k.cpu_dequantize(weight, n * columns, torch.float32, quant_type, blocksize)
    on_gpu = k.Quantized(*(None if t is None else t.cuda() for t in weight.parts))
    return on_gpu, meant.view(n, columns).double().cuda()


def check(
    m: int, n: int, columns: int, dtype: torch.dtype, *, blocksize: int = 64, nested: bool = False, **how: object
) -> str:
    """Compare one product with float64; gives the kernel's name."""
    quant_type = str(how.pop("quant_type", "nf4"))
    weight, meant = weight_of(n, columns, quant_type, blocksize, nested)
    x = torch.randn(m, columns, dtype=dtype, device="cuda")
    bias = torch.randn(n, dtype=dtype, device="cuda") if how.pop("bias", False) else None
    y, kernel = k.product(x, weight, n, quant_type, blocksize, bias=bias, **how)  # type: ignore[arg-type]
    exact = x.double() @ meant.T + (0 if bias is None else bias.double())
    # Rounding of each weight and of the result, and of float32 sums, in units of what the terms sum up to.
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-22}[dtype]
    magnitude = (x.double().square() @ meant.T.square()).sqrt() + (0 if bias is None else bias.double().abs())
    error = (y.double() - exact).abs()
    # Below the smallest normal number a rounding is absolute, of the result and of each weight.
    absolute = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * (1 + x.double().abs().sum(1, keepdim=True))
    bound = 2 * unit * (exact.abs() + 3 * magnitude) + absolute
    assert bool((error <= bound).all()), (m, n, columns, kernel, float((error / bound).max()))
    again, _ = k.product(x, weight, n, quant_type, blocksize, bias=bias, **how)  # type: ignore[arg-type]
    assert k.same_bits(y, again), "differs from run to run"
    return kernel


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("m", [*range(1, 18), 24, 31, 32, 33, 48, 65])
def test_few_rows(m: int, dtype: torch.dtype) -> None:
    for n, columns in ((4096, 4096), (1000, 320), (17, 64), (1, 128), (133, 11008)):
        for nested in (False, True):
            best = check(m, n, columns, dtype, nested=nested, bias=m % 2 == 0)
            few = (SMALL_M,) if m <= 16 or not HOPPER else (SMALL_M, BLOCK_SUMS)
            assert best.startswith(few if m <= FEW else (TILE, BLOCK_SUMS)), best
            check(m, n, columns, dtype, nested=nested, kernel=BY_REGISTERS)


@pytest.mark.parametrize("columns", [64, 128, 192, 576, 1536, 2048, 2560, 3072, 5120, 8192, 14336, 28672])
def test_many_columns(columns: int) -> None:
    for m in (1, 5, 16, 27):
        best = check(m, 300, columns, HALF, nested=m == 5)
        assert best.startswith((TILE,) if m > FEW else (SMALL_M, BLOCK_SUMS) if m == 27 else SMALL_M)
        check(m, 300, columns, HALF, nested=m == 5, kernel=BY_REGISTERS)


def test_many_rows_of_the_weight() -> None:
    for m in (1, 16, 32):
        best = check(m, 128_256, 2048, HALF)
        assert best.startswith((TILE,) if m > FEW else (SMALL_M, BLOCK_SUMS) if m == 32 else SMALL_M)
        check(m, 128_256, 2048, HALF, kernel=BY_REGISTERS)


@pytest.mark.parametrize("quant_type", k.QUANT_TYPES)
@pytest.mark.parametrize("blocksize", k.BLOCK_SIZES)
def test_block_sizes(blocksize: int, quant_type: str) -> None:
    # Blocks larger than a row run across rows.
    for n, columns in ((100, 1024), (64, 576)):
        kernel = check(3, n, columns, torch.float16, blocksize=blocksize, quant_type=quant_type, nested=True)
        assert kernel.startswith((TILE if HOPPER else SIMT) if blocksize == 32 else SMALL_M)


@pytest.mark.parametrize("dtype", k.DTYPES)
def test_ragged(dtype: torch.dtype) -> None:
    for m, n, columns in ((1, 1, 1), (3, 7, 33), (2, 5, 100), (20, 50, 129), (1, 300, 65)):
        assert check(m, n, columns, dtype, bias=True).startswith(SIMT)
        check(m, n, columns, dtype, nested=True, kernel="simt")


def test_float32_is_exact_to_rounding() -> None:
    assert check(4, 256, 512, torch.float32).startswith(SIMT)


def test_codes_of_scales_that_are_no_whole_words() -> None:
    for n, ring in ((37, False), (36, True)):
        kernel = check(1, n, 192, HALF, nested=True)
        assert kernel.startswith(
            f"{SMALL_M}_sm90" if ring and torch.cuda.get_device_capability() >= (9, 0) else f"gemm_4bit_{BY_REGISTERS}"
        )


def test_unaligned_operands_take_the_plain_kernel() -> None:
    weight, _ = weight_of(64, 128, "nf4", 64, nested=False)
    x = torch.randn(2 * 128 + 1, dtype=HALF, device="cuda")[1:].view(2, 128)
    y, kernel = k.product(x, weight, 64, "nf4", 64)
    expected, fast = k.product(x.clone(), weight, 64, "nf4", 64)
    assert kernel.startswith(SIMT)
    assert fast.startswith(SMALL_M)
    # One of them rounds the weights.
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=1e-1)


def test_a_kernel_that_does_not_take_the_arguments() -> None:
    weight, _ = weight_of(64, 128, "nf4", 64, nested=False)
    x = torch.randn(17, 128, device="cuda")
    with pytest.raises(ValueError, match="kernel must be"):
        k.product(x, weight, 64, "nf4", 64, kernel="small_m_sm80")


def test_no_rows_and_no_columns() -> None:
    weight, _ = weight_of(64, 128, "nf4", 64, nested=False)
    y, _ = k.product(torch.empty(0, 128, dtype=torch.bfloat16, device="cuda"), weight, 64, "nf4", 64)
    assert y.shape == (0, 64)
    empty = k.Quantized(k.poisoned(0, torch.uint8), k.poisoned(0, torch.float32))
    bias = torch.randn(5, device="cuda")
    y, _ = k.product(torch.empty(3, 0, device="cuda"), empty, 5, "nf4", 64, bias=bias)
    assert torch.equal(y, bias.expand(3, 5))


def test_in_a_graph() -> None:
    weight, meant = weight_of(512, 1024, "nf4", 64, nested=True)
    x = torch.zeros(1, 1024, dtype=torch.bfloat16, device="cuda")
    _native.cuda_prepare(torch.cuda.current_device())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = k.product(x, weight, 512, "nf4", 64)
    x.normal_()
    graph.replay()
    torch.testing.assert_close(y.double(), x.double() @ meant.T, rtol=2e-2, atol=2e-1)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("how", ["eager", "captured", "forked"])
@pytest.mark.parametrize(("n", "columns"), [(256, 1024), (1024, 1024), (2048, 2048)])
def test_a_weight_that_was_written_just_before(n: int, columns: int, how: str, nested: bool) -> None:
    """Products start before the kernel before them has ended, and must see what it writes, on another stream too."""
    quantize = k.quantize_nested if nested else k.quantize
    values = [torch.randn(n, columns, dtype=torch.bfloat16, device="cuda") for _ in range(8)]
    x = torch.randn(4, columns, dtype=torch.bfloat16, device="cuda")
    expected = []
    for v in values:
        fresh = quantize(v, "nf4", 64)
        torch.cuda.synchronize()
        expected.append(k.product(x, fresh, n, "nf4", 64)[0])
    # All in the same memory, and nothing between the kernels.
    weight = quantize(values[-1], "nf4", 64)
    scales = [None if t is None else k.raw(t) for t in weight.parts[1:]]
    scratch = torch.empty(n * columns // 64, device="cuda")
    workspace = torch.empty(_native.cuda_compress_workspace(len(scratch)), dtype=torch.float64, device="cuda")
    results = [torch.zeros(4, n, dtype=torch.bfloat16, device="cuda") for _ in values]

    side = torch.cuda.Stream()

    def work() -> None:
        for v, y in zip(values, results, strict=True):
            if nested:
                written = (v, weight.packed, scratch, *weight.parts[1:], workspace)
                _native.cuda_quantize_4bit_nested(*k.here(), *map(k.raw, written), "nf4", 64)
            else:
                written = (v, weight.packed, weight.absmax)
                _native.cuda_quantize_4bit(*k.here(), *map(k.raw, written), "nf4", 64, False)
            operands = (k.raw(x), k.raw(weight.packed), *scales, None, k.raw(y), 4, n, columns)
            if how == "forked":
                side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side if how == "forked" else torch.cuda.current_stream()):
                _native.cuda_matmul_4bit(*k.here(), *operands, "nf4", 64, "best")
            if how == "forked":
                torch.cuda.current_stream().wait_stream(side)

    if how != "eager":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        graph.replay()
    else:
        work()
    torch.cuda.synchronize()
    for result, wanted in zip(results, expected, strict=True):
        assert k.same_bits(result, wanted)
