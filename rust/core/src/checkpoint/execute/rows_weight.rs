//! What a run knows of a weight that becomes 8-bit.

use safetensors::Dtype;

use crate::checkpoint::matrix::Matrix;

/// A weight that becomes 8-bit.
pub(super) struct Rows {
    pub source: Matrix,
    /// The dtype that it is cast to first.
    pub dtype: Dtype,
    /// Rows and columns of the result.
    pub shape: [usize; 2],
    pub transpose: bool,
}
