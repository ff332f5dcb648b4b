"""LLM.int8()'s operations: their arithmetic against its definition, and everything that transforms or records them."""

from __future__ import annotations

import warnings

import int8_reference as reference
import pytest
import torch
from halfbyte import functional
from halfbyte.backends import cpu
from halfbyte.ops.autograd_8bit import input_gradient, product, trained_product
from halfbyte.ops.checks import DTypeError
from halfbyte.ops.checks_8bit import MOST_COLUMNS
from hypothesis import given, settings
from hypothesis import strategies as st
from thorough import thorough

ops = torch.ops.halfbyte
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
THRESHOLDS = (0.0, 6.0)


def weight(n, k):
    """Codes and scales."""
    return ops.quantize_rows(torch.randn(n, k))


def opcheck(*args):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        torch.library.opcheck(*args)


def wide(tensor):
    """As numpy has it, float32."""
    return tensor.detach().float().numpy()


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def inputs(data, dtype):
    """A factor of any shape and kind."""
    m, k = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 40))
    seed, kind = data.draw(st.integers(0, 2**31)), data.draw(st.sampled_from(["plain", "outliers", "huge", "odd"]))
    torch.manual_seed(seed)
    x = torch.randn(m, k)
    if kind == "outliers" and k:
        x[:, torch.randint(0, k, (2,))] *= 9
    elif kind == "huge":
        # Not so far that sums of products, or products with 127, leave float32.
        x *= 10.0 ** data.draw(st.integers(-44, 33))
    elif kind == "odd" and x.numel():
        for value in (float("nan"), 6.0, -6.0, 0.0, -0.0, float("inf")):
            x.view(-1)[torch.randint(0, x.numel(), (1,))] = value
    return x.to(dtype)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_linear_8bit_is_its_definition(data):
    dtype, threshold = data.draw(st.sampled_from(FLOATS)), data.draw(st.sampled_from([0.0, 0.5, 6.0]))
    x = inputs(data, dtype)
    n = data.draw(st.integers(0, 5))
    codes, scales = weight(n, x.shape[1])
    bias = torch.randn(n).to(data.draw(st.sampled_from(FLOATS))) if data.draw(st.booleans()) else None
    y = ops.linear_8bit(x, codes, scales, bias, threshold)
    assert y.dtype is dtype
    assert y.shape == (len(x), n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        want, slack = reference.linear(
            wide(x), codes.numpy(), scales.numpy(), None if bias is None else wide(bias), threshold
        )
    want = torch.from_numpy(want)
    if not slack.any():
        torch.testing.assert_close(y, want.to(dtype), rtol=0, atol=0, equal_nan=True)
        return
    rounding = torch.finfo(dtype).eps * want.abs() + torch.finfo(dtype).smallest_normal
    close = (y.float() - want).abs() <= torch.from_numpy(slack) + rounding
    alike = (y.isnan() & want.isnan()) | (y.float() == want.to(dtype).float())
    assert bool((close | alike).all())


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_quantize_rows_outliers_is_its_definition(data):
    dtype, threshold = data.draw(st.sampled_from(FLOATS)), data.draw(st.floats(1e-3, 100, allow_subnormal=False))
    x = inputs(data, dtype)
    codes, scales, outliers = ops.quantize_rows_outliers(x, threshold)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        want_codes, want_scales, want_outliers = reference.quantize_rows(wide(x), threshold)
    assert torch.equal(codes, torch.from_numpy(want_codes))
    assert torch.equal(scales, torch.from_numpy(want_scales))
    assert torch.equal(outliers, torch.from_numpy(want_outliers))


def test_inputs_are_rounded_to_float16s_precision_and_keep_float32s_range():
    codes, scales = weight(8, 64)
    x = torch.randn(4, 64)
    half = x.half()
    # A normal float16 is what bitsandbytes multiplies.
    assert torch.equal(
        ops.linear_8bit(x, codes, scales, None, 0.0), ops.linear_8bit(half.float(), codes, scales, None, 0.0)
    )
    for power in (2.0**60, 2.0**-60):
        y = ops.linear_8bit(half.float() * power, codes, scales, None, 0.0)
        assert torch.equal(y, ops.linear_8bit(half.float(), codes, scales, None, 0.0) * power)


@pytest.mark.parametrize("k", [1, 3, 1024, 1025, 5000])
def test_int8_matmul_is_exact(k):
    a, b = (torch.randint(-128, 128, (rows, k), dtype=torch.int8) for rows in (5, 7))
    a[0], b[0], b[1] = -128, -128, 127
    assert torch.equal(ops.int8_matmul(a.view(1, 5, k), b), (a.long() @ b.long().T).int().view(1, 5, 7))


def test_int8_matmul_of_the_most_columns():
    a = torch.full((1, MOST_COLUMNS), 127, dtype=torch.int8)
    assert ops.int8_matmul(a, a).item() == MOST_COLUMNS * 127**2 <= 2**31 - 1
    more = torch.zeros(1, MOST_COLUMNS + 1, dtype=torch.int8)
    with pytest.raises(ValueError, match=f"a: {MOST_COLUMNS + 1} columns are more than {MOST_COLUMNS}"):
        ops.int8_matmul(more, more)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_autocast_changes_nothing(threshold):
    codes, scales = weight(8, 64)
    x = (torch.randn(4, 64) * 4).requires_grad_()
    grad = torch.randn(4, 8)
    y = product(x, codes, scales, None, threshold)
    (gx,) = torch.autograd.grad(y, x, grad)
    with torch.autocast("cpu", torch.bfloat16):
        z = product(x, codes, scales, None, threshold)
        (gz,) = torch.autograd.grad(z, x, grad)
        assert torch.equal(ops.linear_8bit(x, codes, scales, None, threshold), y)
    assert z.dtype is torch.float32
    assert torch.equal(y, z)
    assert torch.equal(gx, gz)


# ---- what torch checks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("dtype", thorough(FLOATS, quick=(torch.bfloat16,)), ids=str)
def test_opcheck_linear_8bit(dtype, threshold):
    for n, k in ((7, 65), (1, 1)):
        codes, scales = weight(n, k)
        x = torch.randn(2, 3, k, dtype=dtype, requires_grad=True)
        bias = torch.randn(n, dtype=dtype, requires_grad=True)
        opcheck(ops.linear_8bit.default, (x, codes, scales, bias, threshold))
        opcheck(ops.linear_8bit.default, (x.detach(), codes, scales, None, threshold))
        dense = torch.randn(n, k, requires_grad=True)
        opcheck(ops.linear_8bit_trained.default, (x, dense, codes, scales, bias, threshold))
        grad = torch.randn(2, 3, n, dtype=dtype, requires_grad=True)
        opcheck(ops.linear_8bit_backward.default, (grad, codes, scales))


def test_opcheck_codes():
    a, b = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((2, 3, 33), (5, 33)))
    opcheck(ops.int8_matmul.default, (a, b))
    opcheck(ops.int8_scaled_mm.default, (a, b, torch.rand(6), torch.rand(5), torch.randn(5), torch.bfloat16))
    opcheck(ops.int8_scaled_mm.default, (a, b, torch.rand(6), torch.rand(5), None, torch.float32))
    for dtype in FLOATS:
        opcheck(ops.quantize_rows_outliers.default, (torch.randn(2, 3, 33, dtype=dtype), 1.0))


