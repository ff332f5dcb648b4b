"""Models of many kinds through transformers: what is built on `from_pretrained`, and what is done to a loaded model."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import halfbyte
import torch
import transformers
from scenarios import IDS, KIND, SIZES, TAKES_EXPERTS_APART, config, layers, loaded, logits, scenario, source
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import tiny_models


@contextlib.contextmanager
def said() -> Iterator[list[str]]:
    """What this package logs, INFO and above."""
    found: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logger, handler = logging.getLogger("halfbyte"), Collect()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def same_files(first: Path, second: Path) -> None:
    """That two folders hold the same bytes under the same names."""
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def loads_and_saves(folder: Path, name: str, inputs: dict[str, Any], **kwargs: Any) -> Any:
    """Load a tiny model of class `name` in 4 bits, save it, load that, save again: nothing changes on the way."""
    cls = getattr(transformers, name)
    path = tiny_models.save(name, folder / name, torch.float32)
    fit_config(path)
    model = cls.from_pretrained(path, quantization_config=config(), **kwargs).eval()
    assert layers(model) > 0
    model.save_pretrained(folder / f"{name}-first")
    again = cls.from_pretrained(folder / f"{name}-first", quantization_config=config(), **kwargs).eval()
    assert layers(again) == layers(model)
    again.save_pretrained(folder / f"{name}-second")
    same_files(folder / f"{name}-first", folder / f"{name}-second")
    with torch.no_grad():
        assert torch.equal(output(again, inputs), output(model, inputs))
    return model


def fit_config(path: Path) -> None:
    """Correct what `tiny_models` leaves at a size that does not fit the others."""
    file = path / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    if values["model_type"] == "qwen2_vl":
        values["text_config"]["rope_parameters"]["mrope_section"] = [2, 3, 3]
    if values["model_type"] == "t5":
        values["decoder_start_token_id"] = 1
        (path / "generation_config.json").unlink()
    file.write_text(json.dumps(values), encoding="utf-8")


def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The first output."""
    found: Tensor = model(**inputs)[0]
    return found


