//! What each tensor turns into: the tensors of the output, and the line of the table.

use std::sync::Arc;

use safetensors::Dtype;

use super::layout::OutputTensor;
use super::types::{Group, Joined, Kind, TensorPlan};
use crate::checkpoint::dtype::{is_float, torch_name};
use crate::checkpoint::fused::{FusedPart, Fusion};
use crate::checkpoint::matrix::Matrix;
use crate::checkpoint::options::QuantizeOptions;
use crate::checkpoint::reader::header::TensorEntry;
use crate::checkpoint::reader::{Checkpoint, TensorRef};
use crate::checkpoint::rows;
use crate::checkpoint::selection::TensorFacts;
use crate::checkpoint::state::{self, State, packed_shape};
use crate::checkpoint::weight_type::WeightType;
use crate::checkpoint::weights::Quantized;
use crate::error::{Error, Result};
use crate::geometry::NESTED_BLOCK_SIZE;

/// The dtype that a loader which does not know of quantization would give a tensor, and which it must be stored in
/// since loaders take the weights of a quantized checkpoint as they are: the model's for weights and biases, float32
/// instead of float16 where the architecture computes in float32. Other tensors (buffers, tables, and parameters that
/// models make in a dtype of their own, such as `A_log`) stay as they are.
pub fn weight_dtype(entry: &TensorEntry, float32: bool, model: Option<Dtype>) -> Dtype {
    let dtype = dtype_of(&entry.name, entry.dtype, model);
    if float32 && dtype == Dtype::F16 { Dtype::F32 } else { dtype }
}

/// The same of a weight that the architecture computes with in any dtype.
pub fn dtype_of(name: &str, dtype: Dtype, model: Option<Dtype>) -> Dtype {
    let named = [".weight", ".bias"].iter().any(|end| name.ends_with(end));
    match model {
        Some(model) if named && is_float(dtype) => model,
        _ => dtype,
    }
}

/// A tensor that is copied, or cast.
pub(super) fn keep(source: &Checkpoint, at: TensorRef, mut reason: String, dtype: Dtype) -> Group {
    let entry = source.tensor(at);
    let output = OutputTensor::fixed(entry.name.clone(), dtype, entry.shape.clone());
    if dtype != entry.dtype {
        let name = |d| torch_name(d).unwrap_or("another dtype");
        reason = format!("{reason}; {} becomes {}", name(entry.dtype), name(dtype));
    }
    let outputs = vec![output];
    let line = line(&Dense::of(source, at), "keep", &outputs, reason);
    Group { outputs, kind: Kind::Copy(Matrix::whole(source, at)), line }
}

/// A tensor of weights of experts that is kept as it is; a tensor of all of them, or a part of one.
pub(super) fn keep_dense(dense: &Dense<'_>, mut reason: String, model: Option<Dtype>) -> Group {
    let from = dense.matrix.dtype;
    let dtype = dense.dtype(model);
    if dtype != from {
        let name = |d| torch_name(d).unwrap_or("another dtype");
        reason = format!("{reason}; {} becomes {}", name(from), name(dtype));
    }
    let outputs = vec![OutputTensor::fixed(dense.name.to_owned(), dtype, dense.shape.to_vec())];
    let line = line(dense, "keep", &outputs, reason);
    Group { outputs, kind: Kind::Copy(dense.matrix), line }
}

/// A dense weight of the source: a tensor, or a part of one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dense<'a> {
    pub name: &'a str,
    pub shape: &'a [usize],
    pub matrix: Matrix,
    /// Its dtype in the source, as safetensors calls it; or that of MXFP4 codes.
    pub from: &'a str,
    pub bytes: u64,
}

impl<'a> Dense<'a> {
    pub fn of(source: &'a Checkpoint, at: TensorRef) -> Self {
        let entry = source.tensor(at);
        let matrix = Matrix::whole(source, at);
        Self { name: &entry.name, shape: &entry.shape, matrix, from: dtype_name(entry.dtype), bytes: entry.len }
    }

    pub fn part(part: &'a FusedPart, mxfp4: bool) -> Self {
        let from = if mxfp4 { "MXFP4" } else { dtype_name(part.matrix.dtype) };
        let bytes = part.matrix.stored_len(part.shape.iter().product());
        Self { name: &part.name, shape: &part.shape, matrix: part.matrix, from, bytes }
    }

    /// What the header would say of it.
    pub fn facts(&self) -> TensorFacts<'a> {
        TensorFacts { name: self.name, shape: self.shape, dtype: self.matrix.dtype }
    }

    /// The dtype that a loader would give it; see [`weight_dtype`].
    pub fn dtype(&self, model: Option<Dtype>) -> Dtype {
        dtype_of(self.name, self.matrix.dtype, model)
    }
}

/// The name that safetensors gives a dtype.
fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::BF16 => "BF16",
        Dtype::F16 => "F16",
        Dtype::F32 => "F32",
        _ => "",
    }
}

