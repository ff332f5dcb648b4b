//! The AVX2 path: codes widened to 16 bits. Products of bytes would be added up in 16 bits, which saturate.

use std::arch::x86_64::*;

use super::kernel::{Kernel, LANES, Pair, PairProduct, STEP, Sums};
use crate::gemm::blocked::kernel::Rows;

/// AVX2.
pub struct Avx2;

impl Kernel for Avx2 {
    const DEPTH: usize = 2;
    const LANES: usize = 16;
    const ROWS: usize = 6;
    const ROW_STEP: usize = 2;
    const TILE_ROWS: usize = 48;
    const FEW_ROWS: usize = 16;
    const OFFSET: bool = false;
    const PAIRS: [PairProduct; LANES] = [pair::<1>, pair::<2>, pair::<3>, pair::<4>];

    type Session = ();

    unsafe fn session() {}

    unsafe fn product(words: usize, lanes: *const u32, rows: Rows, sums: Sums) {
        // SAFETY: the caller's.
        unsafe {
            match rows.count {
                0..=2 => product::<2>(words, lanes, rows, sums),
                3..=4 => product::<4>(words, lanes, rows, sums),
                _ => product::<6>(words, lanes, rows, sums),
            }
        }
    }

    #[target_feature(enable = "avx2")]
    unsafe fn weight_words(codes: &[i8], out: *mut u32) {
        let out = out.cast::<i16>();
        let (whole, rest) = codes.as_chunks::<16>();
        for (i, codes) in whole.iter().enumerate() {
            // SAFETY: sixteen codes, and room for them.
            unsafe {
                let wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(codes.as_ptr().cast()));
                _mm256_storeu_si256(out.add(16 * i).cast(), wide);
            }
        }
        for (i, &code) in rest.iter().enumerate() {
            // SAFETY: the caller's.
            unsafe { *out.add(16 * whole.len() + i) = i16::from(code) }
        }
    }
}

/// # Safety
/// As [`Kernel::product`], `N` rows.
#[target_feature(enable = "avx2")]
unsafe fn product<const N: usize>(words: usize, mut lanes: *const u32, rows: Rows, sums: Sums) {
    let mut sum = [[_mm256_setzero_si256(); 2]; N];
    let mut row = rows.words;
    for _ in 0..words {
        // SAFETY: the caller's.
        unsafe {
            let lane = [_mm256_loadu_si256(lanes.cast()), _mm256_loadu_si256(lanes.add(8).cast())];
            for (i, sum) in sum.iter_mut().enumerate() {
                let pair = _mm256_set1_epi32(*row.add(i * rows.row_stride) as i32);
                sum[0] = _mm256_add_epi32(sum[0], _mm256_madd_epi16(lane[0], pair));
                sum[1] = _mm256_add_epi32(sum[1], _mm256_madd_epi16(lane[1], pair));
            }
            (lanes, row) = (lanes.add(16), row.add(1));
        }
    }
    for (i, sum) in sum.iter().enumerate() {
        for (half, &sum) in sum.iter().enumerate() {
            // SAFETY: the caller's.
            unsafe {
                let at = sums.at.add(i * sums.stride + 8 * half).cast::<__m256i>();
                let sum = if sums.first { sum } else { _mm256_add_epi32(_mm256_loadu_si256(at), sum) };
                _mm256_storeu_si256(at, sum);
            }
        }
    }
}

/// # Safety
/// As the functions of [`Kernel::PAIRS`], `N` rows of activations.
#[target_feature(enable = "avx2")]
unsafe fn pair<const N: usize>(pair: &Pair) -> [[i32; LANES]; 2] {
    let mut sums = [[_mm256_setzero_si256(); N]; 2];
    let whole = pair.len / STEP;
    for step in 0..whole {
        // SAFETY: the caller's.
        unsafe {
            let rows = pair.rows.map(|row| row.add(step * STEP));
            pair.prefetch(step);
            add::<N>(rows, pair.x.add(step * STEP / 2), pair.x_stride, &mut sums);
        }
    }
    if !pair.len.is_multiple_of(STEP) {
        // SAFETY: the caller's; activations go on with zeros.
        unsafe {
            let last = pair.last();
            add::<N>([last[0].as_ptr(), last[1].as_ptr()], pair.x.add(whole * STEP / 2), pair.x_stride, &mut sums);
        }
    }
    let mut totals = [[0; LANES]; 2];
    for (totals, sums) in totals.iter_mut().zip(sums) {
        for (total, sum) in totals.iter_mut().zip(sums) {
            *total = across(sum);
        }
    }
    totals
}

/// Adds the products of [`STEP`] codes of two rows.
///
/// # Safety
/// AVX2; the rows have as many readable codes, `N` rows of activations as many words of them.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn add<const N: usize>(rows: [*const i8; 2], x: *const u32, x_stride: usize, sums: &mut [[__m256i; N]; 2]) {
    for part in 0..STEP / 16 {
        // SAFETY: the caller's.
        unsafe {
            let codes = rows.map(|row| _mm256_cvtepi8_epi16(_mm_loadu_si128(row.add(16 * part).cast())));
            for lane in 0..N {
                let x = _mm256_loadu_si256(x.add(lane * x_stride + 8 * part).cast());
                sums[0][lane] = _mm256_add_epi32(sums[0][lane], _mm256_madd_epi16(codes[0], x));
                sums[1][lane] = _mm256_add_epi32(sums[1][lane], _mm256_madd_epi16(codes[1], x));
            }
        }
    }
}

/// The sum of eight lanes.
#[inline]
#[target_feature(enable = "avx2")]
fn across(sum: __m256i) -> i32 {
    let sum = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum));
    let sum = _mm_add_epi32(sum, _mm_shuffle_epi32::<0b01_00_11_10>(sum));
    _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32::<0b10_11_00_01>(sum)))
}
