"""Experts in pinned host memory on a GPU: the bits of the layer on the GPU, without its memory and without waiting."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import halfbyte  # noqa: E402
from halfbyte.backends import cuda_experts, host_memory  # noqa: E402
from halfbyte.models.offload import experts_of  # noqa: E402
from halfbyte.nn import Expert, Experts4bit, Linear4bit, expert_offload  # noqa: E402
from halfbyte.nn.expert_lora import adapted_experts  # noqa: E402
from halfbyte.nn.lora import Adapter  # noqa: E402
from pinned_stand_in import copies  # noqa: E402

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 32, 512, 320, 4
NAMES = ("gate_proj", "up_proj", "down_proj")
TOKENS = (1, 8, 64, 2048)


def layer(nested: bool = True, *, shape: tuple[int, int, int] = (EXPERTS, HIDDEN, INTERMEDIATE), seed: int = 1) -> Any:
    """On the CPU."""
    torch.manual_seed(seed)
    count, hidden, intermediate = shape
    experts = []
    for _ in range(count):
        expert = Expert()
        for name in NAMES:
            columns, rows = (intermediate, hidden) if name == "down_proj" else (hidden, intermediate)
            expert.add_module(name, Linear4bit(columns, rows, bias=False, quant_type="nf4", compress_statistics=nested))
        experts.append(expert)
    module = Experts4bit(experts, NAMES)
    module.act_fn = torch.nn.SiLU()
    module.down_proj_bias = torch.nn.Parameter(torch.randn(count, hidden))
    return module.to("cpu").requires_grad_(False)


def arguments(tokens: int, dtype: torch.dtype = torch.bfloat16, experts: int = EXPERTS, hidden: int = HIDDEN) -> Any:
    x = torch.randn(tokens, hidden, dtype=dtype, device="cuda")
    ids = torch.rand(tokens, experts, device="cuda").argsort(-1)[:, :TOP_K].contiguous()
    return x, ids, torch.rand(tokens, TOP_K, device="cuda")


def weights_of(module: torch.nn.Module) -> list[torch.Tensor]:
    return [m.weight.data for m in module.modules() if isinstance(m, Linear4bit)]


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resident", [[], [0, 5, 31]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [False, True])
def test_an_offloaded_layer_has_the_bits_of_the_resident_one(
    nested: bool, dtype: torch.dtype, resident: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = layer(nested)
    whole = copy.deepcopy(module).to("cuda")
    module.offload("cuda", resident=resident)
    assert module.resident == resident
    assert all(weight.is_cuda for weight in weights_of(module))
    monkeypatch.delattr(Experts4bit, "_one_by_one")
    copied = copies(monkeypatch)
    for tokens in TOKENS:
        args = arguments(tokens, dtype)
        copied.clear()
        assert torch.equal(module(*args), whole(*args)), tokens
        assert len(copied) == (tokens * TOP_K > EXPERTS - len(resident))
    state, wanted = module.state_dict(), whole.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in state.items())
    # What is resident can change, and a layer that is moved elsewhere is an ordinary one.
    args = arguments(64, dtype)
    for kept in ([1], range(EXPERTS)):
        assert torch.equal(module.offload("cuda", resident=kept)(*args), whole(*args))
    module.offload("cuda").to("cuda")
    assert module.resident == []
    assert module.cpu().resident == [*range(EXPERTS)]
    assert all(weight.is_cpu for weight in weights_of(module))
    assert torch.equal(module.to("cuda")(*args), whole(*args))


@pytest.mark.parametrize("tokens", [1, 2, 64, 300])
def test_graphs_replay_with_other_choices(tokens: int) -> None:
    module = layer()
    whole = copy.deepcopy(module).to("cuda")
    module.offload("cuda", resident=[3])
    x, ids, weights = arguments(tokens)
    module(x, ids, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x, ids, weights)
    for _ in range(3):
        for tensor, other in zip((x, ids, weights), arguments(tokens), strict=True):
            tensor.copy_(other)
        y.fill_(7)
        graph.replay()
        assert torch.equal(y, whole(x, ids, weights))


def test_layers_share_one_stage() -> None:
    """Also in one graph, and from two streams in turn."""
    layers = [layer(seed=seed) for seed in (1, 2, 3)]
    whole = [copy.deepcopy(one).to("cuda") for one in layers]
    for one in layers:
        one.offload("cuda")
    args = arguments(64)
    expected = [one(*args) for one in whole]
    assert all(torch.equal(one(*args), y) for one, y in zip(layers, expected, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = [one(*args) for one in layers]
    for y in made:
        y.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    made = []
    for turn in range(12):
        with torch.cuda.stream(streams[turn % 2]):
            made.append(layers[turn % 3](*args))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected[turn % 3]) for turn, y in enumerate(made))


def test_nothing_waits(no_waiting: None) -> None:
    torch.cuda.set_sync_debug_mode("default")
    module = layer().offload("cuda")
    few, many = arguments(2), arguments(300)
    module(*few)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    module(*few)
    module(*many)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [2, 300])
def test_gradients_are_those_of_the_resident_layer(
    tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = layer()
    whole = copy.deepcopy(module).to("cuda")
    module.offload("cuda", resident=[7])
    x, ids, weights = arguments(tokens, dtype)
    grad = torch.randn_like(x)
    copied = copies(monkeypatch)

    def gradients(one: Any) -> list[torch.Tensor]:
        x_, weights_ = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y = one(x_, ids, weights_)
        return [y, *torch.autograd.grad(y, [x_, weights_], grad)]

    found = gradients(module)
    assert len(copied) == (0 if tokens == 2 else 2), "forward and backward"
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(whole), strict=True))


@pytest.mark.parametrize("tokens", [8, 300])
def test_adapters_are_those_of_the_resident_layer(tokens: int) -> None:
    module = layer()
    whole = copy.deepcopy(module).to("cuda")
    module.offload("cuda", resident=[7])
    x, ids, weights = arguments(tokens)
    shapes = [(INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]
    adapters = [
        [
            Adapter(
                (torch.randn(8, columns, device="cuda") / columns**0.5).requires_grad_(),
                (torch.randn(rows, 8, device="cuda") / 8**0.5).requires_grad_(),
                0.5,
            )
            for _ in range(EXPERTS)
        ]
        for rows, columns in shapes
    ]
    factors = [factor for projection in adapters for adapter in projection for factor in (adapter.A, adapter.B)]
    x.requires_grad_()
    grad = torch.randn_like(x)

    def gradients(one: Any) -> list[torch.Tensor]:
        one(x.detach(), ids, weights)
        how = (INTERMEDIATE, 64, "nf4", True)
        y = adapted_experts(x, ids, weights, one._held.table.addresses, None, None, how, "silu", adapters)
        return [y, *torch.autograd.grad(y, [x, *factors], grad)]

    assert all(torch.equal(a, b) for a, b in zip(gradients(module), gradients(whole), strict=True))


@pytest.mark.parametrize("tokens", [3, 40, 700])
def test_layers_that_are_listened_to_read_host_memory(tokens: int) -> None:
    """Expert by expert, by the products of single layers: for few rows, for many, and by way of a dense copy."""
    module = layer(shape=(4, 1024, 768))
    whole = copy.deepcopy(module).to("cuda")
    module.offload("cuda", resident=[2])
    args = arguments(tokens, experts=4, hidden=1024)
    called: list[int] = []
    for one in (module, whole):
        one._modules["1"].up_proj.register_forward_hook(lambda *_: called.append(1))
    args[0].requires_grad_()

    def gradients(one: Any) -> list[torch.Tensor]:
        y = one(*args)
        return [y, *torch.autograd.grad(y.float().square().sum(), [args[0]])]

    assert all(torch.equal(a, b) for a, b in zip(gradients(module), gradients(whole), strict=True))
    assert called
    for index in range(4):
        a, b = (one._modules[str(index)].down_proj.dequantize() for one in (module, whole))
        assert a.is_cuda
        assert not host_memory.is_there(a)
        assert torch.equal(a, b)


def test_compiled_calls_read_host_memory() -> None:
    module = layer()
    whole = copy.deepcopy(module).to("cuda")
    module.offload("cuda", resident=[1])
    for tokens in (2, 300):
        args = arguments(tokens)
        module(*args)
        compiled: Callable[..., torch.Tensor] = torch.compile(module, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            assert torch.equal(compiled(*args), whole(*args))


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_memory_is_that_of_one_layer_and_comes_back() -> None:
    shape = (64, 1024, 768)
    first = layer(shape=shape)
    model = torch.nn.ModuleList([first, *(copy.deepcopy(first) for _ in range(5))])
    needed = sum(expert_offload.bytes_of(one, index) for one in model for index in range(64))
    resident = 5 * expert_offload.bytes_of(first, 0)
    args = arguments(512, experts=64, hidden=1024)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    halfbyte.offload_experts(model, "cuda", resident_bytes=resident)
    assert sum(len(one.resident) for one in model) == 5
    held = torch.cuda.memory_allocated() - before
    assert held < resident + 6 * 64 * 1024 * 8, "resident experts, biases, and small change"
    y = args[0]
    for one in model:
        y = one(y, *args[1:])
    assert torch.cuda.max_memory_allocated() - before < 0.6 * needed
    begins = len(host_memory._begins)
    assert begins >= 6
    del model, first, one, y
    gc.collect()
    assert len(host_memory._begins) <= begins - 6
    assert torch.cuda.memory_allocated() - before < 2**20


def test_a_layer_may_go_while_the_gpu_reads_it() -> None:
    module = layer()
    whole = copy.deepcopy(module).to("cuda")
    module.offload("cuda")
    args = arguments(2)
    expected = whole(*args)
    module(*args)
    torch.cuda.synchronize()
    torch.cuda._sleep(50_000_000)
    y = module(*args)
    del module
    gc.collect()
    assert torch.equal(y, expected)


def test_the_gpu_that_is_not_there() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(ValueError, match=rf"device must be one of cuda:0 to cuda:{count - 1}, got 'cuda:{count}'"):
        layer(shape=(2, 64, 64)).offload(f"cuda:{count}")
    with pytest.raises(ValueError, match="device must be a CUDA device such as"):
        layer(shape=(2, 64, 64)).offload("cpu")


# ---- transformers ----------------------------------------------------------------------------------------------------

EXPERTS_OF = "model.layers.{}.mlp.experts"
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen3-MoE in 16 bits and in 4."""
    transformers = pytest.importorskip("transformers", minversion="5.8")
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=96, hidden_size=256, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, num_experts=32, num_experts_per_tok=4,
        moe_intermediate_size=192, head_dim=64,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("moe")
    transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(path / "dense")
    loaded(path / "dense", {"": 0}).save_pretrained(path / "packed")
    return path


