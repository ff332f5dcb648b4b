"""`Int8Params`: quantized once by a move to a device, copied, and checked."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from halfbyte.nn import Int8Params
from halfbyte.nn._joint import portable
from halfbyte.ops.checks import DTypeError
from layers_8bit import quantized

ops = torch.ops.halfbyte
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
NAN = float("nan")
INF = float("inf")


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
