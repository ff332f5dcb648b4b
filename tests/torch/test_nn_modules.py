"""Packed modules, held to what a PyTorch user expects of any module: state, copies, moves, sharing."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import halfbyte.functional as F
import torch
from halfbyte.nn import EmbeddingNF4, Linear4bit, LinearFP4, LinearNF4, Params4bit
from packed_layers import bytes_of, quantized


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
