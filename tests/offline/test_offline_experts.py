"""Mixture-of-Experts checkpoints in the offline tool: what it writes is what the loader makes of the same files."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from thorough import thorough

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.8")

import halfbyte  # noqa: E402
import tiny_models  # noqa: E402
from halfbyte.models.transformers_experts import mapping_for, take_apart  # noqa: E402
from halfbyte.nn import Experts4bit  # noqa: E402
from halfbyte.offline.transformers_names import renamed  # noqa: E402
from halfbyte.offline.transformers_selection import converted_modules, skeleton  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

NF4 = halfbyte.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
X = torch.arange(18).reshape(2, 9) % 90 + 3
DEEPSEEK: dict[str, Any] = {"n_group": 2, "topk_group": 1, "num_key_value_heads": 4}
DEEPSEEK_3 = {**DEEPSEEK, "first_k_dense_replace": 1}
#: Fields of the configuration, and the projections of an expert in the output.
ARCHITECTURES: dict[str, tuple[dict[str, Any], tuple[str, str, str]]] = {
    "MixtralForCausalLM": ({}, ("w1", "w3", "w2")),
    "Qwen3MoeForCausalLM": ({}, ("gate_proj", "up_proj", "down_proj")),
    "DeepseekV3ForCausalLM": (DEEPSEEK_3, ("gate_proj", "up_proj", "down_proj")),
    "OlmoeForCausalLM": ({}, ("gate_proj", "up_proj", "down_proj")),
    "GraniteMoeForCausalLM": ({}, ("gate_proj", "up_proj", "down_proj")),
    "GptOssForCausalLM": ({}, ("gate_proj", "up_proj", "down_proj")),
}


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()
    transformers.logging.set_verbosity_warning()


def dense_model(name: str, **fields: Any) -> Any:
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    config = tiny_models.configure(cls.config_class, {**fields, "architectures": [name]})
    model = cls(config).to(torch.bfloat16).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.05)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(X).logits  # type: ignore[no-any-return]


def files(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_experts_are_those_of_a_load(name: str, tmp_path: Path) -> None:
    fields, projections = ARCHITECTURES[name]
    dense = dense_model(name, **fields)
    dense.save_pretrained(tmp_path / "dense")
    cls = type(dense)
    report = halfbyte.quantize_checkpoint(tmp_path / "dense", tmp_path / "packed", NF4)
    expected = cls.from_pretrained(tmp_path / "dense", quantization_config=NF4)
    loaded = cls.from_pretrained(tmp_path / "packed", quantization_config=NF4)
    experts = [module for module in loaded.modules() if isinstance(module, Experts4bit)]
    assert len(experts) == sum(isinstance(module, Experts4bit) for module in expected.modules()) > 0
    assert {module.projections for module in experts} == {projections}
    assert torch.equal(logits(loaded), logits(expected))
    packed = files(tmp_path / "packed")
    assert sum(key.endswith(".absmax") for key in packed) == report.converted_tensors
    assert sum(".experts." in key and key.endswith(".absmax") for key in packed) == len(experts) * 4 * 3
    expected.save_pretrained(tmp_path / "saved")
    assert_same(packed, files(tmp_path / "saved"))
    assert halfbyte.verify_checkpoint(tmp_path / "dense", tmp_path / "packed").ok

    halfbyte.dequantize_checkpoint(tmp_path / "packed", tmp_path / "back")
    back, original = files(tmp_path / "back"), files(tmp_path / "dense")
    assert {key: value.shape for key, value in back.items()} == {key: v.shape for key, v in original.items()}
    whole = cls.from_pretrained(tmp_path / "back")
    assert not any(isinstance(module, Experts4bit) for module in whole.modules())
    state = cls.from_pretrained(tmp_path / "packed", quantization_config=NF4).dequantize().state_dict()
    assert_same(whole.state_dict(), {key: value.to(torch.bfloat16) for key, value in state.items()})


def test_experts_in_mxfp4_are_those_of_the_decoded_ones(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    dense = dense_model("GptOssForCausalLM")
    dense.save_pretrained(tmp_path / "dense")
    (file,) = (tmp_path / "dense").glob("*.safetensors")
    tensors = load_file(file)
    source: dict[str, torch.Tensor] = {}
    for key, value in list(tensors.items()):
        if not re.search(r"experts\.(gate_up|down)_proj$", key):
            source[key] = value
            continue
        experts, columns, rows = value.shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 124, (experts, rows, columns // 32), dtype=torch.uint8)
        source[f"{key}_blocks"], source[f"{key}_scales"] = blocks, scales
        # In the order [experts, in, out].
        tensors[key] = convert_moe_packed_tensors(blocks, scales).contiguous()
        assert tensors[key].shape == value.shape
    save_file(tensors, file, {"format": "pt"})
    mx = tmp_path / "mx"
    mx.mkdir()
    config = json.loads((tmp_path / "dense/config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (mx / "config.json").write_text(json.dumps(config))
    save_file(source, mx / "model.safetensors", {"format": "pt"})

    halfbyte.quantize_checkpoint(mx, tmp_path / "packed", NF4)
    halfbyte.quantize_checkpoint(tmp_path / "dense", tmp_path / "expected", NF4)
    assert_same(files(tmp_path / "packed"), files(tmp_path / "expected"))
    assert halfbyte.verify_checkpoint(mx, tmp_path / "packed").ok
    cls = type(dense)
    on_the_fly = cls.from_pretrained(tmp_path / "dense", quantization_config=NF4)
    assert torch.equal(logits(cls.from_pretrained(tmp_path / "packed", quantization_config=NF4)), logits(on_the_fly))


@pytest.mark.parametrize("rules", [(), (r"layers\.0\..*experts=keep",), (r"experts\.2\..*down_proj=keep",)])
def test_experts_of_llama_4_are_packed_one_by_one(rules: tuple[str, ...], tmp_path: Path) -> None:
    """As bitsandbytes' loader in transformers reads them too, which has a class for those of a quantized checkpoint."""
    dense = dense_model("Llama4ForCausalLM")
    dense.save_pretrained(tmp_path / "dense")
    cls = type(dense)
    halfbyte.quantize_checkpoint(tmp_path / "dense", tmp_path / "packed", NF4, rules=rules)
    loaded = cls.from_pretrained(tmp_path / "packed", quantization_config=NF4)
    packed = files(tmp_path / "packed")
    assert any(".experts." in key and key.endswith(".absmax") for key in packed)
    assert halfbyte.verify_checkpoint(tmp_path / "dense", tmp_path / "packed").ok
    # The dense model with the same matrices, put together as they were.
    halfbyte.dequantize_checkpoint(tmp_path / "packed", tmp_path / "back")
    back = files(tmp_path / "back")
    if not rules:
        assert {key: v.shape for key, v in back.items()} == {k: v.shape for k, v in files(tmp_path / "dense").items()}
        torch.testing.assert_close(logits(loaded), logits(cls.from_pretrained(tmp_path / "back")), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", thorough(["MixtralForCausalLM", "GptOssForCausalLM"], quick=["GptOssForCausalLM"]))
@pytest.mark.parametrize("rule", [r"experts\.1\.=keep", r"layers\.0\..*experts=keep", r"\.(w2|down_proj)\.=keep"])
def test_experts_follow_rules_and_load(name: str, rule: str, tmp_path: Path) -> None:
    dense = dense_model(name)
    dense.save_pretrained(tmp_path / "dense")
    plain = halfbyte.quantize_checkpoint(tmp_path / "dense", tmp_path / "all", NF4)
    report = halfbyte.quantize_checkpoint(tmp_path / "dense", tmp_path / "some", NF4, rules=[rule])
    assert 0 < report.converted_tensors < plain.converted_tensors
    cls = type(dense)
    loaded = cls.from_pretrained(tmp_path / "some", quantization_config=NF4)
    # The dense model with those matrices rounded that were packed.
    halfbyte.dequantize_checkpoint(tmp_path / "some", tmp_path / "back", dtype="float32")
    state = files(tmp_path / "some")
    packed = {key.removesuffix(".absmax") for key in state if key.endswith(".absmax")}
    assert not any(re.search(rule.removesuffix("=keep"), key) for key in packed)
    reference = cls.from_pretrained(tmp_path / "all", quantization_config=NF4).dequantize()
    difference = logits(loaded).float() - logits(dense).float()
    assert difference.norm() < (logits(reference).float() - logits(dense).float()).norm() * 1.5
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert torch.equal(logits(cls.from_pretrained(again, quantization_config=NF4)), logits(loaded))


def test_experts_in_8_bits(tmp_path: Path) -> None:
    for name in ("Qwen3MoeForCausalLM", "GptOssForCausalLM"):
        dense = dense_model(name)
        folder = tmp_path / name
        dense.save_pretrained(folder / "dense")
        config = halfbyte.BitsAndBytesConfig(load_in_8bit=True)
        halfbyte.quantize_checkpoint(folder / "dense", folder / "packed", config)
        cls = type(dense)
        expected = cls.from_pretrained(folder / "dense", quantization_config=config)
        assert torch.equal(logits(cls.from_pretrained(folder / "packed", quantization_config=config)), logits(expected))
        halfbyte.dequantize_checkpoint(folder / "packed", folder / "back")
        assert files(folder / "back").keys() == files(folder / "dense").keys()


# ---- which experts ---------------------------------------------------------------------------------------------------

#: Classes whose experts are taken, with fields that a tiny configuration of them needs.
TAKEN: dict[str, dict[str, Any]] = {
    "AfmoeForCausalLM": {},
    "AriaTextForCausalLM": {},
    "AXK1ForCausalLM": {},
    "Cohere2MoeForCausalLM": {},
    "DeepseekV2ForCausalLM": DEEPSEEK,
    "DeepseekV3ForCausalLM": DEEPSEEK_3,
    "DeepseekV4ForCausalLM": {},
    "Ernie4_5_MoeForCausalLM": {},
    "ExaoneMoeForCausalLM": {},
    "FlexOlmoForCausalLM": {},
    "Glm4MoeForCausalLM": {},
    "Glm4MoeLiteForCausalLM": {},
    "Glm4vMoeForConditionalGeneration": {},
    "GptOssForCausalLM": {},
    "GraniteMoeForCausalLM": {},
    "GraniteMoeHybridForCausalLM": {},
    "GraniteMoeSharedForCausalLM": {},
    "HunYuanMoEV1ForCausalLM": {},
    "HYV3ForCausalLM": {},
    "JambaForCausalLM": {},
    "KimiLinearForCausalLM": {},
    "MiniMaxForCausalLM": {},
    "MiniMaxM2ForCausalLM": {},
    "MiniMaxM3SparseForConditionalGeneration": {},
    "Mistral4ForCausalLM": {},
    "MixtralForCausalLM": {},
    "NemotronHForCausalLM": {},
    "OlmoeForCausalLM": {},
    "OpenAIPrivacyFilterForTokenClassification": {},
    "PhimoeForCausalLM": {},
    "Qwen2MoeForCausalLM": {},
    "Qwen3MoeForCausalLM": {},
    "Qwen3NextForCausalLM": {},
    "Qwen3VLMoeForConditionalGeneration": {},
    "Qwen3_5MoeForCausalLM": {},
    "Qwen3_5MoeForConditionalGeneration": {},
    "Qwen4ExpForCausalLM": {},
    "SolarOpenForCausalLM": {},
    "ZayaForCausalLM": {},
}
#: Classes whose router is a plain `nn.Linear`, which transformers converts as any other.
LINEAR_ROUTERS = {"AfmoeForCausalLM", "HunYuanMoEV1ForCausalLM"}
#: Classes whose experts stay.
LEFT: dict[str, dict[str, Any]] = {
    "Ernie4_5_VLMoeForConditionalGeneration": {},
    "InklingForConditionalGeneration": {},
}


def empty_model(name: str, fields: dict[str, Any]) -> Any:
    """A model on the meta device; skips where the installed transformers has no such class."""
    cls = getattr(transformers, name, None)
    if cls is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    makers: list[Callable[[], Any]] = [
        lambda: tiny_models.configure(cls.config_class, {**fields, "num_hidden_layers": 2}),
        lambda: tiny_models.configure(cls.config_class, fields),
        lambda: cls.config_class(),
    ]
    problems = []
    for make in makers:
        try:
            config = make()
            config.architectures = [name]
            model = skeleton(cls, config)
        except Exception as error:
            problems.append(error)
            continue
        if any(re.search(r"experts\.|_linear", key) for key in model.state_dict()):
            return model
    pytest.fail(f"no configuration makes a {name} with experts: {problems}")


def write_holes(folder: Path, config: str, tensors: dict[str, tuple[int, ...]]) -> Path:
    """A checkpoint of bfloat16 tensors of these shapes, in a file of holes."""
    folder.mkdir(parents=True)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        size = 2 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(config)
    return folder


def checkpoint_of(model: Any, fused: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's checkpoint: as transformers writes it, or with all experts fused."""
    from transformers.core_model_loading import revert_weight_conversion

    tied = model.all_tied_weights_keys
    state = {key: value for key, value in model.state_dict().items() if key not in tied}
    state = {key: value for key, value in state.items() if value.is_floating_point() and value.numel()}
    return {
        key: tuple(value.shape) for key, value in (state if fused else revert_weight_conversion(model, state)).items()
    }


def assert_loader_takes(model: Any, plan: Any) -> int:
    """What the plan quantizes is, one to one, what the loader packs; gives how many of it are matrices of experts."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    apart = take_apart(model, ())
    packed = converted_modules(model)
    mapping = mapping_for(model, get_model_conversion_mapping(model))
    quantized = {tensor.name for tensor in plan.tensors if tensor.target == "nf4"}
    targets: dict[str, str] = {}
    merged = set()
    for key, target, pattern, _ in renamed(model, [tensor.name for tensor in plan.tensors], mapping):
        if key in quantized:
            assert pattern is None, f"{key} is merged"
            assert target is not None, f"{key} is not read"
            assert target not in targets.values(), f"{key} and another become {target}"
            targets[key] = target
        elif target is not None and pattern is not None:
            # Linear layers that transformers makes of several tensors.
            merged.add(target)
        elif target is not None:
            assert target.removesuffix(".weight") not in packed, f"{key} is kept"
    assert set(targets.values()) == {f"{path}.weight" for path in packed} - merged
    assert merged or plan.skip_modules is None
    return sum(any(target.startswith(f"{path}.") for path in apart) for target in targets.values())


@pytest.mark.parametrize("fused", [False, True], ids=["as saved", "fused"])
@pytest.mark.parametrize("name", TAKEN)
def test_experts_are_selected_as_the_loader_takes_them(name: str, fused: bool, tmp_path: Path) -> None:
    model = empty_model(name, TAKEN[name])
    tensors = checkpoint_of(model, fused)
    plan = halfbyte.plan_checkpoint(write_holes(tmp_path / "in", model.config.to_json_string(), tensors), NF4)
    assert assert_loader_takes(model, plan) > 0
    if name not in LINEAR_ROUTERS:
        routers = [t for t in plan.tensors if re.search(r"(gate|router|layer)\.weight$", t.name) and t.shape[0] == 4]
        assert {t.target for t in routers} <= {"keep"}


@pytest.mark.parametrize("name", thorough(LEFT, quick=list(LEFT)[:1]))
def test_experts_that_no_loader_reads_are_not_selected(name: str, tmp_path: Path) -> None:
    model = empty_model(name, LEFT[name])
    tensors = checkpoint_of(model, fused=False)
    plan = halfbyte.plan_checkpoint(write_holes(tmp_path / "in", model.config.to_json_string(), tensors), NF4)
    experts = [t for t in plan.tensors if re.search(r"\.experts\.", t.name) and len(t.shape) >= 2]
    assert experts
    assert {t.target for t in experts} == {"keep"}
    assert any("stay in 16 bits" in note for note in plan.notes)


def test_experts_are_counted_in_one_line(tmp_path: Path) -> None:
    """128 experts in each of 48 layers are three lines of a plan, not 18,432."""
    tensors: dict[str, tuple[int, ...]] = {}
    for layer in range(48):
        for expert in range(128):
            for projection, shape in (("gate", (64, 128)), ("up", (64, 128)), ("down", (128, 64))):
                tensors[f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"] = shape
    config = json.dumps({"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 128})
    table = halfbyte.plan_checkpoint(write_holes(tmp_path / "in", config, tensors), NF4).table(160)
    lines = [line for line in table.splitlines() if "_proj" in line]
    assert len(lines) == 3
    assert all("model.layers.{0-47}.mlp.experts.{0-127}." in line and "6,144" in line for line in lines)


# ---- what is wrong with them -----------------------------------------------------------------------------------------


def test_experts_that_are_not_all_there_are_refused(tmp_path: Path) -> None:
    shapes = {"w1": (32, 64), "w2": (64, 32), "w3": (32, 64)}
    whole = {
        f"model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight": shape
        for expert in range(4)
        for name, shape in shapes.items()
    }
    start = "model.layers.0.block_sparse_moe.experts"
    for number, (lost, count, named) in enumerate(
        [
            (f"{start}.2.w3.weight", 4, f"{start}.2.w3.weight"),
            (f"{start}.3", 4, f"{start}.3.w3.weight"),
            (".w2.", 4, f"{start}.0.w2.weight"),
            ("nothing", 8, f"{start}.4.w3.weight"),
            ("nothing", 2, f"{start}.2.w3.weight"),
        ]
    ):
        config = json.dumps({"model_type": "mixtral", "num_local_experts": count})
        tensors = {key: shape for key, shape in whole.items() if lost not in key}
        folder = write_holes(tmp_path / str(number), config, tensors)
        with pytest.raises(halfbyte.CheckpointError, match=re.escape(named)):
            halfbyte.quantize_checkpoint(folder, tmp_path / "out", NF4)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "GraniteMoeForCausalLM", "GptOssForCausalLM"])
@pytest.mark.parametrize("what", ["int64", "bool", "int8", "float8_e4m3fn", "one dimension"])
def test_experts_of_another_dtype_or_rank_are_named_and_not_called_missing(
    name: str, what: str, tmp_path: Path
) -> None:
    dense_model(name).save_pretrained(tmp_path / "in")
    (file,) = (tmp_path / "in").glob("*.safetensors")
    tensors = load_file(file)
    found = [key for key, value in tensors.items() if re.search(r"experts\.|put_linear", key) and value.dim() > 1]
    odd = next(key for key in found if "layers.1" in key and "bias" not in key)
    value = tensors[odd]
    tensors[odd] = value.reshape(-1) if what == "one dimension" else value.to(getattr(torch, what))
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(halfbyte.CheckpointError, match=rf'"{re.escape(odd)}": is .*: expected F16, BF16 or F32'):
        halfbyte.quantize_checkpoint(tmp_path / "in", tmp_path / "out", NF4)
    assert not (tmp_path / "out").exists()


def test_experts_of_several_dtypes_are_taken_as_a_load_takes_them(tmp_path: Path) -> None:
    dense = dense_model("OlmoeForCausalLM")
    dense.save_pretrained(tmp_path / "dense")
    (file,) = (tmp_path / "dense").glob("*.safetensors")
    tensors = load_file(file)
    for key in tensors:
        if ".experts.1." in key:
            tensors[key] = tensors[key].float() * 1.0001
        if ".experts.2." in key:
            tensors[key] = tensors[key].half()
    save_file(tensors, file, {"format": "pt"})
    halfbyte.quantize_checkpoint(tmp_path / "dense", tmp_path / "packed", NF4)
    cls = type(dense)
    expected = cls.from_pretrained(tmp_path / "dense", quantization_config=NF4)
    assert torch.equal(logits(cls.from_pretrained(tmp_path / "packed", quantization_config=NF4)), logits(expected))


def test_experts_whose_matrices_are_no_whole_number_of_blocks(tmp_path: Path) -> None:
    for name in ("Qwen3MoeForCausalLM", "GptOssForCausalLM"):
        size = "intermediate_size" if name == "GptOssForCausalLM" else "moe_intermediate_size"
        dense = dense_model(name, **{size: 37, "hidden_size": 36, "head_dim": 12, "num_attention_heads": 3,
                                     "num_key_value_heads": 1})  # fmt: skip
        folder = tmp_path / name
        dense.save_pretrained(folder / "dense")
        halfbyte.quantize_checkpoint(folder / "dense", folder / "packed", NF4)
        cls = type(dense)
        expected = cls.from_pretrained(folder / "dense", quantization_config=NF4)
        assert torch.equal(logits(cls.from_pretrained(folder / "packed", quantization_config=NF4)), logits(expected))


def test_a_packed_router_is_dequantized_and_refused(tmp_path: Path) -> None:
    """Old 4-bit checkpoints of other tools have the router packed too."""
    dense = dense_model("MixtralForCausalLM")
    dense.save_pretrained(tmp_path / "dense")
    halfbyte.quantize_checkpoint(tmp_path / "dense", tmp_path / "packed", NF4)
    (file,) = (tmp_path / "packed").glob("*.safetensors")
    tensors = load_file(file)
    router = "model.layers.0.block_sparse_moe.gate.weight"
    packed, state = halfbyte.functional.quantize_4bit(tensors[router], quant_type="nf4", compress_statistics=True)
    expected = halfbyte.functional.dequantize_4bit(packed, state)
    tensors[router] = packed
    tensors.update({f"{router}.{key}": value for key, value in state.as_dict(packed=True).items()})
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(halfbyte.CheckpointError, match="quantized already"):
        halfbyte.quantize_checkpoint(tmp_path / "packed", tmp_path / "twice", NF4)
    halfbyte.dequantize_checkpoint(tmp_path / "packed", tmp_path / "back")
    assert torch.equal(files(tmp_path / "back")[router], expected)
    assert type(dense).from_pretrained(tmp_path / "back").dtype is torch.bfloat16
