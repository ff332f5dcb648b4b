//! What a run will do, computed from headers alone: which tensor becomes what, why, how many bytes, in which file.

pub mod layout;
mod pack;
pub mod report;
mod types;

use std::collections::{BTreeMap, HashSet};

use safetensors::Dtype;
use serde_json::{Value, json};

use self::layout::OutputTensor;
use self::pack::pack;
pub use self::types::{Action, Operation, Plan, ShardPlan, TensorPlan, WeightOutputs};
use self::types::{Group, Kind};
use super::dtype::{config_dtype, is_float, torch_name};
use super::options::{DequantizeOptions, QuantizeOptions, Selected, Selector};
use super::quantized;
use super::reader::header::TensorEntry;
use super::reader::{CONV1D_KEY, Checkpoint, TensorRef};
use super::selection::{self, TensorFacts, Treatment};
use super::state::{self, State, packed_shape};
use super::weights::{WeightSource, find_weights};
use crate::error::{Error, Result};
use crate::geometry::NESTED_BLOCK_SIZE;

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
                    let mut shape = entry.shape.clone();
                    if transpose {
                        shape.reverse();
                    }
                    let state = State {
                        quant_type,
                        blocksize: options.blocksize,
                        dtype: weight_dtype(entry, false, model_dtype),
                        shape,
                        nested_offset: options.double_quant.then_some(0.0),
                    };
                    let outputs = weight_outputs(&entry.name, &state, options.storage);
                    let line = TensorPlan {
                        name: entry.name.clone(),
                        shape: entry.shape.clone(),
                        from: entry.dtype.to_string(),
                        to: quant_type.as_str().to_owned(),
                        bytes_in: entry.len,
                        bytes_out: outputs.iter().map(|o| o.len).sum(),
                        reason: decision.reason.clone(),
                        shard: 0,
                    };
                    Group { outputs, kind: Kind::Quantize { source: at, state, transpose }, line }
                }
            });
        }
        let mut notes = source.notes.clone();
        notes.extend(selection.notes);
        if !groups.iter().any(|g| matches!(g.kind, Kind::Quantize { .. })) {
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

    /// Plans the reverse: every 4-bit weight becomes a dense one.
    pub fn dequantize(source: Checkpoint, config: Option<&Value>, options: &DequantizeOptions) -> Result<Self> {
        let weights = find_weights(&source)?;
        if weights.is_empty() {
            return Err(Error::file(
                &source.folder,
                format!(
                    "has no 4-bit weight: expected tensors named *{}nf4 or …fp4{}",
                    state::STATE_INFIX,
                    quantized::otherwise(&source, config)
                ),
            ));
        }
        let mut starts: BTreeMap<TensorRef, WeightSource> = BTreeMap::new();
        let mut parts: HashSet<TensorRef> = HashSet::new();
        for weight in weights {
            parts.extend(&weight.parts);
            starts.insert(weight.packed, weight);
        }
        let conv1d = source.conv1d_names();
        let mut groups = Vec::with_capacity(source.order.len());
        for &at in &source.order {
            if let Some(weight) = starts.remove(&at) {
                let to = options.dtype.unwrap_or(weight.state.dtype);
                let transpose = match &conv1d {
                    Some(names) => names.contains(&weight.name),
                    None => selection::is_conv1d(config, &weight.name),
                };
                let mut shape = weight.state.shape.clone();
                if transpose && shape.len() != 2 {
                    return Err(Error::tensor(
                        &source.file(at).path,
                        &weight.name,
                        format!("has the shape {shape:?}: expected two dimensions of the weight of a Conv1D"),
                    ));
                }
                if transpose {
                    shape.reverse();
                }
                let output = OutputTensor::fixed(weight.name.clone(), to, shape.clone());
                let line = TensorPlan {
                    name: weight.name.clone(),
                    shape,
                    from: weight.state.quant_type.as_str().to_owned(),
                    to: to.to_string(),
                    bytes_in: weight.parts.iter().map(|&p| source.tensor(p).len).sum(),
                    bytes_out: output.len,
                    reason: "4-bit weight".to_owned(),
                    shard: 0,
                };
                groups.push(Group {
                    outputs: vec![output],
                    kind: Kind::Dequantize { source: weight, transpose },
                    line,
                });
            } else if !parts.contains(&at) {
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
        let Kind::Quantize { state, .. } = &group.kind else { continue };
        match counts.iter_mut().find(|(dtype, _)| *dtype == state.dtype) {
            Some((_, count)) => *count += group.line.elements(),
            None => counts.push((state.dtype, group.line.elements())),
        }
    }
    counts.into_iter().rev().max_by_key(|(_, count)| *count).map(|(dtype, _)| dtype)
}

/// The dtype that a loader which does not know of quantization would give a tensor, and which it must be stored in
/// since loaders take the weights of a quantized checkpoint as they are: the model's for weights and biases, float32
/// instead of float16 where the architecture computes in float32. Other tensors (buffers, tables, and parameters that
/// models make in a dtype of their own, such as `A_log`) stay as they are.
fn weight_dtype(entry: &TensorEntry, float32: bool, model: Option<Dtype>) -> Dtype {
    let named = [".weight", ".bias"].iter().any(|end| entry.name.ends_with(end));
    let dtype = match model {
        Some(model) if named && is_float(entry.dtype) => model,
        _ => entry.dtype,
    };
    if float32 && dtype == Dtype::F16 { Dtype::F32 } else { dtype }
}

fn keep(source: &Checkpoint, at: TensorRef, mut reason: String, dtype: Dtype) -> Group {
    let entry = source.tensor(at);
    let output = OutputTensor::fixed(entry.name.clone(), dtype, entry.shape.clone());
    if dtype != entry.dtype {
        let name = |d| torch_name(d).unwrap_or("another dtype");
        reason = format!("{reason}; {} becomes {}", name(entry.dtype), name(dtype));
    }
    let line = TensorPlan {
        name: entry.name.clone(),
        shape: entry.shape.clone(),
        from: entry.dtype.to_string(),
        to: "keep".to_owned(),
        bytes_in: entry.len,
        bytes_out: output.len,
        reason,
        shard: 0,
    };
    Group { outputs: vec![output], kind: Kind::Copy(at), line }
}

/// The tensors of one 4-bit weight, in the order that [`pack`] gives them back in: codes, scales, codebook, JSON, then
/// the scales' scales and codebook.
fn weight_outputs(name: &str, state: &State, storage: Dtype) -> Vec<OutputTensor> {
    let n = state.elements();
    let scales = state.blocksize.absmax_len(n);
    let nested = state.nested_offset.is_some();
    let scale_dtype = if nested { Dtype::U8 } else { Dtype::F32 };
    let mut outputs = vec![
        OutputTensor::fixed(name.to_owned(), storage, packed_shape(n, storage).to_vec()),
        OutputTensor::fixed(format!("{name}{}", state::ABSMAX), scale_dtype, vec![scales]),
        OutputTensor::fixed(format!("{name}{}", state::QUANT_MAP), Dtype::F32, vec![16]),
        OutputTensor::text(format!("{name}{}{}", state::STATE_INFIX, state.quant_type.as_str()), state.max_json_len()),
    ];
    if nested {
        let blocks = scales.div_ceil(NESTED_BLOCK_SIZE);
        outputs.push(OutputTensor::fixed(format!("{name}{}", state::NESTED_ABSMAX), Dtype::F32, vec![blocks]));
        outputs.push(OutputTensor::fixed(format!("{name}{}", state::NESTED_QUANT_MAP), Dtype::F32, vec![256]));
    }
    outputs
}

/// The metadata of the output: that of the source, and which weights were transposed where whoever restores them could
/// not tell from config.json.
fn quantized_metadata(source: &Checkpoint, config: Option<&Value>, groups: &[Group]) -> BTreeMap<String, String> {
    let mut metadata = source.metadata();
    let weights: Vec<(&str, bool)> = groups
        .iter()
        .filter_map(|group| match group.kind {
            Kind::Quantize { transpose, .. } => Some((group.line.name.as_str(), transpose)),
            _ => None,
        })
        .collect();
    let config_tells = selection::conv1d_of(config);
    if weights.iter().any(|(name, transpose)| config_tells(name) != *transpose) {
        let names: Vec<&str> = weights.iter().filter(|(_, transpose)| *transpose).map(|(name, _)| *name).collect();
        metadata.insert(CONV1D_KEY.to_owned(), json!(names).to_string());
    }
    metadata
}
