//! The decisions for a whole checkpoint.

use std::collections::{BTreeSet, HashMap, HashSet};

use serde_json::Value;

use super::evidence::Code;
use super::experts::split_expert;
use super::facts::{TensorFacts, module_of};
use super::matching::{SkipKey, plain_key_matches, skip_list, with_and_without};
use super::model::{Class, Model, Reason};
use super::rules::Rule;
use crate::checkpoint::dtype::is_float;
use crate::checkpoint::options::{QuantizeOptions, Selected};
use crate::checkpoint::weight_type::WeightType;
use crate::error::{Error, Result};

/// What becomes of one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Treatment {
    /// Quantized.
    Quantize {
        /// To what.
        quant_type: WeightType,
        /// The weight is stored `[in, out]` (`Conv1D`) and is transposed first.
        transpose: bool,
    },
    /// Copied as it is.
    Keep,
}

/// What becomes of one tensor, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// What becomes of it.
    pub treatment: Treatment,
    /// Why, in a few words.
    pub reason: String,
    /// The architecture computes with this weight in float32. A loader of a quantized checkpoint takes weights in the
    /// dtype that they are stored in, so a float16 one has to be stored wider.
    pub float32: bool,
}

/// The decisions for a whole checkpoint.
#[derive(Debug, Clone)]
pub struct Selection {
    /// One per tensor, in the order given.
    pub decisions: Vec<Decision>,
    /// The class that `config.json` names, else its `model_type`.
    pub architecture: Option<String>,
    /// Whether the rules know the architecture; otherwise names and shapes alone decided.
    pub known: bool,
    /// What the user should know.
    pub notes: Vec<String>,
    /// `llm_int8_skip_modules` of the output: `None` where the decisions are the loader's defaults, else the complete
    /// list of modules to leave alone, because in transformers 5 a list replaces the defaults.
    pub skip_modules: Option<Vec<String>>,
}

