"""`halfbyte.functional`: bits against golden vectors of bitsandbytes on CUDA and a slow reference; what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import halfbyte
import pytest
import torch
import torch_reference as ref
from halfbyte import functional as F
from halfbyte.state import QuantState
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

GOLDEN = Path(__file__).parents[1] / "golden" / "blockwise4.safetensors"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
STORAGES = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def golden_cases() -> list[dict]:
    with safe_open(GOLDEN, "pt") as file:
        return json.loads(file.metadata()["cases"])


CASES = golden_cases()


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


# ---- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", range(len(CASES)))
def test_golden(k):
    case = CASES[k]
    with safe_open(GOLDEN, "pt") as file:
        stored = {
            name.removeprefix(f"c{k:03d}."): file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118
            if name.startswith(f"c{k:03d}.")
        }
    tensor = stored["input"]
    packed, state = F.quantize_4bit(
        tensor, blocksize=case["blocksize"], compress_statistics=case["nested"], quant_type=case["quant_type"]
    )
    saved = state.as_dict(packed=True)
    assert {f"weight.{key}" for key in saved} == {key for key in stored if key.startswith("weight.")}

    # CUDA's reciprocal is an approximation: 18 FP4 codes of all the files' are one rank off.
    differ = int((packed != stored["weight"]).sum())
    assert packed.shape == stored["weight"].shape
    assert differ == 0 if case["quant_type"] == "nf4" else differ <= 18
    if not case["nested"]:
        assert torch.equal(state.absmax, stored["weight.absmax"])
    else:
        assert torch.equal(state.absmax, stored["weight.absmax"])
        assert torch.equal(state.state2.code, stored["weight.nested_quant_map"])
        torch.testing.assert_close(state.state2.absmax, stored["weight.nested_absmax"], rtol=1e-6, atol=0)
    assert torch.equal(state.code, stored["weight.quant_map"])

    # What CUDA wrote is read as CUDA reads it, to the bit.
    theirs = QuantState.from_dict({key: v for key, v in stored.items() if key.startswith("weight.")})
    assert torch.equal(bytes_of(F.dequantize_4bit(stored["weight"], theirs)), bytes_of(stored["dequantized"]))
    key = f"quant_state.bitsandbytes__{case['quant_type']}"
    ours, wrote = (json.loads(bytes(t.tolist())) for t in (saved[key], stored[f"weight.{key}"]))
    for name in ours.keys() | wrote.keys():
        if name == "nested_offset":
            assert ours[name] == pytest.approx(wrote[name], rel=2e-7)
        else:
            assert ours[name] == wrote[name]


@st.composite
def tensors(draw):
    """Any shape, dtype, stride and storage offset, of ordinary and of extreme numbers."""
    shape = draw(st.lists(st.integers(0, 19), min_size=0, max_size=3))
    dtype = draw(st.sampled_from(FLOATS))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    scale = draw(st.sampled_from([1.0, 1e-4, 300.0, 0.0]))
    offset = draw(st.integers(0, 3))
    base = torch.randn(sum([1, *shape]) + offset + 4 * max(1, torch.Size(shape).numel()), generator=generator)
    base = (base * scale).to(dtype)
    kind = draw(st.sampled_from(["contiguous", "offset", "strided", "transposed", "expanded"]))
    n = torch.Size(shape).numel()
    if kind == "contiguous":
        return base[:n].clone().view(shape)
    if kind == "offset":
        return base[offset:][:n].view(shape)
    if kind == "strided":
        return base[offset:][: 3 * n : 3].view(shape) if n else base[:0].view(shape)
    if kind == "transposed" and len(shape) > 1:
        return base[:n].view(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
    if kind == "expanded" and shape:
        return base[: shape[-1]].expand(shape)
    return base[:n].view(shape)


@settings(max_examples=150, deadline=None)
@given(tensors(), st.sampled_from(["nf4", "fp4"]), st.sampled_from(BLOCK_SIZES[:4]), st.booleans())
def test_bits_are_the_references(tensor, quant_type, blocksize, nested):
    expected = ref.quantize_4bit(tensor, quant_type, blocksize, nested and tensor.numel() > 0)
    packed, state = F.quantize_4bit(
        tensor, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested and tensor.numel() > 0
    )
    assert torch.equal(packed.view(-1), expected.packed)
    assert torch.equal(bytes_of(state.absmax), bytes_of(expected.absmax))
    assert (state.shape, state.dtype, state.blocksize) == (tensor.shape, tensor.dtype, blocksize)
    if expected.absmax2 is not None:
        assert torch.equal(state.state2.absmax, expected.absmax2)
        assert state.offset.item() == expected.offset
    again = F.dequantize_4bit(packed, state)
    assert again.shape == tensor.shape
    assert again.dtype == tensor.dtype
    assert torch.equal(bytes_of(again), bytes_of(expected.values))


@pytest.mark.parametrize("blocksize", BLOCK_SIZES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_block_size(quant_type, blocksize):
    tensor = torch.randn(3, 2 * blocksize + 5)
    expected = ref.quantize_4bit(tensor, quant_type, blocksize, nested=True)
    packed, state = F.quantize_4bit(tensor, blocksize=blocksize, quant_type=quant_type, compress_statistics=True)
    assert torch.equal(packed.view(-1), expected.packed)
    assert torch.equal(F.dequantize_4bit(packed, state), expected.values)


@pytest.mark.parametrize("shape", [(64, 64), (1, 1), (3, 5), (7, 9), (0, 4), (5, 0), (1, 33)])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_storage_is_a_view_of_the_same_bytes(storage, shape):
    tensor = torch.randn(shape)
    plain, state = F.quantize_4bit(tensor, quant_type="nf4")
    packed, same = F.quantize_4bit(tensor, quant_type="nf4", quant_storage=storage)
    assert packed.dtype == storage
    assert packed.shape == (-(-plain.numel() // storage.itemsize), 1)
    flat = bytes_of(packed)
    assert torch.equal(flat[: plain.numel()], plain.view(-1))
    assert not flat[plain.numel() :].any()
    assert state == same
    assert torch.equal(F.dequantize_4bit(packed, same), F.dequantize_4bit(plain, state))


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_named_forms(name):
    tensor = torch.randn(6, 50)
    for given_ in ({}, {"blocksize": 128}, {"compress_statistics": True}, {"quant_storage": torch.float16}):
        packed, state = getattr(F, f"quantize_{name}")(tensor, **given_)
        same, same_state = F.quantize_4bit(tensor, quant_type=name, **given_)
        assert torch.equal(bytes_of(packed), bytes_of(same))
        assert state == same_state
        again = getattr(F, f"dequantize_{name}")(packed, state)
        assert torch.equal(again, F.dequantize_4bit(packed, state))


def test_arguments_to_write_to():
    tensor = torch.randn(6, 50)
    expected, state = F.quantize_4bit(tensor, quant_type="nf4")
    # Also where the memory is not contiguous.
    for out in (torch.empty_like(expected), torch.empty(2 * len(expected), 1, dtype=torch.uint8)[::2]):
        absmax = torch.empty_like(state.absmax)
        packed, other = F.quantize_4bit(tensor, absmax=absmax, out=out, quant_type="nf4")
        assert packed is out
        assert other.absmax is absmax
        assert torch.equal(packed, expected)
        assert other == state
    for out in (torch.empty(6, 50), torch.empty(50, 6).t()):
        assert F.dequantize_4bit(packed, state, out=out) is out
        assert torch.equal(out, F.dequantize_4bit(packed, state))
    # Without a state, `absmax` and `out` say what it would.
    out = torch.empty(6, 50, dtype=torch.bfloat16)
    F.dequantize_4bit(packed, absmax=state.absmax, out=out, quant_type="nf4")
    assert torch.equal(out, F.dequantize_4bit(packed, state).to(torch.bfloat16))
    # Transposed codes are those of a transposed weight.
    assert torch.equal(F.dequantize_4bit(packed.t(), state), F.dequantize_4bit(packed, state).t())


def test_results_need_no_gradient():
    for storage in (torch.uint8, torch.float32):
        packed, state = F.quantize_4bit(torch.randn(8, 8, requires_grad=True), quant_storage=storage)
        assert not packed.requires_grad
        assert not state.absmax.requires_grad
        assert not F.dequantize_4bit(packed, state).requires_grad


def test_what_is_not_finite_is_logged(caplog):
    tensor = torch.randn(4, 64)
    F.quantize_4bit(tensor)
    assert not caplog.records
    tensor[1, 2] = torch.inf
    packed, state = F.quantize_4bit(tensor, quant_type="nf4")
    assert "contains NaN or Inf" in caplog.text
    again = F.dequantize_4bit(packed, state)
    assert torch.isfinite(again[[0, 2, 3]]).all()


# ---- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 64, 64), (4, 7, 65), (33, 128, 96), (1, 1, 1), (2, 3, 130)])
def test_matmul(m, n, k, dtype, quant_type, nested):
    weight = torch.randn(n, k, dtype=dtype)
    x = torch.randn(m, k, dtype=dtype)
    bias = torch.randn(n, dtype=dtype)
    packed, state = F.quantize_4bit(weight, quant_type=quant_type, compress_statistics=nested)
    dense = ref.quantize_4bit(weight, quant_type, nested=nested).values
    for b in (None, bias):
        y = halfbyte.matmul_4bit(x, packed, state, bias=b)
        assert y.dtype == dtype
        error = (y.double() - ref.linear(x, dense, b)).abs()
        # The core may keep more of the weight than its dtype holds.
        assert (error <= 2 * ref.product_bound(x, dense, b)).all()
    # One row by the other name, codes transposed as old callers have them, and into a given tensor.
    out = torch.empty(1, n, dtype=dtype)
    assert F.gemv_4bit(x[:1], packed.t(), out=out, state=state) is out
    torch.testing.assert_close(out, halfbyte.matmul_4bit(x[:1], packed, state), rtol=0, atol=0)


def test_matmul_of_a_weight_quantized_the_other_way_round():
    weight = torch.randn(64, 96)
    x = torch.randn(5, 64, requires_grad=True)
    bias = torch.randn(96, requires_grad=True)
    packed, state = F.quantize_4bit(weight, quant_type="nf4")
    with pytest.warns(DeprecationWarning, match="out_features, in_features"):
        y = halfbyte.matmul_4bit(x, packed, state, bias=bias)
    dense = F.dequantize_4bit(packed, state)
    torch.testing.assert_close(y, x @ dense + bias)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(5, 96) @ dense.T)
    torch.testing.assert_close(bias.grad, torch.full((96,), 5.0))


# ---- 8 bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("blocksize", [64, 256, 4096, 100, 16384])
def test_blockwise_8bit(blocksize, dtype, nested):
    tensor = torch.randn(30, 701, dtype=dtype)
    codes, state = F.quantize_blockwise(tensor, blocksize=blocksize, nested=nested)
    assert codes.shape == tensor.shape
    assert codes.dtype == torch.uint8
    again = F.dequantize_blockwise(codes, state)
    assert again.dtype == dtype
    error = (again - tensor).abs().float()
    assert error.mean() < 0.02
    read = QuantState.from_dict(state.as_dict())
    assert torch.equal(F.dequantize_blockwise(codes, read), again)
    if not nested:
        same = F.dequantize_blockwise(codes, absmax=state.absmax, blocksize=blocksize)
        assert same.dtype == torch.float32
        assert torch.equal(same.to(dtype), again)


def test_blockwise_8bit_of_less_than_a_block():
    tensor, blocksize = torch.randn(3, 70), 10**12
    codes, state = F.quantize_blockwise(tensor, blocksize=blocksize)
    expected, _ = F.quantize_blockwise(tensor, blocksize=tensor.numel())
    assert state.absmax.tolist() == [tensor.abs().max().item()]
    assert torch.equal(codes, expected)
    values = F.dequantize_blockwise(codes, state)
    assert torch.equal(values, F.dequantize_blockwise(codes, absmax=state.absmax, blocksize=tensor.numel()))


@pytest.mark.parametrize("count", [1, 2, 16, 255, 256])
@pytest.mark.parametrize("shuffled", [False, True])
def test_blockwise_8bit_codes_of_any_map_are_the_nearest(count, shuffled):
    code = torch.linspace(-1, 1, count)
    if shuffled:
        code = code[torch.randperm(count)]
    tensor = torch.cat([torch.ones(1), torch.rand(999) * 2 - 1])
    codes, state = F.quantize_blockwise(tensor, code=code, blocksize=1000)
    assert codes.dtype == torch.uint8
    assert codes.int().max() < count
    assert torch.equal(state.code, code)
    distance = (tensor[:, None] - code[None]).abs()
    torch.testing.assert_close(distance.gather(1, codes.long()[:, None])[:, 0], distance.min(1).values)
    assert torch.equal(F.dequantize_blockwise(codes, state), code[codes.long()])
    assert torch.equal(F.dequantize_blockwise(codes, absmax=state.absmax, code=code), code[codes.long()])


def test_blockwise_8bit_codes_are_the_nearest():
    tensor = torch.cat([torch.ones(1), torch.rand(4000) * 2 - 1, torch.zeros(7)])
    for code in (F.create_dynamic_map(), F.create_dynamic_map(signed=False), F.create_linear_map(),
                 F.create_fp8_map()):  # fmt: skip
        exact = (tensor[:, None] - code[None]).abs().min(1).values
        for blocksize in (4096, 5000):
            codes, state = F.quantize_blockwise(tensor, code=code, blocksize=blocksize)
            assert state.absmax.tolist() == [1.0]
            found = (F.dequantize_blockwise(codes, state) - tensor).abs()
            assert (found <= exact + 1e-7).all()


def test_other_block_sizes_use_the_same_arithmetic():
    tensor = torch.randn(96, 64)
    native, _ = F.quantize_blockwise(tensor, blocksize=64)
    # Blocks of 96 that hold 64 values and zeros have the same scales.
    wide, state = F.quantize_blockwise(torch.nn.functional.pad(tensor, (0, 32)), blocksize=96)
    assert torch.equal(wide[:, :64], native)
    assert len(state.absmax) == 96


def test_blockwise_8bit_writes_where_asked():
    tensor = torch.randn(10, 30)
    codes, state = F.quantize_blockwise(tensor, blocksize=64)
    out, absmax = torch.empty(10, 30, dtype=torch.uint8), torch.empty_like(state.absmax)
    same, other = F.quantize_blockwise(tensor, absmax=absmax, out=out, blocksize=64)
    assert same is out
    assert other.absmax is absmax
    assert torch.equal(out, codes)
    values = torch.empty(30, 10).t()
    assert F.dequantize_blockwise(codes, state, out=values) is values
    assert torch.equal(values, F.dequantize_blockwise(codes, state))


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


# ---- bad input -------------------------------------------------------------------------------------------------------

X = torch.randn(8, 64)
PACKED, STATE = F.quantize_4bit(X, quant_type="nf4")


def state_with(**changes):
    fields = {name: getattr(STATE, name) for name in ("absmax", "shape", "code", "blocksize", "quant_type", "dtype")}
    return QuantState(**{**fields, **changes})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: F.quantize_4bit(X, blocksize=63), ValueError, "blocksize: 63 is not one of 32, 64, 128"),
        (lambda: F.quantize_4bit(X, blocksize=64.0), TypeError, "blocksize: 64.0"),
        (lambda: F.quantize_4bit(X, blocksize=True), TypeError, "blocksize: True"),
        (lambda: F.quantize_4bit(X, quant_type="nf5"), ValueError, "quant_type: 'nf5' is not one of 'nf4', 'fp4'"),
        (lambda: F.quantize_4bit(X, quant_type=4), TypeError, "quant_type: 4"),
        (lambda: F.quantize_4bit(X, quant_storage=torch.int16), ValueError, "quant_storage: torch.int16"),
        (lambda: F.quantize_4bit(X, quant_storage="uint8"), TypeError, "quant_storage: 'uint8'"),
        (lambda: F.quantize_4bit(X.double()), TypeError, "dtype torch.float64 is not one of torch.float16"),
        (lambda: F.quantize_4bit(X.int()), TypeError, "dtype torch.int32"),
        (lambda: F.quantize_4bit([1.0]), TypeError, "A: list is not a torch.Tensor"),
        (lambda: F.quantize_4bit(X.to_sparse()), TypeError, "layout torch.sparse_coo"),
        (lambda: F.quantize_4bit(X, out=torch.empty(3, 1, dtype=torch.uint8)), ValueError, r"out: is .*\[3, 1\]"),
        (lambda: F.quantize_4bit(X, out=torch.empty(256, 1)), TypeError, "out: is torch.float32"),
        (lambda: F.quantize_4bit(X, absmax=torch.empty(9)), ValueError, r"absmax: is .*\[9\].*expected.*\[8\]"),
        (lambda: F.dequantize_4bit(PACKED), ValueError, "absmax and out must be given"),
        (
            lambda: F.dequantize_4bit(PACKED, {}),
            TypeError,
            "quant_state must be a QuantState from .*, got dict",
        ),
        (lambda: F.dequantize_4bit(PACKED[:-1], STATE), ValueError, "packed: 255 elements of torch.uint8 do not hold"),
        (lambda: F.dequantize_4bit(PACKED.int(), STATE), TypeError, "packed: dtype torch.int32"),
        (lambda: F.dequantize_4bit(PACKED, state_with(absmax=torch.ones(7))), ValueError, "absmax: 7 scales"),
        (lambda: F.dequantize_4bit(PACKED, state_with(absmax=torch.ones(8).int())), TypeError, "absmax: dtype"),
        (lambda: F.dequantize_4bit(PACKED, state_with(dtype=torch.float64)), TypeError, "quant_state.dtype: dtype"),
        (lambda: F.dequantize_4bit(PACKED, state_with(shape=None)), ValueError, "quant_state: has no shape"),
        (lambda: F.dequantize_4bit(PACKED, state_with(quant_type="nf3")), ValueError, "quant_type: 'nf3'"),
        (lambda: F.dequantize_4bit(PACKED, STATE, out=torch.empty(8, 63)), ValueError, r"out: shape \[8, 63\]"),
        (lambda: F.dequantize_4bit(PACKED, STATE, out=torch.empty(8, 64).half()), TypeError, "out: dtype"),
        (lambda: F.dequantize_4bit(PACKED.to("meta"), STATE), ValueError, "absmax: is on cpu, but packed is on meta"),
        (lambda: halfbyte.matmul_4bit(X, PACKED, None), TypeError, "quant_state: NoneType"),
        (lambda: halfbyte.matmul_4bit([], PACKED, STATE), TypeError, "A: list"),
        (lambda: halfbyte.matmul_4bit(X[:, 1:], PACKED, STATE), ValueError, "does not end with in_features, 64"),
        (lambda: halfbyte.matmul_4bit(X.double(), PACKED, STATE), TypeError, "x: dtype torch.float64"),
        (lambda: halfbyte.matmul_4bit(X.long(), PACKED, STATE), TypeError, "x: dtype torch.int64"),
        (lambda: halfbyte.matmul_4bit(torch.tensor(1.0), PACKED, STATE), ValueError, "in_features"),
        (lambda: halfbyte.matmul_4bit(X, PACKED, state_with(shape=(4, 2, 64))), ValueError, "quant_state.shape"),
        (lambda: halfbyte.matmul_4bit(X, PACKED, STATE, bias=torch.ones(7)), ValueError, r"bias: shape \[7\]"),
        (lambda: halfbyte.matmul_4bit(X.to("meta"), PACKED, STATE), ValueError, "is on cpu, but x is on meta"),
        (lambda: F.gemv_4bit(X, PACKED), ValueError, "state must be a QuantState"),
        (lambda: F.quantize_blockwise(X, blocksize=0), ValueError, "blocksize: 0"),
        (lambda: F.quantize_blockwise(X, blocksize=6.4), TypeError, "blocksize: 6.4"),
        (lambda: F.quantize_blockwise(X.int()), TypeError, "A: dtype torch.int32"),
        (lambda: F.quantize_blockwise(X, code=torch.ones(0)), ValueError, "code: 0 elements"),
        (lambda: F.quantize_blockwise(X, code=torch.ones(257)), ValueError, "code: 257 elements"),
        (lambda: F.quantize_blockwise(X, code=torch.full((16,), torch.nan)), ValueError, "256 finite values"),
        (lambda: F.dequantize_blockwise(PACKED), ValueError, "absmax must be given"),
        (lambda: F.dequantize_blockwise(X, absmax=torch.ones(1)), TypeError, "codes: dtype torch.float32"),
        (lambda: F.dequantize_blockwise(PACKED, absmax=torch.ones(2)), ValueError, "absmax: 2 scales"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_fuzzed_views_never_leave_their_memory(data):
    """Any view of the right or the wrong size: the reference's result, or a Python error."""
    base = torch.randint(0, 256, (600,), dtype=torch.uint8)
    storage = data.draw(st.sampled_from(STORAGES))
    start, step = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 3))
    start -= start % storage.itemsize
    view = base[start : start + 512].view(storage)[::step]
    view = view[: data.draw(st.integers(0, len(view)))]
    shape = data.draw(st.tuples(st.integers(0, 17), st.integers(0, 30)))
    blocksize = data.draw(st.sampled_from(BLOCK_SIZES[:3]))
    n = shape[0] * shape[1]
    blocks = -(-n // blocksize) + data.draw(st.sampled_from([0, 0, 0, 1, -1]))
    absmax = torch.rand(2 * max(blocks, 0) + 1)[1::2][: max(blocks, 0)]
    state = QuantState(absmax, shape, None, blocksize, "nf4", torch.float32)
    fits = len(absmax) == -(-n // blocksize) and view.numel() == -(-((n + 1) // 2) // storage.itemsize)
    if not fits:
        with pytest.raises(ValueError, match=r"packed|absmax"):
            F.dequantize_4bit(view, state)
        return
    values = F.dequantize_4bit(view, state)
    same = F.dequantize_4bit(bytes_of(view)[: (n + 1) // 2].clone(), state)
    assert torch.equal(values, same)


def test_threads_share_everything():
    """Eight threads quantize and dequantize at once, and all get the bits that one gets."""
    tensors_ = [torch.randn(64, 128 + i) for i in range(8)]
    expected = [F.quantize_4bit(t, quant_type="nf4", compress_statistics=True) for t in tensors_]
    failures: list[str] = []

    def work(i):
        for _ in range(40):
            packed, state = F.quantize_4bit(tensors_[i], quant_type="nf4", compress_statistics=True)
            if not (torch.equal(packed, expected[i][0]) and state == expected[i][1]):
                failures.append(f"quantize {i}")
            if not torch.equal(F.dequantize_4bit(packed, state), F.dequantize_4bit(*expected[i])):
                failures.append(f"dequantize {i}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_threads_follow_torch():
    code = (
        "import torch; from halfbyte import _native; from halfbyte.functional import quantize_4bit\n"
        "for n in (1, 2, 3):\n"
        "    torch.set_num_threads(n); quantize_4bit(torch.ones(8)); assert _native.get_threads() == n, n\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- rows of LLM.int8() ----------------------------------------------------------------------------------------------


def test_golden_rows():
    with safe_open(GOLDEN.with_name("int8.safetensors"), "pt") as file:
        names = {name.partition(".")[0] for name in file.keys() if name.startswith("r")}  # noqa: SIM118
        assert names
        for name in names:
            values, codes, scales, dense = (
                file.get_tensor(f"{name}.{part}") for part in ("input", "CB", "SCB", "dequantized")
            )
            ours, stats, columns = F.int8_vectorwise_quant(values)
            assert torch.equal(ours, codes)
            assert torch.equal(stats, scales.view(-1))
            assert columns is None
            again = F.int8_vectorwise_dequant(codes, scales.view(-1))
            assert torch.equal(again.to(dense.dtype), dense)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_outlier_columns(dtype):
    values = torch.randn(2, 4, 50).to(dtype)
    values[0, 1, 7], values[1, 3, 40] = 8.0, -9.0
    codes, scales, columns = F.int8_vectorwise_quant(values, threshold=6.0)
    assert columns.tolist() == [7, 40]
    assert not codes[..., [7, 40]].any()
    kept = values.masked_fill(values.abs() >= 6, 0).float()
    assert torch.equal(scales, kept.abs().amax(-1).view(-1))
    expected = (kept * 127 / scales.view(2, 4, 1)).round().to(torch.int8)
    expected[..., [7, 40]] = 0
    assert torch.equal(codes, expected)
    assert values[0, 1, 7] == 8.0
    again = F.int8_vectorwise_dequant(codes, scales.half())
    torch.testing.assert_close(again.view(-1, 50), codes.view(-1, 50) * (scales.half().float()[:, None] / 127))
    assert F.int8_vectorwise_quant(values, threshold=20.0)[2].tolist() == []
    assert F.int8_vectorwise_quant(values[0, 1], threshold=6.0)[2].tolist() == [7]
    assert F.int8_vectorwise_quant(values[:, :, :0], threshold=6.0)[0].shape == (2, 4, 0)
    strided = values.transpose(0, 2)
    for a, b in zip(F.int8_vectorwise_quant(strided), F.int8_vectorwise_quant(strided.contiguous()), strict=True):
        assert a is b is None or torch.equal(a, b)


def test_what_rows_refuse():
    with pytest.raises(TypeError, match=r"A: dtype torch.int64 is not one of torch.float16"):
        F.int8_vectorwise_quant(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"A: shape \[\] has no rows"):
        F.int8_vectorwise_quant(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"threshold must be at least 0 .* got -1"):
        F.int8_vectorwise_quant(torch.ones(2, 2), threshold=-1)
    codes, scales, _ = F.int8_vectorwise_quant(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"stats: 1 scales do not fit; A \[2, 2\] has 2 rows"):
        F.int8_vectorwise_dequant(codes, scales[:1])
    with pytest.raises(TypeError, match=r"A: dtype torch.uint8 is not torch.int8"):
        F.int8_vectorwise_dequant(codes.view(torch.uint8), scales)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.quantize_4bit(X.double()), "dtype torch.float64 is not one of"),
        (lambda: F.quantize_blockwise(X.double()), "A: dtype torch.float64"),
        (lambda: F.dequantize_blockwise(PACKED.view(torch.int8), absmax=torch.ones(1)), "codes: dtype torch.int8"),
        (lambda: halfbyte.matmul_4bit(X, PACKED, None), "quant_state: NoneType"),
    ],
)
def test_a_wrong_dtype_is_a_value_error_too(call, message):
    for kind in (TypeError, ValueError):
        with pytest.raises(kind, match=message):
            call()


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
