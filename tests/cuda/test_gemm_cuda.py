"""Products of more than a few rows with 4-bit weights on a GPU with warpgroup products."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from halfbyte import _native  # noqa: E402
from test_product_cuda import check, weight_of  # noqa: E402

import kernels as k  # noqa: E402

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0")

HALVES = [torch.bfloat16, torch.float16]


def gemm(m: int, n: int, columns: int, dtype: torch.dtype, **how: object) -> None:
    """Compare with float64, and two runs with each other."""
    kernel = check(m, n, columns, dtype, kernel="tile_sm90a", **how)  # type: ignore[arg-type]
    block_sums = m <= 64 and columns % 64 == 0 and how.get("blocksize", 64) != 32
    assert kernel.startswith(f"gemm_4bit_{'block_sums' if block_sums else 'tile'}_sm90a"), kernel


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("quant_type", k.QUANT_TYPES)
@pytest.mark.parametrize("blocksize", k.BLOCK_SIZES)
def test_identity_gives_the_dequantized_weight(blocksize: int, quant_type: str, dtype: torch.dtype) -> None:
    """Each sum has one product that is not zero: the bits are those of the weight, wherever they come from."""
    # The last has blocks that run across rows, and half a step at the end.
    for n, columns in ((256, 512), (392, 1056)):
        for nested in (False, True):
            weight, _ = weight_of(n, columns, quant_type, blocksize, nested)
            y, kernel = k.product(
                torch.eye(columns, dtype=dtype, device="cuda"), weight, n, quant_type, blocksize, kernel="tile_sm90a"
            )
            dense = k.dequantize(weight, n * columns, dtype, quant_type, blocksize).view(n, columns)
            # Zero times a negative value is a negative zero, which adding zeros makes positive.
            assert k.same_bits(y + 0.0, dense.T.contiguous() + 0.0), (n, columns, nested, kernel)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("m", [1, 15, 33, 63, 64, 65, 127, 128, 129, 191, 193, 255, 257, 300, 517, 1024])
def test_rows(m: int, dtype: torch.dtype) -> None:
    for n, columns in ((384, 1024), (1001, 992), (128, 4096), (8, 64), (1, 32), (133, 11008)):
        for nested in (False, True):
            gemm(m, n, columns, dtype, nested=nested, bias=m % 2 == 0)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("m", [1, 17, 31, 32, 33, 47, 48, 49, 63, 64])
def test_rows_with_scales_for_sums(m: int, dtype: torch.dtype) -> None:
    """Each kernel: parts in clusters and through memory, every number of stages in a round, scales by fours and not."""
    workspace = torch.randint(0, 256, (1 << 25,), dtype=torch.uint8, device="cuda")
    for n, columns in ((384, 1024), (1001, 960), (128, 4096), (8, 64), (133, 11008), (4096, 2560), (2048, 14336)):
        for nested in (False, True):
            blocksize = 64 if nested else 128
            for how in ({}, {"workspace": workspace}):
                gemm(m, n, columns, dtype, nested=nested, blocksize=blocksize, bias=m % 2 == 0, **how)


@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (4096, 14336)])
def test_large(shape: tuple[int, int]) -> None:
    for m in (32, 48, 64, 128, 192, 256):
        gemm(m, *shape, torch.bfloat16, nested=m != 128, bias=m == 64)


@pytest.mark.parametrize("columns", [32, 96, 256, 288, 512, 544, 768, 1024, 1280, 2304, 28672])
def test_columns(columns: int) -> None:
    """One part of K to four, and what is left over."""
    for m in (20, 40, 100, 180, 250):
        gemm(m, 200, columns, torch.bfloat16, nested=m == 100)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("n", "columns", "blocksize"), [(14336, 4096, 64), (18001, 2080, 4096)])
def test_blocks_that_share_all_tiles(n: int, columns: int, blocksize: int, dtype: torch.dtype) -> None:
    """With a workspace, whatever was in it; the same bits from run to run, on a stream and in a graph."""
    core = _native.CudaLinear(torch.cuda.current_device(), str(dtype)[6:], n, columns, "nf4", blocksize, False)
    assert any(core.workspace(m) for m in (300, 512, 1000)), "no product is divided in this way"
    for m in (300, 512, 1000):
        workspace = torch.randint(0, 256, (1 << 25,), dtype=torch.uint8, device="cuda")
        # Scales that are not quantized are so small here and there that float16 has no such weights.
        nested = m == 512 or dtype is torch.float16
        gemm(m, n, columns, dtype, blocksize=blocksize, nested=nested, bias=m == 300, workspace=workspace)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("n", "columns"), [(11008, 4096), (17000, 1024), (18944, 3584), (34001, 512)])
def test_two_teams_share_all_tiles(n: int, columns: int, dtype: torch.dtype) -> None:
    """The same for up to 128 rows: fewer tiles than multiprocessors, a few more, and twice as many."""
    for i, m in enumerate((20, 48, 64, 90, 128)):
        workspace = torch.randint(0, 256, (1 << 25,), dtype=torch.uint8, device="cuda")
        gemm(
            m, n, columns, dtype, blocksize=128 if m == 48 else 64, nested=i % 2 == 0, bias=m > 50, workspace=workspace
        )


@pytest.mark.parametrize(("n", "columns", "m"), [(14336, 2048, 700), (17000, 1024, 100), (17000, 1024, 40)])
def test_blocks_share_tiles_in_a_graph_that_runs_again(n: int, columns: int, m: int) -> None:
    """Each replay is a launch with the same token: signals of the one before are gone."""
    weight, _ = weight_of(n, columns, "nf4", 64, nested=False)
    x = torch.randn(m, columns, dtype=torch.bfloat16, device="cuda")
    workspace = torch.zeros(1 << 25, dtype=torch.uint8, device="cuda")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        k.product(x, weight, n, "nf4", 64, kernel="tile_sm90a", workspace=workspace)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y, _ = k.product(x, weight, n, "nf4", 64, kernel="tile_sm90a", workspace=workspace)
    for seed in range(20):
        x.copy_(torch.randn(x.shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda"))
        graph.replay()
        alone, _ = k.product(x, weight, n, "nf4", 64, kernel="tile_sm90a", workspace=workspace)
        assert k.same_bits(y, alone), seed


def test_what_it_does_not_take() -> None:
    weight, _ = weight_of(64, 128, "nf4", 64, nested=False)
    x = torch.randn(65 * 128 + 1, dtype=torch.bfloat16, device="cuda")
    for case in (x[1:].view(65, 128), x[:-1].view(65, 128).float()):
        with pytest.raises(ValueError, match="kernel must be"):
            k.product(case, weight, 64, "nf4", 64, kernel="tile_sm90a")


def test_a_weight_that_was_just_written() -> None:
    """The kernel starts before those end that quantize: it sees what they write."""
    x = torch.eye(128, dtype=torch.bfloat16, device="cuda")
    for round_ in range(50):
        values = torch.randn(
            4096 * 128, dtype=torch.bfloat16, device="cuda", generator=torch.Generator("cuda").manual_seed(round_)
        )
        for quantize in (k.quantize, k.quantize_nested):
            weight = quantize(values, "nf4", 64)
            y, kernel = k.product(x, weight, 4096, "nf4", 64)
            assert kernel.startswith("gemm_4bit_tile_sm90a")
            dense = k.dequantize(weight, values.numel(), torch.bfloat16, "nf4", 64).view(4096, 128)
            assert k.same_bits(y + 0.0, dense.T.contiguous() + 0.0), round_
