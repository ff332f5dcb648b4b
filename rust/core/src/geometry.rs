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
    element_count(&[n, k]).ok_or_else(|| Error::argument("n x k", format!("{n} x {k}"), "less than 2^64"))
}

/// Bytes that hold `n` 4-bit codes.
pub fn packed_len(n: usize) -> usize {
    n.div_ceil(2)
}

/// Of `n` rows of `k` 4-bit codes that begin `stride` bytes apart: all bytes, and the scales of all blocks, which run on
/// across the rows.
///
/// # Errors
/// [`Error::Argument`] when a row does not fit in `stride`, or the rows do not fit in memory.
pub fn strided_lengths(n: usize, k: usize, stride: usize, blocksize: BlockSize) -> Result<(usize, usize)> {
    let row = packed_len(k);
    if stride < row {
        return Err(Error::argument("stride", stride, format!("at least {row} (the bytes of a row of {k} codes)")));
    }
    let Some(before) = n.checked_sub(1) else {
        return Ok((0, 0));
    };
    let bytes = before.checked_mul(stride).and_then(|bytes| bytes.checked_add(row));
    let Some(bytes) = bytes.filter(|&bytes| bytes <= usize::MAX / 4) else {
        return Err(Error::argument("n", n, format!("a number of rows of {stride} bytes that fits in memory")));
    };
    Ok((bytes, blocksize.absmax_len(before * stride * 2 + k)))
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
    Err(Error::argument(argument, found, format!("{expected} elements long ({why})")))
}
