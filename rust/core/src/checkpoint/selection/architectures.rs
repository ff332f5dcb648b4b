//! What is known of architectures: the general rules' lists of names, and where transformers' classes differ.
//!
//! The general rules: a two-dimensional `NAME.weight` belongs to an `nn.Linear`, unless `NAME` ends like an embedding
//! table ([`is_embedding`]) or a router ([`ROUTERS`]), or lies in a list of experts. Linear layers are converted,
//! unless they are an output embedding ([`OUTPUT_EMBEDDINGS`]) or a bias-free `score`. The tables hold exceptions, by
//! `model_type` ([`FAMILIES`]) and by class ([`CLASSES`]); they were found by comparing the rules with what
//! transformers does to every class that it can build. [`super::known`] lists the `model_type`s where both agree.
//!
//! Paths are the last components of a module's path; `*` stands for any component, `^` for the start of the path.

use std::collections::HashSet;
use std::sync::LazyLock;

/// Where one family of models differs from the general rules.
#[derive(Debug)]
pub(super) struct Family {
    /// `model_type` of the configuration, or of a configuration nested in it.
    pub model_types: &'static [&'static str],
    /// Further output embeddings.
    pub output: &'static [&'static str],
    /// `_keep_in_fp32_modules`: matched like the names of a skip list, and never converted.
    pub float32: &'static [&'static str],
    /// Modules whose two-dimensional `weight` is not that of an `nn.Linear`.
    pub not_linear: &'static [&'static str],
    /// Linear layers that the general rules would take for something else.
    pub linear: &'static [&'static str],
    /// `Conv1D` modules, whose weight is stored `[in, out]`.
    pub conv1d: &'static [&'static str],
    /// Weights that transformers splits or merges while loading (the module, or a tensor that is not a `weight`), and
    /// the linear layers beside it that it makes of them.
    pub fused: &'static [(&'static str, &'static [&'static str])],
}

const NONE: Family =
    Family { model_types: &[], output: &[], float32: &[], not_linear: &[], linear: &[], conv1d: &[], fused: &[] };

const QKV: &[&str] = &["q_proj", "k_proj", "v_proj"];

