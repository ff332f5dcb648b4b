"""The experts of a layer as one operation: what it computes, when it is taken, and what its table notices."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from typing import Any

import pytest
import torch
from compilers import needs_compiler
from halfbyte import _native
from halfbyte.backends import cuda_experts
from halfbyte.nn import Expert, Experts4bit, Linear4bit, experts
from halfbyte.nn.expert_table import ExpertTable, activation_of, table_of
from halfbyte.ops.experts import experts_4bit

EXPERTS, HIDDEN, INTERMEDIATE = 5, 64, 96
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GATED = ("gate_proj", "up_proj", "down_proj")


def layer(gated: bool = True, act: Any = None, **recipe: Any) -> Experts4bit:
    """Experts of random weights, packed."""
    torch.manual_seed(3)
    recipe = {"quant_type": "nf4", "compress_statistics": True, **recipe}
    names = GATED if gated else (None, *GATED[1:])
    experts = []
    for _ in range(EXPERTS):
        expert = Expert()
        for name in names:
            if name is not None:
                rows, columns = (HIDDEN, INTERMEDIATE) if name == "down_proj" else (INTERMEDIATE, HIDDEN)
                expert.add_module(name, Linear4bit(columns, rows, bias=False, **recipe))
        experts.append(expert)
    module = Experts4bit(experts, names)
    module.act_fn = act or torch.nn.SiLU()
    return module.to("cpu").requires_grad_(False)


def inputs(tokens: int = 7, k: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any]:
    torch.manual_seed(5)
    x = torch.randn(tokens, HIDDEN).to(dtype)
    ids = torch.rand(tokens, EXPERTS).topk(k).indices
    return x, ids, torch.rand(tokens, k)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype is expected.dtype
    unit = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[found.dtype]
    scale = expected.abs().max().item() or 1.0
    assert (found.float() - expected.float()).abs().max().item() <= unit * scale


def table(module: Experts4bit) -> ExpertTable:
    found = module._held.table
    assert found is not None
    return found


def dense(module: Experts4bit, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Token by token, in float64, of the weights dequantized."""
    y = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for j in range(ids.shape[1]):
            if ids[token, j] >= EXPERTS:
                continue
            expert: Any = module._modules[str(int(ids[token, j]))]
            matrices = {name: m.dequantize().double() for name, m in expert._modules.items()}
            row = x[token].double()
            up = matrices["up_proj"] @ row
            up = module.act_fn(matrices["gate_proj"] @ row) * up if "gate_proj" in matrices else module.act_fn(up)
            y[token] += weights[token, j].double() * (matrices["down_proj"] @ up)
    return y


# ---- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "recipe", [{}, {"compress_statistics": False}, {"quant_type": "fp4", "blocksize": 32}], ids=str
)
@pytest.mark.parametrize("gated", [True, False])
def test_experts_together_are_those_one_by_one(gated: bool, recipe: dict[str, Any], dtype: torch.dtype) -> None:
    module = layer(gated, **recipe)
    for tokens in (1, 7, 150):
        x, ids, weights = inputs(tokens, 3, dtype)
        found = module(x, ids, weights)
        assert table(module).holds()
        close(found, module._one_by_one(x, ids, weights))
        close(found.float(), dense(module, x, ids, weights).float()) if dtype is torch.float32 else None
        assert torch.equal(found, module(x, ids, weights))
        # Weights of the router of the dtype of the activations, and of no expert.
        some = ids.clone()
        some[::2, 1] = EXPERTS
        none = weights.clone()
        none[::2, 1] = 0
        assert torch.equal(module(x, some, weights), module(x, ids, none))
        close(module(x, ids, weights.to(dtype)), found)
    assert module(x[:0], ids[:0], weights[:0]).shape == (0, HIDDEN)


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (torch.nn.SiLU(), "silu"),
        (torch.nn.functional.silu, "silu"),
        (torch.nn.GELU(), "gelu"),
        (torch.nn.GELU("tanh"), "gelu_tanh"),
        (torch.nn.Tanh(), None),
        (lambda v: v.relu() ** 2, None),
    ],
    ids=["SiLU", "silu", "GELU", "GELU by tanh", "Tanh", "a function"],
)
def test_activations_are_recognized(act: Any, name: str | None) -> None:
    module = layer(True, act)
    assert activation_of(module) == name
    x, ids, weights = inputs()
    close(module(x, ids, weights).double().float(), dense(module, x, ids, weights).float())
    assert (module._held.table is None) == (name is None)


