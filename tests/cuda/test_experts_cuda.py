"""Blocks of experts with 4-bit weights on the GPU, against float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from halfbyte import _native  # noqa: E402
from halfbyte.backends import cuda_experts, experts_torch  # noqa: E402
from halfbyte.nn import Expert, Experts4bit, Linear4bit  # noqa: E402
from halfbyte.nn.expert_lora import adapted_experts  # noqa: E402
from halfbyte.nn.lora import Adapter  # noqa: E402

import kernels as k  # noqa: E402

NAMES = {d: str(d).removeprefix("torch.") for d in (torch.bfloat16, torch.float16, torch.float32)}


@dataclass
class Experts:
    """Random experts of one shape: what the core makes of them, and what they are in float64."""

    native: _native.CudaExperts
    table: torch.Tensor
    dense: list[torch.Tensor]
    """Of each projection `[experts][n][k]`."""
    held: list[k.Quantized]
    dtype: torch.dtype
    maps: torch.Tensor | None
    """With them the kernel for many tokens takes part."""

    @staticmethod
    def random(
        experts: int,
        hidden: int,
        intermediate: int,
        dtype: torch.dtype = torch.bfloat16,
        *,
        gated: bool = True,
        nested: bool = False,
        quant_type: str = "nf4",
        blocksize: int = 64,
        tiles: bool = True,
    ) -> Experts:
        torch.manual_seed(experts * hidden + intermediate)
        rows, held, dense, shapes = [], [], [], []
        for p in range(3 if gated else 2):
            shape = (hidden, intermediate) if p == (2 if gated else 1) else (intermediate, hidden)
            matrices = []
            shapes.append(shape)
            for _ in range(experts):
                values = torch.randn(shape, device="cuda") / shape[1] ** 0.5
                make = k.quantize_nested if nested else k.quantize
                weight = make(values.view(-1), quant_type, blocksize)
                held.append(weight)
                rows.append([0 if part is None else part.data_ptr() for part in weight.parts])
                read = k.dequantize(weight, values.numel(), torch.float32, quant_type, blocksize)
                matrices.append(read.view(shape).double())
            dense.append(torch.stack(matrices))
        native = _native.CudaExperts(
            torch.cuda.current_device(),
            NAMES[dtype],
            experts,
            hidden,
            intermediate,
            gated,
            quant_type,
            blocksize,
            nested,
        )
        maps = None
        if tiles:
            codes, scales = (
                [[row[i] for row in rows[p * experts : (p + 1) * experts]] for p in range(len(dense))] for i in range(2)
            )
            plain = blocksize == 64 and not nested
            maps = cuda_experts.tensor_maps(torch.cuda.current_device(), codes, scales if plain else None, shapes)
        return Experts(native, torch.tensor(rows, dtype=torch.int64, device="cuda"), dense, held, dtype, maps)

    @property
    def tensor_maps(self) -> int:
        """Their address, or 0."""
        return 0 if self.maps is None else self.maps.data_ptr()

    def __call__(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, activation: str = "silu"
    ) -> torch.Tensor:
        """By the kernels."""
        tokens, top_k = ids.shape
        y = torch.full_like(x, float("nan"))
        workspace = torch.empty(self.native.workspace(tokens, top_k), dtype=torch.uint8, device="cuda")
        names = self.native.launch(
            torch.cuda.current_stream().cuda_stream, tokens, top_k, x.data_ptr(), ids.data_ptr(), weights.data_ptr(),
            NAMES[weights.dtype], self.table.data_ptr(), self.tensor_maps, 0, 0, activation, workspace.data_ptr(),
            y.data_ptr(),
        )  # fmt: skip
        assert len(names.split()) == 2
        return y

    def expected(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """With silu."""
        y = torch.zeros(x.shape, dtype=torch.float64, device="cuda")
        for expert in range(len(self.dense[0])):
            token, choice = torch.where(ids == expert)
            if not len(token):
                continue
            rows = x[token].double()
            hidden = torch.nn.functional.silu(rows @ self.dense[0][expert].T)
            if len(self.dense) == 3:
                hidden = hidden * (rows @ self.dense[1][expert].T)
            out = hidden.to(self.dtype).double() @ self.dense[-1][expert].T
            y.index_add_(0, token, out * weights[token, choice, None].double())
        return y


def choices(tokens: int, top_k: int, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts of each token, and weights."""
    ids = torch.rand(tokens, experts, device="cuda").argsort(-1)[:, :top_k].contiguous()
    return ids, torch.rand(tokens, top_k, device="cuda")