/// The families that differ.
pub(super) static FAMILIES: &[Family] = &[
    Family {
        model_types: &["gpt2", "gpt-sw3", "openai-gpt", "imagegpt", "decision_transformer", "clvp"],
        conv1d: &[
            "attn.c_attn",
            "attn.c_proj",
            "attn.q_attn",
            "crossattention.c_attn",
            "crossattention.c_proj",
            "crossattention.q_attn",
            "mlp.c_fc",
            "mlp.c_proj",
        ],
        ..NONE
    },
    // `_keep_in_fp32_modules`.
    Family { model_types: &["t5", "mt5", "umt5", "pop2piano", "udop"], float32: &["wo"], ..NONE },
    Family { model_types: &["blip-2"], float32: &["qformer"], ..NONE },
    Family {
        model_types: &["axk2", "deepseek_v32", "glm_moe_dsa", "mistral_large4", "mistral_large4_text"],
        float32: &["indexer.weights_proj"],
        ..NONE
    },
    Family {
        model_types: &["deepseek_v4"],
        output: &["^head"],
        float32: &[
            "compressor.wgate",
            "compressor.wkv",
            "compressor.gate_proj",
            "compressor.kv_proj",
            "indexer.gate_proj",
            "indexer.kv_proj",
            "scorer.weights_proj",
            "indexer.weights_proj",
        ],
        not_linear: &["attn.wo_a", "self_attn.o_a_proj"],
        ..NONE
    },
    // Output embeddings under another name.
    Family {
        model_types: &["whisper", "moonshine", "moonshine_streaming", "canary", "cohere_asr"],
        output: &["^proj_out", "log_softmax.mlp.layer0"],
        ..NONE
    },
    Family { model_types: &["biogpt", "trocr"], output: &["^output_projection"], ..NONE },
    Family { model_types: &["fsmt"], output: &["decoder.output_projection"], ..NONE },
    Family { model_types: &["modernbert", "modernbert-decoder"], output: &["^decoder"], ..NONE },
    Family { model_types: &["ultrabert"], output: &["head.decoder", "^cls"], ..NONE },
    Family { model_types: &["ultravbert"], output: &["head.decoder"], ..NONE },
    Family { model_types: &["flaubert", "xlm"], output: &["pred_layer.proj"], ..NONE },
    Family { model_types: &["xlnet"], output: &["^lm_loss"], ..NONE },
    Family { model_types: &["gpt_neox_japanese"], output: &["^embed_out"], ..NONE },
    Family { model_types: &["convbert", "electra"], output: &["^generator_lm_head"], ..NONE },
    Family { model_types: &["distilbert"], output: &["^vocab_projector"], ..NONE },
    Family { model_types: &["t5gemma", "t5gemma2"], output: &["lm_head.out_proj"], ..NONE },
    Family { model_types: &["rwkv"], output: &["^head"], ..NONE },
    Family { model_types: &["git", "mistral_large4"], output: &["^output"], ..NONE },
    Family { model_types: &["dia"], output: &["^logits_dense"], ..NONE },
    Family { model_types: &["higgs_audio_v2"], output: &["^audio_lm_head"], ..NONE },
    Family {
        model_types: &["musicgen", "musicgen_decoder", "musicgen_melody", "musicgen_melody_decoder"],
        output: &["lm_heads.*"],
        ..NONE
    },
    Family { model_types: &["inkling2", "inkling2_text", "inkling_mm_model"], output: &["llm.unembed"], ..NONE },
    Family { model_types: &["luke"], output: &["entity_predictions.decoder"], ..NONE },
    // Modules of their own in the place of linear layers. The layers of Falcon are a subclass of `nn.Linear`, which
    // transformers does not convert.
    Family {
        model_types: &["falcon"],
        not_linear: &[
            "self_attention.query_key_value",
            "self_attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        ],
        ..NONE
    },
    Family {
        model_types: &["ibert"],
        not_linear: &["self.query", "self.key", "self.value", "output.dense", "intermediate.dense"],
        ..NONE
    },
    Family {
        model_types: &["granitemoe", "granitemoeshared", "granitemoehybrid"],
        not_linear: &["block_sparse_moe.router.layer"],
        ..NONE
    },
    // Embedding tables under the name of something else.
    Family { model_types: &["idefics"], not_linear: &["lm_head"], ..NONE },
    Family { model_types: &["ctrl"], not_linear: &["transformer.w", "^w"], ..NONE },
    Family { model_types: &["cpmant"], not_linear: &["input_embedding"], ..NONE },
    Family { model_types: &["eomt", "eomt_dinov3", "videomt"], not_linear: &["^query"], ..NONE },
    Family { model_types: &["inkling_mm_model"], not_linear: &["audio_tower.encoder", "audio.encoder"], ..NONE },
    Family {
        model_types: &["sam3", "sam3_lite_text", "sam3_video"],
        not_linear: &["detr_decoder.reference_points"],
        ..NONE
    },
    // Linear layers under the name of a router.
    Family { model_types: &["afmoe"], linear: &["router.gate"], ..NONE },
    Family { model_types: &["d_fine", "deimv2"], linear: &["gateway.gate"], ..NONE },
    // Projections that one tensor holds together and transformers splits while loading, or the other way round.
    Family { model_types: &["nomic_bert"], fused: &[("attn.Wqkv", QKV)], ..NONE },
    Family { model_types: &["jina_embeddings_v3"], fused: &[("mixer.Wqkv", QKV)], ..NONE },
    Family {
        model_types: &["gte"],
        fused: &[("attention.qkv_proj", QKV), ("mlp.up_gate_proj", &["up_proj", "gate_proj"])],
        ..NONE
    },
    Family {
        model_types: &["hrm_text"],
        fused: &[
            ("attn.gqkv_proj", &["gate_proj", "q_proj", "k_proj", "v_proj"]),
            ("mlp.gate_up_proj", &["gate_proj", "up_proj"]),
        ],
        ..NONE
    },
    Family { model_types: &["gradium_phonon_tts"], fused: &[("self_attn.in_proj", QKV)], ..NONE },
    Family { model_types: &["kimi_k25"], fused: &[("wqkv", QKV)], ..NONE },
    Family {
        model_types: &["minimax_m3_vl"],
        fused: &[("shared_experts.gate_proj", &["gate_up_proj"]), ("shared_experts.up_proj", &["gate_up_proj"])],
        ..NONE
    },
    Family {
        model_types: &["mistral_large4"],
        fused: &[
            ("vision_encoder.transformer.layers.*.attention.wq", &["q_proj"]),
            ("vision_encoder.transformer.layers.*.attention.wk", &["k_proj"]),
            ("vision_tower.transformer.layers.*.attention.wq", &["q_proj"]),
            ("vision_tower.transformer.layers.*.attention.wk", &["k_proj"]),
        ],
        ..NONE
    },
    Family {
        model_types: &["molmo2", "molmo2_text"],
        fused: &[("self_attn.att_proj", QKV), ("mlp.ff_proj", &["up_proj", "gate_proj"])],
        ..NONE
    },
    Family { model_types: &["nemo_speechlm", "nemotron3_5_transcribe"], fused: &[("attn.w_qkv", QKV)], ..NONE },
    Family {
        model_types: &["qianfan_ocr", "radio", "nemotron_h_omni", "tipsv2", "tipsv2_vision_model", "tipsv2_dpt"],
        fused: &[("attn.qkv", QKV)],
        ..NONE
    },
    // `nn.MultiheadAttention` in the checkpoint, linear layers in the model.
    Family {
        model_types: &["rf_detr"],
        linear: &["decoder.layers.*.self_attn.out_proj"],
        fused: &[("decoder.layers.*.self_attn.in_proj_weight", QKV)],
        ..NONE
    },
    Family {
        model_types: &["tipsv2", "tipsv2_text_model", "step3p7"],
        linear: &["resblocks.*.attn.out_proj"],
        fused: &[("resblocks.*.attn.in_proj_weight", QKV)],
        ..NONE
    },
    Family { model_types: &["sapiens2"], fused: &[("ffn.w12", &["gate_proj", "up_proj"])], ..NONE },
    Family {
        model_types: &["unlimited_ocr"],
        fused: &[("vision_model.transformer.layers.*.self_attn.qkv_proj", QKV)],
        ..NONE
    },
];

/// Where single classes differ.
pub(super) struct ClassFacts {
    /// The names in `architectures`.
    pub classes: &'static [&'static str],
    /// The module of the last parameter, which transformers keeps. `$` stands for the largest number in its place.
    pub last: &'static [&'static str],
    /// Further modules that share their weight with another one.
    pub tied: &'static [&'static str],
    /// Names for a skip list that cover modules whose weight the checkpoint holds under another module's name.
    pub shared: &'static [&'static str],
    /// What looks like an output embedding and is not one.
    pub not_output: &'static [&'static str],
}

