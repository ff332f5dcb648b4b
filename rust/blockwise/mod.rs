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

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod eight_bit;
mod element;
mod scalar;
mod simd;
mod stream;

use rayon::prelude::*;

use crate::codebook::QuantType;
use crate::error::{Error, Result};
use crate::geometry::{BlockSize, packed_len};

pub(crate) use eight_bit::quantize_block;
pub use eight_bit::{ByteMap, dequantize_8bit, dequantize_8bit_serial, quantize_8bit};
pub use element::Element;
pub use simd::{SIMD_VARIABLE, Simd};

/// Values per parallel task: a multiple of every block size, and small enough for a core's cache. Up to so many are
/// worked on by the calling thread alone.
pub const TASK: usize = 1 << 16;

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
/// [`Error::Argument`] unless `packed` has `ceil(n / 2)` bytes and `absmax` `ceil(n / blocksize)` scales, and when
/// `HALFBYTE_SIMD` names no path of this machine.
pub fn quantize<T: Element>(
    input: &[T],
    quant_type: QuantType,
    blocksize: BlockSize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Result<Finite> {
    let simd = Simd::active()?;
    check_4bit_lengths(input.len(), blocksize, packed.len(), absmax.len())?;
    let block = blocksize.get();
    if input.len() <= TASK {
        return Ok(quantize_task(simd, input, quant_type, block, packed, absmax));
    }
    let tasks = (input.par_chunks(TASK), packed.par_chunks_mut(TASK / 2), absmax.par_chunks_mut(TASK / block));
    Ok(tasks
        .into_par_iter()
        .map(|(input, packed, absmax)| quantize_task(simd, input, quant_type, block, packed, absmax))
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
    quantize_serial_with(Simd::active()?, input, quant_type, blocksize, packed, absmax)
}

/// [`quantize_serial`] on a path of choice.
///
/// # Errors
/// As [`quantize`], and [`Error::Argument`] when this machine lacks the path.
pub fn quantize_serial_with<T: Element>(
    simd: Simd,
    input: &[T],
    quant_type: QuantType,
    blocksize: BlockSize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Result<Finite> {
    check_4bit_lengths(input.len(), blocksize, packed.len(), absmax.len())?;
    Ok(quantize_task(simd.checked()?, input, quant_type, blocksize.get(), packed, absmax))
}

/// Quantizes with a path that the machine has, the lengths being right.
fn quantize_task<T: Element>(
    simd: Simd,
    input: &[T],
    quant_type: QuantType,
    blocksize: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Finite {
    // The SIMD paths take whole blocks; a short last one is left to the scalar path.
    let blocks = if simd == Simd::Scalar { 0 } else { input.len() / blocksize };
    let (whole, rest) = input.split_at(blocks * blocksize);
    let (whole_packed, rest_packed) = packed.split_at_mut(whole.len() / 2);
    let (whole_absmax, rest_absmax) = absmax.split_at_mut(blocks);
    let finite = match simd {
        Simd::Scalar => Finite::AllFinite,
        // SAFETY: the machine has the instructions, and the slices hold `blocks` whole blocks.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx2 => unsafe { avx2::quantize(whole, quant_type, blocksize, whole_packed, whole_absmax) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Simd::Avx512 => unsafe { avx512::quantize(whole, quant_type, blocksize, whole_packed, whole_absmax) },
        #[cfg(not(target_arch = "x86_64"))]
        Simd::Avx2 | Simd::Avx512 => unreachable!("{simd} for {} and {}", whole_packed.len(), whole_absmax.len()),
    };
    finite.and(scalar::quantize(rest, quant_type, blocksize, rest_packed, rest_absmax))
}

/// Reads `out.len()` values back, on rayon's current threads. The module's description is the contract.
///
/// # Errors
/// [`Error::Argument`] unless `packed` has `ceil(n / 2)` bytes and `absmax` `ceil(n / blocksize)` scales, and when
/// `HALFBYTE_SIMD` names no path of this machine.
pub fn dequantize<T: Element>(
    packed: &[u8],
    absmax: &[f32],
    quant_type: QuantType,
    blocksize: BlockSize,
    out: &mut [T],
) -> Result<()> {
    let simd = Simd::active()?;
    check_4bit_lengths(out.len(), blocksize, packed.len(), absmax.len())?;
    let block = blocksize.get();
    let stores = Stores::of(out);
    if out.len() <= TASK {
        dequantize_task(simd, stores, packed, absmax, quant_type, block, out);
        return Ok(());
    }
    (packed.par_chunks(TASK / 2), absmax.par_chunks(TASK / block), out.par_chunks_mut(TASK))
        .into_par_iter()
        .for_each(|(packed, absmax, out)| dequantize_task(simd, stores, packed, absmax, quant_type, block, out));
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
    dequantize_serial_with(Simd::active()?, packed, absmax, quant_type, blocksize, out)
}

/// [`dequantize_serial`] on a path of choice.
///
/// # Errors
/// As [`dequantize`], and [`Error::Argument`] when this machine lacks the path.
pub fn dequantize_serial_with<T: Element>(
    simd: Simd,
    packed: &[u8],
    absmax: &[f32],
    quant_type: QuantType,
    blocksize: BlockSize,
    out: &mut [T],
) -> Result<()> {
    check_4bit_lengths(out.len(), blocksize, packed.len(), absmax.len())?;
    dequantize_task(simd.checked()?, Stores::of(out), packed, absmax, quant_type, blocksize.get(), out);
    Ok(())
}

/// Dequantizes with a path that the machine has, the lengths being right.
fn dequantize_task<T: Element>(
    simd: Simd,
    stores: Stores,
    packed: &[u8],
    absmax: &[f32],
    quant_type: QuantType,
    blocksize: usize,
    out: &mut [T],
) {
    let decode = |packed: &[u8], absmax: &[f32], out: &mut [T]| {
        let blocks = if simd == Simd::Scalar { 0 } else { out.len() / blocksize };
        let (whole, rest) = out.split_at_mut(blocks * blocksize);
        let (whole_packed, rest_packed) = packed.split_at(whole.len() / 2);
        let (whole_absmax, rest_absmax) = absmax.split_at(blocks);
        match simd {
            Simd::Scalar => {}
            // SAFETY: the machine has the instructions, and the slices hold `blocks` whole blocks.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2 => unsafe { avx2::dequantize(whole_packed, whole_absmax, quant_type, blocksize, whole) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 => unsafe { avx512::dequantize(whole_packed, whole_absmax, quant_type, blocksize, whole) },
            #[cfg(not(target_arch = "x86_64"))]
            Simd::Avx2 | Simd::Avx512 => unreachable!("{simd} for {} and {}", whole_packed.len(), whole_absmax.len()),
        }
        scalar::dequantize(rest_packed, rest_absmax, quant_type, blocksize, rest);
    };
    match stores {
        Stores::Cached => decode(packed, absmax, out),
        Stores::Streaming => {
            // By way of a buffer that stays in the first-level cache: so no alignment of `out` is slow.
            let mut buffer = [T::default(); STAGE];
            let pieces = out.chunks_mut(STAGE).zip(packed.chunks(STAGE / 2)).zip(absmax.chunks(STAGE / blocksize));
            for ((out, packed), absmax) in pieces {
                let buffer = &mut buffer[..out.len()];
                decode(packed, absmax, buffer);
                stream::copy(buffer, out);
            }
            stream::finish();
        }
    }
}

/// Values that are staged for streaming stores: the largest block.
const STAGE: usize = 4096;

/// How results are written to memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stores {
    /// Through the caches.
    Cached,
    /// Past them: memory need not be read before it is overwritten.
    Streaming,
}

impl Stores {
    /// From this many bytes on, the beginning of a result has left the caches before its end is written.
    const STREAMING_BYTES: usize = 32 << 20;

    fn of<T>(out: &[T]) -> Self {
        if size_of_val(out) >= Self::STREAMING_BYTES { Self::Streaming } else { Self::Cached }
    }
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
