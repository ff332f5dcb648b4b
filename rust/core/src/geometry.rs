//! Block sizes, packed and absmax lengths.

use crate::error::{Error, Result};

/// The block sizes of the format: values that share one scale.
pub const BLOCK_SIZES: [usize; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];

/// Block size of the 8-bit quantization of scales ("double quantization").
pub const NESTED_BLOCK_SIZE: usize = 256;

/// A legal number of values per scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct BlockSize(usize);

impl BlockSize {
    /// The format's default: 64.
    pub const DEFAULT: Self = Self(64);

    /// The block size of doubly quantized scales: [`NESTED_BLOCK_SIZE`].
    pub const NESTED: Self = Self(NESTED_BLOCK_SIZE);

    /// Checks that `blocksize` is one of [`BLOCK_SIZES`].
    pub fn new(blocksize: usize) -> Result<Self> {
        if BLOCK_SIZES.contains(&blocksize) {
            Ok(Self(blocksize))
        } else {
            Err(Error::argument("blocksize", blocksize, format!("one of {BLOCK_SIZES:?}")))
        }
    }

    /// The number of values per scale.
    pub fn get(self) -> usize {
        self.0
    }

    /// How many scales `n` values have; the last block may be short.
    pub fn absmax_len(self, n: usize) -> usize {
        n.div_ceil(self.0)
    }
}

/// The number of weights of a matrix `[n, k]`.
///
/// # Errors
/// [`Error::Argument`] when it does not fit in `usize`.
pub fn weight_count(n: usize, k: usize) -> Result<usize> {
    element_count(&[n, k]).ok_or_else(|| Error::argument("n", format!("{n}, with k {k}"), "less than 2^64 weights"))
}

/// Bytes that hold `n` 4-bit codes.
pub fn packed_len(n: usize) -> usize {
    n.div_ceil(2)
}

/// The number of elements of a shape, or `None` when it does not fit in `usize`. The empty shape has one.
pub fn element_count(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))
}

/// Checks that `argument` has as many elements as `why` says.
pub(crate) fn check_length(argument: &'static str, found: usize, expected: usize, why: &str) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::argument(argument, format!("{found} elements long"), format!("{expected} elements ({why})")))
}
