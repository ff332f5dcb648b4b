//! Blockwise quantization to 4 bits and back.
//!
//! A tensor is one flat list of values in row-major order, cut into blocks that share a float32 scale, `absmax`. All
//! arithmetic is IEEE float32 with denormals:
//!
//! - `absmax = max(|x|)` of the block, from 0 up; NaN does not count.
//! - `scaled = x * (1 / absmax)`: the reciprocal is rounded, then the product.
//! - The code of `scaled` is found by strict `>` against the thresholds of [`crate::codebook`]; a tie goes to the
//!   lower code. NaN exceeds nothing and is not below zero, so its code is 0. FP4's sign is `scaled < 0`: `-0.0` has
//!   the code of `0.0`.
//! - Two codes to a byte, the earlier value in the high nibble. An odd list is filled up with one `0.0`.
//! - Reading: `codebook[code] * absmax`, rounded once to the output type.
//!
//! What follows for the odd blocks: an all-zero block has the reciprocal ∞ and scaled values NaN, so codes 0, and
//! reads as zeros (NF4: `-1 * 0 = -0.0`). A scale so small that its reciprocal overflows gives ±∞ and NaN. A block
//! with an infinity has the reciprocal 0: its finite values get the code of ±0 and read as NaN (NF4 reads `0 * ∞`).
//! [`Finite`] tells whether that happened.
//!
//! The scalar path is the definition; the SIMD paths give the same bits. So does every number of threads.

mod eight_bit;
mod element;
mod scalar;

use rayon::prelude::*;

use crate::codebook::QuantType;
use crate::error::{Error, Result};
use crate::geometry::{BlockSize, packed_len};

pub use eight_bit::{ByteMap, dequantize_8bit, quantize_8bit};
pub use element::Element;

/// Values per parallel task: a multiple of every block size, and small enough for a core's cache.
const TASK: usize = 1 << 16;

/// Whether every value of a quantized list was finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Finite {
    /// Neither NaN nor infinity.
    AllFinite,
    /// At least one NaN or infinity; [`first_nonfinite`] finds it.
    HasNonFinite,
}

impl Finite {
    /// Of two lists together.
    pub fn and(self, other: Self) -> Self {
        if self == Self::AllFinite { other } else { self }
    }
}

/// The position and value of the first NaN or infinity.
pub fn first_nonfinite<T: Element>(values: &[T]) -> Option<(usize, f32)> {
    values.iter().position(|v| !v.is_finite()).map(|i| (i, values[i].to_f32()))
}

/// Quantizes `input` on rayon's current threads. The module's description is the contract.
///
/// # Errors
/// [`Error::Argument`] unless `packed` has `ceil(n / 2)` bytes and `absmax` `ceil(n / blocksize)` scales.
pub fn quantize<T: Element>(
    input: &[T],
    quant_type: QuantType,
    blocksize: BlockSize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Result<Finite> {
    check_4bit_lengths(input.len(), blocksize, packed.len(), absmax.len())?;
    let block = blocksize.get();
    if input.len() <= TASK {
        return Ok(scalar::quantize(input, quant_type, block, packed, absmax));
    }
    let tasks = (input.par_chunks(TASK), packed.par_chunks_mut(TASK / 2), absmax.par_chunks_mut(TASK / block));
    Ok(tasks
        .into_par_iter()
        .map(|(input, packed, absmax)| scalar::quantize(input, quant_type, block, packed, absmax))
        .reduce(|| Finite::AllFinite, Finite::and))
}

/// [`quantize`] on the calling thread alone.
///
/// # Errors
/// As [`quantize`].
pub fn quantize_serial<T: Element>(
    input: &[T],
    quant_type: QuantType,
    blocksize: BlockSize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Result<Finite> {
    check_4bit_lengths(input.len(), blocksize, packed.len(), absmax.len())?;
    Ok(scalar::quantize(input, quant_type, blocksize.get(), packed, absmax))
}

/// Reads `out.len()` values back, on rayon's current threads. The module's description is the contract.
///
/// # Errors
/// [`Error::Argument`] unless `packed` has `ceil(n / 2)` bytes and `absmax` `ceil(n / blocksize)` scales.
pub fn dequantize<T: Element>(
    packed: &[u8],
    absmax: &[f32],
    quant_type: QuantType,
    blocksize: BlockSize,
    out: &mut [T],
) -> Result<()> {
    check_4bit_lengths(out.len(), blocksize, packed.len(), absmax.len())?;
    let block = blocksize.get();
    if out.len() <= TASK {
        scalar::dequantize(packed, absmax, quant_type, block, out);
        return Ok(());
    }
    (packed.par_chunks(TASK / 2), absmax.par_chunks(TASK / block), out.par_chunks_mut(TASK))
        .into_par_iter()
        .for_each(|(packed, absmax, out)| scalar::dequantize(packed, absmax, quant_type, block, out));
    Ok(())
}

/// [`dequantize`] on the calling thread alone.
///
/// # Errors
/// As [`dequantize`].
pub fn dequantize_serial<T: Element>(
    packed: &[u8],
    absmax: &[f32],
    quant_type: QuantType,
    blocksize: BlockSize,
    out: &mut [T],
) -> Result<()> {
    check_4bit_lengths(out.len(), blocksize, packed.len(), absmax.len())?;
    scalar::dequantize(packed, absmax, quant_type, blocksize.get(), out);
    Ok(())
}

fn check_4bit_lengths(values: usize, blocksize: BlockSize, packed: usize, absmax: usize) -> Result<()> {
    check_length("packed", packed, packed_len(values), "two codes to a byte")?;
    check_length("absmax", absmax, blocksize.absmax_len(values), "one scale per block")
}

pub(crate) fn check_length(argument: &'static str, found: usize, expected: usize, why: &str) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::argument(argument, format!("{found} elements long"), format!("{expected} elements ({why})")))
}

#[cfg(test)]
mod tests;