def test_the_direct_way_and_the_dispatchers_agree():
    codes, scales = weight(7, 65)
    x = torch.randn(3, 65) * 4
    for threshold in THRESHOLDS:
        assert torch.equal(
            cpu.linear_8bit(x, codes, scales, None, threshold), ops.linear_8bit(x, codes, scales, None, threshold)
        )


def test_a_lazily_negated_input_is_not_mistaken():
    codes, scales = weight(7, 66)
    # A lazily negated view is the imaginary part of a conjugate.
    x = torch.randn(3, 66, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    for threshold in THRESHOLDS:
        y = product(x, codes, scales, None, threshold)
        assert torch.equal(y, product(x.resolve_neg(), codes, scales, None, threshold))
    assert torch.equal(functional.int8_vectorwise_quant(x)[0], functional.int8_vectorwise_quant(x.resolve_neg())[0])


def test_any_strides():
    codes, scales = weight(12, 10)
    x = torch.randn(10, 6, 2).permute(1, 2, 0)
    want = product(x.contiguous(), codes, scales, None, 1.5)
    assert torch.equal(product(x, codes, scales, None, 1.5), want)
    turned = codes.t().contiguous().t()
    assert torch.equal(product(x, turned, scales.expand(2, 12)[0], None, 1.5), want)
    assert torch.equal(ops.linear_8bit_backward(want, turned, scales), ops.linear_8bit_backward(want, codes, scales))


# ---- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_gradients_of_every_order_are_those_of_the_plain_product(threshold):
    codes, scales = weight(7, 65)
    dense = ops.dequantize_rows(codes, scales, torch.float32)
    bias = torch.randn(7, requires_grad=True)
    x, grad, second = torch.randn(2, 3, 65, requires_grad=True), torch.randn(2, 3, 7), torch.randn(2, 3, 65)
    for call in (product, lambda *args: ops.linear_8bit(*args)):
        grad = grad.detach().requires_grad_()
        y = call(x, codes, scales, bias, threshold)
        gx, gb = torch.autograd.grad(y, (x, bias), grad, create_graph=True)
        torch.testing.assert_close(gx, grad @ dense)
        torch.testing.assert_close(gb, grad.sum((0, 1)))
        (gg,) = torch.autograd.grad(gx, grad, second, create_graph=True)
        torch.testing.assert_close(gg, second @ dense.T)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradient_of_a_float_weight(dtype):
    w = torch.randn(7, 65, dtype=dtype, requires_grad=True)
    codes, scales = functional.int8_vectorwise_quant(w.half())[:2]
    x, grad = torch.randn(2, 3, 65, requires_grad=True), torch.randn(2, 3, 7)
    for call in (trained_product, lambda *args: ops.linear_8bit_trained(*args)):
        y = call(x, w, codes, scales, None, 6.0)
        assert torch.equal(y, product(x.detach(), codes, scales, None, 6.0))
        gx, gw = torch.autograd.grad(y, (x, w), grad)
        assert gw.dtype is dtype
        torch.testing.assert_close(gw, torch.einsum("abn,abk->nk", grad, x).to(dtype))
        torch.testing.assert_close(gx, input_gradient(grad, codes, scales))


def test_nothing_dense_is_saved_for_backward():
    codes, scales = weight(64, 128)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = product(torch.randn(3, 128, requires_grad=True), codes, scales, None, 6.0)
    assert {t.data_ptr() for t in saved} == {codes.data_ptr(), scales.data_ptr()}
    assert y.requires_grad


def test_codes_that_changed_before_backward_are_noticed():
    codes, scales = weight(64, 128)
    y = product(torch.randn(3, 128, requires_grad=True), codes, scales, None, 6.0)
    codes.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_forward_mode_derivatives():
    codes, scales = weight(7, 65)
    dense = ops.dequantize_rows(codes, scales, torch.float32)
    x, t, b, tb = torch.randn(3, 65), torch.randn(3, 65), torch.randn(7), torch.randn(7)
    _, ty = torch.func.jvp(lambda x, b: product(x, codes, scales, b, 6.0), (x, b), (t, tb))
    torch.testing.assert_close(ty, t @ dense.T + tb)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, t)
        found = torch.autograd.forward_ad.unpack_dual(product(dual, codes, scales, None, 6.0))
    torch.testing.assert_close(found.tangent, t @ dense.T)
    w, tw = torch.randn(7, 65), torch.randn(7, 65)
    _, ty = torch.func.jvp(lambda x, w: trained_product(x, w, codes, scales, None, 6.0), (x, w), (t, tw))
    torch.testing.assert_close(ty, t @ dense.T + x @ tw.T)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_vmap_is_a_call_for_each(threshold):
    codes, scales = weight(7, 65)
    # An outlier of one call is none of another's.
    x, bias = torch.randn(4, 3, 65) * 3, torch.randn(4, 7)
    each = torch.stack([product(a, codes, scales, None, threshold) for a in x])
    assert torch.equal(torch.func.vmap(lambda a: product(a, codes, scales, None, threshold))(x), each)
    moved = x.movedim(0, 2)
    assert torch.equal(torch.func.vmap(lambda a: product(a, codes, scales, None, threshold), 2)(moved), each)
    biased = torch.func.vmap(lambda a, b: product(a, codes, scales, b, threshold))(x, bias)
    torch.testing.assert_close(biased, each + bias[:, None])
    many = torch.stack([codes, -codes])
    assert torch.equal(
        torch.func.vmap(lambda c: product(x[0], c, scales, None, threshold))(many), torch.stack([each[0], -each[0]])
    )


