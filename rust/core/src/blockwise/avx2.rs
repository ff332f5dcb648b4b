//! The AVX2 path: 16 values at a time.
//!
//! Quantizing searches the thresholds by halving: four exact comparisons per value, each threshold chosen by the
//! results of those before. A comparison gives 0 or -1 per lane, so the lanes gather the *negated* code, and the
//! look-up tables are laid out for negated indices.
//!
//! A block is left to the scalar path when its scale is not finite or has no finite reciprocal; one of zeros is
//! filled with code 0.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Element, Finite, scalar};
use crate::codebook::{FP4_THRESHOLDS, NF4_THRESHOLDS, QuantType};
use crate::geometry::BLOCK_SIZES;

/// Values that every step takes: 16 packed bytes. All block sizes are multiples.
const STEP: usize = 32;

/// Values whose scales are found before their codes: the largest block, and little enough for the first-level cache.
const BATCH: usize = 4096;

/// What differs from one element type to the other.
pub trait Avx2Element: Sized {
    /// A block's sixteen values, laid out for [`Self::look_up`].
    type Table: Copy;

    /// The largest magnitude of `n` values (a multiple of [`STEP`]) from `at` on; something that is not finite if
    /// any of them is not.
    ///
    /// # Safety
    /// AVX2 and F16C; `n` readable values at `at`.
    unsafe fn magnitude(at: *const Self, n: usize) -> f32;

    /// 16 values as float32: those at even positions, those at odd positions.
    ///
    /// # Safety
    /// AVX2 and F16C; 16 readable values at `at`.
    unsafe fn load_pairs(at: *const Self) -> (__m256, __m256);

    /// Rounds a block's sixteen values to this type. They are finite.
    ///
    /// # Safety
    /// AVX2 and F16C.
    unsafe fn table(values: [__m256; 2]) -> Self::Table;

    /// Writes the values of the 32 codes in 16 bytes.
    ///
    /// # Safety
    /// AVX2; 16 readable bytes at `codes`, 32 writable values at `out`.
    unsafe fn look_up(table: Self::Table, codes: *const u8, out: *mut Self);
}

