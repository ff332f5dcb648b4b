"""State dicts of `Linear8bitLt`: round trips, what disagrees, and exchange with bitsandbytes."""

from __future__ import annotations

import copy

import pytest
import torch
from halfbyte.nn import Linear8bitLt
from layers_8bit import THRESHOLDS, quantized, same_layer, trained


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_strict_round_trip(bias, assign, tmp_path):
    _, layer = quantized(bias=bias, threshold=6.0)
    saved = layer.state_dict()
    assert list(saved) == ["weight", *(["bias"] if bias else []), "SCB", "weight_format"]
    assert saved["weight_format"].dtype is torch.uint8
    assert saved["weight_format"].item() == 0
    torch.save(saved, tmp_path / "layer.pt")
    saved = torch.load(tmp_path / "layer.pt", weights_only=True)
    for device in ("cpu", "meta"):
        other = Linear8bitLt(96, 48, bias=bias, has_fp16_weights=False, threshold=6.0, device=device)
        for target in (other, quantized(bias=bias, threshold=6.0)[1]):
            if device == "meta" and not assign:
                continue
            found = target.load_state_dict(saved, strict=True, assign=assign)
            assert not found.missing_keys
            assert not found.unexpected_keys
            same_layer(target, layer)
            assert (target.weight.data_ptr() == saved["weight"].data_ptr()) is assign


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_dense_weight_quantizes_it(assign):
    dense, layer = quantized()
    for other in (Linear8bitLt(96, 48, has_fp16_weights=False), quantized()[1]):
        other.load_state_dict(dense.state_dict(), strict=True, assign=assign)
        same_layer(other, layer)


def test_loading_inside_a_model_and_in_parts():
    model = torch.nn.Sequential(quantized()[1], quantized(96, 48)[1])
    other = torch.nn.Sequential(quantized()[1], quantized(96, 48)[1])
    other.load_state_dict(model.state_dict(), strict=True)
    same_layer(model[1], other[1])
    bias = torch.randn(48)
    found = model.load_state_dict({"0.bias": bias}, strict=False)
    assert torch.equal(model[0].bias, bias)
    assert set(found.missing_keys) == {"0.weight", "1.weight", "1.bias"}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"0.SCBs"'):
        model.load_state_dict({**other.state_dict(), "0.SCBs": bias})


SAVED = {
    "weight": torch.zeros(48, 96, dtype=torch.int8),
    "SCB": torch.ones(48),
    "weight_format": torch.tensor(0, dtype=torch.uint8),
    "bias": torch.ones(48),
}


def without(*keys):
    return {key: value for key, value in SAVED.items() if key not in keys}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (without("SCB"), r"SCB: missing, but weight is torch.int8; expected float32 \[48\]"),
        (without("weight"), "weight: missing, but given are SCB, weight_format"),
        ({**SAVED, "SCB": torch.ones(47)}, "SCB: 47 scales do not fit; weight has 48 rows"),
        ({**SAVED, "SCB": torch.ones(48).half()}, "SCB: dtype torch.float16 is not torch.float32"),
        ({**SAVED, "SCB": 3}, "SCB: int is not a torch.Tensor"),
        ({**SAVED, "weight": torch.zeros(48, 96).int()}, "weight: dtype torch.int32 is not torch.int8, or one of"),
        ({**SAVED, "weight": torch.zeros(48, 95).to(torch.int8)}, r"weight: shape \[48, 95\] is not .* \[48, 96\]"),
        (
            {**SAVED, "weight": torch.zeros(48, 96)},
            "SCB: given, but weight is torch.float32; scales belong",
        ),
        ({**SAVED, "weight_format": torch.tensor(2)}, "weight_format: 2 is not 0, codes row by row"),
        ({**SAVED, "weight": [0]}, "weight: list is not a torch.Tensor"),
        ({**SAVED, "bias": torch.ones(47)}, "size mismatch for bias"),
    ],
)
def test_what_disagrees_is_said_and_nothing_changes(entries, message, strict):
    _, layer = quantized()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(entries, strict=strict)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_codes_are_not_loaded_into_a_weight_that_is_trained():
    layer = trained()
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"weight: dtype torch.int8, but has_fp16_weights is True"):
        layer.load_state_dict(SAVED)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_interchange_with_bitsandbytes(threshold):
    bnb = pytest.importorskip("bitsandbytes")
    dense, ours = quantized(threshold=threshold)
    theirs = bnb.nn.Linear8bitLt(96, 48, has_fp16_weights=False, threshold=threshold)
    theirs.load_state_dict(dense.state_dict())
    theirs = theirs.to("cpu").eval()
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    assert torch.equal(mine["SCB"], other["SCB"])
    # It multiplies by a reciprocal, which moves what lies in the middle between two codes.
    differences = (mine["weight"].int() - other["weight"].int()).abs()
    assert differences.max() <= 1
    assert differences.sum() <= 5
    x = (torch.randn(5, 96) * 3).half()
    again = quantized(threshold=threshold)[1]
    again.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(again(x), theirs(x), rtol=4e-3, atol=8e-3)
    theirs = bnb.nn.Linear8bitLt(96, 48, has_fp16_weights=False, threshold=threshold).to("cpu").eval()
    theirs.load_state_dict(mine, strict=True)
    torch.testing.assert_close(ours(x), theirs(x), rtol=4e-3, atol=8e-3)