/// Decides for every tensor of a checkpoint; `selected` are the weights to quantize where somebody else has decided.
///
/// # Errors
/// [`Error::Argument`] when a rule or `selected` asks to quantize what cannot be quantized, or a skip name is no
/// regular expression.
pub fn select(
    config: Option<&Value>,
    code: Code,
    tensors: &[TensorFacts<'_>],
    options: &QuantizeOptions,
    selected: Option<&Selected>,
) -> Result<Selection> {
    let model = Model::new(config, code, tensors);
    let renames = model.renames(tensors);
    let skip = options.skip.iter().map(|name| SkipKey::new(name)).collect::<Result<Vec<_>>>()?;
    if let Some(selected) = selected {
        check_selected(&selected.tensors, tensors)?;
    }
    let mut notes = model.notes();
    let mut decisions = Vec::with_capacity(tensors.len());
    // The modules that the loader may convert: their index, the parts it makes of them, and whether we convert them.
    let mut modules: Vec<(usize, &'static [&'static str], bool)> = Vec::new();
    // Defaults depend on a code that nobody has read, where the model is not known: a list says all of it.
    let mut as_default = !model.is_cautious() || selected.is_some();
    let mut rule_use = vec![RuleUse::default(); options.rules.len()];
    let mut skip_used = vec![false; skip.len()];
    let (mut experts, mut packed_experts) = (0usize, 0usize);

    for (position, tensor) in tensors.iter().enumerate() {
        let mut class = model.classify(tensor);
        let source = module_of(tensor.name);
        let module = if options.rules.is_empty() && skip.is_empty() { source.into() } else { renames.apply(source) };
        experts += usize::from(matches!(class.never, Some(Reason::Expert | Reason::Fusion)));
        if let Some(selected) = selected {
            if selected.tensors.contains(tensor.name) {
                class.linear = true;
                class.kept = None;
                class.never = class.never.filter(|reason| matches!(reason, Reason::Dtype(_) | Reason::Empty));
                if let Some(conv1d) = &selected.conv1d {
                    class.conv1d = conv1d.contains(tensor.name);
                }
            } else if class.linear && !model.names_expert(tensor) {
                // transformers merges experts and leaves them alone: of these the rules know more.
                class.kept = class.kept.or(Some(Reason::NotSelected));
            }
        }
        // The list of experts is a module too, and the one that a loaded model has.
        let list = split_expert(&module).map(|(list, ..)| list);
        let skipped = skip.iter().position(|key| {
            class.linear && (key.matches(&module) || key.matches(source) || list.is_some_and(|list| key.matches(list)))
        });
        if let Some(index) = skipped {
            skip_used[index] = true;
        }
        let rule =
            options.rules.iter().position(|rule| rule.matches(tensor.name, source) || rule.matches(&module, &module));

        let by_itself = model.explain(class.reason());
        let mut decision = match (rule, class.never.or(class.kept), skipped) {
            (Some(index), ..) => rule_use[index].decide(&options.rules[index], tensor, &class, by_itself),
            (None, Some(_), _) => keep(by_itself),
            (None, None, Some(index)) => keep(format!("skip list ({})", skip[index].text())),
            (None, None, None) => quantize(options.quant_type, class.conv1d, by_itself),
        };
        packed_experts += usize::from(decision.treatment != Treatment::Keep && model.names_expert(tensor));
        decision.float32 = decision.treatment == Treatment::Keep && model.is_float32(tensor);
        if class.linear || !class.parts.is_empty() {
            let converted = decision.treatment != Treatment::Keep;
            // What cannot be quantized here the loader would convert all the same.
            as_default &= class.parts.is_empty() && converted == class.kept.is_none();
            modules.push((position, class.parts, converted));
        } else if model.is_cautious() && tensor.shape.len() == 2 && tensor.name.ends_with(".weight") {
            // To name what is no linear layer does no harm; not to name a linear layer that is kept would.
            modules.push((position, class.parts, false));
        }
        decisions.push(decision);
    }

    for (rule, used) in options.rules.iter().zip(&rule_use) {
        used.check(rule, &model, &mut notes)?;
    }
    for (key, _) in skip.iter().zip(&skip_used).filter(|(_, used)| !**used) {
        notes.push(format!("the skip name {:?} matches no linear layer", key.text()));
    }
    if experts > 0 {
        let example = tensors
            .iter()
            .zip(&decisions)
            .find(|(tensor, _)| matches!(model.classify(tensor).never, Some(Reason::Expert | Reason::Fusion)));
        let (name, reason) = example.map_or(("", ""), |(tensor, decision)| (tensor.name, decision.reason.as_str()));
        notes.push(format!("{experts} tensors of experts stay in 16 bits, such as {name}: {reason}"));
    }
    if packed_experts > 0 {
        notes.push(format!(
            "{packed_experts} matrices of experts are packed one by one: transformers 5 loads them with halfbyte, not \
             with bitsandbytes alone"
        ));
    }
    let skip_modules = if as_default {
        None
    } else {
        let mut kept: Vec<String> = Vec::new();
        let mut converted: Vec<String> = Vec::new();
        for (position, parts, is_converted) in modules {
            let path = renames.apply(module_of(tensors[position].name));
            if parts.is_empty() {
                if is_converted { &mut converted } else { &mut kept }.push(path.into_owned());
            } else {
                let parent = path.rsplit_once('.').map_or("", |(parent, _)| parent);
                kept.extend(parts.iter().map(|part| format!("{parent}.{part}")));
            }
        }
        notes.extend(renames.doubt());
        let mut list = skip_list(&kept, &converted, !renames.unprefixed);
        if let Some(prefix) = renames.base_prefix(model.base_prefix(), &kept, &converted) {
            list = with_and_without(list, &prefix, renames.is_base, &kept, &converted);
        }
        for name in model.absent(tensors) {
            let harms = converted.iter().any(|module| plain_key_matches(&name, module));
            if !harms && !list.iter().any(|key| *key == name) {
                list.push(name.into_owned());
            }
        }
        Some(list)
    };
    Ok(Selection { decisions, architecture: model.name().map(str::to_owned), known: model.known, notes, skip_modules })
}

