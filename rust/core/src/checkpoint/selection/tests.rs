//! The rules on hand-written checkpoints; `tests/offline/test_selection.py` compares them with transformers.

use proptest::prelude::*;
use safetensors::Dtype;
use serde_json::{Value, json};

use super::matching::SkipKey;
use super::*;
use crate::checkpoint::dtype::is_float;
use crate::checkpoint::options::QuantizeOptions;
use crate::error::Result;

fn facts<'a>(tensors: &'a [(&'a str, Vec<usize>)]) -> Vec<TensorFacts<'a>> {
    tensors.iter().map(|(name, shape)| TensorFacts { name, shape, dtype: Dtype::BF16 }).collect()
}

fn owned(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn llama_quantizes_its_projections() {
    let config = json!({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": false});
    let tensors = [
        ("model.embed_tokens.weight", vec![32, 8]),
        ("model.layers.0.self_attn.q_proj.weight", vec![8, 8]),
        ("model.layers.0.input_layernorm.weight", vec![8]),
        ("lm_head.weight", vec![32, 8]),
    ];
    let selection = select(Some(&config), Code::Unseen, &facts(&tensors), &QuantizeOptions::default(), None).unwrap();
    let reasons: Vec<&str> = selection.decisions.iter().map(|decision| decision.reason.as_str()).collect();
    assert_eq!(reasons, ["embedding", "linear weight", "norm", "output embedding"]);
    assert!(selection.known && selection.notes.is_empty());
    assert_eq!(selection.skip_modules, None);
}

/// A checkpoint of two layers whose output embedding is tied, and one with rules.
fn tied_llama(rules: &[&str], skip: &[&str]) -> Result<Selection> {
    let config = json!({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": true});
    let mut names = vec!["model.embed_tokens.weight".to_owned(), "model.norm.weight".to_owned()];
    for layer in 0..12 {
        for name in ["q_proj", "o_proj"] {
            names.push(format!("model.layers.{layer}.self_attn.{name}.weight"));
        }
    }
    let tensors: Vec<TensorFacts<'_>> = names
        .iter()
        .map(|name| TensorFacts { name, shape: if name.contains("norm") { &[8] } else { &[8, 8] }, dtype: Dtype::F16 })
        .collect();
    let options = QuantizeOptions {
        rules: rules.iter().map(|rule| rule.parse().unwrap()).collect(),
        skip: skip.iter().map(|name| (*name).to_owned()).collect(),
        ..QuantizeOptions::default()
    };
    select(Some(&config), Code::Unseen, &tensors, &options, None)
}

#[test]
fn the_skip_list_is_complete_and_short() {
    let skip = |rules: &[&str], names: &[&str]| tied_llama(rules, names).unwrap().skip_modules;
    assert_eq!(skip(&["o_proj=keep"], &[]), Some(owned(&["o_proj", "lm_head"])));
    assert_eq!(skip(&[r"layers\.1\.=keep"], &[]), Some(owned(&["model.layers.1", "layers.1", "lm_head"])));
    assert_eq!(skip(&[], &["model.layers.1"]), Some(owned(&["model.layers.1", "layers.1", "lm_head"])));
    let one = skip(&[r"layers\.1\.self_attn\.q=keep"], &[]);
    let both = ["model.layers.1.self_attn.q_proj", "layers.1.self_attn.q_proj", "lm_head"];
    assert_eq!(one, Some(owned(&both)));
    assert_eq!(skip(&["q_proj=fp4"], &[]), None);
}

#[test]
fn a_rule_that_can_do_nothing_is_an_error() {
    let error = tied_llama(&["embed_tokens=nf4"], &[]).unwrap_err().to_string();
    assert!(error.contains("model.embed_tokens.weight [8, 8]") && error.contains("embed_tokens=nf4"), "{error}");
    let notes = tied_llama(&["model=nf4"], &[]).unwrap().notes;
    assert_eq!(notes.len(), 1, "{notes:?}");
    assert!(notes[0].contains("2 tensors"), "{notes:?}");
}

#[test]
fn rules_that_do_not_parse_say_why() {
    for (text, part) in
        [("lm_head", "REGEX=nf4"), ("lm_head=int4", "int4"), ("(=keep", "regular expression"), ("=keep", "empty")]
    {
        let error = text.parse::<Rule>().unwrap_err().to_string();
        assert!(error.contains(part) && error.contains(text), "{error}");
    }
    let rule: Rule = "a=b=keep".parse().unwrap();
    assert!(rule.matches("a=b", "") && rule.quant_type().is_none());
}

#[test]
fn skip_names_match_as_transformers_does() {
    for (key, module, expected) in [
        ("layer.1", "layer.1.attn", true),
        ("layer.1", "layer.11.attn", false),
        ("layer.*", "layer.11.attn", true),
        ("mlp.gate", "mlp.gate_proj", false),
        ("fc1", "model.decoder.layers.23.fc1", true),
        ("fc1", "fc1_bis", false),
        ("layers", "model.layers.0", false),
        ("a|b", "b.c", true),
        (r"model\.", "model.x", true),
    ] {
        assert_eq!(SkipKey::new(key).unwrap().matches(module), expected, "{key} {module}");
    }
}

#[test]
fn paths_match_from_their_end() {
    for (pattern, module, expected) in [
        ("lm_head", "language_model.lm_head", true),
        ("lm_head", "audio_lm_head", false),
        ("^head", "head", true),
        ("^head", "decoder.head", false),
        ("lm_heads.*", "decoder.lm_heads.3", true),
        ("^lm_heads.*", "decoder.lm_heads.3", false),
        ("a.*.b", "a.b", false),
    ] {
        assert_eq!(matching::path_matches(pattern, module), expected, "{pattern} {module}");
    }
}

#[test]
fn a_list_skips_exactly_what_it_should() {
    // `fc` ends `my_fc`, and `layers.0.fc` ends a path of the decoder: neither short form would be exact.
    let kept = owned(&["layers.0.fc", "layers.0.out", "encoder.x.a", "encoder.x.b"]);
    let converted = owned(&["decoder.layers.0.fc", "layers.0.my_fc", "encoder.y.a", "other.b", "layers.1.out"]);
    for starts in [true, false] {
        let list = matching::skip_list(&kept, &converted, starts);
        let keys: Vec<SkipKey> = list.iter().map(|name| SkipKey::new(name).unwrap()).collect();
        for module in &kept {
            assert!(keys.iter().any(|key| key.matches(module)), "{list:?} {module}");
        }
        for module in &converted {
            assert!(!keys.iter().any(|key| key.matches(module)), "{list:?} {module}");
        }
        assert_eq!(list.contains(&"encoder.x".to_owned()), starts, "{list:?}");
    }
}

#[test]
fn lists_that_are_searched_are_sorted() {
    assert!(known::KNOWN.is_sorted());
    assert!(names::RENAMED_OTHERWISE.is_sorted());
    assert!(prefixes::OWN.is_sorted());
}

/// Decisions on tensors given as (name, shape): what is quantized, with a mark where it is transposed first.
fn decided(config: &Value, tensors: &[(&str, Vec<usize>)]) -> (Vec<String>, Selection) {
    let selection = select(Some(config), Code::Unseen, &facts(tensors), &QuantizeOptions::default(), None).unwrap();
    let pairs = tensors.iter().zip(&selection.decisions);
    let names = pairs.filter_map(|((name, _), decision)| match decision.treatment {
        Treatment::Quantize { transpose: true, .. } => Some(format!("{name}^T")),
        Treatment::Quantize { .. } => Some((*name).to_owned()),
        Treatment::Keep => None,
    });
    (names.collect(), selection)
}

#[test]
fn biases_tell_how_a_weight_lies() {
    let conv1d = [
        ("h.0.attn.c_attn.weight", vec![64, 192]),
        ("h.0.attn.c_attn.bias", vec![192]),
        ("h.0.attn.c_proj.weight", vec![64, 64]),
        ("h.0.attn.c_proj.bias", vec![64]),
    ];
    let linear = [
        ("h.0.attn.c_attn.weight", vec![192, 64]),
        ("h.0.attn.c_attn.bias", vec![192]),
        ("h.0.attn.c_proj.weight", vec![64, 64]),
        ("h.0.attn.c_proj.bias", vec![64]),
    ];
    // Whatever the model calls itself, and also where code of its own stands under a known name.
    for config in [
        json!({"model_type": "mygpt", "architectures": ["LM"], "auto_map": {}}),
        json!({"model_type": "gpt2", "architectures": ["LM"], "auto_map": {}}),
        json!({"model_type": "llama", "architectures": ["LM"], "auto_map": {}}),
        json!({"architectures": ["LM"]}),
        json!({}),
    ] {
        let (names, _) = decided(&config, &conv1d);
        assert_eq!(names, ["h.0.attn.c_attn.weight^T", "h.0.attn.c_proj.weight^T"], "{config}");
        let (names, selection) = decided(&config, &linear);
        if config["model_type"] == "gpt2" {
            assert_eq!(names, ["h.0.attn.c_attn.weight"], "{config}");
            assert!(selection.decisions[2].reason.contains("do not say"), "{config}");
        } else {
            assert_eq!(names, ["h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight"], "{config}");
        }
    }
}

#[test]
fn code_of_the_model_tells_what_headers_do_not() {
    let config = json!({"model_type": "mygpt", "architectures": ["LM"], "auto_map": {}});
    let packed = |code: &str, tensors: &[(&str, Vec<usize>)]| {
        let code = Code::of([code.to_owned()]);
        let found = select(Some(&config), code, &facts(tensors), &QuantizeOptions::default(), None).unwrap();
        let quantized = |decision: &Decision| match decision.treatment {
            Treatment::Quantize { transpose, .. } => Some(transpose),
            Treatment::Keep => None,
        };
        found.decisions.iter().step_by(2).map(quantized).collect::<Vec<_>>()
    };
    let layer = |name, shape: [usize; 2], bias| [(name, shape.to_vec()), (bias, vec![64])];
    let square = layer("h.0.fc.weight", [64, 64], "h.0.fc.bias");
    let wide = layer("h.0.up.weight", [128, 64], "h.0.up.bias");
    let (imported, own) = ("from transformers.pytorch_utils import Conv1D", "class Conv1D(nn.Module):");
    // A square weight beside code that has both classes may be either.
    assert_eq!(packed("nn.Linear(64, 64)", &square), [Some(false)]);
    assert_eq!(packed(imported, &square), [None]);
    assert_eq!(packed(own, &square), [None]);
    // What the headers show holds; what other layers are, is no evidence for one of another name.
    let both = [wide, square].concat();
    assert_eq!(packed(imported, &both), [Some(true), None]);
    // A class of the model's own is packed by no loader, under this name or another.
    assert_eq!(packed(own, &both), [None, None]);
    assert_eq!(packed("nn.Parameter(torch.empty(nx, nf))", &both)[0], None);
    // Without code of its own, a model is what its headers and its type show.
    let config = json!({"model_type": "llama", "architectures": ["LlamaForCausalLM"]});
    let square =
        [("model.layers.0.self_attn.q_proj.weight", vec![64, 64]), ("model.layers.0.self_attn.q_proj.bias", vec![64])];
    let found = select(Some(&config), Code::Conv1d, &facts(&square), &QuantizeOptions::default(), None).unwrap();
    assert!(matches!(found.decisions[0].treatment, Treatment::Quantize { transpose: false, .. }));
}

#[test]
fn square_weights_alone_do_not_tell_how_they_lie() {
    let config = json!({"model_type": "mygpt", "architectures": ["LM"]});
    let square = [("h.0.c_attn.weight", vec![64, 64]), ("h.0.c_attn.bias", vec![64])];
    let (names, selection) = decided(&config, &square);
    assert!(names.is_empty());
    assert!(selection.decisions[0].reason.contains("Conv1D"), "{:?}", selection.decisions);
    // The same name elsewhere tells, and so does a checkpoint in which all others agree.
    let mut more = square.to_vec();
    more.extend([("h.0.mlp.c_fc.weight", vec![64, 256]), ("h.0.mlp.c_fc.bias", vec![256])]);
    assert_eq!(decided(&config, &more).0, ["h.0.c_attn.weight^T", "h.0.mlp.c_fc.weight^T"]);
    more.extend([("vision.0.fc.weight", vec![256, 64]), ("vision.0.fc.bias", vec![256])]);
    assert_eq!(decided(&config, &more).0, ["h.0.mlp.c_fc.weight^T", "vision.0.fc.weight"]);
    more.extend([("h.1.c_attn.weight", vec![64, 192]), ("h.1.c_attn.bias", vec![192])]);
    assert!(decided(&config, &more).0.contains(&"h.0.c_attn.weight^T".to_owned()));
}

#[test]
fn what_nobody_knows_is_kept_and_listed() {
    let config = json!({"model_type": "internlm9", "architectures": ["LM"], "vocab_size": 96, "auto_map": {},
                        "max_position_embeddings": 48});
    for (name, shape) in [
        ("output", vec![96, 64]),
        ("model.output", vec![64, 64]),
        ("transformer.output_layer", vec![96, 64]),
        ("embed_out", vec![96, 64]),
        ("anything", vec![96, 64]),
        ("lookup", vec![96, 32]),
        ("places", vec![48, 64]),
        ("model.layers.0.type_embs", vec![2, 64]),
        ("mapping", vec![64, 64]),
        ("medusa_head.0", vec![96, 64]),
    ] {
        let weight = format!("{name}.weight");
        let tensors = [
            ("model.tok_embeddings.weight", vec![96, 64]),
            ("model.layers.0.fc.weight", vec![64, 64]),
            ("model.layers.0.experts.0.w1.weight", vec![64, 64]),
            ("fc.weight", vec![64, 64]),
            ("fc.bias", vec![64]),
            (weight.as_str(), shape),
        ];
        let (names, selection) = decided(&config, &tensors);
        // The code of a model that nobody knows has experts as layers of their own.
        let expert = "model.layers.0.experts.0.w1";
        assert_eq!(names, ["model.layers.0.fc.weight", &format!("{expert}.weight"), "fc.weight"], "{name}");
        let list = selection.skip_modules.unwrap();
        let keys: Vec<SkipKey> = list.iter().map(|name| SkipKey::new(name).unwrap()).collect();
        assert!(keys.iter().any(|key| key.matches(name)), "{name}: {list:?}");
        for converted in ["model.layers.0.fc", "layers.0.fc", "fc", expert] {
            assert!(!keys.iter().any(|key| key.matches(converted)), "{converted}: {list:?}");
        }
        assert!(selection.notes[0].contains("--trust-remote-code"), "{:?}", selection.notes);
        // Whoever knows better can say so.
        let told = QuantizeOptions {
            rules: vec![format!("^{}=nf4", regex::escape(&weight)).parse().unwrap()],
            ..QuantizeOptions::default()
        };
        let told = select(Some(&config), Code::Unseen, &facts(&tensors), &told, None).unwrap();
        assert!(matches!(told.decisions[5].treatment, Treatment::Quantize { .. }), "{name}");
    }
}

#[test]
fn a_list_holds_with_and_without_the_prefix_of_the_base_model() {
    for (model_type, class, prefix, base_class) in [
        ("llama", "LlamaForCausalLM", "model.", "LlamaModel"),
        ("gpt2", "GPT2LMHeadModel", "transformer.", "GPT2Model"),
        ("gpt_neox", "GPTNeoXForCausalLM", "gpt_neox.", "GPTNeoXModel"),
        ("bert", "BertForMaskedLM", "bert.", "BertModel"),
        ("never_heard_of", "LM", "transformer.", ""),
    ] {
        let paths = ["layers.0.attn.q", "layers.0.attn.k", "layers.1.attn.q", "layers.1.attn.k", "decoder.layers.0.q"];
        for (architecture, own) in [(class, prefix), (base_class, "")] {
            if architecture.is_empty() {
                continue;
            }
            let names: Vec<String> = paths.iter().map(|path| format!("{own}{path}.weight")).collect();
            let tensors: Vec<TensorFacts<'_>> =
                names.iter().map(|name| TensorFacts { name, shape: &[64, 64], dtype: Dtype::BF16 }).collect();
            let config = json!({"model_type": model_type, "architectures": [architecture]});
            for (rule, kept) in [(r"(^|\.)layers\.0\.attn=keep", 2), (r"(^|\.)layers\.0\.attn\.q=keep", 1)] {
                let options = QuantizeOptions { rules: vec![rule.parse().unwrap()], ..QuantizeOptions::default() };
                let list = select(Some(&config), Code::Unseen, &tensors, &options, None).unwrap().skip_modules.unwrap();
                let keys: Vec<SkipKey> = list.iter().map(|name| SkipKey::new(name).unwrap()).collect();
                let order = ["layers.0.attn.q", "layers.0.attn.k"];
                for path in paths {
                    let is_kept = order[..kept].contains(&path);
                    for module in [path.to_owned(), format!("{prefix}{path}")] {
                        let skipped = keys.iter().any(|key| key.matches(&module));
                        assert_eq!(skipped, is_kept, "{architecture} {rule} {module}: {list:?}");
                    }
                }
            }
        }
    }
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[a-z_0-9]{0,8}".prop_map(Value::from),
        prop::sample::select(vec!["gpt2", "t5", "falcon", "LlamaForCausalLM", "bert", "wav2vec2"])
            .prop_map(Value::from),
    ];
    leaf.prop_recursive(6, 40, 6, |inner| {
        let key = prop_oneof![
            prop::sample::select(vec!["model_type", "architectures", "tie_word_embeddings", "text_config", "auto_map"])
                .prop_map(str::to_owned),
            "[a-z_]{0,8}",
        ];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((key, inner), 0..5).prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

fn any_name() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        prop::sample::select(vec![
            "weight",
            "bias",
            "layers",
            "0",
            "11",
            "experts",
            "lm_head",
            "decoder",
            "gate",
            "in_proj_weight",
            "out_proj",
            "model",
            "attn",
            "c_attn",
            "wo",
            "embed_tokens",
            "score",
        ])
        .prop_map(str::to_owned),
        ".{0,5}",
    ];
    prop::collection::vec(part, 0..6).prop_map(|parts| parts.join("."))
}

fn any_dtype() -> impl Strategy<Value = Dtype> {
    prop::sample::select(vec![
        Dtype::F16,
        Dtype::BF16,
        Dtype::F32,
        Dtype::F64,
        Dtype::I64,
        Dtype::U8,
        Dtype::BOOL,
        Dtype::F8_E4M3,
    ])
}

proptest! {
    #[test]
    fn select_never_panics(
        config in prop::option::of(any_json()),
        tensors in prop::collection::vec((any_name(), prop::collection::vec(0usize..5, 0..5), any_dtype()), 0..12),
        rules in prop::collection::vec("[a-z.*]{1,4}=(keep|nf4|fp4)", 0..3),
        skip in prop::collection::vec(any_name(), 0..3),
    ) {
        let facts: Vec<TensorFacts<'_>> =
            tensors.iter().map(|(name, shape, dtype)| TensorFacts { name, shape, dtype: *dtype }).collect();
        let options = QuantizeOptions {
            rules: rules.iter().filter_map(|rule| rule.parse().ok()).collect(),
            skip,
            ..QuantizeOptions::default()
        };
        if let Ok(selection) = select(config.as_ref(), Code::Unseen, &facts, &options, None) {
            prop_assert_eq!(selection.decisions.len(), facts.len());
            for (decision, tensor) in selection.decisions.iter().zip(&facts) {
                if decision.treatment != Treatment::Keep {
                    prop_assert!(tensor.shape.len() == 2 && is_float(tensor.dtype));
                }
            }
        }
        for tensor in &facts {
            is_conv1d(config.as_ref(), tensor.name);
        }
        conv1d_names(config.as_ref(), Code::Unseen, &facts);
    }
}
