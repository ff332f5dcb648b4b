//! The AVX2 path.

use std::arch::x86_64::*;

use half::f16;

use super::scalar::{self, Halves};
use crate::dtype::Element;

/// Its conversions.
struct Avx2;

impl Halves for Avx2 {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn widen(from: &[f16], to: &mut [f32]) {
        let (halves, rest) = from.as_chunks::<8>();
        let (wide, last) = to.as_chunks_mut::<8>();
        for (from, to) in halves.iter().zip(wide) {
            // SAFETY: 8 values each.
            unsafe { _mm256_storeu_ps(to.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().cast()))) }
        }
        last.iter_mut().zip(rest).for_each(|(to, from)| *to = from.to_f32());
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn narrow(from: &[f32], to: &mut [f16]) {
        let (wide, rest) = from.as_chunks::<8>();
        let (halves, last) = to.as_chunks_mut::<8>();
        for (from, to) in wide.iter().zip(halves) {
            // SAFETY: 8 values each.
            unsafe {
                let narrow = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm256_loadu_ps(from.as_ptr()));
                _mm_storeu_si128(to.as_mut_ptr().cast(), narrow);
            }
        }
        last.iter_mut().zip(rest).for_each(|(to, from)| *to = f16::from_f32(*from));
    }
}

/// # Safety
/// The machine has the path, as for all of these.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn largest<T: Element, const SHORT: bool>(row: &[T]) -> f32 {
    // SAFETY: the caller's.
    unsafe { scalar::largest::<T, Avx2, SHORT>(row) }
}

/// # Safety
/// As [`largest`].
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn largest_below<T: Element, const SHORT: bool>(row: &[T], threshold: f32, marks: &mut [u8]) -> f32 {
    // SAFETY: the caller's.
    unsafe { scalar::largest_below::<T, Avx2, SHORT>(row, threshold, marks) }
}

/// # Safety
/// As [`largest`]; `codes` is as long as the row.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn encode<T: Element, const SHORT: bool>(row: &[T], scale: f32, codes: &mut [i8]) {
    // SAFETY: the caller's.
    unsafe { scalar::encode::<T, Avx2, SHORT>(row, scale, codes) }
}

/// # Safety
/// As [`largest`]; `out` is as long as the codes.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn read<T: Element>(codes: &[i8], scale: f32, out: &mut [T]) {
    // SAFETY: the caller's.
    unsafe { scalar::read::<T, Avx2>(codes, scale, out) }
}

/// # Safety
/// As [`read`].
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn read_rounded<T: Element>(codes: &[i8], scale: f32, out: &mut [f32]) {
    // SAFETY: the caller's.
    unsafe { scalar::read_rounded::<T, Avx2>(codes, scale, out) }
}
