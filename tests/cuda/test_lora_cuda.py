"""`halfbyte.nn.lora` on a GPU: values, launches, no waiting for the device, and capture in a graph."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from halfbyte.functional import dequantize_4bit, quantize_4bit  # noqa: E402
from halfbyte.nn import lora  # noqa: E402
from halfbyte.nn.lora import Adapter, lora_linear_4bit  # noqa: E402

K, N, RANK = 512, 768, 16
EPS = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Case:
    """A packed weight, an input and an adapter; `rows` decides which kernel multiplies."""

    def __init__(self, rows: int, x_dtype: Any, factor_dtype: Any = torch.float32, nested: bool = True) -> None:
        generator = torch.Generator("cuda").manual_seed(rows)

        def normal(*shape: int) -> Any:
            return torch.randn(*shape, generator=generator, device="cuda")

        self.packed, self.state = quantize_4bit(normal(N, K) / K**0.5, quant_type="nf4", compress_statistics=nested)
        self.dense = dequantize_4bit(self.packed, self.state).double()
        self.x = normal(2, rows, K).to(x_dtype).requires_grad_()
        self.grad = normal(2, rows, N).to(x_dtype)
        A = (normal(RANK, K) / K**0.5).to(factor_dtype).requires_grad_()
        B = (normal(N, RANK) / RANK**0.5).to(factor_dtype).requires_grad_()
        self.adapter = Adapter(A, B, 2.0)
        self.leaves = [self.x, A, B]

    def __call__(self, compute: Any, scaling: float = 2.0) -> Any:
        adapters = [self.adapter._replace(scaling=scaling)] if scaling else []
        return lora_linear_4bit(self.x, self.packed, self.state, None, adapters, compute)


def error(found: Any, exact: Any) -> float:
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compute", DTYPES, ids=str)
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_on_a_gpu_equals_float64(rows: int, x_dtype: Any, compute: Any, factor_dtype: Any) -> None:
    case = Case(rows, x_dtype, factor_dtype)
    y = case(compute)
    assert y.dtype is x_dtype
    found = torch.autograd.grad(y, case.leaves, case.grad)
    x, A, B = (leaf.detach().double().requires_grad_() for leaf in case.leaves)
    exact = x @ case.dense.T + 2.0 * (x @ A.T) @ B.T
    tolerance = 4 * max(EPS[t] for t in (x_dtype, compute, factor_dtype))
    assert error(y, exact) < tolerance
    for leaf, a, b in zip(case.leaves, found, torch.autograd.grad(exact, (x, A, B), case.grad.double()), strict=True):
        assert a.dtype is leaf.dtype
        assert error(a, b) < tolerance


def test_lora_small_adapter_survives_a_float32_stream_on_a_gpu() -> None:
    case = Case(300, torch.float32)
    difference = case(torch.bfloat16, 2.0**-12) - case(torch.bfloat16, 0.0)
    expected = 2.0**-12 * (case.x.double() @ case.adapter.A.double().T) @ case.adapter.B.double().T
    assert error(difference, expected) < 0.02


def launches(step: Any) -> list[str]:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    return [event.name for event in profiled.events() if event.device_type == DeviceType.CUDA]


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
@pytest.mark.parametrize(("x_dtype", "most"), [(torch.float32, 16), (torch.bfloat16, 12)], ids=str)
def test_lora_launches_on_a_gpu(x_dtype: Any, most: int) -> None:
    """Forward and backward, both packed products of two kernels each included; some products sum up in a second one."""
    case = Case(1024, x_dtype)
    assert lora._device_widens(0, torch.bfloat16), "torch on this machine has no mixed products"

    def step() -> None:
        torch.autograd.grad(case(torch.bfloat16), case.leaves, case.grad)

    names = launches(step)
    assert sum("splitKreduce" not in name and "Memset" not in name for name in names) <= most, names


@pytest.fixture
def warm_case() -> Case:
    """A case whose kernels are loaded; the first use may wait."""
    case = Case(300, torch.float32)
    torch.autograd.grad(case(torch.bfloat16), case.leaves, case.grad)
    return case


def test_lora_never_waits_for_the_gpu(warm_case: Case, no_waiting: None) -> None:
    torch.autograd.grad(warm_case(torch.bfloat16), warm_case.leaves, warm_case.grad)


def test_lora_keeps_no_dense_weight_on_a_gpu() -> None:
    case = Case(64, torch.bfloat16)
    case(torch.bfloat16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = case(torch.bfloat16)
    kept = torch.cuda.memory_allocated() - before
    # The output, the casts of A and B, and the rank-sized product; blocks of 512 bytes.
    assert kept <= 2 * (y.numel() + RANK * (K + N) + 128 * RANK) + 4 * 512


def test_lora_step_is_captured_in_a_graph() -> None:
    case = Case(300, torch.float32)

    def step() -> tuple[Any, ...]:
        # Two layers with one input: the graph has to cast what it reads.
        shared = case.x * 1.0
        x, case.x = case.x, shared
        try:
            y = case(torch.bfloat16) + case(torch.bfloat16)
        finally:
            case.x = x
        return y.detach(), *torch.autograd.grad(y, case.leaves, case.grad)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor in case.leaves:
            tensor.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)
