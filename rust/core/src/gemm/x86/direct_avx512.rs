//! The direct products of AVX-512: in float32, and of bfloat16 activations with AVX512-BF16.
//!
//! A block's 64 products are added up without scale, in float32. The codebook is exact in float32 products, and rounded to
//! bfloat16 in those of bfloat16.

use std::arch::x86_64::*;

use super::avx512::{bits, pairs};
use super::direct_avx2::STRIPE;
use crate::gemm::direct::{Band, Direct, GROUP, LANES, ORDER, ROWS};
use crate::gemm::matrix::Matrix;
use crate::gemm::weight::prefetch_to_second_level;

/// In float32.
pub const F32: Direct = Direct {
    rows: 20,
    group_words: GROUP,
    prepare: prepare_f32,
    bands: [(4, band_f32::<4, 1>), (2, band_f32::<2, 2>), (2, band_f32::<2, 3>), (2, band_f32::<2, 4>)],
    backward_rows: 1,
    stripe: STRIPE,
};

/// Of bfloat16 activations.
pub const BF16: Direct = Direct {
    rows: 20,
    group_words: GROUP / 2,
    prepare: prepare_bf16,
    bands: [(4, band_bf16::<4, 1>), (2, band_bf16::<2, 2>), (2, band_bf16::<2, 3>), (2, band_bf16::<2, 4>)],
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
unsafe fn band_f32<const R: usize, const M: usize>(band: &Band) -> [[f32; LANES]; ROWS] {
    // SAFETY: the caller's.
    unsafe { product::<InF32, R, M>(band) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn band_bf16<const R: usize, const M: usize>(band: &Band) -> [[f32; LANES]; ROWS] {
    // SAFETY: the caller's.
    unsafe { product::<InBf16, R, M>(band) }
}

/// The products of `R` rows of the weight with `M` rows of activations. Inlined into a function of each of both that
/// enables its instructions.
///
/// # Safety
/// As [`Direct::bands`].
#[inline(always)]
unsafe fn product<P: Products, const R: usize, const M: usize>(band: &Band) -> [[f32; LANES]; ROWS] {
    // SAFETY: what `Band` describes.
    unsafe {
        let table = P::table(band.values);
        let mut sums = [[_mm512_setzero_ps(); M]; R];
        if !band.first {
            for (i, sum) in sums.as_flattened_mut().iter_mut().enumerate() {
                *sum = _mm512_loadu_ps(band.sums.add(i).cast());
            }
        }
        let mut ahead = band.ahead;
        let mut codes = [_mm512_setzero_si512(); R];
        for group in band.part.clone() {
            let at = group * (GROUP / 2);
            for r in 0..R {
                prefetch_to_second_level(ahead);
                ahead = ahead.wrapping_add(GROUP / 2);
                codes[r] = _mm512_loadu_si512(band.codes[r].add(at).cast());
            }
            P::multiply(band, group, 1, codes, table, &mut sums);
        }
        if band.half {
            let group = band.groups;
            let at = group * (GROUP / 2);
            // Codes of zeros that are multiplied with zeros.
            for r in 0..R {
                codes[r] = _mm512_zextsi256_si512(_mm256_loadu_si256(band.codes[r].add(at).cast()));
            }
            P::multiply(band, group, 0, codes, table, &mut sums);
        }
        let mut out = [[0.0; LANES]; ROWS];
        if !band.last {
            for (i, &sum) in sums.as_flattened().iter().enumerate() {
                _mm512_storeu_ps(band.sums.add(i).cast(), sum);
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

    /// Adds the products of one group. The scale of its second half is `second` (0 or 1) behind that of the first.
    ///
    /// # Safety
    /// The machine has the path, and the group is within what `Band` describes.
    unsafe fn multiply<const R: usize, const M: usize>(
        band: &Band,
        group: usize,
        second: usize,
        codes: [__m512i; R],
        table: Self::Table,
        sums: &mut [[__m512; M]; R],
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
    unsafe fn multiply<const R: usize, const M: usize>(
        band: &Band,
        group: usize,
        second: usize,
        codes: [__m512i; R],
        table: __m512,
        sums: &mut [[__m512; M]; R],
    ) {
        // SAFETY: the caller's.
        unsafe {
            for r in 0..R {
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
                let scale = band.scales[r].add(2 * group);
                // The first 32 bytes, and so the lower lanes, are the first half.
                let scale = _mm512_mask_mov_ps(_mm512_set1_ps(*scale), 0xff00, _mm512_set1_ps(*scale.add(second)));
                for m in 0..M {
                    let x = band.x.add(m * band.x_stride + group * GROUP).cast::<f32>();
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
    unsafe fn multiply<const R: usize, const M: usize>(
        band: &Band,
        group: usize,
        second: usize,
        codes: [__m512i; R],
        table: __m512i,
        sums: &mut [[__m512; M]; R],
    ) {
        // SAFETY: the caller's.
        unsafe {
            // No closures here: they would be compiled apart from this function's instructions.
            let mut scales = [_mm512_setzero_ps(); R];
            let mut weights = [[_mm512_setzero_si512(); 4]; R];
            for r in 0..R {
                let scale = band.scales[r].add(2 * group);
                // The first 32 bytes, and so the lower lanes, are the first half.
                scales[r] = _mm512_mask_mov_ps(_mm512_set1_ps(*scale), 0xff00, _mm512_set1_ps(*scale.add(second)));
                // The look-up uses the low five bits of each 16, and the fifth does not matter: the table is there twice.
                weights[r] = [
                    _mm512_permutexvar_epi16(codes[r], table),
                    _mm512_permutexvar_epi16(_mm512_srli_epi16::<4>(codes[r]), table),
                    _mm512_permutexvar_epi16(_mm512_srli_epi16::<8>(codes[r]), table),
                    _mm512_permutexvar_epi16(_mm512_srli_epi16::<12>(codes[r]), table),
                ];
            }
            // Sums that do not wait for each other stand side by side.
            let mut blocks = [[_mm512_setzero_ps(); M]; R];
            for j in 0..4 {
                for m in 0..M {
                    let x = band.x.add(m * band.x_stride + group * (GROUP / 2) + 16 * j);
                    let x = pairs(_mm512_loadu_si512(x.cast()));
                    for r in 0..R {
                        blocks[r][m] = _mm512_dpbf16_ps(blocks[r][m], x, pairs(weights[r][j]));
                    }
                }
            }
            for r in 0..R {
                for m in 0..M {
                    sums[r][m] = _mm512_fmadd_ps(blocks[r][m], scales[r], sums[r][m]);
                }
            }
        }
    }
}
