"""`halfbyte.nn`: modules whose weights are packed, held to what a PyTorch user expects of any module."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import logging
import pickle
import threading
import weakref

import halfbyte.functional as F
import pytest
import torch
import torch_reference as ref
from compilers import needs_compiler
from halfbyte.nn import (
    Embedding4bit,
    EmbeddingFP4,
    EmbeddingNF4,
    Linear4bit,
    LinearFP4,
    LinearNF4,
    Params4bit,
    fix_4bit_weight_quant_state_from_module,
)
from halfbyte.nn import linear4bit as linear_module
from halfbyte.nn._joint import portable
from halfbyte.state import QuantState
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
STORAGES = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
STATE_KEYS = ("absmax", "quant_map")
NESTED_KEYS = ("nested_absmax", "nested_quant_map")


def bytes_of(tensor):
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def keys_of(quant_type, nested, bias):
    keys = {"weight", *(f"weight.{k}" for k in STATE_KEYS), f"weight.quant_state.bitsandbytes__{quant_type}"}
    return keys | {f"weight.{k}" for k in NESTED_KEYS if nested} | {"bias" for _ in range(bias)}


def quantized(n=48, k=96, *, dtype=torch.float32, **kwargs):
    """A dense layer, and the quantized one of the same weight."""
    dense = torch.nn.Linear(k, n, bias=kwargs.get("bias", True), dtype=dtype)
    layer = Linear4bit(k, n, **{"quant_type": "nf4", **kwargs}, device="meta")
    layer.load_state_dict(dense.state_dict(), assign=True)
    return dense, layer


def same_layer(a, b):
    x = torch.randn(3, a.in_features)
    assert a.weight.dtype == b.weight.dtype
    assert torch.equal(bytes_of(a.weight), bytes_of(b.weight))
    assert a.quant_state == b.quant_state
    assert torch.equal(a(x), b(x))


# ---- forward and backward --------------------------------------------------------------------------------------------


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


@settings(max_examples=60, deadline=None)
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


# ---- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("move", [lambda p: p.to("cpu"), lambda p: p.cpu(), lambda p: p.to(torch.device("cpu"))])
def test_a_parameter_is_quantized_once_and_in_place(move):
    tensor = torch.randn(16, 32)
    param = Params4bit(tensor, quant_type="nf4", compress_statistics=False)
    assert not param.bnb_quantized
    assert torch.equal(param, tensor)
    moved = move(param)
    assert moved is param
    assert param.bnb_quantized
    expected, state = F.quantize_4bit(tensor, quant_type="nf4")
    assert torch.equal(param.data, expected)
    assert param.quant_state == state
    pointer = param.data_ptr()
    assert move(param) is param
    assert param.data_ptr() == pointer
    # Casts are for numbers, not for packed bytes.
    for cast in (Params4bit.half, Params4bit.float, Params4bit.bfloat16, Params4bit.double,
                 lambda p: p.to(torch.float16), lambda p: p.to("cpu", torch.float16)):  # fmt: skip
        assert cast(param) is param


def test_an_unquantized_parameter_can_be_cast():
    param = Params4bit(torch.randn(16, 32), quant_type="nf4", blocksize=128)
    for cast, dtype in ((Params4bit.half, torch.float16), (lambda p: p.to(torch.bfloat16), torch.bfloat16)):
        other = cast(param)
        assert (type(other), other.dtype, other.blocksize, other.bnb_quantized) == (Params4bit, dtype, 128, False)
        assert other.to("cpu").quant_state.dtype == dtype
    meta = param.to("meta")
    assert (type(meta), meta.device.type, meta.bnb_quantized) == (Params4bit, "meta", False)
    with pytest.raises(NotImplementedError, match="meta"):
        meta.to("cpu")


def test_constructor_takes_another_ones_attributes():
    old = Params4bit(torch.randn(16, 32), quant_type="nf4", blocksize=128, quant_storage=torch.bfloat16).to("cpu")
    same = Params4bit(old.data, requires_grad=False, **old.__dict__)
    assert same.__dict__ == old.__dict__
    assert torch.equal(bytes_of(same), bytes_of(old))
    # As a merge does: other numbers, quantized again in the same way.
    attributes = {k: v for k, v in old.__dict__.items() if not k.startswith("_")}
    attributes["bnb_quantized"] = False
    merged = Params4bit(torch.ones(16, 32), requires_grad=False, **attributes).to("cpu")
    assert (merged.dtype, merged.blocksize, merged.quant_type) == (torch.bfloat16, 128, "nf4")
    assert torch.equal(F.dequantize_4bit(merged.data, merged.quant_state), torch.ones(16, 32))
    assert merged.quant_state is not old.quant_state
    # What other libraries left there is ignored.
    Params4bit(old.data, **{**old.__dict__, "_is_hf_initialized": True, "foo": 1})
    assert Params4bit().shape == (0,)


def test_merging_into_a_layer():
    _, layer = quantized()
    old = layer.weight
    attributes = {**old.__dict__, "bnb_quantized": False}
    merged = torch.randn(48, 96)
    layer.weight = Params4bit(merged, requires_grad=False, **attributes).to(old.device)
    assert layer.weight.module is layer
    assert layer.quant_state is layer.weight.quant_state
    torch.testing.assert_close(layer.dequantize(), ref.quantize_4bit(merged, "nf4", nested=True).values)
    # A float weight that was assigned is not read with the state of the one before.
    layer.weight = Params4bit(merged, quant_type="nf4")
    with pytest.raises(RuntimeError, match="not quantized yet"):
        layer(torch.randn(1, 96))


@pytest.mark.parametrize("nested", [False, True])
def test_from_prequantized(nested):
    _, layer = quantized(compress_statistics=nested)
    saved = layer.state_dict()
    other = LinearNF4(96, 48, device="meta")
    saved.pop("bias")
    data = saved.pop("weight")
    before = dict(saved)
    param = Params4bit.from_prequantized(data=data, quantized_stats=saved, device="cpu", module=other)
    assert saved.keys() == before.keys()
    assert (param.bnb_quantized, param.quant_type, param.compress_statistics) == (True, "nf4", nested)
    assert param.quant_state == layer.quant_state
    assert other.quant_state is param.quant_state
    assert param.module is other
    with pytest.raises(ValueError, match="weight: 100 elements"):
        Params4bit.from_prequantized(data=data[:100], quantized_stats=saved)
    with pytest.raises(ValueError, match="missing absmax"):
        Params4bit.from_prequantized(data=data, quantized_stats={k: v for k, v in saved.items() if "absmax" not in k})


def test_attributes_of_the_state_are_the_parameters():
    """Code that walks the dotted keys of a state dict finds their tensors."""
    _, layer = quantized()
    for key, value in layer.state_dict().items():
        found = layer
        for part in key.split("."):
            found = getattr(found, part)
        assert torch.equal(bytes_of(found), bytes_of(value)), key
    weight = layer.weight
    assert weight.code is weight.quant_map is weight.quant_state.code
    assert weight.offset is weight.nested_offset
    assert (weight.nested_blocksize, weight.nested_dtype) == (256, torch.float32)
    fresh = Params4bit(torch.randn(4, 4))
    for name in ("absmax", "nested_absmax", "state2", "anything"):
        assert not hasattr(fresh, name)
    with pytest.raises(AttributeError, match="'Params4bit' object has no attribute 'absmax'"):
        _ = fresh.absmax


def test_shards_stay_parameters():
    _, layer = quantized(quant_storage=torch.float32)
    weight = layer.weight
    for shards in (torch.chunk(weight, 4), torch.split(weight, 144), weight.chunk(4), weight.split(144)):
        assert len(shards) == 4
        assert all(type(s) is Params4bit and s.quant_state is weight.quant_state for s in shards)
        whole = torch.cat([s.flatten() for s in shards]).view(-1, 1)
        assert torch.equal(bytes_of(whole), bytes_of(weight))
        assert torch.equal(F.dequantize_4bit(whole, weight.quant_state), layer.dequantize())
    # Everything else gives plain tensors.
    for other in (weight.view(-1), weight[1:], weight + 1, weight.detach(), weight.t(), weight.clone()):
        assert type(other) is torch.Tensor


@pytest.mark.parametrize("quantize", [False, True])
def test_copies_of_a_parameter(quantize):
    param = Params4bit(torch.randn(16, 32), quant_type="nf4")
    if quantize:
        param = param.to("cpu")
    shallow, deep, pickled = copy.copy(param), copy.deepcopy(param), pickle.loads(pickle.dumps(param))
    buffer = io.BytesIO()
    torch.save(param, buffer)
    loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    for other in (shallow, deep, pickled, loaded):
        # Where a real bitsandbytes has been imported, copies answer to its class too.
        assert portable(type(other)) is Params4bit
        assert other.__dict__.keys() == param.__dict__.keys()
        assert torch.equal(other.data, param.data)
        assert other.quant_state == param.quant_state
        assert (other.quant_type, other.bnb_quantized, other.requires_grad) == ("nf4", quantize, False)
    assert shallow.data_ptr() == param.data_ptr()
    assert shallow.quant_state is param.quant_state
    for other in (deep, pickled, loaded):
        assert other.data_ptr() != param.data_ptr()
        assert other.quant_state is not param.quant_state or not quantize


# ---- the module owns its state ---------------------------------------------------------------------------------------


def test_bare_parameters_will_do():
    _, layer = quantized(quant_storage=torch.bfloat16)
    x = torch.randn(2, 96)
    expected, keys = layer(x), layer.state_dict().keys()
    layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)
    assert type(layer.weight) is torch.nn.Parameter
    assert torch.equal(layer(x), expected)
    saved = layer.state_dict()
    assert saved.keys() == keys
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert torch.equal(layer.to("cpu").to(torch.bfloat16)(x), layer(x))
    layer.load_state_dict(saved)
    other = Linear4bit(96, 48, quant_type="nf4", quant_storage=torch.bfloat16)
    other.load_state_dict(saved)
    assert torch.equal(other.weight.data.view(torch.uint8), layer.weight.data.view(torch.uint8))
    # Or a plain tensor in its place.
    packed = layer.weight.data
    del layer.weight
    layer.weight = packed
    layer(x)


def test_a_state_that_the_weight_lost_is_given_back():
    for module, x in ((quantized()[1], torch.randn(2, 96)), (EmbeddingNF4(9, 8).to("cpu"), torch.arange(9))):
        expected = module(x)
        module.weight.quant_state = None
        assert torch.equal(module(x), expected)
        assert module.weight.quant_state is module.quant_state is not None


def test_functional_call():
    _, layer = quantized()
    x, bias = torch.randn(2, 96), torch.randn(48)
    packed, state = F.quantize_4bit(torch.randn(48, 96), quant_type="nf4", compress_statistics=True)
    expected = torch.nn.functional.linear(x, layer.dequantize(), bias)
    torch.testing.assert_close(torch.func.functional_call(layer, {"bias": bias}, (x,)), expected)
    # Other bytes in the same state.
    y = torch.func.functional_call(layer, {"weight": packed}, (x,))
    torch.testing.assert_close(
        y, torch.nn.functional.linear(x, F.dequantize_4bit(packed, layer.quant_state), layer.bias)
    )
    assert isinstance(layer.weight, Params4bit)
    grad = torch.func.grad(lambda b: torch.func.functional_call(layer, {"bias": b}, (x,)).sum())(bias)
    torch.testing.assert_close(grad, torch.full((48,), 2.0))
    assert state.nested


def test_copies_of_a_module():
    _, layer = quantized()
    pair = torch.nn.Sequential(layer, LinearFP4(48, 3).to("cpu"))
    x = torch.randn(2, 96)
    buffer = io.BytesIO()
    torch.save(pair, buffer)
    copies = (
        copy.deepcopy(pair),
        pickle.loads(pickle.dumps(pair)),
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=False),
    )
    for other in copies:
        assert torch.equal(other(x), pair(x))
        for a, b in zip(other, pair, strict=True):
            assert a.weight.module is a
            assert a.quant_state is a.weight.quant_state
            assert a.quant_state is not b.quant_state
            assert a.weight.data_ptr() != b.weight.data_ptr()


def test_a_deleted_module_frees_its_memory_at_once():
    layer = quantized()[1]
    gone = weakref.ref(layer), weakref.ref(layer.quant_state)
    gc.disable()
    try:
        del layer
        assert gone[0]() is None
        assert gone[1]() is None
    finally:
        gc.enable()


def test_moving_a_module():
    _, layer = quantized(quant_storage=torch.float32, dtype=torch.bfloat16)
    x = torch.randn(2, 96)
    before, state = bytes_of(layer.weight), layer.quant_state
    expected = layer(x)
    for cast in (torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.float, torch.nn.Module.double):
        cast(layer)
        assert torch.equal(bytes_of(layer.weight), before)
        assert layer.quant_state == state
    layer.bfloat16()
    assert torch.equal(layer(x), expected)
    # Away, and back with nothing in it.
    keys = layer.state_dict()
    weight = layer.weight
    layer.to("meta")
    assert isinstance(layer.weight, Params4bit)
    assert weight.device.type == "cpu"
    assert {t.device.type for t in layer.quant_state.tensors()} == {"meta"}
    assert layer(x.to("meta")).shape == (2, 48)
    layer.to_empty(device="cpu")
    assert {t.device.type for t in layer.quant_state.tensors()} == {"cpu"}
    layer.load_state_dict(keys)
    assert torch.equal(layer(x), expected)
    # The parameter by itself keeps the state for when its bytes come back, as offloading does.
    parked = layer.weight.to("meta")
    assert parked.quant_state.absmax.device.type == "cpu"
    back = Params4bit(layer.weight.data, requires_grad=False, **parked.__dict__).to("cpu")
    assert back.quant_state == layer.quant_state


def test_shared_memory_is_shared_whole():
    layer = quantized()[1].share_memory()
    assert layer.weight.is_shared()
    assert all(t.is_shared() for t in (layer.quant_state.absmax, layer.quant_state.state2.absmax))


def test_tied_weights_stay_tied():
    table = EmbeddingNF4(20, 96)
    head = LinearNF4(96, 20, bias=False, compress_statistics=False)
    head.weight = table.weight
    model = torch.nn.ModuleDict({"table": table, "head": head}).to("cpu")
    assert model["head"].weight is model["table"].weight
    model.to("cpu").half()
    torch.testing.assert_close(model["head"].dequantize(), model["table"].dequantize(), rtol=0, atol=0)
    assert torch.equal(head(torch.eye(96)).T, table(torch.arange(20)))


# ---- state dicts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_strict_round_trip(storage, quant_type, nested, bias, tmp_path):
    from safetensors.torch import load_file, save_file

    kwargs = {"quant_type": quant_type, "compress_statistics": nested, "quant_storage": storage, "bias": bias}
    for n, k in ((48, 96), (5, 33)):
        _, layer = quantized(n, k, dtype=torch.bfloat16, **kwargs)
        saved = layer.state_dict()
        assert saved.keys() == keys_of(quant_type, nested, bias)
        assert all(type(value) is torch.Tensor for value in saved.values())
        save_file(saved, tmp_path / "layer.safetensors")
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        for state_dict in (
            saved,
            load_file(tmp_path / "layer.safetensors"),
            torch.load(io.BytesIO(buffer.getvalue()), weights_only=True),
        ):
            fresh, meta = Linear4bit(k, n, **kwargs), Linear4bit(k, n, **kwargs, device="meta")
            parameter = fresh.weight
            assert str(fresh.load_state_dict(state_dict)) == "<All keys matched successfully>"
            assert fresh.weight is parameter
            assert str(meta.load_state_dict(state_dict, assign=True)) == "<All keys matched successfully>"
            used = copy.deepcopy(layer)
            torch.nn.init.zeros_(used.weight.data)
            used.load_state_dict(state_dict)
            for other in (fresh, meta, used):
                if bias:
                    other.bias.data = other.bias.data.to(torch.bfloat16)
                same_layer(other, layer)
                assert other.weight.module is other
                assert other.state_dict().keys() == saved.keys()
        # What was copied is one's own, what was assigned is not.
        assert fresh.weight.data_ptr() != state_dict["weight"].data_ptr()
        assert meta.weight.data_ptr() == state_dict["weight"].data_ptr()


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_dense_weight_quantizes_it(assign):
    dense = torch.nn.Linear(96, 48, dtype=torch.bfloat16)
    for layer in (LinearNF4(96, 48), LinearNF4(96, 48).to("cpu"), LinearNF4(96, 48, device="meta")):
        if layer.weight.is_meta and not assign:
            # Of the bias, torch itself only warns.
            with pytest.warns(UserWarning, match="no-op"), pytest.raises(RuntimeError, match="assign=True"):
                layer.load_state_dict(dense.state_dict())
            continue
        layer.load_state_dict(dense.state_dict(), assign=assign)
        expected = ref.quantize_4bit(dense.weight, "nf4", nested=True)
        assert torch.equal(layer.weight.data.view(-1), expected.packed)
        # As of any module: its own dtype, or with `assign` what it is given.
        assert layer.quant_state.dtype == (torch.bfloat16 if assign else torch.float32)
        assert layer.bias.dtype == (torch.bfloat16 if assign else torch.float32)


def test_loading_inside_a_model_and_in_parts():
    model = torch.nn.ModuleDict({"a": quantized()[1], "b": torch.nn.Sequential(EmbeddingFP4(10, 24).to("cpu"))})
    saved = model.state_dict()
    other = torch.nn.ModuleDict({"a": LinearNF4(96, 48), "b": torch.nn.Sequential(EmbeddingFP4(10, 24))})
    other.load_state_dict(saved)
    same_layer(other["a"], model["a"])
    assert torch.equal(other["b"][0](torch.arange(10)), model["b"][0](torch.arange(10)))
    # Without the weight nothing changes, and strict says which is missing.
    part = {key: value for key, value in saved.items() if not key.startswith("a.weight")}
    result = other.load_state_dict(part, strict=False)
    assert result.missing_keys == ["a.weight"]
    assert result.unexpected_keys == []
    same_layer(other["a"], model["a"])
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "a.weight"'):
        other.load_state_dict(part)
    result = other.load_state_dict({**saved, "a.weight.extra": torch.ones(1), "c": torch.ones(1)}, strict=False)
    assert sorted(result.unexpected_keys) == ["a.weight.extra", "c"]


def without(saved, *keys):
    return {key: value for key, value in saved.items() if key not in keys}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "weight.absmax"), "weight: quant state: missing absmax"),
        (lambda s: without(s, "weight"), "weight: missing, but its state is there: weight.absmax"),
        (lambda s: without(s, "weight.nested_absmax"), "missing nested_absmax"),
        (lambda s: {"weight": s["weight"], "bias": s["bias"]}, "its state is missing: weight.absmax, weight.quant_map"),
        (lambda s: {**s, "weight": s["weight"][:7]}, "7 elements of torch.uint8 do not hold 4608 values"),
        (lambda s: {**s, "weight": s["weight"].int()}, "dtype torch.int32"),
        (lambda s: {**s, "weight.absmax": s["weight.absmax"][:7]}, "7 scales do not fit"),
        (lambda s: quantized(48, 95)[1].state_dict(), r"holds a weight \[48, 95\], the module has \[48, 96\]"),
        (lambda s: quantized(quant_type="fp4")[1].state_dict(), "is of quant_type 'fp4', the module of 'nf4'"),
        (lambda s: {"weight": torch.randn(48, 95)}, r"is torch.float32 \[48, 95\]; expected a weight \[48, 96\]"),
        (lambda s: {"weight": torch.randn(48, 96).double()}, "is torch.float64"),
        (lambda s: {"weight": 1}, "weight: is int"),
        (lambda s: {"weight": torch.empty(48, 96, device="meta")}, "nothing to quantize"),
    ],
)
def test_what_disagrees_is_said(change, message, strict):
    """Whether strict or not: a weight without its state would be garbage."""
    saved = quantized()[1].state_dict()
    for layer in (LinearNF4(96, 48), quantized()[1]):
        before = bytes_of(layer.weight)
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(change(dict(saved)), strict=strict)
        assert torch.equal(bytes_of(layer.weight), before)


def test_another_kind_of_scales_is_adopted():
    """The state describes itself: nesting and block size are those that were saved."""
    for nested in (False, True):
        _, layer = quantized(compress_statistics=nested)
        other = LinearNF4(96, 48, compress_statistics=not nested)
        other.load_state_dict(layer.state_dict())
        same_layer(other, layer)
        assert other.weight.compress_statistics is nested


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("storage", STORAGES[2:5] + STORAGES[:1], ids=str)
def test_interchange_with_bitsandbytes(storage, quant_type, nested):
    bnb = pytest.importorskip("bitsandbytes")
    kwargs = {"quant_type": quant_type, "compress_statistics": nested, "quant_storage": storage}
    # Rows of whole blocks: bitsandbytes' CPU code starts a block with every row, its CUDA code does not.
    dense = torch.nn.Linear(128, 64, dtype=torch.bfloat16)
    theirs = bnb.nn.Linear4bit(128, 64, **kwargs)
    theirs.load_state_dict(dense.state_dict())
    theirs = theirs.to("cpu")
    saved = theirs.state_dict()
    ours = Linear4bit(128, 64, **kwargs)
    ours.load_state_dict(saved)
    dequantized = bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    torch.testing.assert_close(ours.dequantize(), dequantized, rtol=0, atol=0 if not nested else 1e-7)
    written = ours.state_dict()
    assert written.keys() == saved.keys()
    for key, value in saved.items():
        assert written[key].dtype == value.dtype
        assert written[key].shape == value.shape or "quant_state" in key
        if "quant_state" not in key:
            assert torch.equal(bytes_of(written[key]), bytes_of(value)), key
    # And back: what is ours, in theirs.
    mine = Linear4bit(128, 64, **kwargs)
    mine.load_state_dict(dense.state_dict())
    parts = dict(mine.state_dict())
    parts.pop("bias")
    param = bnb.nn.Params4bit.from_prequantized(
        data=parts.pop("weight"), quantized_stats=parts, device="cpu", requires_grad=False
    )
    again = bnb.functional.dequantize_4bit(param.data, param.quant_state)
    torch.testing.assert_close(again, mine.dequantize(), rtol=0, atol=0 if not nested else 1e-7)


# ---- embeddings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("dim", [64, 65, 1, 128, 96, 200])
def test_embedding(dim, storage):
    for quant_type in ("nf4", "fp4"):
        table = Embedding4bit(30, dim, quant_type=quant_type, quant_storage=storage)
        dense = table.weight.detach().clone()
        table = table.to("cpu")
        assert torch.equal(table.dequantize(), ref.quantize_4bit(dense, quant_type).values)
        for indices in (
            torch.arange(30),
            torch.randint(0, 30, (2, 3, 4)),
            torch.tensor([29, 0, 29], dtype=torch.int32),
            torch.tensor(7),
            torch.empty(0, 3, dtype=torch.long),
            torch.randint(0, 30, (6, 4)).t(),
        ):
            assert torch.equal(table(indices), torch.nn.functional.embedding(indices.long(), table.dequantize()))
        for bad in (30, -1):
            with pytest.raises(IndexError, match=f"indices must be from 0 to 29, got {bad}"):
                table(torch.tensor([0, bad]))
        with pytest.raises(TypeError, match=r"indices: dtype torch.float32"):
            table(torch.tensor([1.0]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_embedding_is_saved_and_loaded(dtype):
    for kind, quant_type in ((EmbeddingNF4, "nf4"), (EmbeddingFP4, "fp4")):
        table = kind(30, 40, dtype=dtype).to("cpu")
        saved = table.state_dict()
        assert saved.keys() == keys_of(quant_type, nested=False, bias=False)
        for other in (kind(30, 40, dtype=dtype), kind(30, 40, dtype=dtype, device="meta")):
            other.load_state_dict(saved, assign=other.weight.is_meta)
            assert torch.equal(other(torch.arange(30)), table(torch.arange(30)))
            assert other(torch.arange(3)).dtype == dtype
        dense = torch.nn.Embedding(30, 40, dtype=dtype)
        table.load_state_dict(dense.state_dict())
        assert torch.equal(table.dequantize(), ref.quantize_4bit(dense.weight, quant_type).values)


# ---- whole models ----------------------------------------------------------------------------------------------------


def tiny_llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            layer = LinearNF4(module.in_features, module.out_features, bias=module.bias is not None)
            layer.load_state_dict(module.state_dict())
            model.set_submodule(name, layer)
    return model


@needs_compiler
def test_training_step_of_a_compiled_llama():
    """No graph break, sizes that change, and the gradients of the eager step."""
    torch._dynamo.reset()
    model = tiny_llama()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) < len(list(model.parameters()))
    products = []

    def backend(graph, inputs):
        products.append(sum("halfbyte.linear_4bit" in str(node.target) for node in graph.graph.nodes))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for batch, length in ((2, 8), (3, 5)):
        tokens = torch.randint(0, 64, (batch, length))
        results = []
        for step in (model, compiled):
            model.zero_grad()
            loss = step(input_ids=tokens, labels=tokens).loss
            loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in trained)])
        torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)
    assert set(products) == {14}


def test_training_reduces_the_loss_and_leaves_the_weights():
    model = tiny_llama()
    packed = {n: bytes_of(p) for n, p in model.named_parameters() if isinstance(p, Params4bit)}
    assert len(packed) == 14
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.randint(0, 64, (4, 16))
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, param in model.named_parameters():
        if name in packed:
            assert torch.equal(bytes_of(param), packed[name])
            assert param.grad is None


def checkpointing(forward, reentrant):
    def run(hidden, **kwargs):
        return checkpoint(lambda hidden: forward(hidden, **kwargs), hidden, use_reentrant=reentrant)

    return run


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_a_model(reentrant):
    model = tiny_llama()
    tokens = torch.randint(0, 64, (2, 8))
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            for layer in model.model.layers:
                layer.forward = checkpointing(layer.forward, reentrant)
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_threads_share_a_module():
    _, layer = quantized(256, 512, dtype=torch.bfloat16)
    inputs = [torch.randn(1 + 3 * i, 512) for i in range(8)]
    expected = [layer(x).detach() for x in inputs]
    failures = []

    def work(i):
        for _ in range(25):
            x = inputs[i].clone().requires_grad_()
            y = layer(x)
            y.sum().backward()
            if not torch.equal(y, expected[i]) or x.grad is None:
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_state_from_elsewhere_is_read_through_the_parameter():
    """A hand-made state, with its own parts assigned."""
    packed, state = F.quantize_4bit(torch.randn(48, 96), quant_type="nf4", blocksize=32)
    layer = LinearNF4(96, 48, bias=False)
    layer.weight = Params4bit(packed, quant_state=state, blocksize=32, quant_type="nf4", bnb_quantized=True)
    x = torch.randn(2, 96)
    torch.testing.assert_close(layer(x), x @ F.dequantize_4bit(packed, state).T)
    layer.weight.quant_state = QuantState(state.absmax * 2, state.shape, state.code, 32, "nf4", torch.float32)
    torch.testing.assert_close(layer(x), 2 * x @ F.dequantize_4bit(packed, state).T)


def test_attributes_of_a_packed_weight_with_dense_numbers_are_quantized_again():
    """As some merges of PEFT hand them over: `bnb_quantized` says yes, and the data is the new dense weight."""
    old = Params4bit(torch.randn(32, 64), quant_type="nf4").to("cpu")
    dense = torch.randn(32, 64)
    new = Params4bit(dense, **old.__dict__).to("cpu")
    assert new.dtype is torch.uint8
    assert new.bnb_quantized
    expected, _ = F.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
    assert torch.equal(new.data, expected)
    # Packed bytes in a float dtype are bytes all the same.
    stored = Params4bit(torch.randn(32, 64), quant_type="nf4", quant_storage=torch.float32).to("cpu")
    again = Params4bit(stored.data, **stored.__dict__)
    assert again.bnb_quantized
    assert torch.equal(again.data.view(torch.uint8), stored.data.view(torch.uint8))


def test_packed_bytes_without_their_state_are_not_quantized():
    layer = Linear4bit(64, 32, bias=False)
    packed = Params4bit(torch.randn(32, 64)).to("cpu")
    weight = Params4bit(packed.data.float(), module=layer)
    with pytest.raises(ValueError, match=r"shape \[1024, 1\] is not the layer's \[32, 64\].*load_quantized"):
        weight.to("cpu")
    assert not weight.bnb_quantized
