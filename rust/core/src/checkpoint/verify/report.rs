//! What a comparison found, tensor by tensor.

use serde::Serialize;

/// What a comparison found.
#[derive(Debug, Clone, Serialize)]
pub struct VerifyReport {
    /// The first folder.
    pub a: String,
    /// The second.
    pub b: String,
    /// Every tensor of both, sorted by name.
    pub tensors: Vec<Comparison>,
    /// Remarks for the reader.
    pub notes: Vec<String>,
}

/// How one tensor of two checkpoints compares.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Comparison {
    /// The tensor's name.
    pub name: String,
    /// The verdict.
    pub status: Status,
    /// What it is quantized to in the second, or its dtype there.
    pub kind: String,
    /// Its shape in the second.
    pub shape: Vec<usize>,
    /// Root mean square of the differences of values, where there are values to compare and none of them is NaN.
    pub rmse: Option<f64>,
    /// The largest difference.
    pub max_error: Option<f64>,
    /// Bytes of codes, or of the tensor, that are not the same.
    pub differing_bytes: Option<u64>,
    /// What else there is to say.
    pub detail: String,
}

/// The verdict on one tensor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// The same bytes, or the same values in another dtype; of a quantized weight beside a dense one: the same bytes as
    /// a fresh quantization.
    Identical,
    /// The same 4-bit codes; doubly quantized scales that differ in their rounding.
    EqualCodes,
    /// The same scales of an 8-bit weight; codes next to each other, of values in the middle of both, for which another
    /// order of the same float32 arithmetic decides otherwise.
    Rounded,
    /// None of these.
    Differs,
    /// Not comparable.
    Shape,
    /// Only in the first checkpoint.
    Missing,
    /// Only in the second.
    #[default]
    Extra,
}