def test_func_grad_and_per_sample_gradients():
    codes, scales = weight(7, 65)
    dense = ops.dequantize_rows(codes, scales, torch.float32)
    x = torch.randn(4, 65)
    one = torch.func.grad(lambda a: product(a, codes, scales, None, 0.0).sum())
    torch.testing.assert_close(torch.func.vmap(one)(x), dense.sum(0).expand(4, 65))
    hessian = torch.func.hessian(lambda a: product(a, codes, scales, None, 0.0).square().sum())(x[0])
    torch.testing.assert_close(hessian, 2 * dense.T @ dense)


def test_functionalize_and_fakes():
    from torch._subclasses import FakeTensorMode

    codes, scales = weight(7, 65)
    x = torch.randn(3, 65)
    y = product(x, codes, scales, None, 6.0)
    assert torch.equal(torch.func.functionalize(lambda a: product(a, codes, scales, None, 6.0))(x), y)
    with FakeTensorMode() as mode:
        fake = product(mode.from_tensor(x), mode.from_tensor(codes), mode.from_tensor(scales), None, 6.0)
    assert fake.shape == y.shape
    assert fake.dtype is y.dtype
    assert ops.linear_8bit(x.to("meta"), codes.to("meta"), scales.to("meta"), None, 6.0).is_meta


