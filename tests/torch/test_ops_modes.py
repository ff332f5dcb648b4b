"""The operations where modes listen, tensors are fake, or a compiler traces."""

from __future__ import annotations

import halfbyte.functional as F
import halfbyte.nn as hnn
import pytest
import torch
from compilers import needs_compiler
from halfbyte.backends import cpu as _cpu
from packed_operands import ops, weight
from torch._dynamo.testing import CompileCounterWithBackend

# ---- modes -----------------------------------------------------------------------------------------------------------


def test_the_direct_way_and_the_dispatchers_agree():
    """To the bit; and a mode that listens hears of the operation."""
    from torch.utils._python_dispatch import TorchDispatchMode

    heard = []

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            heard.append(func.name())
            return func(*args, **(kwargs or {}))

    packed, state = F.quantize_4bit(torch.randn(6, 33), quant_type="nf4", compress_statistics=True)
    x = torch.randn(3, 33)
    direct = F.matmul_4bit(x, packed, state), F.dequantize_4bit(packed, state)
    with Listen():
        dispatched = F.matmul_4bit(x, packed, state), F.dequantize_4bit(packed, state)
    assert {"halfbyte::linear_4bit", "halfbyte::dequantize_4bit"} <= set(heard)
    for a, b in zip(direct, dispatched, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_modes_without_gradients(mode):
    layer = hnn.LinearNF4(32, 16).to("cpu")
    x = torch.randn(2, 32, requires_grad=True)
    with mode():
        y = layer(x)
    assert not y.requires_grad
    torch.testing.assert_close(y, layer(x).detach())
    # A layer made in inference mode can be used for training afterwards.
    with mode():
        packed, state = F.quantize_4bit(torch.randn(16, 32), quant_type="nf4")
    assert F.dequantize_4bit(packed, state).shape == (16, 32)


@pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_autocast_computes_in_its_dtype_and_gives_the_inputs(compute_dtype):
    dense, layer = torch.nn.Linear(32, 16), hnn.LinearNF4(32, 16, compute_dtype=compute_dtype)
    layer.load_state_dict(dense.state_dict())
    x = torch.randn(2, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = layer(x), torch.nn.functional.linear(x, layer.dequantize(), layer.bias)
        z = F.matmul_4bit(x, layer.weight, layer.quant_state)
    assert expected.dtype == z.dtype == torch.bfloat16
    # As bitsandbytes: what is added to a float32 stream is not rounded to the autocast dtype on its way.
    assert y.dtype == torch.float32
    assert torch.equal(y, y.bfloat16().float())
    torch.testing.assert_close(y, expected.float(), rtol=2e-2, atol=2e-2)
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(2, 32), rtol=2e-2, atol=2e-2)
    assert x.grad.dtype == torch.float32
    assert layer.bias.grad.dtype == torch.float32
    with torch.autocast("cpu", enabled=False):
        assert layer(x).dtype == torch.float32


def test_meta_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors, how, state = weight(16, 32, nested=True)
    meta = [None if t is None else t.to("meta") for t in tensors]
    y = ops.linear_4bit(torch.empty(3, 32, device="meta"), *meta, None, *how)
    assert (y.shape, y.device.type) == ((3, 16), "meta")
    packed, other = F.quantize_4bit(torch.empty(16, 32, device="meta"), compress_statistics=True)
    assert (packed.shape, other.absmax.shape, other.state2.absmax.shape) == ((256, 1), (8,), (1,))
    assert F.dequantize_4bit(packed, other).device.type == "meta"
    with FakeTensorMode():
        packed, other = F.quantize_4bit(torch.empty(16, 32))
        assert F.matmul_4bit(torch.empty(2, 32), packed, other).shape == (2, 16)
    # What fake mode saw has not spoilt what is kept.
    assert type(F.quantize_4bit(torch.randn(4, 4))[1].code) is torch.Tensor
    assert state.code.shape == (16,)


def test_refusals_are_the_same_when_traced():
    tensors, how, _ = weight(16, 32)
    meta = [None if t is None else t.to("meta") for t in tensors]
    for device, arguments in (("cpu", tensors), ("meta", meta)):
        with pytest.raises(ValueError, match=r"x: shape .* does not end with in_features, 32"):
            ops.linear_4bit(torch.empty(3, 31, device=device), *arguments, None, *how)
        with pytest.raises(ValueError, match="quant_type: 'nf2'"):
            ops.linear_4bit(torch.empty(3, 32, device=device), *arguments, None, (16, 32), 64, "nf2")


def test_scales_are_checked():
    codes, absmax2, offset = ops.compress_absmax(torch.rand(300))
    for device in ("cpu", "meta"):
        moved = [t.to(device) for t in (codes, absmax2, offset)]
        with pytest.raises(TypeError, match=r"absmax: dtype torch.int16 is not torch.float32"):
            ops.compress_absmax(torch.ones(3, dtype=torch.int16, device=device))
        with pytest.raises(ValueError, match=r"absmax2: 1 elements, expected 2 for 300 nested scales"):
            ops.expand_absmax(moved[0], moved[1][:1], moved[2])
    with pytest.raises(ValueError, match=r"offset: is on meta, but packed is on cpu"):
        _cpu.expand_absmax(codes, absmax2, offset.to("meta"))


def test_what_is_written_to_was_changed():
    """Autograd notices that `out` is not what it was."""
    packed, state = F.quantize_4bit(torch.randn(4, 4), quant_type="nf4")
    factor, out = torch.ones(4, 4, requires_grad=True), torch.randn(4, 4)
    y = (factor * out).sum()
    F.dequantize_4bit(packed, state, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    negated = torch.randn(4, 4, dtype=torch.complex64).conj().imag
    with pytest.raises(ValueError, match="out: is a lazily negated view"):
        F.dequantize_4bit(packed, state, out=negated)


def test_a_lazily_negated_input_is_not_mistaken():
    tensors, _, state = weight(16, 32)
    z = torch.randn(3, 32, dtype=torch.complex64)
    negated = torch.conj(z).imag
    assert negated.is_neg()
    expected = F.matmul_4bit(negated.clone().resolve_neg(), tensors[0], state)
    assert torch.equal(F.matmul_4bit(negated, tensors[0], state), expected)
    bias = torch.conj(torch.randn(16, dtype=torch.complex64)).imag
    expected = F.matmul_4bit(negated, tensors[0], state, bias=bias.clone().resolve_neg())
    assert torch.equal(F.matmul_4bit(negated, tensors[0], state, bias=bias), expected)


# ---- compilation -----------------------------------------------------------------------------------------------------


class Small(torch.nn.Module):
    def __init__(self, compress_statistics=True, compute_dtype=None):
        super().__init__()
        self.table = hnn.EmbeddingNF4(50, 33)
        self.first = hnn.LinearNF4(33, 47, compress_statistics=compress_statistics, compute_dtype=compute_dtype)
        self.second = hnn.LinearFP4(47, 20, bias=False, compress_statistics=compress_statistics)

    def forward(self, indices, shift):
        x = self.table(indices) + shift
        return self.second(torch.relu(self.first(x)))


@needs_compiler
@pytest.mark.parametrize("compress_statistics", [False, True])
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=str)
def test_compiled_whole_with_dynamic_shapes(compress_statistics, compute_dtype):
    torch._dynamo.reset()
    model = Small(compress_statistics, compute_dtype).to("cpu")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for batch, length in ((2, 5), (3, 7), (4, 9), (6, 2)):
        indices = torch.randint(0, 50, (batch, length))
        shifts = [torch.randn(33, requires_grad=True) for _ in range(2)]
        shifts[1].data.copy_(shifts[0])
        expected, y = model(indices, shifts[0]), compiled(indices, shifts[1])
        torch.testing.assert_close(y, expected)
        gradients = []
        for out, shift in ((expected, shifts[0]), (y, shifts[1])):
            model.zero_grad()
            out.pow(2).sum().backward()
            gradients.append((shift.grad, model.first.bias.grad))
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1, "one graph serves all sizes"


@needs_compiler
@pytest.mark.slow
def test_compiled_functional_with_inductor():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True)
    def step(w, x):
        packed, state = F.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
        codes, state8 = F.quantize_blockwise(x, blocksize=64)
        return F.matmul_4bit(F.dequantize_blockwise(codes, state8) + 1, packed, state) * 2, F.dequantize_4bit(
            packed, state
        )

    w, x = torch.randn(16, 64), torch.randn(3, 64)
    y, dense = step(w, x)
    packed, state = F.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    assert torch.equal(dense, F.dequantize_4bit(packed, state))
    again = F.dequantize_blockwise(*F.quantize_blockwise(x, blocksize=64)) + 1
    torch.testing.assert_close(y, F.matmul_4bit(again, packed, state) * 2)


@needs_compiler
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    model = Small().to("cpu").eval()
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", max=64)
    arguments = torch.randint(0, 50, (3, 5)), torch.randn(33)
    program = torch.export.export(
        model, arguments, dynamic_shapes={"indices": {0: batch, 1: length}, "shift": None}, strict=strict
    )
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"halfbyte.linear_4bit.default", "halfbyte.embedding_4bit.default"} <= called
    for size in ((3, 5), (4, 7)):
        indices = torch.randint(0, 50, size)
        torch.testing.assert_close(program.module()(indices, arguments[1]), model(indices, arguments[1]))


def test_checkpointed_activations():
    from torch.utils.checkpoint import checkpoint

    model = Small().to("cpu")
    indices = torch.randint(0, 50, (2, 3))
    results = []
    for run in (
        model,
        lambda *a: checkpoint(model, *a, use_reentrant=False),
        lambda *a: checkpoint(model, *a, use_reentrant=True),
    ):
        shift = torch.ones(33, requires_grad=True)
        model.zero_grad()
        run(indices, shift).pow(2).sum().backward()
        results.append((shift.grad, model.first.bias.grad.clone()))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)
