//! Describing a checkpoint of any origin: what is quantized, how, and how much room it takes.

use std::collections::{BTreeMap, HashSet};

use serde::Serialize;
use serde_json::Value;

use super::dtype::torch_name;
use super::odd_scales::{self, Which};
use super::reader::{Checkpoint, TensorRef};
use super::weights::{Quantized, find_quantized};
use crate::error::Result;

/// What a checkpoint holds.
#[derive(Debug, Clone, Serialize)]
pub struct InspectReport<'a> {
    /// The folder.
    pub path: String,
    /// Files of weights.
    pub files: Vec<FileLine<'a>>,
    /// Each quantized weight.
    pub weights: Vec<WeightLine>,
    /// Every other tensor.
    pub tensors: Vec<TensorLine<'a>>,
    /// Sums over tensors of one kind.
    pub groups: Vec<KindLine>,
    /// Sums over all tensors.
    pub totals: InspectTotals,
    /// Remarks for the reader.
    pub notes: Vec<String>,
}

/// One file of weights.
#[derive(Debug, Clone, Serialize)]
pub struct FileLine<'a> {
    /// Its name.
    pub file: Option<String>,
    /// Its size.
    pub bytes: u64,
    /// How many tensors it holds.
    pub tensors: usize,
    /// Its metadata.
    pub metadata: &'a BTreeMap<String, String>,
}

/// One quantized weight with all of its parts.
#[derive(Debug, Clone, Serialize)]
pub struct WeightLine {
    /// The weight's name.
    pub name: String,
    /// What it is quantized to: `nf4`, `fp4` or `int8`.
    pub quant_type: &'static str,
    /// Values per scale; none where a scale belongs to a row.
    pub blocksize: Option<usize>,
    /// Whether the scales are quantized too.
    pub nested: bool,
    /// The dtype of the weight before it was quantized; none where nothing says it.
    pub dtype: Option<&'static str>,
    /// The weight's shape.
    pub shape: Vec<usize>,
    /// The dtype that codes are stored as.
    pub storage: Option<&'static str>,
    /// Bytes of all its parts.
    pub bytes: u64,
    /// Bits for each value.
    pub bits_per_weight: f64,
    /// The file that holds the packed codes.
    pub file: Option<String>,
}

/// One tensor that is not quantized.
#[derive(Debug, Clone, Serialize)]
pub struct TensorLine<'a> {
    /// The tensor's name.
    pub name: &'a str,
    /// Its dtype.
    pub dtype: String,
    /// Its shape.
    pub shape: &'a [usize],
    /// Its size.
    pub bytes: u64,
    /// The file that holds it.
    pub file: Option<String>,
}

/// Sums over tensors of one kind.
#[derive(Debug, Clone, Serialize)]
pub struct KindLine {
    /// The kind.
    pub kind: String,
    /// How many tensors.
    pub tensors: u64,
    /// How many values.
    pub weights: u64,
    /// How many bytes.
    pub bytes: u64,
}

/// Sums over all tensors.
#[derive(Debug, Clone, Serialize)]
pub struct InspectTotals {
    /// How many values.
    pub weights: u64,
    /// How many bytes.
    pub bytes: u64,
    /// How many quantized weights.
    pub quantized_tensors: usize,
    /// Bits for each value.
    pub bits_per_weight: f64,
}

fn bits(bytes: u64, values: u64) -> f64 {
    if values == 0 { 0.0 } else { bytes as f64 * 8.0 / values as f64 }
}

/// Describes a checkpoint; `config` is its config.json, where it is known.
pub fn inspect<'c>(checkpoint: &'c Checkpoint, config: Option<&Value>) -> Result<InspectReport<'c>> {
    let weights = find_quantized(checkpoint, config)?;
    let mut notes = checkpoint.notes.clone();
    notes.extend(odd_scales::note(checkpoint, &weights, Which::Few)?);
    let parts: HashSet<TensorRef> = weights.iter().flat_map(|w| w.parts().iter().copied()).collect();
    let mut rows = Vec::new();
    let mut groups: BTreeMap<String, (u64, u64, u64)> = BTreeMap::new();
    let (mut values, mut bytes) = (0u64, 0u64);
    let mut count = |group: String, elements: u64, len: u64| {
        let entry = groups.entry(group).or_default();
        *entry = (entry.0 + 1, entry.1 + elements, entry.2 + len);
        values += elements;
        bytes += len;
    };
    for weight in &weights {
        let len: u64 = weight.parts().iter().map(|&p| checkpoint.tensor(p).len).sum();
        let kind = weight.weight_type().as_str();
        let (nested, blocksize, dtype) = match weight {
            Quantized::FourBit(weight) => {
                (weight.nested.is_some(), Some(weight.state.blocksize.get()), torch_name(weight.state.dtype))
            }
            Quantized::Int8(_) => (false, None, None),
        };
        let elements = weight.elements() as u64;
        count(format!("{kind}{}", if nested { " double-quantized" } else { "" }), elements, len);
        rows.push(WeightLine {
            name: weight.name().to_owned(),
            quant_type: kind,
            blocksize,
            nested,
            dtype,
            shape: weight.shape().to_vec(),
            storage: torch_name(checkpoint.tensor(weight.codes()).dtype),
            bytes: len,
            bits_per_weight: bits(len, elements),
            file: file_name(checkpoint, weight.codes()),
        });
    }
    let mut tensors = Vec::new();
    for &at in &checkpoint.order {
        if parts.contains(&at) {
            continue;
        }
        let t = checkpoint.tensor(at);
        count(t.dtype.to_string(), t.elements() as u64, t.len);
        tensors.push(TensorLine {
            name: &t.name,
            dtype: t.dtype.to_string(),
            shape: &t.shape,
            bytes: t.len,
            file: file_name(checkpoint, at),
        });
    }
    let files = checkpoint.files.iter().map(|f| FileLine {
        file: f.path.file_name().map(|n| n.to_string_lossy().into_owned()),
        bytes: f.len,
        tensors: f.tensors.len(),
        metadata: &f.metadata,
    });
    Ok(InspectReport {
        path: checkpoint.folder.to_string_lossy().into_owned(),
        files: files.collect(),
        weights: rows,
        tensors,
        groups: groups
            .into_iter()
            .map(|(kind, (tensors, weights, bytes))| KindLine { kind, tensors, weights, bytes })
            .collect(),
        totals: InspectTotals {
            weights: values,
            bytes,
            quantized_tensors: weights.len(),
            bits_per_weight: bits(bytes, values),
        },
        notes,
    })
}

fn file_name(checkpoint: &Checkpoint, at: TensorRef) -> Option<String> {
    checkpoint.file(at).path.file_name().map(|n| n.to_string_lossy().into_owned())
}
