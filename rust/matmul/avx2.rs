//! The AVX2 path: float32 throughout.

use std::arch::x86_64::*;

use super::kernel::{Decoder, Kernel, Rows, Sums, decode};
use super::weight::Run;

/// AVX2, FMA and F16C.
pub(super) struct Avx2;

impl Decoder for Avx2 {
    type Value = f32;
    type Table = [__m256; 2];

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn table(values: &[f32; 16], scale: f32) -> [__m256; 2] {
        let scale = _mm256_set1_ps(scale);
        // SAFETY: sixteen values.
        let (low, high) = unsafe { (_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values[8..].as_ptr())) };
        [_mm256_mul_ps(low, scale), _mm256_mul_ps(high, scale)]
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn look_up(table: [__m256; 2], codes: *const u8, out: *mut f32) {
        for i in 0..4 {
            // SAFETY: the caller's. Four bytes hold eight codes; both nibbles of a byte go to neighbouring lanes.
            unsafe {
                let bytes = _mm_cvtsi32_si128(codes.add(4 * i).cast::<i32>().read_unaligned());
                let pairs = _mm256_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, bytes));
                // The look-ups use the low three bits; the fourth, moved to the sign, picks the half.
                let index = _mm256_srlv_epi32(pairs, _mm256_setr_epi32(4, 0, 4, 0, 4, 0, 4, 0));
                let low = _mm256_permutevar8x32_ps(table[0], index);
                let high = _mm256_permutevar8x32_ps(table[1], index);
                let is_high = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index));
                _mm256_storeu_ps(out.add(8 * i), _mm256_blendv_ps(low, high, is_high));
            }
        }
    }
}

impl Kernel for Avx2 {
    const DEPTH: usize = 1;
    const LANES: usize = 16;
    const ROWS: usize = 6;
    const ROW_STEP: usize = 2;

    unsafe fn product(words: usize, lanes: *const u32, rows: Rows, sums: Sums) {
        // SAFETY: the caller's.
        unsafe {
            match rows.count {
                0..=2 => product::<2>(words, lanes.cast(), rows, sums),
                3..=4 => product::<4>(words, lanes.cast(), rows, sums),
                _ => product::<6>(words, lanes.cast(), rows, sums),
            }
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn decode(run: &Run<'_>, out: *mut u8) {
        // SAFETY: the caller's.
        unsafe { decode::<Self>(run, out.cast()) }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn dot(words: usize, a: *const u32, b: *const u32) -> f32 {
        let (a, b) = (a.cast::<f32>(), b.cast::<f32>());
        let mut sums = [_mm256_setzero_ps(); 4];
        let whole = words - words % 32;
        // SAFETY: the caller's.
        unsafe {
            for p in (0..whole).step_by(32) {
                for (i, sum) in sums.iter_mut().enumerate() {
                    let (a, b) = (_mm256_loadu_ps(a.add(p + 8 * i)), _mm256_loadu_ps(b.add(p + 8 * i)));
                    *sum = _mm256_fmadd_ps(a, b, *sum);
                }
            }
            let sum = _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
            let sum = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
            let sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
            let mut sum = _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps::<1>(sum, sum)));
            for p in whole..words {
                sum = (*a.add(p)).mul_add(*b.add(p), sum);
            }
            sum
        }
    }
}

/// # Safety
/// As [`Kernel::product`], `N` rows.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn product<const N: usize>(words: usize, mut lanes: *const f32, rows: Rows, sums: Sums) {
    let mut sum = [[_mm256_setzero_ps(); 2]; N];
    let mut row = rows.words.cast::<f32>();
    for _ in 0..words {
        // SAFETY: the caller's.
        unsafe {
            let lane = [_mm256_loadu_ps(lanes), _mm256_loadu_ps(lanes.add(8))];
            for (i, sum) in sum.iter_mut().enumerate() {
                let value = _mm256_broadcast_ss(&*row.add(i * rows.row_stride));
                sum[0] = _mm256_fmadd_ps(lane[0], value, sum[0]);
                sum[1] = _mm256_fmadd_ps(lane[1], value, sum[1]);
            }
            (lanes, row) = (lanes.add(16), row.add(rows.word_stride));
        }
    }
    for (i, sum) in sum.iter().enumerate() {
        for (half, &sum) in sum.iter().enumerate() {
            // SAFETY: the caller's.
            unsafe {
                let at = sums.at.add(i * sums.stride + 8 * half);
                _mm256_storeu_ps(at, if sums.first { sum } else { _mm256_add_ps(_mm256_loadu_ps(at), sum) });
            }
        }
    }
}
