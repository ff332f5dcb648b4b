//! The AVX2 path: float32 throughout.

use std::arch::x86_64::*;

use crate::gemm::blocked::kernel::{Decoder, Kernel, Rows, Sums, decode};
use crate::gemm::weight::Run;

/// AVX2, FMA and F16C.
pub struct Avx2;

/// The codebook byte by byte: the lowest bytes of its sixteen values, the second ones, and so on, in both halves of a
/// register. A look-up of bytes takes half the time of one of words, and of the four, none is rounded.
pub type Planes = [__m256i; 4];

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub fn planes(values: &[f32; 16]) -> Planes {
    let bytes = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    let mut fours = [_mm_setzero_si128(); 4];
    for (four, values) in fours.iter_mut().zip(values.as_chunks::<4>().0) {
        // SAFETY: four values.
        *four = _mm_shuffle_epi8(unsafe { _mm_loadu_si128(values.as_ptr().cast()) }, bytes);
    }
    let low = [_mm_unpacklo_epi32(fours[0], fours[1]), _mm_unpacklo_epi32(fours[2], fours[3])];
    let high = [_mm_unpackhi_epi32(fours[0], fours[1]), _mm_unpackhi_epi32(fours[2], fours[3])];
    [
        _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(low[0], low[1])),
        _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(low[0], low[1])),
        _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(high[0], high[1])),
        _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(high[0], high[1])),
    ]
}

/// The values of 32 codes, one to a byte. Register `q` has those of bytes `4 q` to `4 q + 3` of both halves.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub fn values_of(planes: Planes, codes: __m256i) -> [__m256; 4] {
    let (a, b) = (_mm256_shuffle_epi8(planes[0], codes), _mm256_shuffle_epi8(planes[1], codes));
    let (c, d) = (_mm256_shuffle_epi8(planes[2], codes), _mm256_shuffle_epi8(planes[3], codes));
    let low = [_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)];
    let high = [_mm256_unpacklo_epi8(c, d), _mm256_unpackhi_epi8(c, d)];
    [
        _mm256_castsi256_ps(_mm256_unpacklo_epi16(low[0], high[0])),
        _mm256_castsi256_ps(_mm256_unpackhi_epi16(low[0], high[0])),
        _mm256_castsi256_ps(_mm256_unpacklo_epi16(low[1], high[1])),
        _mm256_castsi256_ps(_mm256_unpackhi_epi16(low[1], high[1])),
    ]
}

impl Decoder for Avx2 {
    type Value = f32;
    type Codebook = Planes;
    type Table = (Planes, __m256);

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn codebook(values: &[f32; 16]) -> Planes {
        planes(values)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn table(codebook: Planes, scale: f32) -> (Planes, __m256) {
        (codebook, _mm256_set1_ps(scale))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn look_up((planes, scale): (Planes, __m256), codes: *const u8, out: *mut f32) {
        // Each byte twice, those first that `values_of` puts into the same register.
        let places = _mm256_setr_epi8(
            0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13, //
            2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15,
        );
        // SAFETY: the caller's.
        unsafe {
            let bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128(codes.cast()));
            let pairs = _mm256_shuffle_epi8(bytes, places);
            // The high nibble of the first of a pair, the low one of the second.
            let first = _mm256_and_si256(_mm256_srli_epi16::<4>(pairs), _mm256_set1_epi16(0x000f));
            let second = _mm256_and_si256(pairs, _mm256_set1_epi16(0x0f00));
            for (q, value) in values_of(planes, _mm256_or_si256(first, second)).into_iter().enumerate() {
                _mm256_storeu_ps(out.add(8 * q), _mm256_mul_ps(value, scale));
            }
        }
    }
}

impl Kernel for Avx2 {
    const DEPTH: usize = 1;
    const LANES: usize = 16;
    const ROWS: usize = 6;
    const ROW_STEP: usize = 2;

    type Session = ();

    unsafe fn session() {}

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
