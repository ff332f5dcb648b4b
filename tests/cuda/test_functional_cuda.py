"""Functions and operations on a GPU: the bits of the processor, products, `opcheck`, and what is refused."""

from __future__ import annotations

import copy
import itertools
import json
import warnings
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import halfbyte.functional as F  # noqa: E402
from packed_pairs import FLOATS, close, ops, pair, same_state  # noqa: E402
from safetensors import safe_open  # noqa: E402

import kernels as k  # noqa: E402

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
STORAGES = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


# ---- functions -------------------------------------------------------------------------------------------------------


def test_golden_vectors() -> None:
    with safe_open(GOLDEN / "blockwise4.safetensors", "pt") as golden:
        cases = json.loads(golden.metadata()["cases"])
        differing = 0
        for number, case in enumerate(cases):
            get = lambda name, n=number: golden.get_tensor(f"c{n:03d}.{name}").cuda()  # noqa: E731
            packed, state = F.quantize_4bit(
                get("input"),
                blocksize=case["blocksize"],
                quant_type=case["quant_type"],
                compress_statistics=case["nested"],
            )
            wrong = int((packed.view(-1) != get("weight").view(-1)).sum())
            # CUDA's reciprocal is an approximation there: a few FP4 codes of all the file's are one rank off.
            assert wrong == 0 or case["quant_type"] == "fp4", case
            differing += wrong
            assert k.same_bits(state.absmax, get("weight.absmax")), case
            stats = {n.partition(".weight.")[2]: golden.get_tensor(n).cuda()
                     for n in golden.keys() if n.startswith(f"c{number:03d}.weight.")}  # noqa: SIM118  # fmt: skip
            theirs = F.QuantState.from_dict(stats, "cuda")
            assert k.same_bits(F.dequantize_4bit(get("weight"), theirs).view(-1), get("dequantized").view(-1)), case
    assert differing <= 18


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_same_bits_as_on_the_processor(dtype: torch.dtype, quant_type: str, nested: bool) -> None:
    shapes = [(64, 64), (7, 65), (1, 1), (3, 0), (), (2, 3, 5), (1000, 333), (513, 4096)]
    for shape, blocksize in itertools.product(shapes, k.BLOCK_SIZES):
        values = torch.randn(shape).to(dtype)
        how = {"quant_type": quant_type, "blocksize": blocksize, "compress_statistics": nested}
        packed, state = F.quantize_4bit(values, **how)
        on_gpu, its = F.quantize_4bit(values.cuda(), **how)
        assert k.same_bits(on_gpu, packed)
        assert same_state(its, state), (shape, blocksize)
        assert its.absmax.is_cuda
        dense = F.dequantize_4bit(on_gpu, its)
        assert dense.shape == shape
        assert k.same_bits(dense, F.dequantize_4bit(packed, state))
        out = torch.empty_like(dense)
        assert F.dequantize_4bit(on_gpu, its, out=out) is out
        assert k.same_bits(out, dense)
    strided = torch.randn(48, 200, device="cuda").to(dtype).t()[::2]
    a, b = F.quantize_4bit(strided, quant_type=quant_type), F.quantize_4bit(strided.cpu(), quant_type=quant_type)
    assert k.same_bits(a[0], b[0])


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_every_storage(storage: torch.dtype) -> None:
    for n, columns in ((48, 96), (7, 65)):
        values = torch.randn(n, columns, dtype=torch.bfloat16)
        packed, state = F.quantize_4bit(values, quant_type="nf4", quant_storage=storage)
        on_gpu, its = F.quantize_4bit(values.cuda(), quant_type="nf4", quant_storage=storage)
        assert on_gpu.dtype == storage
        assert k.same_bits(on_gpu.view(-1).view(torch.uint8), packed.view(-1).view(torch.uint8))
        x = torch.randn(3, columns, dtype=torch.bfloat16, device="cuda")
        close(F.matmul_4bit(x, on_gpu, its), x, F.dequantize_4bit(packed, state).cuda())


