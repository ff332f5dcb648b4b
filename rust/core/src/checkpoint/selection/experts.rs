//! The experts of Mixture-of-Experts models: which architectures' experts a loader takes in 4 bits, and by which names.
//!
//! transformers 5 holds the experts of a layer as one tensor for each projection. `halfbyte.models` takes such modules
//! apart while a model is loaded; what it cannot take apart stays in 16 bits. The table was made by asking it about
//! every class that transformers can build.

use std::collections::HashMap;

use safetensors::Dtype;
use serde_json::Value;

use super::facts::{TensorFacts, collect_model_types};
use crate::checkpoint::dtype::is_float;

/// How checkpoints of an architecture call the projections of an expert.
#[derive(Debug, PartialEq, Eq)]
pub struct Projections {
    /// The gate, where there is one.
    pub gate: Option<&'static str>,
    /// The projection that the gate belongs to.
    pub up: &'static str,
    /// The way back.
    pub down: &'static str,
    /// In tensors that hold all experts, rows of gate and up projection alternate.
    pub interleaved: bool,
    /// A loader of a quantized checkpoint reads single matrices only, those that are kept too.
    pub single: bool,
}

impl Projections {
    /// Whether a projection has this name.
    pub fn contains(&self, name: &str) -> bool {
        self.gate == Some(name) || self.up == name || self.down == name
    }
}

/// What is known of a model's experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Experts {
    /// A loader takes them, under these names.
    Named(&'static Projections),
    /// transformers makes them of a checkpoint's tensors in a way that no loader of packed ones knows.
    Unreadable,
    /// The architecture is in no table.
    Unknown,
}

const GATED: Projections =
    Projections { gate: Some("gate_proj"), up: "up_proj", down: "down_proj", interleaved: false, single: false };
const NUMBERED: Projections = Projections { gate: Some("w1"), up: "w3", down: "w2", ..GATED };
const UNGATED: Projections = Projections { gate: None, ..GATED };
const ALTERNATING: Projections = Projections { interleaved: true, ..GATED };
const SINGLE: Projections = Projections { single: true, ..GATED };

#[rustfmt::skip]
static TABLE: &[(&Projections, &[&str])] = &[
    (&GATED, &[
        "afmoe", "aria", "aria_text", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_v2",
        "deepseek_v3", "deepseek_v32", "diffusion_gemma", "dots3_note", "dots3_note_text", "ernie4_5_moe",
        "exaone_moe", "flex_olmo", "flint", "gemma4", "gemma4_text", "glm4_moe", "glm4_moe_lite", "glm4v_moe",
        "glm4v_moe_text", "glm5_next", "glm5_next_text", "glm_moe_dsa", "granitemoe", "granitemoe_swa",
        "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4", "inkling_text", "jamba",
        "kolibri1", "laguna", "mellum", "mimo_v2_flash", "minimax_m3_vl_text", "mistral4", "muse_spark",
        "muse_spark_text", "olmoe", "openai_privacy_filter", "qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text",
        "qwen3_moe", "qwen3_next", "qwen3_omni_moe_thinker", "qwen3_vl_moe", "qwen3_vl_moe_text", "qwen4_exp",
        "qwen4_exp_text", "solar_open", "unlimited_ocr", "zaya",
    ]),
    (&NUMBERED, &[
        "deepseek_v4", "kimi_linear", "minimax", "minimax_m2", "minimax_m3_vl", "mistral_large4",
        "mistral_large4_text", "mixtral", "phimoe",
    ]),
    (&UNGATED, &["nemotron_h"]),
    (&ALTERNATING, &["gpt_oss"]),
    // transformers quantizes none of them itself, and takes them one by one of a quantized checkpoint.
    (&SINGLE, &["llama4", "llama4_text"]),
];

/// Architectures whose experts transformers makes in other ways, or computes in other classes.
static UNREADABLE: &[&str] = &["ernie4_5_vl_moe", "inkling2", "inkling2_text", "inkling_mm_model"];

/// Architectures whose 16-bit checkpoints have single matrices, which transformers merges while it loads one. It was asked
/// for its conversions of each architecture above.
#[rustfmt::skip]
static MERGED: &[&str] = &[
    "afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32",
    "deepseek_v4", "ernie4_5_moe", "exaone_moe", "flex_olmo", "flint", "glm4_moe", "glm4_moe_lite", "glm4v_moe",
    "glm5_next", "glm5_next_text", "glm_moe_dsa", "hunyuan_v1_moe", "hy_v3", "jamba", "kimi_linear", "kolibri1", "laguna",
    "mellum", "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl", "mistral_large4_text", "mixtral", "nemotron_h",
    "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen3_omni_moe_thinker",
    "qwen4_exp_text", "solar_open",
];

/// Fields of `config.json` that hold the number of experts of a layer.
const COUNTS: [&str; 5] =
    ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"];

