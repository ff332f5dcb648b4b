//! The direct product of bfloat16 activations: AVX512-BF16.
//!
//! The codebook is rounded to bfloat16; products of a block's 64 values are added up without scale, in float32.

use std::arch::x86_64::*;

use super::avx512::{bits, pairs};
use super::direct::{Direct, GROUP, LANES, ORDER, Pair};
use super::direct_avx2;
use super::pack::Matrix;
use super::weight::prefetch;

pub(super) const DIRECT: Direct =
    Direct { rows: 20, group_words: GROUP / 2, prepare, pair, backward_rows: 1, stripe: direct_avx2::stripe };

/// Register `j` of a group, place `w`: value `4 w + ORDER[j]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn prepare(x: Matrix<'_>, row: usize, out: &mut [u32]) {
    let mut places = [[0u16; GROUP / 4]; 4];
    for (places, offset) in places.iter_mut().zip(ORDER) {
        // The same sixteen twice: one half of a register is used.
        places.iter_mut().enumerate().for_each(|(w, place)| *place = (w % 16 * 4 + offset) as u16);
    }
    for (start, out) in (row * x.cols..).step_by(GROUP).zip(out.chunks_exact_mut(GROUP / 2)) {
        let len = GROUP.min((row + 1) * x.cols - start);
        let mut natural = [0u16; GROUP];
        x.floats.to_bf16(start..start + len, &mut natural[..len]);
        // SAFETY: `natural` and `out` hold four registers each, every element of `places` one.
        unsafe {
            let natural = natural.as_ptr();
            let v = [
                _mm512_loadu_si512(natural.cast()),
                _mm512_loadu_si512(natural.add(32).cast()),
                _mm512_loadu_si512(natural.add(64).cast()),
                _mm512_loadu_si512(natural.add(96).cast()),
            ];
            for (j, places) in places.iter().enumerate() {
                let places = _mm512_loadu_si512(places.as_ptr().cast());
                let low = _mm512_permutex2var_epi16(v[0], places, v[1]);
                let high = _mm512_permutex2var_epi16(v[2], places, v[3]);
                let both = _mm512_inserti64x4::<1>(low, _mm512_castsi512_si256(high));
                _mm512_storeu_si512(out.as_mut_ptr().add(16 * j).cast(), both);
            }
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

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn rows<const M: usize>(pair: &Pair) -> [[f32; LANES]; 2] {
    // SAFETY: sixteen values, and what `Pair` describes.
    unsafe {
        let values = _mm512_loadu_ps(pair.values.as_ptr());
        let table = bits(_mm512_cvtne2ps_pbh(values, values));
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
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[allow(clippy::needless_range_loop, reason = "the same lane of several arrays")]
unsafe fn multiply<const M: usize>(
    pair: &Pair,
    group: usize,
    codes: [__m512i; 2],
    table: __m512i,
    sums: &mut [[__m512; M]; 2],
) {
    // SAFETY: the caller's.
    unsafe {
        // No closures here: they would be compiled apart from this function's instructions.
        let mut scales = [_mm512_setzero_ps(); 2];
        let mut weights = [[_mm512_setzero_si512(); 4]; 2];
        for r in 0..2 {
            let [first, second] = pair.scales_of(r, group);
            // The first 32 bytes, and so the lower lanes, are the first half.
            scales[r] = _mm512_mask_mov_ps(_mm512_set1_ps(first), 0xff00, _mm512_set1_ps(second));
            // The look-up uses the low five bits of each 16, and the fifth does not matter: the table is there twice.
            weights[r] = [
                _mm512_permutexvar_epi16(codes[r], table),
                _mm512_permutexvar_epi16(_mm512_srli_epi16::<4>(codes[r]), table),
                _mm512_permutexvar_epi16(_mm512_srli_epi16::<8>(codes[r]), table),
                _mm512_permutexvar_epi16(_mm512_srli_epi16::<12>(codes[r]), table),
            ];
        }
        // Sums that do not wait for each other stand side by side.
        let mut blocks = [[_mm512_setzero_ps(); M]; 2];
        for j in 0..4 {
            for m in 0..M {
                let x = pair.x.add(m * pair.x_stride + group * (GROUP / 2) + 16 * j);
                let x = pairs(_mm512_loadu_si512(x.cast()));
                for r in 0..2 {
                    blocks[r][m] = _mm512_dpbf16_ps(blocks[r][m], x, pairs(weights[r][j]));
                }
            }
        }
        for r in 0..2 {
            for m in 0..M {
                sums[r][m] = _mm512_fmadd_ps(blocks[r][m], scales[r], sums[r][m]);
            }
        }
    }
}