def near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    # The codes' values are rounded to 16 bits, by as much in each product; what lies between, and the result, by less.
    error = (found.double() - expected).norm() / expected.norm()
    assert error < 0.75 * torch.finfo(dtype).eps, error


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("experts", "hidden", "intermediate"), [(16, 1024, 768), (8, 2048, 1408), (4, 2880, 2880)])
def test_a_block_of_experts(
    experts: int, hidden: int, intermediate: int, dtype: torch.dtype, nested: bool, tiles: bool
) -> None:
    """Few tokens and many: slots sorted by each block, and by a launch; every width of the kernel for many."""
    quant_type = "fp4" if nested else "nf4"
    made = Experts.random(experts, hidden, intermediate, dtype, nested=nested, quant_type=quant_type, tiles=tiles)
    for tokens in (1, 8, 40, 100, 200, 300):
        ids, weights = choices(tokens, 4, experts)
        x = torch.randn(tokens, hidden, dtype=dtype, device="cuda")
        for kind in (torch.float32, dtype):
            near(made(x, ids, weights.to(kind)), made.expected(x, ids, weights.to(kind)), dtype)


def test_few_tokens_of_large_experts() -> None:
    """They are many bytes, so that the kernel for many tokens takes them, with parts of tiles for each block."""
    made = Experts.random(8, 2048, 8192)
    for tokens in (3, 5, 8, 17):
        ids, weights = choices(tokens, 2, 8)
        x = torch.randn(tokens, 2048, dtype=torch.bfloat16, device="cuda")
        y = made(x, ids, weights)
        near(y, made.expected(x, ids, weights), torch.bfloat16)
        assert all(torch.equal(made(x, ids, weights), y) for _ in range(10))


@pytest.mark.parametrize("tiles", [False, True])
def test_without_a_gate_one_expert_for_all_and_none(tiles: bool) -> None:
    made = Experts.random(8, 512, 256, gated=False, blocksize=128, tiles=tiles)
    ids, weights = choices(33, 3, 8)
    ids[:, 0] = 5
    ids[::2, 1] = 8
    ids[0] = torch.tensor([-1, 8, 1 << 40])
    x = torch.randn(33, 512, dtype=torch.bfloat16, device="cuda")
    y = made(x, ids, weights)
    near(y, made.expected(x, ids, weights), torch.bfloat16)
    assert (y[0] == 0).all()


@pytest.mark.parametrize("nested", [False, True])
def test_the_same_bits_from_run_to_run_and_in_a_graph(nested: bool) -> None:
    made = Experts.random(32, 1024, 512, nested=nested)
    for tokens in (1, 6, 32, 64, 100, 200, 400):
        ids, weights = choices(tokens, 8, 32)
        x = torch.randn(tokens, 1024, dtype=torch.bfloat16, device="cuda")
        first = made(x, ids, weights)
        for _ in range(20):
            assert torch.equal(made(x, ids, weights), first)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = made(x, ids, weights)
        # Other choices than those that were captured.
        others, _ = choices(tokens, 8, 32)
        kept = ids.clone()
        for now in (kept, others, kept):
            ids.copy_(now)
            y.fill_(7)
            graph.replay()
            assert torch.equal(y, made(x, ids, weights))


@pytest.mark.parametrize("intermediate", [320, 512])
def test_an_activation_of_ones_own(intermediate: int) -> None:
    made = Experts.random(8, 512, intermediate)
    for tokens in (3, 30, 50, 150, 400):
        ids, weights = choices(tokens, 2, 8)
        x = torch.randn(tokens, 512, dtype=torch.bfloat16, device="cuda")
        stream, native = torch.cuda.current_stream().cuda_stream, made.native
        workspace = torch.empty(native.workspace(tokens, 2), dtype=torch.uint8, device="cuda")
        products = torch.empty(tokens * 2, 2, intermediate, dtype=torch.bfloat16, device="cuda")
        addresses = (made.table.data_ptr(), made.tensor_maps, 0, workspace.data_ptr())
        native.up(stream, tokens, 2, x.data_ptr(), ids.data_ptr(), *addresses, products.data_ptr())
        hidden = (torch.nn.functional.silu(products[:, 0].float()) * products[:, 1].float()).bfloat16()
        y = torch.empty_like(x)
        native.down(
            stream,
            tokens,
            2,
            hidden.data_ptr(),
            ids.data_ptr(),
            weights.data_ptr(),
            "float32",
            *addresses,
            y.data_ptr(),
        )
        near(y, made.expected(x, ids, weights), torch.bfloat16)


