//! From a checkpoint's names to the paths of transformers' modules.
//!
//! Checkpoints keep the names they were published with; transformers renames while loading. Skip lists speak of its
//! modules, so both the user's names and the list of the output need the path after renaming.

use std::borrow::Cow;

use regex::Regex;

use super::facts::TensorFacts;

/// The renames of some `model_type`s: regular expressions and what replaces their first match, applied in order.
struct Table {
    model_types: &'static [&'static str],
    /// The renamed paths start with `model.`, which base models do not have.
    prefixed: bool,
    renames: &'static [(&'static str, &'static str)],
}

const TABLES: &[Table] = &[
    // The parts of multimodal models moved under `model.`.
    Table {
        prefixed: true,
        model_types: &[
            "aria",
            "audioflamingo3",
            "aya_vision",
            "emu3",
            "fuyu",
            "gemma3",
            "glmasr",
            "got_ocr2",
            "granite_speech",
            "granite_speech_plus",
            "internvl",
            "llava",
            "llava_next",
            "llava_next_video",
            "llava_onevision",
            "mistral3",
            "mllama",
            "musicflamingo",
            "paligemma",
            "pp_chart2table",
            "qwen2_audio",
            "vibevoice_asr",
            "video_llava",
            "vipllava",
            "voxtral",
            "voxtral_realtime",
        ],
        renames: &[
            (r"^(?:language_model|text_model)\.lm_head", "lm_head"),
            (r"^(?:model\.)?language_model\.model", "model.language_model"),
            (r"^text_model\.model", "model.text_model"),
            (
                r"^(acoustic_tokenizer_encoder|audio_tower|encoder|image_newline|image_tower|language_model|multi_modal_projector|projector|semantic_tokenizer_encoder|text_model|video_tower|vision_embed_tokens|vision_model|vision_tower|vqmodel)",
                "model.$1",
            ),
        ],
    },
    Table {
        prefixed: true,
        model_types: &["qwen2_vl", "qwen2_5_vl", "paddleocr_vl", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"],
        renames: &[
            (r"^thinker\.", ""),
            (r"^mlp_AR", "model.projector"),
            (r"^(visual|audio_tower)", "model.$1"),
            (r"^model\.(embed_tokens|layers|norm)\b", "model.language_model.$1"),
        ],
    },
    Table {
        prefixed: false,
        model_types: &["qwen2_5_omni"],
        renames: &[
            (r"^thinker\.(visual|audio_tower)", "thinker.model.$1"),
            (r"^thinker\.model\.(embed_tokens|layers|norm)\b", "thinker.model.language_model.$1"),
        ],
    },
    Table {
        prefixed: false,
        model_types: &["audio-spectrogram-transformer", "deit", "ijepa", "vit", "vit_mae", "vit_msn", "vivit"],
        renames: &[
            (r"(^|\.)encoder\.layer\.", "${1}layers."),
            (r"attention\.query", "q_proj"),
            (r"attention\.key", "k_proj"),
            (r"attention\.value", "v_proj"),
            (r"attention\.output\.dense", "attention.o_proj"),
            (r"intermediate\.dense", "mlp.fc1"),
            (r"output\.dense", "mlp.fc2"),
        ],
    },
    Table {
        prefixed: false,
        model_types: &["depth_anything", "depth_pro", "dinov2", "dinov2_with_registers", "prompt_depth_anything"],
        renames: &[
            (r"attention\.attention\.query", "attention.q_proj"),
            (r"attention\.attention\.key", "attention.k_proj"),
            (r"attention\.attention\.value", "attention.v_proj"),
            (r"attention\.output\.dense", "attention.o_proj"),
        ],
    },
    Table {
        prefixed: false,
        model_types: &["swin"],
        renames: &[
            (r"attention\.self\.query", "attention.q_proj"),
            (r"attention\.self\.key", "attention.k_proj"),
            (r"attention\.self\.value", "attention.v_proj"),
            (r"attention\.output\.dense", "attention.o_proj"),
            (r"intermediate\.dense", "mlp.fc1"),
            (r"output\.dense", "mlp.fc2"),
        ],
    },
    Table {
        prefixed: false,
        model_types: &["segformer"],
        renames: &[
            (r"encoder\.patch_embeddings\.(\d+)\.", "stages.$1.patch_embeddings."),
            (r"encoder\.block\.(\d+)\.", "stages.$1.blocks."),
            (r"attention\.self\.query", "attention.q_proj"),
            (r"attention\.self\.key", "attention.k_proj"),
            (r"attention\.self\.value", "attention.v_proj"),
            (r"attention\.output\.dense", "attention.o_proj"),
            (r"mlp\.dense1", "mlp.fc1"),
            (r"mlp\.dense2", "mlp.fc2"),
            (r"decode_head\.linear_c", "decode_head.linear_projections"),
        ],
    },
    Table {
        prefixed: false,
        model_types: &["mimi"],
        renames: &[(r"^(encoder|decoder)_transformer\.", "$1.${1}_transformer.")],
    },
    Table {
        prefixed: false,
        model_types: &["csm", "kyutai_speech_to_text"],
        renames: &[(r"^codec_model\.(encoder|decoder)_transformer\.", "codec_model.$1.${1}_transformer.")],
    },
    Table { prefixed: false, model_types: &["gpt_neox"], renames: &[(r"^embed_out", "lm_head")] },
    Table { prefixed: false, model_types: &["cohere_asr"], renames: &[(r"^log_softmax\.mlp\.layer0", "proj_out")] },
    Table {
        prefixed: false,
        model_types: &["inkling2", "inkling2_text", "inkling_mm_model"],
        renames: &[(r"^model\.llm\.unembed", "lm_head")],
    },
    Table { prefixed: false, model_types: &["ultrabert"], renames: &[(r"^cls", "head.decoder")] },
    Table { prefixed: false, model_types: &["ultravbert"], renames: &[(r"^head\.decoder", "lm_head")] },
    Table { prefixed: false, model_types: &["mistral_large4"], renames: &[(r"^output", "lm_head")] },
    Table { prefixed: false, model_types: &["deepseek_v4"], renames: &[(r"^head", "lm_head")] },
    Table {
        prefixed: false,
        model_types: &["minimax", "minimax_m2", "mixtral", "phimoe"],
        renames: &[(r"\.block_sparse_moe\.", ".mlp.")],
    },
    Table { prefixed: false, model_types: &["hy_v3"], renames: &[(r"\.shared_mlp\.", ".shared_experts.")] },
    Table { prefixed: false, model_types: &["laguna"], renames: &[(r"\.shared_expert\.", ".shared_experts.")] },
    Table { prefixed: false, model_types: &["nemotron_h"], renames: &[(r"^backbone\.", "model.")] },
    Table { prefixed: false, model_types: &["timesfm2_5"], renames: &[("ff0", "fc1"), ("ff1", "fc2")] },
    Table {
        prefixed: false,
        model_types: &["nomic_bert"],
        renames: &[
            (r"encoder\.layers\.", "layers."),
            (r"\.attn\.", ".self_attn."),
            (r"self_attn\.out_proj", "self_attn.o_proj"),
            (r"mlp\.fc11", "mlp.up_proj"),
            (r"mlp\.fc12", "mlp.gate_proj"),
            (r"mlp\.fc2", "mlp.down_proj"),
        ],
    },
    Table {
        prefixed: false,
        model_types: &["jina_embeddings_v3"],
        renames: &[
            (r"encoder\.layers\.", "layers."),
            (r"\.mixer\.", ".self_attn."),
            (r"self_attn\.out_proj", "self_attn.o_proj"),
        ],
    },
    Table {
        prefixed: false,
        model_types: &["gte"],
        renames: &[(r"encoder\.layer\.", "layers."), (r"\.attention\.", ".self_attn.")],
    },
];

/// The `model_type`s whose modules transformers renames in other ways.
pub(super) static RENAMED_OTHERWISE: &[&str] = &[
    "altclip",
    "axk2",
    "bailing_hybrid",
    "beit",
    "chmv2",
    "cohere_asr",
    "colpali",
    "cosmos3_edge",
    "cosmos3_omni",
    "d_fine",
    "deepseek_v4",
    "dinov3_convnext",
    "dinov3_vit",
    "dots3_note",
    "ernie4_5_vl_moe",
    "glm5_next",
    "glm5_next_text",
    "gradium_phonon_tts",
    "grounding-dino",
    "hrm_text",
    "hy_v4",
    "hyperclovax_vision_v2",
    "inkling2",
    "inkling2_text",
    "inkling_mm_model",
    "kimi_k25",
    "kimi_linear",
    "lfm3_vl",
    "lfm3_vl_vision",
    "lw_detr",
    "mask2former",
    "maskformer",
    "minimax_m3_vl",
    "mistral_large4",
    "mistral_large4_text",
    "mm-grounding-dino",
    "molmo2",
    "molmo2_text",
    "nemo_speechlm",
    "nemotron_h_omni",
    "oneformer",
    "pi0",
    "pixio",
    "pp_doclayout_v2",
    "pp_doclayout_v3",
    "pp_doclayout_v4",
    "qianfan_ocr",
    "radio",
    "rf_detr",
    "rt_detr",
    "rt_detr_v2",
    "sam3_tracker",
    "sam3_tracker_video",
    "sam3_video",
    "sapiens2",
    "shieldgemma2",
    "step3p7",
    "swin",
    "t5gemma2",
    "tipsv2",
    "tipsv2_dpt",
    "tipsv2_text_model",
    "tipsv2_vision_model",
    "ultrabert",
    "unlimited_ocr",
    "vision-encoder-decoder",
    "vision-text-dual-encoder",
    "vit_mae",
    "zoedepth",
];

/// Names under which classes with a head commonly hold the base model.
const PREFIXES: [&str; 6] = ["model", "transformer", "bert", "roberta", "deberta", "backbone"];

/// How one checkpoint's names become module paths.
pub(super) struct Renames {
    renames: Vec<(Regex, &'static str)>,
    /// A prefix that the checkpoint has and a base model (`LlamaModel`) has not.
    strip: Option<String>,
    /// The names are those of the base model, which the class holds under a prefix of its own.
    pub unprefixed: bool,
    /// The class is a base model (`LlamaModel`).
    pub is_base: bool,
    doubtful: bool,
}

impl Renames {
    pub fn new(model_type: Option<&str>, architecture: Option<&str>, tensors: &[TensorFacts<'_>]) -> Self {
        let tables = TABLES.iter().filter(|table| model_type.is_some_and(|name| table.model_types.contains(&name)));
        let is_base = architecture.is_some_and(|name| name.ends_with("Model") && !name.contains("Head"));
        let mut renames = Self {
            strip: (is_base && tables.clone().any(|table| table.prefixed)).then(|| "model".to_owned()),
            renames: tables
                .flat_map(|table| table.renames)
                .filter_map(|(pattern, replacement)| Some((Regex::new(pattern).ok()?, *replacement)))
                .collect(),
            unprefixed: false,
            is_base,
            doubtful: model_type.is_some_and(|name| RENAMED_OTHERWISE.binary_search(&name).is_ok()),
        };
        let own = model_type.map(|name| name.replace('-', "_"));
        let is_prefix = |part: &str| PREFIXES.contains(&part) || own.as_deref() == Some(part);
        if is_base && renames.strip.is_none() {
            // The body of a model with a head, for the class without one: everything lies under one prefix.
            let heads = ["lm_head", "cls", "classifier", "score", "qa_outputs", "embed_out"];
            let mut body = tensors.iter().map(|tensor| first(tensor.name)).filter(|part| !heads.contains(part));
            let prefix = body.next().filter(|part| is_prefix(part));
            renames.strip = prefix.filter(|prefix| body.all(|part| part == *prefix)).map(str::to_owned);
        } else if !is_base {
            renames.unprefixed = !tensors.iter().any(|tensor| is_prefix(first(&renames.apply(tensor.name))));
        }
        renames
    }

    /// The name under which classes with a head hold the base model: that of the architecture, where it is known, else
    /// what the paths begin with.
    pub fn base_prefix(&self, known: Option<String>, kept: &[String], converted: &[String]) -> Option<String> {
        known.or_else(|| {
            let mut starts = kept.iter().chain(converted).map(|path| first(path));
            starts.find(|start| PREFIXES.contains(start)).map(str::to_owned)
        })
    }

    /// A note where a skip list may name modules as transformers does not.
    pub fn doubt(&self) -> Option<String> {
        self.doubtful.then(|| {
            "transformers renames modules of this architecture in ways that the rules do not know: \
             llm_int8_skip_modules has the checkpoint's names"
                .to_owned()
        })
    }

    /// The path of the module that a checkpoint calls `module`.
    pub fn apply<'a>(&self, module: &'a str) -> Cow<'a, str> {
        let mut path = Cow::Borrowed(module);
        for (pattern, replacement) in &self.renames {
            if let Cow::Owned(renamed) = pattern.replace(&path, *replacement) {
                path = Cow::Owned(renamed);
            }
        }
        if let Some(rest) = self.strip.as_deref().and_then(|strip| path.strip_prefix(strip)?.strip_prefix('.')) {
            path = Cow::Owned(rest.to_owned());
        }
        path
    }
}

fn first(path: &str) -> &str {
    path.split('.').next().unwrap_or("")
}