/// What is known of the experts of the model of a `config.json`: by its `model_type`, else by that of the part of it
/// that has experts.
pub fn experts_of(config: Option<&Value>) -> Experts {
    let mut model_types = Vec::new();
    if let Some(config) = config {
        collect_model_types(config, 0, &mut model_types);
    }
    let known = |name: &&str| {
        if UNREADABLE.contains(name) {
            return Some(Experts::Unreadable);
        }
        TABLE.iter().find(|(_, names)| names.contains(name)).map(|(found, _)| Experts::Named(found))
    };
    model_types.iter().find_map(known).unwrap_or(Experts::Unknown)
}

/// Whether transformers reads single matrices of experts from a 16-bit checkpoint of the model of a `config.json`.
pub fn merges_experts(config: Option<&Value>) -> bool {
    let mut model_types = Vec::new();
    if let Some(config) = config {
        collect_model_types(config, 0, &mut model_types);
    }
    model_types.iter().any(|name| MERGED.contains(name))
}

/// The parts of the name of a weight of one of several experts: path of their list, number, and projection.
pub fn split_expert(name: &str) -> Option<(&str, &str, &str)> {
    for list in [".experts.", ".local_experts."] {
        if let Some(at) = name.find(list) {
            let path = &name[..at + list.len() - 1];
            let (number, rest) = name[at + list.len()..].split_once('.')?;
            let is_number = !number.is_empty() && number.len() < 10 && number.bytes().all(|b| b.is_ascii_digit());
            return is_number.then_some((path, number, rest));
        }
    }
    None
}

/// What is wrong with the experts of a checkpoint, and the name of the tensor where it shows.
#[derive(Debug, PartialEq, Eq)]
pub struct Problem {
    /// The tensor.
    pub tensor: String,
    /// What is wrong with it.
    pub words: String,
}

/// What is found of one projection of a list of experts.
struct Seen<'a> {
    first: &'a TensorFacts<'a>,
    numbers: Vec<u32>,
}