/// Quantizes whole blocks.
///
/// # Safety
/// AVX2, FMA and F16C. `input` is `absmax.len()` blocks long, `packed` half as many bytes.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn quantize<T: Element>(
    input: &[T],
    quant_type: QuantType,
    blocksize: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Finite {
    // SAFETY: the caller's.
    unsafe {
        match quant_type {
            QuantType::Nf4 => quantize_by(input, &Nf4::new(), quant_type, blocksize, packed, absmax),
            QuantType::Fp4 => quantize_by(input, &Fp4::new(), quant_type, blocksize, packed, absmax),
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn quantize_by<T: Element, C: Coder>(
    input: &[T],
    coder: &C,
    quant_type: QuantType,
    blocksize: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Finite {
    // All scales of a batch first, so that no block's values wait for its own maximum and division.
    let mut finite = Finite::AllFinite;
    let batch = BATCH / blocksize;
    let batches = input.chunks(BATCH).zip(packed.chunks_mut(BATCH / 2)).zip(absmax.chunks_mut(batch));
    for ((input, packed), absmax) in batches {
        let mut inverses = [0.0; BATCH / BLOCK_SIZES[0]];
        for ((block, scale), inverse) in input.chunks_exact(blocksize).zip(absmax.iter_mut()).zip(&mut inverses) {
            // SAFETY: the block has `blocksize` values, a multiple of `STEP`.
            *scale = unsafe { <T as Avx2Element>::magnitude(block.as_ptr(), blocksize) };
            *inverse = 1.0 / *scale;
        }
        let blocks = input.chunks_exact(blocksize).zip(packed.chunks_exact_mut(blocksize / 2));
        for (((block, bytes), scale), inverse) in blocks.zip(absmax).zip(inverses) {
            if *scale == 0.0 {
                bytes.fill(0); // code 0 of every NaN
                continue;
            }
            if !(inverse > 0.0 && inverse < f32::INFINITY) {
                let of_block = scalar::quantize(block, quant_type, blocksize, bytes, std::slice::from_mut(scale));
                finite = finite.and(of_block);
                continue;
            }
            let inverse = _mm256_set1_ps(inverse);
            for i in (0..blocksize).step_by(STEP) {
                // SAFETY: `i + STEP <= blocksize`, and there is one byte for two values.
                unsafe {
                    let (even, odd) = <T as Avx2Element>::load_pairs(block.as_ptr().add(i));
                    let first = negated_pairs(coder, _mm256_mul_ps(even, inverse), _mm256_mul_ps(odd, inverse));
                    let (even, odd) = <T as Avx2Element>::load_pairs(block.as_ptr().add(i + STEP / 2));
                    let second = negated_pairs(coder, _mm256_mul_ps(even, inverse), _mm256_mul_ps(odd, inverse));
                    let packed = coder.finish(to_bytes(first, second));
                    _mm_storeu_si128(bytes.as_mut_ptr().add(i / 2).cast(), packed);
                }
            }
        }
    }
    finite
}

/// `-(16 * code(even) + code(odd))` in every lane.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn negated_pairs<C: Coder>(coder: &C, even: __m256, odd: __m256) -> __m256i {
    // SAFETY: the caller's.
    let (even, odd) = unsafe { (coder.negated(even), coder.negated(odd)) };
    _mm256_add_epi32(_mm256_slli_epi32::<4>(even), odd)
}

/// Two times eight lanes from 0 to -255, negated, as bytes in order.
#[inline]
#[target_feature(enable = "avx2")]
fn to_bytes(first: __m256i, second: __m256i) -> __m128i {
    let words = _mm256_sub_epi16(_mm256_setzero_si256(), _mm256_packs_epi32(first, second));
    let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
    _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words))
}

/// Finds the codes of scaled values.
trait Coder {
    /// The negated code, or what [`Self::finish`] makes a code of, in every lane; no value is NaN.
    ///
    /// # Safety
    /// AVX2.
    unsafe fn negated(&self, scaled: __m256) -> __m256i;

    /// Makes codes of both nibbles of every byte.
    ///
    /// # Safety
    /// AVX2.
    unsafe fn finish(&self, pairs: __m128i) -> __m128i;
}

/// `2 * index + bit`, both negated.
#[inline]
#[target_feature(enable = "avx2")]
fn append(index: __m256i, bit: __m256) -> __m256i {
    _mm256_add_epi32(_mm256_add_epi32(index, index), _mm256_castps_si256(bit))
}

/// Thresholds number 7; 3, 11; 1, 5, 9, 13; 0, 2, … 14.
struct Nf4 {
    first: __m256,
    second: [__m256; 2],
    third: __m256,
    fourth: __m256,
}

impl Nf4 {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new() -> Self {
        let t = NF4_THRESHOLDS;
        Self {
            first: _mm256_set1_ps(t[7]),
            second: [_mm256_set1_ps(t[3]), _mm256_set1_ps(t[11])],
            third: _mm256_setr_ps(t[1], t[13], t[9], t[5], t[1], t[13], t[9], t[5]),
            fourth: _mm256_setr_ps(t[0], t[14], t[12], t[10], t[8], t[6], t[4], t[2]),
        }
    }
}

impl Coder for Nf4 {
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn negated(&self, scaled: __m256) -> __m256i {
        let above = _mm256_cmp_ps::<_CMP_GT_OQ>(scaled, self.first);
        let index = _mm256_castps_si256(above);
        let threshold = _mm256_blendv_ps(self.second[0], self.second[1], above);
        let index = append(index, _mm256_cmp_ps::<_CMP_GT_OQ>(scaled, threshold));
        let threshold = _mm256_permutevar_ps(self.third, index);
        let index = append(index, _mm256_cmp_ps::<_CMP_GT_OQ>(scaled, threshold));
        let threshold = _mm256_permutevar8x32_ps(self.fourth, index);
        append(index, _mm256_cmp_ps::<_CMP_GT_OQ>(scaled, threshold))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn finish(&self, pairs: __m128i) -> __m128i {
        pairs
    }
}

/// The sign, then thresholds number 3; 1, 5; 0, 2, 4, 6 of the magnitude.
struct Fp4 {
    second: __m256,
    third: [__m256; 2],
    fourth: __m256,
}

impl Fp4 {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new() -> Self {
        let t = FP4_THRESHOLDS;
        Self {
            second: _mm256_set1_ps(t[3]),
            third: [_mm256_set1_ps(t[1]), _mm256_set1_ps(t[5])],
            fourth: _mm256_setr_ps(t[0], t[6], t[4], t[2], t[0], t[6], t[4], t[2]),
        }
    }
}

impl Coder for Fp4 {
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn negated(&self, scaled: __m256) -> __m256i {
        let negative = _mm256_cmp_ps::<_CMP_LT_OQ>(scaled, _mm256_setzero_ps());
        let magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0), scaled);
        let above = _mm256_cmp_ps::<_CMP_GT_OQ>(magnitude, self.second);
        let index = append(_mm256_castps_si256(negative), above);
        let threshold = _mm256_blendv_ps(self.third[0], self.third[1], above);
        let index = append(index, _mm256_cmp_ps::<_CMP_GT_OQ>(magnitude, threshold));
        let threshold = _mm256_permutevar_ps(self.fourth, index);
        append(index, _mm256_cmp_ps::<_CMP_GT_OQ>(magnitude, threshold))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn finish(&self, pairs: __m128i) -> __m128i {
        // The code of rank r is r with bit 2 flipped where bit 1 is set: 0, 1, 6, 7, 4, 5, 2, 3.
        let bit1 = _mm_and_si128(pairs, _mm_set1_epi8(0x22));
        _mm_xor_si128(pairs, _mm_add_epi8(bit1, bit1))
    }
}

/// Dequantizes whole blocks.
///
/// # Safety
/// AVX2, FMA and F16C. `out` is `absmax.len()` blocks long, `packed` half as many bytes.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn dequantize<T: Element>(
    packed: &[u8],
    absmax: &[f32],
    quant_type: QuantType,
    blocksize: usize,
    out: &mut [T],
) {
    // SAFETY: sixteen values.
    let values = unsafe {
        let values = quant_type.values();
        [_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values[8..].as_ptr())]
    };
    let blocks = out.chunks_exact_mut(blocksize).zip(packed.chunks_exact(blocksize / 2)).zip(absmax);
    for ((block, bytes), &scale) in blocks {
        if !scale.is_finite() {
            scalar::dequantize(bytes, &[scale], quant_type, blocksize, block);
            continue;
        }
        let scale = _mm256_set1_ps(scale);
        // SAFETY: the block has `blocksize` values, a multiple of `STEP`, and one byte for two of them.
        unsafe {
            let table = <T as Avx2Element>::table([_mm256_mul_ps(values[0], scale), _mm256_mul_ps(values[1], scale)]);
            for i in (0..blocksize).step_by(STEP) {
                <T as Avx2Element>::look_up(table, bytes.as_ptr().add(i / 2), block.as_mut_ptr().add(i));
            }
        }
    }
}