def tokenizer_beside(path: Path) -> Any:
    """A tokenizer of single letters, saved beside a model."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    made.save_pretrained(path)
    return made


# ---- what is built on from_pretrained --------------------------------------------------------------------------------


@scenario
def pipeline_by_model_kwargs(folder: Path) -> None:
    path = source(folder)
    tokenizer_beside(path)
    for kwargs in ({}, {"device_map": "cpu"}):
        generate = transformers.pipeline(
            "text-generation", model=str(path), model_kwargs={"quantization_config": config()}, **kwargs
        )
        assert layers(generate.model) == 14
        text = generate("a b c", max_new_tokens=3, do_sample=False)[0]["generated_text"]
        assert text.startswith("a b c"), text


@scenario
def sentence_transformer_by_model_kwargs(folder: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    path = tiny_models.save("BertModel", folder / "bert", torch.float32)
    tokenizer_beside(path)
    dense = Transformer(str(path))
    SentenceTransformer(modules=[dense, Pooling(64)], device="cpu").save(str(folder / "dense"))
    model = SentenceTransformer(str(folder / "dense"), device="cpu", model_kwargs={"quantization_config": config()})
    assert layers(model) == 13, layers(model)
    found = model.encode(["a b c", "x y"])
    model.save(str(folder / "packed"))
    again = SentenceTransformer(str(folder / "packed"), device="cpu", model_kwargs={"quantization_config": config()})
    assert layers(again) == 13
    assert (again.encode(["a b c", "x y"]) == found).all()
    if KIND != "present":
        assert layers(SentenceTransformer(str(folder / "packed"), device="cpu")) == 13


@scenario
def custom_code_model(folder: Path) -> None:
    path = folder / "custom"
    path.mkdir()
    (path / "modeling_mine.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "from transformers import PreTrainedConfig, PreTrainedModel\n"
        "from transformers.modeling_outputs import CausalLMOutput\n"
        "class MineConfig(PreTrainedConfig):\n"
        "    model_type = 'mine'\n"
        "    def __init__(self, width=64, **kwargs):\n"
        "        self.width = width\n"
        "        super().__init__(**kwargs)\n"
        "class MineForCausalLM(PreTrainedModel):\n"
        "    config_class = MineConfig\n"
        "    def __init__(self, config):\n"
        "        super().__init__(config)\n"
        "        self.embed = nn.Embedding(96, config.width)\n"
        "        self.mix = nn.Linear(config.width, config.width)\n"
        "        self.head = nn.Linear(config.width, 96)\n"
        "        self.post_init()\n"
        "    def get_output_embeddings(self):\n"
        "        return self.head\n"
        "    def forward(self, input_ids, **kwargs):\n"
        "        return CausalLMOutput(logits=self.head(torch.tanh(self.mix(self.embed(input_ids)))))\n",
        encoding="utf-8",
    )
    names = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    (path / "config.json").write_text(
        json.dumps({"model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": names}), encoding="utf-8"
    )
    made = AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(path, trust_remote_code=True), trust_remote_code=True
    )
    made.save_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, quantization_config=config())
    assert type(model.mix) is type(halfbyte.quantize_model(nn.Sequential(nn.Linear(64, 64)))[0]) or layers(model) == 1
    assert type(model.head) is nn.Linear
    model.save_pretrained(folder / "first")
    again = AutoModelForCausalLM.from_pretrained(folder / "first", trust_remote_code=True, quantization_config=config())
    assert torch.equal(logits(again), logits(model))


# ---- architectures ---------------------------------------------------------------------------------------------------


@scenario
def vision_language_models(folder: Path) -> None:
    text = {"input_ids": IDS}
    for name in (
        "LlavaForConditionalGeneration",
        "Qwen2VLForConditionalGeneration",
        "Gemma3ForConditionalGeneration",
    ):
        model = loads_and_saves(folder, name, text)
        generated = model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert generated.shape[1] > 4, name
        # The vision tower is converted too, as transformers does, unless it is named.
        towers = ("model.vision_tower", "model.visual")
        kept = getattr(transformers, name).from_pretrained(
            folder / name, quantization_config=config(llm_int8_skip_modules=list(towers))
        )
        assert 0 < layers(kept) < layers(model), name


@scenario
def encoders_with_decoders(folder: Path) -> None:
    model = loads_and_saves(folder, "T5ForConditionalGeneration", {"input_ids": IDS, "decoder_input_ids": IDS})
    # What the architecture keeps in float32 stays dense.
    assert type(model.encoder.block[0].layer[1].DenseReluDense.wo) is nn.Linear
    assert model.generate(IDS[:, :6], max_new_tokens=3, do_sample=False).shape[0] == 2
    half = transformers.T5ForConditionalGeneration.from_pretrained(
        folder / "T5ForConditionalGeneration", quantization_config=config(), dtype=torch.float16
    )
    assert half.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype is torch.float32
    half.save_pretrained(folder / "half")
    again = transformers.T5ForConditionalGeneration.from_pretrained(folder / "half", quantization_config=config())
    assert again.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype is torch.float32
    for name, tensor in half.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name

    sound = {"input_features": torch.randn(1, 16, 128, generator=torch.Generator().manual_seed(0))}
    whisper = loads_and_saves(folder, "WhisperForConditionalGeneration", {**sound, "decoder_input_ids": IDS[:1, :4]})
    assert type(whisper.proj_out) is nn.Linear
    assert whisper.generate(**sound, max_new_tokens=3, do_sample=False).shape[0] == 1


@scenario
def experts_are_packed_or_it_is_said_that_they_stay(folder: Path) -> None:
    for name in ("MixtralForCausalLM", "Qwen3MoeForCausalLM"):
        with said() as lines:
            model = loads_and_saves(folder, name, {"input_ids": IDS})
        experts = model.model.layers[0].mlp.experts
        told = [line for line in lines if "experts" in line]
        if TAKES_EXPERTS_APART:
            assert isinstance(experts, halfbyte.nn.Experts4bit)
            assert not told, told
        else:
            assert experts.gate_up_proj.dim() == 3
            assert experts.gate_up_proj.dtype is torch.float32
            assert "model.layers.0.mlp.experts.gate_up_proj" in told[0], told
        assert model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 7)


# ---- where and in which dtype ----------------------------------------------------------------------------------------


@scenario
def dtypes(folder: Path) -> None:
    for asked, expected in (
        ("auto", torch.bfloat16),
        (None, torch.bfloat16),
        (torch.float16, torch.float16),
        ("float32", torch.float32),
    ):
        kwargs = {} if asked is None else {"dtype": asked}
        model = AutoModelForCausalLM.from_pretrained(
            source(folder, torch.bfloat16), quantization_config=config(), **kwargs
        )
        assert model.dtype is expected, asked
        assert model.lm_head.weight.dtype is expected
        assert model.model.layers[0].mlp.up_proj.quant_state.dtype is expected
        assert model(IDS).logits.dtype is expected
        assert logits(model).isfinite().all()


@scenario
def device_maps(folder: Path) -> None:
    whole = logits(loaded(folder))
    for device_map in ("auto", "cpu", {"": "cpu"}, torch.device("cpu"), "balanced", "sequential"):
        model = AutoModelForCausalLM.from_pretrained(
            source(folder), quantization_config=config(), device_map=device_map
        )
        assert torch.equal(logits(model), whole), device_map
    model = AutoModelForCausalLM.from_pretrained(
        source(folder),
        quantization_config=config(),
        device_map="auto",
        max_memory={"cpu": 70_000},
        offload_folder=folder / "offload",
    )
    assert "disk" in model.hf_device_map.values(), model.hf_device_map
    assert torch.equal(logits(model), whole)


@scenario
def memory_footprint(folder: Path) -> None:
    dense = transformers.LlamaForCausalLM.from_pretrained(source(folder))
    packed = loaded(folder)
    weights = sum(m.in_features * m.out_features for m in packed.modules() if isinstance(m, halfbyte.nn.Linear4bit))
    assert dense.get_memory_footprint() - packed.get_memory_footprint() == weights * 4 - weights // 2


# ---- what is done to a loaded model ----------------------------------------------------------------------------------


@scenario
def embeddings_are_resized(folder: Path) -> None:
    for tied in (False, True):
        path = folder / f"tied-{tied}"
        torch.manual_seed(0)
        sizes = {**SIZES, "tie_word_embeddings": tied}
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(path)
        for skip in (None, ["lm_head"]):
            model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config(llm_int8_skip_modules=skip))
            before = logits(model)
            model.resize_token_embeddings(100)
            assert model.lm_head.weight.shape == (100, 64)
            assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
            torch.testing.assert_close(logits(model)[..., :96], before)
            model.save_pretrained(folder / f"resized-{tied}")
            again = AutoModelForCausalLM.from_pretrained(folder / f"resized-{tied}", quantization_config=config())
            assert layers(again) == 14
            assert torch.equal(logits(again), logits(model))


@scenario
def generate_with_a_compiled_forward(folder: Path) -> None:
    from transformers import CompileConfig

    model = loaded(folder)
    plain = model.generate(IDS[:, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    how = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    how._compile_all_devices = True
    compiled = model.generate(
        IDS[:, :4],
        max_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
        cache_implementation="static",
        compile_config=how,
    )
    assert hasattr(model, "_compiled_call"), "generate did not compile"
    assert torch.equal(compiled, plain)


@scenario
def pushed_files(folder: Path) -> None:
    import types

    import huggingface_hub

    model = loaded(folder)
    model.save_pretrained(folder / "saved")
    seen: dict[str, bytes] = {}

    def create_commit(*args: Any, operations: Any = (), **kwargs: Any) -> None:
        for operation in operations:
            seen[operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()

    def create_repo(repo_id: str, **kwargs: Any) -> Any:
        return types.SimpleNamespace(repo_id=repo_id)

    fake = types.SimpleNamespace(create_commit=create_commit, create_repo=create_repo)
    hub = sys.modules["transformers.utils.hub"]
    card = huggingface_hub.ModelCard
    patched = {name: getattr(hub, name) for name in ("hf_api", "create_repo", "create_commit") if hasattr(hub, name)}
    load = card.load
    try:
        for name in patched:
            setattr(hub, name, (lambda: fake) if name == "hf_api" else getattr(fake, name))
        card.load = classmethod(lambda cls, *args, **kwargs: cls("---\nlibrary_name: transformers\n---\n# m\n"))
        model.push_to_hub("someone/model", tags=["4-bit"])
    finally:
        card.load = load
        for name, value in patched.items():
            setattr(hub, name, value)
    assert set(seen) == {path.name for path in (folder / "saved").iterdir()} | {"README.md"}, set(seen)
    for path in (folder / "saved").iterdir():
        assert seen[path.name] == path.read_bytes(), path.name
    assert json.loads(seen["config.json"])["quantization_config"]["load_in_4bit"] is True
    assert "4-bit" in seen["README.md"].decode()


# ---- adapters through transformers' own methods ----------------------------------------------------------------------


def transformers_takes_peft() -> bool:
    """Whether transformers accepts the installed PEFT; 5.24 wants one that is newer than any release."""
    from transformers.integrations import peft as integration
    from transformers.utils.peft_utils import check_peft_version

    try:
        check_peft_version(min_version=integration.MIN_PEFT_VERSION)
    except ValueError:
        return False
    return True


@scenario
def adapters_through_the_model(folder: Path) -> None:
    if not transformers_takes_peft():
        return
    import peft

    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = loaded(folder)
    plain = logits(model)
    torch.manual_seed(1)
    model.add_adapter(lora, adapter_name="mine")
    layer = model.model.layers[0].self_attn.q_proj
    assert type(layer).__module__ == "peft.tuners.lora.bnb", type(layer)
    changed = logits(model)
    assert not torch.equal(changed, plain)
    model.save_pretrained(folder / "adapter")
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    assert not (folder / "adapter" / "model.safetensors").exists()
    model.disable_adapters()
    assert torch.equal(logits(model), plain)
    model.enable_adapters()
    assert torch.equal(logits(model), changed)

    again = loaded(folder)
    again.load_adapter(str(folder / "adapter"), adapter_name="mine")
    torch.testing.assert_close(logits(again), changed)
    again.delete_adapter("mine")
    # The folder of an adapter, loaded as a model: its base is found by name.
    direct = AutoModelForCausalLM.from_pretrained(folder / "adapter", quantization_config=config())
    assert layers(direct) == 14
    torch.testing.assert_close(logits(direct), changed)


@scenario
def adapters_found_with_their_base(folder: Path) -> None:
    import peft

    made = peft.get_peft_model(loaded(folder), peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False))
    before = logits(made)
    made.save_pretrained(folder / "named")
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "named", quantization_config=config())
    assert layers(auto) == 14
    torch.testing.assert_close(logits(auto), before)
