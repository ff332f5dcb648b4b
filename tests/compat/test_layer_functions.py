"""What the layer computes by itself: LLM.int8()'s functions, tracing of outliers, and the report."""

from __future__ import annotations

import subprocess
import sys

import fresh
import pytest

pytest.importorskip("torch")

START = """
import halfbyte.compat; halfbyte.compat.install()
import warnings, torch
import bitsandbytes as bnb
import bitsandbytes.functional as F
ops = torch.ops.bitsandbytes
torch.manual_seed(0)
def refused(kind, make):
    try:
        make()
    except kind as error:
        return str(error)
    raise AssertionError("accepted")
"""


def passes(code: str) -> None:
    fresh.passes(START + code)


def test_int8_functions() -> None:
    # Sums past 2^24, which float32 does not hold.
    passes("""
A, B = torch.full((3, 4, 2000), 127, dtype=torch.int8), torch.full((5, 2000), 127, dtype=torch.int8)
A[0, 0, 0] = 126
want = (A.long() @ B.long().t())
assert torch.equal(F.int8_linear_matmul(A, B).long(), want) and F.int8_linear_matmul(A, B).dtype is torch.int32
out = torch.zeros(3, 4, 5, dtype=torch.int32)
assert F.int8_linear_matmul(A, B, out=out) is out and torch.equal(out.long(), want)
wrong = "A: dtype torch.float32 is not torch.int8"
assert wrong in refused(TypeError, lambda: F.int8_linear_matmul(A.float(), B))
assert wrong in refused(ValueError, lambda: ops.int8_linear_matmul(A.float(), B))
x, w = torch.randn(6, 64).half(), torch.randn(10, 64).half()
a, sa, _ = F.int8_vectorwise_quant(x); b, sb, _ = F.int8_vectorwise_quant(w)
dense = (a.double() * sa[:, None] / 127) @ (b.double() * sb[:, None] / 127).t()
y = F.int8_mm_dequant(F.int8_linear_matmul(a, b), sa, sb, bias=torch.ones(10).half())
torch.testing.assert_close(y.double(), dense + 1, rtol=1e-3, atol=1e-2)
torch.testing.assert_close(ops.int8_scaled_mm(a, b, sa, sb, dtype=torch.float32).double(), dense, rtol=1e-5, atol=1e-5)
# An outlier column is left out of the codes and multiplied in float16.
x[2, 7] = 20
a, sa, columns = F.int8_vectorwise_quant(x, threshold=6.0)
assert columns.tolist() == [7]
y, left = ops.int8_mixed_scaled_mm(x, a, b, sa, sb, columns)
assert torch.equal(left, x[:, [7]])
torch.testing.assert_close(y.float(), x.float() @ w.float().t(), rtol=0.02, atol=0.3)
rows, cols, row_scales, col_scales, found = F.int8_double_quant(x, threshold=6.0)
assert torch.equal(rows, a) and torch.equal(row_scales, sa) and found.tolist() == [7]
kept = x.float().masked_fill(x.abs() >= 6, 0)
torch.testing.assert_close(cols * col_scales / 127, kept, rtol=0, atol=kept.abs().max().item() / 250)
assert refused(ValueError, lambda: F.int8_double_quant(x, out_row=rows)) == "out_row must be None, got a tensor"
""")


def test_igemm() -> None:
    passes("""
warnings.simplefilter("ignore", FutureWarning)
def i8(*shape): return torch.randint(-128, 127, shape, dtype=torch.int8)
A, B = i8(4, 9), i8(9, 5)
assert torch.equal(F.igemm(A, B).long(), A.long() @ B.long())
assert torch.equal(F.igemm(A, B.t().contiguous(), transposed_B=True).long(), A.long() @ B.long())
A = i8(2, 4, 9)
assert torch.equal(F.igemm(A, B).long(), A.long() @ B.long())
C = i8(2, 9, 5)
assert torch.equal(F.batched_igemm(A, C).long(), A.long() @ C.long())
D, out = i8(2, 4, 3), torch.empty(9, 3, dtype=torch.int32)
F.igemm(A, D, out=out)
assert torch.equal(out.long(), torch.einsum("bsi,bso->io", A.long(), D.long()))
assert list(F.check_matmul(A, B, None, False, False)) == [2, 4, 5]
assert "A and B must fit each other" in refused(ValueError, lambda: F.igemm(A, D))
assert refused(TypeError, lambda: F.igemm(A.float(), B)) == "A must be torch.int8, got torch.float32"
""")


