"""Products of more than a few rows with 4-bit weights on a GPU, without warpgroup products."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from test_product_cuda import check, weight_of  # noqa: E402

import kernels as k  # noqa: E402

AMPERE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
pytestmark = pytest.mark.skipif(not AMPERE, reason="needs compute capability 8.0")

HALVES = [torch.bfloat16, torch.float16]


def gemm(m: int, n: int, columns: int, dtype: torch.dtype, **how: Any) -> None:
    """Compare with float64, and two runs with each other."""
    assert check(m, n, columns, dtype, kernel="tile_sm80", **how).startswith("gemm_4bit_tile_sm80")


def scratch() -> torch.Tensor:
    """A workspace that is large enough for each test, with anything in it."""
    return torch.randint(0, 256, (1 << 26,), dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("quant_type", k.QUANT_TYPES)
@pytest.mark.parametrize("blocksize", k.BLOCK_SIZES)
def test_gemm_sm80_identity_gives_the_dequantized_weight(blocksize: int, quant_type: str, dtype: torch.dtype) -> None:
    """Each sum has one product that is not zero: the bits are those of the weight, wherever they come from."""
    for n, columns in ((256, 512), (392, 1088)):
        for nested in (False, True):
            weight, _ = weight_of(n, columns, quant_type, blocksize, nested)
            eye = torch.eye(columns, dtype=dtype, device="cuda")
            y, _ = k.product(eye, weight, n, quant_type, blocksize, kernel="tile_sm80", workspace=scratch())
            dense = k.dequantize(weight, n * columns, dtype, quant_type, blocksize).view(n, columns)
            assert k.same_bits(y + 0.0, dense.T.contiguous() + 0.0), (n, columns, nested)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("m", [1, 15, 33, 63, 64, 65, 127, 128, 129, 257, 512])
def test_gemm_sm80_rows(m: int, dtype: torch.dtype) -> None:
    for n, columns in ((384, 1024), (1001, 960), (128, 4096), (8, 64), (1, 64), (133, 11008)):
        for nested in (False, True):
            workspace = scratch() if m % 2 else None
            gemm(m, n, columns, dtype, nested=nested, bias=m % 4 < 2, workspace=workspace)


@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (4096, 14336)])
def test_gemm_sm80_large(shape: tuple[int, int]) -> None:
    for m in (64, 128, 256):
        gemm(m, *shape, torch.bfloat16, nested=m != 128, bias=m == 64, workspace=scratch())


@pytest.mark.parametrize("columns", [64, 128, 256, 448, 512, 768, 2304, 28672])
def test_gemm_sm80_columns(columns: int) -> None:
    """Fewer k-tiles than stages, and parts of K of several lengths."""
    for m in (40, 100):
        gemm(m, 200, columns, torch.bfloat16, nested=m == 100, workspace=scratch())


def test_gemm_sm80_parts_of_k_in_a_graph_that_runs_again() -> None:
    """Each replay is a launch with the same token: signals of the one before are gone."""
    n, columns, m = 1024, 4096, 70
    weight, _ = weight_of(n, columns, "nf4", 64, nested=False)
    x = torch.randn(m, columns, dtype=torch.bfloat16, device="cuda")
    workspace = scratch()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        k.product(x, weight, n, "nf4", 64, kernel="tile_sm80", workspace=workspace)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y, _ = k.product(x, weight, n, "nf4", 64, kernel="tile_sm80", workspace=workspace)
    for seed in range(20):
        x.copy_(torch.randn(x.shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda"))
        graph.replay()
        alone, _ = k.product(x, weight, n, "nf4", 64, kernel="tile_sm80", workspace=workspace)
        assert k.same_bits(y, alone), seed


def test_gemm_sm80_what_it_does_not_take() -> None:
    weight, _ = weight_of(64, 128, "nf4", 64, nested=False)
    x = torch.randn(65 * 128 + 1, dtype=torch.bfloat16, device="cuda")
    for case in (x[1:].view(65, 128), x[:-1].view(65, 128).float()):
        with pytest.raises(ValueError, match="kernel must be"):
            k.product(case, weight, 64, "nf4", 64, kernel="tile_sm80")
    odd, _ = weight_of(64, 96, "nf4", 32, nested=False)
    with pytest.raises(ValueError, match="kernel must be"):
        k.product(torch.zeros(65, 96, dtype=torch.bfloat16, device="cuda"), odd, 64, "nf4", 32, kernel="tile_sm80")
