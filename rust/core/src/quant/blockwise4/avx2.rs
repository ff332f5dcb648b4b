//! The AVX2 path: 16 values at a time.
//!
//! Quantizing searches the thresholds by halving: four exact comparisons per value, each threshold chosen by the
//! results of those before. A comparison gives 0 or -1 per lane, so the lanes gather the *negated* code, and the
//! look-up tables are laid out for negated indices.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::blocks::{self, AllValues, Coder, Instructions, STEP, Values};
use crate::codebook::{FP4_THRESHOLDS, NF4_THRESHOLDS, QuantType};
use crate::dtype::Element;
use crate::quant::finite::Finite;

/// The instructions of this path.
pub(super) struct Avx2;

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
    unsafe { blocks::quantize::<Avx2, T>(input, quant_type, blocksize, packed, absmax) }
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
    // SAFETY: the caller's.
    unsafe { blocks::dequantize::<Avx2, T>(packed, absmax, quant_type, blocksize, out) }
}

impl Instructions for Avx2 {
    type Vector = __m256;
    type Codebook = [__m256; 2];
    type Nf4 = Nf4;
    type Fp4 = Fp4;

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn codebook(values: &[f32; 16]) -> [__m256; 2] {
        // SAFETY: sixteen values.
        unsafe { [_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values[8..].as_ptr())] }
    }
}

impl AllValues for Avx2 {}

/// `-(16 * code(even) + code(odd))` in every lane.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn negated_pairs<S: Search>(search: &S, even: __m256, odd: __m256) -> __m256i {
    // SAFETY: the caller's.
    let (even, odd) = unsafe { (search.negated(even), search.negated(odd)) };
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

/// Finds the codes of scaled values by halving.
trait Search {
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

/// [`Coder::encode`].
///
/// # Safety
/// As there.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn encode<S: Search, T>(search: &S, at: *const T, inverse: f32, bytes: *mut u8)
where
    Avx2: Values<T>,
{
    let inverse = _mm256_set1_ps(inverse);
    // SAFETY: the caller's.
    unsafe {
        let (even, odd) = Avx2::load_pairs(at);
        let first = negated_pairs(search, _mm256_mul_ps(even, inverse), _mm256_mul_ps(odd, inverse));
        let (even, odd) = Avx2::load_pairs(at.add(STEP / 2));
        let second = negated_pairs(search, _mm256_mul_ps(even, inverse), _mm256_mul_ps(odd, inverse));
        _mm_storeu_si128(bytes.cast(), search.finish(to_bytes(first, second)));
    }
}

/// `2 * index + bit`, both negated.
#[inline]
#[target_feature(enable = "avx2")]
fn append(index: __m256i, bit: __m256) -> __m256i {
    _mm256_add_epi32(_mm256_add_epi32(index, index), _mm256_castps_si256(bit))
}

/// Thresholds number 7; 3, 11; 1, 5, 9, 13; 0, 2, … 14.
pub(super) struct Nf4 {
    first: __m256,
    second: [__m256; 2],
    third: __m256,
    fourth: __m256,
}

impl Coder<Avx2> for Nf4 {
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn new() -> Self {
        let t = NF4_THRESHOLDS;
        Self {
            first: _mm256_set1_ps(t[7]),
            second: [_mm256_set1_ps(t[3]), _mm256_set1_ps(t[11])],
            third: _mm256_setr_ps(t[1], t[13], t[9], t[5], t[1], t[13], t[9], t[5]),
            fourth: _mm256_setr_ps(t[0], t[14], t[12], t[10], t[8], t[6], t[4], t[2]),
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn encode<T>(&self, at: *const T, inverse: f32, bytes: *mut u8)
    where
        Avx2: Values<T>,
    {
        // SAFETY: the caller's.
        unsafe { encode(self, at, inverse, bytes) }
    }
}

impl Search for Nf4 {
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
pub(super) struct Fp4 {
    second: __m256,
    third: [__m256; 2],
    fourth: __m256,
}

impl Coder<Avx2> for Fp4 {
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn new() -> Self {
        let t = FP4_THRESHOLDS;
        Self {
            second: _mm256_set1_ps(t[3]),
            third: [_mm256_set1_ps(t[1]), _mm256_set1_ps(t[5])],
            fourth: _mm256_setr_ps(t[0], t[6], t[4], t[2], t[0], t[6], t[4], t[2]),
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn encode<T>(&self, at: *const T, inverse: f32, bytes: *mut u8)
    where
        Avx2: Values<T>,
    {
        // SAFETY: the caller's.
        unsafe { encode(self, at, inverse, bytes) }
    }
}

impl Search for Fp4 {
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

#[inline]
#[target_feature(enable = "avx2")]
fn scaled(codebook: [__m256; 2], scale: f32) -> [__m256; 2] {
    let scale = _mm256_set1_ps(scale);
    [_mm256_mul_ps(codebook[0], scale), _mm256_mul_ps(codebook[1], scale)]
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
pub(super) struct Planes {
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

impl Values<bf16> for Avx2 {
    type Table = Planes;

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn magnitude(at: *const bf16, n: usize) -> f32 {
        // SAFETY: the caller's.
        f32::from_bits(u32::from(unsafe { magnitude_16(at.cast(), n) }) << 16)
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load_pairs(at: *const bf16) -> (__m256, __m256) {
        // SAFETY: the caller's.
        let v = unsafe { _mm256_loadu_si256(at.cast()) };
        let odd = _mm256_and_si256(v, _mm256_set1_epi32(0xffff_0000_u32 as i32));
        (_mm256_castsi256_ps(_mm256_slli_epi32::<16>(v)), _mm256_castsi256_ps(odd))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn table(codebook: [__m256; 2], scale: f32) -> Planes {
        let [first, second] = scaled(codebook, scale).map(|v| {
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
    unsafe fn look_up(table: Planes, codes: *const u8, out: *mut bf16) {
        // SAFETY: the caller's.
        unsafe { table.look_up(codes, out.cast()) }
    }
}

impl Values<f16> for Avx2 {
    type Table = Planes;

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn magnitude(at: *const f16, n: usize) -> f32 {
        // SAFETY: the caller's.
        let bits = unsafe { magnitude_16(at.cast(), n) };
        _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))))
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load_pairs(at: *const f16) -> (__m256, __m256) {
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
    unsafe fn table(codebook: [__m256; 2], scale: f32) -> Planes {
        let [first, second] = scaled(codebook, scale).map(|v| _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v));
        Planes::new(first, second)
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn look_up(table: Planes, codes: *const u8, out: *mut f16) {
        // SAFETY: the caller's.
        unsafe { table.look_up(codes, out.cast()) }
    }
}

impl Values<f32> for Avx2 {
    type Table = [__m256; 2];

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn magnitude(at: *const f32, n: usize) -> f32 {
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
    unsafe fn load_pairs(at: *const f32) -> (__m256, __m256) {
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
    unsafe fn table(codebook: [__m256; 2], scale: f32) -> [__m256; 2] {
        scaled(codebook, scale)
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn look_up(table: [__m256; 2], codes: *const u8, out: *mut f32) {
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