@pytest.mark.parametrize("blocksize", [1, 3, 64, 100, 256, 4096])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_8_bits(dtype: torch.dtype, blocksize: int) -> None:
    for shape in ((5, 77), (1,), (0,), (300, 1000)):
        values = torch.randn(shape).to(dtype)
        codes, state = F.quantize_blockwise(values, blocksize=blocksize)
        on_gpu, its = F.quantize_blockwise(values.cuda(), blocksize=blocksize)
        assert k.same_bits(on_gpu, codes)
        assert same_state(its, state)
        assert k.same_bits(F.dequantize_blockwise(on_gpu, its), F.dequantize_blockwise(codes, state))
    nested, its = F.quantize_blockwise(values.cuda(), blocksize=64, nested=True)
    assert k.same_bits(nested, F.quantize_blockwise(values, blocksize=64, nested=True)[0])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_8_bit_rows(dtype: torch.dtype) -> None:
    for shape in ((5, 77), (1, 1), (3, 0), (0, 4), (2, 3, 1000), (300, 4096)):
        values = torch.randn(shape).to(dtype)
        for threshold in (0.0, 2.5):
            ours, theirs = (F.int8_vectorwise_quant(v, threshold) for v in (values.cuda(), values))
            for a, b in zip(ours, theirs, strict=True):
                assert k.same_bits(a, b)
        assert k.same_bits(F.int8_vectorwise_dequant(*ours[:2]), F.int8_vectorwise_dequant(*theirs[:2]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_products_and_gradients(dtype: torch.dtype, nested: bool) -> None:
    shapes = [(48, 96), (7, 65), (1, 1), (33, 130), (1000, 512), (256, 4096), (4096, 1024)]
    rows = (1, 2, 5, 16, 17, 31, 32, 33, 64, 100, 600)
    for (n, columns), m in itertools.product(shapes, rows):
        packed, state, dense = pair(n, columns, dtype, compress_statistics=nested)
        x = torch.randn(m, columns, dtype=dtype, device="cuda", requires_grad=True)
        bias = torch.randn(n, dtype=dtype, device="cuda", requires_grad=True) if m % 2 else None
        y = F.matmul_4bit(x, packed, state, bias=bias)
        close(y, x, dense, bias)
        assert k.same_bits(y.detach(), F.matmul_4bit(x, packed, state, bias=bias).detach()), "differs from run to run"
        grad = torch.randn_like(y)
        y.backward(grad)
        close(x.grad, grad, dense.T)
        if bias is not None:
            torch.testing.assert_close(bias.grad, grad.sum(0), rtol=2e-2, atol=2e-2)


def test_products_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from halfbyte.backends import cuda as _cuda

    for nested in (False, True):
        packed, state, dense = pair(1000, 1024, compress_statistics=nested)
        x = torch.randn(64, 1024, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        whole = F.matmul_4bit(x, packed, state)
        monkeypatch.setattr(_cuda, "_DENSE_BYTES", 2**18)
        monkeypatch.setattr(_cuda, "_LARGE", 2**40)
        y = F.matmul_4bit(x, packed, state, bias=torch.zeros(1000, dtype=torch.bfloat16, device="cuda"))
        monkeypatch.undo()
        close(y, x, dense)
        close(whole, x, dense)
        grad = torch.randn_like(y)
        y.backward(grad)
        close(x.grad, grad, dense.T)


def test_inputs_of_any_layout() -> None:
    packed, state, dense = pair(96, 128)
    wide = torch.randn(3, 300, dtype=torch.bfloat16, device="cuda")
    column = torch.randn(128, 3, dtype=torch.bfloat16, device="cuda")
    for x in (wide[:, 1:129], wide[:, ::2][:, :128], wide.view(-1)[1:129].view(1, 128), column.t(), column.t()[0]):
        close(F.matmul_4bit(x, packed, state), x, dense)
    assert F.matmul_4bit(wide.new_empty(2, 0, 128), packed, state).shape == (2, 0, 96)


def test_gradients_of_every_order() -> None:
    torch.manual_seed(0)
    packed, state, dense = pair(6, 33, torch.float32)
    x = torch.randn(2, 4, 33, device="cuda", requires_grad=True)
    bias = torch.randn(6, device="cuda", requires_grad=True)

    def gradients(product):
        y = product(x, bias)
        first = torch.autograd.grad((y**3).sum(), (x, bias), create_graph=True)
        return y, *first, *torch.autograd.grad(sum((g**2).sum() for g in first), (x, bias))

    ours = gradients(lambda x, bias: F.matmul_4bit(x, packed, state, bias=bias))
    theirs = gradients(lambda x, bias: torch.nn.functional.linear(x, dense, bias))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_nothing_waits_for_the_gpu(no_waiting: None) -> None:
    values = torch.randn(256, 512, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(4, 512, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    for nested in (False, True):
        packed, state = F.quantize_4bit(values, quant_type="nf4", compress_statistics=nested)
        F.dequantize_4bit(packed, state)
        F.matmul_4bit(x, packed, state).sum().backward()
    codes, state8 = F.quantize_blockwise(values)
    F.dequantize_blockwise(codes, state8)


# ---- opcheck ---------------------------------------------------------------------------------------------------------


def opcheck(*args: object) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        torch.library.opcheck(*args)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_opcheck(dtype: torch.dtype, nested: bool) -> None:
    for n, columns in ((64, 64), (7, 65)):
        values = torch.randn(n, columns, dtype=dtype, device="cuda")
        opcheck(ops.quantize_4bit.default, (values, 64, "nf4"))
        opcheck(ops.quantize_4bit_nested.default, (values, 64, "nf4"))
        packed, state = F.quantize_4bit(values, quant_type="nf4", compress_statistics=nested)
        tensors, (shape, *how) = (packed, *state.scales()), state.weight()
        opcheck(ops.dequantize_4bit.default, (*tensors, shape, dtype, *how))
        if nested:
            opcheck(ops.expand_absmax.default, tensors[1:])
        else:
            opcheck(ops.compress_absmax.default, (state.absmax,))
        for lead in ((3,), (2, 3), (40,), ()):
            x = torch.randn(*lead, columns, dtype=dtype, device="cuda", requires_grad=True)
            bias = torch.randn(n, dtype=dtype, device="cuda", requires_grad=True)
            grad = torch.randn(*lead, n, dtype=dtype, device="cuda", requires_grad=True)
            opcheck(ops.linear_4bit.default, (x, *tensors, bias, shape, *how))
            opcheck(ops.linear_4bit_backward.default, (grad, *tensors, shape, *how))
        indices = torch.randint(0, n, (3, 4), device="cuda")
        opcheck(ops.embedding_4bit.default, (indices, *tensors, shape, dtype, *how))
    code = F.create_dynamic_map().cuda()
    opcheck(ops.quantize_blockwise.default, (values, code, 64))
    codes, absmax = ops.quantize_blockwise(values, code, 64)
    opcheck(ops.dequantize_blockwise.default, (codes, absmax, code, 64, dtype))
    opcheck(ops.quantize_rows.default, (values,))
    opcheck(ops.dequantize_rows.default, (*ops.quantize_rows(values), dtype))


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_devices_must_agree() -> None:
    packed, state, _ = pair(48, 64)
    x = torch.randn(2, 64, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(ValueError, match="packed: is on cuda:0, but x is on cpu"):
        F.matmul_4bit(x.cpu(), packed, state)
    with pytest.raises(ValueError, match="is on cpu"):
        F.matmul_4bit(x, packed.cpu(), state)
    on_cpu = copy.deepcopy(state).to("cpu")
    with pytest.raises(ValueError, match="absmax: is on cpu, but packed is on cuda:0"):
        F.dequantize_4bit(packed, on_cpu)
    with pytest.raises(ValueError, match="bias: is on cpu"):
        F.matmul_4bit(x, packed, state, bias=torch.zeros(48))
    with pytest.raises(ValueError, match="out: "):
        F.dequantize_4bit(packed, state, out=torch.empty(48, 64, dtype=torch.bfloat16))
    # None of it has spoilt anything.
    assert F.matmul_4bit(x, packed, state).shape == (2, 48)


def test_scales_must_be_on_the_device() -> None:
    codes, absmax2, offset = ops.compress_absmax(torch.rand(300, device="cuda"))
    for wrong in ((codes, absmax2.cpu(), offset), (codes, absmax2, offset.cpu())):
        with pytest.raises(ValueError, match="is on cpu, but packed is on cuda:0"):
            ops.expand_absmax(*wrong)
    torch.cuda.synchronize()


def test_a_code_of_any_order_on_any_device() -> None:
    values, code = torch.randn(5), torch.linspace(1, -1, 256)
    codes, state = F.quantize_blockwise(values.cuda(), code=code)
    expected, on_cpu = F.quantize_blockwise(values, code=code)
    assert k.same_bits(codes.cpu(), expected)
    assert k.same_bits(F.dequantize_blockwise(codes, state).cpu(), F.dequantize_blockwise(expected, on_cpu))


def test_under_transforms() -> None:
    weight, x = torch.randn(16, 64, device="cuda"), torch.randn(3, 64, device="cuda")

    def loss(x: torch.Tensor) -> torch.Tensor:
        packed, state = F.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        return F.matmul_4bit(x, packed, state).sum()

    expected = F.dequantize_4bit(*F.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)).sum(0)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected.expand(3, 64), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.func.functionalize(loss)(x), loss(x))


def test_a_packed_weight_that_is_not_contiguous() -> None:
    packed, state, dense = pair(48, 64)
    x = torch.randn(2, 64, dtype=torch.bfloat16, device="cuda")
    wide = torch.stack([packed, packed], 1)[:, 0]
    assert not wide.is_contiguous()
    close(F.matmul_4bit(x, wide, state), x, dense)
    assert k.same_bits(F.dequantize_4bit(wide, state), dense)
    shifted = torch.nn.functional.pad(packed.view(-1), (1, 0))[1:].view(-1, 1)
    close(F.matmul_4bit(x, shifted, state), x, dense)
