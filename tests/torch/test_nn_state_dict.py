"""State dicts of packed modules: saved, loaded, refused, and exchanged with bitsandbytes."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch_reference as ref
from halfbyte.nn import EmbeddingFP4, Linear4bit, LinearNF4
from packed_layers import STORAGES, bytes_of, keys_of, quantized


def same_layer(a, b):
    x = torch.randn(3, a.in_features)
    assert a.weight.dtype == b.weight.dtype
    assert torch.equal(bytes_of(a.weight), bytes_of(b.weight))
    assert a.quant_state == b.quant_state
    assert torch.equal(a(x), b(x))


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