def test_experts_compute_in_the_dtype_that_layers_have_or_autocast() -> None:
    module = layer(compute_dtype=torch.float32)
    x, ids, weights = inputs(dtype=torch.bfloat16)
    close(module(x, ids, weights), module._one_by_one(x, ids, weights))
    assert table(module).kind.compute_dtype is torch.float32
    module = layer()
    x, ids, weights = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        found = module(x, ids, weights)
        expected = module._one_by_one(x, ids, weights)
    assert found.dtype is torch.float32
    close(found.bfloat16(), expected.bfloat16())
    assert not torch.equal(found, module(x, ids, weights))


# ---- when it is taken ------------------------------------------------------------------------------------------------


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of tokens of the calls one by one."""
    made: list[int] = []
    real = Experts4bit._one_by_one

    def counted(self: Experts4bit, x: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        made.append(len(x))
        return real(self, x, *args)

    monkeypatch.setattr(Experts4bit, "_one_by_one", counted)
    return made


def test_listeners_have_experts_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made = calls(monkeypatch)
    module = layer()
    x, ids, weights = inputs()
    plain = module(x, ids, weights)
    assert not made
    # Gradients are the operation's.
    module(x.clone().requires_grad_(), ids, weights).sum().backward()
    assert not made
    down: Any = module._modules["3"]._modules["down_proj"]  # type: ignore[union-attr]
    seen: list[int] = []
    hook = down.register_forward_hook(lambda m, args, y: seen.append(len(y)))
    close(module(x, ids, weights), plain)
    assert made == [7]
    assert seen == [int((ids == 3).sum())]
    hook.remove()
    assert torch.equal(module(x, ids, weights), plain)
    assert made == [7]
    # As accelerate does.
    down.forward = down.forward
    module(x, ids, weights)
    assert made == [7, 7]
    del down.forward
    module(x, ids, weights)
    with torch.nn.modules.module.register_module_forward_hook(lambda m, args, y: None):
        module(x, ids, weights)
    assert made == [7, 7, 7]


def test_layers_of_other_kinds_have_experts_one_by_one() -> None:
    x, ids, weights = inputs()
    module = layer()
    assert table_of(module) is not None
    mixed = layer()
    mixed._modules["2"].up_proj = layer(compress_statistics=False)._modules["2"].up_proj  # type: ignore[union-attr]
    assert table_of(mixed) is None
    close(mixed(x, ids, weights), mixed._one_by_one(x, ids, weights))
    other = layer()
    other._modules["2"].up_proj = torch.nn.Linear(HIDDEN, INTERMEDIATE, bias=False)  # type: ignore[union-attr]
    assert table_of(other) is None
    norm = layer()
    norm.post_expert_norm = torch.nn.RMSNorm(HIDDEN)
    assert table_of(norm) is None
    biased = layer()
    biased._modules["1"].down_proj.bias = torch.nn.Parameter(torch.ones(HIDDEN))  # type: ignore[union-attr]
    assert table_of(biased) is None


# ---- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 7], ids=["few", "many"])
def test_the_table_follows_its_layers(tokens: int) -> None:
    """Of few tokens it looks at their experts alone."""
    module = layer()
    x, ids, weights = inputs(tokens)
    ids[:] = torch.tensor([0, 2])
    before = module(x, ids, weights)
    first = table(module)
    module(x, ids, weights)
    assert table(module) is first
    up: Any = module._modules["2"].up_proj  # type: ignore[union-attr]
    other: Any = layer(quant_type="nf4")._modules["2"]

    def replace_module() -> None:
        fresh = Linear4bit(HIDDEN, INTERMEDIATE, bias=False, quant_type="nf4")
        module._modules["2"].up_proj = fresh.to("cpu")  # type: ignore[union-attr]

    def replace_weight() -> None:
        up.weight = Linear4bit(HIDDEN, INTERMEDIATE, bias=False, quant_type="nf4").to("cpu").weight

    def replace_data() -> None:
        up.weight.data = up.weight.data.flip(0)

    def change_in_place() -> None:
        up.weight.data.copy_(up.weight.data.roll(64, 0))

    def load() -> None:
        up.load_state_dict(other.up_proj.state_dict())

    def load_and_assign() -> None:
        module.load_state_dict(layer().state_dict(), assign=True)

    def move() -> None:
        module.to("cpu").float()

    for change in (move, replace_data, change_in_place, load, replace_weight, load_and_assign):
        change()
        found = module(x, ids, weights)
        close(found, module._one_by_one(x, ids, weights))
        if change in (replace_data, change_in_place, replace_weight):
            assert not torch.allclose(found, before), change
        up = module._modules["2"].up_proj  # type: ignore[union-attr]
    replace_module()
    assert module._held.table is None
    close(module(x, ids, weights), module._one_by_one(x, ids, weights))


def test_the_table_follows_an_expert_once_it_is_asked_for() -> None:
    module = layer()
    x, ids, weights = inputs(tokens=1)
    ids[:] = torch.tensor([0, 4])
    before = module(x, ids, weights)
    first = table(module)
    changed: Any = module._modules["3"].down_proj  # type: ignore[union-attr]
    changed.weight.data = changed.weight.data.flip(0)
    assert torch.equal(module(x, ids, weights), before)
    assert table(module) is first
    assert not first.holds()
    assert first.holds(ids)
    # A number of no expert is asked for nothing.
    assert first.holds(torch.tensor([[5, -1]]))
    ids[0, 1] = 3
    close(module(x, ids, weights), module._one_by_one(x, ids, weights))
    assert table(module) is not first
    heard: list[Any] = []
    module._modules["1"].register_forward_hook(lambda *_: heard.append(1))  # type: ignore[union-attr]
    module(x, ids, weights)
    assert not heard
    ids[0, 1] = 1
    close(module(x, ids, weights), module._one_by_one(x, ids, weights))
    assert module._held.table is None


def test_copies_have_tables_of_their_own() -> None:
    module = layer()
    x, ids, weights = inputs()
    expected = module(x, ids, weights)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert again._held.table is None
        assert again._held is not module._held
        assert again._modules["1"].__dict__["_held"] is again._held
        assert torch.equal(again(x, ids, weights), expected)
        assert not torch.equal(table(again).addresses, table(module).addresses)
    weight = module._modules["0"].up_proj.weight  # type: ignore[union-attr]
    address = int(table(module).addresses[1, 0, 0])
    assert address == weight.data_ptr()  # type: ignore[union-attr]


def test_biases_are_followed() -> None:
    module = layer()
    x, ids, weights = inputs()
    plain = module(x, ids, weights)
    torch.manual_seed(9)
    module.gate_up_proj_bias = torch.nn.Parameter(torch.randn(EXPERTS, 2 * INTERMEDIATE))
    module.down_proj_bias = torch.nn.Parameter(torch.randn(EXPERTS, HIDDEN))
    with torch.no_grad():
        module._held.hold(None)
        found = module(x, ids, weights)
        close(found, module._one_by_one(x, ids, weights))
        assert not torch.allclose(found, plain)
        module.gate_up_proj_bias.mul_(2)
        close(module(x, ids, weights), module._one_by_one(x, ids, weights))
    module(x, ids, weights).sum().backward()
    assert module.down_proj_bias.grad is not None


def test_table_goes_with_its_layer() -> None:
    """What it remembers refers back to the layer, in compiled code: Python's collector has to see that."""
    module = layer()
    module(*inputs())
    codes: Any = module._modules["0"].up_proj.weight  # type: ignore[union-attr]
    gone = [weakref.ref(module), weakref.ref(table(module)), weakref.ref(codes)]
    del module, codes
    gc.collect()
    assert all(one() is None for one in gone)


