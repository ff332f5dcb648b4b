//! What the SIMD paths have in common: the loops over whole blocks.
//!
//! Functions here are inlined into one of each path that enables its instructions. A block is left to the scalar path
//! when its scale is not finite or has no finite reciprocal; one of zeros is filled with code 0.

use half::{bf16, f16};

use super::scalar;
use crate::codebook::QuantType;
use crate::dtype::{DType, Element};
use crate::geometry::BLOCK_SIZES;
use crate::quant::finite::Finite;

/// Values that every step takes: 16 packed bytes. All block sizes are multiples.
pub(super) const STEP: usize = 32;

/// Values whose scales are found before their codes: the largest block, and little enough for the first-level cache.
const BATCH: usize = 4096;

/// A path's instructions.
pub(super) trait Instructions {
    /// A register of float32.
    type Vector: Copy;
    /// The sixteen values of a codebook.
    type Codebook: Copy;
    /// Finds NF4 codes.
    type Nf4: Coder<Self>;
    /// Finds FP4 codes.
    type Fp4: Coder<Self>;

    /// # Safety
    /// The machine has the path.
    unsafe fn codebook(values: &[f32; 16]) -> Self::Codebook;
}

/// What differs from one element type to the other.
pub(super) trait Values<T>: Instructions {
    /// A block's sixteen values, laid out for [`Self::look_up`].
    type Table: Copy;

    /// The largest magnitude of `n` values (a multiple of [`STEP`]) from `at` on; something that is not finite if
    /// any of them is not.
    ///
    /// # Safety
    /// The machine has the path; `n` readable values at `at`.
    unsafe fn magnitude(at: *const T, n: usize) -> f32;

    /// A register's worth of values at even positions as float32, and of those at odd positions.
    ///
    /// # Safety
    /// The machine has the path; two registers' worth of readable values at `at`.
    unsafe fn load_pairs(at: *const T) -> (Self::Vector, Self::Vector);

    /// The codebook times a finite scale, each product rounded to this type.
    ///
    /// # Safety
    /// The machine has the path.
    unsafe fn table(codebook: Self::Codebook, scale: f32) -> Self::Table;

    /// Writes the values of the [`STEP`] codes in 16 bytes.
    ///
    /// # Safety
    /// The machine has the path; 16 readable bytes at `codes`, [`STEP`] writable values at `out`.
    unsafe fn look_up(table: Self::Table, codes: *const u8, out: *mut T);
}

/// A path that takes every element type.
pub(super) trait AllValues: Values<f32> + Values<f16> + Values<bf16> {}

/// Finds the codes of scaled values.
pub(super) trait Coder<I: ?Sized> {
    /// # Safety
    /// The machine has the path.
    unsafe fn new() -> Self;

    /// Writes the codes of [`STEP`] values times `inverse`: 16 bytes. No product is NaN or far beyond ±1.
    ///
    /// # Safety
    /// The machine has the path; [`STEP`] readable values at `at`, 16 writable bytes at `bytes`.
    unsafe fn encode<T>(&self, at: *const T, inverse: f32, bytes: *mut u8)
    where
        I: Values<T>;
}