def test_what_is_not_taken_is_refused() -> None:
    made = Experts.random(4, 128, 64)
    assert made.native.takes(5, 2)
    assert not made.native.takes(0, 2)
    with pytest.raises(ValueError, match="tokens must be"):
        made.native.workspace(0, 2)
    x, (ids, weights) = torch.randn(2, 128, dtype=torch.bfloat16, device="cuda"), choices(2, 2, 4)
    with pytest.raises(ValueError, match="activation must be one of"):
        made(x, ids, weights, "tanh")
    with pytest.raises(ValueError, match="weights_dtype"):
        made(x, ids, weights.half())


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrices_of_experts_with_slots(dtype: torch.dtype, nested: bool) -> None:
    """The bits of single matrices; those of experts without slots stay as they are."""
    made = Experts.random(6, 512, 320, dtype, nested=nested)
    counts = torch.tensor([2, 0, 0, 7, 1, 0], device="cuda")
    ends = counts.cumsum(0).int()
    for projection, (rows, columns) in enumerate([(320, 512), (320, 512), (512, 320)]):
        out = torch.full((6, rows, columns), float("nan"), dtype=dtype, device="cuda")
        stream = torch.cuda.current_stream().cuda_stream
        made.native.dequantize(stream, made.table.data_ptr(), projection, ends.data_ptr(), out.data_ptr())
        for expert in range(6):
            weight = made.held[projection * 6 + expert]
            expected = k.dequantize(weight, rows * columns, dtype, "nf4", 64).view(rows, columns)
            there = counts[expert].item() > 0
            assert torch.equal(out[expert], expected) if there else out[expert].isnan().all()
    with pytest.raises(ValueError, match="projection must be"):
        made.native.dequantize(stream, made.table.data_ptr(), 3, ends.data_ptr(), out.data_ptr())


def a_layer(experts: int = 16, hidden: int = 512, intermediate: int = 320, biases: bool = False) -> Experts4bit:
    torch.manual_seed(1)
    made = []
    for _ in range(experts):
        expert = Expert()
        for name in ("gate_proj", "up_proj", "down_proj"):
            shape = (intermediate, hidden) if name == "down_proj" else (hidden, intermediate)
            expert.add_module(name, Linear4bit(*shape, bias=False, quant_type="nf4", compress_statistics=True))
        made.append(expert)
    module = Experts4bit(made, ("gate_proj", "up_proj", "down_proj"))
    module.act_fn = torch.nn.SiLU()
    if biases:
        module.gate_up_proj_bias = torch.nn.Parameter(torch.randn(experts, 2 * intermediate))
        module.down_proj_bias = torch.nn.Parameter(torch.randn(experts, hidden))
    return module.to("cuda").requires_grad_(False)


