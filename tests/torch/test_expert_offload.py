"""Experts in pinned host memory, with ordinary memory in its place: what goes there, what is copied, and what stays."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Iterator
from typing import Any

import halfbyte
import pytest
import torch
from halfbyte.backends import cpu_experts, expert_stage, host_memory
from halfbyte.models.offload import choose_resident, experts_of
from halfbyte.nn import Expert, Experts4bit, Linear4bit, Linear8bitLt, expert_offload
from halfbyte.nn.expert_lora import adapted_experts
from halfbyte.nn.lora import Adapter
from pinned_stand_in import Pinned, copies, pinned

EXPERTS, HIDDEN, INTERMEDIATE = 6, 64, 96
NAMES = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pinned]:
    made = pinned(monkeypatch)
    yield made
    # What is in circles is released while the stand-in is there.
    gc.collect()
    assert not made.bytes


def layer(nested: bool = True, biases: bool = False, seed: int = 3) -> Experts4bit:
    torch.manual_seed(seed)
    experts = []
    for _ in range(EXPERTS):
        expert = Expert()
        for name in NAMES:
            rows, columns = (HIDDEN, INTERMEDIATE) if name == "down_proj" else (INTERMEDIATE, HIDDEN)
            expert.add_module(name, Linear4bit(columns, rows, bias=False, quant_type="nf4", compress_statistics=nested))
        experts.append(expert)
    module = Experts4bit(experts, NAMES)
    module.act_fn = torch.nn.SiLU()
    if biases:
        module.gate_up_proj_bias = torch.nn.Parameter(torch.randn(EXPERTS, 2 * INTERMEDIATE))
        module.down_proj_bias = torch.nn.Parameter(torch.randn(EXPERTS, HIDDEN))
    return module.to("cpu").requires_grad_(False)


def inputs(tokens: int = 7, k: int = 2) -> tuple[Any, Any, Any]:
    torch.manual_seed(5)
    return torch.randn(tokens, HIDDEN), torch.rand(tokens, EXPERTS).topk(k).indices, torch.rand(tokens, k)


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def addresses(module: Experts4bit, index: int) -> list[int]:
    expert: Any = module._modules[str(index)]
    return [t.data_ptr() for name in NAMES for t in expert_offload.packed_tensors(expert._modules[name])]


# ---- what moves ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_offload_moves_packed_weights_alone_and_no_value_changes(memory: Pinned, nested: bool, biases: bool) -> None:
    module = layer(nested, biases)
    before, expected, args = state(module), layer(nested, biases)(*inputs()), inputs()
    own = {address for index in range(EXPERTS) for address in addresses(module, index)}
    assert module.offload("cuda", resident=[1, 4]) is module
    assert module.resident == [1, 4]
    for index in range(EXPERTS):
        there = [host_memory.region_of(address) is not None for address in addresses(module, index)]
        assert there == [index not in (1, 4)] * len(there)
        assert own.isdisjoint(addresses(module, index)) == (index not in (1, 4))
    # One region, no larger than what is in it.
    (nbytes,) = memory.bytes.values()
    needed = sum(expert_offload.bytes_of(module, index) for index in (0, 2, 3, 5))
    assert needed <= nbytes < needed + 4096
    assert same(state(module), before)
    assert torch.equal(module(*args), expected)
    if biases:
        assert host_memory.region_of(module.down_proj_bias.data_ptr()) is None  # type: ignore[arg-type, operator]


def test_offload_again_changes_what_is_resident_and_frees_what_was_pinned(memory: Pinned) -> None:
    module, args = layer(), inputs()
    expected, before = module(*args), state(module)
    module.offload("cuda")
    first = dict(memory.bytes)
    module.offload("cuda")
    assert memory.bytes == first, "nothing is to be done"
    for resident in ([0, 3], [3, 5], [], range(EXPERTS)):
        module.offload("cuda", resident=resident)
        assert module.resident == list(resident)
        assert torch.equal(module(*args), expected)
        assert same(state(module), before)
        gc.collect()
        assert len(memory.bytes) == (len(module.resident) < EXPERTS)
    assert not host_memory._begins


def test_regions_live_as_long_as_a_tensor_in_them(memory: Pinned) -> None:
    module = layer().offload("cuda")
    kept = module._modules["2"].up_proj.weight.data  # type: ignore[union-attr]
    value = kept.clone()
    del module
    gc.collect()
    assert len(memory.bytes) == 1
    assert torch.equal(kept, value)
    del kept
    gc.collect()
    assert not memory.bytes


def test_regions_are_released_when_no_graph_is_captured(memory: Pinned, monkeypatch: pytest.MonkeyPatch) -> None:
    module = layer().offload("cuda")
    with monkeypatch.context() as patched:
        patched.setattr(host_memory, "_is_capturing", lambda: True)
        del module
        gc.collect()
        assert len(memory.bytes) == 1
        assert not host_memory._begins
    other = layer().offload("cuda")
    assert len(memory.bytes) == 1
    assert host_memory.region_of(addresses(other, 0)[0]) is not None


def test_copies_and_pickles_are_ordinary_layers(memory: Pinned) -> None:
    module, args = layer().offload("cuda", resident=[2]), inputs()
    expected = module(*args)
    written = io.BytesIO()
    torch.save(module.state_dict(), written)
    for made in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert made.resident == list(range(EXPERTS))
        assert torch.equal(made(*args), expected)
    other = layer(seed=4)
    other.load_state_dict(torch.load(io.BytesIO(written.getvalue()), weights_only=True))
    assert torch.equal(other(*args), expected)


def test_load_state_dict_writes_into_host_memory(memory: Pinned) -> None:
    module, other, args = layer().offload("cuda", resident=[2]), layer(seed=4), inputs()
    module(*args)
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(*args), other(*args))


def test_dequantize_gives_the_dense_weights(memory: Pinned) -> None:
    module = layer()
    dense = [module._modules[str(i)].up_proj.dequantize() for i in range(EXPERTS)]  # type: ignore[union-attr]
    module.offload("cuda", resident=[1])
    found = [module._modules[str(i)].up_proj.dequantize() for i in range(EXPERTS)]  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))
    assert all(host_memory.region_of(one.data_ptr()) is None for one in found)


# ---- the stage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resident", [[], [0, 5], [1, 2, 3, 4, 5]])
def test_many_choices_read_copies_and_few_read_in_place(
    memory: Pinned, resident: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = layer().offload("cuda", resident=resident)
    args = inputs(40)
    module(*args)
    table = module._held.table
    assert table is not None
    rows = table.addresses.tolist()
    away = EXPERTS - len(resident)
    copied = copies(monkeypatch)
    for slots in (1, away):
        with expert_stage.reading(table.addresses, table.maps, slots) as (found, maps):
            assert found is table.addresses
            assert maps is None
    assert copied == []
    with expert_stage.reading(table.addresses, table.maps, away + 1) as (found, _):
        moved = found.tolist()
        # The same bytes at other addresses, but for those that are resident.
        for projection in range(3):
            for index in range(EXPERTS):
                here, there = rows[projection][index], moved[projection][index]
                assert (here == there) == (index in resident)
                assert there[0] % 16 == 0
        how = (INTERMEDIATE, 64, "nf4", True, "silu")
        expected = cpu_experts.experts_4bit(*args, table.addresses, None, None, None, *how)
        # What the stage has counts, and not what the host has.
        region = host_memory.region_of(rows[0][next(i for i in range(EXPERTS) if i not in resident)][0])
        assert region is not None
        kept = region.bytes.clone()
        region.bytes.zero_()
        assert torch.equal(cpu_experts.experts_4bit(*args, found, None, None, None, *how), expected)
        region.bytes.copy_(kept)
    needed = sum(expert_offload.bytes_of(module, i) for i in range(EXPERTS) if i not in resident)
    assert copied == [needed]


def test_layers_share_the_stage_one_after_the_other(memory: Pinned) -> None:
    first, second = layer().offload("cuda"), layer(seed=4).offload("cuda")
    args = inputs(20)
    expected = [first(*args), second(*args)]
    tables = [module._held.table for module in (first, second)]
    assert all(table is not None for table in tables)
    a, b = (vars(table.addresses)["staging"] for table in tables if table is not None)
    assert a._stage is b._stage
    assert a._buffer.data_ptr() == b._buffer.data_ptr()
    how = (INTERMEDIATE, 64, "nf4", True, "silu")
    for staging, wanted in ((a, expected[0]), (b, expected[1]), (a, expected[0])):
        with staging as (found, _):
            assert staging._stage.lock.locked()
            assert torch.equal(cpu_experts.experts_4bit(*args, found, None, None, None, *how), wanted)
        assert not staging._stage.lock.locked()
    with pytest.raises(KeyError), a:
        raise KeyError
    assert not a._stage.lock.locked()


def test_a_larger_stage_leaves_the_one_before_to_its_tables() -> None:
    stage = expert_stage.Stage(torch.device("cpu"))
    first = stage.reserve(1000)
    assert stage.reserve(500) is first
    second = stage.reserve(5000)
    assert second is not first
    assert second is stage.buffer
    for buffer, nbytes in ((first, 1000), (second, 5000)):
        assert buffer.numel() >= nbytes
        assert buffer.data_ptr() % host_memory.ALIGNMENT == 0


def test_gradients_and_adapters_read_the_stage(memory: Pinned, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(INTERMEDIATE, HIDDEN)] * 2 + [(HIDDEN, INTERMEDIATE)]
    torch.manual_seed(1)
    adapters = [
        [
            Adapter(torch.randn(4, columns, requires_grad=True), torch.randn(rows, 4, requires_grad=True), 0.5)
            for _ in range(EXPERTS)
        ]
        for rows, columns in shapes
    ]
    factors = [factor for projection in adapters for adapter in projection for factor in (adapter.A, adapter.B)]

    def gradients(module: Experts4bit) -> list[Any]:
        x, ids, weights = inputs(20)
        module(x, ids, weights)
        table = module._held.table
        assert table is not None
        x.requires_grad_(), weights.requires_grad_()
        how = (INTERMEDIATE, 64, "nf4", True)
        y = adapted_experts(x, ids, weights, table.addresses, None, None, how, "silu", adapters)
        return [y, *torch.autograd.grad(y.square().sum(), [x, weights, *factors])]

    expected = gradients(layer())
    offloaded = layer().offload("cuda", resident=[3])
    copied = copies(monkeypatch)
    found = gradients(offloaded)
    assert len(copied) == 2, "forward and backward"
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_offload_refuses_what_is_wrong_and_changes_nothing(memory: Pinned) -> None:
    module = layer()
    before = [addresses(module, index) for index in range(EXPERTS)]
    for resident, error, said in (
        ([6], ValueError, "resident must have numbers from 0 to 5, got 6"),
        ([-1], ValueError, "from 0 to 5, got -1"),
        ([True], TypeError, "resident must have integers, got True"),
        (["1"], TypeError, "resident must have integers, got '1'"),
    ):
        with pytest.raises(error, match=said):
            module.offload("cuda", resident=resident)  # type: ignore[arg-type]
    dense = layer()
    dense._modules["3"].up_proj = torch.nn.Linear(HIDDEN, INTERMEDIATE, bias=False)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"must be 4-bit layers \(Linear4bit\).*got Linear in 3.up_proj"):
        dense.offload("cuda")
    eight = layer()
    eight._modules["2"].up_proj = Linear8bitLt(HIDDEN, INTERMEDIATE, bias=False)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"got Linear8bitLt in 2\.up_proj"):
        eight.offload("cuda")
    fresh = layer()
    fresh._modules["1"].down_proj = Linear4bit(INTERMEDIATE, HIDDEN, bias=False)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"must be quantized to be offloaded, got Params4bit of torch\.float32 in 1"):
        fresh.offload("cuda")
    with pytest.raises(ValueError, match="on the meta device in 0"):
        layer().to("meta").offload("cuda")
    memory.failing = True
    with pytest.raises(RuntimeError, match="cannot be pinned"):
        module.offload("cuda")
    memory.failing = False
    assert [addresses(module, index) for index in range(EXPERTS)] == before
    assert not memory.bytes
    assert not host_memory._begins


def test_without_a_gpu_the_error_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU")
    for device in ("cuda", "cuda:1", 0):
        with pytest.raises(ValueError, match=r"device must be a CUDA device that torch sees, got 'cuda.*it sees none"):
            layer().offload(device)
    with pytest.raises(ValueError, match="device must be a CUDA device such as 'cuda' or 'cuda:0', got 'cpu'"):
        layer().offload("cpu")
    with pytest.raises(ValueError, match="it sees none"):
        halfbyte.offload_experts(torch.nn.Sequential(layer()))


# ---- a model ---------------------------------------------------------------------------------------------------------


def test_resident_experts_are_chosen_by_counts_and_bytes() -> None:
    model = torch.nn.Sequential(layer(), layer(seed=4))
    layers = experts_of(model)
    size = expert_offload.bytes_of(layers["0"], 0)
    assert choose_resident(layers, 0, None) == ({"0": [], "1": []}, 0)
    assert choose_resident(layers, 3 * size + 5, None) == ({"0": [0, 1], "1": [0]}, 3 * size)
    counts = {"1": torch.tensor([0, 7, 0, 2, 0, 9])}
    assert choose_resident(layers, 4 * size, counts) == ({"0": [0], "1": [1, 3, 5]}, 4 * size)
    assert choose_resident(layers, 100 * size, counts).experts == {"0": [*range(6)], "1": [*range(6)]}
    for wrong, error, said in (
        (-1, ValueError, "resident_bytes must be at least 0, got -1"),
        (1.5, TypeError, "resident_bytes must be an integer, got 1.5"),
    ):
        with pytest.raises(error, match=said):
            choose_resident(layers, wrong, None)  # type: ignore[arg-type]
    for given, said in (
        ({"2": torch.zeros(6, dtype=torch.int64)}, "paths of experts of the model, got '2'; it has 0, 1"),
        (
            {"1": torch.zeros(5, dtype=torch.int64)},
            r"counts\['1'\] must be a tensor of integers \[6\], got torch.int64",
        ),
        ({"1": torch.zeros(6)}, r"got torch.float32 \[6\]"),
    ):
        with pytest.raises(ValueError, match=said):
            choose_resident(layers, 0, given)


def test_offload_experts_of_a_model(memory: Pinned) -> None:
    model = torch.nn.ModuleList([layer(), layer(seed=4)])
    args = inputs()
    with halfbyte.count_experts(model) as counts:
        expected = [module(*args) for module in model]
        model[0](hidden_states=args[0], top_k_index=args[1].masked_fill(args[1] == 2, 99), top_k_weights=args[2])
    model[1](*args)
    ids = args[1].reshape(-1)
    assert counts["1"].tolist() == ids.bincount(minlength=EXPERTS).tolist()
    assert counts["0"].tolist() == (2 * ids.bincount(minlength=EXPERTS) - (ids == 2).sum() * torch.eye(6)[2]).tolist()
    size = expert_offload.bytes_of(model[0], 0)
    assert halfbyte.offload_experts(model, resident_bytes=2 * size, counts=counts) is model
    kept = choose_resident(experts_of(model), 2 * size, counts).experts
    for path, module in experts_of(model).items():
        assert module.resident == kept[path]
    assert all(torch.equal(module(*args), y) for module, y in zip(model, expected, strict=True))
    for function in (halfbyte.offload_experts, lambda one: halfbyte.count_experts(one).__enter__()):
        with pytest.raises(ValueError, match=r"model must have experts of 4 bits \(Experts4bit\), got Linear without"):
            function(torch.nn.Linear(2, 2))
    model[1]._modules["0"].up_proj = torch.nn.Linear(HIDDEN, INTERMEDIATE)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="1: experts must be 4-bit layers"):
        halfbyte.offload_experts(model)