/// Quantizes whole blocks.
///
/// # Safety
/// The machine has the path. `input` is `absmax.len()` blocks long, `packed` half as many bytes.
#[inline(always)]
pub(super) unsafe fn quantize<I: AllValues, T: Element>(
    input: &[T],
    quant_type: QuantType,
    blocksize: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Finite {
    // The path takes values of the type that `T` is, which the compiler knows: it leaves one of the arms.
    // SAFETY: the caller's.
    unsafe {
        match T::DTYPE {
            DType::F16 => quantize_by::<I, f16>(bytemuck::cast_slice(input), quant_type, blocksize, packed, absmax),
            DType::Bf16 => quantize_by::<I, bf16>(bytemuck::cast_slice(input), quant_type, blocksize, packed, absmax),
            _ => quantize_by::<I, f32>(bytemuck::cast_slice(input), quant_type, blocksize, packed, absmax),
        }
    }
}

#[inline(always)]
unsafe fn quantize_by<I: Values<T>, T: Element>(
    input: &[T],
    quant_type: QuantType,
    blocksize: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Finite {
    // SAFETY: the caller's.
    unsafe {
        match quant_type {
            QuantType::Nf4 => quantize_with::<I, I::Nf4, T>(quant_type, input, blocksize, packed, absmax),
            QuantType::Fp4 => quantize_with::<I, I::Fp4, T>(quant_type, input, blocksize, packed, absmax),
        }
    }
}

#[inline(always)]
unsafe fn quantize_with<I: Values<T>, C: Coder<I>, T: Element>(
    quant_type: QuantType,
    input: &[T],
    blocksize: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Finite {
    // SAFETY: the caller's.
    let coder = unsafe { C::new() };
    // All scales of a batch first, so that no block's values wait for its own maximum and division.
    let mut finite = Finite::AllFinite;
    let batch = BATCH / blocksize;
    let batches = input.chunks(BATCH).zip(packed.chunks_mut(BATCH / 2)).zip(absmax.chunks_mut(batch));
    for ((input, packed), absmax) in batches {
        let mut inverses = [0.0; BATCH / BLOCK_SIZES[0]];
        for ((block, scale), inverse) in input.chunks_exact(blocksize).zip(absmax.iter_mut()).zip(&mut inverses) {
            // SAFETY: the block has `blocksize` values, a multiple of `STEP`.
            *scale = unsafe { I::magnitude(block.as_ptr(), blocksize) };
            *inverse = 1.0 / *scale;
        }
        let blocks = input.chunks_exact(blocksize).zip(packed.chunks_exact_mut(blocksize / 2));
        for (((block, bytes), scale), inverse) in blocks.zip(absmax).zip(inverses) {
            if *scale == 0.0 {
                bytes.fill(0); // code 0 of every NaN
                continue;
            }
            if !(inverse > 0.0 && inverse < f32::INFINITY) {
                let of_block = scalar::quantize(block, quant_type, blocksize, bytes, std::slice::from_mut(scale));
                finite = finite.and(of_block);
                continue;
            }
            for i in (0..blocksize).step_by(STEP) {
                // SAFETY: `i + STEP <= blocksize`, and there is one byte for two values.
                unsafe { coder.encode(block.as_ptr().add(i), inverse, bytes.as_mut_ptr().add(i / 2)) }
            }
        }
    }
    finite
}

/// Dequantizes whole blocks.
///
/// # Safety
/// The machine has the path. `out` is `absmax.len()` blocks long, `packed` half as many bytes.
#[inline(always)]
pub(super) unsafe fn dequantize<I: AllValues, T: Element>(
    packed: &[u8],
    absmax: &[f32],
    quant_type: QuantType,
    blocksize: usize,
    out: &mut [T],
) {
    // SAFETY: the caller's.
    unsafe {
        match T::DTYPE {
            DType::F16 => dequantize_by::<I, f16>(packed, absmax, quant_type, blocksize, bytemuck::cast_slice_mut(out)),
            DType::Bf16 => {
                dequantize_by::<I, bf16>(packed, absmax, quant_type, blocksize, bytemuck::cast_slice_mut(out));
            }
            _ => dequantize_by::<I, f32>(packed, absmax, quant_type, blocksize, bytemuck::cast_slice_mut(out)),
        }
    }
}

#[inline(always)]
unsafe fn dequantize_by<I: Values<T>, T: Element>(
    packed: &[u8],
    absmax: &[f32],
    quant_type: QuantType,
    blocksize: usize,
    out: &mut [T],
) {
    // SAFETY: the caller's.
    let codebook = unsafe { I::codebook(quant_type.values()) };
    let blocks = out.chunks_exact_mut(blocksize).zip(packed.chunks_exact(blocksize / 2)).zip(absmax);
    for ((block, bytes), &scale) in blocks {
        if !scale.is_finite() {
            scalar::dequantize(bytes, &[scale], quant_type, blocksize, block);
            continue;
        }
        // SAFETY: the block has `blocksize` values, a multiple of `STEP`, and one byte for two of them.
        unsafe {
            let table = I::table(codebook, scale);
            for i in (0..blocksize).step_by(STEP) {
                I::look_up(table, bytes.as_ptr().add(i / 2), block.as_mut_ptr().add(i));
            }
        }
    }
}