/// A weight that is quantized; `dtype` is the one that a loader would give it before.
pub(super) fn quantize(
    source: &Checkpoint,
    dense: &Dense<'_>,
    to: WeightType,
    transpose: bool,
    dtype: Dtype,
    options: &QuantizeOptions,
    reason: String,
) -> Result<Group> {
    let (name, matrix) = (dense.name, dense.matrix);
    let mut shape = dense.shape.to_vec();
    if transpose {
        shape.reverse();
    }
    let (outputs, kind) = match to {
        WeightType::FourBit(quant_type) => {
            let nested_offset = options.double_quant.then_some(0.0);
            let state = State { quant_type, blocksize: options.blocksize, dtype, shape, nested_offset };
            (weight_outputs(name, &state, options.storage), Kind::Quantize { source: matrix, state, transpose })
        }
        WeightType::Int8 => {
            let (&[rows, columns], Some(outputs)) = (&shape[..], rows_outputs(name, &shape)) else {
                return Err(Error::tensor(
                    &source.file(matrix.at).path,
                    name,
                    format!(
                        "has the shape {shape:?}: expected two dimensions, and a name that ends with {:?}, of a weight \
                         to be quantized to int8",
                        rows::WEIGHT
                    ),
                ));
            };
            (outputs, Kind::QuantizeRows { source: matrix, dtype, shape: [rows, columns], transpose })
        }
    };
    let line = line(dense, to.as_str(), &outputs, reason);
    Ok(Group { outputs, kind, line })
}

/// A quantized weight that becomes a dense one of `dtype`.
pub(super) fn dequantize(source: &Checkpoint, weight: Quantized, dtype: Dtype, transpose: bool) -> Result<Group> {
    let mut shape = weight.shape().to_vec();
    if transpose && shape.len() != 2 {
        return Err(Error::tensor(
            &source.file(weight.codes()).path,
            weight.name(),
            format!("has the shape {shape:?}: expected two dimensions of the weight of a Conv1D"),
        ));
    }
    if transpose {
        shape.reverse();
    }
    let output = OutputTensor::fixed(weight.name().to_owned(), dtype, shape.clone());
    let line = TensorPlan {
        name: weight.name().to_owned(),
        shape,
        from: weight.weight_type().to_string(),
        to: dtype.to_string(),
        bytes_in: weight.parts().iter().map(|&p| source.tensor(p).len).sum(),
        bytes_out: output.len,
        reason: match weight {
            Quantized::FourBit(_) => "4-bit weight".to_owned(),
            Quantized::Int8(_) => "8-bit weight".to_owned(),
        },
        shard: 0,
    };
    let kind = match weight {
        Quantized::FourBit(source) => Kind::Dequantize { source, transpose },
        Quantized::Int8(source) => Kind::DequantizeRows { source, transpose },
    };
    Ok(Group { outputs: vec![output], kind, line })
}

fn line(dense: &Dense<'_>, to: &str, outputs: &[OutputTensor], reason: String) -> TensorPlan {
    TensorPlan {
        name: dense.name.to_owned(),
        shape: dense.shape.to_vec(),
        from: if dense.from.is_empty() { dense.matrix.dtype.to_string() } else { dense.from.to_owned() },
        to: to.to_owned(),
        bytes_in: dense.bytes,
        bytes_out: outputs.iter().map(|o| o.len).sum(),
        reason,
        shard: 0,
    }
}

/// Quantized matrices of experts that become the tensor that they were parts of; `experts` has those of each, and `dtype`
/// is the tensor's.
pub(super) fn join(
    source: &Checkpoint,
    name: &str,
    fusion: &Fusion,
    experts: Vec<Vec<Quantized>>,
    dtype: Dtype,
) -> Group {
    let fusion = Arc::new(fusion.clone());
    let output = OutputTensor::fixed(name.to_owned(), dtype, fusion.shape.to_vec());
    let all = || experts.iter().flatten();
    let line = TensorPlan {
        name: name.to_owned(),
        shape: fusion.shape.to_vec(),
        from: all().next().map_or_else(String::new, |weight| weight.weight_type().to_string()),
        to: dtype.to_string(),
        bytes_in: all().flat_map(Quantized::parts).map(|&part| source.tensor(part).len).sum(),
        bytes_out: output.len,
        reason: "weights of experts, fused as in the original".to_owned(),
        shard: 0,
    };
    let joined = experts.into_iter().enumerate();
    let kind =
        Kind::Join(joined.map(|(expert, sources)| Joined { sources, fusion: Arc::clone(&fusion), expert }).collect());
    Group { outputs: vec![output], kind, line }
}

/// The tensors of one 4-bit weight, in the order that [`pack`](super::pack::pack) gives them back in: codes, scales,
/// codebook, JSON, then the scales' scales and codebook.
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

/// The tensors of one 8-bit weight: codes, scales, and the number that says in which order the codes lie.
fn rows_outputs(name: &str, shape: &[usize]) -> Option<Vec<OutputTensor>> {
    Some(vec![
        OutputTensor::fixed(name.to_owned(), Dtype::I8, shape.to_vec()),
        OutputTensor::fixed(rows::beside(name, rows::SCALES)?, Dtype::F32, vec![*shape.first()?]),
        OutputTensor::fixed(rows::beside(name, rows::FORMAT)?, Dtype::U8, Vec::new()),
    ])
}
