"""LLM.int8() through transformers and accelerate: loading, saving, device maps, and what cannot be loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import halfbyte
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from scenarios import IDS, KIND, SIZES, config, layers, logits, same_tokens, scenario, source
from scenarios_models import output, said, same_files, tiny_models, tokenizer_beside
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

WEIGHT = "model.layers.1.mlp.up_proj.weight"


def config8(**kwargs: Any) -> Any:
    """LLM.int8(), in this package's class."""
    return halfbyte.BitsAndBytesConfig(load_in_8bit=True, **kwargs)


def loaded8(folder: Path, dtype: torch.dtype = torch.float32, how: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """The tiny Llama in 8 bits; `how` are further arguments of the load."""
    path = source(folder, dtype)
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config8(**kwargs), **(how or {}))


def layers8(model: nn.Module) -> int:
    """How many layers are this package's 8-bit ones."""
    return sum(isinstance(module, halfbyte.nn.Linear8bitLt) for module in model.modules())


def stock8(path: Path, **kwargs: Any) -> Any:
    """A model that transformers and bitsandbytes load, where the latter is installed."""
    given = transformers.BitsAndBytesConfig(load_in_8bit=True, **kwargs)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=given)
    assert layers8(model) == 0
    return model


# ---- loading and saving ----------------------------------------------------------------------------------------------


@scenario
def int8_on_the_fly_equals_quantize_model(folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = loaded8(folder, dtype, llm_int8_threshold=2.5)
        reference = halfbyte.quantize_model(
            LlamaForCausalLM.from_pretrained(source(folder, dtype)), config8(llm_int8_threshold=2.5)
        )
        assert layers8(model) == layers8(reference) == 14
        assert model.model.layers[0].mlp.up_proj.state.threshold == 2.5
        assert torch.equal(logits(model), logits(reference))
        assert model.lm_head.weight.dtype is dtype
        for one in (model, reference):
            assert one.is_loaded_in_8bit
            assert not getattr(one, "is_loaded_in_4bit", False)
            assert one.num_parameters() == LlamaForCausalLM(LlamaConfig(**SIZES)).num_parameters()
            assert one.get_memory_footprint() < 14 / 30 * SIZES["hidden_size"] ** 2 * 100
        dense = LlamaForCausalLM.from_pretrained(source(folder, dtype))
        assert same_tokens(logits(model), logits(dense)) >= 0.9


@scenario
def int8_with_transformers_class(folder: Path) -> None:
    given = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(source(folder), quantization_config=given)
    assert (layers8(model) == 14) == (KIND != "present"), type(model.model.layers[0].self_attn.q_proj)
    assert model.is_loaded_in_8bit
    model.save_pretrained(folder / "saved")
    again = AutoModelForCausalLM.from_pretrained(folder / "saved")
    assert (layers8(again) == 14) == (KIND != "present"), type(again.model.layers[0].self_attn.q_proj)


@scenario
def int8_save_of_a_loaded_model_is_byte_equal(folder: Path) -> None:
    for number, size in enumerate(("40KB", "5GB")):
        model = loaded8(folder, llm_int8_skip_modules=["model.layers.0.mlp.up_proj"])
        assert layers8(model) == 13
        first, second = folder / f"first{number}", folder / f"second{number}"
        model.save_pretrained(first, max_shard_size=size)
        again = AutoModelForCausalLM.from_pretrained(first, quantization_config=config8())
        assert layers8(again) == 13
        assert torch.equal(logits(again), logits(model))
        assert type(again.config.quantization_config) is halfbyte.BitsAndBytesConfig
        again.save_pretrained(second, max_shard_size=size)
        same_files(first, second)
    assert sum(path.suffix == ".safetensors" for path in (folder / "first0").iterdir()) > 1


@scenario
def int8_files_of_bitsandbytes_both_ways(folder: Path) -> None:
    if KIND != "present":
        return  # there is no other to compare with
    theirs = stock8(source(folder))
    theirs.save_pretrained(folder / "theirs")
    model = AutoModelForCausalLM.from_pretrained(folder / "theirs", quantization_config=config8())
    assert layers8(model) == 14
    ours = loaded8(folder)
    ours.save_pretrained(folder / "ours")
    # The same scales, and codes that bitsandbytes' CPU code may round the other way.
    a, b = (load_file(folder / name / "model.safetensors") for name in ("theirs", "ours"))
    assert a.keys() == b.keys()
    for name in a:
        if a[name].dtype is torch.int8:
            apart = (a[name].int() - b[name].int()).abs()
            assert apart.max() <= 1, name
            assert apart.float().mean() < 1e-3, (name, apart.float().mean())
        else:
            assert torch.equal(a[name], b[name]), name
    model.save_pretrained(folder / "again")
    same_files(folder / "theirs", folder / "again")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=0.1)
    again = AutoModelForCausalLM.from_pretrained(folder / "ours")
    assert layers8(again) == 0
    torch.testing.assert_close(logits(again), logits(ours), rtol=0, atol=0.1)


