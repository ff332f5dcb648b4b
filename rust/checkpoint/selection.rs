//! Which tensors of a checkpoint are quantized.
//!
//! By default exactly those that transformers 5 with bitsandbytes would convert while loading: the weights of
//! `nn.Linear` and `Conv1D` modules, without output embeddings, tied weights, modules that the architecture keeps in
//! float32, and the module that holds the last parameter. The decision needs the `config.json`, and the names, shapes
//! and dtypes of the tensors: nothing is imported and no weight is read.

mod architectures;
mod matching;
mod rules;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};

use safetensors::Dtype;
use serde_json::Value;

use self::architectures::{FAMILIES, Family, OUTPUT_EMBEDDINGS, ROUTERS, is_embedding};
use self::matching::{SkipKey, path_matches, plain_key_matches, skip_list};
pub use self::rules::Rule;
use crate::codebook::QuantType;
use crate::error::{Error, Result};

/// What a header says of one tensor.
#[derive(Debug, Clone, Copy)]
pub struct TensorFacts<'a> {
    /// The tensor's name.
    pub name: &'a str,
    /// Its shape, row-major.
    pub shape: &'a [usize],
    /// The type of its elements.
    pub dtype: Dtype,
}

/// What the user asks for.
#[derive(Debug, Clone, Default)]
pub struct SelectionOptions {
    /// The codebook of tensors that no rule names.
    pub quant_type: QuantType,
    /// Exceptions; the first that matches a tensor decides.
    pub rules: Vec<Rule>,
    /// Names of modules to keep besides the defaults, matched as transformers matches `llm_int8_skip_modules`.
    pub skip: Vec<String>,
    /// The tensors to quantize where somebody else has decided (`--selection transformers`); rules and skip names
    /// still apply.
    pub explicit: Option<HashSet<String>>,
}

