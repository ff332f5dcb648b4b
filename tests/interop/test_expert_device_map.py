"""Device maps that put experts on "cpu" beside a GPU, for which a device object stands: what is loaded and saved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.8")

import gc  # noqa: E402

import halfbyte  # noqa: E402
from halfbyte.backends import host_memory  # noqa: E402
from halfbyte.integrations.transformers import expert_offload  # noqa: E402
from halfbyte.nn import Experts4bit  # noqa: E402
from pinned_stand_in import Pinned, pinned  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

# PEFT's use of what transformers deprecates, and transformers' of what accelerate has offloaded.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning", "ignore:Attempting to save a model with offloaded modules"
)

EXPERTS = "model.layers.{}.mlp.experts"
X = torch.arange(18).reshape(2, 9) % 90
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
# accelerate tells it from "cpu", to which it belongs.
GPU = torch.device("cpu")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pinned]:
    made = pinned(monkeypatch)
    monkeypatch.setattr(expert_offload, "_gpu", {GPU: 0, 1: 1}.get)
    monkeypatch.setattr(expert_offload, "_is_cpu", lambda target: isinstance(target, str) and target == "cpu")
    yield made
    gc.collect()
    assert not made.bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-MoE in 16 bits, and beside it in 4."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32, head_dim=16,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.05)
    path = tmp_path_factory.mktemp("moe")
    model.to(torch.bfloat16).save_pretrained(path / "dense")
    loaded(path / "dense").save_pretrained(path / "packed")
    return path


def loaded(folder: Path, **more: Any) -> Any:
    config = halfbyte.BitsAndBytesConfig(**NF4)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **more)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(X).logits  # type: ignore[no-any-return]


def where(model: Any) -> dict[str, list[int]]:
    """The experts that are not in host memory, by their layer's number."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, Experts4bit)}
    return {name.split(".")[2]: m.resident for name, m in found.items()}


def one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Experts4bit, "_one_by_one")


ALL = [0, 1, 2, 3]
# Of a map with entries inside of others, transformers cannot save what accelerate has offloaded.
APART = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), GPU)
PARTS = [f"model.layers.1.{part}" for part in ("self_attn", "input_layernorm", "post_attention_layernorm", "mlp")]
MAPS: dict[str, tuple[dict[str, Any], dict[str, list[int]]]] = {
    "one layer's experts": ({"": GPU, EXPERTS.format(1): "cpu"}, {"0": ALL, "1": []}),
    "some stay": ({"": GPU, EXPERTS.format(0): "cpu", f"{EXPERTS.format(0)}.2": GPU}, {"0": [2], "1": ALL}),
    "some go": ({"": GPU, f"{EXPERTS.format(0)}.2": "cpu"}, {"0": [0, 1, 3], "1": ALL}),
    "a block": ({**APART, **dict.fromkeys(PARTS[:3], GPU), PARTS[3]: "cpu"}, {"0": ALL, "1": []}),
    "a layer": ({**APART, "model.layers.1": "cpu"}, {"0": ALL, "1": []}),
    "all but": ({"": "cpu", "lm_head": GPU, "model.embed_tokens": GPU}, {"0": [], "1": []}),
}


