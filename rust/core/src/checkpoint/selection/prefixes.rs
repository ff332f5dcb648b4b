//! Under which name the classes of an architecture hold their base model: `base_model_prefix` of transformers 5.23.
//!
//! `LlamaForCausalLM` holds a `LlamaModel` as `model`, so that the layer `model.layers.0` of the one is `layers.0` of the
//! other.

use super::known;

/// The prefix of a `model_type`; `None` for one that is not known.
pub(super) fn base_prefix(model_type: &str) -> Option<String> {
    if OWN.binary_search(&model_type).is_ok() {
        return Some(model_type.replace('-', "_"));
    }
    let others = OTHERS.iter().find(|(_, types)| types.contains(&model_type)).map(|(prefix, _)| *prefix);
    others.or_else(|| known::contains(model_type).then_some("model")).map(str::to_owned)
}

/// Those whose prefix is the `model_type`.
#[rustfmt::skip]
pub(super) static OWN: &[&str] = &[
    "aimv2", "albert", "align", "altclip", "audio-spectrogram-transformer", "beit", "bert", "biogpt", "bit", "blip",
    "bridgetower", "bros", "canine", "chinese_clip", "chmv2", "clap", "clip", "convbert", "convnext", "convnextv2",
    "cpmant", "cvt", "dac", "data2vec-audio", "data2vec-text", "data2vec-vision", "deberta", "decision_transformer",
    "deit", "depth_anything", "depth_pro", "dinat", "dinov2", "dinov2_with_registers", "distilbert", "dpt", "edgetam",
    "edgetam_video", "efficientloftr", "efficientnet", "electra", "encodec", "encoder-decoder", "eomt", "eomt_dinov3",
    "ernie", "esm", "esmc", "fastspeech2_conformer", "flava", "fnet", "focalnet", "funnel", "git", "glpn", "gpt_neox",
    "gpt_neox_japanese", "groupvit", "gte", "hiera", "hubert", "ibert", "ijepa", "internvl_vision", "layoutlm",
    "layoutlmv2", "layoutlmv3", "led", "levit", "lightglue", "lilt", "longformer", "luke", "lw_detr_vit", "lxmert",
    "markuplm", "metaclip_2", "mgp-str", "mimi", "mobilebert", "mobilenet_v1", "mobilenet_v2", "mobilevit",
    "mobilevitv2", "mpnet", "mra", "neucodec", "nomic_bert", "nystromformer", "owlv2", "owlvit", "perceiver", "pixio",
    "pocket_tts_audio_tokenizer", "poolformer", "prompt_depth_anything", "prophetnet", "pvt", "pvt_v2", "reformer",
    "regnet", "rembert", "resnet", "rf_detr_dinov2", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "rwkv",
    "sam", "sam2", "sam2_video", "sam3_tracker", "sam3_video", "sam_hq", "seamless_m4t", "seamless_m4t_v2", "segformer",
    "sew", "sew-d", "siglip", "siglip2", "speech-encoder-decoder", "speecht5", "splinter", "superglue", "superpoint",
    "swiftformer", "swin", "swin2sr", "swinv2", "switch_transformers", "tapas", "textnet", "timesformer", "unispeech",
    "unispeech-sat", "vibevoice_acoustic_tokenizer", "videomae", "videomt", "vilt", "vision-encoder-decoder",
    "vision-text-dual-encoder", "visual_bert", "vit", "vitdet", "vits", "vivit", "vjepa2", "wav2vec2", "wav2vec2-bert",
    "wav2vec2-conformer", "wavlm", "xcodec", "xcodec2", "yoso", "zoedepth",
];

/// Those with another one than that or `model`.
#[rustfmt::skip]
static OTHERS: &[(&str, &[&str])] = &[
    ("aimv2", &["aimv2_vision_model"]),
    ("audio_model", &["pe_audio"]),
    ("audio_model.audio_encoder", &["pe_audio_encoder"]),
    ("audio_video_encoder", &["pe_audio_video_encoder"]),
    ("backbone", &["falcon_mamba", "mamba", "mamba2", "slanet", "slanext", "tipsv2_dpt", "uvdoc_backbone", "xlstm"]),
    ("bert", &["bert-generation", "big_bird", "megatron-bert"]),
    ("blip", &["blip-2", "blip_2_qformer", "instructblip", "instructblipvideo"]),
    ("chinese_clip", &["chinese_clip_vision_model"]),
    ("clip", &["clip_text_model", "clip_vision_model", "clipseg"]),
    ("deberta", &["deberta-v2"]),
    ("decoder", &["mimi_decoder", "pocket_tts_audio_tokenizer_decoder", "timesfm"]),
    ("detector_model", &["sam3", "sam3_lite_text"]),
    ("donut", &["donut-swin"]),
    ("edgetam", &["edgetam_vision_model"]),
    ("encoder", &["granite_speech5_encoder", "lasr_encoder", "mimi_encoder", "nemotron_asr_streaming_encoder",
        "parakeet_encoder", "pocket_tts_audio_tokenizer_encoder"]),
    ("hgnetv2", &["hgnet_v2"]),
    ("model.audio_tower", &["gemma4_audio"]),
    ("question_encoder", &["dpr"]),
    ("resnet", &["rt_detr_resnet"]),
    ("roberta", &["camembert", "jina_embeddings_v3", "xlm-roberta", "xlm-roberta-xl", "xmod"]),
    ("sam", &["sam_vision_model"]),
    ("sam2", &["sam2_hiera_det_model", "sam2_vision_model"]),
    ("sam3", &["sam3_vision_model", "sam3_vit_model"]),
    ("sam_hq", &["sam_hq_vision_model"]),
    ("text_model", &["tipsv2_text_model"]),
    ("timm_model", &["gemma3n_vision", "timm_wrapper"]),
    ("tracker_model", &["sam3_tracker_video"]),
    ("transformer", &["bloom", "codegen", "ctrl", "dbrx", "falcon", "flaubert", "gpt-sw3", "gpt2", "gpt_bigcode",
        "gpt_neo", "gptj", "imagegpt", "longt5", "mpt", "mt5", "openai-gpt", "pop2piano", "squeezebert", "t5",
        "udop", "umt5", "xlm", "xlnet"]),
    ("vibevoice_acoustic_tokenizer", &["vibevoice_acoustic_tokenizer_decoder", "vibevoice_acoustic_tokenizer_encoder"]),
    ("video_model", &["pe_video"]),
    ("video_model.video_encoder", &["pe_video_encoder"]),
    ("vision_encoder", &["pixtral"]),
    ("vision_model", &["mlcd", "mlcd_vision_model", "qianfan_ocr_vision", "siglip2_vision_model",
        "siglip_vision_model", "tipsv2_vision_model", "videoprism_vision_model"]),
    ("vit", &["vit_mae", "vit_msn", "vitpose", "vitpose_backbone", "yolos"]),
    ("vlm", &["colmodernvbert", "colpali", "colqwen2"]),
    ("x_clip", &["xclip"]),
];
