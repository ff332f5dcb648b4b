"""`halfbyte.nn.lora` on a GPU: values, launches, no waiting for the device, and capture in a graph."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from halfbyte.backends import cuda_lora  # noqa: E402
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


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [2, 6, 8, 16, 24, 32, 50, 64])
@pytest.mark.parametrize("factor_dtype", ["float32", "low"])
def test_products_of_adapters_equal_float64(low: Any, rank: int, factor_dtype: str) -> None:
    """Rows and columns that fill no tile, rows of several blocks, either way that a factor lies."""
    kind = torch.float32 if factor_dtype == "float32" else low
    for rows, columns in ((1, 8), (45, 520), (700, 1096), (2300, 264)):
        factor = (torch.randn(rank, columns, device="cuda") / columns**0.5).to(kind)
        for dtype in (torch.float32, low):
            x = torch.randn(rows, columns, device="cuda").to(dtype)
            cast, h = cuda_lora.down(x, factor, low)
            assert torch.equal(cast, x.to(low))
            assert error(h, cast.double() @ factor.to(low).double().T) < EPS[low]
            for out in {torch.float32, dtype}:
                for transposed in (False, True):
                    y = torch.randn(rows, columns, device="cuda").to(dtype)
                    turned = torch.empty(rank, columns, device="cuda", dtype=low)
                    given = factor.t().contiguous() if transposed else factor
                    exact = y.double() + 0.75 * h.double() @ factor.to(low).double()
                    found = cuda_lora.up(y.clone(), h, given, transposed, 0.75, out, turned)
                    assert found.dtype is out
                    assert error(found, exact) < EPS[out]
                    assert torch.equal(turned, factor.to(low))
            assert (
                error(cuda_lora.product(h, factor, False, 2.0, torch.float32), 2 * h.double() @ factor.to(low).double())
                < 1e-6
            )


@pytest.mark.parametrize("train", ["x", "A", "B", "AB", "xAB"])
@pytest.mark.parametrize("ranks", [(16,), (3,), (72,), (64, 3), (3, 8), (8, 16)], ids=str)
def test_adapters_with_kernels_and_without(ranks: tuple[int, ...], train: str) -> None:
    """Several adapters, some with an input of their own, as dropout gives it; gradients for some leaves alone."""
    case = Case(40, torch.float32)
    leaves = [case.x.detach().requires_grad_("x" in train)]
    adapters, doubles = [], [leaves[0].detach().double().requires_grad_("x" in train)]
    exact = doubles[0] @ case.dense.T
    kept, kept64 = list(leaves), list(doubles)
    for i, rank in enumerate(ranks):
        A = (torch.randn(rank, K, device="cuda") / K**0.5).requires_grad_("A" in train)
        B = (torch.randn(N, rank, device="cuda") / rank**0.5).requires_grad_("B" in train)
        own = leaves[0] * 1.25 if i % 2 else None
        adapters.append(Adapter(A, B, 0.5 + i, own))
        a, b = (part.detach().double().requires_grad_(part.requires_grad) for part in (A, B))
        exact = exact + (0.5 + i) * ((doubles[0] * 1.25 if i % 2 else doubles[0]) @ a.T) @ b.T
        kept += [A, B]
        kept64 += [a, b]
    y = lora_linear_4bit(leaves[0], case.packed, case.state, None, adapters, torch.bfloat16)
    assert error(y, exact) < 0.01
    wanted = [(leaf, double) for leaf, double in zip(kept, kept64, strict=True) if leaf.requires_grad]
    found = torch.autograd.grad(y, [leaf for leaf, _ in wanted], case.grad)
    expected = torch.autograd.grad(exact, [double for _, double in wanted], case.grad.double())
    for a, b in zip(found, expected, strict=True):
        assert a.dtype is torch.float32
        assert error(a, b) < 0.015


def test_inputs_that_lie_anywhere() -> None:
    """Transposed, strided and misaligned ones, and factors that are not contiguous."""
    case = Case(24, torch.float32)
    A, B, scaling, _ = case.adapter
    flat = torch.randn(24 * K + 1, device="cuda")
    inputs = [
        torch.randn(K, 24, device="cuda").t(),
        torch.randn(24, 2 * K, device="cuda")[:, ::2],
        flat[1:].view(24, K),
    ]
    for x in inputs:
        for adapter in (case.adapter, Adapter(A.detach().t().contiguous().t(), B, scaling)):
            y = lora_linear_4bit(x, case.packed, case.state, None, [adapter], torch.bfloat16)
            exact = x.double() @ case.dense.T + scaling * (x.double() @ A.double().T) @ B.double().T
            assert error(y, exact) < 0.01


def test_adapters_on_another_device_are_refused() -> None:
    case = Case(4, torch.float32)
    case.adapter = case.adapter._replace(A=case.adapter.A.detach().cpu())
    with pytest.raises(ValueError, match="A is on cpu"):
        case(torch.bfloat16)


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
@pytest.mark.parametrize(("x_dtype", "most"), [(torch.float32, 10), (torch.bfloat16, 10)], ids=str)
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
