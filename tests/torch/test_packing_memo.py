"""What is remembered of a packed weight between two calls never outlives what it was learned from."""

from __future__ import annotations

import halfbyte.functional as F
import pytest
import torch


def spread(tensor: torch.Tensor) -> None:
    """Give a tensor the same values in memory of gaps: as many elements, other strides."""
    wide = torch.full((*tensor.shape, 2), 99, dtype=tensor.dtype)
    wide[..., 0] = tensor
    tensor.data = wide[..., 0]
    assert not tensor.is_contiguous()


def results(x: torch.Tensor, packed: torch.Tensor, state: F.QuantState) -> list[torch.Tensor]:
    """Of everything that reads a packed weight."""
    leaf = x.clone().requires_grad_()
    product = F.matmul_4bit(leaf, packed.t(), state)
    (grad,) = torch.autograd.grad(product.sum(), leaf)
    rows = torch.ops.halfbyte.embedding_4bit(
        torch.tensor([0, 63]), packed, *state.scales(), state.shape, torch.float32, 64, "nf4"
    )
    return [product.detach(), grad, rows, F.matmul_4bit(x, packed.t(), state), F.dequantize_4bit(packed, state)]


@pytest.mark.parametrize("nested", [False, True])
def test_packing_memo_of_tensors_whose_memory_gets_other_strides(nested):
    packed, state = F.quantize_4bit(torch.randn(64, 512), quant_type="nf4", compress_statistics=nested)
    x = torch.randn(3, 512)
    wanted = results(x, packed, state)
    for tensor in (packed, state.absmax, *([state.state2.absmax] if nested else [])):
        spread(tensor)
        for found, value in zip(results(x, packed, state), wanted, strict=True):
            assert torch.equal(found, value)


@pytest.mark.parametrize("nested", [False, True])
def test_packing_memo_of_tensors_whose_memory_is_replaced(nested):
    x = torch.randn(3, 512)
    packed, state = F.quantize_4bit(torch.randn(64, 512), quant_type="nf4", compress_statistics=nested)
    results(x, packed, state)
    other, of_other = F.quantize_4bit(torch.randn(64, 512), quant_type="nf4", compress_statistics=nested)
    wanted = results(x, other, of_other)
    packed.data, state.absmax.data = other, of_other.absmax
    if nested:
        state.state2.absmax.data, state.offset.data = of_other.state2.absmax, of_other.offset
    for found, value in zip(results(x, packed, state), wanted, strict=True):
        assert torch.equal(found, value)


@pytest.mark.parametrize("which", ["packed", "absmax", "absmax2"])
def test_packing_memo_of_tensors_that_become_shorter(which):
    packed, state = F.quantize_4bit(torch.randn(64, 512), quant_type="nf4", compress_statistics=True)
    x = torch.randn(3, 512)
    results(x, packed, state)
    tensor = {"packed": packed, "absmax": state.absmax, "absmax2": state.state2.absmax}[which]
    # At the same address.
    tensor.data = tensor.data[:-1]
    with pytest.raises(ValueError, match=f"^{which}: "):
        F.matmul_4bit(x, packed.t(), state)
    with pytest.raises(ValueError, match=f"^{which}: "):
        F.dequantize_4bit(packed, state)
