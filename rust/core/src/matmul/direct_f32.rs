//! The direct product in float32: AVX-512. The codebook is exact; a block's products are added up without scale.

use std::arch::x86_64::*;

use super::direct::{Direct, GROUP, LANES, Pair};
use super::direct_avx2;
use super::pack::Matrix;
use super::weight::prefetch;

pub(super) const DIRECT: Direct =
    Direct { rows: 20, group_words: GROUP, prepare, pair, backward_rows: 1, stripe: direct_avx2::stripe };

/// Register `j` of a group, place `w`: value `8 w + (j ^ 1)`, since of a byte's values the earlier is the high nibble.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c,fma")]
unsafe fn prepare(x: Matrix<'_>, row: usize, out: &mut [u32]) {
    for (start, out) in (row * x.cols..).step_by(GROUP).zip(out.chunks_exact_mut(GROUP)) {
        let len = GROUP.min((row + 1) * x.cols - start);
        let mut natural = [0.0f32; GROUP];
        x.floats.to_f32(start..start + len, x.compute, &mut natural[..len]);
        for (j, out) in out.chunks_exact_mut(GROUP / 8).enumerate() {
            out.iter_mut().zip(natural.as_chunks::<8>().0).for_each(|(o, word)| *o = word[j ^ 1].to_bits());
        }
    }
}

unsafe fn pair(pair: &Pair) -> [[f32; LANES]; 2] {
    // SAFETY: the caller's.
    unsafe {
        match pair.count {
            1 => rows::<1>(pair),
            2 => rows::<2>(pair),
            3 => rows::<3>(pair),
            _ => rows::<4>(pair),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c,fma")]
unsafe fn rows<const M: usize>(pair: &Pair) -> [[f32; LANES]; 2] {
    // SAFETY: sixteen values, and what `Pair` describes.
    unsafe {
        let table = _mm512_loadu_ps(pair.values.as_ptr());
        let mut sums = [[_mm512_setzero_ps(); M]; 2];
        if !pair.first {
            for (i, sum) in sums.as_flattened_mut().iter_mut().enumerate() {
                *sum = _mm512_loadu_ps(pair.sums.add(i).cast());
            }
        }
        let [a, b] = pair.codes;
        for group in pair.part.clone() {
            let at = group * (GROUP / 2);
            prefetch(a.wrapping_add(at + pair.ahead));
            prefetch(b.wrapping_add(at + pair.ahead));
            let codes = [_mm512_loadu_si512(a.add(at).cast()), _mm512_loadu_si512(b.add(at).cast())];
            multiply(pair, group, codes, table, &mut sums);
        }
        if pair.half {
            let group = pair.groups;
            let at = group * (GROUP / 2);
            // Codes of zeros that are multiplied with zeros.
            let codes = [
                _mm512_zextsi256_si512(_mm256_loadu_si256(a.add(at).cast())),
                _mm512_zextsi256_si512(_mm256_loadu_si256(b.add(at).cast())),
            ];
            multiply(pair, group, codes, table, &mut sums);
        }
        let mut out = [[0.0; LANES]; 2];
        if !pair.last {
            for (i, &sum) in sums.as_flattened().iter().enumerate() {
                _mm512_storeu_ps(pair.sums.add(i).cast(), sum);
            }
            return out;
        }
        for (out, sums) in out.iter_mut().zip(sums) {
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = _mm512_reduce_add_ps(sum);
            }
        }
        out
    }
}

/// Adds the products of one group.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c,fma")]
#[allow(clippy::needless_range_loop, reason = "the same lane of several arrays")]
unsafe fn multiply<const M: usize>(
    pair: &Pair,
    group: usize,
    codes: [__m512i; 2],
    table: __m512,
    sums: &mut [[__m512; M]; 2],
) {
    // SAFETY: the caller's.
    unsafe {
        for r in 0..2 {
            // The look-up uses the low four bits of each 32.
            let weights = [
                _mm512_permutexvar_ps(codes[r], table),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(codes[r]), table),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<8>(codes[r]), table),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<12>(codes[r]), table),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<16>(codes[r]), table),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<20>(codes[r]), table),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<24>(codes[r]), table),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<28>(codes[r]), table),
            ];
            let [first, second] = pair.scales_of(r, group);
            // The first 32 bytes, and so the lower lanes, are the first half.
            let scale = _mm512_mask_mov_ps(_mm512_set1_ps(first), 0xff00, _mm512_set1_ps(second));
            for m in 0..M {
                let x = pair.x.add(m * pair.x_stride + group * GROUP).cast::<f32>();
                let mut block = _mm512_mul_ps(_mm512_loadu_ps(x), weights[0]);
                for (j, &weight) in weights.iter().enumerate().skip(1) {
                    block = _mm512_fmadd_ps(_mm512_loadu_ps(x.add(16 * j)), weight, block);
                }
                sums[r][m] = _mm512_fmadd_ps(block, scale, sums[r][m]);
            }
        }
    }
}