def gradients(call: Any, *args: torch.Tensor) -> list[torch.Tensor]:
    x, ids, weights = args
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = call(x, ids, weights)
    factors = torch.randn(y.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    y.backward(factors.to(y.dtype))
    found: list[Any] = [y.detach(), x.grad, weights.grad]
    return found


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_on_a_gpu_are_those_of_experts_one_by_one(
    dtype: torch.dtype, biases: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = a_layer(biases=biases)
    for tokens in (1, 9, 300):
        ids, weights = choices(tokens, 4, 16)
        # Experts with nothing, and choices of none.
        ids = torch.where(ids == 3, 5, ids)
        ids[::3, 1] = 16
        args = (torch.randn(tokens, 512, dtype=dtype, device="cuda"), ids, weights)
        exact = gradients(module._one_by_one, args[0].float(), *args[1:])
        expected = gradients(module._one_by_one, *args)
        with monkeypatch.context() as patched:
            patched.delattr(Experts4bit, "_one_by_one")
            found = gradients(module, *args)
            again = gradients(module, *args)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
        for a, b, c in zip(found, expected, exact, strict=True):
            there = c != 0
            error, theirs = (float((v - c)[there].norm() / c.norm()) for v in (a, b))
            assert torch.isfinite(a).all()
            assert error < max(1.2 * theirs, 2 * torch.finfo(dtype).eps), (error, theirs)
        assert (found[2][ids == 16] == 0).all()


def test_gradients_wait_for_nothing(no_waiting: None) -> None:
    """Nor do they in a graph, with other choices than those that were captured."""
    if not cuda_experts.multiplies_groups(torch.cuda.current_device(), torch.bfloat16):
        pytest.skip("torch multiplies groups of rows here only by waiting")
    torch.cuda.set_sync_debug_mode("default")
    module = a_layer()
    ids, weights = choices(64, 4, 16)
    others, _ = choices(64, 4, 16)
    x = torch.randn(64, 512, dtype=torch.bfloat16, device="cuda")
    first, second = gradients(module, x, ids, weights), gradients(module, x, others, weights)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    found = gradients(module, x, ids, weights)
    torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))

    table = module._held.table
    assert table is not None
    grad = torch.randn_like(x)

    def backward() -> tuple[torch.Tensor, torch.Tensor]:
        slots = experts_torch.Slots(ids, 16)
        by = cuda_experts.products(x, slots, table.addresses, 320, 64, "nf4", True)
        return experts_torch.backward(by, slots, grad, x, weights, None, None, "silu", True, True)

    expected = [backward()]
    kept = ids.clone()
    ids.copy_(others)
    expected.append(backward())
    ids.copy_(kept)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = backward()
    for now, wanted in ((kept, expected[0]), (others, expected[1])):
        ids.copy_(now)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))
    assert not torch.equal(first[1], second[1])


def test_a_stack_of_one_projection_at_a_time() -> None:
    """Backward takes the memory of one stack, and of rows."""
    module = a_layer(64, 1024, 768)
    ids, weights = choices(8, 4, 64)
    x = torch.randn(8, 1024, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    y = module(x, ids, weights)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 1.2 * 64 * 1024 * 768 * 2


@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_on_all_experts_equal_float64(dtype: torch.dtype, rank: int) -> None:
    """Gradients of A and B too; those of experts without tokens are zeros."""
    module = a_layer()
    ids, weights = choices(100, 4, 16)
    ids = torch.where(ids == 3, 16, ids)
    x = torch.randn(100, 512, dtype=dtype, device="cuda")
    module(x, ids, weights)
    table = module._held.table
    assert table is not None
    shapes = [(320, 512), (320, 512), (512, 320)]
    adapters = [
        [
            Adapter(
                (torch.randn(rank, columns, device="cuda") / columns**0.5).requires_grad_(),
                (torch.randn(rows, rank, device="cuda") / rank**0.5).requires_grad_(),
                0.5,
            )
            for _ in range(16)
        ]
        for rows, columns in shapes
    ]
    factors = [factor for projection in adapters for adapter in projection for factor in (adapter.A, adapter.B)]
    x.requires_grad_(), weights.requires_grad_()
    how = (320, 64, "nf4", True)
    y = adapted_experts(x, ids, weights, table.addresses, None, None, how, "silu", adapters)
    grad = torch.randn_like(y)
    found = [y, *torch.autograd.grad(y, [x, weights, *factors], grad)]

    wide = x.detach().double().requires_grad_()
    total = torch.zeros_like(wide)
    for index in range(16):
        expert = module._modules[str(index)]
        token, choice = torch.where(ids == index)
        matrices = [
            getattr(expert, name).dequantize().double() + a.scaling * a.B.double() @ a.A.double()  # type: ignore[union-attr]
            for name, a in zip(module.projections, (projection[index] for projection in adapters), strict=True)
        ]
        rows = wide[token]
        hidden = torch.nn.functional.silu(rows @ matrices[0].T) * (rows @ matrices[1].T)
        total = total.index_add(0, token, hidden @ matrices[2].T * weights[token, choice, None].double())
    expected = [total, *torch.autograd.grad(total, [wide, weights, *factors], grad.double(), allow_unused=True)]
    for a, b in zip(found, expected, strict=True):
        assert torch.isfinite(a).all()
        assert (a.double() - b.double()).norm() <= 4 * torch.finfo(dtype).eps * b.double().norm()