const PLAIN: ClassFacts = ClassFacts { classes: &[], last: &[], tied: &[], shared: &[], not_output: &[] };

/// The classes that differ.
pub(super) static CLASSES: &[ClassFacts] = &[
    ClassFacts {
        classes: &[
            "Aimv2Model",
            "AltCLIPModel",
            "BlipModel",
            "CLIPModel",
            "CLIPSegModel",
            "ChineseCLIPModel",
            "MetaClip2Model",
            "OwlViTModel",
            "Owlv2Model",
            "VisionTextDualEncoderModel",
        ],
        last: &["^text_projection"],
        ..PLAIN
    },
    ClassFacts {
        classes: &["CTRLForSequenceClassification", "ModernBertDecoderForSequenceClassification"],
        last: &["^classifier"],
        ..PLAIN
    },
    ClassFacts {
        classes: &["SplinterForPreTraining", "SplinterForQuestionAnswering"],
        last: &["^splinter_qass.end_classifier"],
        ..PLAIN
    },
    ClassFacts {
        classes: &["VoxtralModel", "VoxtralRealtimeModel"],
        last: &["multi_modal_projector.linear_2"],
        ..PLAIN
    },
    ClassFacts {
        classes: &["NemotronH_Omni_Reasoning_V3"],
        last: &["multi_modal_projector.linear_2", "^mlp1.3"],
        not_output: &["lm_head"],
        ..PLAIN
    },
    ClassFacts { classes: &["OlmoModel"], last: &["layers.$.mlp.down_proj"], ..PLAIN },
    ClassFacts { classes: &["NanoChatModel"], last: &["layers.$.mlp.fc2"], ..PLAIN },
    ClassFacts { classes: &["HrmTextModel"], last: &["H_module.layers.$.mlp.down_proj"], ..PLAIN },
    ClassFacts { classes: &["Gemma3nTextModel"], last: &["altup_unembed_projections.$"], ..PLAIN },
    ClassFacts {
        classes: &["ClvpModelForConditionalGeneration"],
        last: &["^speech_encoder_model.projection"],
        not_output: &["lm_head"],
        ..PLAIN
    },
    ClassFacts {
        classes: &["EmbeddingGemma2Model", "EmbeddingGemma2TextModel"],
        last: &["embedding_projection"],
        ..PLAIN
    },
    ClassFacts { classes: &["GradiumPhononTTSModel"], last: &["^duration_delta_proj"], ..PLAIN },
    ClassFacts { classes: &["Inkling2Model", "Inkling2VisionModel"], last: &["merger.linear_2"], ..PLAIN },
    ClassFacts { classes: &["LayoutLMv3Model"], last: &["encoder.rel_pos_y_bias"], ..PLAIN },
    ClassFacts { classes: &["Llama4VisionModel"], last: &["vision_adapter.mlp.fc2"], ..PLAIN },
    ClassFacts { classes: &["MuseGlimmerModel"], last: &["^vision_projection"], ..PLAIN },
    ClassFacts { classes: &["PeAudioModel"], last: &["audio_head.proj"], tied: &["text_audio_head.proj"], ..PLAIN },
    ClassFacts { classes: &["Qwen3ASRForTokenClassification"], last: &["^score"], ..PLAIN },
    ClassFacts { classes: &["PeAudioEncoder"], last: &["^output"], ..PLAIN },
    ClassFacts { classes: &["PocketTTSModel"], last: &["^audio_latent_proj"], ..PLAIN },
    ClassFacts { classes: &["Qwen3ASREncoder"], last: &["^conv_out"], ..PLAIN },
    ClassFacts {
        classes: &["Qwen4ExpModel", "Qwen4ExpTextModel"],
        last: &["hyper_connection_mixer.input_mix_weight_up"],
        ..PLAIN
    },
    ClassFacts { classes: &["Sam3LiteTextTextModel"], last: &["^projection"], ..PLAIN },
    ClassFacts { classes: &["Step3p7Model"], last: &["multi_modal_projector", "vit_large_projector"], ..PLAIN },
    ClassFacts {
        classes: &["TimesFm2_5ModelForPrediction"],
        last: &["output_projection_quantiles.residual_layer"],
        ..PLAIN
    },
    ClassFacts {
        classes: &["GroundingDinoForObjectDetection", "MMGroundingDinoForObjectDetection"],
        tied: &["bbox_embed.*.layers.*"],
        shared: &["bbox_embed", "model.decoder.bbox_embed"],
        ..PLAIN
    },
    ClassFacts {
        classes: &["DFineForObjectDetection", "Deimv2ForObjectDetection", "RTDetrV2ForObjectDetection"],
        tied: &["bbox_embed.*.layers.*", "class_embed.*"],
        shared: &["bbox_embed", "class_embed", "model.decoder.bbox_embed", "model.decoder.class_embed"],
        ..PLAIN
    },
    ClassFacts {
        classes: &["PPDocLayoutV3ForObjectDetection", "PPDocLayoutV3Model"],
        tied: &["enc_score_head", "enc_bbox_head.layers.*", "decoder.class_embed", "decoder.bbox_embed.layers.*"],
        shared: &[
            "enc_bbox_head",
            "enc_score_head",
            "model.enc_bbox_head",
            "model.enc_score_head",
            "decoder.bbox_embed",
            "decoder.class_embed",
            "model.decoder.bbox_embed",
            "model.decoder.class_embed",
        ],
        ..PLAIN
    },
    ClassFacts {
        classes: &["GraniteSpeech5ForCTC"],
        tied: &["encoder.out", "^ctc_head"],
        shared: &["encoder.out", "ctc_head"],
        ..PLAIN
    },
    ClassFacts {
        classes: &["NeoMMEForMaskedLM"],
        tied: &["embed_tokens.embedding_projection", "^unembedding_projection"],
        shared: &["embed_tokens.embedding_projection", "unembedding_projection"],
        ..PLAIN
    },
    ClassFacts {
        classes: &["BarkModel"],
        not_output: &["semantic.lm_head", "coarse_acoustics.lm_head"],
        tied: &["fine_acoustics.lm_heads.*"],
        shared: &["fine_acoustics.lm_heads"],
        ..PLAIN
    },
    ClassFacts { classes: &["Qwen2_5OmniForConditionalGeneration"], not_output: &["thinker.lm_head"], ..PLAIN },
    ClassFacts {
        classes: &["SLANetForTableRecognition", "SLANeXtForTableRecognition"],
        not_output: &["score"],
        ..PLAIN
    },
];

