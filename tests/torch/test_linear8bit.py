"""`halfbyte.nn`: modules whose weights have rows of 8 bits, held to what a PyTorch user expects of any module."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
import warnings
import weakref
from pathlib import Path

import halfbyte
import pytest
import torch
from compilers import needs_compiler
from halfbyte.nn import Embedding8bit, Int8Params, Linear8bitLt
from halfbyte.nn._joint import portable
from halfbyte.nn.int8_params import quantize_weight
from halfbyte.ops.checks import DTypeError
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint

ops = torch.ops.halfbyte
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
THRESHOLDS = (0.0, 6.0)
GOLDEN = Path(__file__).parents[1] / "golden" / "int8.safetensors"
NAN, INF = float("nan"), float("inf")


def quantized(n=48, k=96, *, bias=True, threshold=0.0, dtype=torch.float32):
    """A dense layer, and the quantized one of the same weight."""
    dense = torch.nn.Linear(k, n, bias=bias, dtype=dtype)
    layer = Linear8bitLt(k, n, bias=bias, has_fp16_weights=False, threshold=threshold, device="meta")
    layer.load_state_dict(dense.state_dict(), assign=True)
    return dense, layer


def trained(n=48, k=96, threshold=0.0):
    layer = Linear8bitLt(k, n, threshold=threshold)
    assert layer.state.has_fp16_weights
    assert layer.weight.requires_grad
    return layer


def same_layer(a, b):
    x = torch.randn(3, a.in_features)
    assert torch.equal(a.weight, b.weight)
    assert torch.equal(a.weight.SCB, b.weight.SCB)
    assert torch.equal(a.state.SCB, b.state.SCB)
    assert torch.equal(a(x), b(x))


# ---- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_golden_layer(threshold):
    with safe_open(GOLDEN, "pt") as file:
        entry = {key.removeprefix(f"l8.{threshold}."): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    saved = {key.removeprefix("sd."): value for key, value in entry.items() if key.startswith("sd.")}
    dense = {"weight": entry["l8.weight"], "bias": entry["l8.bias"]}
    n, k = dense["weight"].shape
    made = Linear8bitLt(k, n, has_fp16_weights=False, threshold=threshold)
    made.load_state_dict(dense)
    assert torch.equal(made.weight.SCB, saved["SCB"])
    # The GPU's approximate reciprocal puts two values below the middle between two codes, where they are exactly.
    exact = dense["weight"].double() * 127 / saved["SCB"].double()[:, None]
    differs = saved["weight"] != made.weight.CB
    assert differs.sum() == 2
    assert torch.equal((exact - saved["weight"])[differs], torch.tensor([0.5, 0.5], dtype=torch.float64))
    read = Linear8bitLt(k, n, has_fp16_weights=False, threshold=threshold)
    read.load_state_dict(saved, strict=True)
    assert {name: value.dtype for name, value in read.state_dict().items()} == {
        name: torch.float32 if name == "bias" else value.dtype for name, value in saved.items()
    }
    x, y = entry["x"], entry["y"]
    assert (x.abs() >= 6.0).any()
    for layer in (made, read):
        assert layer(x).dtype is torch.float16
        # bitsandbytes rounds to float16 before it adds what the outliers have, and the bias.
        torch.testing.assert_close(layer(x), y, rtol=2e-3, atol=4e-3)


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_forward_and_backward(dtype, threshold, caplog):
    dense, layer = quantized(threshold=threshold)
    x = (torch.randn(2, 3, 96) * 2).to(dtype)
    x[0, 0, 5] = 9.0
    x.requires_grad_()
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings():
        warnings.simplefilter("error")
        y = layer(x)
        (gx, gb) = torch.autograd.grad(y, (x, layer.bias), torch.ones_like(y))
    assert not caplog.records
    assert y.dtype is dtype
    assert torch.equal(y, ops.linear_8bit(x.detach(), layer.weight.data, layer.weight.SCB, layer.bias.data, threshold))
    torch.testing.assert_close(y.float(), dense(x.float()), rtol=0.05, atol=0.15)
    torch.testing.assert_close(gx, torch.ones_like(y) @ layer.dequantize(dtype))
    torch.testing.assert_close(gb, torch.full((48,), 6.0))
    assert not layer.weight.requires_grad
    assert layer.state.is_training
    layer.eval()(x)
    assert not layer.state.is_training


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_output_has_the_inputs_dtype_under_autocast(threshold):
    _, layer = quantized(threshold=threshold)
    x = torch.randn(3, 96, requires_grad=True)
    y = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        z = layer(x)
    assert z.dtype is torch.float32
    assert torch.equal(y, z)
    z.sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(3, 96))


def test_a_float64_input_gives_a_float64_output():
    _, layer = quantized()
    x = torch.randn(3, 96, dtype=torch.float64)
    y = layer(x)
    assert y.dtype is torch.float64
    assert torch.equal(y, layer(x.float()).double())
    with pytest.raises(DTypeError, match=r"x: dtype torch.int64 is not one of .*, or torch.float64"):
        layer(x.long())


@pytest.mark.parametrize(("n", "k"), [(0, 8), (8, 0), (3, 5)])
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_layers_and_inputs_without_values(n, k, threshold):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        layer = Linear8bitLt(k, n, has_fp16_weights=False, threshold=threshold).to("cpu")
    for shape in ((0, k), (2, 0, k), (4, k), (k,)):
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        assert y.shape == (*shape[:-1], n)
        y.sum().backward()
        assert x.grad.shape == x.shape
    same = copy.deepcopy(layer)
    same.load_state_dict(layer.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"threshold": -1.0}, ValueError, r"threshold must be a number of at least 0 \(0 turns it off\), got -1.0"),
        ({"threshold": NAN}, ValueError, "threshold must be a number of at least 0 .*, got nan"),
        ({"threshold": "6"}, TypeError, "threshold must be a number of at least 0 .*, got '6'"),
    ],
)
def test_bad_construction(kwargs, error, message):
    with pytest.raises(error, match=message):
        Linear8bitLt(8, 8, **kwargs)


def test_an_unquantized_layer_says_so():
    for layer, x in (
        (Linear8bitLt(8, 8, has_fp16_weights=False), torch.randn(2, 8)),
        (Embedding8bit(8, 8), torch.tensor([1])),
    ):
        with pytest.raises(RuntimeError, match=f"{type(layer).__name__}: the weight is not quantized yet; move"):
            layer(x)
    assert "not quantized yet" in repr(Linear8bitLt(8, 8, has_fp16_weights=False))
    assert "threshold=6.0)" in repr(quantized(threshold=6.0)[1])


def test_codes_without_scales_are_refused():
    _, layer = quantized()
    layer.weight = Int8Params(layer.weight.data, requires_grad=False)
    with pytest.raises(RuntimeError, match=r"weight.SCB and state.SCB are None; expected float32 \[48\]"):
        layer(torch.randn(2, 96))
    layer.state.SCB = torch.ones(47)
    with pytest.raises(ValueError, match="scales: 47 scales do not fit; codes has 48 rows"):
        layer(torch.randn(2, 96))


def test_a_weight_that_is_tied_to_a_dense_one_is_multiplied_as_it_is():
    layer = Linear8bitLt(96, 48, has_fp16_weights=False, threshold=6.0)
    layer.weight = torch.nn.Parameter(torch.randn(48, 96))
    layer.to("cpu")
    x = torch.randn(3, 96)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    saved = layer.state_dict()
    assert list(saved) == ["weight", "bias"]
    layer.load_state_dict(saved, strict=True)
    with pytest.raises(RuntimeError, match="Loading a quantized checkpoint into non-quantized Linear8bitLt"):
        layer.load_state_dict({**saved, "SCB": torch.ones(48)}, strict=False)


# ---- weights that are trained ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_a_float_weight_is_trained(threshold):
    torch.manual_seed(0)
    layer, target = trained(threshold=threshold), torch.nn.Linear(96, 48)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    x = torch.randn(64, 96)
    losses = []
    for step in range(30):
        # Gradients that stay where they are, which bitsandbytes takes for an accumulation, change nothing.
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        loss = (layer(x) - target(x)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 20
    assert layer.weight.is_floating_point()
    assert list(layer.state_dict()) == ["weight", "bias"]
    # What is evaluated is the weight after the last step.
    codes, scales = quantize_weight(layer.weight.data)
    assert torch.equal(layer.eval()(x), ops.linear_8bit(x, codes, scales, layer.bias.data, threshold))
    before = layer.state.CB
    layer(x)
    assert layer.state.CB is before


def test_gradient_of_a_trained_weight_is_the_plain_products():
    layer, dense = trained(), torch.nn.Linear(96, 48)
    layer.load_state_dict(dense.state_dict(), strict=True)
    x = torch.randn(2, 3, 96)
    layer(x).square().sum().backward()
    y = layer(x)
    torch.testing.assert_close(layer.weight.grad, torch.einsum("abn,abk->nk", 2 * y, x))
    layer.load_state_dict({"weight": dense.weight * 2, "bias": dense.bias})
    torch.testing.assert_close(layer.eval()(x), dense(x) * 2 - dense.bias, rtol=0.05, atol=0.15)


def test_a_trained_layer_moves_and_casts():
    layer = trained().to("cpu").half().float()
    assert layer.weight.dtype is torch.float32
    assert isinstance(layer.weight, Int8Params)
    assert layer.weight.requires_grad
    x = torch.randn(3, 96)
    y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), y)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    z = compiled(x)
    assert torch.equal(y, z)
    assert torch.equal(torch.autograd.grad(y.sum(), layer.weight)[0], torch.autograd.grad(z.sum(), layer.weight)[0])


def test_matmul_keeps_codes_in_its_state():
    x, w = torch.randn(3, 96), torch.randn(48, 96)
    codes, scales = quantize_weight(w)
    want = ops.linear_8bit(x, codes, scales, None, 0.0)
    assert torch.equal(halfbyte.matmul(x, w), want)
    state = halfbyte.MatmulLtState()
    assert torch.equal(halfbyte.matmul(x, w, state=state, threshold=6.0), ops.linear_8bit(x, codes, scales, None, 6.0))
    assert state.threshold == 6.0
    assert torch.equal(state.CB, codes)
    state = halfbyte.MatmulLtState(CB=codes, SCB=scales)
    state.has_fp16_weights = False
    out = torch.empty(3, 48)
    assert halfbyte.matmul(x, codes, out, state=state) is out
    assert torch.equal(out, want)
    leaf = w.clone().requires_grad_()
    halfbyte.matmul(x, leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, x.sum(0).expand(48, 96))
    same = copy.deepcopy(state)
    assert same == state
    same.SCB = same.SCB * 2
    assert same != state
    state.reset_grads()
    assert state.CB is state.SCB is None
    with pytest.raises(ValueError, match=r"state.SCB: None, but B is int8"):
        halfbyte.matmul(x, codes, state=state)
    with pytest.raises(DTypeError, match=r"A: dtype torch.int64 is not one of"):
        halfbyte.matmul(x.long(), w)
    with pytest.raises(DTypeError, match=r"B: dtype torch.float64 is not torch.int8, or one of"):
        halfbyte.matmul(x, w.double())
    with pytest.raises(ValueError, match=r"threshold must be .*, got nan"):
        halfbyte.matmul(x, w, threshold=NAN)


# ---- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("move", [lambda p: p.to("cpu"), lambda p: p.cpu()])
def test_a_parameter_is_quantized_once_and_in_place(move):
    dense = torch.randn(8, 16)
    weight = Int8Params(dense.clone())
    assert weight.CB is None
    moved = move(weight)
    assert moved is weight
    assert move(weight) is weight
    codes, scales = ops.quantize_rows(dense.half())
    assert torch.equal(weight.data, codes)
    assert torch.equal(weight.CB, codes)
    assert torch.equal(weight.SCB, scales)
    assert not weight.requires_grad
    for cast in (weight.half(), weight.float(), weight.bfloat16(), weight.double(), weight.to(torch.float16)):
        assert cast is weight
    meta = weight.to("meta")
    assert meta.is_meta
    assert meta.dtype is torch.int8


def test_an_unquantized_parameter_can_be_cast():
    weight = Int8Params(torch.randn(8, 16), requires_grad=False)
    for dtype in FLOATS:
        cast = weight.to(dtype)
        assert isinstance(cast, Int8Params)
        assert cast.dtype is dtype
        assert cast.CB is None


@pytest.mark.parametrize(
    ("data", "kwargs", "error", "message"),
    [
        ([1.0], {}, TypeError, "data: list is not a torch.Tensor"),
        (torch.zeros(2, 2).int(), {}, DTypeError, r"data: dtype torch.int32 is not torch.int8 \(codes\), or one of"),
        (
            torch.zeros(2, 2).to(torch.int8),
            {"has_fp16_weights": True},
            ValueError,
            "has_fp16_weights: True, but data is",
        ),
        (torch.zeros(2, 2).to(torch.int8), {"SCB": torch.ones(3)}, ValueError, "SCB: 3 scales do not fit; data has 2"),
        (
            torch.zeros(2, 2).to(torch.int8),
            {"SCB": torch.ones(2).half()},
            DTypeError,
            "SCB: dtype torch.float16 is not",
        ),
    ],
)
def test_bad_parameters(data, kwargs, error, message):
    with pytest.raises(error, match=message):
        Int8Params(data, **kwargs)


@pytest.mark.parametrize("value", [NAN, INF, 70000.0])
def test_a_weight_that_cannot_be_quantized_is_named_and_nothing_changes(value):
    bad = torch.randn(48, 96)
    bad[3, 7] = value
    message = rf"weight: contains {value} at \[3, 7\]; legal are finite values of a magnitude of at most 65504"
    weight = Int8Params(bad.clone(), requires_grad=False)
    with pytest.raises(ValueError, match=message):
        weight.to("cpu")
    assert weight.dtype is torch.float32
    _, layer = quantized()
    before = copy.deepcopy(layer.state_dict())
    model = torch.nn.ModuleDict({"inner": layer})
    with pytest.raises(RuntimeError, match=f"inner.{message}"):
        model.load_state_dict({"inner.weight": bad, "inner.bias": torch.zeros(48)})
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])
    with pytest.raises(DTypeError, match=r"weight: dtype torch.float64 is not one of"):
        Int8Params(torch.zeros(2, 2, dtype=torch.float64), requires_grad=False).to("cpu")
    with pytest.raises(ValueError, match=r"weight: shape \[4\] is not \[out_features, in_features\]"):
        Int8Params(torch.zeros(4), requires_grad=False).to("cpu")


def test_constructor_takes_another_ones_attributes():
    weight = Int8Params(torch.randn(8, 16), requires_grad=False).to("cpu")
    again = Int8Params(weight.data, requires_grad=False, **weight.__dict__)
    assert again.SCB is weight.SCB
    # Scales do not belong to float numbers.
    fresh = Int8Params(torch.randn(8, 16), requires_grad=False, **weight.__dict__)
    assert fresh.SCB is None
    assert fresh.to("cpu").SCB.shape == (8,)
    # transformers takes attributes away.
    fresh.__dict__.pop("SCB")
    assert fresh.SCB is None


def test_copies_of_a_parameter():
    weight = Int8Params(torch.randn(8, 16), requires_grad=False).to("cpu")
    buffer = io.BytesIO()
    torch.save(weight, buffer)
    buffer.seek(0)
    for new in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), torch.load(buffer, weights_only=True)):
        # The joint class where something in this process has asked for it.
        assert portable(type(new)) is Int8Params
        assert torch.equal(new, weight)
        assert torch.equal(new.SCB, weight.SCB)
        assert new.data_ptr() != weight.data_ptr()
        assert new.has_fp16_weights is False
    shallow = copy.copy(weight)
    assert shallow.data_ptr() == weight.data_ptr()
    assert shallow.SCB is weight.SCB


# ---- modules ---------------------------------------------------------------------------------------------------------


def test_merging_into_a_layer():
    # As PEFT does it.
    _, layer = quantized()
    layer(torch.randn(2, 96))
    state = layer.state
    merged = layer.dequantize() + 0.5
    layer.weight = Int8Params(merged.to("cpu"), requires_grad=False, has_fp16_weights=False).to(layer.weight.device)
    state.reset_grads()
    x = torch.randn(3, 96)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, merged, layer.bias), rtol=0.05, atol=0.2)
    assert state.SCB is layer.weight.SCB


def test_bare_parameters_will_do():
    _, layer = quantized(threshold=6.0)
    x = torch.randn(3, 96) * 3
    y = layer(x)
    layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)
    assert torch.equal(layer(x), y)
    saved = copy.deepcopy(layer.state_dict())
    assert {"weight", "bias", "SCB", "weight_format"} == saved.keys()
    other = quantized(threshold=6.0)[1]
    other.load_state_dict(saved, strict=True)
    assert torch.equal(other(x), y)
    layer.load_state_dict(quantized()[1].state_dict(), strict=True)
    assert not torch.equal(layer(x), y)
    layer.load_state_dict(saved, strict=True)
    layer.double().to("cpu").float()
    assert torch.equal(copy.deepcopy(layer)(x), y)


def test_functional_call():
    _, layer = quantized()
    _, other = quantized()
    x = torch.randn(3, 96)
    y = torch.func.functional_call(layer, {"weight": other.weight, "bias": other.bias}, x)
    assert torch.equal(y, other(x))


def test_copies_of_a_module():
    _, layer = quantized(threshold=6.0)
    layer(torch.randn(2, 96))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    # Codes are kept once.
    assert len(pickle.dumps(layer)) < 1.6 * layer.weight.numel()
    assert len(buffer.getvalue()) < 1.6 * layer.weight.numel() + 4000
    buffer.seek(0)
    for new in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        same_layer(layer, new)
        assert new.state == layer.state
        assert new.state.CB.data_ptr() == new.weight.data_ptr() != layer.weight.data_ptr()
        new.weight.data.zero_()
        assert layer.weight.any()
    shallow = copy.copy(layer)
    assert shallow.weight is layer.weight


def test_a_deleted_module_frees_its_memory_at_once():
    _, layer = quantized()
    layer(torch.randn(2, 96))
    watched = weakref.ref(layer.weight)
    gc.disable()
    try:
        del layer
        assert watched() is None
    finally:
        gc.enable()


def test_moving_a_module():
    dense, layer = quantized(threshold=6.0)
    saved = copy.deepcopy(layer.state_dict())
    x = torch.randn(3, 96)
    y = layer(x)
    for move in (
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double(),
        lambda m: m.to("cpu").float(),
    ):
        layer = move(layer)
        assert layer.weight.dtype is torch.int8
        assert layer.weight.SCB.dtype is torch.float32
        assert layer.state.SCB is layer.weight.SCB
    assert torch.equal(layer.weight, saved["weight"])
    layer.load_state_dict(saved)
    assert torch.equal(layer(x), y)
    layer.to("meta")
    assert layer.weight.is_meta
    assert layer.state.SCB.is_meta
    assert layer(x.to("meta")).shape == (3, 48)
    with pytest.raises(RuntimeError, match=r"the module is on the meta device, and cannot hold torch.int8"):
        layer.load_state_dict(saved)
    layer.load_state_dict(saved, assign=True)
    assert torch.equal(layer(x), y)
    layer.to("meta").to_empty(device="cpu").load_state_dict(saved)
    assert torch.equal(layer(x), y)
    # A layer that is not quantized yet is, by the move to a device and by no cast.
    fresh = Linear8bitLt(96, 48, has_fp16_weights=False).half()
    assert fresh.weight.dtype is torch.float16
    fresh.weight.data.copy_(dense.weight)
    assert fresh.to("cpu").weight.dtype is torch.int8


# ---- state dicts -----------------------------------------------------------------------------------------------------


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


# ---- embeddings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_embedding(dtype):
    dense = torch.nn.Embedding(20, 33, dtype=dtype)
    table = Embedding8bit(20, 33, dtype=dtype)
    table.load_state_dict(dense.state_dict(), strict=True)
    indices = torch.tensor([[3, 19], [0, 3]])
    rows = table(indices)
    assert rows.dtype is dtype
    assert torch.equal(rows, table.dequantize(dtype)[indices])
    torch.testing.assert_close(rows, dense(indices), rtol=0.01, atol=0.03)
    assert torch.equal(table(indices.int()), rows)
    saved = table.state_dict()
    assert list(saved) == ["weight", "SCB", "weight_format"]
    other = Embedding8bit(20, 33, dtype=dtype).to("cpu")
    other.load_state_dict(saved, strict=True)
    for same in (other, copy.deepcopy(table), pickle.loads(pickle.dumps(table)), table.half().to("cpu")):
        assert torch.equal(same(indices), rows)
    compiled = torch.compile(table, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(indices), rows)


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_compiled_whole(threshold):
    model = torch.nn.Sequential(quantized(threshold=threshold)[1], torch.nn.GELU(), quantized(96, 48)[1])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for rows in (3, 5):
        x = torch.randn(rows, 96, requires_grad=True)
        y = compiled(x)
        assert torch.equal(y, model(x))
        assert torch.equal(*(torch.autograd.grad(m(x).sum(), x)[0] for m in (compiled, model)))


@needs_compiler
def test_compiled_with_inductor():
    _, layer = quantized(threshold=6.0)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(4, 96, requires_grad=True)
    y = compiled(x)
    assert torch.equal(y, layer(x))
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(4, 96))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("has_fp16_weights", [False, True])
def test_gradient_checkpointing(has_fp16_weights, reentrant):
    layer = trained(96, 96, 6.0) if has_fp16_weights else quantized(96, 96, threshold=6.0)[1]
    model = torch.nn.Sequential(layer, torch.nn.ReLU(), copy.deepcopy(layer))
    x = torch.randn(3, 96)
    found = []
    for forward in (model, lambda a: checkpoint(model, a, use_reentrant=reentrant)):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        forward(leaf).square().sum().backward()
        found.append([leaf.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > (4 if has_fp16_weights else 2)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
