"""`Linear8bitLt` and `Embedding8bit`, held to what a PyTorch user expects of any module."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from compilers import needs_compiler
from halfbyte.nn import Embedding8bit, Int8Params, Linear4bit, Linear8bitLt
from layers_8bit import THRESHOLDS, quantized, same_layer, trained
from torch.utils.checkpoint import checkpoint

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


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


# ---- embeddings ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["default", "overwrite", "swap"])
def conversion(request):
    """How torch puts converted parameters in the place of old ones."""
    future = torch.__future__
    before = future.get_overwrite_module_params_on_conversion(), future.get_swap_module_params_on_conversion()
    future.set_overwrite_module_params_on_conversion(request.param == "overwrite")
    future.set_swap_module_params_on_conversion(request.param == "swap")
    yield
    future.set_overwrite_module_params_on_conversion(before[0])
    future.set_swap_module_params_on_conversion(before[1])


@pytest.mark.usefixtures("conversion")
@pytest.mark.parametrize("kind", ["trained", "quantized", "not quantized", "4 bits"])
def test_moving_a_module_in_every_way_that_torch_has(kind):
    layer = Linear4bit(64, 32) if kind == "4 bits" else Linear8bitLt(64, 32, has_fp16_weights=kind == "trained")
    if kind in ("quantized", "4 bits"):
        layer.to("cpu")
    if kind == "trained":
        layer(torch.randn(2, 64)).sum().backward()
    cls, saved = type(layer.weight), copy.deepcopy(layer.state_dict())
    layer.bfloat16()
    assert type(layer.weight) is cls
    assert layer.bias.dtype is torch.bfloat16
    if kind == "trained":
        assert layer.weight.dtype is layer.weight.grad.dtype is torch.bfloat16
        assert layer.weight.requires_grad
        layer.weight.grad = None
    layer.to("meta")
    assert type(layer.weight) is cls
    assert layer.weight.is_meta
    layer.load_state_dict(saved, assign=True)
    assert same_state(layer.state_dict(), saved) if kind != "not quantized" else layer.weight.dtype is torch.int8


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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
@pytest.mark.slow
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
