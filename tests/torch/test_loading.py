"""`load_quantized`: the same model as transformers and bitsandbytes load, and plain modules; the rest is named."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import halfbyte  # noqa: E402  (needs torch)
import tiny_models  # noqa: E402
from halfbyte.nn import Embedding4bit, Linear4bit, Params4bit  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Any:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()
    transformers.logging.set_verbosity_warning()


def mlp(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96, **options), nn.GELU(), nn.Linear(96, 32, **options))


def empty(make: Any, *arguments: Any) -> Any:
    with torch.device("meta"):
        return make(*arguments)


def on_meta(model: nn.Module) -> bool:
    return all(p.is_meta for p in model.parameters()) and not any(isinstance(m, Linear4bit) for m in model.modules())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of a small plain module."""
    save_file(halfbyte.quantize_model(mlp(), NF4).state_dict(), tmp_path / "model.safetensors")
    return tmp_path


# ---- beside transformers and bitsandbytes ----------------------------------------------------------------------------

TEXT = ["LlamaForCausalLM", "GPT2LMHeadModel", "Gemma2ForCausalLM", "OPTForCausalLM", "MixtralForCausalLM",
        "BertForMaskedLM", "T5ForConditionalGeneration"]  # fmt: skip
OTHERS = ["ViTForImageClassification", "LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration",
          "WhisperForConditionalGeneration", "CLIPModel", "GPTNeoXForCausalLM"]  # fmt: skip


@pytest.mark.parametrize("name", TEXT + OTHERS)
def test_load_quantized_checkpoint_of_bitsandbytes_loads_as_stock_loads_it(name: str, tmp_path: Path) -> None:
    cls = getattr(transformers, name)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=name != "GPT2LMHeadModel",
        bnb_4bit_compute_dtype=torch.float32,
    )
    source, saved = tiny_models.save(name, tmp_path / "source", torch.float32), tmp_path / "saved"
    stock = cls.from_pretrained(source, quantization_config=config, device_map="cpu", dtype=torch.float32)
    stock.save_pretrained(saved)
    del stock
    stock = cls.from_pretrained(saved, device_map="cpu").eval()

    model = halfbyte.load_quantized(empty(cls, tiny_models.tiny_config(name)), saved).eval()
    ours, theirs = model.state_dict(), stock.state_dict()
    assert set(ours) == set(theirs)
    for key in ours:
        if "bitsandbytes__" not in key and "nested_quant_map" not in key:
            assert ours[key].dtype == theirs[key].dtype, key
            assert torch.equal(ours[key], theirs[key]), key
    mine, others = dict(model.named_buffers()), dict(stock.named_buffers())
    assert mine.keys() == others.keys()
    for key in mine:
        assert torch.equal(mine[key], others[key]), key
    assert {n for n, m in model.named_modules() if isinstance(m, Linear4bit)} == {
        n for n, m in stock.named_modules() if type(m).__name__ == "Linear4bit"
    }
    for target, other in model.all_tied_weights_keys.items():
        assert model.get_parameter(target) is model.get_parameter(other)
    if name in TEXT:
        ids = torch.arange(24).reshape(2, 12) % 200 + 5
        inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if name.startswith("T5") else {})}
        # Gradients keep bitsandbytes from its bfloat16 shortcut, which also repacks its weights.
        torch.testing.assert_close(model(**inputs).logits, stock(**inputs).logits, atol=2e-5, rtol=1e-4)
    assert model.is_loaded_in_4bit
    assert model.config.quantization_config == config


def test_stock_loads_what_a_swapped_model_saves(tmp_path: Path) -> None:
    """With rules: the config's skip list must say what was kept."""
    model = tiny_models.build("LlamaForCausalLM", torch.float32)
    halfbyte.quantize_model(model, NF4, rules=[r"layers\.0\.mlp=keep", "lm_head=nf4"])
    model.save_pretrained(tmp_path)
    stock = transformers.LlamaForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert {n for n, m in model.named_modules() if isinstance(m, Linear4bit)} == {
        n for n, m in stock.named_modules() if type(m).__name__ == "Linear4bit"
    }
    ids = torch.arange(8)[None]
    torch.testing.assert_close(stock(ids).logits, model(ids).logits, atol=2e-5, rtol=1e-4)
    again = halfbyte.load_quantized(empty(transformers.LlamaForCausalLM, model.config), tmp_path).eval()
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_load_quantized_sharded_checkpoint_of_the_offline_tool(tmp_path: Path) -> None:
    source, output = tiny_models.save("LlamaForCausalLM", tmp_path / "source"), tmp_path / "output"
    halfbyte.quantize_checkpoint(
        source, output, config={**NF4, "bnb_4bit_compute_dtype": "bfloat16"}, max_shard_size="40KB", progress=None
    )
    assert len(list(output.glob("*.safetensors"))) > 2
    model = halfbyte.load_quantized(empty(transformers.LlamaForCausalLM, tiny_models.tiny_config("LlamaForCausalLM")),
                                    output).eval()  # fmt: skip
    assert model.dtype == torch.bfloat16
    layer = model.model.layers[0].mlp.up_proj
    assert layer.compute_dtype == torch.bfloat16
    swapped = halfbyte.quantize_model(transformers.LlamaForCausalLM.from_pretrained(source), NF4).eval()
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, swapped(ids).logits)
    shutil.rmtree(output)
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, swapped(ids).logits)


