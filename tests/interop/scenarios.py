"""What a user does with transformers, PEFT and Trainer: the scenarios of `test_processes.py`, run in a process apart.

More of them are in the files beside this one, `scenarios_*.py`.

`python scenarios.py KIND FOLDER [NAME…]` runs all scenarios, or those named, and prints one JSON object, name to None
or to what went wrong. KIND says what the process knows of bitsandbytes:

- `absent`: it is hidden, as if it had never been installed; halfbyte is imported first.
- `late`: it is hidden; transformers and PEFT are imported before halfbyte. Only the scenarios of this file, which is
  where an order of imports could show.
- `present`: the real one is installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", WANDB_DISABLED="true")

KIND = sys.argv[1] if __name__ == "__main__" else "present"


def hide_bitsandbytes() -> None:
    """Hide the installed bitsandbytes from imports, `find_spec` and `importlib.metadata`."""
    from importlib.machinery import PathFinder
    from importlib.metadata import MetadataPathFinder

    find, distributions = PathFinder.find_spec, MetadataPathFinder.find_distributions

    def find_spec(fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.partition(".")[0] == "bitsandbytes" and path is None:
            return None
        return find(fullname, path, target)

    def find_distributions(*args: Any, **kwargs: Any) -> Any:
        found = distributions(*args, **kwargs)
        return (one for one in found if one.name != "bitsandbytes")

    PathFinder.find_spec = staticmethod(find_spec)  # type: ignore[assignment, method-assign]
    MetadataPathFinder.find_distributions = staticmethod(find_distributions)  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    if KIND in ("absent", "late"):
        hide_bitsandbytes()
    if KIND == "late":
        for module in ("peft", "transformers.quantizers.auto"):
            importlib.import_module(module)

import halfbyte  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

import pytest  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

# Releases of transformers from 5.8 on let a load change how experts are read.
TAKES_EXPERTS_APART = hasattr(transformers.quantizers.base.HfQuantizer, "update_weight_conversions")

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SCENARIOS: dict[str, Callable[[Path], None]] = {}
IDS = torch.arange(48).reshape(2, 24) % 96
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 96,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}


def scenario(function: Callable[[Path], None]) -> Callable[[Path], None]:
    """Run this function as a scenario of its name."""
    SCENARIOS[function.__name__] = function
    return function


def config(**kwargs: Any) -> Any:
    """How these scenarios quantize, in this package's class."""
    return halfbyte.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, **kwargs
    )