@scenario
def int8_of_many_architectures(folder: Path) -> None:
    text = {"input_ids": torch.arange(12).reshape(1, 12) % 96}
    pixels = {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)}
    for name, inputs in (
        ("GPT2LMHeadModel", text),  # Conv1D
        ("BertForMaskedLM", text),  # tied
        ("Qwen3MoeForCausalLM", text),  # experts, which stay as they are
        ("ViTForImageClassification", pixels),
        ("T5ForConditionalGeneration", {**text, "decoder_input_ids": text["input_ids"]}),
    ):
        cls = getattr(transformers, name)
        path = tiny_models.save(name, folder / name, torch.float32)
        model = cls.from_pretrained(path, quantization_config=config8()).eval()
        assert layers8(model) > 0, name
        with torch.no_grad():
            found, dense = output(model, inputs), output(cls.from_pretrained(path).eval(), inputs)
        assert float((found - dense).norm() / dense.norm()) < 0.05, name
        model.save_pretrained(folder / f"{name}-first")
        again = cls.from_pretrained(folder / f"{name}-first", quantization_config=config8()).eval()
        assert layers8(again) == layers8(model), name
        again.save_pretrained(folder / f"{name}-second")
        same_files(folder / f"{name}-first", folder / f"{name}-second")
        with torch.no_grad():
            assert torch.equal(output(again, inputs), found), name
            dequantized = output(again.dequantize(), inputs)
        assert float((dequantized - dense).norm() / dense.norm()) < 0.05, name


@scenario
def int8_with_a_new_head_and_weights_that_are_missing(folder: Path) -> None:
    loaded8(folder).save_pretrained(folder / "saved")
    for path in (source(folder), folder / "saved"):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            path, quantization_config=config8(), pad_token_id=0
        )
        assert layers8(model) == 14
        assert type(model.score) is nn.Linear
        assert model(IDS).logits.isfinite().all()
    # A checkpoint of a base model lacks the pooler, which is quantized once it has been drawn.
    path = tiny_models.save("BertForMaskedLM", folder / "bert", torch.float32)
    made = transformers.AutoModel.from_pretrained(path, quantization_config=config8())
    assert isinstance(made.pooler.dense, halfbyte.nn.Linear8bitLt)
    assert made.pooler.dense.weight.dtype is torch.int8
    assert made(IDS).pooler_output.isfinite().all()


@scenario
def int8_dequantize_and_resize(folder: Path) -> None:
    model = loaded8(folder, torch.bfloat16)
    before = logits(model)
    model.resize_token_embeddings(100)
    assert torch.equal(logits(model)[..., :96], before)
    dense = model.dequantize()
    assert layers8(dense) == 0
    assert not getattr(dense, "is_quantized", False)
    assert not hasattr(dense, "is_loaded_in_8bit")
    assert dense.model.layers[0].mlp.up_proj.weight.dtype is torch.bfloat16
    assert same_tokens(logits(dense)[..., :96], before) >= 0.9
    dense.save_pretrained(folder / "dense")
    again = AutoModelForCausalLM.from_pretrained(folder / "dense")
    assert torch.equal(logits(again), logits(dense))