/// Ends of the paths of output embeddings.
pub(super) static OUTPUT_EMBEDDINGS: &[&str] = &["lm_head", "lm_head.decoder", "predictions.decoder", "embed_out"];

/// What lies beside an output embedding, and where that is: a tied one is in the model, but not in the checkpoint.
pub(super) static BESIDE_OUTPUT: &[(&str, &str)] = &[
    (".transform.dense", ".decoder"),
    ("lm_head.dense", "lm_head.decoder"),
    ("predictions.dense", "predictions.decoder"),
];

/// Names of Mixture-of-Experts routers, whose weight is a parameter of their own.
pub(super) static ROUTERS: &[&str] = &["gate", "router"];

/// Names of output layers at large, for models that nobody knows; counted only outside numbered layers.
pub(super) static OUTPUT_NAMES: &[&str] = &[
    "lm_head",
    "embed_out",
    "output",
    "output_layer",
    "output_projection",
    "output_proj",
    "out_head",
    "head",
    "unembed",
    "logits",
    "to_logits",
    "vocab_head",
    "proj_out",
    "lm_output",
];

/// Names of embedding tables of tokens (`nn.Embedding`).
#[rustfmt::skip]
static TOKEN_EMBEDDINGS: &[&str] = &[
    "embed_tokens", "embeddings", "embedding", "embed", "embed_in", "shared", "wte", "token_embedding",
    "tok_embeddings", "tokens_embed", "word_embedding", "word_embeddings", "embed_char", "embed_audio_tokens",
    "embed_text_tokens", "encoder_hash_tok_embedding", "text_token_embedding", "HashBucketCodepointEmbedder",
    "input_embeds_layer", "input_embeds_layers", "generation_embeddings", "visual_embeddings_table", "codec_embed",
    "codebook", "value_embeddings", "embed_tokens_per_layer", "unit_embedding", "audio_bos_eos_token",
];

