//! What is known of architectures: where transformers' classes differ from the general rules.
//!
//! The general rules: a two-dimensional `NAME.weight` belongs to an `nn.Linear` unless `NAME` ends like an embedding
//! table ([`is_embedding`]) or a router ([`ROUTERS`]); linear layers are converted unless they are an output
//! embedding ([`OUTPUT_EMBEDDINGS`]). The tables below hold the exceptions.

/// Where one family of models differs from the general rules.
#[derive(Debug)]
pub(super) struct Family {
    /// `model_type` of the configuration, or of a configuration nested in it.
    pub model_types: &'static [&'static str],
    /// Module paths of further output embeddings.
    pub output: &'static [&'static str],
    /// `_keep_in_fp32_modules`: matched like the names of a skip list, and never converted.
    pub float32: &'static [&'static str],
    /// Paths of modules whose two-dimensional `weight` is not that of an `nn.Linear`.
    pub not_linear: &'static [&'static str],
    /// Paths of linear modules that the general rules would take for something else.
    pub linear: &'static [&'static str],
    /// Paths of `Conv1D` modules, whose weight is stored `[in, out]`.
    pub conv1d: &'static [&'static str],
}

const NONE: Family = Family { model_types: &[], output: &[], float32: &[], not_linear: &[], linear: &[], conv1d: &[] };

/// Paths of the linear layers of GPT-2 and its kin, which are `Conv1D` modules.
const GPT2_CONV1D: &[&str] = &[
    "attn.c_attn",
    "attn.c_proj",
    "attn.q_attn",
    "crossattention.c_attn",
    "crossattention.c_proj",
    "crossattention.q_attn",
    "mlp.c_fc",
    "mlp.c_proj",
];

/// The families that differ.
pub(super) static FAMILIES: &[Family] = &[
    Family {
        model_types: &["gpt2", "gpt-sw3", "openai-gpt", "imagegpt", "decision_transformer", "clvp"],
        conv1d: GPT2_CONV1D,
        ..NONE
    },
    Family { model_types: &["t5", "mt5", "umt5", "pop2piano", "udop"], float32: &["wo"], ..NONE },
    Family { model_types: &["blip-2"], float32: &["qformer", "query_tokens"], ..NONE },
    Family {
        model_types: &["whisper", "moonshine", "moonshine_streaming", "canary", "cohere_asr"],
        output: &["^proj_out"],
        ..NONE
    },
    Family { model_types: &["biogpt", "trocr"], output: &["^output_projection"], ..NONE },
    Family { model_types: &["modernbert", "modernbert-decoder"], output: &["^decoder"], ..NONE },
    Family {
        // Its linear layers are a subclass of `nn.Linear`, which transformers does not convert.
        model_types: &["falcon"],
        not_linear: &[
            "self_attention.query_key_value",
            "self_attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        ],
        ..NONE
    },
];

/// Ends of the module paths of output embeddings.
pub(super) static OUTPUT_EMBEDDINGS: &[&str] = &[
    "lm_head",
    "lm_head.decoder",
    "lm_head.out_proj",
    "predictions.decoder",
    "embed_out",
    "generator_lm_head",
    "vocab_projector",
    "pred_layer.proj",
    "lm_loss",
];

/// Names of Mixture-of-Experts routers, whose weight is a parameter of their own.
pub(super) static ROUTERS: &[&str] = &["gate", "router"];

/// Is this the name of an embedding table (`nn.Embedding`)?
pub(super) fn is_embedding(name: &str) -> bool {
    matches!(
        name,
        "embed_tokens"
            | "word_embeddings"
            | "position_embeddings"
            | "token_type_embeddings"
            | "position_embedding"
            | "embed_positions"
            | "shared"
            | "relative_attention_bias"
            | "wte"
            | "wpe"
            | "embeddings"
            | "token_embedding"
            | "pos_embed"
            | "embedding"
            | "tok_embeddings"
            | "embed_in"
            | "embed"
            | "tokens_embed"
            | "positions_embed"
    )
}