/// What becomes of one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Treatment {
    /// Quantized to 4 bits.
    Quantize {
        /// The codebook.
        quant_type: QuantType,
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

/// Decides for every tensor of a checkpoint.
///
/// # Errors
/// [`Error::Argument`] when a rule or `explicit` asks to quantize what cannot be quantized, or a skip name is no
/// regular expression.
pub fn select(config: Option<&Value>, tensors: &[TensorFacts<'_>], options: &SelectionOptions) -> Result<Selection> {
    let model = Model::new(config, tensors);
    let skip = options.skip.iter().map(|name| SkipKey::new(name)).collect::<Result<Vec<_>>>()?;
    let mut notes = model.notes();
    if let Some(explicit) = &options.explicit {
        check_explicit(explicit, tensors)?;
    }

    let mut decisions = Vec::with_capacity(tensors.len());
    let mut kept_modules: Vec<&str> = Vec::new();
    let mut converted_modules: Vec<&str> = Vec::new();
    let mut as_default = true;
    let mut rule_use = vec![RuleUse::default(); options.rules.len()];
    let mut skip_used = vec![false; skip.len()];
    let mut experts = 0usize;

    for tensor in tensors {
        let module = module_of(tensor.name);
        let mut class = model.classify(tensor, module);
        experts += usize::from(class.never == Some(Reason::Expert));
        if let Some(explicit) = &options.explicit {
            if explicit.contains(tensor.name) {
                class.linear = true;
                class.kept = None;
                if !matches!(class.never, Some(Reason::Dtype(_) | Reason::Dimensions(_) | Reason::Empty)) {
                    class.never = None;
                }
            } else if class.linear {
                class.kept = class.kept.or(Some(Reason::NotExplicit));
            }
        }
        let by_default = class.linear && class.kept.is_none();
        let rule = options.rules.iter().position(|rule| rule.matches(tensor.name, module));
        let skipped = skip.iter().position(|key| class.linear && key.matches(module));
        if let Some(index) = skipped {
            skip_used[index] = true;
        }

        let decision = match rule.map(|index| (index, &options.rules[index])) {
            Some((index, rule)) => {
                rule_use[index].matched += 1;
                match (rule.quant_type(), class.never) {
                    (None, _) => keep(format!("rule '{rule}'")),
                    (Some(_), Some(never)) => {
                        rule_use[index].refused.get_or_insert_with(|| Refusal::new(tensor, never));
                        rule_use[index].refusals += 1;
                        keep(class.reason().text(&model))
                    }
                    (Some(quant_type), None) => {
                        rule_use[index].quantized += 1;
                        quantize(quant_type, class.conv1d, format!("rule '{rule}'"))
                    }
                }
            }
            None if class.never.is_some() || class.kept.is_some() => keep(class.reason().text(&model)),
            None => match skipped {
                Some(index) => keep(format!("skip list ({})", skip[index].text())),
                None => quantize(options.quant_type, class.conv1d, class.reason().text(&model)),
            },
        };
        if class.linear {
            let converted = matches!(decision.treatment, Treatment::Quantize { .. });
            as_default &= converted == by_default;
            if converted { converted_modules.push(module) } else { kept_modules.push(module) }
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
        notes.push(format!("{experts} expert weights (Mixture-of-Experts) are kept in 16 bits for now"));
    }
    let skip_modules = (!as_default).then(|| {
        let absent = model.absent_outputs(tensors);
        kept_modules.extend(absent);
        skip_list(&kept_modules, &converted_modules)
    });
    Ok(Selection { decisions, architecture: model.name(), known: model.known, notes, skip_modules })
}

/// Is this tensor the weight of a `Conv1D` module, stored `[in, out]`?
///
/// A quantized checkpoint holds such a weight transposed; whoever restores it needs to know.
pub fn is_conv1d(config: Option<&Value>, name: &str) -> bool {
    let model = Model::new(config, &[]);
    name.ends_with(".weight") && model.is_conv1d(module_of(name))
}

/// The module that holds a tensor: its name without the last component.
fn module_of(name: &str) -> &str {
    name.rsplit_once('.').map_or("", |(module, _)| module)
}

fn keep(reason: String) -> Decision {
    Decision { treatment: Treatment::Keep, reason }
}

fn quantize(quant_type: QuantType, transpose: bool, reason: String) -> Decision {
    Decision { treatment: Treatment::Quantize { quant_type, transpose }, reason }
}

fn check_explicit(explicit: &HashSet<String>, tensors: &[TensorFacts<'_>]) -> Result<()> {
    let names: HashMap<&str, &TensorFacts<'_>> = tensors.iter().map(|tensor| (tensor.name, tensor)).collect();
    let mut wanted: Vec<&String> = explicit.iter().collect();
    wanted.sort();
    for name in wanted {
        let Some(tensor) = names.get(name.as_str()) else {
            return Err(Error::argument("selection", format!("{name:?}"), "names of tensors of this checkpoint"));
        };
        if tensor.shape.len() != 2 || !is_quantizable(tensor.dtype) {
            return Err(Error::argument(
                "selection",
                format!("{name:?}, which is {:?} {:?}", tensor.dtype, tensor.shape),
                "two-dimensional F16, BF16 or F32 tensors",
            ));
        }
    }
    Ok(())
}

fn is_quantizable(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32)
}

fn is_integer(dtype: Dtype) -> bool {
    matches!(
        dtype,
        Dtype::BOOL
            | Dtype::U8
            | Dtype::I8
            | Dtype::I16
            | Dtype::U16
            | Dtype::I32
            | Dtype::U32
            | Dtype::I64
            | Dtype::U64
    )
}

/// Why a tensor is treated as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reason {
    Linear,
    Conv1d,
    OutputEmbedding,
    Tied,
    LastLayer,
    Float32,
    NotExplicit,
    Bias,
    Norm,
    Vector,
    Parameter,
    Embedding,
    Router,
    Expert,
    Convolution,
    NotLinear,
    Attention,
    Dtype(Dtype),
    Dimensions(usize),
    Empty,
}

impl Reason {
    fn text(self, model: &Model<'_>) -> String {
        let whose = || model.name().map_or_else(String::new, |name| format!(" of {name}"));
        match self {
            Self::Linear if model.known => "linear weight".into(),
            Self::Linear => "linear weight by its shape and name".into(),
            Self::Conv1d => "Conv1D weight, transposed".into(),
            Self::OutputEmbedding => "output embedding".into(),
            Self::Tied => "tied to the input embedding".into(),
            Self::LastLayer => format!("last layer{}", whose()),
            Self::Float32 => "kept in float32 by the architecture".into(),
            Self::NotExplicit => "not selected by transformers".into(),
            Self::Bias => "bias".into(),
            Self::Norm => "norm".into(),
            Self::Vector => "vector".into(),
            Self::Parameter => "parameter of its own".into(),
            Self::Embedding => "embedding".into(),
            Self::Router => "router (Mixture-of-Experts)".into(),
            Self::Expert => "expert weights (Mixture-of-Experts) are kept for now".into(),
            Self::Convolution => "convolution".into(),
            Self::NotLinear => format!("not an nn.Linear{}", whose()),
            Self::Attention => "projection inside nn.MultiheadAttention".into(),
            Self::Dtype(dtype) if is_integer(dtype) => format!("integer tensor ({dtype:?})"),
            Self::Dtype(dtype) => format!("{dtype:?} is neither F16, BF16 nor F32"),
            Self::Dimensions(n) => format!("{n}-dimensional"),
            Self::Empty => "empty".into(),
        }
    }
}

/// What one tensor is.
#[derive(Debug, Clone, Copy)]
struct Class {
    /// The weight of a module that transformers can convert.
    linear: bool,
    conv1d: bool,
    /// Why the loader keeps this linear layer by default.
    kept: Option<Reason>,
    /// Why it cannot be quantized at all.
    never: Option<Reason>,
}

impl Class {
    fn other(reason: Reason) -> Self {
        Self { linear: false, conv1d: false, kept: None, never: Some(reason) }
    }

    fn reason(&self) -> Reason {
        self.never.or(self.kept).unwrap_or(if self.conv1d { Reason::Conv1d } else { Reason::Linear })
    }
}

/// What `config.json` and the names say of the model.
struct Model<'c> {
    architecture: Option<&'c str>,
    model_type: Option<&'c str>,
    families: Vec<&'static Family>,
    known: bool,
    tied: bool,
    custom_code: bool,
    /// Modules with an `in_proj_weight`: `nn.MultiheadAttention`, whose `out_proj` is no plain `nn.Linear`.
    attentions: HashSet<String>,
}

impl<'c> Model<'c> {
    fn new(config: Option<&'c Value>, tensors: &[TensorFacts<'_>]) -> Self {
        let architecture = config
            .and_then(|config| config.get("architectures"))
            .and_then(|names| names.get(0))
            .and_then(Value::as_str)
            .filter(|name| !name.is_empty());
        let model_type = config.and_then(|config| config.get("model_type")).and_then(Value::as_str);
        let mut model_types = Vec::new();
        if let Some(config) = config {
            collect_model_types(config, 0, &mut model_types);
        }
        let families =
            FAMILIES.iter().filter(|family| family.model_types.iter().any(|name| model_types.contains(name))).collect();
        let attentions = tensors
            .iter()
            .filter_map(|tensor| tensor.name.strip_suffix(".in_proj_weight"))
            .map(str::to_owned)
            .collect();
        Self {
            architecture,
            model_type,
            families,
            known: model_type.is_some(),
            tied: config.is_some_and(is_tied),
            custom_code: config.is_some_and(|config| config.get("auto_map").is_some()),
            attentions,
        }
    }

    fn name(&self) -> Option<String> {
        self.architecture.or(self.model_type).map(str::to_owned)
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if !self.known {
            let name = self.name().map_or_else(
                || "config.json names no architecture".into(),
                |name| format!("architecture {name} is unknown"),
            );
            notes.push(format!("{name}: planned by names and shapes"));
        } else if self.custom_code {
            notes.push("the model has code of its own (auto_map): planned as if it were transformers'".into());
        }
        notes
    }

    fn classify(&self, tensor: &TensorFacts<'_>, module: &str) -> Class {
        let leaf = &tensor.name
            [tensor.name.len() - (tensor.name.len() - module.len()).saturating_sub(usize::from(!module.is_empty()))..];
        let name = module.rsplit('.').next().unwrap_or("");
        if is_integer(tensor.dtype) {
            return Class::other(Reason::Dtype(tensor.dtype));
        }
        if leaf == "bias" || leaf.ends_with("_bias") {
            return Class::other(Reason::Bias);
        }
        if is_expert(tensor.name, tensor.shape) {
            return Class::other(Reason::Expert);
        }
        if leaf != "weight" {
            return Class::other(Reason::Parameter);
        }
        match tensor.shape.len() {
            2 => {}
            0 | 1 if name.contains("norm") || name.starts_with("ln") || name.contains("_ln") => {
                return Class::other(Reason::Norm);
            }
            0 | 1 => return Class::other(Reason::Vector),
            3..=5 => return Class::other(Reason::Convolution),
            n => return Class::other(Reason::Dimensions(n)),
        }
        if is_embedding(name) {
            return Class::other(Reason::Embedding);
        }
        if self.families.iter().any(|family| family.not_linear.iter().any(|path| path_matches(path, module))) {
            return Class::other(Reason::NotLinear);
        }
        if ROUTERS.contains(&name)
            && !self.families.iter().any(|family| family.linear.iter().any(|path| path_matches(path, module)))
        {
            return Class::other(Reason::Router);
        }
        if module.strip_suffix(".out_proj").is_some_and(|parent| self.attentions.contains(parent)) {
            return Class::other(Reason::Attention);
        }
        let mut class = Class { linear: true, conv1d: self.is_conv1d(module), kept: None, never: None };
        if self.families.iter().any(|family| family.float32.iter().any(|key| plain_key_matches(key, module))) {
            class.kept = Some(Reason::Float32);
            class.never = class.kept;
        } else if self.is_output(module) {
            class.kept = Some(if self.tied { Reason::Tied } else { Reason::OutputEmbedding });
            class.never = class.kept.filter(|_| self.tied);
        } else if name == "score" && !self.architecture.is_some_and(|name| name.ends_with("ForTokenClassification")) {
            class.kept = Some(Reason::LastLayer);
        }
        if tensor.shape.contains(&0) {
            class.never = Some(Reason::Empty);
        } else if !is_quantizable(tensor.dtype) {
            class.never = Some(Reason::Dtype(tensor.dtype));
        }
        class
    }

    fn is_conv1d(&self, module: &str) -> bool {
        self.families.iter().any(|family| family.conv1d.iter().any(|path| path_matches(path, module)))
    }

    fn is_output(&self, module: &str) -> bool {
        if self.architecture.is_some_and(|name| name.ends_with("ForCTC")) {
            return false;
        }
        OUTPUT_EMBEDDINGS.iter().any(|path| path_matches(path, module))
            || self.families.iter().any(|family| family.output.iter().any(|path| path_matches(path, module)))
    }

    /// Output embeddings that the checkpoint does not hold, because they are tied.
    fn absent_outputs(&self, tensors: &[TensorFacts<'_>]) -> Vec<&'static str> {
        if tensors.iter().any(|tensor| self.is_output(module_of(tensor.name))) {
            return Vec::new();
        }
        let heads: Vec<&'static str> =
            self.families.iter().flat_map(|family| family.output).map(|path| path.trim_start_matches('^')).collect();
        if heads.is_empty() { vec!["lm_head"] } else { heads }
    }
}

/// A per-expert weight (`experts.3.w1.weight`) or a fused one (`experts.gate_up_proj`).
fn is_expert(name: &str, shape: &[usize]) -> bool {
    let mut components = name.split('.').peekable();
    while let Some(component) = components.next() {
        if component == "experts" || component == "local_experts" {
            return match components.peek() {
                Some(next) => next.bytes().all(|b| b.is_ascii_digit()) && shape.len() >= 2 || shape.len() >= 3,
                None => false,
            };
        }
    }
    false
}

fn collect_model_types<'c>(value: &'c Value, depth: usize, found: &mut Vec<&'c str>) {
    let Value::Object(fields) = value else { return };
    if let Some(name) = fields.get("model_type").and_then(Value::as_str) {
        found.push(name);
    }
    if depth < 4 {
        for nested in fields.values() {
            collect_model_types(nested, depth + 1, found);
        }
    }
}

fn is_tied(config: &Value) -> bool {
    let flag = |config: &Value| config.get("tie_word_embeddings").and_then(Value::as_bool);
    flag(config).or_else(|| config.get("text_config").and_then(flag)).unwrap_or(false)
}

/// What became of the tensors that one rule matched.
#[derive(Debug, Clone, Default)]
struct RuleUse {
    matched: usize,
    quantized: usize,
    refusals: usize,
    refused: Option<Refusal>,
}

/// A tensor that a rule asked to quantize, and that cannot be.
#[derive(Debug, Clone)]
struct Refusal {
    tensor: String,
    shape: Vec<usize>,
    reason: Reason,
}

impl Refusal {
    fn new(tensor: &TensorFacts<'_>, reason: Reason) -> Self {
        Self { tensor: tensor.name.to_owned(), shape: tensor.shape.to_vec(), reason }
    }
}

impl RuleUse {
    /// A rule must have done something: asking to quantize only what cannot be quantized is an error, matching
    /// nothing is worth a note, and so is a pattern that also reaches weights that stay as they are.
    fn check(&self, rule: &Rule, model: &Model<'_>, notes: &mut Vec<String>) -> Result<()> {
        if self.matched == 0 {
            notes.push(format!("the rule '{rule}' decides for no tensor"));
            return Ok(());
        }
        let Some(refused) = &self.refused else { return Ok(()) };
        let what = format!("{} {:?}: {}", refused.tensor, refused.shape, refused.reason.text(model));
        if self.quantized == 0 {
            return Err(Error::argument(
                "rule",
                format!("{:?}, which reaches {what}", rule.to_string()),
                "a pattern for two-dimensional F16, BF16 or F32 weights of linear layers",
            ));
        }
        notes.push(format!("the rule '{rule}' also reaches {} tensors that stay as they are ({what})", self.refusals));
        Ok(())
    }
}
