//! The direct product in float32: AVX2. The codebook is exact; a block's products are added up without scale.
//!
//! Half a group, 64 values of one block, fills a register with codes; the two nibbles of its bytes are looked up one
//! after the other.

use std::arch::x86_64::*;

use super::avx2::{Planes, planes, values_of};
use crate::gemm::direct::{Direct, GROUP, LANES, PIECE, Pair, STRIPE_ROWS, Stripe, value_at};
use crate::gemm::matrix::Matrix;
use crate::gemm::weight::prefetch;

pub const DIRECT: Direct = Direct {
    rows: 8,
    group_words: GROUP,
    prepare,
    pair: [rows::<1>, rows::<2>, rows::<3>, rows::<4>],
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

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn rows<const M: usize>(pair: &Pair) -> [[f32; LANES]; 2] {
    let planes = planes(pair.values);
    let mut out = [[0.0; LANES]; 2];
    // SAFETY: what `Pair` describes.
    unsafe {
        // One row after the other: there are no registers for the sums of both.
        for (r, out) in out.iter_mut().enumerate() {
            let mut sums = [_mm256_setzero_ps(); M];
            if !pair.first {
                for (m, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm256_loadu_ps(pair.sums.add(r * M + m).cast());
                }
            }
            for group in pair.part.clone() {
                prefetch(pair.codes[r].wrapping_add(group * PIECE + pair.ahead));
                let scales = pair.scales_of(r, group);
                multiply(pair, r, 2 * group, scales[0], planes, &mut sums);
                multiply(pair, r, 2 * group + 1, scales[1], planes, &mut sums);
            }
            if pair.half {
                let group = pair.groups;
                multiply(pair, r, 2 * group, pair.scales_of(r, group)[0], planes, &mut sums);
            }
            if !pair.last {
                for (m, &sum) in sums.iter().enumerate() {
                    _mm256_storeu_ps(pair.sums.add(r * M + m).cast(), sum);
                }
                continue;
            }
            for (out, sum) in out.iter_mut().zip(sums) {
                let sum = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
                let sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
                *out = _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps::<1>(sum, sum)));
            }
        }
    }
    out
}

/// Adds the products of half a group.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn multiply<const M: usize>(
    pair: &Pair,
    r: usize,
    piece: usize,
    scale: f32,
    planes: Planes,
    sums: &mut [__m256; M],
) {
    // SAFETY: the caller's.
    unsafe {
        let codes = _mm256_loadu_si256(pair.codes[r].add(piece * HALF).cast());
        let x = pair.x.add(piece * PIECE).cast::<f32>();
        let mut blocks = [_mm256_setzero_ps(); M];
        for (half, codes) in nibbles(codes).into_iter().enumerate() {
            for (q, weight) in values_of(planes, codes).into_iter().enumerate() {
                for m in 0..M {
                    let x = _mm256_loadu_ps(x.add(m * pair.x_stride + half * HALF + 8 * q));
                    blocks[m] = _mm256_fmadd_ps(x, weight, blocks[m]);
                }
            }
        }
        let scale = _mm256_set1_ps(scale);
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