def source(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The folder of a tiny dense Llama, made when it is first asked for."""
    path = folder / f"source-{str(dtype)[6:]}"
    if not path.exists():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype).save_pretrained(path)
    return path


def loaded(folder: Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    """That model, loaded in 4 bits."""
    return AutoModelForCausalLM.from_pretrained(source(folder, dtype), quantization_config=config(**kwargs))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Of a fixed batch."""
    training = model.training
    found: Tensor = model.eval()(IDS).logits.float()
    model.train(training)
    return found


def same_tokens(a: Tensor, b: Tensor) -> float:
    """The share of positions at which both prefer the same token."""
    return float((a.argmax(-1) == b.argmax(-1)).float().mean())


def layers(model: nn.Module) -> int:
    """How many layers are this package's 4-bit ones."""
    return sum(isinstance(module, halfbyte.nn.Linear4bit) for module in model.modules())


def train(model: nn.Module, steps: int = 4, autocast: bool = False, rate: float = 1e-3) -> list[float]:
    """Train on one batch, and return the losses."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


# ---- loading and saving ----------------------------------------------------------------------------------------------


@scenario
def load_on_the_fly_equals_quantize_model(folder: Path) -> None:
    model = loaded(folder, torch.bfloat16)
    reference = halfbyte.quantize_model(LlamaForCausalLM.from_pretrained(source(folder, torch.bfloat16)), config())
    assert layers(model) == layers(reference) == 14
    assert torch.equal(logits(model), logits(reference))
    assert model.dtype is torch.bfloat16
    assert model.lm_head.weight.dtype is torch.bfloat16


@scenario
def load_with_transformers_class(folder: Path) -> None:
    given = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(source(folder), quantization_config=given)
    assert (layers(model) == 14) == (KIND != "present"), type(model.model.layers[0].self_attn.q_proj)


@scenario
def load_saved_without_argument(folder: Path) -> None:
    model = loaded(folder)
    model.save_pretrained(folder / "saved")
    again = AutoModelForCausalLM.from_pretrained(folder / "saved")
    assert (layers(again) == 14) == (KIND != "present"), type(again.model.layers[0].self_attn.q_proj)
    again = AutoModelForCausalLM.from_pretrained(folder / "saved", quantization_config=config())
    assert layers(again) == 14
    assert torch.equal(logits(again), logits(model))
    assert type(again.config.quantization_config) is halfbyte.BitsAndBytesConfig


@scenario
def save_of_a_loaded_model_is_byte_equal(folder: Path) -> None:
    loaded(folder).save_pretrained(folder / "first", max_shard_size="40KB")
    again = AutoModelForCausalLM.from_pretrained(folder / "first", quantization_config=config())
    again.save_pretrained(folder / "second", max_shard_size="40KB")
    names = sorted(path.name for path in (folder / "first").iterdir())
    assert names == sorted(path.name for path in (folder / "second").iterdir())
    assert sum(name.endswith(".safetensors") for name in names) > 1
    for name in names:
        assert (folder / "first" / name).read_bytes() == (folder / "second" / name).read_bytes(), name


@scenario
def load_into_the_base_class(folder: Path) -> None:
    loaded(folder, llm_int8_skip_modules=["model.layers.0"]).save_pretrained(folder / "skipped")
    model = AutoModel.from_pretrained(folder / "skipped", quantization_config=config())
    assert layers(model) == 7
    assert model(IDS).last_hidden_state.isfinite().all()


@scenario
def load_with_a_new_head(folder: Path) -> None:
    loaded(folder).save_pretrained(folder / "headless")
    for path in (source(folder), folder / "headless"):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            path, quantization_config=config(), pad_token_id=0
        )
        assert layers(model) == 14
        assert type(model.score) is nn.Linear
        assert model(IDS).logits.isfinite().all()


@scenario
def count_of_parameters_is_the_dense_models(folder: Path) -> None:
    dense = LlamaForCausalLM.from_pretrained(source(folder)).num_parameters()
    assert loaded(folder).num_parameters() == dense
    made = halfbyte.quantize_model(LlamaForCausalLM.from_pretrained(source(folder)), config())
    assert made.num_parameters() == dense


@scenario
def dequantize_and_save_dense(folder: Path) -> None:
    for model in (loaded(folder), halfbyte.quantize_model(LlamaForCausalLM.from_pretrained(source(folder)), config())):
        before = logits(model)
        dense = model.dequantize()
        assert layers(dense) == 0
        assert not getattr(dense, "is_quantized", False)
        torch.testing.assert_close(logits(dense), before, rtol=1e-4, atol=1e-4)
        dense.save_pretrained(folder / "dense")
        again = AutoModelForCausalLM.from_pretrained(folder / "dense")
        assert torch.equal(logits(again), logits(dense))


@scenario
def disk_offload_stays_4bit(folder: Path) -> None:
    loaded(folder).save_pretrained(folder / "packed")
    where = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    calls = []
    quantize = halfbyte.nn.params.quantize_4bit

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return quantize(*args, **kwargs)

    for path in (source(folder), folder / "packed"):
        whole = AutoModelForCausalLM.from_pretrained(path, quantization_config=config())
        model = AutoModelForCausalLM.from_pretrained(
            path,
            quantization_config=config(),
            device_map={**where, "model.layers.1": "disk"},
            offload_folder=folder / f"offload-{path.name}",
        )
        assert model.model.layers[1].self_attn.q_proj.weight.is_meta
        halfbyte.nn.params.quantize_4bit = counted
        try:
            for _ in range(2):
                assert torch.equal(logits(model), logits(whole))
        finally:
            halfbyte.nn.params.quantize_4bit = quantize
        assert not calls


@scenario
def generate_with_both_caches(folder: Path) -> None:
    model = loaded(folder)
    tokens = [
        model.generate(IDS[:, :4], max_new_tokens=4, do_sample=False, pad_token_id=0, **kwargs)
        for kwargs in ({}, {"cache_implementation": "static"})
    ]
    assert torch.equal(*tokens)


@scenario
def errors_before_anything_is_changed(folder: Path) -> None:
    def message(**kwargs: Any) -> str:
        try:
            AutoModelForCausalLM.from_pretrained(source(folder), **kwargs)
        except (ValueError, TypeError, ImportError) as error:
            return f"{type(error).__name__}: {error}"
        raise AssertionError(f"no error for {kwargs}")

    text = message(quantization_config=config(), device_map={"": "gpu0"})
    assert "device_map['']" in text, text
    assert "'gpu0'" in text, text
    assert "bnb_4bit_quant_type" in message(
        quantization_config=halfbyte.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="int4")
    )


@scenario
def tensors_of_16_bits_stay_views_of_the_file(folder: Path) -> None:
    model = loaded(folder, torch.bfloat16)
    address = model.model.embed_tokens.weight.data_ptr()
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "model.safetensors" in line]
    ranges = [tuple(int(x, 16) for x in parts[0].split("-")) for parts in maps]
    assert any(low <= address < high for low, high in ranges)


# ---- PEFT ------------------------------------------------------------------------------------------------------------


def adapted(folder: Path, peft_config: Any, **kwargs: Any) -> Any:
    """A 4-bit model with an adapter, as QLoRA makes it."""
    import peft

    model = peft.prepare_model_for_kbit_training(loaded(folder, **kwargs), use_gradient_checkpointing=False)
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft_config)


def lora(**kwargs: Any) -> Any:
    """A small LoRA of the attention."""
    import peft

    return peft.LoraConfig(
        **{
            "r": 4,
            "target_modules": ["q_proj", "v_proj"],
            "task_type": "CAUSAL_LM",
            "init_lora_weights": True,
            **kwargs,
        }
    )


def learns(model: Any, **kwargs: Any) -> None:
    """That training lowers the loss."""
    losses = train(model, 3, **kwargs)
    assert losses[-1] < losses[0], losses


@scenario
def lora_trains_saves_reloads_and_merges(folder: Path) -> None:
    import peft

    model = adapted(folder, lora())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer).__module__ == "peft.tuners.lora.bnb", type(layer)
    learns(model)
    before = logits(model)
    model.save_pretrained(folder / "adapter")
    again = peft.PeftModel.from_pretrained(loaded(folder), folder / "adapter")
    torch.testing.assert_close(logits(again), before, rtol=1e-5, atol=1e-5)

    merged_layer = again.base_model.model.model.layers[0].self_attn.q_proj
    dense = merged_layer.base_layer.dequantize() + merged_layer.get_delta_weight("default")
    model.merge_adapter()
    expected = halfbyte.functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
    torch.testing.assert_close(
        layer.base_layer.dequantize(), halfbyte.functional.dequantize_4bit(*expected), rtol=1e-3, atol=1e-3
    )
    assert same_tokens(logits(model), before) >= 0.9
    model.unmerge_adapter()
    assert same_tokens(logits(model), before) >= 0.9
    merged = again.merge_and_unload()
    assert layers(merged) == 14
    assert same_tokens(logits(merged), before) >= 0.9
    merged.save_pretrained(folder / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(folder / "merged", quantization_config=config())
    assert torch.equal(logits(reloaded), logits(merged))


@scenario
def lora_variants(folder: Path) -> None:
    for kwargs in ({"use_rslora": True}, {"use_dora": True}, {"init_lora_weights": "olora"}):
        model = adapted(folder, lora(**kwargs))
        learns(model)
        before = logits(model)
        # OLoRA's adapter is a part of the weight, not a small addition: quantizing the sum costs more.
        least = 0.7 if kwargs.get("init_lora_weights") == "olora" else 0.9
        assert same_tokens(logits(model.merge_and_unload()), before) >= least, kwargs


@scenario
def lora_with_several_adapters(folder: Path) -> None:
    model = adapted(folder, lora())
    first = logits(model)
    model.add_adapter("other", lora(r=8))
    model.set_adapter("other")
    learns(model)
    assert not torch.equal(logits(model), first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


@scenario
def lora_fused_trains_saves_and_merges(folder: Path) -> None:
    import peft
    from halfbyte.integrations.peft import fuse, unfuse

    for autocast in (False, True):
        losses = []
        for fused in (False, True):
            model = adapted(folder, lora(target_modules="all-linear"))
            report = fuse(model)
            assert (report.fused, report.left) == (14, {}), report
            if not fused:
                assert unfuse(model) == 14
            losses.append(train(model, 8, autocast))
        assert losses[1] == pytest.approx(losses[0], rel=2e-3 if autocast else 1e-5), losses
    before = logits(model)
    model.save_pretrained(folder / "adapter")
    again = peft.PeftModel.from_pretrained(loaded(folder), folder / "adapter")
    assert torch.equal(logits(again), before)
    assert layers(model.merge_and_unload()) == 14
    assert unfuse(again) == 14
    torch.testing.assert_close(logits(again), before, rtol=1e-5, atol=1e-5)
    assert type(again.base_model.model.model.layers[0].self_attn.q_proj).__module__ == "peft.tuners.lora.bnb"


@scenario
def other_tuners(folder: Path) -> None:
    import peft

    targets = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    # Older releases rotate dense weights only.
    newer = importlib.util.find_spec("peft.utils.quantization_utils") is not None
    for made in (
        peft.OFTConfig(oft_block_size=16, use_cayley_neumann=False, **targets),
        *([peft.BOFTConfig(boft_block_size=16, **targets)] if newer else []),
        peft.VeraConfig(r=4, **targets),
        peft.MissConfig(r=4, **targets),
        peft.AdaLoraConfig(init_r=4, target_r=2, total_step=20, **targets),
    ):
        model = adapted(folder, made)
        losses = train(model, 4, rate=1e-2)
        assert losses[-1] < losses[0], (type(made).__name__, losses)
    model = adapted(folder, peft.IA3Config(feedforward_modules=[], **targets))
    learns(model, autocast=True, rate=5e-2)


@scenario
def quantize_model_takes_adapters_too(folder: Path) -> None:
    import peft

    made = halfbyte.quantize_model(LlamaForCausalLM.from_pretrained(source(folder)), config())
    model = peft.get_peft_model(made, lora())
    assert type(model.base_model.model.model.layers[0].self_attn.q_proj).__module__ == "peft.tuners.lora.bnb"
    learns(model)


@scenario
def autocast_keeps_the_inputs_dtype(folder: Path) -> None:
    layer = loaded(folder, bnb_4bit_compute_dtype="bfloat16").model.layers[0].mlp.up_proj
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 64)).dtype is torch.float32


# ---- Trainer, TRL ----------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Eight rows of tokens."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = (torch.arange(24) * (index + 1)) % 96
        return {"input_ids": row, "labels": row}


def trainer(folder: Path, model: Any, **kwargs: Any) -> Any:
    """A Trainer that says nothing."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder / "trainer"),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "seed": 0,
    }
    return transformers.Trainer(
        model=model, args=transformers.TrainingArguments(**{**defaults, **kwargs}), train_dataset=Rows()
    )


