//! The direct product in float32: AVX2. The codebook is exact; a block's products are added up without scale.
//!
//! Half a group, 64 values of one block, fills a register with codes; the two nibbles of its bytes are looked up one
//! after the other.

use std::arch::x86_64::*;

use super::avx2::{Planes, planes, values_of};
use crate::gemm::direct::{Band, Direct, GROUP, LANES, PIECE, ROWS, STRIPE_ROWS, Stripe, value_at};
use crate::gemm::matrix::Matrix;
use crate::gemm::weight::prefetch_to_second_level;

pub const DIRECT: Direct = Direct {
    rows: 8,
    group_words: GROUP,
    prepare,
    bands: [(1, row::<1>), (1, row::<2>), (1, row::<3>), (1, row::<4>)],
    backward_rows: 4,
    stripe: STRIPE,
};

/// The products of stripes, which the AVX-512 paths take too.
pub const STRIPE: [unsafe fn(&Stripe); LANES] = [pieces::<1>, pieces::<2>, pieces::<3>, pieces::<4>];

/// Values looked up at a time.
const HALF: usize = PIECE / 2;

/// Activations in the order of `value_at`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn prepare(x: Matrix<'_>, row: usize, out: &mut [u32]) {
    for (start, out) in (row * x.cols..(row + 1) * x.cols).step_by(PIECE).zip(out.chunks_exact_mut(PIECE)) {
        let mut natural = [0.0f32; PIECE];
        x.floats.to_f32(start..start + PIECE, x.compute, &mut natural);
        out.iter_mut().enumerate().for_each(|(place, o)| *o = natural[value_at(place)].to_bits());
    }
}

/// A band of one row: there are no registers for the sums of more.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn row<const M: usize>(band: &Band) -> [[f32; LANES]; ROWS] {
    let planes = planes(band.values);
    let mut out = [[0.0; LANES]; ROWS];
    // SAFETY: what `Band` describes.
    unsafe {
        let mut sums = [_mm256_setzero_ps(); M];
        if !band.first {
            for (m, sum) in sums.iter_mut().enumerate() {
                *sum = _mm256_loadu_ps(band.sums.add(m).cast());
            }
        }
        let mut ahead = band.ahead;
        for group in band.part.clone() {
            prefetch_to_second_level(ahead);
            ahead = ahead.wrapping_add(GROUP / 2);
            multiply(band, 2 * group, planes, &mut sums);
            multiply(band, 2 * group + 1, planes, &mut sums);
        }
        if band.half {
            multiply(band, 2 * band.groups, planes, &mut sums);
        }
        if !band.last {
            for (m, &sum) in sums.iter().enumerate() {
                _mm256_storeu_ps(band.sums.add(m).cast(), sum);
            }
            return out;
        }
        for (out, sum) in out[0].iter_mut().zip(sums) {
            let sum = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
            let sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
            *out = _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps::<1>(sum, sum)));
        }
    }
    out
}

/// Adds the products of half a group.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn multiply<const M: usize>(band: &Band, piece: usize, planes: Planes, sums: &mut [__m256; M]) {
    // SAFETY: the caller's.
    unsafe {
        let codes = _mm256_loadu_si256(band.codes[0].add(piece * HALF).cast());
        let x = band.x.add(piece * PIECE).cast::<f32>();
        let mut blocks = [_mm256_setzero_ps(); M];
        for (half, codes) in nibbles(codes).into_iter().enumerate() {
            for (q, weight) in values_of(planes, codes).into_iter().enumerate() {
                for m in 0..M {
                    let x = _mm256_loadu_ps(x.add(m * band.x_stride + half * HALF + 8 * q));
                    blocks[m] = _mm256_fmadd_ps(x, weight, blocks[m]);
                }
            }
        }
        let scale = _mm256_broadcast_ss(&*band.scales[0].add(piece));
        for m in 0..M {
            sums[m] = _mm256_fmadd_ps(blocks[m], scale, sums[m]);
        }
    }
}

/// The high nibbles of bytes, and the low ones.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn nibbles(codes: __m256i) -> [__m256i; 2] {
    let low = _mm256_set1_epi8(15);
    [_mm256_and_si256(_mm256_srli_epi16::<4>(codes), low), _mm256_and_si256(codes, low)]
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn pieces<const M: usize>(stripe: &Stripe) {
    let planes = planes(stripe.values);
    for piece in 0..stripe.pieces {
        // SAFETY: the caller's.
        unsafe {
            // Half of a piece for all rows, then the other: there are registers for the sums of one.
            half_piece::<M, 0>(stripe, piece, planes);
            half_piece::<M, 1>(stripe, piece, planes);
        }
    }
}

/// Adds the products of the high (0) or low (1) nibbles of a piece.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn half_piece<const M: usize, const NIBBLE: usize>(stripe: &Stripe, piece: usize, planes: Planes) {
    // SAFETY: the caller's.
    unsafe {
        let at = |m: usize, q: usize| stripe.sums.add((m * stripe.pieces + piece) * PIECE + NIBBLE * HALF + 8 * q);
        let mut sums = [[_mm256_setzero_ps(); 4]; M];
        for m in 0..M {
            for q in 0..4 {
                sums[m][q] = _mm256_loadu_ps(at(m, q));
            }
        }
        let mut codes = stripe.codes.add(piece * HALF);
        for row in 0..stripe.rows {
            let weights = values_of(planes, nibbles(_mm256_loadu_si256(codes.cast()))[NIBBLE]);
            for m in 0..M {
                let factor = _mm256_broadcast_ss(&*stripe.factors.add((m * stripe.pieces + piece) * STRIPE_ROWS + row));
                for q in 0..4 {
                    sums[m][q] = _mm256_fmadd_ps(factor, weights[q], sums[m][q]);
                }
            }
            codes = codes.add(stripe.stride);
        }
        for m in 0..M {
            for q in 0..4 {
                _mm256_storeu_ps(at(m, q), sums[m][q]);
            }
        }
    }
}