/// The high nibbles (earlier values) and low nibbles of 16 bytes, one to a byte.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load_nibbles(codes: *const u8) -> (__m128i, __m128i) {
    let nibble = _mm_set1_epi8(15);
    // SAFETY: the caller's.
    let bytes = unsafe { _mm_loadu_si128(codes.cast()) };
    (_mm_and_si128(_mm_srli_epi16::<4>(bytes), nibble), _mm_and_si128(bytes, nibble))
}

/// Sixteen 16-bit values as their low bytes and their high bytes, in both halves of a register each.
#[derive(Clone, Copy)]
pub struct Planes {
    low: __m256i,
    high: __m256i,
}

impl Planes {
    /// Of values 0 … 7 and 8 … 15.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new(first: __m128i, second: __m128i) -> Self {
        let low_byte = _mm_set1_epi16(0xff);
        let low = _mm_packus_epi16(_mm_and_si128(first, low_byte), _mm_and_si128(second, low_byte));
        let high = _mm_packus_epi16(_mm_srli_epi16::<8>(first), _mm_srli_epi16::<8>(second));
        Self { low: _mm256_broadcastsi128_si256(low), high: _mm256_broadcastsi128_si256(high) }
    }

    /// Looks 32 codes up.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn look_up(self, codes: *const u8, out: *mut u16) {
        // SAFETY: the caller's.
        let (even, odd) = unsafe { load_nibbles(codes) };
        let (first, second) = (_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd));
        // Codes 0 … 7, 16 … 23 | 8 … 15, 24 … 31, so that interleaving within halves leaves values in order.
        let codes = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_set_m128i(second, first));
        let low = _mm256_shuffle_epi8(self.low, codes);
        let high = _mm256_shuffle_epi8(self.high, codes);
        // SAFETY: the caller's.
        unsafe {
            _mm256_storeu_si256(out.cast(), _mm256_unpacklo_epi8(low, high));
            _mm256_storeu_si256(out.add(16).cast(), _mm256_unpackhi_epi8(low, high));
        }
    }
}

/// The largest of the 16-bit patterns without their sign bits: magnitudes are ordered as their patterns, infinity
/// above all finite ones and NaN above infinity.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn magnitude_16(at: *const u16, n: usize) -> u16 {
    let magnitude = _mm256_set1_epi16(0x7fff);
    let mut max = [_mm256_setzero_si256(); 2];
    for i in (0..n).step_by(STEP) {
        // SAFETY: the caller's.
        let v = unsafe { [_mm256_loadu_si256(at.add(i).cast()), _mm256_loadu_si256(at.add(i + 16).cast())] };
        max[0] = _mm256_max_epu16(max[0], _mm256_and_si256(v[0], magnitude));
        max[1] = _mm256_max_epu16(max[1], _mm256_and_si256(v[1], magnitude));
    }
    let max = _mm256_max_epu16(max[0], max[1]);
    let max = _mm_max_epu16(_mm256_castsi256_si128(max), _mm256_extracti128_si256::<1>(max));
    let complement = _mm_xor_si128(max, _mm_set1_epi16(-1));
    !(_mm_cvtsi128_si32(_mm_minpos_epu16(complement)) as u16)
}