def test_int8_layers() -> None:
    passes("""
import warnings
from bitsandbytes.autograd._functions import MatMul8bitFp, MatMul8bitLt
warnings.simplefilter("error")
dense = torch.nn.Linear(64, 48)
layer = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False, threshold=6.0)
layer.load_state_dict(dense.state_dict())
fresh = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False)
# As in bitsandbytes, codes are for a layer that was moved to its device.
assert "Loading a quantized checkpoint into non-quantized Linear8bitLt is not supported" in refused(
    RuntimeError, lambda: fresh.load_state_dict(layer.state_dict()))
fresh.to("cpu").load_state_dict(layer.state_dict(), strict=True)
fresh.state.threshold = 6.0
x = torch.randn(5, 64).half().requires_grad_()
x.data[1, 3] = 9
weight = F.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB).half()
# It quantizes inputs on a CPU in evaluation alone, and casts the bias.
y = layer(x)
assert layer.bias.dtype is torch.float16
torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, layer.bias), rtol=1e-3, atol=1e-3)
y.sum().backward()
torch.testing.assert_close(x.grad, torch.ones(5, 48).half() @ weight)
z = layer.eval()(x)
assert not torch.equal(y, z) and torch.equal(z, fresh.eval()(x))
torch.testing.assert_close(z, y, rtol=0.02, atol=0.1)
state = bnb.MatmulLtState(CB=layer.weight.CB, SCB=layer.weight.SCB)
state.has_fp16_weights, state.threshold = False, 6.0
assert torch.equal(bnb.matmul(x, layer.weight, bias=layer.bias, state=state), y)
assert torch.equal(MatMul8bitFp.apply(x, layer.weight, None, layer.bias, state), y)
assert torch.equal(MatMul8bitLt.apply(x, layer.weight, None, layer.bias, state), z)
state.is_training = False
assert torch.equal(bnb.matmul(x, layer.weight, bias=layer.bias, state=state), z)
state.reset_grads()
assert state.CB is None and bnb.autograd._functions.MatmulLtState is bnb.MatmulLtState
# A weight that is trained.
leaf = torch.randn(48, 64, requires_grad=True)
for product in (bnb.matmul, MatMul8bitLt.apply):
    leaf.grad = None
    product(x.detach().float(), leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, x.detach().float().sum(0).expand(48, 64))
compiled = torch.compile(layer.train(), backend="aot_eager", fullgraph=True)
assert torch.equal(compiled(x), y)
table = bnb.nn.Embedding8bit(10, 64).to("cpu")
assert table(torch.tensor([1, 2])).shape == (2, 64)


class Mine(bnb.nn.OutlierAwareLinear):
    def quantize_weight(self, w, outlier_idx):
        return w.round()


mine = Mine(4, 4)
mine(torch.randn(2, 4))
assert mine.is_quantized and torch.equal(mine.weight, mine.weight.round())
assert "quantize_weight(w, outlier_idx)" in refused(
    NotImplementedError, lambda: bnb.nn.OutlierAwareLinear(4, 4)(torch.randn(2, 4)))
""")


@pytest.mark.slow
def test_operations_pass_torchs_own_checks() -> None:
    passes("""
from torch.library import opcheck
a, b = (torch.randint(-127, 127, (n, 16), dtype=torch.int8) for n in (5, 3))
sa, sb = torch.rand(5), torch.rand(3)
opcheck(ops.int8_linear_matmul.default, (a, b))
opcheck(ops.int8_linear_matmul.out, (a, b, torch.zeros(5, 3, dtype=torch.int32)))
opcheck(ops.int8_mm_dequant.default, (torch.ones(5, 3, dtype=torch.int32), sa, sb))
opcheck(ops.int8_scaled_mm.default, (a, b, sa, sb, torch.ones(3), torch.float32))
p, g = torch.randn(40), torch.randn(40)
opcheck(ops.optimizer_update_32bit.default, ("adam", g, p, torch.zeros(40), torch.zeros(40), None, 0.0, 0.0, 0.9, 0.999,
        0.0, 0.0, 1e-8, 0.0, 1, 0.1, 1.0))
codes = torch.zeros(40, dtype=torch.uint8)
opcheck(ops.optimizer_update_8bit_blockwise.default, ("lion", g, p, codes, None, 0.9, 0.99, 0.0, 0.0, 0.0, 1, 0.1,
        F.create_dynamic_map(), None, torch.zeros(1), None, 0.0, 1.0))
assert "g must be torch.float32, got torch.float16" in refused(RuntimeError, lambda: ops.optimizer_update_32bit(
    "adam", g.half(), p, p, p, None, 0.0, 0.0, 0.9, 0.999, 0.0, 0.0, 1e-8, 0.0, 1, 0.1, 1.0))
""")


