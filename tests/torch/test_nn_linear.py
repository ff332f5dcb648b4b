"""`Linear4bit` forward and backward: shapes, dtypes, block sizes, and what is refused."""

from __future__ import annotations

import itertools
import logging

import halfbyte.functional as F
import pytest
import torch
import torch_reference as ref
from compilers import needs_compiler
from halfbyte.nn import Embedding4bit, Linear4bit, LinearNF4, Params4bit, fix_4bit_weight_quant_state_from_module
from halfbyte.nn import linear4bit as linear_module
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_layers import FLOATS, STORAGES, quantized


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_forward_and_backward_are_those_of_the_dequantized_layer(storage, quant_type, nested):
    for (n, k), dtype in itertools.product([(48, 96), (7, 65), (1, 1), (33, 130)], FLOATS):
        dense, layer = quantized(
            n, k, dtype=dtype, quant_type=quant_type, compress_statistics=nested, quant_storage=storage
        )
        expected = ref.quantize_4bit(dense.weight, quant_type, nested=nested)
        assert layer.weight.dtype == storage
        assert torch.equal(layer.dequantize(), expected.values)
        x = torch.randn(2, 3, k, dtype=dtype, requires_grad=True)
        y = layer(x)
        assert (y.dtype, y.shape) == (dtype, (2, 3, n))
        bound = 2 * ref.product_bound(x, expected.values, layer.bias)
        assert ((y.double() - ref.linear(x, expected.values, layer.bias)).abs() <= bound).all()

        grad = torch.randn_like(y)
        y.backward(grad)
        bound = 2 * ref.product_bound(grad, expected.values.T, None)
        assert ((x.grad.double() - ref.linear(grad, expected.values.T, None)).abs() <= bound).all()
        torch.testing.assert_close(layer.bias.grad, grad.sum((0, 1)), rtol=2e-2, atol=2e-2)
        assert layer.weight.grad is None


@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
def test_blocksize_is_that_of_the_weight(blocksize):
    dense, layer = quantized(48, 96, blocksize=blocksize)
    assert layer.weight.quant_state.blocksize == blocksize
    assert torch.equal(layer.dequantize(), ref.quantize_4bit(dense.weight, "nf4", blocksize, nested=True).values)
    loaded = Linear4bit(48, 48, blocksize=blocksize)
    loaded.load_state_dict({"weight": torch.randn(48, 48), "bias": torch.zeros(48)})
    assert loaded.quant_state.blocksize == blocksize
    table = Embedding4bit(48, 96, blocksize=blocksize).to("cpu")
    assert table.weight.quant_state.blocksize == blocksize


def test_blocksize_is_checked():
    for kind in (Linear4bit, Embedding4bit):
        with pytest.raises(ValueError, match="blocksize"):
            kind(48, 96, blocksize=63)


@settings(max_examples=60)
@given(st.data())
def test_any_shape_and_stride(data):
    n, k = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 70))
    _, layer = quantized(n, k, bias=data.draw(st.booleans()))
    lead = data.draw(st.lists(st.integers(0, 4), max_size=3))
    kind = data.draw(st.sampled_from(["contiguous", "strided", "transposed", "expanded", "offset"]))
    x = {
        "contiguous": lambda: torch.randn(*lead, k),
        "strided": lambda: torch.randn(*lead, 2 * k)[..., ::2],
        "transposed": lambda: torch.randn(k, *lead).movedim(0, -1),
        "expanded": lambda: torch.randn(k).expand(*lead, k),
        "offset": lambda: torch.randn(*lead, k + 3)[..., 3:],
    }[kind]().requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, layer.dequantize(), layer.bias), rtol=1e-4, atol=1e-4)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.shape == x.shape
    torch.testing.assert_close(grad, layer.dequantize().sum(0).expand(*lead, k), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("n", "k"), [(5, 0), (0, 5), (0, 0)])
def test_layers_without_values(n, k):
    layer = LinearNF4(1, 1)
    layer.in_features, layer.out_features = k, n
    packed, state = F.quantize_4bit(torch.empty(n, k), quant_type="nf4")
    layer.weight = Params4bit(packed, quant_state=state, bnb_quantized=True, quant_type="nf4")
    layer.bias = torch.nn.Parameter(torch.arange(n, dtype=torch.float32))
    x = torch.randn(3, k, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, torch.arange(n, dtype=torch.float32).expand(3, n))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros(3, k))


