"""Tiny, randomly initialised models of many architectures, for tests that need a checkpoint.

A model is described by its class and a few fields of its configuration; every other size comes from :data:`TINY`.
Nothing is downloaded. Building one takes a few milliseconds on the meta device, and some tens with weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

#: Values for the fields that set a model's size, wherever a configuration or one nested in it has them.
TINY: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "word_embed_proj_dim", "embedding_size"), 64
    ),
    **dict.fromkeys(("encoder_hidden_size", "out_hidden_size", "projection_dim", "kv_dim", "hidden_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "inner_dim"), 128),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size", "shared_intermediate_size"), 128),
    **dict.fromkeys(("shared_expert_intermediate_size", "intermediate_size_mlp"), 128),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads",), 2),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "rotary_dim", "time_step_rank"), 16),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 256),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_source_positions"), 64),
    **dict.fromkeys(("max_target_positions",), 64),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "n_group", "topk_group"), 2),
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 3,
}

#: Fields that are None in some default configurations, and that the model needs all the same.
_MAY_BE_UNSET = ("head_dim", "num_key_value_heads", "vocab_size", "shared_expert_intermediate_size")

#: Fields that name a token: any of them must lie inside the vocabulary.
_TOKEN_FIELDS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "mask_token_id")

#: Class → fields of its configuration that differ; a dict is for the configuration of that name nested in it.
MODELS: dict[str, dict[str, Any]] = {
    # Decoders.
    "LlamaForCausalLM": {},
    "LlamaForSequenceClassification": {},
    "LlamaForTokenClassification": {},
    "MistralForCausalLM": {},
    "MinistralForCausalLM": {},
    "Ministral3ForCausalLM": {},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {},
    "GemmaForCausalLM": {},
    "Gemma2ForCausalLM": {},
    "Gemma3ForCausalLM": {},
    "PhiForCausalLM": {},
    "Phi3ForCausalLM": {},
    "GPT2LMHeadModel": {},
    "GPT2ForSequenceClassification": {},
    "GPTNeoForCausalLM": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "intermediate_size": 128},
    "GPTNeoXForCausalLM": {},
    "GPTJForCausalLM": {},
    "GPTBigCodeForCausalLM": {},
    "CodeGenForCausalLM": {},
    "OPTForCausalLM": {},
    "FalconForCausalLM": {},
    "BloomForCausalLM": {},
    "MptForCausalLM": {},
    "Starcoder2ForCausalLM": {},
    "OlmoForCausalLM": {},
    "Olmo2ForCausalLM": {},
    "GraniteForCausalLM": {},
    "CohereForCausalLM": {},
    "Cohere2ForCausalLM": {},
    "StableLmForCausalLM": {},
    "SmolLM3ForCausalLM": {},
    "BioGptForCausalLM": {},
    "XGLMForCausalLM": {},
    "Glm4ForCausalLM": {},
    "NemotronForCausalLM": {},
    "Exaone4ForCausalLM": {},
    "HunYuanDenseV1ForCausalLM": {},
    "MambaForCausalLM": {},
    "Mamba2ForCausalLM": {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "n_groups": 2},
    "FalconMambaForCausalLM": {},
    # Mixture-of-experts.
    "MixtralForCausalLM": {},
    "Qwen2MoeForCausalLM": {},
    "Qwen3MoeForCausalLM": {},
    "DeepseekV3ForCausalLM": {
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "num_key_value_heads": 4,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
    },
    "OlmoeForCausalLM": {},
    "GraniteMoeForCausalLM": {},
    "GptOssForCausalLM": {},
    # Encoders.
    "BertModel": {},
    "BertForMaskedLM": {},
    "BertForPreTraining": {},
    "BertForSequenceClassification": {},
    "BertForQuestionAnswering": {},
    "RobertaForMaskedLM": {},
    "RobertaForSequenceClassification": {},
    "XLMRobertaForMaskedLM": {},
    "DistilBertForMaskedLM": {"hidden_dim": 128},
    "AlbertForMaskedLM": {"embedding_size": 32},
    "ElectraForMaskedLM": {"embedding_size": 32},
    "ElectraForPreTraining": {"embedding_size": 32},
    "DebertaV2ForMaskedLM": {"position_buckets": 8, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "MPNetForMaskedLM": {},
    "ModernBertForMaskedLM": {},
    "EsmForMaskedLM": {},
    "NomicBertModel": {},
    # Encoders with decoders.
    "T5ForConditionalGeneration": {},
    "T5EncoderModel": {},
    "MT5ForConditionalGeneration": {},
    "BartForConditionalGeneration": {},
    "MBartForConditionalGeneration": {},
    "PegasusForConditionalGeneration": {},
    "MarianMTModel": {"decoder_vocab_size": 256},
    "WhisperForConditionalGeneration": {"num_mel_bins": 16},
    # Vision and audio.
    "Wav2Vec2ForCTC": {
        "conv_dim": [32, 32],
        "conv_kernel": [3, 3],
        "conv_stride": [2, 2],
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
    },
    "ViTForImageClassification": {},
    "Dinov2Model": {"num_hidden_layers": 2, "mlp_ratio": 2},
    "SwinModel": {"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 32, "window_size": 4, "patch_size": 4},
    # Vision and text.
    "CLIPModel": {},
    "CLIPVisionModel": {},
    "SiglipModel": {},
    "Blip2ForConditionalGeneration": {"text_config": {"model_type": "opt"}, "num_query_tokens": 4},
    "LlavaForConditionalGeneration": {"text_config": {"model_type": "llama"}},
    "PaliGemmaForConditionalGeneration": {},
    "Gemma3ForConditionalGeneration": {},
    "Mistral3ForConditionalGeneration": {},
    "Qwen2VLForConditionalGeneration": {},
    "Qwen2_5_VLForConditionalGeneration": {},
}


def tiny_config(name: str) -> PreTrainedConfig:
    """The configuration of the model of class ``name``, a key of :data:`MODELS`."""
    return configure(getattr(transformers, name).config_class, {**MODELS[name], "architectures": [name]})


def configure(cls: type[PreTrainedConfig], fields: dict[str, Any]) -> PreTrainedConfig:
    """An instance of ``cls`` with every size from :data:`TINY`, or from ``fields`` where it has one."""
    config = cls(**copy.deepcopy(fields))
    for part, name in [(config, ""), *_nested(config)]:
        own = fields.get(name, {}) if name else fields
        for field, value in TINY.items():
            unset = field in _MAY_BE_UNSET and getattr(part, field, 0) is None
            if field not in own and (unset or isinstance(getattr(part, field, None), int)) and _settable(part, field):
                setattr(part, field, value)
        for field in _TOKEN_FIELDS:
            if getattr(part, field, None) is not None and _settable(part, field):
                setattr(part, field, 1)
        layers = getattr(part, "num_hidden_layers", None)
        for field in ("layer_types", "mlp_layer_types"):
            if isinstance(getattr(part, field, None), list) and layers is not None and _settable(part, field):
                setattr(part, field, getattr(part, field)[:layers])
    return config


def _settable(config: PreTrainedConfig, field: str) -> bool:
    own = getattr(type(config), field, None)
    return not isinstance(own, property) or own.fset is not None


def _nested(config: PreTrainedConfig) -> Iterator[tuple[PreTrainedConfig, str]]:
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield value, name
            yield from _nested(value)


def build(name: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> PreTrainedModel:
    """The model of class ``name`` with random weights; skips the test where this transformers has no such class."""
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(seed)
    return getattr(transformers, name)(tiny_config(name)).to(dtype).eval()


def save(name: str, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Build the model of class ``name`` and save it; returns the folder."""
    build(name, dtype).save_pretrained(folder)
    return Path(folder)


WORDS = "the cat sat on the mat and the dog ran to the door while the sun came up"
"""A sentence whose words `save_llama_with_words` knows."""


def save_llama_with_words(folder: Path, dtype: str = "float32") -> None:
    """Save a dense Llama of two layers and a tokenizer that knows the words of `WORDS`.

    Like Llama's own tokenizer it has no padding token, and adds nothing to a prompt.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<eos>", "<unk>", *sorted(set(WORDS.split()))]
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(words),
        eos_token_id=0,
        bos_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