@scenario
def trainer_resumes_to_the_same_losses(folder: Path) -> None:
    kwargs: dict[str, Any] = {
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "logging_strategy": "steps",
        "logging_steps": 1,
    }
    whole = trainer(folder, adapted(folder, lora()), save_strategy="steps", save_steps=2, **kwargs)
    whole.train()
    resumed = trainer(folder, adapted(folder, lora()), **kwargs)
    resumed.train(resume_from_checkpoint=str(folder / "trainer" / "checkpoint-2"))
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (whole, resumed)]
    assert len(losses[0]) == 4, losses
    assert losses[0] == losses[1], losses


@scenario
def trainer_refuses_a_bare_4bit_model(folder: Path) -> None:
    for model in (loaded(folder), halfbyte.quantize_model(LlamaForCausalLM.from_pretrained(source(folder)), config())):
        with pytest.raises(ValueError, match="adapters"):
            trainer(folder, model)


@scenario
def trainer_takes_the_optimizers_names(folder: Path) -> None:
    if KIND == "present":
        return  # those are bitsandbytes' own
    for name in ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "rmsprop_bnb"):
        run = trainer(folder, adapted(folder, lora()), optim=name, max_steps=2)
        assert run.train().global_step == 2, name


# ---- running them ----------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the scenarios named on the command line, all by default."""
    import shutil

    # The other files import this one: they must not run it again.
    sys.modules["scenarios"] = sys.modules[__name__]
    if KIND != "late":
        for path in sorted(Path(__file__).parent.glob("scenarios_*.py")):
            importlib.import_module(path.stem)
    warnings.simplefilter("ignore")
    folder, names = Path(sys.argv[2]), sys.argv[3:] or list(SCENARIOS)
    results: dict[str, str | None] = {}
    for name in names:
        place = folder / name
        place.mkdir()
        try:
            SCENARIOS[name](place)
            results[name] = None
        except BaseException:
            results[name] = traceback.format_exc()
        shutil.rmtree(place)
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()
