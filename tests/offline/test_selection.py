"""Which tensors are quantized: our rules against transformers' own classes.

The truth comes from the installed transformers: it builds the model without weights and applies its own lists and
renames (:mod:`halfbyte.offline.transformers_selection`). A few models are really loaded in 4 bits and saved, which ties
that truth to what a user sees.
"""

from __future__ import annotations

import gc
import json
import os
import random
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tiny_models  # noqa: E402  (needs torch)
from halfbyte import _native  # noqa: E402
from halfbyte.models.experts import put_back  # noqa: E402
from halfbyte.models.transformers_experts import mapping_for, take_apart  # noqa: E402
from halfbyte.offline.options import QuantizeOptions  # noqa: E402
from halfbyte.offline.transformers_names import renamed  # noqa: E402
from halfbyte.offline.transformers_selection import (  # noqa: E402
    converted_modules,
    converted_tensors,
    skeleton,
    transformers_selection,
)
from safetensors import safe_open  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Any:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()
    transformers.logging.set_verbosity_warning()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of the tiny model of a class, saved once."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            folders[name] = tiny_models.save(name, tmp_path_factory.mktemp(name))
        return folders[name]

    return get


def header(folder: Path) -> list[tuple[str, list[int], str]]:
    """Name, shape and dtype of every tensor in a folder."""
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                piece = file.get_slice(name)
                found.append((name, piece.get_shape(), piece.get_dtype()))
    return found


def select(config: str | None, tensors: list[tuple[str, list[int], str]], **options: Any) -> dict[str, Any]:
    """Our decisions, with ``selected``: the names of the tensors to quantize."""
    picked = options.pop("selected", None)
    if picked is not None:
        options["selection"] = "transformers"
    answer: dict[str, Any] = {**_native.select(config, tensors, QuantizeOptions(**options).to_dict(), picked)}
    pairs = list(zip(tensors, answer["decisions"], strict=True))
    answer["selected"] = sorted(name for (name, *_), decision in pairs if decision["quant_type"])
    answer["transposed"] = sorted(name for (name, *_), decision in pairs if decision["transpose"])
    answer["reasons"] = {name: decision["reason"] for (name, *_), decision in pairs}
    return answer


def with_experts(model: Any, names: list[str]) -> Any:
    """The model with the experts apart of which the checkpoint has single matrices: the loader packs them too."""
    before = take_apart(model, ())
    targets = {target or "" for _, target, pattern, _ in renamed(model, names, mapping_of(model)) if pattern is None}
    put_back(
        model,
        {
            path: module
            for path, module in before.items()
            if not any(target.startswith(f"{path}.0.") for target in targets)
        },
    )
    return model