/// Names of the weights of `Conv1D` modules, stored `[in, out]`, as far as config, code and headers show.
pub fn conv1d_names(config: Option<&Value>, code: Code, tensors: &[TensorFacts<'_>]) -> HashSet<String> {
    let model = Model::new(config, code, tensors);
    let is_conv1d = |tensor: &&TensorFacts<'_>| {
        tensor.shape.len() == 2 && tensor.name.ends_with(".weight") && model.lies_as_conv1d(tensor)
    };
    tensors.iter().filter(is_conv1d).map(|tensor| tensor.name.to_owned()).collect()
}

/// Is this tensor the weight of a `Conv1D` module, stored `[in, out]`?
///
/// A quantized checkpoint holds such a weight transposed; whoever restores it needs to know.
pub fn is_conv1d(config: Option<&Value>, name: &str) -> bool {
    conv1d_of(config)(name)
}

/// [`is_conv1d`] for many names.
pub fn conv1d_of(config: Option<&Value>) -> impl Fn(&str) -> bool {
    let model = Model::new(config, Code::Unseen, &[]);
    move |name| name.ends_with(".weight") && model.is_conv1d(module_of(name))
}

fn keep(reason: String) -> Decision {
    Decision { treatment: Treatment::Keep, reason, float32: false }
}

fn quantize(quant_type: WeightType, transpose: bool, reason: String) -> Decision {
    Decision { treatment: Treatment::Quantize { quant_type, transpose }, reason, float32: false }
}

fn check_selected(selected: &BTreeSet<String>, tensors: &[TensorFacts<'_>]) -> Result<()> {
    let names: HashMap<&str, &TensorFacts<'_>> = tensors.iter().map(|tensor| (tensor.name, tensor)).collect();
    for name in selected {
        let Some(tensor) = names.get(name.as_str()) else {
            return Err(Error::argument("selection", format!("{name:?}"), "names of tensors of this checkpoint"));
        };
        if tensor.shape.len() != 2 || !is_float(tensor.dtype) {
            return Err(Error::argument(
                "selection",
                format!("{name:?}, which is {:?} {:?}", tensor.dtype, tensor.shape),
                "two-dimensional F16, BF16 or F32 tensors",
            ));
        }
    }
    Ok(())
}

/// What became of the tensors that one rule decided for.
#[derive(Debug, Clone, Default)]
struct RuleUse {
    decided: usize,
    quantized: usize,
    refusals: usize,
    /// The first tensor that the rule asked to quantize, and that cannot be.
    refused: Option<(String, Vec<usize>, Reason)>,
}

impl RuleUse {
    fn decide(&mut self, rule: &Rule, tensor: &TensorFacts<'_>, class: &Class, by_itself: String) -> Decision {
        self.decided += 1;
        match (rule.quant_type(), class.never) {
            (None, _) => keep(format!("rule '{rule}'")),
            (Some(quant_type), None) => {
                self.quantized += 1;
                quantize(quant_type, class.conv1d, format!("rule '{rule}'"))
            }
            (Some(_), Some(never)) => {
                self.refusals += 1;
                self.refused.get_or_insert_with(|| (tensor.name.to_owned(), tensor.shape.to_vec(), never));
                keep(by_itself)
            }
        }
    }

    /// A rule must have done something: to ask only for what cannot be quantized is an error; to decide for nothing,
    /// or to reach also weights that stay as they are, is worth a note.
    fn check(&self, rule: &Rule, model: &Model<'_>, notes: &mut Vec<String>) -> Result<()> {
        if self.decided == 0 {
            notes.push(format!("the rule '{rule}' decides for no tensor"));
        }
        let Some((name, shape, reason)) = &self.refused else { return Ok(()) };
        let what = format!("{name} {shape:?} ({})", model.explain(*reason));
        if self.quantized == 0 {
            return Err(Error::argument(
                "rule",
                format!("'{rule}', which reaches {what}"),
                "a pattern for two-dimensional F16, BF16 or F32 weights of linear layers",
            ));
        }
        notes
            .push(format!("the rule '{rule}' also reaches {} tensors that stay as they are: {what}, …", self.refusals));
        Ok(())
    }
}
