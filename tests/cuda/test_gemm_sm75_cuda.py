"""The kernels for compute capability 7.5 on a GPU; later ones take their PTX, and prefer others."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from halfbyte import _native  # noqa: E402
from test_product_cuda import check, weight_of  # noqa: E402

import kernels as k  # noqa: E402

TURING = torch.cuda.is_available() and torch.cuda.get_device_capability() == (7, 5)


def tile(m: int, n: int, columns: int, **how: Any) -> None:
    """Compare with float64, and two runs with each other."""
    kernel = check(m, n, columns, torch.float16, kernel="tile_sm75", **how)
    assert kernel.startswith("gemm_4bit_tile_sm75")


def scratch() -> torch.Tensor:
    """A workspace that is large enough for each test, with anything in it."""
    return torch.randint(0, 256, (1 << 26,), dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("m", [1, 2, 3, 7, 8, 9, 15, 16, 17, 33])
def test_small_m_sm75_rows(m: int, nested: bool) -> None:
    for n, columns in ((4096, 4096), (1000, 320), (17, 64), (1, 128), (133, 11008), (300, 28672)):
        kernel = check(m, n, columns, torch.float16, nested=nested, bias=m % 2 == 0, kernel="small_m_sm75")
        assert kernel.startswith("gemm_4bit_small_m_sm75")


@pytest.mark.parametrize("quant_type", k.QUANT_TYPES)
@pytest.mark.parametrize("blocksize", k.BLOCK_SIZES)
def test_sm75_identity_gives_each_value_times_its_scale(blocksize: int, quant_type: str) -> None:
    """Each sum has one product that is not zero: a value rounded to float16, its scale applied in float32."""
    if blocksize < 64:
        pytest.skip("scales are for sums of 64 columns")
    for n, columns in ((256, 512), (392, 1088)):
        for nested in (False, True):
            weight, _ = weight_of(n, columns, quant_type, blocksize, nested)
            eye = torch.eye(columns, dtype=torch.float16, device="cuda")
            scales = weight.absmax
            if nested:
                scales = torch.empty(len(weight.absmax), device="cuda")
                parts = (weight.absmax, weight.absmax2, weight.offset, scales)
                _native.cuda_expand_absmax(*k.here(), *map(k.raw, parts))
            values = k.dequantize(
                k.Quantized(weight.packed, torch.ones_like(scales)), n * columns, eye.dtype, quant_type, blocksize
            )
            scaled = values.float() * scales.repeat_interleave(blocksize)[: n * columns]
            wanted = scaled.to(eye.dtype).view(n, columns).T.contiguous()
            for kernel in ("tile_sm75", "small_m_sm75"):
                y, _ = k.product(eye, weight, n, quant_type, blocksize, kernel=kernel, workspace=scratch())
                assert k.same_bits(y + 0.0, wanted + 0.0), (n, columns, nested, kernel)


@pytest.mark.parametrize("m", [1, 15, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257])
def test_tile_sm75_rows(m: int) -> None:
    for n, columns in ((384, 1024), (1001, 960), (128, 4096), (8, 64), (1, 64), (133, 11008)):
        for nested in (False, True):
            workspace = scratch() if m % 2 else None
            tile(m, n, columns, nested=nested, bias=m % 4 < 2, workspace=workspace)


@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (4096, 14336)])
def test_tile_sm75_large(shape: tuple[int, int]) -> None:
    for m in (32, 64, 192):
        tile(m, *shape, nested=m != 64, bias=m == 32, workspace=scratch())


@pytest.mark.parametrize("columns", [64, 128, 256, 448, 512, 768, 2304, 28672])
def test_tile_sm75_columns(columns: int) -> None:
    """One k-tile and more, and parts of K of several lengths."""
    for m in (20, 100):
        tile(m, 200, columns, nested=m == 100, workspace=scratch())


def test_tile_sm75_parts_of_k_in_a_graph_that_runs_again() -> None:
    """Each replay is a launch with the same token: signals of the one before are gone."""
    n, columns, m = 1024, 4096, 70
    weight, _ = weight_of(n, columns, "nf4", 64, nested=False)
    x = torch.randn(m, columns, dtype=torch.float16, device="cuda")
    workspace = scratch()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        k.product(x, weight, n, "nf4", 64, kernel="tile_sm75", workspace=workspace)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y, _ = k.product(x, weight, n, "nf4", 64, kernel="tile_sm75", workspace=workspace)
    for seed in range(20):
        x.copy_(torch.randn(x.shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda"))
        graph.replay()
        alone, _ = k.product(x, weight, n, "nf4", 64, kernel="tile_sm75", workspace=workspace)
        assert k.same_bits(y, alone), seed


def test_tile_sm75_what_it_does_not_take() -> None:
    weight, _ = weight_of(64, 128, "nf4", 64, nested=False)
    x = torch.randn(65 * 128 + 1, dtype=torch.float16, device="cuda")
    for case in (x[1:].view(65, 128), x[:-1].view(65, 128).float()):
        with pytest.raises(ValueError, match="kernel must be"):
            k.product(case, weight, 64, "nf4", 64, kernel="tile_sm75")
    odd, _ = weight_of(64, 96, "nf4", 32, nested=False)
    with pytest.raises(ValueError, match="kernel must be"):
        k.product(torch.zeros(65, 96, dtype=torch.float16, device="cuda"), odd, 64, "nf4", 32, kernel="tile_sm75")


@pytest.mark.skipif(not TURING, reason="needs compute capability 7.5, where these kernels are preferred")
@pytest.mark.parametrize("m", [1, 2, 16, 17, 64, 192])
def test_sm75_is_preferred(m: int) -> None:
    best = check(m, 4096, 4096, torch.float16, workspace=scratch())
    assert best.startswith("gemm_4bit_small_m_sm75" if m <= 16 else "gemm_4bit_tile_sm75")
