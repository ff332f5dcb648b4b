//! What a plan is made of.

use std::sync::Arc;

use safetensors::Dtype;
use serde::Serialize;
use serde_json::Value;

use super::layout::{Layout, OutputTensor};
use crate::checkpoint::fused::Fusion;
use crate::checkpoint::matrix::Matrix;
use crate::checkpoint::reader::Checkpoint;
use crate::checkpoint::rows::RowsSource;
use crate::checkpoint::state::State;
use crate::checkpoint::weights::{Quantized, WeightSource};

/// What a plan is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Operation {
    /// 16- or 32-bit weights become 4- or 8-bit ones.
    Quantize,
    /// Quantized weights become 16- or 32-bit ones.
    Dequantize,
}

/// What happens to one tensor (or one quantized weight with all of its parts) of the source. Numbers are positions in the
/// [`Layout`] of the shard.
#[derive(Debug, Clone)]
pub enum Action {
    /// Bytes are copied.
    Copy {
        /// From where.
        source: Matrix,
        /// To where.
        output: usize,
    },
    /// A weight becomes 4-bit.
    Quantize {
        /// The weight.
        source: Matrix,
        /// What its JSON will say; the offset is a placeholder.
        state: State,
        /// Whether the weight is transposed first.
        transpose: bool,
        /// Where its parts go.
        outputs: WeightOutputs,
    },
    /// A weight becomes 8-bit.
    QuantizeRows {
        /// The weight.
        source: Matrix,
        /// The dtype that it is cast to first, before float16.
        dtype: Dtype,
        /// Rows and columns of the result.
        shape: [usize; 2],
        /// Whether the weight is transposed first.
        transpose: bool,
        /// Where its parts go.
        outputs: RowsOutputs,
    },
    /// An 8-bit weight becomes 16- or 32-bit.
    DequantizeRows {
        /// Its parts.
        source: RowsSource,
        /// Whether the weight is transposed afterwards.
        transpose: bool,
        /// To where.
        output: usize,
    },
    /// Matrices of one expert become 16- or 32-bit, in their places of a tensor for all experts.
    Join {
        /// The matrices, one for each projection that the tensor holds.
        sources: Vec<Quantized>,
        /// How the tensor holds them.
        fusion: Arc<Fusion>,
        /// Which expert they are of.
        expert: usize,
        /// To where.
        output: usize,
    },
    /// A 4-bit weight becomes 16- or 32-bit.
    Dequantize {
        /// Its parts.
        source: WeightSource,
        /// Whether the weight is transposed afterwards.
        transpose: bool,
        /// To where.
        output: usize,
    },
}

/// The places of a 4-bit weight's parts in a [`Layout`].
#[derive(Debug, Clone)]
pub struct WeightOutputs {
    /// Packed codes.
    pub packed: usize,
    /// Scales.
    pub absmax: usize,
    /// The codebook.
    pub quant_map: usize,
    /// The scales' scales and codebook.
    pub nested: Option<(usize, usize)>,
    /// The JSON.
    pub state: usize,
}

/// The places of an 8-bit weight's parts in a [`Layout`].
#[derive(Debug, Clone)]
pub struct RowsOutputs {
    /// Codes.
    pub codes: usize,
    /// Scales.
    pub scales: usize,
    /// The order of the codes.
    pub format: usize,
}

/// One file to write.
#[derive(Debug)]
pub struct ShardPlan {
    /// Its name.
    pub name: String,
    /// The place of every tensor in it.
    pub layout: Layout,
    /// What to do, in the order of the source.
    pub actions: Vec<Action>,
}

/// One line of the table that a reader sees.
#[derive(Debug, Clone)]
pub struct TensorPlan {
    /// The tensor's name.
    pub name: String,
    /// Its shape, of the weight itself when it is quantized.
    pub shape: Vec<usize>,
    /// What it is.
    pub from: String,
    /// What it becomes: `nf4`, `fp4`, `int8`, a dtype, or `keep`.
    pub to: String,
    /// Bytes before.
    pub bytes_in: u64,
    /// Bytes after.
    pub bytes_out: u64,
    /// Why.
    pub reason: String,
    /// The output file.
    pub shard: usize,
}

/// What a run will do.
#[derive(Debug)]
pub struct Plan {
    /// What it is for.
    pub operation: Operation,
    /// The source, open.
    pub source: Checkpoint,
    /// The files to write.
    pub shards: Vec<ShardPlan>,
    /// A line for each tensor or quantized weight.
    pub tensors: Vec<TensorPlan>,
    /// Remarks for the reader.
    pub notes: Vec<String>,
    /// The architecture that config.json names.
    pub architecture: Option<String>,
    /// Whether rules for it exist.
    pub known_architecture: bool,
    /// What `llm_int8_skip_modules` must say for a loader to convert exactly what is quantized here.
    pub skip_modules: Option<Vec<String>>,
    /// The dtype that the quantized model's other weights have: the one asked for, else that of config.json, else that
    /// of most weights that are quantized. None when nothing is quantized.
    pub model_dtype: Option<Dtype>,
    /// Whether weights may hold NaN or infinities.
    pub allow_nonfinite: bool,
    /// All that decided about it, for the record of an interrupted run.
    pub options: Value,
}

/// The tensors that one source tensor turns into, before they have a place.
pub(super) struct Group {
    pub outputs: Vec<OutputTensor>,
    pub kind: Kind,
    pub line: TensorPlan,
}

pub(super) enum Kind {
    Copy(Matrix),
    Join(Vec<Joined>),
    Quantize { source: Matrix, state: State, transpose: bool },
    QuantizeRows { source: Matrix, dtype: Dtype, shape: [usize; 2], transpose: bool },
    Dequantize { source: WeightSource, transpose: bool },
    DequantizeRows { source: RowsSource, transpose: bool },
}

/// The matrices of one expert that go to a tensor for all.
pub(super) struct Joined {
    pub sources: Vec<Quantized>,
    pub fusion: Arc<Fusion>,
    pub expert: usize,
}

impl Group {
    /// Of a weight that is quantized: the dtype that it is taken in, and whether it is transposed.
    pub fn quantized(&self) -> Option<(Dtype, bool)> {
        match &self.kind {
            Kind::Quantize { state, transpose, .. } => Some((state.dtype, *transpose)),
            Kind::QuantizeRows { dtype, transpose, .. } => Some((*dtype, *transpose)),
            Kind::Copy(_) | Kind::Join(_) | Kind::Dequantize { .. } | Kind::DequantizeRows { .. } => None,
        }
    }
}

impl TensorPlan {
    /// The number of its values.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&d| d as u64).product()
    }
}
