"""`Params4bit`: quantized once, moved, merged, split and copied."""

from __future__ import annotations

import copy
import io
import pickle

import halfbyte.functional as F
import pytest
import torch
import torch_reference as ref
from halfbyte.nn import Linear4bit, LinearNF4, Params4bit
from halfbyte.nn._joint import portable
from halfbyte.state import QuantState
from packed_layers import bytes_of, quantized


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