# ---- the operation ---------------------------------------------------------------------------------------------------


def operands(module: Experts4bit, dtype: torch.dtype = torch.float32) -> list[Any]:
    made = table_of(module)
    assert made is not None
    x, ids, weights = inputs(dtype=dtype)
    kind = made.kind
    # What the table names lives as long as the module.
    return [
        x, ids, weights, made.addresses, None, None, None, kind.intermediate, kind.blocksize, kind.quant_type,
        kind.nested, made.activation,
    ]  # fmt: skip


def test_opcheck_experts() -> None:
    module = layer()
    for dtype in DTYPES:
        args = operands(module, dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            torch.library.opcheck(torch.ops.halfbyte.experts_4bit.default, tuple(args))
        assert torch.equal(torch.ops.halfbyte.experts_4bit(*args), experts_4bit(*args))
        assert torch.equal(experts_4bit(args[0].t().contiguous().t(), *args[1:]), experts_4bit(*args))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(7, 64, dtype=torch.float64), "x must have a dtype"),
        (0, torch.zeros(7, 1, 64), r"x must have shape \[tokens, hidden\]"),
        (1, torch.zeros(7, 2, dtype=torch.int32), "ids must have dtype"),
        (1, torch.zeros(6, 2, dtype=torch.int64), r"ids must have shape \[7, k\]"),
        (2, torch.zeros(7, 3), r"weights must have shape \[7, 2\]"),
        (3, torch.zeros(3, 5, dtype=torch.int64), "table must have shape"),
        (4, torch.zeros(3, 5, 128, dtype=torch.uint8), "maps must be torch.uint8 of shape"),
        (5, torch.zeros(5, 7), r"up_bias must have shape \[5, 192\]"),
        (6, torch.zeros(5, 64, dtype=torch.float16), "down_bias must have dtype"),
        (7, 0, "intermediate must be at least 1"),
        (9, "nf5", "quant_type"),
        (11, "tanh", "activation must be one of"),
    ],
    ids=str,
)
def test_operands_that_do_not_fit_are_refused(place: int, value: Any, message: str) -> None:
    args = operands(layer())
    args[place] = value
    for call in (experts_4bit, torch.ops.halfbyte.experts_4bit):
        with pytest.raises((ValueError, TypeError), match=message):
            call(*args)