@pytest.mark.parametrize("kind", ["dense", "packed"])
@pytest.mark.parametrize("name", MAPS)
def test_device_map_offloads_experts(
    name: str, kind: str, memory: Pinned, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device_map, resident = MAPS[name]
    given = dict(device_map)
    base = loaded(folder / "packed")
    expected = logits(base)
    model = loaded(folder / kind, device_map=device_map)
    assert device_map == given, "the caller's map"
    assert where(model) == resident
    assert memory.bytes
    one_operation(monkeypatch)
    assert torch.equal(logits(model), expected)
    # What else is on the CPU is accelerate's: without bytes between calls.
    others = any(isinstance(p, torch.nn.Parameter) and p.is_meta for p in model.parameters())
    assert others == (name in ("a block", "a layer", "all but"))
    for experts in (m for m in model.modules() if isinstance(m, Experts4bit)):
        assert not any(p.is_meta for p in experts.parameters())
    model.save_pretrained(tmp_path)
    saved, wanted = load_file(tmp_path / "model.safetensors"), load_file(folder / "packed" / "model.safetensors")
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in saved.items())
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "packed" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_an_inferred_map_offloads_experts(
    kind: str, memory: Pinned, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations import accelerate

    given = {"model.embed_tokens": GPU, "model.layers.0": GPU, "model.layers.1": "cpu", "model.norm": GPU,
             "model.rotary_emb": GPU, "lm_head": GPU}  # fmt: skip
    monkeypatch.setattr(accelerate, "infer_auto_device_map", lambda *args, **kwargs: dict(given))
    expected = logits(loaded(folder / "packed"))
    model = loaded(folder / kind, device_map="sequential")
    assert where(model) == {"0": ALL, "1": []}
    assert torch.equal(logits(model), expected)


def test_what_is_left_to_accelerate(memory: Pinned, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = logits(loaded(folder / "packed"))
    # Without a GPU in the map, nothing is offloaded at all.
    model = loaded(folder / "packed", device_map={"": "cpu"})
    assert not memory.bytes
    assert torch.equal(logits(model), expected)
    del model
    # A block with two GPUs; its experts alone would be taken.
    maps: list[dict[str, Any]] = [{"": GPU, "lm_head": 1, "model.layers.1": "cpu"}, {"": GPU, "model.layers.1": "cpu"}]
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder / "dense"))
    model = halfbyte.quantize_model(model, NF4)
    with caplog.at_level("WARNING", logger=expert_offload.__name__):
        claimed = expert_offload.OffloadedExperts()
        claimed.claim(model, maps[0])
    assert not claimed.experts
    assert maps[0]["model.layers.1"] == "cpu"
    assert "give them an entry of their own" in caplog.text
    caplog.clear()
    # Parts around the experts have tensors of their own.
    model.model.layers[1].mlp.register_parameter("scale", torch.nn.Parameter(torch.ones(1)))
    with caplog.at_level("WARNING", logger=expert_offload.__name__):
        claimed.claim(model, maps[1])
    assert not claimed.experts
    assert "'model.layers.1' is on the CPU" in caplog.text
    for more in ({EXPERTS.format(0): "disk"}, {EXPERTS.format(0): "cpu", f"{EXPERTS.format(0)}.1": "disk"}):
        claimed.claim(model, {"": GPU, **more})
        assert not claimed.experts


def test_a_map_with_a_gpu_that_is_not_there_is_refused(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU")
    model = halfbyte.quantize_model(
        transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder / "dense")), NF4
    )
    given = {"": 0, EXPERTS.format(0): "cpu"}
    with pytest.raises(
        ValueError, match="device must be a CUDA device that torch sees, got 'cuda:0', and it sees none"
    ):
        expert_offload.OffloadedExperts().claim(model, given)
    assert given == {"": 0, EXPERTS.format(0): "cpu"}


@pytest.mark.parametrize("count", [0, 3])
def test_load_quantized_offloads_experts(count: int, memory: Pinned, folder: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(folder / "dense")
    expected = logits(loaded(folder / "packed"))

    def empty() -> Any:
        with torch.device("meta"):
            made = transformers.AutoModelForCausalLM.from_config(config)
        return made.eval()

    size = 3 * (64 * 32 // 2 + 256 + 256 + 256 + 256 + 1024)
    model = halfbyte.load_quantized(empty(), folder / "packed", device="cuda", resident_expert_bytes=count * size + 100)
    assert where(model) == ({"0": [0, 1], "1": [0]} if count else {"0": [], "1": []})
    assert torch.equal(logits(model), expected)
    assert not any(host_memory.is_there(p) for n, p in model.named_parameters() if ".experts." not in n)
    for wrong, error, said in (
        (-1, ValueError, "resident_expert_bytes must be at least 0, got -1"),
        ("1", TypeError, "resident_expert_bytes must be an integer, got '1'"),
    ):
        with pytest.raises(error, match=said):
            halfbyte.load_quantized(empty(), folder / "packed", device="cuda", resident_expert_bytes=wrong)  # type: ignore[arg-type]


def test_dequantize_and_adapters_of_an_offloaded_model(memory: Pinned, folder: Path) -> None:
    peft = pytest.importorskip("peft")
    model = loaded(folder / "packed", device_map={"": GPU, EXPERTS.format(0): "cpu"})
    lora = peft.LoraConfig(r=4, target_modules=["up_proj", "down_proj"], init_lora_weights=False)

    def trained(base: Any) -> list[Any]:
        torch.manual_seed(0)
        adapted = peft.get_peft_model(base, lora)
        loss = adapted(X, labels=X).loss
        loss.backward()
        return [loss, *(p.grad for p in adapted.parameters() if p.requires_grad)]

    found, expected = trained(model), trained(loaded(folder / "packed"))
    assert len(found) > 10
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    del found, model
    model = loaded(folder / "packed", device_map={"": GPU, EXPERTS.format(0): "cpu", f"{EXPERTS.format(0)}.1": GPU})
    dense, plain = model.dequantize(), loaded(folder / "packed").dequantize()
    assert not any(isinstance(m, Experts4bit) for m in dense.modules())
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), plain.parameters(), strict=True))
