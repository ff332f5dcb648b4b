"""Gradients of x through 4-bit weights on a GPU with warpgroup products, without a dense copy of the weight."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import halfbyte.functional as F  # noqa: E402
from halfbyte import _native  # noqa: E402
from halfbyte.backends import cuda  # noqa: E402
from test_product_cuda import weight_of  # noqa: E402

import kernels as k  # noqa: E402

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0")

HALVES = [torch.bfloat16, torch.float16]


def same_twice(
    dy: torch.Tensor, weight: k.Quantized, columns: int, quant_type: str, blocksize: int, *, workspace: bool
) -> torch.Tensor:
    """The gradient by the kernel, which has the same bits when it is made again."""
    first, again = (k.dgrad(dy, weight, columns, quant_type, blocksize, workspace=workspace) for _ in range(2))
    assert k.same_bits(first, again)
    return first


def check(m: int, n: int, columns: int, dtype: torch.dtype, *, nested: bool, blocksize: int = 64) -> None:
    """Compare with float64, whatever way blocks share a tile."""
    weight, _ = weight_of(n, columns, "nf4", blocksize, nested)
    dense = k.dequantize(weight, n * columns, dtype, "nf4", blocksize).view(n, columns).double()
    dy = torch.randn(m, n, dtype=dtype, device="cuda")
    exact, size = dy.double() @ dense, dy.double().abs() @ dense.abs()
    for workspace in (False, True):
        dx = same_twice(dy, weight, columns, "nf4", blocksize, workspace=workspace).double()
        # Rounded once for each product of matrices, and to the result's type, whose smallest steps are no smaller.
        step = torch.finfo(dtype)
        bound = (n / 16 + 16) * 2.0**-24 * size + step.eps / 2 * exact.abs() + step.tiny * step.eps
        assert ((dx - exact).abs() <= bound).all(), (m, n, columns, nested, workspace)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("quant_type", k.QUANT_TYPES)
@pytest.mark.parametrize("blocksize", k.BLOCK_SIZES)
def test_identity_gives_the_dequantized_weight(blocksize: int, quant_type: str, dtype: torch.dtype) -> None:
    """Each sum has one product that is not zero: the bits are those of the weight, wherever they come from."""
    for n, columns in ((512, 256), (1064, 416)):
        for nested in (False, True):
            weight, _ = weight_of(n, columns, quant_type, blocksize, nested)
            dense = k.dequantize(weight, n * columns, dtype, quant_type, blocksize).view(n, columns)
            dy = torch.eye(n, dtype=dtype, device="cuda")
            for workspace in (False, True):
                dx = same_twice(dy, weight, columns, quant_type, blocksize, workspace=workspace)
                # Zero times a negative value is a negative zero, which adding zeros makes positive.
                assert k.same_bits(dx + 0.0, dense + 0.0), (n, columns, nested, workspace)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("m", [1, 15, 64, 65, 127, 129, 255, 257, 517, 1024])
def test_rows(m: int, dtype: torch.dtype) -> None:
    for n, columns in ((1024, 384), (992, 1056), (4096, 128), (64, 32), (8, 160), (11008, 96)):
        for nested in (False, True):
            check(m, n, columns, dtype, nested=nested)


@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (4096, 14336)])
def test_large(shape: tuple[int, int]) -> None:
    for m in (64, 128, 256, 1024):
        check(m, *shape, torch.bfloat16, nested=m != 128, blocksize=128 if m == 256 else 64)


def test_the_gradient_of_a_layer_is_made_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a dense copy, in a graph as well; what it does not take has one, and the same gradient."""
    made = []
    monkeypatch.setattr(cuda._Weight, "dense", lambda self, *_: made.append((self.n, self.k)))
    packed, state = F.quantize_4bit(torch.randn(512, 256, device="cuda"), quant_type="nf4", compress_statistics=True)
    weight, dy = state.packed(packed), torch.randn(90, 512, dtype=torch.bfloat16, device="cuda")
    expected = cuda.linear_4bit_backward(dy, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = cuda.linear_4bit_backward(dy, weight)
    for _ in range(3):
        found.zero_()
        graph.replay()
        assert k.same_bits(found, expected)
    # Neither contiguous nor aligned.
    strided = torch.randn(512, 90, dtype=torch.bfloat16, device="cuda").t()
    shifted = k.poisoned(90 * 512, torch.bfloat16, 1).view(90, 512).copy_(strided)
    assert k.same_bits(cuda.linear_4bit_backward(strided, weight), cuda.linear_4bit_backward(shifted, weight))
    assert not made
    cuda.linear_4bit_backward(dy.float(), weight)
    assert made == [(512, 256)]


def test_what_it_does_not_take() -> None:
    for m, n, columns, blocksize in ((9, 20, 64, 64), (9, 64, 48, 64)):
        weight, _ = weight_of(n, columns, "nf4", blocksize, nested=False)
        dy = torch.randn(m, n, dtype=torch.bfloat16, device="cuda")
        with pytest.raises(ValueError, match="m x n x k"):
            k.dgrad(dy, weight, columns, "nf4", blocksize, workspace=False)
    weight, _ = weight_of(64, 64, "nf4", 64, nested=False)
    with pytest.raises(ValueError, match="packed"):
        k.dgrad(
            torch.randn(9, 64, dtype=torch.bfloat16, device="cuda"),
            k.Quantized(k.poisoned(64 * 32, torch.uint8, 8), weight.absmax), 64, "nf4", 64, workspace=False,
        )  # fmt: skip
    core = _native.CudaLinear(0, "float32", 64, 64, "nf4", 64, False)
    assert core.dgrad_workspace(64) is None
