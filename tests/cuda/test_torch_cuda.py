"""What users call, on a GPU: functions, modules, whole models, and everything that torch does around them."""

from __future__ import annotations

import copy
import io
import itertools
import json
import os
import pickle
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import halfbyte  # noqa: E402
import halfbyte.functional as F  # noqa: E402
import halfbyte.nn as hnn  # noqa: E402
from safetensors import safe_open  # noqa: E402

import kernels as k  # noqa: E402

ops = torch.ops.halfbyte
GOLDEN = Path(__file__).resolve().parent.parent / "golden"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
STORAGES = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def bound(x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The product in float64, and how far from it one in the dtype of `x` may be."""
    exact = x.detach().double() @ dense.double().T
    size = x.detach().double().abs() @ dense.double().abs().T
    if bias is not None:
        exact, size = exact + bias.detach().double(), size + bias.detach().double().abs()
    unit = torch.finfo(x.dtype).eps + (x.shape[-1] + 8) * torch.finfo(torch.float32).eps
    return exact, 4 * unit * size + 2.0**-24


def close(y: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    exact, most = bound(x, dense, bias)
    error = (y.detach().double() - exact).abs()
    assert bool((error <= most).all()), float((error / most).max())


def pair(n: int, columns: int, dtype: torch.dtype = torch.bfloat16, **kwargs: object):
    """A weight quantized on the GPU: codes, state, and its dense values."""
    values = torch.randn(n, columns, dtype=dtype, device="cuda") * torch.rand(n, 1, dtype=dtype, device="cuda")
    packed, state = F.quantize_4bit(values, **{"quant_type": "nf4", **kwargs})
    return packed, state, F.dequantize_4bit(packed, state)


def same_state(a: F.QuantState, b: F.QuantState) -> bool:
    parts = lambda s: (s.absmax, s.code, s.offset, *(() if s.state2 is None else (s.state2.absmax, s.state2.code)))  # noqa: E731
    return a == b and all(k.same_bits(p, q) for p, q in zip(parts(a), parts(b), strict=True))


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


# ---- modules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [hnn.LinearNF4, hnn.LinearFP4])
def test_moving_quantizes_once(kind: type) -> None:
    layer = kind(96, 48, compute_dtype=torch.bfloat16)
    on_cpu = copy.deepcopy(layer).to("cpu")
    on_gpu = layer.to("cuda")
    assert on_gpu.weight.is_cuda
    assert on_gpu.quant_state.absmax.is_cuda
    assert k.same_bits(on_gpu.weight.data, on_cpu.weight.data)
    assert same_state(on_gpu.quant_state, on_cpu.quant_state)
    x = torch.randn(3, 96, dtype=torch.bfloat16)
    torch.testing.assert_close(on_gpu(x.cuda()).cpu(), on_cpu(x), rtol=2e-2, atol=2e-2)
    back = copy.deepcopy(on_gpu).to("cpu")
    assert torch.equal(back(x), on_cpu(x))
    again = back.cuda()
    assert torch.equal(again(x.cuda()), on_gpu(x.cuda()))
    assert again.half().weight.dtype == torch.uint8


def test_a_parameter_moves_as_bitsandbytes_does() -> None:
    weight = hnn.Params4bit(torch.randn(32, 64, dtype=torch.float16), quant_type="nf4").cuda()
    assert weight.bnb_quantized
    assert weight.is_cuda
    packed = weight.data.clone()
    kept = {**weight.__dict__, "bnb_quantized": False}
    dense = F.dequantize_4bit(weight.data, weight.quant_state)
    again = hnn.Params4bit(dense.cpu(), requires_grad=False, **kept).to("cuda:0")
    assert k.same_bits(again.data, packed)
    assert weight.cpu().quant_state.absmax.device.type == "cpu"


def test_one_dense_weight_at_a_time() -> None:
    big = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, bias=False, dtype=torch.bfloat16) for _ in range(8)))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = halfbyte.quantize_model(big, skip=[], device="cuda", progress=False)
    held = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    dense = 2048 * 2048 * 2
    assert all(p.is_cuda for p in model.parameters())
    assert held < 9 * dense * 0.27 + 2**20
    assert peak <= held + 1.3 * dense, (peak, held, dense)


def test_state_dicts_cross_devices(tmp_path: Path) -> None:
    a = hnn.LinearNF4(96, 48).to("cuda")
    x = torch.randn(3, 96, device="cuda")
    expected = a(x)
    for kind in (pickle.dumps, None):
        if kind is None:
            torch.save(a.state_dict(), tmp_path / "a.pt")
            state = torch.load(tmp_path / "a.pt", weights_only=True, map_location="cpu")
            b = hnn.LinearNF4(96, 48).to("cuda")
            b.load_state_dict(state)
        else:
            b = pickle.loads(kind(a))
        assert torch.equal(b(x), expected)
    c = hnn.LinearNF4(96, 48, device="meta")
    c.load_state_dict(a.state_dict(), assign=True)
    assert torch.equal(c(x), expected)
    d = hnn.LinearNF4(96, 48).to("cpu")
    d.load_state_dict(a.state_dict())
    assert d.weight.device.type == "cpu"
    buffer = io.BytesIO()
    torch.save(a, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)


@pytest.mark.parametrize("dim", [64, 65, 33, 1])
def test_embedding(dim: int) -> None:
    for kind, dtype in itertools.product((hnn.EmbeddingNF4, hnn.EmbeddingFP4), FLOATS):
        table = kind(40, dim, dtype=dtype)
        on_cpu, on_gpu = copy.deepcopy(table).to("cpu"), table.to("cuda")
        for indices in (torch.randint(0, 40, (3, 4)), torch.tensor([39]).int(), torch.tensor([], dtype=torch.int64)):
            assert k.same_bits(on_gpu(indices.cuda()), on_cpu(indices))
    rows = on_gpu(torch.tensor([0, 40, -1, 2**40], device="cuda"))
    assert rows.isnan().all(1).tolist() == [False, True, True, True]
    assert k.same_bits(rows[0], on_cpu(torch.tensor(0)))


def test_autocast() -> None:
    layer = hnn.LinearNF4(64, 48).to("cuda")
    x = torch.randn(2, 64, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype=torch.float16):
        y = layer(x)
    # Computed in float16, and given back as the input's dtype.
    assert y.dtype == torch.float32
    assert k.same_bits(y, y.half().float())
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    # The dtype of autocast comes before that of the layer, also where torch makes the product.
    layer = hnn.LinearNF4(64, 48, compute_dtype=torch.float32).to("cuda")
    x = torch.randn(2000, 64, device="cuda", dtype=torch.float16)
    with torch.autocast("cuda", dtype=torch.float16), torch.no_grad():
        y = layer(x)
    assert y.dtype == torch.float16
    close(y, x, layer.dequantize(), layer.bias)


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = hnn.EmbeddingNF4(50, 64)
        self.first = hnn.LinearNF4(64, 128)
        self.second = hnn.LinearFP4(128, 33, bias=False)

    def forward(self, indices: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(self.table(indices) + shift)))


def gradients(model: torch.nn.Module, call, indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
    shift = torch.ones(64, device="cuda", requires_grad=True)
    model.zero_grad()
    y = call(indices, shift)
    y.pow(2).sum().backward()
    return y.detach(), shift.grad, model.first.bias.grad.clone()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_whole(backend: str) -> None:
    torch._dynamo.reset()
    model = Small().to("cuda")
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for size in ((2, 5), (3, 7), (8, 40)):
        indices = torch.randint(0, 50, size, device="cuda")
        for a, b in zip(gradients(model, compiled, indices), gradients(model, model, indices), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


# torch says so of a graph that it captures to have a pool of memory.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_compiled_with_cuda_graphs() -> None:
    torch._dynamo.reset()
    model = Small().to("cuda").eval()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    shift = torch.randn(64, device="cuda")
    with torch.no_grad():
        for _ in range(4):
            indices = torch.randint(0, 50, (2, 5), device="cuda")
            torch.testing.assert_close(compiled(indices, shift).clone(), model(indices, shift), rtol=1e-3, atol=1e-3)


def test_checkpointed_activations() -> None:
    from torch.utils.checkpoint import checkpoint

    model, indices = Small().to("cuda"), torch.randint(0, 50, (2, 3), device="cuda")
    expected = gradients(model, model, indices)
    for reentrant in (False, True):
        got = gradients(model, lambda *a, r=reentrant: checkpoint(model, *a, use_reentrant=r), indices)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


# ---- graphs, streams, threads, memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_everything_in_a_graph(nested: bool) -> None:
    values = torch.randn(256, 512, dtype=torch.bfloat16, device="cuda")
    xs = [torch.randn(m, 512, dtype=torch.bfloat16, device="cuda") for m in (1, 16, 20, 64)]
    indices = torch.zeros(5, dtype=torch.int64, device="cuda")

    def work() -> list[torch.Tensor]:
        packed, state = F.quantize_4bit(values, quant_type="nf4", compress_statistics=nested)
        codes, state8 = F.quantize_blockwise(values, blocksize=256)
        rows8, scales8, _ = F.int8_vectorwise_quant(values)
        table = hnn.Params4bit(packed, quant_state=state, bnb_quantized=True, quant_type="nf4")
        rows = ops.embedding_4bit(indices, table.data, *state.scales(), (256, 512), torch.bfloat16, 64, "nf4")
        products = [F.matmul_4bit(x, packed, state) for x in xs]
        back = [ops.linear_4bit_backward(y, packed, *state.scales(), *state.weight()) for y in products]
        return [
            packed, *(t for t in state.tensors()), F.dequantize_4bit(packed, state),
            codes, F.dequantize_blockwise(codes, state8), rows, *products, *back,
            rows8, F.int8_vectorwise_dequant(rows8, scales8),
        ]  # fmt: skip

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        results = work()
    for seed in range(3):
        torch.manual_seed(seed)
        values.normal_()
        indices.random_(256)
        for x in xs:
            x.normal_()
        graph.replay()
        with torch.no_grad():
            for a, b in zip(results, work(), strict=True):
                assert k.same_bits(a, b)


def test_first_use_may_be_in_a_graph() -> None:
    """In a process of its own, where no module of kernels is loaded yet."""
    code = """
import torch, halfbyte.functional as F
values = torch.randn(256, 512, dtype=torch.bfloat16, device="cuda")
x = torch.randn(4, 512, dtype=torch.bfloat16, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.no_grad(), torch.cuda.graph(graph):
    packed, state = F.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
    y = F.matmul_4bit(x, packed, state)
graph.replay()
other, its = F.quantize_4bit(values.cpu(), quant_type="nf4", compress_statistics=True)
assert torch.equal(packed.cpu(), other) and its == state, "codes"
assert torch.equal(y, F.matmul_4bit(x, packed, state)), "product"
"""
    run_python(code)


def run_python(code: str, **environment: str) -> None:
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")
def test_a_training_step_in_a_graph() -> None:
    model = torch.nn.Sequential(hnn.LinearNF4(64, 128), torch.nn.GELU(), hnn.LinearNF4(128, 64)).to("cuda")
    static = torch.randn(4, 64, device="cuda", requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(model), (static,))
    for _ in range(2):
        x = torch.randn(4, 64, device="cuda", requires_grad=True)
        z = x.detach().clone().requires_grad_()
        a, b = graphed(x), model(z)
        a.sum().backward()
        b.sum().backward()
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(x.grad, z.grad)


def test_work_goes_to_the_current_stream() -> None:
    packed, state, dense = pair(4096, 4096)
    x = torch.empty(4, 4096, dtype=torch.bfloat16, device="cuda")
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    for round_ in range(3):
        results = []
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                # Were it on another stream, the product would not wait for this.
                torch.cuda._sleep(20_000_000)
                own = torch.full_like(x, float(number + round_))
                results.append((own, F.matmul_4bit(own, packed, state)))
        torch.cuda.synchronize()
        for own, y in results:
            close(y, own, dense)


def test_threads_share_a_module() -> None:
    layer = hnn.LinearNF4(512, 256).to("cuda").to(torch.bfloat16)
    xs = [torch.randn(m, 512, dtype=torch.bfloat16, device="cuda") for m in range(1, 9)]
    expected = [layer(x).detach() for x in xs]
    wrong: list[object] = []

    def work(x: torch.Tensor, y: torch.Tensor) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(50):
                    own = x.clone().requires_grad_()
                    out = layer(own)
                    out.sum().backward()
                    if not torch.equal(out.detach(), y):
                        wrong.append(x.shape)
        except Exception as error:
            wrong.append(error)

    layer.requires_grad_(False)
    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=pair_) for pair_ in zip(xs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("setting", ["expandable_segments:True", "backend:cudaMallocAsync", "max_split_size_mb:32"])
def test_allocators(setting: str) -> None:
    code = """
import gc, torch, halfbyte.functional as F, halfbyte.nn as hnn
layer = hnn.LinearNF4(512, 512).to("cuda").to(torch.bfloat16)
for i in range(20):
    x = torch.randn(1 + 7 * i, 512, dtype=torch.bfloat16, device="cuda")
    y = layer(x)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, layer.dequantize(torch.bfloat16), layer.bias),
                               rtol=3e-2, atol=3e-2)
    del x, y
    gc.collect(); torch.cuda.empty_cache()
