"""Maps and `QuantState`: their values, their form in a state dict, and what is refused."""

from __future__ import annotations

import json

import halfbyte
import pytest
import torch
from halfbyte import functional as F
from halfbyte.state import QuantState

# ---- maps ------------------------------------------------------------------------------------------------------------


def test_maps():
    assert torch.equal(F.create_dynamic_map(), torch.tensor(halfbyte._native.dynamic_map()))
    # The general construction gives the built-in map too.
    signed = F.create_dynamic_map(True, 7, 8)
    for bits in range(2, 9):
        for code in (F.create_linear_map(True, bits), F.create_fp8_map(True, -(-bits // 2), bits // 2 - 1, bits),
                     F.create_dynamic_map(True, bits, bits)):  # fmt: skip
            assert code.shape == (256,)
            assert code.dtype == torch.float32
            # The middle of evenly spaced values is zero up to how it was rounded.
            assert code.diff().min() >= -1e-7
            assert code.max() == 1.0
            assert torch.unique(code).numel() in (2**bits, 2**bits - 1)
    assert torch.equal(signed, F.create_dynamic_map())
    # Where values are missing there are zeros in the middle, whether that ascends or not.
    few = F.create_linear_map(False, 3)
    torch.testing.assert_close(few, torch.tensor([0, 1 / 7, 2 / 7, 3 / 7, *[0.0] * 248, 4 / 7, 5 / 7, 6 / 7, 1]))
    unsigned = F.create_dynamic_map(signed=False)
    assert unsigned.min() == 0
    assert torch.unique(unsigned).numel() == 256
    nf4 = F.create_normal_map()
    torch.testing.assert_close(nf4[nf4 != 0], F.get_4bit_type("nf4")[F.get_4bit_type("nf4") != 0])
    assert F.create_normal_map(use_extra_value=False).unique().numel() == 15
    with pytest.raises(ValueError, match=r"total_bits must be .* got 8"):
        F.create_fp8_map(True, 5, 3, 8)


def test_4bit_types():
    for name in ("nf4", "fp4"):
        code = F.get_4bit_type(name)
        assert code.tolist() == halfbyte._native.codebook(name)
    assert F.get_4bit_type("int4").tolist()[:2] == pytest.approx([1, 6 / 7])
    assert F.get_4bit_type("af4").abs().max() == 1
    for bad in ({"typename": "nf5"}, {"typename": "af4", "blocksize": 128}):
        with pytest.raises(NotImplementedError, match=r"nf5|128"):
            F.get_4bit_type(**bad)


# ---- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_state_round_trip(packed, nested):
    tensor = torch.randn(70, 30, dtype=torch.bfloat16)
    codes, state = F.quantize_4bit(tensor, quant_type="nf4", compress_statistics=nested, blocksize=32)
    saved = state.as_dict(packed=packed)
    if packed:
        assert all(isinstance(value, torch.Tensor) for value in saved.values())
    before = dict(saved)
    again = QuantState.from_dict(saved, device="cpu")
    assert saved.keys() == before.keys()
    assert again == state
    assert torch.equal(F.dequantize_4bit(codes, again), F.dequantize_4bit(codes, state))
    prefixed = QuantState.from_dict({f"model.layers.0.weight.{key}": value for key, value in saved.items()})
    assert prefixed == state
    # Attributes are assignable, and the operations use what was assigned.
    again.absmax, again.nested, again.state2, again.offset = torch.ones(66), False, None, None
    assert F.dequantize_4bit(codes, again).abs().max() == 1
    assert again != state
    assert state.bitsandbytes__nf4.dtype == torch.uint8
    with pytest.raises(AttributeError, match="bitsandbytes__fp4"):
        _ = state.bitsandbytes__fp4
    assert state[0] is state.absmax
    assert state[5] == "nf4"


def damaged(change):
    _, state = F.quantize_4bit(torch.randn(70, 30), quant_type="nf4", compress_statistics=True)
    saved = state.as_dict(packed=True)
    change(saved)
    return saved


def set_json(saved, **fields):
    key = "quant_state.bitsandbytes__nf4"
    scalars = json.loads(bytes(saved[key].tolist()))
    scalars.update(fields)
    saved[key] = torch.tensor(list(json.dumps({k: v for k, v in scalars.items() if v != "drop"}).encode()),
                              dtype=torch.uint8)  # fmt: skip


JSON_KEY = "quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("absmax"), "missing absmax"),
        (lambda s: s.pop("nested_absmax"), "missing nested_absmax"),
        (lambda s: s.pop("nested_quant_map"), "missing nested_quant_map"),
        (lambda s: s.pop(JSON_KEY), "missing quant_state.bitsandbytes__nf4 or quant_state.bitsandbytes__fp4"),
        (lambda s: s.update({"quant_state.bitsandbytes__fp4": s[JSON_KEY]}), "exactly one of"),
        (lambda s: s.update({"quant_state.bitsandbytes__fp4": s.pop(JSON_KEY)}), "says quant_type 'nf4'"),
        (lambda s: s.update({"quant_state.bitsandbytes__nf5": s.pop(JSON_KEY)}), "exactly one of"),
        (lambda s: s.update({JSON_KEY: s[JSON_KEY][:-4]}), "not the JSON"),
        (lambda s: s.update({JSON_KEY: torch.full((9,), 255, dtype=torch.uint8)}), "not the JSON"),
        (lambda s: s.update({JSON_KEY: torch.tensor([91, 93], dtype=torch.uint8)}), "JSON list"),
        (lambda s: s.update({JSON_KEY: s[JSON_KEY].float()}), "float32, expected the torch.uint8"),
        (lambda s: s.update({"absmax": 3}), "absmax: is int"),
        (lambda s: s.update({"scale": torch.ones(1)}), "unknown scale"),
        (lambda s: set_json(s, blocksize=63), "blocksize: 63 is not one of 32, 64"),
        (lambda s: set_json(s, blocksize="drop"), "missing blocksize"),
        (lambda s: set_json(s, dtype="float8"), "dtype: 'float8' is not one of"),
        (lambda s: set_json(s, shape=[-1, 3]), "shape: "),
        (lambda s: set_json(s, shape="70,30"), "shape: '70,30'"),
        (lambda s: set_json(s, nested_blocksize=128), "nested_blocksize: 128 is not 256"),
        (lambda s: set_json(s, nested_offset="1"), "nested_offset: '1' is not a number"),
        (lambda s: s.update({"nested_quant_map": torch.linspace(-1, 1, 256)}), "not the signed 8-bit dynamic map"),
    ],
)
def test_damaged_states_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        QuantState.from_dict(damaged(change))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_scales_of_another_dtype_are_read_as_they_were_rounded(nested, dtype):
    weight, x = torch.randn(64, 64), torch.randn(2, 64)
    packed, state = F.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    rounded = state.map(torch.clone)
    if nested:
        state.offset, state.state2.absmax = state.offset.to(dtype), state.state2.absmax.to(dtype)
        rounded.offset = rounded.offset.to(dtype).float()
        rounded.state2.absmax = rounded.state2.absmax.to(dtype).float()
    else:
        state.absmax = state.absmax.to(dtype)
        rounded.absmax = rounded.absmax.to(dtype).float()
    assert torch.equal(F.dequantize_4bit(packed, state), F.dequantize_4bit(packed, rounded))
    assert torch.equal(halfbyte.matmul_4bit(x, packed, state), halfbyte.matmul_4bit(x, packed, rounded))
    stored = {key: value.to(dtype) if value.is_floating_point() else value for key, value in
              rounded.as_dict(packed=True).items() if "absmax" in key or "quant_state" in key}  # fmt: skip
    stored |= {key: value for key, value in rounded.as_dict(packed=True).items() if "map" in key}
    assert torch.equal(
        F.dequantize_4bit(packed, halfbyte.functional.QuantState.from_dict(stored)), F.dequantize_4bit(packed, rounded)
    )


@pytest.mark.parametrize("nested", [False, True])
def test_negative_scales_are_legal(nested):
    weight, x = torch.randn(64, 64), torch.randn(2, 64)
    packed, state = F.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    dense = F.dequantize_4bit(packed, state)
    if nested:
        state.offset, state.state2.absmax = -state.offset, -state.state2.absmax
    else:
        state.absmax = -state.absmax
    assert torch.equal(F.dequantize_4bit(packed, state), -dense)
    torch.testing.assert_close(halfbyte.matmul_4bit(x, packed, state), -x @ dense.T)
    codes, state = F.quantize_blockwise(weight)
    state.absmax = -state.absmax
    torch.testing.assert_close(F.dequantize_blockwise(codes, state), -weight, atol=0.05, rtol=0.05)


def test_states_are_equal_up_to_1e_6():
    _, state = F.quantize_4bit(torch.rand(64, 64), quant_type="nf4", compress_statistics=True)
    other = state.map(torch.clone)
    other.offset = other.offset + 5e-7
    assert state == other
    other.offset = other.offset + 5e-6
    assert state != other
    other = state.map(torch.clone)
    other.absmax[0] ^= 1
    assert state != other
