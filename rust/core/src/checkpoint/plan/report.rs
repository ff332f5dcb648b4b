//! A plan for programs: what callers in other languages get.

use std::path::Path;

use serde::Serialize;

use super::types::{Operation, Plan, TensorPlan};
use crate::checkpoint::dtype::torch_name;

/// A whole plan.
#[derive(Debug, Clone, Serialize)]
pub struct PlanReport<'a> {
    /// What it is for.
    pub operation: Operation,
    /// The source folder.
    pub source: String,
    /// The architecture that config.json names.
    pub architecture: Option<&'a str>,
    /// Whether rules for it exist.
    pub known_architecture: bool,
    /// Remarks for the reader.
    pub notes: &'a [String],
    /// Every tensor or quantized weight.
    pub tensors: Vec<TensorLine<'a>>,
    /// The files to write.
    pub shards: Vec<ShardLine<'a>>,
    /// Other files to copy.
    pub copies: Vec<CopyLine>,
    /// Files of the source that are not copied.
    pub left_out: Vec<LeftOut<'a>>,
    /// `llm_int8_skip_modules` of the output.
    pub skip_modules: Option<&'a [String]>,
    /// The dtype of the quantized model, as torch calls it.
    pub model_dtype: Option<&'static str>,
    /// Sums over the tensors that become the same, in the order in which these appear.
    pub types: Vec<TypeLine<'a>>,
    /// Sums.
    pub totals: Totals,
}

/// What becomes of one tensor or quantized weight.
#[derive(Debug, Clone, Serialize)]
pub struct TensorLine<'a> {
    /// The tensor's name.
    pub name: &'a str,
    /// Its shape.
    pub shape: &'a [usize],
    /// What it is.
    pub from: &'a str,
    /// What it becomes.
    pub to: &'a str,
    /// Bytes before.
    pub bytes_in: u64,
    /// Bytes after.
    pub bytes_out: u64,
    /// Why.
    pub reason: &'a str,
    /// The output file.
    pub shard: &'a str,
}

/// One file to write.
#[derive(Debug, Clone, Serialize)]
pub struct ShardLine<'a> {
    /// Its name.
    pub file: &'a str,
    /// Bytes at most.
    pub bytes: u64,
    /// How many tensors it holds.
    pub tensors: usize,
}

/// One file to copy.
#[derive(Debug, Clone, Serialize)]
pub struct CopyLine {
    /// Its path inside the source.
    pub file: String,
    /// Its size.
    pub bytes: u64,
}

/// One file of the source that is not copied.
#[derive(Debug, Clone, Serialize)]
pub struct LeftOut<'a> {
    /// Its path inside the source.
    pub file: String,
    /// Why not.
    pub reason: &'a str,
}

/// Sums over the tensors that become the same.
#[derive(Debug, Clone, Serialize)]
pub struct TypeLine<'a> {
    /// What they become: `nf4`, `fp4`, `int8`, a dtype, or `keep`.
    #[serde(rename = "type")]
    pub name: &'a str,
    /// How many tensors.
    pub tensors: usize,
    /// Single numbers.
    pub weights: u64,
    /// Bytes before.
    pub bytes_in: u64,
    /// Bytes after.
    pub bytes_out: u64,
}

/// Sums over all tensors.
#[derive(Debug, Clone, Serialize)]
pub struct Totals {
    /// Tensors, a quantized weight with all of its parts counting as one.
    pub tensors: usize,
    /// Those that are quantized or dequantized.
    pub quantized_tensors: usize,
    /// Single numbers.
    pub weights: u64,
    /// Those that are quantized or dequantized.
    pub quantized_weights: u64,
    /// Bytes of all tensors before.
    pub bytes_in: u64,
    /// Bytes of all tensors after.
    pub bytes_out: u64,
    /// Bits after for each number.
    pub bits_per_weight: f64,
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

impl Plan {
    /// The plan for programs.
    pub fn report(&self) -> PlanReport<'_> {
        PlanReport {
            operation: self.operation,
            source: text(&self.source.folder),
            architecture: self.architecture.as_deref(),
            known_architecture: self.known_architecture,
            notes: &self.notes,
            tensors: self
                .tensors
                .iter()
                .map(|t| TensorLine {
                    name: &t.name,
                    shape: &t.shape,
                    from: &t.from,
                    to: &t.to,
                    bytes_in: t.bytes_in,
                    bytes_out: t.bytes_out,
                    reason: &t.reason,
                    shard: &self.shards[t.shard].name,
                })
                .collect(),
            shards: self
                .shards
                .iter()
                .map(|s| ShardLine { file: &s.name, bytes: s.layout.max_len, tensors: s.layout.tensors.len() })
                .collect(),
            copies: self
                .source
                .small_files
                .iter()
                .map(|(path, bytes)| CopyLine { file: text(path), bytes: *bytes })
                .collect(),
            left_out: self.source.left_out.iter().map(|(path, reason)| LeftOut { file: text(path), reason }).collect(),
            skip_modules: self.skip_modules.as_deref(),
            model_dtype: self.model_dtype.and_then(torch_name),
            types: self.types(),
            totals: self.totals(),
        }
    }

    fn types(&self) -> Vec<TypeLine<'_>> {
        let mut lines: Vec<TypeLine<'_>> = Vec::new();
        for tensor in &self.tensors {
            let at = lines.iter().position(|line| line.name == tensor.to).unwrap_or_else(|| {
                lines.push(TypeLine { name: &tensor.to, tensors: 0, weights: 0, bytes_in: 0, bytes_out: 0 });
                lines.len() - 1
            });
            let line = &mut lines[at];
            line.tensors += 1;
            line.weights += tensor.elements();
            line.bytes_in += tensor.bytes_in;
            line.bytes_out += tensor.bytes_out;
        }
        lines
    }

    fn totals(&self) -> Totals {
        let weights: u64 = self.tensors.iter().map(TensorPlan::elements).sum();
        let bytes_out: u64 = self.tensors.iter().map(|t| t.bytes_out).sum();
        let changed = || self.tensors.iter().filter(|t| t.to != "keep");
        Totals {
            tensors: self.tensors.len(),
            quantized_tensors: changed().count(),
            weights,
            quantized_weights: changed().map(TensorPlan::elements).sum(),
            bytes_in: self.bytes_in(),
            bytes_out,
            bits_per_weight: if weights == 0 { 0.0 } else { bytes_out as f64 * 8.0 / weights as f64 },
        }
    }
}
