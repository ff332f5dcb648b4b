"""`Linear8bitLt` and `matmul`: products with rows of 8 bits, of weights that stay and of weights that are trained."""

from __future__ import annotations

import copy
import logging
import pickle
import warnings
from pathlib import Path

import halfbyte
import pytest
import torch
from halfbyte.nn import Embedding8bit, Int8Params, Linear8bitLt
from halfbyte.nn.int8_params import quantize_weight
from halfbyte.ops.checks import DTypeError
from layers_8bit import THRESHOLDS, quantized, trained
from safetensors import safe_open

ops = torch.ops.halfbyte
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
GOLDEN = Path(__file__).parents[1] / "golden" / "int8.safetensors"
NAN = float("nan")


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