impl Avx2Element for bf16 {
    type Table = Planes;

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn magnitude(at: *const Self, n: usize) -> f32 {
        // SAFETY: the caller's.
        f32::from_bits(u32::from(unsafe { magnitude_16(at.cast(), n) }) << 16)
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load_pairs(at: *const Self) -> (__m256, __m256) {
        // SAFETY: the caller's.
        let v = unsafe { _mm256_loadu_si256(at.cast()) };
        let odd = _mm256_and_si256(v, _mm256_set1_epi32(0xffff_0000_u32 as i32));
        (_mm256_castsi256_ps(_mm256_slli_epi32::<16>(v)), _mm256_castsi256_ps(odd))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn table(values: [__m256; 2]) -> Planes {
        let [first, second] = values.map(|v| {
            // To nearest, ties to even.
            let bits = _mm256_castps_si256(v);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
            _mm256_srli_epi32::<16>(rounded)
        });
        let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(first, second));
        Planes::new(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn look_up(table: Planes, codes: *const u8, out: *mut Self) {
        // SAFETY: the caller's.
        unsafe { table.look_up(codes, out.cast()) }
    }
}

impl Avx2Element for f16 {
    type Table = Planes;

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn magnitude(at: *const Self, n: usize) -> f32 {
        // SAFETY: the caller's.
        let bits = unsafe { magnitude_16(at.cast(), n) };
        _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))))
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load_pairs(at: *const Self) -> (__m256, __m256) {
        // SAFETY: the caller's.
        let v = unsafe { _mm256_loadu_si256(at.cast()) };
        let even = _mm256_and_si256(v, _mm256_set1_epi32(0xffff));
        let odd = _mm256_srli_epi32::<16>(v);
        // even 0 … 3, odd 0 … 3 | even 4 … 7, odd 4 … 7 → all even, all odd
        let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(even, odd));
        (_mm256_cvtph_ps(_mm256_castsi256_si128(words)), _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(words)))
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn table(values: [__m256; 2]) -> Planes {
        let [first, second] = values.map(|v| _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v));
        Planes::new(first, second)
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn look_up(table: Planes, codes: *const u8, out: *mut Self) {
        // SAFETY: the caller's.
        unsafe { table.look_up(codes, out.cast()) }
    }
}

impl Avx2Element for f32 {
    type Table = [__m256; 2];

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn magnitude(at: *const Self, n: usize) -> f32 {
        let magnitude = _mm256_set1_epi32(0x7fff_ffff);
        let mut max = [_mm256_setzero_si256(); 2];
        for i in (0..n).step_by(16) {
            // SAFETY: the caller's.
            let v = unsafe { [_mm256_loadu_si256(at.add(i).cast()), _mm256_loadu_si256(at.add(i + 8).cast())] };
            max[0] = _mm256_max_epi32(max[0], _mm256_and_si256(v[0], magnitude));
            max[1] = _mm256_max_epi32(max[1], _mm256_and_si256(v[1], magnitude));
        }
        let max = _mm256_max_epi32(max[0], max[1]);
        let max = _mm_max_epi32(_mm256_castsi256_si128(max), _mm256_extracti128_si256::<1>(max));
        let max = _mm_max_epi32(max, _mm_shuffle_epi32::<0b01_00_11_10>(max));
        let max = _mm_max_epi32(max, _mm_shuffle_epi32::<0b10_11_00_01>(max));
        f32::from_bits(_mm_cvtsi128_si32(max) as u32)
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load_pairs(at: *const Self) -> (__m256, __m256) {
        // SAFETY: the caller's.
        let (a, b) = unsafe { (_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))) };
        // Within halves first: values 0, 2, 8, 10 | 4, 6, 12, 14, and their neighbours.
        let even = _mm256_castps_pd(_mm256_shuffle_ps::<0b10_00_10_00>(a, b));
        let odd = _mm256_castps_pd(_mm256_shuffle_ps::<0b11_01_11_01>(a, b));
        (
            _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(even)),
            _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(odd)),
        )
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn table(values: [__m256; 2]) -> [__m256; 2] {
        values
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn look_up(table: [__m256; 2], codes: *const u8, out: *mut Self) {
        // SAFETY: the caller's.
        let (even, odd) = unsafe { load_nibbles(codes) };
        for (i, codes) in [_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)].into_iter().enumerate() {
            for (j, codes) in [codes, _mm_unpackhi_epi64(codes, codes)].into_iter().enumerate() {
                let index = _mm256_cvtepu8_epi32(codes);
                let low = _mm256_permutevar8x32_ps(table[0], index);
                let high = _mm256_permutevar8x32_ps(table[1], index);
                let is_high = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index));
                // SAFETY: the caller's.
                unsafe { _mm256_storeu_ps(out.add(16 * i + 8 * j), _mm256_blendv_ps(low, high, is_high)) }
            }
        }
    }
}
