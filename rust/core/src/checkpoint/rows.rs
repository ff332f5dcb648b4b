//! The 8-bit weights of a checkpoint (LLM.int8()): found by their scales, with all that belongs to them.
//!
//! | key | dtype, shape |
//! |---|---|
//! | `weight` | int8 `[rows, columns]` |
//! | `SCB` | float32 `[rows]` |
//! | `weight_format` | uint8, 0: rows in their order; not in every checkpoint |
//!
//! The keys stand beside each other in one module: `mlp.up_proj.SCB` belongs to `mlp.up_proj.weight`. A dense model may
//! have a tensor of its own under one of these names, so that it takes two of the three to tell an 8-bit weight.

use safetensors::Dtype;

use super::reader::{Checkpoint, TensorRef};
use crate::error::{Error, Result};

/// The name of a quantized weight inside its module.
pub const WEIGHT: &str = "weight";
/// The name of the scales.
pub const SCALES: &str = "SCB";
/// The name of the number that says in which order the codes lie.
pub const FORMAT: &str = "weight_format";
/// That number for rows.
pub const ROW_MAJOR: u8 = 0;

/// An 8-bit weight of a source.
#[derive(Debug, Clone)]
pub struct RowsSource {
    /// Its name.
    pub name: String,
    /// Its shape: rows and columns.
    pub shape: [usize; 2],
    /// Codes.
    pub codes: TensorRef,
    /// Scales.
    pub scales: TensorRef,
    /// All tensors that belong to it.
    pub parts: Vec<TensorRef>,
}

impl RowsSource {
    /// The number of its values.
    pub fn elements(&self) -> usize {
        self.shape[0] * self.shape[1]
    }
}

/// The start that a tensor's name has in common with the others of its module, when it ends with `leaf`.
fn module<'n>(name: &'n str, leaf: &str) -> Option<&'n str> {
    name.strip_suffix(leaf).filter(|start| start.is_empty() || start.ends_with('.'))
}

/// The name of the tensor called `leaf` in the module of the weight `weight`; none where that is not called `weight`.
pub fn beside(weight: &str, leaf: &str) -> Option<String> {
    module(weight, WEIGHT).map(|start| format!("{start}{leaf}"))
}

/// Whether a tensor of this name stands beside an 8-bit weight; `dtype_of` gives the dtype of the tensor of a name.
///
/// It does where the weight is int8, or where the scales and the number of the order are both there.
pub fn is_beside_rows(name: &str, dtype_of: &impl Fn(&str) -> Option<Dtype>) -> bool {
    [(SCALES, FORMAT), (FORMAT, SCALES)].into_iter().any(|(leaf, other)| {
        module(name, leaf).is_some_and(|start| {
            dtype_of(&format!("{start}{WEIGHT}")) == Some(Dtype::I8) || dtype_of(&format!("{start}{other}")).is_some()
        })
    })
}

/// The 8-bit weights of a checkpoint, each checked: its codes and scales are there and fit each other.
pub fn find_rows(source: &Checkpoint) -> Result<Vec<RowsSource>> {
    let dtype_of = |name: &str| source.find(name).map(|at| source.tensor(at).dtype);
    let mut found = Vec::new();
    for &at in &source.order {
        let name = &source.tensor(at).name;
        if !is_beside_rows(name, &dtype_of) {
            continue;
        }
        if let Some(start) = module(name, SCALES) {
            found.push(read(source, at, start)?);
        } else if let Some(start) = module(name, FORMAT) {
            let scales = format!("{start}{SCALES}");
            if source.find(&scales).is_none() {
                return Err(Error::tensor(
                    &source.file(at).path,
                    name,
                    format!("belongs to an 8-bit weight, and there is no {scales:?} beside it"),
                ));
            }
        }
    }
    Ok(found)
}

fn read(source: &Checkpoint, scales: TensorRef, start: &str) -> Result<RowsSource> {
    let fail = |at: TensorRef, problem: String| Error::tensor(&source.file(at).path, &source.tensor(at).name, problem);
    let name = format!("{start}{WEIGHT}");
    let Some(codes) = source.find(&name) else {
        return Err(fail(scales, format!("holds the scales of an 8-bit weight, and there is no {name:?} beside it")));
    };
    let entry = source.tensor(codes);
    let (Dtype::I8, &[rows, columns]) = (entry.dtype, &entry.shape[..]) else {
        let problem = format!(
            "is {} of shape {:?}: expected I8 of two dimensions, since {start}{SCALES} is there",
            entry.dtype, entry.shape
        );
        return Err(fail(codes, problem));
    };
    let entry = source.tensor(scales);
    if entry.dtype != Dtype::F32 || entry.elements() != rows {
        let problem = format!(
            "is {} of shape {:?}: expected F32 of shape [{rows}], one scale for each row of {name:?}",
            entry.dtype, entry.shape
        );
        return Err(fail(scales, problem));
    }
    let mut parts = vec![codes, scales];
    if let Some(format) = source.find(&format!("{start}{FORMAT}")) {
        let entry = source.tensor(format);
        if entry.dtype != Dtype::U8 || entry.elements() != 1 {
            return Err(fail(format, format!("is {} of shape {:?}: expected one U8", entry.dtype, entry.shape)));
        }
        let order = source.read(format)?;
        if order != [ROW_MAJOR] {
            return Err(fail(
                format,
                format!("is {}: expected {ROW_MAJOR} (rows), the only order that loaders still read", order[0]),
            ));
        }
        parts.push(format);
    }
    Ok(RowsSource { name, shape: [rows, columns], codes, scales, parts })
}

/// An error when a tensor that belongs to no quantized weight is a matrix of int8 all the same: the codes of a weight
/// whose scales are not there.
pub fn refuse_codes_alone(source: &Checkpoint, at: TensorRef) -> Result<()> {
    let entry = source.tensor(at);
    let Some(scales) = beside(&entry.name, SCALES) else { return Ok(()) };
    if entry.dtype != Dtype::I8 || entry.shape.len() != 2 {
        return Ok(());
    }
    let problem = format!("is int8, and there is no {scales:?} beside it: expected the scales of its rows");
    Err(Error::tensor(&source.file(at).path, &entry.name, problem))
}
