//! The direct products of AVX-512: in float32, and of bfloat16 activations with AVX512-BF16.
//!
//! A block's 64 products are added up without scale, in float32. The codebook is exact in float32 products, and rounded to
//! bfloat16 in those of bfloat16.

use std::arch::x86_64::*;

use super::avx512::{bits, pairs};
use super::direct_avx2::STRIPE;
use crate::gemm::direct::{Direct, GROUP, LANES, ORDER, Pair};
use crate::gemm::matrix::Matrix;
use crate::gemm::weight::prefetch;

/// In float32.
pub const F32: Direct = Direct {
    rows: 20,
    group_words: GROUP,
    prepare: prepare_f32,
    pair: [rows_f32::<1>, rows_f32::<2>, rows_f32::<3>, rows_f32::<4>],
    backward_rows: 1,
    stripe: STRIPE,
};

/// Of bfloat16 activations.
pub const BF16: Direct = Direct {
    rows: 20,
    group_words: GROUP / 2,
    prepare: prepare_bf16,
    pair: [rows_bf16::<1>, rows_bf16::<2>, rows_bf16::<3>, rows_bf16::<4>],
    backward_rows: 1,
    stripe: STRIPE,
};

/// Register `j` of a group, place `w`: value `8 w + (j ^ 1)`, since of a byte's values the earlier is the high nibble.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c,fma")]
unsafe fn prepare_f32(x: Matrix<'_>, row: usize, out: &mut [u32]) {
    for (start, out) in (row * x.cols..).step_by(GROUP).zip(out.chunks_exact_mut(GROUP)) {
        let len = GROUP.min((row + 1) * x.cols - start);
        let mut natural = [0.0f32; GROUP];
        x.floats.to_f32(start..start + len, x.compute, &mut natural[..len]);
        for (j, out) in out.chunks_exact_mut(GROUP / 8).enumerate() {
            out.iter_mut().zip(natural.as_chunks::<8>().0).for_each(|(o, word)| *o = word[j ^ 1].to_bits());
        }
    }
}

/// Register `j` of a group, place `w`: value `4 w + ORDER[j]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn prepare_bf16(x: Matrix<'_>, row: usize, out: &mut [u32]) {
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

#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c,fma")]
unsafe fn rows_f32<const M: usize>(pair: &Pair) -> [[f32; LANES]; 2] {
    // SAFETY: the caller's.
    unsafe { rows::<InF32, M>(pair) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn rows_bf16<const M: usize>(pair: &Pair) -> [[f32; LANES]; 2] {
    // SAFETY: the caller's.
    unsafe { rows::<InBf16, M>(pair) }
}

/// The products of two rows of the weight with `M` rows of activations. Inlined into a function of each of both that
/// enables its instructions.
///
/// # Safety
/// As [`Direct::pair`].
#[inline(always)]
unsafe fn rows<P: Products, const M: usize>(pair: &Pair) -> [[f32; LANES]; 2] {
    // SAFETY: what `Pair` describes.
    unsafe {
        let table = P::table(pair.values);
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
            P::multiply(pair, group, codes, table, &mut sums);
        }
        if pair.half {
            let group = pair.groups;
            let at = group * (GROUP / 2);
            // Codes of zeros that are multiplied with zeros.
            let codes = [
                _mm512_zextsi256_si512(_mm256_loadu_si256(a.add(at).cast())),
                _mm512_zextsi256_si512(_mm256_loadu_si256(b.add(at).cast())),
            ];
            P::multiply(pair, group, codes, table, &mut sums);
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

/// What differs between both.
trait Products {
    /// The codebook, as [`Self::multiply`] wants it.
    type Table: Copy;

    /// # Safety
    /// The machine has the path.
    unsafe fn table(values: &[f32; 16]) -> Self::Table;

    /// Adds the products of one group.
    ///
    /// # Safety
    /// The machine has the path, and the group is within what `Pair` describes.
    unsafe fn multiply<const M: usize>(
        pair: &Pair,
        group: usize,
        codes: [__m512i; 2],
        table: Self::Table,
        sums: &mut [[__m512; M]; 2],
    );
}

struct InF32;

impl Products for InF32 {
    type Table = __m512;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c,fma")]
    unsafe fn table(values: &[f32; 16]) -> __m512 {
        // SAFETY: sixteen values.
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c,fma")]
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
}

struct InBf16;

impl Products for InBf16 {
    type Table = __m512i;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn table(values: &[f32; 16]) -> __m512i {
        // SAFETY: sixteen values.
        let values = unsafe { _mm512_loadu_ps(values.as_ptr()) };
        bits(_mm512_cvtne2ps_pbh(values, values))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
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
}