def mapping_of(model: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return mapping_for(model, get_model_conversion_mapping(model))


def loaded_packed(model: Any, names: list[str]) -> list[str]:
    """The tensors that transformers would convert while loading into the model, and the matrices of experts."""
    model = with_experts(model, names)
    modules = converted_modules(model)
    return sorted(
        name
        for name, target, pattern, _ in renamed(model, names, mapping_of(model))
        if pattern is None and target is not None and target.removesuffix(".weight") in modules
    )


def model_of(folder: Path, name: str) -> Any:
    return skeleton(getattr(transformers, name), transformers.AutoConfig.from_pretrained(folder))


def chosen(names: list[str]) -> dict[str, Any]:
    """What transformers would answer."""
    return {"tensors": names, "conv1d": None}


def select_in(folder: Path, **options: Any) -> dict[str, Any]:
    return select((folder / "config.json").read_text(), header(folder), **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_rules_agree_with_transformers(name: str, checkpoint: Any) -> None:
    folder = checkpoint(name)
    ours = select_in(folder)
    names = [key for key, *_ in header(folder)]
    assert ours["selected"] == loaded_packed(model_of(folder, name), names)
    linear = [key for key in ours["selected"] if ".experts." not in key]
    assert linear == [key for key in transformers_selection(folder) if ".experts." not in key]
    assert ours["known"]
    assert ours["architecture"] == name


#: Models that quantize nothing by default: Falcon's linear layers are a subclass, which transformers leaves alone.
NOTHING = {"FalconForCausalLM"}


@pytest.mark.slow
def test_the_comparison_is_not_empty(checkpoint: Any) -> None:
    assert len(tiny_models.MODELS) >= 45
    empty = {name for name in tiny_models.MODELS if not transformers_selection(checkpoint(name))}
    assert empty == NOTHING


@pytest.mark.parametrize(
    "name",
    [
        "LlamaForCausalLM",
        "GPT2LMHeadModel",
        "BertForMaskedLM",
        "T5ForConditionalGeneration",
        "MixtralForCausalLM",
        "LlavaForConditionalGeneration",
        "CLIPModel",
        "ViTForImageClassification",
        "WhisperForConditionalGeneration",
    ],
)
def test_loading_in_4_bits_converts_the_same(name: str, checkpoint: Any, tmp_path: Path) -> None:
    """What transformers + bitsandbytes load and save: the same tensors, under the names of the source."""
    folder = checkpoint(name)
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    cls = getattr(transformers, name)
    cls.from_pretrained(folder, quantization_config=config, device_map="cpu", dtype=torch.bfloat16).save_pretrained(
        tmp_path
    )
    saved = {key for key, *_ in header(tmp_path)}
    quantized = sorted(key.removesuffix(".absmax") for key in saved if key.endswith(".absmax"))
    ours = select_in(folder)
    # transformers leaves experts in 16 bits.
    assert quantized == [key for key in ours["selected"] if ".experts." not in key]
    source = {key for key, *_ in header(folder)}
    assert {key for key in saved if ".quant" not in key and not key.endswith(".absmax")} == source
    assert ours["skip_modules"] is None


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("GPT2LMHeadModel", "transformer.", ""),
        ("BertModel", "", "bert."),
        ("LlamaForCausalLM", "model.", ""),
        ("BertForMaskedLM", "bert.", ""),
    ],
)
def test_names_with_and_without_the_prefix_of_the_base_model(name: str, old: str, new: str, checkpoint: Any) -> None:
    """Checkpoints of a body load into a class with a head, and the other way round; also with a skip list."""
    folder = checkpoint(name)
    tensors = [
        (key if key.startswith("lm_head") else new + key.removeprefix(old), shape, dtype)
        for key, shape, dtype in header(folder)
    ]
    config = (folder / "config.json").read_text()
    model = skeleton(getattr(transformers, name), transformers.AutoConfig.from_pretrained(folder))
    plain = select(config, tensors)
    assert plain["selected"] == converted_tensors(model, [key for key, *_ in tensors])
    for rule in (r"\.1\.=keep", f"^{re.escape(plain['selected'][0])}=keep"):
        answer = select(config, tensors, rules=[rule])
        assert len(answer["selected"]) < len(plain["selected"])
        converted = converted_modules(model, answer["skip_modules"], replace=True)
        assert converted == {_module_of(model, key) for key in answer["selected"]}


def test_weights_of_conv1d_are_transposed(checkpoint: Any) -> None:
    from transformers.pytorch_utils import Conv1D

    folder = checkpoint("GPT2LMHeadModel")
    model = skeleton(transformers.GPT2LMHeadModel, transformers.AutoConfig.from_pretrained(folder))
    expected = sorted(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D))
    config = (folder / "config.json").read_text()
    assert select_in(folder)["transposed"] == expected
    assert sorted(name for name, *_ in header(folder) if _native.is_conv1d(config, name)) == expected
    assert select_in(checkpoint("LlamaForCausalLM"))["transposed"] == []


# --- rules, skip names, and the list that tells the loader ------------------------------------------------------------


def assert_loader_agrees(name: str, folder: Path, answer: dict[str, Any]) -> None:
    """With the answer's ``llm_int8_skip_modules``, transformers converts exactly the modules we quantized."""
    model = with_experts(model_of(folder, name), [key for key, *_ in header(folder)])
    listed = answer["skip_modules"]
    converted = converted_modules(model) if listed is None else converted_modules(model, listed, replace=True)
    # Every module that is converted has its weight in the checkpoint, quantized; and the other way round.
    expected = {_module_of(model, key) for key in answer["selected"]}
    assert converted == expected, listed


