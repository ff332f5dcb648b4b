//! What a run will do, computed from headers alone: which tensor becomes what, why, how many bytes, in which file.

pub mod groups;
pub mod layout;
mod pack;
pub mod report;
mod types;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;

use safetensors::Dtype;
use serde_json::{Value, json};

use self::groups::{Dense, dequantize, join, keep, keep_dense, quantize, weight_dtype};
use self::pack::pack;
pub use self::types::{Action, Operation, Plan, RowsOutputs, ShardPlan, TensorPlan, WeightOutputs};
use self::types::{Group, Kind};
use super::bare;
use super::dtype::config_dtype;
use super::fused::{self, FUSED_KEY, FusedExperts, FusedTensor, Fusion};
use super::odd_scales::{self, Which};
use super::options::{DequantizeOptions, QuantizeOptions, Selected, Selector};
use super::quantized;
use super::reader::{CONV1D_KEY, Checkpoint, TensorRef};
use super::rows;
use super::selection::{self, Decision, TensorFacts, Treatment, check_experts};
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
        let fused = FusedExperts::find(&source, config)?;
        quantized::refuse(&source, config, &fused)?;
        let (dense, runs) = expanded(&source, &fused);
        let facts: Vec<TensorFacts<'_>> = dense.iter().map(Dense::facts).collect();
        if source.whole {
            check_experts(config, &facts)
                .map_err(|problem| Error::tensor(&source.folder, &problem.tensor, problem.words))?;
        }
        let selection = selection::select(config, source.code(), &facts, options, selected)?;
        let model_dtype = options.dtype.or_else(|| config_dtype(config));
        let mut groups = Vec::with_capacity(dense.len());
        let apart = apart(&fused, &runs, &selection.decisions);
        for run in &runs {
            let decisions = &selection.decisions[run.items.clone()];
            if let Some(tensor) = run.fused.filter(|tensor| !apart.contains(tensor.fusion.experts.as_str())) {
                if tensor.mxfp4 {
                    return Err(Error::tensor(
                        &source.file(run.at).path,
                        &source.tensor(run.at).name,
                        format!(
                            "holds MXFP4 codes of experts that would all be kept ({}), and nothing else here is in \
                             MXFP4: expected experts to quantize; transformers dequantizes such a checkpoint",
                            decisions[0].reason
                        ),
                    ));
                }
                groups.push(keep_dense(&Dense::of(&source, run.at), decisions[0].reason.clone(), model_dtype));
                continue;
            }
            for (dense, decision) in dense[run.items.clone()].iter().zip(decisions) {
                groups.push(match decision.treatment {
                    Treatment::Keep if run.fused.is_some() => keep_dense(dense, decision.reason.clone(), model_dtype),
                    Treatment::Keep => {
                        let entry = source.tensor(run.at);
                        let dtype = weight_dtype(entry, decision.float32, model_dtype);
                        keep(&source, run.at, decision.reason.clone(), dtype)
                    }
                    Treatment::Quantize { quant_type, transpose } => {
                        let dtype = dense.dtype(model_dtype);
                        quantize(&source, dense, quant_type, transpose, dtype, options, decision.reason.clone())?
                    }
                });
            }
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
        let mut metadata = quantized_metadata(&source, config, &groups);
        metadata.extend(fused_metadata(&fused, &apart));
        drop(apart);
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
    /// of, gets the dtype that config.json names, else float16, which it was rounded to. Scales are read, too.
    pub fn dequantize(source: Checkpoint, config: Option<&Value>, options: &DequantizeOptions) -> Result<Self> {
        let weights = find_quantized(&source, config)?;
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
        let mut notes = source.notes.clone();
        notes.extend(odd_scales::note(&source, &weights, Which::All)?);
        let mut starts: BTreeMap<TensorRef, Quantized> = BTreeMap::new();
        let mut parts: HashSet<TensorRef> = HashSet::new();
        for weight in weights {
            parts.extend(weight.parts());
            starts.insert(weight.codes(), weight);
        }
        let was = |weight: &Quantized| match weight {
            Quantized::FourBit(weight) => weight.state.dtype,
            Quantized::Int8(_) => config_dtype(config).unwrap_or(Dtype::F16),
        };
        let conv1d = source.conv1d_names();
        let mut joined = joinable(&source, &mut starts);
        notes.extend(fused::unread_note(config, starts.values().map(Quantized::name)));
        let mut groups = Vec::with_capacity(source.order.len());
        for &at in &source.order {
            if let Some((name, fusion, experts)) = joined.remove(&at) {
                let dtype = options.dtype.unwrap_or_else(|| was(&experts[0][0]));
                groups.push(join(&source, &name, &fusion, experts, dtype));
            } else if let Some(weight) = starts.remove(&at) {
                let was = was(&weight);
                let transpose = match &conv1d {
                    Some(names) => names.contains(weight.name()),
                    None => selection::is_conv1d(config, weight.name()),
                };
                groups.push(dequantize(&source, weight, options.dtype.unwrap_or(was), transpose)?);
            } else if !parts.contains(&at) {
                rows::refuse_codes_alone(&source, at)?;
                bare::refuse_codes_alone(&source, at)?;
                groups.push(keep(&source, at, "not quantized".to_owned(), source.tensor(at).dtype));
            }
        }
        let mut metadata = source.metadata();
        metadata.remove(CONV1D_KEY);
        metadata.remove(FUSED_KEY);
        let (shards, tensors) = pack(&source, groups, options.max_shard_size, metadata)?;
        Ok(Self {
            operation: Operation::Dequantize,
            shards,
            tensors,
            notes,
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

/// A tensor for all experts that quantized weights go back to: its name, how it holds them, and those of each expert.
type Join = (String, Fusion, Vec<Vec<Quantized>>);

/// The tensors that can be put together again, by the tensor of the source in whose place they come; what they are made
/// of is taken out of `starts`. Those of which a part is not quantized stay apart.
fn joinable(source: &Checkpoint, starts: &mut BTreeMap<TensorRef, Quantized>) -> BTreeMap<TensorRef, Join> {
    let by_name: HashMap<String, TensorRef> =
        starts.iter().map(|(at, weight)| (weight.name().to_owned(), *at)).collect();
    let mut found: BTreeMap<TensorRef, Join> = BTreeMap::new();
    for (name, fusion) in fused::recorded(source) {
        let count = fusion.projections.len();
        let at = |expert: usize, projection: usize| {
            let at = by_name.get(&fusion.name(expert, projection))?;
            (starts.get(at)?.shape() == fusion.matrix_shape()).then_some(*at)
        };
        let all: Option<Vec<TensorRef>> = (0..fusion.shape[0])
            .flat_map(|expert| (0..count).map(move |p| (expert, p)))
            .map(|(e, p)| at(e, p))
            .collect();
        let Some(all) = all.filter(|all| !all.is_empty() && source.find(&name).is_none()) else { continue };
        let first = all.iter().copied().min().unwrap_or(all[0]);
        let weights: Vec<Quantized> = all.iter().filter_map(|at| starts.remove(at)).collect();
        let experts = weights.chunks(count).map(<[Quantized]>::to_vec).collect();
        found.insert(first, (name, fusion, experts));
    }
    found
}

/// Tensors of the source, each with the weights that it holds.
struct Run<'a> {
    at: TensorRef,
    /// Positions of its weights in the list of all.
    items: Range<usize>,
    /// Where it holds those of many experts.
    fused: Option<&'a FusedTensor>,
}

/// Every tensor of a source, those of many experts as their matrices.
fn expanded<'a>(source: &'a Checkpoint, fused: &'a FusedExperts) -> (Vec<Dense<'a>>, Vec<Run<'a>>) {
    let mut all = Vec::with_capacity(source.order.len());
    let mut runs = Vec::with_capacity(source.order.len());
    for &at in source.order.iter().filter(|at| !fused.scales.contains(at)) {
        let first = all.len();
        let tensor = fused.tensors.get(&at);
        match tensor {
            Some(tensor) => all.extend(tensor.parts.iter().map(|part| Dense::part(part, tensor.mxfp4))),
            None => all.push(Dense::of(source, at)),
        }
        runs.push(Run { at, items: first..all.len(), fused: tensor });
    }
    (all, runs)
}

/// Paths of the experts that are taken apart: those of which some matrix is quantized, or all where loaders want that.
fn apart<'a>(fused: &'a FusedExperts, runs: &[Run<'a>], decisions: &[Decision]) -> HashSet<&'a str> {
    let mut found = HashSet::with_capacity(fused.tensors.len());
    for run in runs {
        let Some(tensor) = run.fused else { continue };
        if fused.single || decisions[run.items.clone()].iter().any(|decision| decision.treatment != Treatment::Keep) {
            found.insert(tensor.fusion.experts.as_str());
        }
    }
    found
}

/// What the output says of the tensors that were taken apart.
fn fused_metadata(fused: &FusedExperts, apart: &HashSet<&str>) -> Option<(String, String)> {
    let tensors = fused.tensors.values().filter(|tensor| apart.contains(tensor.fusion.experts.as_str()));
    let all: BTreeMap<&str, &Fusion> = tensors.map(|tensor| (tensor.name.as_str(), &tensor.fusion)).collect();
    (!all.is_empty()).then(|| (FUSED_KEY.to_owned(), json!(all).to_string()))
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
