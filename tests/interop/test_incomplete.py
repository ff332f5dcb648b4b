"""4-bit checkpoints that lack something or are broken, loaded by transformers and by `load_quantized`."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import halfbyte  # noqa: E402
from halfbyte import BitsAndBytesConfig, CheckpointError  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: E402

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "pad_token_id": 0,
}
WEIGHT = "model.layers.1.mlp.up_proj.weight"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"
CONFIG = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Transformers' report of new weights is not what is asked for here."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.CRITICAL)
    yield
    transformers.logging.set_verbosity(before)


def packed(model: Any, folder: Path, **kwargs: Any) -> Path:
    """Quantize a model and save it."""
    halfbyte.quantize_model(model.eval(), CONFIG, progress=False).save_pretrained(folder, **kwargs)
    return folder


def llama(**kwargs: Any) -> Any:
    config = transformers.LlamaConfig(**{**SIZES, "tie_word_embeddings": False, **kwargs})
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same 4-bit Llama in one file, and in several."""
    folder = tmp_path_factory.mktemp("saved")
    packed(llama(), folder / "whole")
    packed(llama(), folder / "sharded", max_shard_size="40KB")
    return folder


def edited(path: Path, to: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a folder in one file, its tensors changed by `edit`."""
    shutil.copytree(path, to)
    tensors = load_file(to / "model.safetensors")
    edit(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def without(*starts: str) -> Callable[[dict[str, Any]], object]:
    """An edit that takes away all tensors whose names begin so."""
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(starts)]


def skipping(path: Path, *names: str) -> Path:
    """Put names into the skip list of a folder's config.json."""
    file = path / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values["quantization_config"]["llm_int8_skip_modules"] = ["lm_head", *names]
    file.write_text(json.dumps(values), encoding="utf-8")
    return path


def load(path: Path, cls: Any = AutoModelForCausalLM, **kwargs: Any) -> Any:
    return cls.from_pretrained(path, quantization_config=CONFIG, **kwargs)


def fill(path: Path) -> Any:
    """The same by `load_quantized`."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(path))
    return halfbyte.load_quantized(model, path)


def refused(call: Callable[[Path], Any], path: Path) -> str:
    with pytest.raises(CheckpointError) as found:
        call(path)
    return str(found.value)


def count(model: Any) -> int:
    return sum(isinstance(module, halfbyte.nn.Linear4bit) for module in model.modules())


# ---- layers that are not there at all --------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [load, fill])
def test_absent_layer_is_refused_by_name(saved: Path, tmp_path: Path, call: Callable[[Path], Any]) -> None:
    path = edited(saved / "whole", tmp_path / "lost", without(WEIGHT))
    text = refused(call, path)
    assert WEIGHT in text
    assert str(path) in text
    assert "lacks" in text


def test_absent_layer_of_many_files_names_the_index(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "sharded", tmp_path / "lost")
    for file in (tmp_path / "lost").glob("*.safetensors"):
        tensors = load_file(file)
        without(WEIGHT)(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    text = refused(load, tmp_path / "lost")
    assert f"{tmp_path / 'lost' / 'model.safetensors.index.json'}: " in text
    assert WEIGHT in text


def test_absent_kind_of_layer_is_refused(saved: Path, tmp_path: Path) -> None:
    # In no block: only that the checkpoint was saved from this class tells.
    ups = [f"model.layers.{number}.mlp.up_proj" for number in range(2)]
    path = edited(saved / "whole", tmp_path / "lost", without(*ups))
    assert "and 1 more" in refused(load, path)


def test_absent_layer_is_refused_for_another_class(saved: Path, tmp_path: Path) -> None:
    path = edited(saved / "whole", tmp_path / "lost", without(WEIGHT))
    for cls in (AutoModel, AutoModelForSequenceClassification):
        text = refused(lambda path, cls=cls: load(path, cls), path)  # type: ignore[misc]
        assert "layers.1.mlp.up_proj.weight" in text


def test_absent_block_is_refused(saved: Path) -> None:
    text = refused(lambda path: load(path, num_hidden_layers=3), saved / "whole")
    assert "model.layers.2." in text
    assert "and 6 more" in text
    assert "config.json" in text


def test_absent_layer_in_the_skip_list_starts_anew(saved: Path, tmp_path: Path) -> None:
    path = skipping(edited(saved / "whole", tmp_path / "lost", without(WEIGHT)), "model.layers.1.mlp.up_proj")
    model = load(path)
    assert count(model) == 13
    assert type(model.model.layers[1].mlp.up_proj) is torch.nn.Linear


def test_absent_output_layer_is_transformers_matter(saved: Path, tmp_path: Path) -> None:
    model = load(edited(saved / "whole", tmp_path / "lost", without("lm_head")))
    assert count(model) == 14
    assert type(model.lm_head) is torch.nn.Linear


def test_absent_tied_output_layer_is_the_embedding(tmp_path: Path) -> None:
    path = packed(llama(tie_word_embeddings=True), tmp_path / "tied")
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    model = load(path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_absent_pooler_and_head_start_anew(tmp_path: Path) -> None:
    config = transformers.BertConfig(**SIZES)
    path = packed(transformers.BertForMaskedLM(config), tmp_path / "masked")
    for cls in (AutoModel, AutoModelForSequenceClassification):
        model = load(path, cls)
        assert count(model) == 12
        assert type((model if cls is AutoModel else model.bert).pooler.dense) is torch.nn.Linear
    # Other tools save the encoder without a pooler under the name of the class that has one.
    path = packed(transformers.BertModel(config, add_pooling_layer=False), tmp_path / "encoder")
    assert count(load(path, AutoModel)) == 12
    lost = edited(path, tmp_path / "lost", without("encoder.layer.1.output.dense"))
    assert "encoder.layer.1.output.dense.weight" in refused(lambda path: load(path, AutoModel), lost)


def test_absent_cross_attention_starts_anew_where_it_is_named(tmp_path: Path) -> None:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96))
    path = packed(model, tmp_path / "decoder")
    assert "crossattention" in refused(lambda path: load(path, add_cross_attention=True), path)
    model = load(skipping(path, *(f"transformer.h.{i}.crossattention" for i in range(2))), add_cross_attention=True)
    assert count(model) == 8


@pytest.mark.skipif(
    transformers.__version__.startswith("5.0."),
    reason="transformers 5.0 loads any shape beside a quantizer",
)
def test_head_of_another_size_can_be_ignored(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SIZES, num_labels=3)
    path = packed(transformers.LlamaForSequenceClassification(config), tmp_path / "three")
    model = load(path, AutoModelForSequenceClassification, num_labels=5, ignore_mismatched_sizes=True)
    assert count(model) == 14
    assert model.score.weight.shape == (5, 64)
    assert load(path, AutoModelForSequenceClassification).score.weight.shape == (3, 64)


def test_packed_weight_of_another_size_cannot_be_ignored(saved: Path) -> None:
    for kwargs in ({}, {"ignore_mismatched_sizes": True}):
        text = refused(lambda path: load(path, intermediate_size=256, **kwargs), saved / "whole")  # noqa: B023
        assert "holds a weight [64, 128], the model has [64, 256]" in text
        assert "config.json" in text


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapter_folder_loads_over_a_4bit_base(saved: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(load(saved / "whole"), lora).save_pretrained(tmp_path / "adapter")
    model = load(tmp_path / "adapter")
    assert count(model) == 14
    assert any("lora_A" in name for name, _ in model.named_parameters())


# ---- files and parts that are broken ---------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [load, fill])
def test_file_that_is_cut_short_is_named(saved: Path, tmp_path: Path, call: Callable[[Path], Any]) -> None:
    shutil.copytree(saved / "whole", tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert str(file) in refused(call, tmp_path / "cut")


@pytest.mark.parametrize("call", [load, fill])
def test_missing_file_is_named(saved: Path, tmp_path: Path, call: Callable[[Path], Any]) -> None:
    shutil.copytree(saved / "sharded", tmp_path / "cut")
    file = sorted((tmp_path / "cut").glob("*.safetensors"))[1]
    file.unlink()
    text = refused(call, tmp_path / "cut")
    assert str(file) in text
    assert "no such file" in text


@pytest.mark.parametrize("call", [load, fill])
def test_packed_weight_in_two_files_is_refused(saved: Path, tmp_path: Path, call: Callable[[Path], Any]) -> None:
    shutil.copytree(saved / "sharded", tmp_path / "twice")
    index = tmp_path / "twice" / "model.safetensors.index.json"
    table = json.loads(index.read_text(encoding="utf-8"))
    held = table["weight_map"].pop(WEIGHT)
    other = next(file for file in table["weight_map"].values() if file != held)
    index.write_text(json.dumps(table), encoding="utf-8")
    tensors = load_file(tmp_path / "twice" / other)
    tensors[WEIGHT] = load_file(tmp_path / "twice" / held)[WEIGHT] + 1
    save_file(tensors, tmp_path / "twice" / other, metadata={"format": "pt"})
    text = refused(call, tmp_path / "twice")
    assert WEIGHT in text
    assert held in text
    assert other in text


def test_index_decides_between_two_files(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "sharded", tmp_path / "twice")
    table = json.loads((tmp_path / "twice" / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    expected = fill(saved / "whole").state_dict()["model.norm.weight"]
    for file in set(table.values()) - {table["model.norm.weight"]}:
        tensors = load_file(tmp_path / "twice" / file)
        tensors["model.norm.weight"] = expected + 1
        save_file(tensors, tmp_path / "twice" / file, metadata={"format": "pt"})
    assert torch.equal(fill(tmp_path / "twice").state_dict()["model.norm.weight"], expected)


def _blob(**fields: Any) -> Callable[[Any], Any]:
    """The JSON beside a weight, with other values."""

    def edit(old: Any) -> Any:
        text = json.dumps({**json.loads(bytes(old.tolist())), **fields}).encode()
        return torch.frombuffer(bytearray(text), dtype=torch.uint8)

    return edit


BROKEN: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "absmax-long": (f"{WEIGHT}.absmax", lambda old: torch.cat([old, old]), "256 scales do not fit"),
    "absmax-short": (f"{WEIGHT}.absmax", lambda old: old[:-1], "127 scales do not fit"),
    "absmax-dtype": (f"{WEIGHT}.absmax", lambda old: old.to(torch.int8), "torch.int8"),
    "map-short": (f"{WEIGHT}.quant_map", lambda old: old[:-1], "quant_map: is not the 16 values of nf4"),
    "map-other": (f"{WEIGHT}.quant_map", lambda old: old.flip(0), "quant_map: is not the 16 values of nf4"),
    "nested-map": (f"{WEIGHT}.nested_quant_map", lambda old: old.flip(0), "nested_quant_map"),
    "weight-short": (WEIGHT, lambda old: old[:-8], "4088 elements"),
    "weight-dtype": (WEIGHT, lambda old: old.to(torch.int32), "torch.int32"),
    "no-json": (STATE, lambda old: old.flip(0), "JSON"),
    "json-list": (STATE, lambda old: torch.tensor(list(b"[1]"), dtype=torch.uint8), "expected an object"),
    "json-deep": (STATE, lambda _: torch.full((100_000,), ord("["), dtype=torch.uint8), "JSON"),
    "json-digits": (STATE, lambda _: torch.full((5_000,), ord("9"), dtype=torch.uint8), "JSON"),
    "state-empty": (STATE, lambda old: old[:0], "JSON"),
    "state-dtype": (STATE, lambda old: old.int(), "torch.int32"),
    "blocksize-48": (STATE, _blob(blocksize=48), "blocksize: 48"),
    "blocksize-negative": (STATE, _blob(blocksize=-64), "blocksize: -64"),
    "blocksize-text": (STATE, _blob(blocksize="64"), "blocksize: '64'"),
    "shape-negative": (STATE, _blob(shape=[-128, -64]), "shape: [-128, -64]"),
    "shape-text": (STATE, _blob(shape="128"), "shape: '128'"),
    "shape-null": (STATE, _blob(shape=None), "shape"),
    "shape-huge": (STATE, _blob(shape=[2**40, 2**40]), "elements"),
    "dtype-unknown": (STATE, _blob(dtype="float99"), "dtype: 'float99'"),
    "type-unknown": (STATE, _blob(quant_type="int4"), "quant_type 'int4'"),
    "nested-blocksize": (STATE, _blob(nested_blocksize=0), "nested_blocksize: 0"),
    "nested-offset": (STATE, _blob(nested_offset="x"), "nested_offset: 'x'"),
}


@pytest.mark.parametrize("call", [load, fill])
@pytest.mark.parametrize("what", BROKEN)
def test_broken_part_is_named(saved: Path, tmp_path: Path, what: str, call: Callable[[Path], Any]) -> None:
    name, edit, words = BROKEN[what]
    path = edited(saved / "whole", tmp_path / "broken", lambda tensors: tensors.update({name: edit(tensors[name])}))
    text = refused(call, path)
    assert words in text
    assert f"{path / 'model.safetensors'}: {WEIGHT}: " in text


@pytest.mark.parametrize("bits", [4, 8])
def test_header_of_odd_length_is_read(tmp_path: Path, bits: int) -> None:
    # As safetensors wrote files before 0.3: no tensor of the mapped file is where its dtype wants it.
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    dense, whole = tmp_path / "dense", tmp_path / "whole"
    llama().to(torch.bfloat16).save_pretrained(dense)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    model.save_pretrained(whole)
    ids = torch.tensor([[1, 2, 3]])
    want = model(ids).logits
    for file in (dense / "model.safetensors", whole / "model.safetensors"):
        raw = file.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        header = raw[8:end].rstrip()
        header += b" " * ((1 - 8 - len(header)) % 8)
        file.write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])
    again = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    for other in (again, load(whole), fill(whole)):
        assert torch.equal(other.eval()(ids).logits, want)


def test_scales_of_16_bits_are_read(saved: Path, tmp_path: Path) -> None:
    # As tools that cast everything that is not packed leave them.
    name = f"{WEIGHT}.nested_absmax"
    path = edited(saved / "whole", tmp_path / "cast", lambda tensors: tensors.update({name: tensors[name].half()}))
    weights = [model.model.layers[1].mlp.up_proj.weight.dequantize() for model in (load(path), fill(path))]
    assert torch.equal(*weights)
    exact = fill(saved / "whole").model.layers[1].mlp.up_proj.weight.dequantize()
    torch.testing.assert_close(weights[0], exact, rtol=1e-2, atol=1e-3)


def configured(path: Path, to: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a folder, its config.json changed by `edit`."""
    shutil.copytree(path, to)
    values = json.loads((to / "config.json").read_text(encoding="utf-8"))
    edit(values)
    (to / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return to


@pytest.mark.parametrize("lost", ["all of it", "load_in_4bit"])
def test_packed_weights_without_their_config_are_not_quantized_again(saved: Path, tmp_path: Path, lost: str) -> None:
    def edit(values: dict[str, Any]) -> None:
        if lost == "load_in_4bit":
            values["quantization_config"].update(load_in_4bit=None, _load_in_4bit=None)
        else:
            del values["quantization_config"]

    text = refused(load, configured(saved / "whole", tmp_path / "stripped", edit))
    assert "packed to 4 bits already" in text
    assert "quant_state.bitsandbytes__nf4" in text
    assert "load_in_4bit" in text


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_of_8_bits_are_not_quantized_again(tmp_path: Path, dtype: torch.dtype) -> None:
    llama().save_pretrained(tmp_path / "dense")
    path = edited(
        tmp_path / "dense", tmp_path / "eight", lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].to(dtype)})
    )
    text = refused(load, path)
    assert f"{path / 'model.safetensors'}: {WEIGHT} is " in text
    assert "quantized already" in text
    # Where it is kept, it is read as transformers reads it.
    skip = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["up_proj"])
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=skip, dtype=torch.float32)
    assert count(model) == 12