def test_utilities() -> None:
    passes("""
t = torch.zeros(5); F.fill(t, 3.0); assert t.tolist() == [3.0] * 5
F.elementwise_func("arange", t, None, 0); assert t.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
F._mul(t, t.clone()); assert t.tolist() == [0.0, 1.0, 4.0, 9.0, 16.0]
assert "cos" in refused(NotImplementedError, lambda: F.elementwise_func("cos", t, None, 0))
assert bnb.utils.execute_and_return("echo 'two words'") == ("two words", "")
assert F.CUBLAS_Context.get_instance() is F.CUBLAS_Context.get_instance()

pooler = bnb.autograd._functions.GlobalOutlierPooler.get_instance()
pooler.add_outliers(torch.tensor([4, 2]), 8); pooler.add_outliers(torch.tensor([1]), 9)
assert pooler.get_current_outlier_idx().tolist() == [2, 4]

tracer = bnb.utils.OutlierTracer.get_instance()
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
assert tracer.get_outliers(model[0].weight) is None
tracer.initialize(model)
model[1].weight.data[:, 9] *= 50
x = torch.randn(3, 64); x[1, 5] = 7
model(x)
assert 5 in tracer.get_outliers(model[0].weight) and tracer.get_outliers(model[1].weight).tolist() == [9]
model(x); assert not model[0]._forward_pre_hooks and not model[1]._forward_pre_hooks

take = bnb.nn.modules.maybe_rearrange_weight
state = {"l.weight": torch.ones(1), "l.weight_format": torch.tensor(0)}
take(state, "l.", {}, True, [], [], []); assert list(state) == ["l.weight"]
state["l.weight_format"] = "col32"
assert "l.weight_format must be 'row' (0), got 'col32'" == refused(
    ValueError, lambda: take(state, "l.", {}, True, [], [], []))
assert bnb.cuda_specs.get_rocm_gpu_arch() == "unknown"
""")


def test_linear_casts_its_bias_as_bitsandbytes_does() -> None:
    passes("""
layer = bnb.nn.LinearNF4(64, 32).to("cpu")
assert layer.bias.dtype is torch.float32
y = layer(torch.randn(2, 64, dtype=torch.float16))
assert y.dtype is torch.float16 and layer.bias.dtype is torch.float16
w, s = F.quantize_nf4(torch.randn(64, 32))
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    bnb.matmul_4bit(torch.randn(1, 64), w, s)
assert len(seen) == 1 and "Re-quantize from the weight" in str(seen[0].message)
""")


@pytest.mark.slow
def test_report() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "halfbyte", "run", "-m", "bitsandbytes"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("=")
    assert "bitsandbytes v0.50.2+halfbyte" in done.stdout
    assert done.stdout.endswith("SUCCESS!\n")


def test_gemv_is_the_reference_product_to_the_bit() -> None:
    # bitsandbytes dequantizes and calls torch on the CPU; its own tests compare the two within torch's rounding.
    passes("""
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for nested in (False, True):
        for kind in ("nf4", "fp4"):
            w, x = torch.randn(96, 256, dtype=dtype), torch.randn(1, 256, dtype=dtype)
            packed, state = F.quantize_4bit(w, quant_type=kind, compress_statistics=nested)
            want = torch.nn.functional.linear(x, F.dequantize_4bit(packed, state))
            got = F.gemv_4bit(x, packed.t(), state=state)
            assert got.dtype is dtype and torch.equal(got, want)
            out = torch.empty_like(want)
            assert F.gemv_4bit(x, packed.t(), out=out, state=state) is out and torch.equal(out, want)
assert "state" in refused(ValueError, lambda: F.gemv_4bit(x, packed.t()))
""")