/// Names of other embedding tables.
#[rustfmt::skip]
static EMBEDDINGS: &[&str] = &[
    // Positions.
    "wpe", "position_embedding", "position_embeddings", "embed_positions", "pos_embed", "pos_emb", "positions_embed",
    "position_embeds_layer", "position_embedding_table", "text_position_embedding", "x_position_embeddings",
    "y_position_embeddings", "h_position_embeddings", "w_position_embeddings", "box_position_embeddings",
    "char_position_embeddings", "query_position_embeddings", "row_position_embeddings", "col_position_embeddings",
    "visual_position_embeddings", "row_embeddings", "column_embeddings", "row_embedder", "column_embedder",
    "tile_embedding", "relative_attention_bias", "rel_attn_embed", "rel_embeddings", "rel_pos_emb",
    "distance_embedding", "pe_k", "embed_timestep", "freq_emb", "bias_values", "ngram_embeddings", "embed_global",
    // Types, languages, speakers.
    "token_type_embeddings", "visual_token_type_embeddings", "segment_embedding", "segment_emb", "entity_embeddings",
    "label_embeddings", "label_embed", "cls_embed", "level_embed", "shape_embed", "pronunciation_embed",
    "xpath_tag_sub_embeddings", "xpath_subs_sub_embeddings", "speaker_embedding", "language_embedding",
    "num_speakers_embed",
    // Learned queries of detectors and segmenters.
    "denoising_class_embed", "no_mask_embed", "not_a_point_embed", "point_embed", "iou_token", "mask_tokens",
    "obj_score_token", "hq_token", "presence_token", "query_embed", "query_feat", "queries_embedder",
    "queries_features", "reference_point_embed", "refpoint_embed", "objective",
];

/// Is this the path of an embedding table?
pub(super) fn is_embedding(module: &str) -> bool {
    static NAMES: LazyLock<HashSet<&str>> =
        LazyLock::new(|| TOKEN_EMBEDDINGS.iter().chain(EMBEDDINGS).copied().collect());
    NAMES.contains(table_name(module))
}

/// Is this the path of an embedding table of tokens?
pub(super) fn is_token_table(module: &str) -> bool {
    TOKEN_EMBEDDINGS.contains(&table_name(module))
}

/// The items of a list count under the list's name, and so do `token_type_embeddings_0`, `_1`, …
fn table_name(module: &str) -> &str {
    let mut components = module.rsplit('.').skip_while(|name| name.bytes().all(|b| b.is_ascii_digit()));
    components.next().unwrap_or("").trim_end_matches(|c: char| c.is_ascii_digit()).trim_end_matches('_')
}
