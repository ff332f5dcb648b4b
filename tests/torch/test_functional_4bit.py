"""`halfbyte.functional`, 4 bits: the bits of every path, products, threads."""

from __future__ import annotations

import json
import threading

import fresh
import halfbyte
import pytest
import torch
import torch_reference as ref
from functional_cases import BLOCK_SIZES, FLOATS, GOLDEN, STORAGES, bytes_of
from halfbyte import functional as F
from halfbyte.state import QuantState
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open


def golden_cases() -> list[dict]:
    with safe_open(GOLDEN, "pt") as file:
        return json.loads(file.metadata()["cases"])


CASES = golden_cases()


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


@settings(max_examples=150)
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


def unaligned(tensor):
    """The same values at an odd address, as in a mapped file whose header has an odd length."""
    memory = torch.empty(tensor.nbytes + 16, dtype=torch.uint8).numpy()
    start = 1 - memory.ctypes.data % 2
    values = memory[start : start + tensor.nbytes].view(tensor.numpy().dtype).reshape(tensor.shape)
    moved = torch.from_numpy(values).copy_(tensor)
    assert moved.data_ptr() % 2
    return moved


@pytest.mark.parametrize("nested", [False, True])
def test_unaligned_tensors_are_read(nested):
    weight, x, bias = torch.randn(32, 64), torch.randn(3, 64), torch.randn(32)
    packed, state = F.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    again, moved = F.quantize_4bit(unaligned(weight), quant_type="nf4", compress_statistics=nested)
    assert torch.equal(again, packed)
    moved = moved.map(unaligned)
    assert torch.equal(F.dequantize_4bit(packed, moved), F.dequantize_4bit(packed, state))
    out = unaligned(torch.zeros(32, 64))
    assert F.dequantize_4bit(packed, state, out=out) is out
    assert torch.equal(out, F.dequantize_4bit(packed, state))
    for _ in range(2):  # the second product goes a shorter way
        want = halfbyte.matmul_4bit(x, packed.t(), state, bias=bias)
        assert torch.equal(halfbyte.matmul_4bit(unaligned(x), packed.t(), moved, bias=unaligned(bias)), want)
        assert torch.equal(halfbyte.matmul_4bit(unaligned(x), packed.t(), state, bias=bias), want)
    for function in (F.quantize_blockwise, F.int8_vectorwise_quant):
        assert torch.equal(function(unaligned(weight))[0], function(weight)[0])


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
    fresh.passes(code)