def loaded(path: Path, device_map: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=halfbyte.BitsAndBytesConfig(**NF4), dtype=torch.bfloat16, device_map=device_map
    )


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("kind", ["dense", "packed"])
@pytest.mark.parametrize(
    ("device_map", "resident"),
    [
        ({"": 0, **{EXPERTS_OF.format(i): "cpu" for i in range(3)}}, [0, 0, 0]),
        ({"": 0, EXPERTS_OF.format(1): "cpu", f"{EXPERTS_OF.format(1)}.4": 0}, [32, 1, 32]),
        (
            {
                **dict.fromkeys(
                    ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), 0
                ),
                "model.layers.1": "cpu",
                "model.layers.2": "cpu",
            },
            [32, 0, 0],
        ),
    ],
)
def test_device_map_keeps_experts_in_host_memory(
    device_map: dict[str, Any], resident: list[int], kind: str, folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    whole = loaded(folder / "packed", {"": 0})
    size = sum(expert_offload.bytes_of(one, i) for one in experts_of(whole).values() for i in range(32))
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = loaded(folder / kind, dict(device_map))
    assert [len(one.resident) for one in experts_of(model).values()] == resident
    if not any(resident):
        assert torch.cuda.max_memory_allocated() - before < 0.5 * size
    monkeypatch.delattr(Experts4bit, "_one_by_one")
    for tokens in (1, 64):
        ids = torch.arange(tokens, device="cuda")[None] % 90 + 3
        with torch.no_grad():
            assert torch.equal(model(ids).logits, whole(ids).logits)
    ids = torch.arange(5, device="cuda")[None] + 3
    assert torch.equal(
        *(one.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0) for one in (model, whole))
    )
    model.save_pretrained(tmp_path)
    name = "model.safetensors"
    assert (tmp_path / name).read_bytes() == (folder / "packed" / name).read_bytes()


