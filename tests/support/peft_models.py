"""Small models with adapters, and what they compute."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import halfbyte  # noqa: E402
import transformers  # noqa: E402
from halfbyte.integrations.peft import unfuse  # noqa: E402

IDS = torch.arange(48).reshape(2, 24) % 96
LAYERS = 14
MARKS = [
    pytest.mark.usefixtures("logs_anew"),
    pytest.mark.filterwarnings(
        # PEFT's own, about merging; and its use of what transformers deprecates.
        "ignore:Merge lora module to 4-bit linear:UserWarning",
        "ignore:Unmerge lora module to 4-bit linear:UserWarning",
        "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
        "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning",
    ),
]


def base_model(dtype: Any = torch.float32, **kwargs: Any) -> Any:
    """A tiny Llama in 4 bits."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=96,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    how = halfbyte.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, **kwargs
    )
    return halfbyte.quantize_model(model, how)


def lora_config(**kwargs: Any) -> Any:
    given = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{**given, "init_lora_weights": False, **kwargs})


def adapted(
    dtype: Any = torch.float32, prepare: bool = True, config: Any = None, fused: bool = False, **kwargs: Any
) -> Any:
    """That model with adapters that are not zero, prepared as QLoRA does, or left in `dtype`.

    `fused` leaves its layers as they were made; otherwise PEFT's own forward computes them.
    """
    model = base_model(dtype)
    if prepare:
        checkpointing = kwargs.pop("checkpointing", None)
        model = peft.prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=checkpointing is not None,
            gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"},
        )
    model.config.use_cache = False
    torch.manual_seed(1)
    made = peft.get_peft_model(model, config or lora_config(**kwargs)).train()
    if not fused:
        unfuse(made)
    return made


def first(model: Any) -> Any:
    return model.base_model.model.model.layers[0].self_attn.q_proj


def loss_of(model: Any, autocast: bool = False, seed: int = 5) -> Any:
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return model(input_ids=IDS, labels=IDS).loss


def gradients(model: Any, autocast: bool = False) -> tuple[float, dict[str, Any]]:
    """The loss, and all gradients by name."""
    model.zero_grad()
    loss = loss_of(model, autocast)
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest relative one of all gradients."""
    assert a.keys() == b.keys()
    assert a
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in a)