# ---- compilers -------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("first", ["eager", "compiled"])
def test_experts_compile_without_a_break(first: str) -> None:
    if first == "compiled" and not experts._MAKES_TABLES:
        pytest.skip("this release of torch makes no table while it traces")
    torch._dynamo.reset()
    module = layer()
    x, ids, weights = inputs(dtype=torch.bfloat16)
    if first == "eager":
        module(x, ids, weights)
    compiled = torch.compile(lambda *args: module(*args) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, ids, weights), module(x, ids, weights) * 2)
    x, ids, weights = inputs(31, dtype=torch.bfloat16)
    assert torch.equal(compiled(x, ids, weights), module(x, ids, weights) * 2)
    # What is loaded or moved takes the table with it.
    module.load_state_dict(layer(compress_statistics=True).state_dict(), assign=True)
    if not experts._MAKES_TABLES:
        module(x, ids, weights)
    module._modules["0"].up_proj.weight.data.fill_(0x77)  # type: ignore[union-attr]
    assert torch.equal(compiled(x, ids, weights), module(x, ids, weights) * 2)


# ---- what the GPU's kernels are given --------------------------------------------------------------------------------


class StandIn:
    """The compiled core's class for a GPU, done by that for the CPU; it takes few tokens at once."""

    most = 4
    counts: list[int] = []  # noqa: RUF012

    def __init__(self, device: int, *kind: Any) -> None:
        self.kernel = _native.CpuExperts(*kind)

    def takes(self, tokens: int, k: int) -> bool:
        return tokens <= self.most

    def workspace(self, tokens: int, k: int) -> int:
        assert tokens <= self.most
        return 256

    def launch(self, stream: int, tokens: int, k: int, *addresses: Any) -> str:
        x, ids, weights, weights_dtype, table, maps, up_bias, down_bias, activation, workspace, y = addresses
        assert maps == 0
        assert workspace
        self.counts.append(tokens)
        self.kernel.forward(
            tokens, k, x, ids, weights, weights_dtype, table, up_bias, down_bias, activation, y, 1
        )  # fmt: skip
        return "stand-in"


@pytest.mark.parametrize("biases", [False, True])
def test_the_gpu_is_given_what_the_cpu_is(monkeypatch: pytest.MonkeyPatch, biases: bool) -> None:
    monkeypatch.setattr(cuda_experts._native, "CudaExperts", StandIn, raising=False)
    monkeypatch.setattr(cuda_experts, "current_stream", lambda device: 0)
    monkeypatch.setattr(StandIn, "counts", [])
    cuda_experts._kernel.cache_clear()
    module = layer()
    args = operands(module, torch.bfloat16)
    if biases:
        args[5] = torch.randn(EXPERTS, 2 * INTERMEDIATE).bfloat16()
        args[6] = torch.randn(EXPERTS, HIDDEN).bfloat16()
    expected = experts_4bit(*args)
    assert torch.equal(cuda_experts.experts_4bit(*args), expected)
    assert StandIn.counts == [4, 3]
    args[0], args[1], args[2] = (tensor.t().contiguous().t() for tensor in args[:3])
    assert torch.equal(cuda_experts.experts_4bit(*args), expected)
    none = [tensor[:0] for tensor in args[:3]]
    assert cuda_experts.experts_4bit(*none, *args[3:]).shape == (0, HIDDEN)
    kind: dict[str, Any] = {
        "device": 0, "experts": EXPERTS, "hidden": HIDDEN, "intermediate": INTERMEDIATE, "gated": True,
        "quant_type": "nf4", "blocksize": 64, "nested": True,
    }  # fmt: skip
    assert cuda_experts.takes(torch.bfloat16, **kind)
    assert not cuda_experts.takes(torch.float32, **kind)
    cuda_experts._kernel.cache_clear()