@scenario
def int8_generates(folder: Path) -> None:
    model = loaded8(folder)
    tokens = [
        model.generate(IDS[:, :4], max_new_tokens=4, do_sample=False, pad_token_id=0, **kwargs)
        for kwargs in ({}, {"cache_implementation": "static"})
    ]
    assert torch.equal(*tokens)
    path = source(folder)
    tokenizer_beside(path)
    generate = transformers.pipeline(
        "text-generation", model=str(path), model_kwargs={"quantization_config": config8()}
    )
    assert layers8(generate.model) == 14
    assert generate("a b c", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("a b c")


@scenario
def int8_keeps_float_weights_when_asked(folder: Path) -> None:
    model = loaded8(folder, llm_int8_has_fp16_weight=True)
    assert layers8(model) == 14
    assert model.model.layers[0].mlp.up_proj.weight.dtype is torch.float32
    torch.testing.assert_close(logits(model), logits(loaded8(folder)), rtol=0, atol=1e-5)
    model.save_pretrained(folder / "floats")
    again = AutoModelForCausalLM.from_pretrained(folder / "floats", quantization_config=config8())
    assert layers8(again) == 14
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(again.dequantize()), logits(LlamaForCausalLM.from_pretrained(source(folder))))


@scenario
def int8_embeddings_stay_close_to_16_bits(folder: Path) -> None:
    """A sentence encoder with outliers in its activations, as trained ones have them."""
    path = tiny_models.save("BertModel", folder / "bert", torch.float32)
    cls = transformers.BertModel

    def embed(model: Any) -> Tensor:
        with torch.no_grad():
            for layer in model.encoder.layer:
                layer.attention.output.LayerNorm.weight[3] = 30.0
            rows = model.eval()(torch.arange(96).reshape(8, 12)).last_hidden_state.mean(1)
        return torch.nn.functional.normalize(rows.float())

    want = embed(cls.from_pretrained(path, dtype=torch.bfloat16))
    found = {
        threshold: embed(
            cls.from_pretrained(path, dtype=torch.bfloat16, quantization_config=config8(llm_int8_threshold=threshold))
        )
        for threshold in (6.0, 0.0)
    }
    cosines = {threshold: (rows * want).sum(-1).min().item() for threshold, rows in found.items()}
    assert cosines[6.0] >= 0.9995, cosines
    assert cosines[0.0] < cosines[6.0], cosines


# ---- where layers go -------------------------------------------------------------------------------------------------

PLACES = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")


@scenario
def int8_disk_offload_stays_8bit(folder: Path) -> None:
    loaded8(folder).save_pretrained(folder / "packed")
    where = {**dict.fromkeys(PLACES, "cpu"), "model.layers.1": "disk"}
    for path in (source(folder), folder / "packed"):
        whole = AutoModelForCausalLM.from_pretrained(path, quantization_config=config8())
        model = AutoModelForCausalLM.from_pretrained(
            path, quantization_config=config8(), device_map=where, offload_folder=folder / f"offload-{path.name}"
        )
        assert model.model.layers[1].self_attn.q_proj.weight.is_meta
        with mock.patch.object(
            halfbyte.nn.int8_params, "quantize_weight", side_effect=AssertionError("quantized again")
        ):
            for _ in range(2):
                assert torch.equal(logits(model), logits(whole))
        model.save_pretrained(folder / f"saved-{path.name}")
        again = AutoModelForCausalLM.from_pretrained(folder / f"saved-{path.name}", quantization_config=config8())
        assert layers8(again) == 14
        assert torch.equal(logits(again), logits(whole))