def test_compiled_whole_with_dynamic_shapes():
    codes, scales = weight(7, 65)

    def call(x):
        return product(x, codes, scales, None, 6.0).square()

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (2, 5, 9):
        x = torch.randn(rows, 65, requires_grad=True)
        y = compiled(x)
        assert torch.equal(y, call(x))
        assert torch.equal(*(torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, call)))


# ---- refusals --------------------------------------------------------------------------------------------------------

X, CODES, SCALES = torch.zeros(2, 8), torch.zeros(3, 8, dtype=torch.int8), torch.ones(3)
REFUSED = [
    ("linear_8bit", (X.double(), CODES, SCALES, None, 0.0), DTypeError, "x: dtype torch.float64 is not one of"),
    ("linear_8bit", (X, CODES.float(), SCALES, None, 0.0), DTypeError, "codes: dtype torch.float32 is not torch.int8"),
    ("linear_8bit", (X, CODES[0], SCALES, None, 0.0), ValueError, r"codes: shape \[8\] is not \[rows, columns\]"),
    (
        "linear_8bit",
        (X, CODES, SCALES.half(), None, 0.0),
        DTypeError,
        "scales: dtype torch.float16 is not torch.float32",
    ),
    ("linear_8bit", (X, CODES, SCALES[1:], None, 0.0), ValueError, "scales: 2 scales do not fit; codes has 3 rows"),
    (
        "linear_8bit",
        (X[:, 1:], CODES, SCALES, None, 0.0),
        ValueError,
        r"x: shape \[2, 7\] does not end with in_features, 8",
    ),
    ("linear_8bit", (X, CODES, SCALES, torch.ones(4), 0.0), ValueError, r"bias: shape \[4\] is not \[3\]"),
    ("linear_8bit", (X, CODES, SCALES, torch.ones(3).int(), 0.0), DTypeError, "bias: dtype torch.int32 is not one of"),
    (
        "linear_8bit",
        (X, CODES, SCALES, None, -1.0),
        ValueError,
        "threshold must be a number of at least 0 .*, got -1.0",
    ),
    ("linear_8bit", (X, CODES, SCALES, None, float("nan")), ValueError, "threshold must be .* at least 0 .*, got nan"),
    ("linear_8bit", (X, CODES, SCALES.to("meta"), None, 0.0), ValueError, "scales: is on meta, but codes is on cpu"),
    ("quantize_rows_outliers", (X, 0.0), ValueError, "threshold must be a number greater than 0, got 0.0"),
    ("quantize_rows_outliers", (X.int(), 1.0), DTypeError, "input: dtype torch.int32 is not one of"),
    ("linear_8bit_backward", (X, CODES, SCALES), ValueError, r"grad: shape \[2, 8\] does not end with out_features, 3"),
    ("int8_matmul", (CODES, CODES.int()), DTypeError, "b: dtype torch.int32 is not torch.int8"),
    ("int8_matmul", (CODES, CODES[:, 1:]), ValueError, r"b: shape \[3, 7\] does not end with the columns of a, 8"),
    ("int8_scaled_mm", (CODES, CODES, SCALES[1:], SCALES, None, torch.float32), ValueError, "row_scales: 2 scales"),
    ("int8_scaled_mm", (CODES, CODES, SCALES, SCALES, None, torch.int8), DTypeError, "dtype: dtype torch.int8 is not"),
]


