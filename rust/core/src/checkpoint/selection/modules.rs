//! The same questions about the modules of a model in memory, which have names and nothing else.

use safetensors::Dtype;
use serde::Serialize;

use super::evidence::Code;
use super::facts::{TensorFacts, module_of};
use super::matching::SkipKey;
use super::model::{Model, Reason};
use super::rules::Rule;
use super::select::{Selection, select};
use crate::checkpoint::options::{QuantizeOptions, Selected};
use crate::checkpoint::weight_type::WeightType;
use crate::error::Result;

/// What a user's exceptions say of one tensor. Numbers are positions in the lists that were given.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Match {
    /// The first rule that matches.
    pub rule: Option<usize>,
    /// What that rule asks for; none to keep.
    pub quant_type: Option<WeightType>,
    /// The first skip name that matches.
    pub skip: Option<usize>,
}

/// Which rule and which skip name match each tensor, by the names of a model in memory.
///
/// # Errors
/// [`Error::Argument`](crate::error::Error::Argument) when a skip name is no regular expression.
pub fn match_names(tensors: &[String], rules: &[Rule], skip: &[String]) -> Result<Vec<Match>> {
    let skip = skip.iter().map(|name| SkipKey::new(name)).collect::<Result<Vec<_>>>()?;
    let found = tensors.iter().map(|tensor| {
        let module = module_of(tensor);
        let rule = rules.iter().position(|rule| rule.matches(tensor, module) || rule.matches(module, module));
        Match {
            rule,
            quant_type: rule.and_then(|rule| rules[rule].quant_type()),
            skip: skip.iter().position(|key| key.matches(module)),
        }
    });
    Ok(found.collect())
}

/// Whether the components of each path, `weight` included, hold those of a key one after the other: how diffusers
/// matches the names of modules that stay in float32.
pub fn match_components(modules: &[String], keys: &[String]) -> Vec<bool> {
    let keys: Vec<Vec<&str>> = keys.iter().map(|key| key.split('.').collect()).collect();
    let covered = |module: &String| {
        let parts: Vec<&str> = module.split('.').chain(["weight"]).collect();
        keys.iter().any(|key| parts.windows(key.len()).any(|window| window == key))
    };
    modules.iter().map(covered).collect()
}

/// Whether each module is an output embedding by its name, one after the other.
pub fn named_as_output(modules: &[String]) -> Vec<bool> {
    let is_output = |module: &String| {
        let name = weight_of(module);
        let facts = [TensorFacts { name: &name, shape: &[1, 1], dtype: Dtype::F32 }];
        Model::new(None, Code::Unseen, &facts).classify(&facts[0]).reason() == Reason::OutputEmbedding
    };
    modules.iter().map(is_output).collect()
}

/// `llm_int8_skip_modules` with which a loader converts the modules of `converted` and none of `kept`.
///
/// # Errors
/// None that is expected: names come from a model.
pub fn skip_modules(converted: &[String], kept: &[String]) -> Result<Option<Vec<String>>> {
    let names: Vec<String> = converted.iter().chain(kept).map(|module| weight_of(module)).collect();
    let facts: Vec<TensorFacts<'_>> =
        names.iter().map(|name| TensorFacts { name, shape: &[1, 1], dtype: Dtype::F32 }).collect();
    let rules = if kept.is_empty() {
        Vec::new()
    } else {
        let kept: Vec<String> = kept.iter().map(|module| regex::escape(&weight_of(module))).collect();
        vec![format!("^(?:{})$=keep", kept.join("|")).parse()?]
    };
    let options = QuantizeOptions { rules, ..QuantizeOptions::default() };
    let selected = Selected { tensors: names.iter().cloned().collect(), conv1d: None };
    select(None, Code::Unseen, &facts, &options, Some(&selected)).map(|selection: Selection| selection.skip_modules)
}

/// The name of a module's weight; the module itself may be the model.
fn weight_of(module: &str) -> String {
    if module.is_empty() { "weight".to_owned() } else { format!("{module}.weight") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codebook::QuantType;

    fn owned(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn names_match_the_first_rule_and_the_first_skip_name() {
        let rules: Vec<Rule> = ["q_proj=fp4", r"layers\.1\.=keep"].iter().map(|rule| rule.parse().unwrap()).collect();
        let tensors = owned(&["layers.1.q_proj.weight", "layers.1.mlp.weight", "layers.11.mlp.weight", "head.weight"]);
        let skip = owned(&["layers.11", "head", "mlp"]);
        let found = match_names(&tensors, &rules, &skip).unwrap();
        let found: Vec<_> = found.iter().map(|found| (found.rule, found.quant_type, found.skip)).collect();
        let fp4 = Some(WeightType::FourBit(QuantType::Fp4));
        assert_eq!(
            found,
            [(Some(0), fp4, None), (Some(1), None, Some(2)), (None, None, Some(0)), (None, None, Some(1))]
        );
        assert!(match_names(&tensors, &[], &owned(&["("])).is_err());
    }

    #[test]
    fn components_match_whole_and_in_order() {
        let modules = owned(&["wo", "block.wo.dense", "block.wow", "norm.proj", "proj.norm"]);
        assert_eq!(match_components(&modules, &owned(&["wo"])), [true, true, false, false, false]);
        assert_eq!(match_components(&modules, &owned(&["norm.proj", "wow.weight"])), [false, false, true, true, false]);
        assert_eq!(match_components(&modules, &[]), [false; 5]);
    }

    #[test]
    fn output_embeddings_are_known_by_their_names() {
        let modules = owned(&["lm_head", "model.lm_head", "layers.0.mlp", "embed_tokens"]);
        assert_eq!(named_as_output(&modules), [true, true, false, false]);
    }

    #[test]
    fn a_skip_list_names_what_is_kept() {
        let listed = skip_modules(&owned(&["layers.0.q", "layers.1.q"]), &owned(&["layers.0.o"])).unwrap();
        assert!(listed.unwrap().contains(&"o".to_owned()));
        assert_eq!(skip_modules(&owned(&["layers.0.q"]), &[]).unwrap(), None);
    }
}