def test_load_quantized_body_fills_a_model_with_a_head_up_to_the_head(tmp_path: Path) -> None:
    """Names gain and lose the prefix, as transformers has it; what is really missing is named."""
    body = transformers.BertModel(tiny_models.tiny_config("BertModel"))
    halfbyte.quantize_model(body, NF4).save_pretrained(tmp_path)
    config = tiny_models.tiny_config("BertForSequenceClassification")
    with pytest.raises(halfbyte.CheckpointError, match=r"lacks classifier\.weight, classifier\.bias$"):
        halfbyte.load_quantized(transformers.BertForSequenceClassification(config), tmp_path)
    model = halfbyte.load_quantized(transformers.BertForSequenceClassification(config), tmp_path, strict=False)
    assert isinstance(model.bert.encoder.layer[0].attention.self.query, Linear4bit)
    assert model(torch.arange(6)[None]).logits.isfinite().all()


# ---- plain modules ---------------------------------------------------------------------------------------------------


def test_load_quantized_real_model_is_filled_too_and_keeps_its_flags(folder: Path) -> None:
    want = halfbyte.quantize_model(mlp(), NF4)
    model = mlp(dtype=torch.bfloat16).eval()
    model[0].bias.requires_grad_(False)
    calls: list[type] = []
    model[0].register_forward_hook(lambda module, args, output: calls.append(type(module)))
    assert halfbyte.load_quantized(model, folder) is model
    x = torch.randn(3, 64)
    assert torch.equal(model(x), want(x))
    assert calls == [Linear4bit]
    assert not model.training
    assert [p.requires_grad for p in model.parameters()] == [False, False, False, True]
    # Once more, over what is packed already.
    halfbyte.load_quantized(model, folder / "model.safetensors")
    assert torch.equal(model(x), want(x))
    assert type(halfbyte.dequantize_model(model)[0]) is nn.Linear
    assert sum(isinstance(m, nn.Linear) for m in model) == 2


def test_load_quantized_root_layer_and_an_embedding(tmp_path: Path) -> None:
    layer = halfbyte.quantize_model(nn.Linear(32, 8), NF4)
    save_file(layer.state_dict(), tmp_path / "model.safetensors")
    loaded = halfbyte.load_quantized(empty(nn.Linear, 32, 8), tmp_path)
    x = torch.randn(2, 32)
    assert torch.equal(loaded(x), layer(x))

    table = Embedding4bit(50, 32, quant_type="nf4").to("cpu")
    model = nn.ModuleDict({"embed": table, "up": halfbyte.quantize_model(nn.Linear(32, 8), NF4)})
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    dense = nn.ModuleDict({"embed": nn.Embedding(50, 32, padding_idx=3), "up": nn.Linear(32, 8)})
    loaded = halfbyte.load_quantized(dense, tmp_path)
    ids = torch.arange(10)
    assert torch.equal(loaded["embed"](ids), table(ids))
    assert loaded["embed"].padding_idx == 3
    assert type(halfbyte.dequantize_model(loaded)["embed"]) is nn.Embedding