@scenario
def int8_offloaded_layers_stay_dense_when_asked(folder: Path) -> None:
    from halfbyte.integrations.transformers.quantizer import Quantizer8bit

    def packed(where: dict[str, Any], **kwargs: Any) -> set[str]:
        """The layers that are packed when a model goes to these places, which need not be there."""
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**SIZES))
        quantizer = Quantizer8bit(config8(**kwargs), pre_quantized=False)
        quantizer.validate_environment(device_map=where)
        quantizer.preprocess_model(model, device_map=where, dtype=torch.float16)
        return {name for name, m in model.named_modules() if isinstance(m, halfbyte.nn.Linear8bitLt)}

    mixed = {**dict.fromkeys(PLACES, 0), "model.layers.1": "cpu"}
    allow = {"llm_int8_enable_fp32_cpu_offload": True}
    assert len(packed(mixed)) == 14
    assert {name.partition(".self")[0].partition(".mlp")[0] for name in packed(mixed, **allow)} == {"model.layers.0"}
    assert len(packed({**mixed, "model.layers.0": "disk"}, **allow)) == 0
    assert len(packed({**mixed, "model.layers.1": torch.device("cpu")}, **allow)) == 7
    # All of it on the CPU is no offloading.
    assert len(packed({"": "cpu"}, **allow)) == 14
    # And loaded, as far as that goes without a GPU.
    where = {**dict.fromkeys(PLACES, "cpu"), "model.layers.0": "cpu", "model.layers.1": "disk"}
    model = loaded8(folder, how={"device_map": where, "offload_folder": folder / "offload"}, **allow)
    assert layers8(model) == 0
    dense = LlamaForCausalLM.from_pretrained(source(folder))
    assert torch.equal(logits(model), logits(dense))
    # What is packed in a checkpoint stays so.
    loaded8(folder).save_pretrained(folder / "packed")
    model = AutoModelForCausalLM.from_pretrained(
        folder / "packed",
        quantization_config=config8(**allow),
        device_map=where,
        offload_folder=folder / "offload2",
    )
    assert layers8(model) == 14


@scenario
def int8_hooks_offload_packed_weights(folder: Path) -> None:
    base, cpu = logits(loaded8(folder)), torch.device("cpu")
    for model in (
        accelerate.cpu_offload(loaded8(folder), execution_device=cpu),
        accelerate.disk_offload(loaded8(folder), str(folder / "all"), execution_device=cpu),
    ):
        weight = model.model.layers[1].mlp.up_proj.weight
        assert weight.is_meta
        assert weight.dtype is torch.int8
        with mock.patch.object(
            halfbyte.nn.int8_params, "quantize_weight", side_effect=AssertionError("quantized again")
        ):
            for _ in range(2):
                assert torch.equal(logits(model), base)
        accelerate.hooks.remove_hook_from_submodules(model)
    sizes = accelerate.utils.compute_module_sizes(loaded8(folder))
    assert sizes[WEIGHT] == 128 * 64


@scenario
def int8_accelerate_quantizes(folder: Path) -> None:
    if KIND == "present":
        return  # that is bitsandbytes' own
    halfbyte.enable()
    try:
        from accelerate.utils import BnbQuantizationConfig, load_and_quantize_model

        how = BnbQuantizationConfig(load_in_8bit=True, llm_int8_threshold=6.0, torch_dtype=torch.float32)
        model = LlamaForCausalLM.from_pretrained(source(folder))
        # It looks for a GPU, and moves the model there.
        with (
            mock.patch.object(torch.cuda, "is_available", return_value=True),
            mock.patch.object(torch.cuda, "current_device", return_value="cpu"),
        ):
            made = load_and_quantize_model(model, bnb_quantization_config=how)
    finally:
        halfbyte.enable(False)
    assert layers8(made) == 14
    assert made.is_loaded_in_8bit
    assert torch.equal(logits(made), logits(loaded8(folder)))