@pytest.mark.parametrize(("name", "args", "error", "message"), REFUSED)
def test_bad_arguments_are_named(name, args, error, message):
    with pytest.raises(error, match=message):
        getattr(ops, name)(*args)
    if name == "linear_8bit":
        with pytest.raises(error, match=message):
            product(*args)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f.int8_vectorwise_quant(X, -1.0), ValueError, "threshold must be .*, got -1.0"),
        (lambda f: f.int8_vectorwise_quant(X, float("nan")), ValueError, "threshold must be .*, got nan"),
        (lambda f: f.int8_vectorwise_quant(X, "6"), TypeError, "threshold must be .*, got '6'"),
        (lambda f: f.int8_vectorwise_quant(X, True), TypeError, "threshold must be .*, got True"),
        (lambda f: f.int8_linear_matmul(CODES, X), DTypeError, "B: dtype torch.float32 is not torch.int8"),
        (lambda f: f.int8_linear_matmul(CODES, CODES, dtype=torch.int8), DTypeError, "dtype: torch.int8 is not"),
        (lambda f: f.int8_linear_matmul(CODES, CODES, torch.zeros(3)), ValueError, "out: "),
        (lambda f: f.int8_mm_dequant(X, SCALES, SCALES), DTypeError, "A: dtype torch.float32 is not torch.int32"),
        (lambda f: f.int8_mm_dequant(X.int(), SCALES, SCALES), ValueError, "row_stats: 3 scales .* A has 2 rows"),
        (lambda f: f.int8_mm_dequant(X.int(), SCALES[1:], SCALES), ValueError, "col_stats: 3 .* A has 8 columns"),
        (lambda f: f.int8_double_quant(X, out_col=X), ValueError, "out_col must be None, got a tensor"),
        (lambda f: f.int8_scaled_mm(CODES, CODES, SCALES, X), ValueError, "col_stats: 16 scales do not fit"),
        (lambda f: f.int8_mixed_scaled_mm(X, CODES, CODES, SCALES, SCALES), ValueError, r"A: shape \[2, 8\] is not"),
    ],
)
def test_bad_arguments_of_functions_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(functional)


# ---- functions -------------------------------------------------------------------------------------------------------


def test_functions_together_are_the_product():
    x, w = (torch.randn(2, 3, 64) * 3).half(), torch.randn(8, 64).half()
    bias = torch.randn(8)
    codes, scales, _ = functional.int8_vectorwise_quant(w)
    a, row_scales, _ = functional.int8_vectorwise_quant(x)
    y = product(x, codes, scales, bias, 0.0)
    total = functional.int8_linear_matmul(a, codes)
    assert torch.equal(functional.int8_mm_dequant(total, row_scales, scales, bias=bias), y)
    assert torch.equal(functional.int8_scaled_mm(a, codes, row_scales, scales, bias), y)
    a, row_scales, columns = functional.int8_vectorwise_quant(x, 6.0)
    assert columns.numel()
    assert columns.dtype is torch.int64
    found, left = functional.int8_mixed_scaled_mm(x, a, codes, row_scales, scales, columns, bias)
    torch.testing.assert_close(found, product(x, codes, scales, bias, 6.0))
    assert torch.equal(left, x.reshape(-1, 64)[:, columns])


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_double_quantization_is_that_of_rows_and_of_columns(threshold):
    x = torch.randn(2, 5, 33) * 3
    rows, columns, row_scales, column_scales, outliers = functional.int8_double_quant(x, threshold=threshold)
    want_rows, want_scales, want_outliers = functional.int8_vectorwise_quant(x, threshold)
    assert torch.equal(rows, want_rows)
    assert torch.equal(row_scales, want_scales)
    assert (outliers is None) == (threshold == 0)
    assert outliers is None or torch.equal(outliers, want_outliers)
    kept = x.reshape(10, 33)
    kept = kept.masked_fill(kept.abs() >= threshold, 0) if threshold else kept
    turned, turned_scales, _ = functional.int8_vectorwise_quant(kept.T.contiguous())
    assert torch.equal(columns.reshape(10, 33).T, turned)
    assert torch.equal(column_scales, turned_scales)
