"""CUDA graphs, streams, threads and memory."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading

import pytest

torch = pytest.importorskip("torch")

import halfbyte.functional as F  # noqa: E402
import halfbyte.nn as hnn  # noqa: E402
from packed_pairs import close, ops, pair  # noqa: E402

import kernels as k  # noqa: E402


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
import torch, halfbyte.functional as F  # noqa: E402
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=600)
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
import gc, torch, halfbyte.functional as F, halfbyte.nn as hnn  # noqa: E402
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
