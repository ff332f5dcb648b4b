"""`torch.ops.halfbyte`: what torch checks of an operation, and everything that transforms or records operations."""

from __future__ import annotations

import itertools
import warnings

import halfbyte.functional as F
import halfbyte.nn as hnn
import pytest
import torch
from compilers import needs_compiler
from halfbyte.backends import cpu as _cpu
from halfbyte.ops.packed import packed_weight
from torch._dynamo.testing import CompileCounterWithBackend

ops = torch.ops.halfbyte


def weight(n, k, dtype=torch.float32, nested=False, quant_type="nf4", storage=torch.uint8):
    """Tensors, and scalars, of a packed weight as the operations take them."""
    packed, state = F.quantize_4bit(
        torch.randn(n, k, dtype=dtype), quant_type=quant_type, compress_statistics=nested, quant_storage=storage
    )
    return (packed, *state.scales()), state.weight(), state


def opcheck(*args):
    """What torch itself examines of an operation; it looks at gradients that are not there, and says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        torch.library.opcheck(*args)


SHAPES = [(64, 64), (7, 65), (1, 1), (32, 129)]


# ---- opcheck ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_opcheck_quantize(quant_type, dtype):
    for shape in (*SHAPES, (3, 0), (2, 3, 5), ()):
        tensor = torch.randn(shape, dtype=dtype)
        opcheck(ops.quantize_4bit.default, (tensor, 64, quant_type))
        opcheck(ops.quantize_4bit_nested.default, (tensor, 64, quant_type))
        opcheck(ops.quantize_4bit.default, (tensor.clone().requires_grad_(), 32, quant_type))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_opcheck_dequantize(storage, nested):
    for n, k in SHAPES:
        tensors, (shape, *how), _ = weight(n, k, nested=nested, storage=storage)
        for dtype in (torch.float32, torch.bfloat16):
            opcheck(ops.dequantize_4bit.default, (*tensors, shape, dtype, *how))


def test_opcheck_scales():
    for n in (1, 255, 256, 700):
        scales = torch.rand(n)
        opcheck(ops.compress_absmax.default, (scales,))
        opcheck(ops.expand_absmax.default, ops.compress_absmax(scales))


@pytest.mark.parametrize("blocksize", [64, 256, 100])
def test_opcheck_8bit(blocksize):
    code = F.create_dynamic_map()
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.randn(5, 77, dtype=dtype)
        opcheck(ops.quantize_blockwise.default, (tensor, code, blocksize))
        codes, absmax = ops.quantize_blockwise(tensor, code, blocksize)
        opcheck(ops.dequantize_blockwise.default, (codes, absmax, code, blocksize, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_opcheck_rows(dtype):
    for shape in ((5, 77), (1, 1), (3, 0), (2, 3, 4), (6,)):
        tensor = torch.randn(shape, dtype=dtype)
        opcheck(ops.quantize_rows.default, (tensor,))
        opcheck(ops.dequantize_rows.default, (*ops.quantize_rows(tensor), dtype))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_opcheck_linear(dtype, nested):
    for (n, k), lead in itertools.product([(64, 64), (7, 65)], [(3,), (2, 3), ()]):
        tensors, how, _ = weight(n, k, dtype, nested)
        bias = torch.randn(n, dtype=dtype, requires_grad=True)
        x = torch.randn(*lead, k, dtype=dtype, requires_grad=True)
        grad = torch.randn(*lead, n, dtype=dtype, requires_grad=True)
        opcheck(ops.linear_4bit.default, (x, *tensors, None, *how))
        opcheck(ops.linear_4bit.default, (x, *tensors, bias, *how))
        opcheck(ops.linear_4bit_backward.default, (grad, *tensors, *how))
    transposed = torch.randn(k, 4, dtype=dtype).t().requires_grad_()
    opcheck(ops.linear_4bit.default, (transposed, *tensors, bias, *how))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dim", [64, 65, 32, 1])
def test_opcheck_embedding(dim, nested):
    tensors, (shape, *how), _ = weight(40, dim, nested=nested)
    for indices in (torch.randint(0, 40, (3, 4)), torch.randint(0, 40, (5,), dtype=torch.int32)):
        opcheck(ops.embedding_4bit.default, (indices, *tensors, shape, torch.bfloat16, *how))


# ---- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_gradients_of_every_order(nested):
    """The product is linear in both factors: its derivatives are those of the dense product."""
    torch.manual_seed(0)
    _, _, state = weight(6, 33, nested=nested)
    packed, state = F.quantize_4bit(torch.randn(6, 33), quant_type="nf4", compress_statistics=nested)
    dense = F.dequantize_4bit(packed, state)
    x, bias = torch.randn(2, 4, 33, requires_grad=True), torch.randn(6, requires_grad=True)

    def gradients(product):
        y = product(x, bias)
        first = torch.autograd.grad((y**3).sum(), (x, bias), create_graph=True)
        return y, *first, *torch.autograd.grad(sum((g**2).sum() for g in first), (x, bias))

    ours = gradients(lambda x, bias: F.matmul_4bit(x, packed, state, bias=bias))
    theirs = gradients(lambda x, bias: torch.nn.functional.linear(x, dense, bias))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_only_what_is_asked_for_is_computed():
    packed, state = F.quantize_4bit(torch.randn(6, 32), quant_type="nf4")
    x, bias = torch.randn(3, 32), torch.randn(6, requires_grad=True)
    F.matmul_4bit(x, packed, state, bias=bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((6,), 3.0))
    assert x.grad is None
    # One row without a leading dimension.
    bias.grad = None
    F.matmul_4bit(x[0], packed, state, bias=bias).sum().backward()
    assert torch.equal(bias.grad, torch.ones(6))


def test_nothing_dense_is_saved_for_backward():
    packed, state = F.quantize_4bit(torch.randn(96, 128), quant_type="nf4", compress_statistics=True)
    x = torch.randn(4, 128, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = F.matmul_4bit(x, packed, state, bias=torch.zeros(96, requires_grad=True))
    existing = {t.data_ptr() for t in (packed, *state.scales())}
    assert {t.data_ptr() for t in saved} <= existing
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_a_weight_that_changed_before_backward_is_noticed():
    packed, state = F.quantize_4bit(torch.randn(8, 32), quant_type="nf4")
    y = F.matmul_4bit(torch.randn(2, 32, requires_grad=True), packed, state)
    packed.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- torch.func ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_vmap(nested):
    packed, state = F.quantize_4bit(torch.randn(6, 33), quant_type="nf4", compress_statistics=nested)
    dense = F.dequantize_4bit(packed, state)
    x, bias, biases = torch.randn(5, 4, 33), torch.randn(6), torch.randn(5, 6)

    def ours(x, bias):
        return F.matmul_4bit(x, packed, state, bias=bias)

    def theirs(x, bias):
        return torch.nn.functional.linear(x, dense, bias)

    for in_dims, args in (((0, None), (x, bias)), ((1, None), (x, bias)), ((0, 0), (x, biases)),
                          ((None, 0), (x[0], biases))):  # fmt: skip
        torch.testing.assert_close(torch.vmap(ours, in_dims)(*args), torch.vmap(theirs, in_dims)(*args))
    torch.testing.assert_close(
        torch.vmap(torch.vmap(ours, (0, None)), (0, 0))(x, biases),
        torch.vmap(torch.vmap(theirs, (0, None)), (0, 0))(x, biases),
    )


def test_vmap_over_weights():
    """An ensemble: packed weights and their scales stacked."""
    pairs = [F.quantize_4bit(torch.randn(6, 64), quant_type="nf4") for _ in range(3)]
    packed, absmax = (torch.stack(t) for t in ([p for p, _ in pairs], [s.absmax for _, s in pairs]))
    x = torch.randn(4, 64)

    def product(packed, absmax):
        return ops.linear_4bit(x, packed, absmax, None, None, None, (6, 64), 64, "nf4")

    def dense(packed, absmax):
        return ops.dequantize_4bit(packed, absmax, None, None, (6, 64), torch.float32, 64, "nf4")

    y, w = torch.vmap(product)(packed, absmax), torch.vmap(dense)(packed, absmax)
    for i, (p, s) in enumerate(pairs):
        assert torch.equal(y[i], F.matmul_4bit(x, p, s))
        assert torch.equal(w[i], F.dequantize_4bit(p, s))


def test_func_grad_and_per_sample_gradients():
    packed, state = F.quantize_4bit(torch.randn(6, 33), quant_type="nf4")
    dense = F.dequantize_4bit(packed, state)
    x, bias = torch.randn(5, 33), torch.randn(6)

    def loss(product):
        return lambda x, bias: product(x, bias).pow(2).sum()

    ours = loss(lambda x, bias: F.matmul_4bit(x, packed, state, bias=bias))
    theirs = loss(lambda x, bias: torch.nn.functional.linear(x, dense, bias))
    for transform in (
        lambda f: torch.func.grad(f, argnums=(0, 1)),
        lambda f: torch.vmap(torch.func.grad(f, argnums=(0, 1)), (0, None)),
    ):
        for a, b in zip(transform(ours)(x, bias), transform(theirs)(x, bias), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("nested", [False, True])
def test_a_kind_of_weight_that_is_known_is_checked_again(nested):
    packed, state = F.quantize_4bit(torch.randn(96, 256), quant_type="nf4", compress_statistics=nested)
    x = torch.randn(2, 256)
    absmax, absmax2, offset = state.scales()
    right = {"packed": packed, "absmax": absmax, "absmax2": absmax2, "offset": offset}
    how = (96, 256), 64, "nf4"

    def product(**wrong):
        parts = {**right, **wrong}
        made = packed_weight(*parts.values(), *how)
        _cpu.linear_4bit(x, made, None)
        _cpu.linear_4bit_backward(torch.randn(2, 96), made)

    product()
    wrong = [
        {"packed": packed[:-1]},
        {"packed": packed.view(1, -1).view(torch.float32)[:, 1:]},
        {"packed": packed.to(torch.int32)},
        {"packed": packed.to("meta")},
        {"absmax": absmax[1:]},
        {"absmax": absmax.to(torch.float16)},
        {"absmax": absmax.to("meta")},
        {"absmax": absmax.to(torch.float32 if nested else torch.uint8)},
        {"absmax": absmax.to_sparse()},
        {"offset": None} if nested else {"offset": torch.zeros(())},
        {"absmax2": None} if nested else {"absmax2": torch.zeros(2)},
    ]
    if nested:
        wrong += [
            {"absmax2": absmax2[1:]},
            {"absmax2": absmax2.double()},
            {"offset": torch.zeros(2)},
            {"offset": offset.double()},
            {"offset": offset.to("meta")},
        ]
    for parts in wrong:
        with pytest.raises((ValueError, TypeError), match=r"packed|absmax|offset"):
            product(**parts)
    # Of another dtype, and of strides: the same weight.
    product(packed=packed.view(1, -1).view(torch.bfloat16))
    product(absmax=torch.stack([absmax, absmax], 1)[:, 0])
    for part in (x[:, :255], x.double(), x.to("meta")):
        with pytest.raises((ValueError, TypeError), match="x"):
            _cpu.linear_4bit(part, packed_weight(*right.values(), *how), None)


def test_functionalize():
    packed, state = F.quantize_4bit(torch.randn(6, 33), quant_type="nf4", compress_statistics=True)

    def shifted(x):
        y = F.matmul_4bit(x, packed, state)
        y += 1
        return y

    x = torch.randn(5, 33)
    assert torch.equal(torch.func.functionalize(shifted)(x), shifted(x))
    assert torch.equal(torch.vmap(torch.func.functionalize(shifted))(x[:, None]), shifted(x)[:, None])


def test_forward_mode_derivatives():
    from torch.autograd import forward_ad

    packed, state = F.quantize_4bit(torch.randn(6, 33), quant_type="nf4")
    dense = F.dequantize_4bit(packed, state)
    x, dx, bias, dbias = torch.randn(4, 33), torch.randn(4, 33), torch.randn(6), torch.randn(6)
    layer = hnn.LinearNF4(33, 6, bias=False).to("cpu")
    with forward_ad.dual_level():
        dual, shift = forward_ad.make_dual(x, dx), forward_ad.make_dual(bias, dbias)
        for y, expected in (
            (F.matmul_4bit(dual, packed, state), dx @ dense.T),
            (F.matmul_4bit(dual, packed, state, bias=shift), dx @ dense.T + dbias),
            (F.matmul_4bit(x, packed, state, bias=shift), dbias.expand(4, 6)),
            (layer(dual), dx @ layer.dequantize().T),
        ):
            torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, expected)
        assert forward_ad.unpack_dual(F.matmul_4bit(x, packed, state)).tangent is None
    with torch.no_grad():
        jacobian = torch.func.jacfwd(lambda x: F.matmul_4bit(x, packed, state, bias=bias))(x[0])
    torch.testing.assert_close(jacobian, dense)


def test_embedding_under_vmap():
    table = hnn.EmbeddingNF4(20, 24).to("cpu")
    indices = torch.randint(0, 20, (3, 5))
    assert torch.equal(torch.vmap(table)(indices), table(indices))


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