/// Checks that every list of experts is complete, that matrices of one projection have one shape, and that there are as
/// many as `config.json` says. For architectures that are known: others may have lists of other things.
pub fn check_experts(config: Option<&Value>, tensors: &[TensorFacts<'_>]) -> Result<(), Problem> {
    let Experts::Named(names) = experts_of(config) else { return Ok(()) };
    let mut lists: HashMap<&str, HashMap<&str, Seen<'_>>> = HashMap::new();
    let mut order: Vec<&str> = Vec::new();
    for tensor in tensors {
        let Some((path, number, rest)) = split_expert(tensor.name) else { continue };
        let Some(projection) = rest.strip_suffix(".weight").filter(|projection| names.contains(projection)) else {
            continue;
        };
        // Loaders cast float64.
        if tensor.shape.len() != 2 || !(is_float(tensor.dtype) || tensor.dtype == Dtype::F64) {
            return Err(Problem {
                tensor: tensor.name.to_owned(),
                words: format!(
                    "is {} of shape {:?}: expected F16, BF16 or F32 of two dimensions, as the weight of an expert",
                    tensor.dtype, tensor.shape
                ),
            });
        }
        let list = lists.entry(path).or_insert_with(|| {
            order.push(path);
            HashMap::new()
        });
        let seen = list.entry(projection).or_insert_with(|| Seen { first: tensor, numbers: Vec::new() });
        if tensor.shape != seen.first.shape {
            return Err(Problem {
                tensor: tensor.name.to_owned(),
                words: format!(
                    "has the shape {:?}, and {:?} has {:?}: expected one shape of all experts",
                    tensor.shape, seen.first.name, seen.first.shape
                ),
            });
        }
        // So short that it fits.
        seen.numbers.push(number.parse().unwrap_or(u32::MAX));
    }
    let mut counts = Vec::new();
    if let Some(config) = config {
        collect_counts(config, 0, &mut counts);
    }
    for path in order {
        let list = &mut lists.get_mut(path).expect("it was put there");
        let there = list.values().flat_map(|seen| &seen.numbers).max().map_or(0, |&n| u64::from(n) + 1);
        let expected: Vec<&str> = names.gate.iter().chain([&names.up, &names.down]).copied().collect();
        for projection in expected {
            let mut numbers = list.get(projection).map_or_else(Vec::new, |seen| seen.numbers.clone());
            numbers.sort_unstable();
            let missing = (0..there).zip(numbers.iter().map(|&n| u64::from(n)).chain([u64::MAX])).find(|(a, b)| a != b);
            if let Some((missing, _)) = missing.or((numbers.is_empty()).then_some((0, 0))) {
                return Err(Problem {
                    tensor: format!("{path}.{missing}.{projection}.weight"),
                    words: format!("is missing: {path} has {there} experts"),
                });
            }
        }
        if !counts.is_empty() && !counts.contains(&there) {
            let said = *counts.iter().find(|&&count| count > there).unwrap_or(&counts[0]);
            let (number, what) = if said > there { (there, "is missing") } else { (said, "is one too many") };
            return Err(Problem {
                tensor: format!("{path}.{number}.{}.weight", names.up),
                words: format!("{what}: config.json says that there are {said} experts, and {path} has {there}"),
            });
        }
    }
    Ok(())
}

fn collect_counts(value: &Value, depth: usize, found: &mut Vec<u64>) {
    let Value::Object(fields) = value else { return };
    for (name, value) in fields {
        if COUNTS.contains(&name.as_str()) {
            // Some architectures have a number for each layer, or for each kind of input.
            let several = value.as_array().map_or(&[][..], Vec::as_slice);
            found.extend([value].into_iter().chain(several).filter_map(Value::as_u64).filter(|&count| count > 0));
        } else if depth < 4 {
            collect_counts(value, depth + 1, found);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn facts(names: &[String]) -> Vec<TensorFacts<'_>> {
        names.iter().map(|name| TensorFacts { name, shape: &[8, 4], dtype: Dtype::BF16 }).collect()
    }

    fn names(experts: usize) -> Vec<String> {
        let each = |n: usize| ["w1", "w2", "w3"].map(|p| format!("model.layers.0.mlp.experts.{n}.{p}.weight"));
        (0..experts).flat_map(each).collect()
    }

    #[test]
    fn experts_that_are_complete_pass() {
        let config = json!({"model_type": "mixtral", "num_local_experts": 4});
        assert_eq!(check_experts(Some(&config), &facts(&names(4))), Ok(()));
        assert_eq!(check_experts(Some(&json!({"model_type": "mixtral"})), &facts(&names(3))), Ok(()));
        assert_eq!(check_experts(None, &facts(&names(4)[1..])), Ok(()), "nobody knows what these are");
    }

    #[test]
    fn experts_that_are_missing_are_named() {
        let config = json!({"model_type": "mixtral", "num_local_experts": 4});
        for lost in 0..12 {
            let mut found = names(4);
            let name = found.remove(lost);
            let problem = check_experts(Some(&config), &facts(&found)).unwrap_err();
            assert_eq!((problem.tensor.as_str(), problem.words.starts_with("is missing")), (name.as_str(), true));
        }
        let all_down: Vec<String> = names(4).into_iter().filter(|name| !name.contains("w2")).collect();
        let problem = check_experts(Some(&config), &facts(&all_down)).unwrap_err();
        assert_eq!(problem.tensor, "model.layers.0.mlp.experts.0.w2.weight");
    }

    #[test]
    fn experts_that_are_no_float_matrices_are_named() {
        let config = json!({"model_type": "mixtral", "num_local_experts": 4});
        let found = names(4);
        for (shape, dtype) in [(&[32][..], Dtype::BF16), (&[1, 8, 4], Dtype::BF16), (&[8, 4], Dtype::I64)] {
            let mut facts = facts(&found);
            (facts[5].shape, facts[5].dtype) = (shape, dtype);
            let problem = check_experts(Some(&config), &facts).unwrap_err();
            assert_eq!(problem.tensor, found[5]);
            assert!(problem.words.starts_with(&format!("is {dtype} of shape {shape:?}: expected")), "{problem:?}");
        }
        let mut facts = facts(&found);
        facts[5].dtype = Dtype::F64;
        assert_eq!(check_experts(Some(&config), &facts), Ok(()));
    }

    #[test]
    fn experts_are_as_many_as_the_config_says() {
        for (count, tensor, word) in [(8, "experts.4.w3.weight", "is missing"), (2, "experts.2.w3.weight", "too many")]
        {
            let config = json!({"model_type": "mixtral", "num_local_experts": count});
            let problem = check_experts(Some(&config), &facts(&names(4))).unwrap_err();
            assert!(problem.tensor.ends_with(tensor) && problem.words.contains(word), "{problem:?}");
            assert!(problem.words.contains(&format!("there are {count} experts")), "{problem:?}");
        }
    }

    #[test]
    fn merged_architectures_are_known_ones() {
        for name in MERGED {
            let config = serde_json::json!({"model_type": name});
            assert!(matches!(experts_of(Some(&config)), Experts::Named(_)) && merges_experts(Some(&config)), "{name}");
        }
        assert!(!merges_experts(Some(&serde_json::json!({"model_type": "gpt_oss"}))));
        assert!(!merges_experts(None));
    }

    #[test]
    fn names_of_experts_come_apart() {
        assert_eq!(split_expert("a.experts.12.w1.weight"), Some(("a.experts", "12", "w1.weight")));
        assert_eq!(split_expert("a.experts.gate_up_proj"), None);
        assert_eq!(split_expert("a.shared_experts.1.w1.weight"), None);
        assert_eq!(split_expert("a.experts.expert_0.w1.weight"), None);
    }

    #[test]
    fn the_outermost_model_type_decides() {
        let of = |config| experts_of(Some(&config));
        let text = json!({"model_type": "minimax_m3_vl_text"});
        assert_eq!(of(json!({"model_type": "minimax_m3_vl", "text_config": text})), Experts::Named(&NUMBERED));
        assert_eq!(of(text), Experts::Named(&GATED));
        assert_eq!(
            of(json!({"model_type": "wrapper", "text_config": {"model_type": "inkling2_text"}})),
            Experts::Unreadable
        );
        assert_eq!(of(json!({"model_type": "llama"})), Experts::Unknown);
    }
}
