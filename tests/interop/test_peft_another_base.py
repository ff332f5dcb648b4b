"""Adapters that were trained on another base, of every kind that PEFT has for 4-bit layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import halfbyte  # noqa: E402
from halfbyte import BitsAndBytesConfig, CheckpointError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning", "ignore::UserWarning")
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
}
ON: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
METHODS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=4, **ON),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, **ON),
    "vera": lambda: peft.VeraConfig(r=4, **ON),
    "adalora": lambda: peft.AdaLoraConfig(total_step=10, **ON),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}
# PEFT's own report tells of another width; that there are fewer blocks it does not notice.
OTHERS: dict[str, Callable[[], Any]] = {
    "ia3": lambda: peft.IA3Config(feedforward_modules=[], **ON),
    "miss": lambda: peft.MissConfig(r=4, **ON),
    "oft": lambda: peft.OFTConfig(oft_block_size=16, use_cayley_neumann=False, **ON),
}


@cache
def base(**kwargs: Any) -> Any:
    """A 4-bit Llama of these sizes; adapters go on copies of it."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **kwargs}))
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return halfbyte.quantize_model(model, config, progress=False)


def adapter(folder: Path, method: Callable[[], Any], **kwargs: Any) -> Path:
    """Save an untrained adapter of a base of these sizes."""
    peft.get_peft_model(copy.deepcopy(base(**kwargs)), method()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_adapter_of_a_wider_base_is_refused(tmp_path: Path, method: str) -> None:
    folder = adapter(tmp_path, METHODS[method], hidden_size=128)
    before = [name for name, _ in base().named_modules()]
    with pytest.raises(CheckpointError, match=r"another base, (None|'') by base_model_name_or_path") as found:
        peft.PeftModel.from_pretrained(base(), folder)
    assert str(folder / "adapter_model.safetensors") in str(found.value)
    assert "128" in str(found.value)
    assert "64" in str(found.value)
    assert [name for name, _ in base().named_modules()] == before


@pytest.mark.parametrize("method", [name for name in (*METHODS, *OTHERS) if name != "prompt"])
def test_adapter_of_a_deeper_base_is_refused(tmp_path: Path, method: str) -> None:
    folder = adapter(tmp_path, {**METHODS, **OTHERS}[method], num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"belongs to model\.layers\.2, which the model has not"):
        peft.PeftModel.from_pretrained(base(), folder)


@pytest.mark.parametrize("method", [*METHODS, *OTHERS])
def test_adapter_of_the_same_base_is_loaded(tmp_path: Path, method: str) -> None:
    folder = adapter(tmp_path, {**METHODS, **OTHERS}[method])
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base()), folder)
    assert list(model.peft_config) == ["default"]
    model.load_adapter(folder, "second")
    assert list(model.peft_config) == ["default", "second"]


def test_adapter_with_more_layers_by_layer_replication_is_loaded(tmp_path: Path) -> None:
    replicated = peft.LoraConfig(r=4, layer_replication=[[0, 2], [0, 2]], **ON)
    folder = adapter(tmp_path / "same", lambda: replicated)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base()), folder)
    assert len(model.base_model.model.model.layers) == 4
    wider = adapter(tmp_path / "wider", lambda: replicated, hidden_size=128)
    with pytest.raises(CheckpointError, match="another base"):
        peft.PeftModel.from_pretrained(copy.deepcopy(base()), wider)


def test_adapter_of_another_base_goes_on_where_it_is_asked_for(tmp_path: Path) -> None:
    # Of a smaller base, on purpose: PEFT leaves what does not fit.
    folder = adapter(tmp_path, METHODS["lora"], hidden_size=128)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base()), folder, ignore_mismatched_sizes=True)
    assert list(model.peft_config) == ["default"]


def test_adapter_on_a_dense_model_is_pefts_matter(tmp_path: Path) -> None:
    folder = adapter(tmp_path, METHODS["lora"], hidden_size=128)
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(dense, folder)
