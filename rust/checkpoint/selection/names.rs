//! From a checkpoint's names to the paths of transformers' modules.
//!
//! Checkpoints keep the names they were published with; transformers renames while loading. Skip lists speak of its
//! modules, so both the user's names and the list of the output need the path after renaming.

use std::borrow::Cow;

use regex::Regex;

use super::TensorFacts;

/// The renames of some `model_type`s: regular expressions and what replaces their first match, applied in order.
struct Table {
    model_types: &'static [&'static str],
    renames: &'static [(&'static str, &'static str)],
}

const TABLES: &[Table] = &[
    // The parts of multimodal models moved under `model.`.
    Table {
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
        model_types: &["qwen2_vl", "qwen2_5_vl", "paddleocr_vl", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"],
        renames: &[
            (r"^thinker\.", ""),
            (r"^mlp_AR", "model.projector"),
            (r"^(visual|audio_tower)", "model.$1"),
            (r"^model\.(embed_tokens|layers|norm)\b", "model.language_model.$1"),
        ],
    },
    Table {
        model_types: &["qwen2_5_omni"],
        renames: &[
            (r"^thinker\.(visual|audio_tower)", "thinker.model.$1"),
            (r"^thinker\.model\.(embed_tokens|layers|norm)\b", "thinker.model.language_model.$1"),
        ],
    },
    Table {
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
        model_types: &["depth_anything", "depth_pro", "dinov2", "dinov2_with_registers", "prompt_depth_anything"],
        renames: &[
            (r"attention\.attention\.query", "attention.q_proj"),
            (r"attention\.attention\.key", "attention.k_proj"),
            (r"attention\.attention\.value", "attention.v_proj"),
            (r"attention\.output\.dense", "attention.o_proj"),
        ],
    },
    Table {
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
    Table { model_types: &["mimi"], renames: &[(r"^(encoder|decoder)_transformer\.", "$1.${1}_transformer.")] },
    Table {
        model_types: &["csm", "kyutai_speech_to_text"],
        renames: &[(r"^codec_model\.(encoder|decoder)_transformer\.", "codec_model.$1.${1}_transformer.")],
    },
    Table { model_types: &["gpt_neox"], renames: &[(r"^embed_out", "lm_head")] },
    Table { model_types: &["hy_v3"], renames: &[(r"\.shared_mlp\.", ".shared_experts.")] },
    Table { model_types: &["laguna"], renames: &[(r"\.shared_expert\.", ".shared_experts.")] },
    Table { model_types: &["nemotron_h"], renames: &[(r"^backbone\.", "model.")] },
    Table { model_types: &["timesfm2_5"], renames: &[("ff0", "fc1"), ("ff1", "fc2")] },
    Table { model_types: &["dinov3_vit"], renames: &[(r"^layer\.", "model.layer.")] },
    Table {
        model_types: &["nomic_bert"],
        renames: &[
            (r"encoder\.layers\.", "layers."),
            (r"\.attn\.", ".self_attn."),
            (r"self_attn\.out_proj", "self_attn.o_proj"),
        ],
    },
    Table {
        model_types: &["jina_embeddings_v3"],
        renames: &[
            (r"encoder\.layers\.", "layers."),
            (r"\.mixer\.", ".self_attn."),
            (r"self_attn\.out_proj", "self_attn.o_proj"),
        ],
    },
    Table { model_types: &["gte"], renames: &[(r"encoder\.layer\.", "layers."), (r"\.attention\.", ".self_attn.")] },
];

/// The `model_type`s whose modules transformers renames in other ways.
static RENAMED_OTHERWISE: &[&str] = &[];

/// How one checkpoint's names become module paths.
pub(super) struct Renames {
    renames: Vec<(Regex, &'static str)>,
    /// A prefix that the checkpoint has and a base model (`LlamaModel`) has not.
    strip: Option<String>,
    /// The names are those of the base model, which the class holds under a prefix of its own.
    pub unprefixed: bool,
    doubtful: bool,
}

impl Renames {
    pub fn new(model_type: Option<&str>, architecture: Option<&str>, tensors: &[TensorFacts<'_>]) -> Self {
        let renames = TABLES
            .iter()
            .filter(|table| model_type.is_some_and(|name| table.model_types.contains(&name)))
            .flat_map(|table| table.renames)
            .filter_map(|(pattern, replacement)| Some((Regex::new(pattern).ok()?, *replacement)))
            .collect::<Vec<_>>();
        let own = model_type.map(|name| name.replace('-', "_"));
        let prefixes = ["model", "transformer", "bert", "roberta", "deberta", "backbone", "encoder_decoder"];
        let is_prefix = |part: &str| prefixes.contains(&part) || own.as_deref() == Some(part);
        let is_base = architecture.is_some_and(|name| name.ends_with("Model") && !name.contains("Head"));
        let first =
            |tensor: &TensorFacts<'_>| tensor.name.split('.').next().filter(|part| is_prefix(part)).map(str::to_owned);
        let prefix = tensors.iter().find_map(first);
        Self {
            unprefixed: renames.is_empty() && !is_base && prefix.is_none(),
            strip: if is_base && !renames.is_empty() { Some("model".to_owned()) } else { prefix.filter(|_| is_base) },
            renames,
            doubtful: model_type.is_some_and(|name| RENAMED_OTHERWISE.binary_search(&name).is_ok()),
        }
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