def _module_of(model: Any, key: str) -> str:
    """The module that a tensor of the checkpoint becomes the weight of."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    state = model.state_dict()
    renamed, _ = rename_source_key(key, renamings, [], model.base_model_prefix, state)
    if renamed not in state and key in state:
        renamed = key
    return renamed.removesuffix(".weight")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in tiny_models.MODELS if name not in NOTHING])
def test_the_skip_list_makes_the_loader_agree(name: str, checkpoint: Any) -> None:
    folder = checkpoint(name)
    plain = select_in(folder)
    assert_loader_agrees(name, folder, plain)
    chosen = random.Random(name).choice(plain["selected"])
    leaf = re.escape(chosen.split(".")[-2])
    for options in (
        {"rules": [f"^{re.escape(chosen)}$=keep"]},
        {"rules": [rf"\b{leaf}\.weight$=keep"]},
        {"rules": [r"\.0\.=keep"]},
        {"rules": [".=keep"]},
        {"skip": [chosen.split(".")[-2]]},
    ):
        answer = select_in(folder, **options)
        assert len(answer["selected"]) < len(plain["selected"])
        assert answer["skip_modules"]
        assert_loader_agrees(name, folder, answer)


def test_skip_names_are_added_to_the_defaults(checkpoint: Any) -> None:
    for name in ("LlamaForCausalLM", "BertForMaskedLM", "T5ForConditionalGeneration", "Gemma3ForConditionalGeneration"):
        folder = checkpoint(name)
        for skip in (["q_proj", "query"], ["model.layers.1"], [r".*\.1\."], ["encoder"], ["model.vision_tower"]):
            ours = select_in(folder, skip=skip)
            assert ours["selected"] == transformers_selection(folder, skip), (name, skip)


def test_a_rule_can_quantize_an_untied_output_embedding(checkpoint: Any) -> None:
    folder = checkpoint("LlamaForCausalLM")
    answer = select_in(folder, rules=["lm_head=fp4"])
    assert "lm_head.weight" in answer["selected"]
    assert answer["skip_modules"] == []
    assert answer["reasons"]["lm_head.weight"] == "rule 'lm_head=fp4'"
    assert_loader_agrees("LlamaForCausalLM", folder, answer)


@pytest.mark.parametrize(
    ("name", "rule", "part"),
    [
        ("LlamaForCausalLM", "embed_tokens=nf4", "embedding"),
        ("LlamaForCausalLM", "norm=nf4", "norm"),
        ("GraniteMoeForCausalLM", "router=nf4", "not an nn.Linear"),
        ("MixtralForCausalLM", r"\.gate\.=nf4", "router"),
        ("T5ForConditionalGeneration", r"\.wo\.=fp4", "float32"),
        ("ViTForImageClassification", "patch_embeddings.projection.weight=nf4", "convolution"),
    ],
)
def test_a_rule_for_what_cannot_be_quantized_is_an_error(name: str, rule: str, part: str, checkpoint: Any) -> None:
    with pytest.raises(ValueError, match="rule must be ") as caught:
        select_in(checkpoint(name), rules=[rule])
    message = str(caught.value)
    assert rule in message
    assert part in message
    assert re.search(r"\[\d+(, \d+)*\]", message), "the message gives the shape"


def test_the_first_rule_that_matches_decides(checkpoint: Any) -> None:
    folder = checkpoint("LlamaForCausalLM")
    answer = select_in(folder, rules=[r"layers\.0\.=keep", "q_proj=fp4", "proj=nf4"])
    pairs = zip(header(folder), answer["decisions"], strict=True)
    kinds = {name: decision["quant_type"] for (name, *_), decision in pairs}
    assert kinds["model.layers.0.self_attn.q_proj.weight"] is None
    assert kinds["model.layers.1.self_attn.q_proj.weight"] == "fp4"
    assert kinds["model.layers.1.self_attn.k_proj.weight"] == "nf4"


def test_an_explicit_selection_replaces_the_rules(checkpoint: Any) -> None:
    folder = checkpoint("Qwen2ForCausalLM")
    names = transformers_selection(folder)
    assert select_in(folder, selected=chosen(names))["skip_modules"] is None
    answer = select_in(folder, selected=chosen(names[:1]), skip=["nothing"])
    assert answer["selected"] == names[:1]
    with pytest.raises(ValueError, match="no_such_tensor"):
        select_in(folder, selected=chosen(["no_such_tensor"]))
    with pytest.raises(ValueError, match="two-dimensional"):
        select_in(folder, selected=chosen(["model.norm.weight"]))


def test_an_unknown_architecture_is_planned_by_shape() -> None:
    tensors = [
        ("blocks.0.mix.weight", [64, 64], "BF16"),
        ("blocks.0.mix.bias", [64], "BF16"),
        ("tok_embeddings.weight", [256, 64], "BF16"),
        ("lm_head.weight", [256, 64], "BF16"),
        ("steps.weight", [4, 4], "I64"),
        ("double.weight", [4, 4], "F64"),
    ]
    for config in (None, "{}", '{"model_type": "never_heard_of", "architectures": ["NeverHeardOfModel"]}'):
        answer = select(config, tensors)
        assert answer["selected"] == ["blocks.0.mix.weight"]
        assert not answer["known"]
        assert "planned by names and shapes" in answer["notes"][0]
        # The loader would convert the float64 weight, so the list must name it.
        assert "double" in answer["skip_modules"]


def test_experts_are_selected_by_a_selection_of_transformers_too(checkpoint: Any) -> None:
    """It leaves them alone: the rules decide."""
    folder = checkpoint("MixtralForCausalLM")
    names = transformers_selection(folder)
    assert not any(".experts." in name for name in names)
    answer = select_in(folder, selected=chosen(names))
    assert answer["selected"] == select_in(folder)["selected"]
    assert sum(".experts." in name for name in answer["selected"]) == 2 * 4 * 3


def test_code_from_a_checkpoint_is_not_run(tmp_path: Path, checkpoint: Any) -> None:
    config = json.loads((checkpoint("LlamaForCausalLM") / "config.json").read_text())
    config["architectures"] = ["SomebodysForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(checkpoint("LlamaForCausalLM") / "model.safetensors")
    with pytest.raises(ValueError, match="SomebodysForCausalLM"):
        transformers_selection(tmp_path)


# --- every class that transformers can build ------------------------------------------------------------------------


def every_class() -> list[tuple[str, type]]:
    """``model_type`` and class of everything that transformers' auto classes can build."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    found: dict[tuple[str, str], None] = {}
    for table in [value for key, value in vars(modeling_auto).items() if re.fullmatch(r"MODEL_.*MAPPING_NAMES", key)]:
        for model_type, names in table.items():
            for name in [names] if isinstance(names, str) else names:
                if name and model_type in CONFIG_MAPPING_NAMES:
                    found[model_type, name] = None
    return [(model_type, getattr(transformers, name)) for model_type, name in found if hasattr(transformers, name)]


