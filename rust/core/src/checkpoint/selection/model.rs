//! What `config.json` and the names of tensors say of the model, and what that makes of each tensor.

use std::borrow::Cow;
use std::collections::HashSet;

use safetensors::Dtype;
use serde_json::Value;

use super::architectures::{
    BESIDE_OUTPUT, CLASSES, ClassFacts, FAMILIES, Family, OUTPUT_EMBEDDINGS, OUTPUT_NAMES, ROUTERS, is_embedding,
};
use super::evidence::{Code, Evidence, Layout, is_outside};
use super::experts::{Experts, experts_of, split_expert};
use super::facts::{TensorFacts, collect_model_types, module_of};
use super::known;
use super::matching::{path_matches, plain_key_matches};
use super::names::Renames;
use super::prefixes::base_prefix;
use crate::checkpoint::dtype::is_float;

/// Why a tensor is treated as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
    Linear,
    Conv1d,
    OutputEmbedding,
    Tied,
    LastLayer,
    Float32,
    NotSelected,
    Bias,
    Norm,
    Vector,
    Parameter,
    Embedding,
    Router,
    Expert,
    Fusion,
    Convolution,
    NotLinear,
    Attention,
    Fused,
    Dtype(Dtype),
    Dimensions(usize),
    Empty,
    Table,
    Unplaced,
    Unclear,
}

/// What one tensor is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Class {
    /// The weight of a module that transformers can convert.
    pub linear: bool,
    /// Stored `[in, out]`.
    pub conv1d: bool,
    /// Why the loader keeps this linear layer by default.
    pub kept: Option<Reason>,
    /// Why it cannot be quantized at all.
    pub never: Option<Reason>,
    /// The linear layers that transformers makes of this tensor, where it has none of its own.
    pub parts: &'static [&'static str],
}

impl Class {
    fn other(reason: Reason) -> Self {
        Self { linear: false, conv1d: false, kept: None, never: Some(reason), parts: &[] }
    }

    pub fn reason(&self) -> Reason {
        self.never.or(self.kept).unwrap_or(if self.conv1d { Reason::Conv1d } else { Reason::Linear })
    }
}

/// What is known of the model.
pub(super) struct Model<'c> {
    /// Whether the rules have been compared with transformers on this `model_type`.
    pub known: bool,
    architecture: Option<&'c str>,
    model_type: Option<&'c str>,
    families: Vec<&'static Family>,
    class: Option<&'static ClassFacts>,
    /// Paths of the module that holds the last parameter, with the number of the last layer filled in.
    last: Vec<Cow<'static, str>>,
    tied: bool,
    custom_code: bool,
    experts: Experts,
    /// What the headers show.
    evidence: Evidence,
    /// A model that some loader builds from its `config.json`, by code that the rules have not been compared with.
    cautious: bool,
    /// Modules with an `in_proj_weight`: `nn.MultiheadAttention`, whose `out_proj` is a subclass of `nn.Linear`.
    attentions: HashSet<String>,
}