# ---- what cannot be loaded -------------------------------------------------------------------------------------------


def message(call: Callable[[], object], *kinds: type[BaseException]) -> str:
    """What `call` raises, which is one of `kinds`."""
    try:
        call()
    except kinds as error:
        return str(error)
    raise AssertionError("no error")


def edited(path: Path, to: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a checkpoint whose tensors were edited."""
    shutil.copytree(path, to)
    tensors = load_file(to / "model.safetensors")
    edit(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def configured(path: Path, to: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a checkpoint whose quantization_config was edited."""
    shutil.copytree(path, to)
    values = json.loads((to / "config.json").read_text(encoding="utf-8"))
    edit(values["quantization_config"])
    (to / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return to


@scenario
def int8_error_wrong_config(folder: Path) -> None:
    text = message(lambda: halfbyte.BitsAndBytesConfig(load_in_4bit=True, load_in_8bit=True), ValueError)
    assert "load_in_4bit and load_in_8bit are both True" in text, text
    for threshold in (-1.0, float("nan")):
        text = message(lambda threshold=threshold: loaded8(folder, llm_int8_threshold=threshold), ValueError)
        assert text.startswith("llm_int8_threshold must be a number of at least 0.0"), text
        assert text.endswith(f"got {threshold}"), text
    loaded8(folder).save_pretrained(folder / "packed")
    path = configured(folder / "packed", folder / "below", lambda values: values.update(llm_int8_threshold=-2.0))
    text = message(lambda: AutoModelForCausalLM.from_pretrained(path, quantization_config=config8()), ValueError)
    assert "config.json of the checkpoint: quantization_config: llm_int8_threshold" in text, text
    path = configured(folder / "packed", folder / "f", lambda values: values.update(llm_int8_has_fp16_weight=True))
    text = message(lambda: AutoModelForCausalLM.from_pretrained(path, quantization_config=config8()), ValueError)
    assert "is quantized to 8 bits" in text, text
    assert "llm_int8_has_fp16_weight" in text, text
    assert str(path / "model.safetensors") in text, text


@scenario
def int8_error_incomplete_checkpoints(folder: Path) -> None:
    loaded8(folder).save_pretrained(folder / "packed")
    scales, layout = WEIGHT.replace("weight", "SCB"), WEIGHT.replace("weight", "weight_format")

    def empty() -> Any:
        with torch.device("meta"):
            return LlamaForCausalLM(AutoConfig.from_pretrained(folder / "packed"))

    for number, (edit, *words) in enumerate(
        (
            (lambda t: t.pop(scales), scales),
            (lambda t: (t.pop(scales), t.pop(layout)), scales, WEIGHT),
            (lambda t: t.pop(WEIGHT), WEIGHT),
            (lambda t: t.update({scales: t[scales][:-1].clone()}), WEIGHT, "shape [128], got [127]"),
            (lambda t: t.update({scales: t[scales].int()}), WEIGHT, "SCB must be torch.float32, got torch.int32"),
            (lambda t: t.update({layout: t[layout] + 2}), WEIGHT, "weight_format must be 0 (rows), got 2"),
            (lambda t: t.update({WEIGHT: t[WEIGHT].float()}), WEIGHT, "must be torch.int8"),
            (lambda t: t.update({WEIGHT: t[WEIGHT][:, 1:].clone()}), WEIGHT, "[128, 63]", "[128, 64]"),
            (lambda t: t.update({f"{WEIGHT}.absmax": t[scales].clone()}), "4 bits and of 8 bits"),
        )
    ):
        path = edited(folder / "packed", folder / str(number), edit)
        for load in (
            lambda path=path: AutoModelForCausalLM.from_pretrained(path, quantization_config=config8()),
            lambda path=path: halfbyte.load_quantized(empty(), path),
        ):
            text = message(load, halfbyte.CheckpointError)
            assert str(path) in text, text
            for word in words:
                assert word in text, (word, text)


@scenario
def int8_error_checkpoint_that_is_quantized_already(folder: Path) -> None:
    """A checkpoint's own config goes before the argument, and without one nothing is quantized twice."""
    AutoModelForCausalLM.from_pretrained(source(folder), quantization_config=config()).save_pretrained(folder / "four")
    loaded8(folder).save_pretrained(folder / "eight")
    for path, given, count in (
        (folder / "four", config8(), (14, 0)),
        (folder / "eight", config(), (0, 14)),
    ):
        with said() as lines:
            model = AutoModelForCausalLM.from_pretrained(path, quantization_config=given)
        assert (layers(model), layers8(model)) == count
        told = [line for line in lines if "is used" in line]
        assert len(told) == 1, lines
        assert "load_in_8bit is" in told[0] or "load_in_4bit is" in told[0], told
    for name, bits in (("four", 4), ("eight", 8)):
        shutil.copytree(folder / name, folder / f"{name}-bare")
        file = folder / f"{name}-bare" / "config.json"
        values = json.loads(file.read_text(encoding="utf-8"))
        del values["quantization_config"]
        file.write_text(json.dumps(values), encoding="utf-8")
        for given in (config(), config8()):
            text = message(
                lambda name=name, given=given: AutoModelForCausalLM.from_pretrained(
                    folder / f"{name}-bare", quantization_config=given
                ),
                halfbyte.CheckpointError,
            )
            assert f"packed to {bits} bits already" in text, text
            assert f"load_in_{bits}bit" in text, text


@scenario
def int8_error_weights_that_are_not_finite(folder: Path) -> None:
    for number, value in enumerate((float("nan"), float("inf"), 1e5)):

        def spoil(tensors: dict[str, Any], value: float = value) -> None:
            tensors[WEIGHT][3, 5] = value

        path = edited(source(folder), folder / str(number), spoil)
        text = message(
            lambda path=path: AutoModelForCausalLM.from_pretrained(path, quantization_config=config8()), ValueError
        )
        assert text.startswith(f"{WEIGHT}: contains "), text
        assert "at [3, 5]" in text, text
        model = LlamaForCausalLM.from_pretrained(path)
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: contains .* at \[3, 5\]"):
            halfbyte.quantize_model(model, config8())
        assert layers8(model) == 0


@scenario
def int8_and_4bit_in_one_checkpoint(folder: Path) -> None:
    """The names of a layer's tensors say what it is, whatever the config says of what has none."""
    AutoModelForCausalLM.from_pretrained(source(folder), quantization_config=config()).save_pretrained(folder / "four")
    loaded8(folder).save_pretrained(folder / "eight")
    eight = load_file(folder / "eight" / "model.safetensors")

    def mix(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if ".mlp." in name]:
            del tensors[name]
        tensors.update({name: tensor for name, tensor in eight.items() if ".mlp." in name})

    path = edited(folder / "four", folder / "mixed", mix)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config())
    assert (layers(model), layers8(model)) == (8, 6)
    assert model.is_loaded_in_4bit
    assert model.is_loaded_in_8bit
    with torch.device("meta"):
        empty = LlamaForCausalLM(AutoConfig.from_pretrained(path))
    again = halfbyte.load_quantized(empty, path)
    assert (layers(again), layers8(again)) == (8, 6)
    assert torch.equal(logits(again), logits(model))
    for number, one in enumerate((model, again)):
        one.save_pretrained(folder / f"saved{number}")
        for name, tensor in load_file(folder / f"saved{number}" / "model.safetensors").items():
            assert torch.equal(tensor, load_file(path / "model.safetensors")[name]), name
    dense = again.dequantize()
    assert (layers(dense), layers8(dense)) == (0, 0)
    assert same_tokens(logits(dense), logits(model)) >= 0.9