def small_skeleton(cls: type) -> Any:
    """A model of the class without weights, or None where no default configuration makes one."""
    for make in (lambda: tiny_models.configure(cls.config_class, {}), lambda: cls.config_class()):
        try:
            config = make()
            config.architectures = [cls.__name__]
            return skeleton(cls, config)
        except Exception:  # Whatever a class says of a configuration that was not made for it.
            continue
    return None


def saved_tensors(model: Any) -> list[tuple[str, list[int], str]]:
    """Names, shapes and dtypes that ``save_pretrained`` would write, without any weight."""
    from transformers.core_model_loading import revert_weight_conversion

    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_save or []]
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys and not any(pattern.search(name) for pattern in ignored)
    }
    return [
        (name, list(tensor.shape), "F32" if tensor.is_floating_point() else "I64")
        for name, tensor in revert_weight_conversion(model, state).items()
    ]


def compare(cls: type) -> dict[str, Any] | None:
    """Our answer for a class beside transformers': None where the class cannot be built here."""
    model = small_skeleton(cls)
    if model is None:
        return None
    tensors = saved_tensors(model)
    answer = select(model.config.to_json_string(), tensors)
    # A default configuration may make a layer of no size at all; transformers replaces that too.
    empty = {name for name, shape, _ in tensors if 0 in shape}
    expected = [name for name in loaded_packed(model, [name for name, *_ in tensors]) if name not in empty]
    return {
        "known": answer["known"],
        "agrees": answer["selected"] == expected,
        "config": model.config,
        "answer": answer,
    }


@pytest.fixture
def garbage_is_collected_here() -> Iterator[None]:
    """What third parties leave open is closed by the collector: within the test that let them, not in a later one."""
    yield
    gc.collect()


@pytest.mark.slow
@pytest.mark.usefixtures("garbage_is_collected_here")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_known_classes_agree_with_transformers() -> None:
    """Classes of all architectures that we call known: a quarter of them, or all with HALFBYTE_TEST_EVERY_CLASS=1.

    All are some 1500 and take about a minute.
    """
    classes = [cls for _, cls in every_class()]
    if os.environ.get("HALFBYTE_TEST_EVERY_CLASS") != "1":
        classes = [cls for cls in classes if zlib.crc32(cls.__name__.encode()) % 4 == 0]
    built, known, wrong = 0, 0, []
    for cls in classes:
        result = compare(cls)
        if result is None:
            continue
        built += 1
        known += result["known"]
        if result["known"] and not result["agrees"]:
            wrong.append(cls.__name__)
    assert wrong == []
    assert built > 0.8 * len(classes)
    assert known > 0.9 * built