impl<'c> Model<'c> {
    pub fn new(config: Option<&'c Value>, code: Code, tensors: &[TensorFacts<'_>]) -> Self {
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
        let class = architecture.and_then(|name| CLASSES.iter().find(|facts| facts.classes.contains(&name)));
        let known = model_type.is_some() && model_types.iter().all(|name| known::contains(name));
        let custom_code = config.is_some_and(|config| config.get("auto_map").is_some());
        Self {
            known,
            experts: experts_of(config),
            evidence: Evidence::new(config, if custom_code { code } else { Code::Unseen }, tensors),
            cautious: custom_code || !known && (model_type.is_some() || architecture.is_some()),
            custom_code,
            architecture,
            model_type,
            families: FAMILIES
                .iter()
                .filter(|family| family.model_types.iter().any(|name| model_types.contains(name)))
                .collect(),
            class,
            last: class.map_or_else(Vec::new, |facts| facts.last.iter().map(|path| last_path(path, tensors)).collect()),
            tied: config.is_some_and(is_tied),
            attentions: tensors
                .iter()
                .filter_map(|tensor| tensor.name.strip_suffix(".in_proj_weight"))
                .map(str::to_owned)
                .collect(),
        }
    }

    /// The class that `config.json` names, else the `model_type`.
    pub fn name(&self) -> Option<&'c str> {
        self.architecture.or(self.model_type)
    }

    /// How transformers renames this model's modules while loading.
    pub fn renames(&self, tensors: &[TensorFacts<'_>]) -> Renames {
        Renames::new(self.model_type, self.architecture, tensors)
    }

    /// Whether somebody's own code decides what each module is.
    pub fn is_cautious(&self) -> bool {
        self.cautious
    }

    /// The name under which classes with a head hold the base model, where all of them use one.
    pub fn base_prefix(&self) -> Option<String> {
        self.model_type.and_then(base_prefix)
    }

    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if !self.known {
            let what = match self.name() {
                Some(name) => format!("the rules do not know {name}"),
                None => "config.json names no architecture".to_owned(),
            };
            let ask = match (self.cautious, self.custom_code) {
                (false, _) => "",
                (true, false) => "; what they do not show is kept (--selection transformers asks the model's class)",
                (true, true) => {
                    "; what they do not show is kept \
                     (--selection transformers --trust-remote-code runs the model's own code and asks it)"
                }
            };
            notes.push(format!("{what}: planned by names and shapes{ask}"));
        } else if self.custom_code {
            notes.push(
                "the model has code of its own (auto_map): planned as if it were transformers' class, and what headers \
                 do not show is kept (--selection transformers --trust-remote-code runs that code and asks it)"
                    .into(),
            );
        }
        notes
    }

    /// Says what a tensor is.
    pub fn classify(&self, tensor: &TensorFacts<'_>) -> Class {
        let module = module_of(tensor.name);
        let leaf = tensor.name.rsplit('.').next().unwrap_or("");
        let name = module.rsplit('.').next().unwrap_or("");
        if is_integer(tensor.dtype) {
            return Class::other(Reason::Dtype(tensor.dtype));
        }
        if leaf == "bias" || leaf.ends_with("_bias") {
            return Class::other(Reason::Bias);
        }
        if is_fused_expert(tensor.name, tensor.shape) {
            return Class::other(Reason::Fusion);
        }
        if leaf == "weight" && tensor.shape.len() == 2 && split_expert(tensor.name).is_some() {
            return self.classify_expert(tensor, module);
        }
        let fused = if leaf == "weight" { module } else { tensor.name };
        for (path, parts) in self.families.iter().flat_map(|family| family.fused) {
            if tensor.shape.len() == 2 && path_matches(path, fused) {
                return Class { parts, ..Class::other(Reason::Fused) };
            }
        }
        if leaf != "weight" {
            return Class::other(Reason::Parameter);
        }
        match tensor.shape.len() {
            2 => {}
            0 | 1 if is_norm(name) => return Class::other(Reason::Norm),
            0 | 1 => return Class::other(Reason::Vector),
            3..=5 => return Class::other(Reason::Convolution),
            n => return Class::other(Reason::Dimensions(n)),
        }
        if is_embedding(module) {
            return Class::other(Reason::Embedding);
        }
        if self.any(|family| family.not_linear, module) {
            return Class::other(Reason::NotLinear);
        }
        if !self.any(|family| family.linear, module) {
            if ROUTERS.contains(&name) {
                return Class::other(Reason::Router);
            }
            if module.strip_suffix(".out_proj").is_some_and(|parent| self.attentions.contains(parent)) {
                return Class::other(Reason::Attention);
            }
        }
        self.classify_linear(tensor, module)
    }

    /// A weight of one of several experts. Who knows the architecture has to take it under its name.
    fn classify_expert(&self, tensor: &TensorFacts<'_>, module: &str) -> Class {
        let projection = module.rsplit('.').next().unwrap_or("");
        let read = match self.experts {
            Experts::Named(names) => names.contains(projection),
            Experts::Unreadable => false,
            Experts::Unknown => !self.known,
        };
        if !read {
            return Class::other(Reason::Expert);
        }
        self.classify_linear(tensor, module)
    }

    /// Whether this is the weight of an expert of an architecture in the table.
    pub fn names_expert(&self, tensor: &TensorFacts<'_>) -> bool {
        matches!(self.experts, Experts::Named(_)) && split_expert(tensor.name).is_some()
    }

    fn classify_linear(&self, tensor: &TensorFacts<'_>, module: &str) -> Class {
        let tied = |facts: &ClassFacts| facts.tied.iter().any(|path| path_matches(path, module));
        let kept = if self.in_float32(module) {
            Some(Reason::Float32)
        } else if self.class.is_some_and(tied) {
            Some(Reason::Tied)
        } else if self.is_output(module) {
            Some(if self.tied { Reason::Tied } else { Reason::OutputEmbedding })
        } else if self.last.iter().any(|path| path_matches(path, module)) || self.is_score(module) {
            Some(Reason::LastLayer)
        } else {
            self.unshown(tensor, module)
        };
        let layout = self.layout(module, tensor.shape);
        let never = if tensor.shape.contains(&0) {
            Some(Reason::Empty)
        } else if !is_float(tensor.dtype) {
            Some(Reason::Dtype(tensor.dtype))
        } else {
            let unclear = (layout == Layout::Unclear).then_some(Reason::Unclear);
            kept.filter(|reason| matches!(reason, Reason::Float32 | Reason::Tied)).or(unclear)
        };
        Class { linear: true, conv1d: layout == Layout::Conv1d, kept, never, parts: &[] }
    }

    /// Why a weight that looks like that of a linear layer may be something else, where nobody knows the code.
    fn unshown(&self, tensor: &TensorFacts<'_>, module: &str) -> Option<Reason> {
        if !self.cautious {
            None
        } else if self.evidence.is_table(module, tensor.shape) {
            Some(Reason::Table)
        } else {
            (!self.known && is_outside(module) && !self.evidence.has_bias(module)).then_some(Reason::Unplaced)
        }
    }

    /// Whether the headers, or the architecture, show a `Conv1D`.
    pub fn lies_as_conv1d(&self, tensor: &TensorFacts<'_>) -> bool {
        self.layout(module_of(tensor.name), tensor.shape) == Layout::Conv1d
    }

    fn layout(&self, module: &str, shape: &[usize]) -> Layout {
        self.evidence.layout(module, shape, self.is_conv1d(module), self.known && !self.custom_code)
    }

    fn in_float32(&self, module: &str) -> bool {
        self.families.iter().any(|family| family.float32.iter().any(|key| plain_key_matches(key, module)))
    }

    /// Whether this is the weight, of whatever kind, of a module that the architecture keeps in float32.
    pub fn is_float32(&self, tensor: &TensorFacts<'_>) -> bool {
        tensor.name.ends_with(".weight") && self.in_float32(module_of(tensor.name))
    }

    pub fn is_conv1d(&self, module: &str) -> bool {
        self.any(|family| family.conv1d, module)
    }

    /// Modules that the loader has and the checkpoint has not, because their weight is that of another one: output
    /// embeddings above all.
    pub fn absent(&self, tensors: &[TensorFacts<'_>]) -> Vec<Cow<'static, str>> {
        let mut names: Vec<Cow<'static, str>> = Vec::new();
        names.extend(self.class.iter().flat_map(|facts| facts.shared).map(|name| Cow::Borrowed(*name)));
        let modules = || tensors.iter().filter_map(|tensor| tensor.name.strip_suffix(".weight"));
        if modules().any(|module| self.is_output(module)) {
            return names;
        }
        for module in modules() {
            for (beside, output) in BESIDE_OUTPUT {
                if let Some(parent) = module.strip_suffix(beside) {
                    names.push(Cow::Owned(format!("{parent}{output}")));
                }
            }
        }
        let families = self.families.iter().flat_map(|family| family.output).filter(|path| !path.contains('*'));
        names.extend(families.map(|path| Cow::Borrowed(path.trim_start_matches('^'))));
        names.push(Cow::Borrowed("lm_head"));
        if self.cautious {
            let more = OUTPUT_NAMES.iter().filter(|name| **name != "lm_head" && self.tied);
            names.extend(more.map(|name| Cow::Borrowed(*name)));
        }
        names
    }

    fn is_output(&self, module: &str) -> bool {
        let matches = |paths: &[&str]| paths.iter().any(|path| path_matches(path, module));
        if self.architecture.is_some_and(|name| name.ends_with("ForCTC"))
            || self.class.is_some_and(|facts| matches(facts.not_output))
        {
            return false;
        }
        matches(OUTPUT_EMBEDDINGS) || self.families.iter().any(|family| matches(family.output))
    }

    /// A bias-free `score` is the last parameter of sequence classifiers and reward models; of token classifiers it
    /// has a bias, which is then the last one.
    fn is_score(&self, module: &str) -> bool {
        path_matches("score", module)
            && !self.architecture.is_some_and(|name| name.ends_with("ForTokenClassification"))
            && !self.class.is_some_and(|facts| facts.not_output.contains(&"score"))
    }

    fn any(&self, paths: impl Fn(&Family) -> &'static [&'static str], module: &str) -> bool {
        self.families.iter().any(|family| paths(family).iter().any(|path| path_matches(path, module)))
    }

    /// A reason in words.
    pub fn explain(&self, reason: Reason) -> String {
        let whose = || self.name().map_or_else(String::new, |name| format!(" of {name}"));
        match reason {
            Reason::Linear if self.known => "linear weight".into(),
            Reason::Linear => "linear weight by its shape and name".into(),
            Reason::Conv1d => "Conv1D weight, transposed".into(),
            Reason::OutputEmbedding => "output embedding".into(),
            Reason::Tied => "tied weight".into(),
            Reason::LastLayer => format!("last layer{}", whose()),
            Reason::Float32 => "kept in float32 by the architecture".into(),
            Reason::NotSelected => "not selected by transformers".into(),
            Reason::Bias => "bias".into(),
            Reason::Norm => "norm".into(),
            Reason::Vector => "vector".into(),
            Reason::Parameter => "parameter of its own".into(),
            Reason::Embedding => "embedding".into(),
            Reason::Router => "router (Mixture-of-Experts)".into(),
            Reason::Expert => {
                format!("experts (Mixture-of-Experts){}, which no loader reads in another form", whose())
            }
            Reason::Fusion => format!("fused experts (Mixture-of-Experts){}, which are not taken apart", whose()),
            Reason::Convolution => "convolution".into(),
            Reason::NotLinear => format!("not an nn.Linear{}", whose()),
            Reason::Attention => "output of nn.MultiheadAttention, not a plain nn.Linear".into(),
            Reason::Fused => "transformers splits or merges it while loading".into(),
            Reason::Dtype(dtype) if is_integer(dtype) => format!("integer tensor ({dtype:?})"),
            Reason::Dtype(dtype) => format!("{dtype:?} is neither F16, BF16 nor F32"),
            Reason::Dimensions(n) => format!("{n}-dimensional"),
            Reason::Empty => "empty".into(),
            Reason::Table => "an output layer or a table, by its name or its size".into(),
            Reason::Unplaced => "outside the layers and without a bias: nothing shows that it is linear".into(),
            Reason::Unclear => "nn.Linear or Conv1D: the headers do not say which".into(),
        }
    }
}