def quantize_from(path: Path) -> Any:
    """Quantize a model in memory, of which the weights are in a checkpoint; it stays as it was when that is refused."""
    model = llama()
    try:
        return halfbyte.quantize_model(model, CONFIG, checkpoint=path, progress=False)
    except CheckpointError:
        assert count(model) == 0
        raise


def quantize_on_the_fly(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=CONFIG)


@pytest.mark.parametrize("call", [quantize_on_the_fly, quantize_from])
@pytest.mark.parametrize("part", ["qweight", "weight_packed", "W_q", "weight._data", "weight_scale_inv"])
def test_weights_quantized_by_other_methods_are_not_quantized_again(
    tmp_path: Path, part: str, call: Callable[[Path], Any]
) -> None:
    # Without the method's entry in config.json, which people delete to get past a loader.
    def edit(tensors: Any) -> None:
        weight = tensors[WEIGHT] if part == "weight_scale_inv" else tensors.pop(WEIGHT)
        tensors[WEIGHT.removesuffix("weight") + part] = weight.new_ones((1, 1)).to(torch.int32)

    llama().save_pretrained(tmp_path / "dense")
    path = edited(tmp_path / "dense", tmp_path / "quantized", edit)
    text = refused(call, path)
    assert f"{path / 'model.safetensors'}: {WEIGHT.removesuffix('weight')}{part}: " in text
    assert "quantized already" in text


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float64])
def test_dtype_that_cannot_be_quantized_is_found_before_the_model_is_changed(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    llama().save_pretrained(tmp_path / "dense")
    path = edited(
        tmp_path / "dense", tmp_path / "other", lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].to(dtype)})
    )
    text = refused(quantize_from, path)
    assert text.startswith(str(path))
    assert WEIGHT in text
    assert str(dtype) in text


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.uint8])
def test_integers_in_place_of_a_packed_weight_are_refused(saved: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith(WEIGHT)]:
            del tensors[name]
        tensors[WEIGHT] = torch.ones(128, 64).to(dtype)

    path = edited(saved / "whole", tmp_path / "odd", edit)
    text = refused(load, path)
    assert WEIGHT in text
    assert "no part of a packed weight is beside it: expected F16, BF16 or F32" in text