"""
    run_python(code, PYTORCH_CUDA_ALLOC_CONF=setting)


def test_a_pool_of_memory() -> None:
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        packed, state, dense = pair(256, 512, compress_statistics=True)
    x = torch.randn(40, 512, dtype=torch.bfloat16, device="cuda")
    close(F.matmul_4bit(x, packed, state), x, dense)


def test_every_gpu() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    values = torch.randn(96, 512, dtype=torch.bfloat16)
    first = None
    for index in range(torch.cuda.device_count()):
        # The current device stays the first one.
        packed, state = F.quantize_4bit(values.to(f"cuda:{index}"), quant_type="nf4", compress_statistics=True)
        x = torch.ones(3, 512, dtype=torch.bfloat16, device=f"cuda:{index}")
        y = F.matmul_4bit(x, packed, state)
        assert y.device.index == index
        first = y.cpu() if first is None else first
        assert torch.equal(y.cpu(), first)
    assert torch.cuda.current_device() == 0
    layer = hnn.LinearNF4(512, 96).to("cuda:0")
    x = torch.randn(3, 512)
    y = layer(x.to("cuda:0"))
    assert torch.equal(layer.to("cuda:1")(x.to("cuda:1")).cpu(), y.cpu())
    with pytest.raises(ValueError, match="cuda:1"):
        F.matmul_4bit(torch.ones(3, 512, device="cuda:0"), *F.quantize_4bit(values.to("cuda:1")))


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


# ---- whole models ----------------------------------------------------------------------------------------------------


def tiny_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=160, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)


def test_a_llama_from_quantizing_to_generating(tmp_path: Path) -> None:
    reference = halfbyte.quantize_model(copy.deepcopy(tiny_llama()), progress=False)
    model = halfbyte.quantize_model(tiny_llama(), device="cuda", progress=False).eval()
    assert isinstance(model.model.layers[0].mlp.down_proj, hnn.Linear4bit)
    ours, theirs = model.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert k.same_bits(value, theirs[name]), name
    ids = torch.randint(0, 160, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(model(ids.cuda()).logits.cpu(), reference(ids).logits, rtol=5e-2, atol=5e-2)
        text = model.generate(ids[:, :8].cuda(), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert text.shape == (2, 20)
    back = halfbyte.dequantize_model(model, torch.bfloat16)
    assert back.model.layers[0].mlp.down_proj.weight.is_cuda


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32 matrix multiplication")
def test_a_llama_compiled_with_a_training_step() -> None:
    torch._dynamo.reset()
    model = halfbyte.quantize_model(tiny_llama(), device="cuda", progress=False)
    ids = torch.randint(0, 160, (2, 40), device="cuda")
    norm = model.model.norm.weight
    gradients = []
    for call in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        call(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(norm.grad.float().clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=5e-2, atol=5e-3)


def test_a_lora_learns() -> None:
    peft = pytest.importorskip("peft")
    model = halfbyte.quantize_model(tiny_llama(), device="cuda", progress=False)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    ids = torch.randint(0, 160, (4, 32), device="cuda")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5, losses


def test_a_checkpoint_straight_to_the_gpu(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = tiny_llama()
    model.save_pretrained(tmp_path / "dense")
    config = halfbyte.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
    )
    halfbyte.quantize_checkpoint(tmp_path / "dense", tmp_path / "nf4", config)
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(model.config)
    loaded = halfbyte.load_quantized(empty, tmp_path / "nf4", device="cuda").eval()
    assert all(p.is_cuda for p in loaded.parameters())
    ids = torch.randint(0, 160, (1, 9), device="cuda")
    expected = halfbyte.quantize_model(model, config, device="cuda", progress=False).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected(ids).logits)