def test_load_quantized_parameters_that_are_one_stay_one(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.head = nn.Embedding(40, 64), nn.Linear(64, 64), nn.Linear(64, 40, bias=False)
            self.head.weight = self.embed.weight

    model = halfbyte.quantize_model(Tied(), NF4)
    state = model.state_dict()
    del state["embed.weight"]
    save_file(state, tmp_path / "model.safetensors")
    loaded = halfbyte.load_quantized(empty(Tied), tmp_path)
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(loaded.head.weight, model.head.weight)
    save_file({**state, "embed.weight": state["head.weight"] + 1}, tmp_path / "model.safetensors")
    blank = empty(Tied)
    with pytest.raises(halfbyte.CheckpointError, match=r"embed\.weight and head\.weight are one parameter"):
        halfbyte.load_quantized(blank, tmp_path)
    assert on_meta(blank)


class WithTable(nn.Module):
    """A module with a buffer that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 32)
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.register_buffer("mean", torch.zeros(3))


def test_load_quantized_buffers_that_no_checkpoint_holds(tmp_path: Path) -> None:
    model = halfbyte.quantize_model(WithTable(), NF4)
    model.mean += 2
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"buffers table are on the meta device.*init_empty_weights"):
        halfbyte.load_quantized(empty(WithTable), tmp_path)
    from accelerate import init_empty_weights

    with init_empty_weights():
        blank = WithTable()
    loaded = halfbyte.load_quantized(blank, tmp_path)
    assert torch.equal(loaded.table, torch.arange(4.0))
    assert torch.equal(loaded.mean, torch.full((3,), 2.0))


def test_load_quantized_transformers_model_that_does_not_compute_its_buffer(tmp_path: Path) -> None:
    class Odd(transformers.LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.register_buffer("odd", torch.ones(3), persistent=False)

    config = tiny_models.tiny_config("LlamaForCausalLM")
    halfbyte.quantize_model(Odd(config), NF4).save_pretrained(tmp_path)
    blank = empty(Odd, config)
    with pytest.raises(ValueError, match="does not compute its buffers odd"):
        halfbyte.load_quantized(blank, tmp_path)
    assert on_meta(blank)
    assert all(b.is_meta for b in blank.buffers())


# ---- what is refused -------------------------------------------------------------------------------------------------


def edit(folder: Path, change: Any) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def blob(values: dict[str, Any]) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)


STATE = "0.weight.quant_state.bitsandbytes__nf4"


def reshape(state: dict[str, Any]) -> None:
    values = json.loads(bytes(state[STATE].tolist()))
    state[STATE] = blob({**values, "shape": [64, 96]})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.pop("2.bias"), "the checkpoint lacks 2.bias"),
        (
            lambda s: s.pop("2.weight"),
            "model.safetensors: 2.weight.absmax is a part of a packed weight, but the checkpoint lacks 2.weight; it",
        ),
        (lambda s: s.update(extra=torch.ones(1)), "Sequential has no place for extra"),
        (lambda s: s.update({"2.bias": torch.ones(31)}), "2.bias is [31], the model has [32]"),
        (lambda s: s.pop("0.weight.absmax"), "0.weight: quant state: missing absmax"),
        (lambda s: s.update({"0.weight.absmax": torch.ones(7)}), "0.weight: "),
        (lambda s: s.update({"0.weight": s["0.weight"][:-1].clone()}), "0.weight: "),
        (lambda s: s.update({STATE: torch.zeros(4, dtype=torch.uint8)}), "0.weight: "),
        (reshape, "0.weight: holds [64, 96], 0 of the model has [96, 64]; build the model with the configuration that"),
        (
            lambda s: s.pop(STATE),
            "0.weight.absmax is a part of a packed weight, but the checkpoint lacks 0.weight.quant_state",
        ),
        (
            lambda s: s.update({"0.SCB": torch.ones(96), "0.weight_format": torch.tensor(0).byte()}),
            "0.weight: has the parts of 4 bits and of 8 bits: 0.",
        ),
        (lambda s: s.update({"0.SCB": torch.ones(96)}), "Sequential has no place for 0.SCB"),
        (lambda s: [s.pop(k) for k in list(s) if "weight" in k], "holds no 4-bit weight"),
    ],
)
def test_load_quantized_checkpoint_that_does_not_fit_changes_nothing(change: Any, text: str, folder: Path) -> None:
    edit(folder, change)
    model = empty(mlp)
    with pytest.raises(halfbyte.CheckpointError, match=re.escape(text)) as caught:
        halfbyte.load_quantized(model, folder)
    assert str(folder) in str(caught.value)
    assert on_meta(model)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda scales: scales[:-1], r"nested_absmax: 0 elements, expected 1 for 96 nested scales"),
        (lambda scales: scales.int(), r"nested_absmax: dtype torch\.int32 is not torch\.float32"),
    ],
)
def test_load_quantized_nested_scales_are_called_as_in_the_file(change: Any, text: str, tmp_path: Path) -> None:
    model = halfbyte.quantize_model(mlp(), {**NF4, "bnb_4bit_use_double_quant": True})
    state = model.state_dict()
    state["0.weight.nested_absmax"] = change(state["0.weight.nested_absmax"]).clone()
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(halfbyte.CheckpointError, match=text) as caught:
        halfbyte.load_quantized(empty(mlp), tmp_path)
    assert "absmax2" not in str(caught.value)
    # A state dict has the same names.
    with pytest.raises(RuntimeError, match=text):
        model.load_state_dict(state)
    if state["0.weight.nested_absmax"].dtype is torch.float32:
        with pytest.raises(halfbyte.CheckpointError, match=r"0\.weight\.nested_absmax must "):
            halfbyte.arrays.load_tensor(tmp_path, "0.weight")


def test_load_quantized_tensors_are_called_as_in_the_file(tmp_path: Path) -> None:
    body = transformers.BertModel(tiny_models.tiny_config("BertModel"))
    halfbyte.quantize_model(body, NF4).save_pretrained(tmp_path)
    name = "embeddings.LayerNorm.weight"
    edit(tmp_path, lambda state: state.update({name: torch.ones(3)}))
    model = transformers.BertForSequenceClassification(tiny_models.tiny_config("BertForSequenceClassification"))
    with pytest.raises(halfbyte.CheckpointError, match=rf": {re.escape(name)} is \[3\], the model has "):
        halfbyte.load_quantized(model, tmp_path, strict=False)


def test_load_quantized_not_strict_says_what_it_leaves(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(folder, lambda state: (state.pop("2.bias"), state.update(extra=torch.ones(1))))
    model = mlp()
    bias = model[2].bias.detach().clone()
    halfbyte.load_quantized(model, folder, strict=False)
    assert "lacks 2.bias" in caplog.text
    assert "no place for extra" in caplog.text
    assert torch.equal(model[2].bias, bias)


def test_load_quantized_4_bit_weight_for_another_module(folder: Path) -> None:
    model = nn.Sequential(nn.Bilinear(4, 4, 96), nn.GELU(), nn.Linear(96, 32))
    with pytest.raises(halfbyte.CheckpointError, match=r"0\.weight: is 4-bit, .* belongs to a Bilinear"):
        halfbyte.load_quantized(model, folder)
    assert type(model[2]) is nn.Linear


def test_load_quantized_4_bit_weight_that_a_model_wants_split(tmp_path: Path) -> None:
    """Stock transformers saves such a thing itself (it joins the bytes), and then cannot load it."""
    model = tiny_models.build("NomicBertModel")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = next(key for key in state if key.endswith("Wqkv.weight"))
    parameter = Params4bit(state[name], quant_type="nf4").to("cpu")
    state[name] = parameter.data
    state.update({f"{name}.{key}": value for key, value in parameter.quant_state.as_dict(packed=True).items()})
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(halfbyte.CheckpointError, match=r"Wqkv\.weight is 4-bit, but NomicBertModel wants it split"):
        halfbyte.load_quantized(empty(transformers.NomicBertModel, tiny_models.tiny_config("NomicBertModel")), tmp_path)


@pytest.mark.parametrize(
    ("table", "text"),
    [
        (
            "[]",
            r'index\.json: is no valid index, an object with "weight_map": tensor name -> file name; save',
        ),
        (
            "{}",
            r'index\.json: is no valid index, an object with "weight_map": tensor name -> file name; save',
        ),
        (
            '{"weight_map": {"a": "../a.safetensors"}}',
            r"the file of 'a' must be inside the folder, got '\.\./a\.safetensors'",
        ),
        ('{"weight_map": {"a": 3}}', "the file of 'a' must be inside the folder, got 3"),
        (
            '{"weight_map": {"a": "none.safetensors"}}',
            r"none\.safetensors: there is no such file, .*; it is incomplete: save",
        ),
        (
            '{"weight_map": {"a": "part.safetensors"}}',
            r"part\.safetensors: lacks 'a', which model\..* it is incomplete: save",
        ),
        (
            '{"weight_map": {"a": "part.safetensors", "b": "part.safetensors"}}',
            r"part\.safetensors: lacks 'a' and 1 more, which model\.safetensors\.index\.json says it holds; it",
        ),
        ("{", r"index\.json: is no valid index, .* \(Expecting property name .*\); save, or download, it again"),
    ],
)
def test_load_quantized_broken_index(table: str, text: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(table)
    with pytest.raises(halfbyte.CheckpointError, match=text):
        halfbyte.load_quantized(empty(mlp), folder)


def test_load_quantized_broken_files_and_other_formats(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for text in (b"", b"x" * 40, whole[:-5]):
        path.write_bytes(text)
        with pytest.raises(
            halfbyte.CheckpointError, match=r"model\.safetensors: is not a whole safetensors file \(.*\); save"
        ):
            halfbyte.load_quantized(empty(mlp), folder)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(halfbyte.CheckpointError, match=r"model\.safetensors: is a Git LFS pointer .* `git lfs pull`"):
        halfbyte.load_quantized(empty(mlp), folder)
    path.write_bytes(whole)
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(
        halfbyte.CheckpointError, match=r"is quantized with gptq, .*; load it with the library of that method"
    ):
        halfbyte.load_quantized(empty(mlp), folder)
    with pytest.raises(halfbyte.CheckpointError, match="no such"):
        halfbyte.load_quantized(empty(mlp), folder / "nowhere")
    path.unlink()
    with pytest.raises(halfbyte.CheckpointError, match=r"expected model\.safetensors or"):
        halfbyte.load_quantized(empty(mlp), folder)
    with pytest.raises(ValueError, match=r"device must be .*got 'meta'"):
        halfbyte.load_quantized(empty(mlp), folder, device="meta")
    with pytest.raises(TypeError, match=r"device must be .*got 3\.5"):
        halfbyte.load_quantized(empty(mlp), folder, device=3.5)


def test_load_quantized_writing_to_a_loaded_model_does_not_reach_the_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    before = path.read_bytes()
    model = halfbyte.load_quantized(mlp(), folder)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model[0].bias.add_(1)
        model[0].weight.data.zero_()
    assert path.read_bytes() == before
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("0.weight"), copied[0].weight.data)


# ---- modules with code or states of their own ------------------------------------------------------------------------


class Versioned(nn.Module):
    """A module that saves more than its tensors."""

    def __init__(self, version: int) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.version = version

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor([self.version])

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.version = int(state)


@pytest.mark.parametrize("strict", [True, False])
def test_load_quantized_extra_state_is_set(strict: bool, tmp_path: Path) -> None:
    saved = halfbyte.quantize_model(Versioned(7), NF4)
    save_file(saved.state_dict(), tmp_path / "model.safetensors")
    loaded = halfbyte.load_quantized(Versioned(1), tmp_path, strict=strict)
    assert loaded.version == 7
    assert isinstance(loaded.linear, Linear4bit)


def test_load_quantized_extra_state_is_set_when_quantizing_a_checkpoint(tmp_path: Path) -> None:
    save_file(Versioned(7).state_dict(), tmp_path / "model.safetensors")
    assert halfbyte.quantize_model(Versioned(1), NF4, checkpoint=tmp_path).version == 7


@pytest.mark.parametrize(
    ("key", "value"), [("llm_int8_skip_modules", "null"), ("llm_int8_skip_modules", [1]), ("load_in_4bit", "yes")]
)
def test_load_quantized_wrong_quantization_config_changes_nothing(key: str, value: Any, folder: Path) -> None:
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, key: value}}
    (folder / "config.json").write_text(json.dumps(config))
    model = mlp()
    with pytest.raises(halfbyte.CheckpointError, match=rf"config\.json: quantization_config: {key}"):
        halfbyte.load_quantized(model, folder)
    assert not any(isinstance(module, Linear4bit) for module in model.modules())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, x, x)[0]


def test_load_quantized_4_bit_weight_is_unpacked_where_the_module_reads_it(tmp_path: Path) -> None:
    model = Attention().eval()
    tensors = model.state_dict()
    name = "inner.out_proj.weight"
    data, state = halfbyte.functional.quantize_4bit(tensors[name], quant_type="nf4")
    tensors[name] = data
    tensors.update({f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()})
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = halfbyte.load_quantized(Attention().eval(), tmp_path)
    assert type(loaded.inner.out_proj) is type(model.inner.out_proj)
    with torch.no_grad():
        model.inner.out_proj.weight.copy_(halfbyte.functional.dequantize_4bit(data, state))
    x = torch.randn(1, 3, 64)
    assert torch.equal(loaded(x), model(x))


def test_load_quantized_names_with_a_prefix_are_told(folder: Path) -> None:
    edit(folder, lambda state: state.update({f"module.{name}": state.pop(name) for name in list(state)}))
    with pytest.raises(halfbyte.CheckpointError, match=r"lacks 0\.weight.*no place for module\.0"):
        halfbyte.load_quantized(mlp(), folder)


def test_load_quantized_scales_stored_in_16_bits_are_read(folder: Path) -> None:
    expected = halfbyte.load_quantized(mlp(), folder)[0].weight.quant_state.absmax.clone()
    edit(folder, lambda state: state.update({k: v.half() for k, v in state.items() if k.endswith(".absmax")}))
    state = halfbyte.load_quantized(mlp(), folder)[0].weight.quant_state
    assert torch.equal(state.absmax, expected.half().float())
    assert state.absmax.dtype == torch.float32
