//! What a run will do, computed from headers alone: which tensor becomes what, why, how many bytes, in which file.

pub mod groups;
pub mod layout;
mod pack;
pub mod report;
mod types;

use std::collections::{BTreeMap, HashSet};

use safetensors::Dtype;
use serde_json::{Value, json};

use self::groups::{dequantize, keep, quantize, weight_dtype};
use self::pack::pack;
pub use self::types::{Action, Operation, Plan, RowsOutputs, ShardPlan, TensorPlan, WeightOutputs};
use self::types::{Group, Kind};
use super::dtype::config_dtype;
use super::options::{DequantizeOptions, QuantizeOptions, Selected, Selector};
use super::quantized;
use super::reader::{CONV1D_KEY, Checkpoint, TensorRef};
use super::rows;
use super::selection::{self, TensorFacts, Treatment};
use super::state;
use super::weights::{Quantized, find_quantized};
use crate::error::{Error, Result};

/// What is said of an output with weights of both kinds.
const MIXED: &str = "4-bit and 8-bit weights are mixed, and config.json says both: transformers, which loads one kind, refuses \
                     the output; halfbyte.load_quantized reads it";

impl Plan {
    /// Plans the quantization of `source`. `config` is its config.json; without one tensors are chosen by shape.
    /// `selected` is the answer of transformers, where the options say that it decides.
    pub fn quantize(
        source: Checkpoint,
        config: Option<&Value>,
        options: &QuantizeOptions,
        selected: Option<&Selected>,
    ) -> Result<Self> {
        if (options.selection == Selector::Transformers) != selected.is_some() {
            return Err(Error::argument(
                "selected",
                selected.is_some(),
                "a selection exactly when transformers decides",
            ));
        }
        quantized::refuse(&source, config)?;
        let facts: Vec<TensorFacts<'_>> = source.order.iter().map(|&at| source.facts(at)).collect();
        let selection = selection::select(config, &facts, options, selected)?;
        let model_dtype = options.dtype.or_else(|| config_dtype(config));
        let mut groups = Vec::with_capacity(source.order.len());
        for (&at, decision) in source.order.iter().zip(&selection.decisions) {
            let entry = source.tensor(at);
            groups.push(match decision.treatment {
                Treatment::Keep => {
                    keep(&source, at, decision.reason.clone(), weight_dtype(entry, decision.float32, model_dtype))
                }
                Treatment::Quantize { quant_type, transpose } => {
                    let dtype = weight_dtype(entry, false, model_dtype);
                    quantize(&source, at, quant_type, transpose, dtype, options, decision.reason.clone())?
                }
            });
        }
        let mut notes = source.notes.clone();
        notes.extend(selection.notes);
        let makes = |int8: bool| {
            groups
                .iter()
                .any(|group| matches!(group.kind, Kind::QuantizeRows { .. }) == int8 && group.quantized().is_some())
        };
        if makes(true) && makes(false) {
            notes.push(MIXED.to_owned());
        }
        if !groups.iter().any(|g| g.quantized().is_some()) {
            return Err(Error::file(
                &source.folder,
                "has no weight to quantize: every tensor would be kept (see the reasons with --plan on another selection, or force one with a rule)",
            ));
        }
        let metadata = quantized_metadata(&source, config, &groups);
        let model_dtype = model_dtype.or_else(|| most_common_dtype(&groups));
        let (shards, tensors) = pack(&source, groups, options.max_shard_size, metadata)?;
        Ok(Self {
            operation: Operation::Quantize,
            shards,
            tensors,
            notes,
            architecture: selection.architecture,
            known_architecture: selection.known,
            skip_modules: selection.skip_modules,
            model_dtype,
            allow_nonfinite: options.allow_nonfinite,
            options: json!({"quantize": options, "selected": selected}),
            source,
        })
    }

