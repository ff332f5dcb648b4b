//! The AVX-512 path.

use std::arch::x86_64::*;

use half::f16;

use super::scalar::{self, Halves};
use crate::dtype::Element;

/// Its conversions.
struct Avx512;

impl Halves for Avx512 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c,fma")]
    unsafe fn widen(from: &[f16], to: &mut [f32]) {
        let (halves, rest) = from.as_chunks::<16>();
        let (wide, last) = to.as_chunks_mut::<16>();
        for (from, to) in halves.iter().zip(wide) {
            // SAFETY: 16 values each.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), _mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast()))) }
        }
        last.iter_mut().zip(rest).for_each(|(to, from)| *to = from.to_f32());
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c,fma")]
    unsafe fn narrow(from: &[f32], to: &mut [f16]) {
        let (wide, rest) = from.as_chunks::<16>();
        let (halves, last) = to.as_chunks_mut::<16>();
        for (from, to) in wide.iter().zip(halves) {
            // SAFETY: 16 values each.
            unsafe {
                let narrow = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm512_loadu_ps(from.as_ptr()));
                _mm256_storeu_si256(to.as_mut_ptr().cast(), narrow);
            }
        }
        last.iter_mut().zip(rest).for_each(|(to, from)| *to = f16::from_f32(*from));
    }
}

/// # Safety
/// The machine has the path, as for all of these.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c,fma")]
pub unsafe fn largest<T: Element, const SHORT: bool>(row: &[T]) -> f32 {
    // SAFETY: the caller's.
    unsafe { scalar::largest::<T, Avx512, SHORT>(row) }
}

/// # Safety
/// As [`largest`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c,fma")]
pub unsafe fn largest_below<T: Element, const SHORT: bool>(row: &[T], threshold: f32, marks: &mut [u8]) -> f32 {
    // SAFETY: the caller's.
    unsafe { scalar::largest_below::<T, Avx512, SHORT>(row, threshold, marks) }
}

/// # Safety
/// As [`largest`]; `codes` is as long as the row.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c,fma")]
pub unsafe fn encode<T: Element, const SHORT: bool>(row: &[T], scale: f32, codes: &mut [i8]) {
    // SAFETY: the caller's.
    unsafe { scalar::encode::<T, Avx512, SHORT>(row, scale, codes) }
}

/// # Safety
/// As [`largest`]; `out` is as long as the codes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c,fma")]
pub unsafe fn read<T: Element>(codes: &[i8], scale: f32, out: &mut [T]) {
    // SAFETY: the caller's.
    unsafe { scalar::read::<T, Avx512>(codes, scale, out) }
}

/// # Safety
/// As [`read`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c,fma")]
pub unsafe fn read_rounded<T: Element>(codes: &[i8], scale: f32, out: &mut [f32]) {
    // SAFETY: the caller's.
    unsafe { scalar::read_rounded::<T, Avx512>(codes, scale, out) }
}
