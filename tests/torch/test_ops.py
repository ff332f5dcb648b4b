"""The operations under `opcheck`, derivatives, torch.func, modes, compilation."""

from __future__ import annotations

import itertools
import warnings

import halfbyte.functional as F
import halfbyte.nn as hnn
import pytest
import torch
from halfbyte.backends import cpu as _cpu
from halfbyte.ops.packed import packed_weight
from packed_operands import ops, weight
from thorough import thorough


def opcheck(*args):
    """What torch itself examines of an operation; it looks at gradients that are not there, and says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        torch.library.opcheck(*args)


SHAPES = [(64, 64), (7, 65), (1, 1), (32, 129)]


# ---- opcheck ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_opcheck_quantize(quant_type, dtype):
    for shape in (*SHAPES, (3, 0), (2, 3, 5), ()):
        tensor = torch.randn(shape, dtype=dtype)
        opcheck(ops.quantize_4bit.default, (tensor, 64, quant_type))
        opcheck(ops.quantize_4bit_nested.default, (tensor, 64, quant_type))
        opcheck(ops.quantize_4bit.default, (tensor.clone().requires_grad_(), 32, quant_type))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", thorough([torch.uint8, torch.bfloat16], quick=[torch.uint8]), ids=str)
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


@pytest.mark.slow
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