def test_load_quantized_keeps_experts_in_host_memory(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    whole = loaded(folder / "packed", {"": 0})
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "dense"), dtype=torch.bfloat16)
    size = expert_offload.bytes_of(whole.model.layers[0].mlp.experts, 0)
    model = halfbyte.load_quantized(empty.eval(), folder / "packed", device="cuda", resident_expert_bytes=5 * size)
    assert sum(len(one.resident) for one in experts_of(model).values()) == 5
    ids = torch.arange(40, device="cuda")[None] + 3
    with torch.no_grad(), halfbyte.count_experts(model) as counts:
        assert torch.equal(model(ids).logits, whole(ids).logits)
    assert all(int(count.sum()) == 40 * 4 for count in counts.values())
    halfbyte.offload_experts(model, "cuda", resident_bytes=5 * size, counts=counts)
    most = max(int(count.max()) for count in counts.values())
    kept = [int(counts[path][i]) for path, one in experts_of(model).items() for i in one.resident]
    assert len(kept) == 5
    assert max(kept) == most
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)


def test_kernels_are_the_same_ones() -> None:
    """The table of many tokens has maps where the layer on the GPU has them, so that the same kernel is taken."""
    module = layer()
    whole = copy.deepcopy(module).to("cuda")
    module.offload("cuda")
    args = arguments(64)
    module(*args), whole(*args)
    staging = vars(module._held.table.addresses)["staging"]
    assert module._held.table.maps is None
    assert (staging.maps is None) == (whole._held.table.maps is None)
    if staging.maps is not None:
        assert staging.maps.shape == whole._held.table.maps.shape
    assert cuda_experts.takes(torch.bfloat16, 0, EXPERTS, HIDDEN, INTERMEDIATE, True, "nf4", 64, True)