    /// Plans the reverse: every quantized weight becomes a dense one. An 8-bit one, which does not say what it was made
    /// of, gets the dtype that config.json names, else float16, which it was rounded to.
    pub fn dequantize(source: Checkpoint, config: Option<&Value>, options: &DequantizeOptions) -> Result<Self> {
        let weights = find_quantized(&source)?;
        if weights.is_empty() {
            let otherwise = quantized::otherwise(&source);
            if otherwise.is_empty() {
                source.order.iter().try_for_each(|&at| rows::refuse_codes_alone(&source, at))?;
            }
            return Err(Error::file(
                &source.folder,
                format!(
                    "has no 4-bit weight and no 8-bit one: expected tensors named *{}nf4 or …fp4, or *.{}{}",
                    state::STATE_INFIX,
                    rows::SCALES,
                    otherwise
                ),
            ));
        }
        let mut starts: BTreeMap<TensorRef, Quantized> = BTreeMap::new();
        let mut parts: HashSet<TensorRef> = HashSet::new();
        for weight in weights {
            parts.extend(weight.parts());
            starts.insert(weight.codes(), weight);
        }
        let conv1d = source.conv1d_names();
        let mut groups = Vec::with_capacity(source.order.len());
        for &at in &source.order {
            if let Some(weight) = starts.remove(&at) {
                let was = match &weight {
                    Quantized::FourBit(weight) => weight.state.dtype,
                    Quantized::Int8(_) => config_dtype(config).unwrap_or(Dtype::F16),
                };
                let transpose = match &conv1d {
                    Some(names) => names.contains(weight.name()),
                    None => selection::is_conv1d(config, weight.name()),
                };
                groups.push(dequantize(&source, weight, options.dtype.unwrap_or(was), transpose)?);
            } else if !parts.contains(&at) {
                rows::refuse_codes_alone(&source, at)?;
                groups.push(keep(&source, at, "not quantized".to_owned(), source.tensor(at).dtype));
            }
        }
        let mut metadata = source.metadata();
        metadata.remove(CONV1D_KEY);
        let (shards, tensors) = pack(&source, groups, options.max_shard_size, metadata)?;
        Ok(Self {
            operation: Operation::Dequantize,
            shards,
            tensors,
            notes: source.notes.clone(),
            architecture: config.and_then(|c| c["architectures"][0].as_str()).map(str::to_owned),
            known_architecture: true,
            skip_modules: None,
            model_dtype: None,
            allow_nonfinite: true,
            options: json!({"dequantize": options}),
            source,
        })
    }

    /// Bytes of the output at most, copied files included.
    pub fn bytes_out(&self) -> u64 {
        self.shards.iter().map(|s| s.layout.max_len).sum::<u64>()
            + self.source.small_files.iter().map(|f| f.1).sum::<u64>()
    }

    /// Bytes of tensors to read.
    pub fn bytes_in(&self) -> u64 {
        self.tensors.iter().map(|t| t.bytes_in).sum()
    }

    /// Whether the output needs an index.
    pub fn sharded(&self) -> bool {
        self.shards.len() > 1
    }
}

/// The dtype that most of the weights to quantize are taken in, counted by elements; of equals the first.
fn most_common_dtype(groups: &[Group]) -> Option<Dtype> {
    let mut counts: Vec<(Dtype, u64)> = Vec::new();
    for group in groups {
        let Some((dtype, _)) = group.quantized() else { continue };
        match counts.iter_mut().find(|(other, _)| *other == dtype) {
            Some((_, count)) => *count += group.line.elements(),
            None => counts.push((dtype, group.line.elements())),
        }
    }
    counts.into_iter().rev().max_by_key(|(_, count)| *count).map(|(dtype, _)| dtype)
}

/// The metadata of the output: that of the source, and which weights were transposed where whoever restores them could
/// not tell from config.json.
fn quantized_metadata(source: &Checkpoint, config: Option<&Value>, groups: &[Group]) -> BTreeMap<String, String> {
    let mut metadata = source.metadata();
    let weights: Vec<(&str, bool)> = groups
        .iter()
        .filter_map(|group| group.quantized().map(|(_, transpose)| (group.line.name.as_str(), transpose)))
        .collect();
    let config_tells = selection::conv1d_of(config);
    if weights.iter().any(|(name, transpose)| config_tells(name) != *transpose) {
        let names: Vec<&str> = weights.iter().filter(|(_, transpose)| *transpose).map(|(name, _)| *name).collect();
        metadata.insert(CONV1D_KEY.to_owned(), json!(names).to_string());
    }
    metadata
}
