"""Modules and whole models on a GPU."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import halfbyte  # noqa: E402
import halfbyte.functional as F  # noqa: E402
import halfbyte.nn as hnn  # noqa: E402
from packed_pairs import FLOATS, close, gradients, same_state  # noqa: E402

import kernels as k  # noqa: E402

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