/// Fills the largest number that occurs in the place of `$` into a path.
fn last_path(path: &'static str, tensors: &[TensorFacts<'_>]) -> Cow<'static, str> {
    if !path.contains('$') {
        return Cow::Borrowed(path);
    }
    let pattern = path.replace('$', "*");
    let from_end = path.rsplit('.').position(|part| part == "$").unwrap_or(0);
    let largest = tensors
        .iter()
        .map(|tensor| module_of(tensor.name))
        .filter(|module| path_matches(&pattern, module))
        .filter_map(|module| module.rsplit('.').nth(from_end)?.parse::<u64>().ok())
        .max();
    Cow::Owned(path.replace('$', &largest.map_or_else(|| "*".to_owned(), |n| n.to_string())))
}

/// A tensor that holds the weights of all experts (`experts.gate_up_proj`).
fn is_fused_expert(name: &str, shape: &[usize]) -> bool {
    shape.len() >= 3 && [".experts.", ".local_experts."].iter().any(|list| name.contains(list))
}

fn is_norm(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    name.contains("norm") || name.starts_with("ln") || name.contains("_ln")
}

pub(super) fn is_integer(dtype: Dtype) -> bool {
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

fn is_tied(config: &Value) -> bool {
    let flag = |config: &Value| config.get("tie_word_embeddings").and_then(Value::as_bool);
    flag(config).or_else(|| config.get("text_config").and_then(flag)).unwrap_or(false)
}