@pytest.mark.parametrize("compute_dtype", [None, *FLOATS], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_compute_dtype(dtype, compute_dtype):
    _, layer = quantized(compute_dtype=compute_dtype)
    assert layer.compute_dtype is compute_dtype
    x = torch.randn(4, 96, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert layer.compute_dtype is compute_dtype
    loose = torch.bfloat16 in (dtype, compute_dtype)
    expected = torch.nn.functional.linear(x.float(), layer.dequantize(), layer.bias).to(dtype)
    torch.testing.assert_close(y, expected, rtol=2e-2 if loose else 4e-3, atol=2e-2 if loose else 4e-3)
    # The bias is not touched, and an input of another dtype is computed with in its own.
    assert layer.bias.dtype == torch.float32
    assert layer(x.float()).dtype == torch.float32


@pytest.mark.parametrize("compute_dtype", [None, torch.float32], ids=str)
def test_a_float64_input_gives_a_float64_output(compute_dtype):
    _, layer = quantized(compute_dtype=compute_dtype)
    x = torch.randn(4, 96, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.dtype == torch.float64
    exact = x @ layer.dequantize().double().T + layer.bias.double()
    tolerance = 1e-12 if compute_dtype is None else 1e-5
    torch.testing.assert_close(y, exact, rtol=tolerance, atol=tolerance)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, layer.dequantize().double().sum(0).expand(4, 96), rtol=1e-5, atol=1e-5)


@needs_compiler
def test_a_float64_input_compiled_whole_gives_a_float64_output():
    _, layer = quantized()
    x = torch.randn(4, 96, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


def test_the_inputs_name_is_bitsandbytes():
    _, layer = quantized()
    x = torch.randn(2, 96)
    assert torch.equal(layer(x=x), layer(x))


@needs_compiler
@pytest.mark.parametrize("compute_dtype", [None, torch.float16], ids=str)
def test_autocast_compiled_whole_gives_the_inputs_dtype(compute_dtype):
    _, layer = quantized(compute_dtype=compute_dtype)
    x = torch.randn(4, 96, requires_grad=True)

    def run(function):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = function(x)
        (grad,) = torch.autograd.grad(y.sum(), x)
        return y, grad

    y, grad = run(layer)
    assert y.dtype == grad.dtype == torch.float32
    # The autocast dtype goes before the layer's own.
    assert torch.equal(y, y.bfloat16().float())
    torch.testing.assert_close(run(torch.compile(layer, backend="aot_eager", fullgraph=True)), (y, grad))


def test_compute_type_can_be_set_by_code_that_replaces_forward():
    _, layer = quantized()
    assert not layer.compute_type_is_set
    layer.set_compute_type(torch.randn(2, 96, dtype=torch.float16))
    assert layer.compute_dtype is None
    layer.set_compute_type(torch.randn(2, 96, dtype=torch.bfloat16))
    assert layer.compute_dtype is torch.bfloat16
    assert quantized(compute_dtype=torch.float16)[1].compute_type_is_set


def test_a_weight_that_lost_its_state_gets_it_from_the_module():
    _, layer = quantized()
    dense, state = layer.dequantize(), layer.quant_state
    layer.weight.quant_state = None
    fix_4bit_weight_quant_state_from_module(layer)
    assert layer.weight.quant_state is state
    del layer.weight
    layer.weight = torch.nn.Parameter(F.quantize_4bit(dense, quant_type="nf4")[0], requires_grad=False)
    fix_4bit_weight_quant_state_from_module(layer)
    assert isinstance(layer.weight, Params4bit)
    assert layer.weight.quant_state is state
    assert layer.weight.bnb_quantized
    with pytest.raises(RuntimeError, match="not quantized yet"):
        fix_4bit_weight_quant_state_from_module(LinearNF4(8, 8))


def test_a_slow_compute_dtype_is_said_once(caplog):
    linear_module._said.clear()
    _, layer = quantized(compute_dtype=torch.float32)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            layer(torch.randn(2, 96, dtype=torch.bfloat16))
            layer(torch.randn(2, 96))
    assert len(caplog.records) == 1
    assert "compute_dtype is torch.float32" in caplog.text
    caplog.clear()
    _, layer = quantized()
    layer(torch.randn(2, 96, dtype=torch.bfloat16))
    assert not caplog.records


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.randn(2, 95), ValueError, "does not end with in_features, 96"),
        (torch.ones(2, 96).long(), TypeError, "dtype torch.int64"),
        (torch.empty(2, 96, device="meta"), ValueError, "is on cpu, but x is on meta"),
        (torch.tensor(1.0), ValueError, "in_features, 96"),
    ],
)
def test_bad_inputs(x, error, message):
    _, layer = quantized()
    with pytest.raises(error, match=message):
        layer(x)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"quant_type": "nf5"}, ValueError, "quant_type: 'nf5' is not one of"),
        ({"quant_storage": torch.int32}, ValueError, "quant_storage: torch.int32"),
        ({"compute_dtype": torch.float64}, ValueError, "compute_dtype: torch.float64"),
        ({"compute_dtype": "bfloat16"}, ValueError, "compute_dtype: 'bfloat16'"),
    ],
)
def test_bad_construction(kwargs, error, message):
    with pytest.raises(error, match=message):
        Linear4bit(8, 8, **kwargs)


def test_an_unquantized_layer_says_so():
    layer = Linear4bit(8, 8)
    with pytest.raises(RuntimeError, match=r"not quantized yet; move the module to its device first"):
        layer(torch.randn(2, 8))
    assert "not quantized yet" in repr(layer)
    assert "not quantized yet" not in repr(layer.to("cpu"))