@pytest.mark.parametrize("call", [load, fill])
@pytest.mark.parametrize("shape", [(1, -1), (-1,)])
def test_packed_bytes_in_one_row_mean_the_same_weight(
    saved: Path, tmp_path: Path, call: Callable[[Path], Any], shape: tuple[int, ...]
) -> None:
    """To bitsandbytes' functions one row of packed bytes is a transposed weight: square ones came back transposed."""

    def edit(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if f"{name}.absmax" in tensors]:
            tensors[name] = tensors[name].reshape(shape)

    model = call(edited(saved / "whole", tmp_path / "row", edit)).dequantize()
    expected = call(saved / "whole").dequantize().state_dict()
    assert [n for n, value in model.state_dict().items() if not torch.equal(value, expected[n])] == []


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_dtype_that_is_no_parameters_is_refused(saved: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    name = "model.norm.weight"
    path = edited(saved / "whole", tmp_path / "other", lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    assert f"{name} is {dtype}, the model has torch.float32" in refused(fill, path)


def test_wrong_value_in_the_config_leaves_the_model_as_it_was(saved: Path, tmp_path: Path) -> None:
    def edit(values: dict[str, Any]) -> None:
        values["quantization_config"]["bnb_4bit_quant_type"] = "int4"

    path = configured(saved / "whole", tmp_path / "wrong", edit)
    model = llama()
    with pytest.raises(CheckpointError, match=r"config\.json: quantization_config: bnb_4bit_quant_type must be one of"):
        halfbyte.load_quantized(model, path)
    assert count(model) == 0
