//! The AVX-512 path: 32 values at a time.
//!
//! Quantizing looks a scaled value's *cell* up, `round(15 * scaled)`, which is the low bits of one fused
//! multiply-add. Cells are 1/15 wide and thresholds are further apart, so a cell holds at most one of them: a table
//! gives that threshold for one exact comparison, another the code below it.
//!
//! In all blocks that come here every scaled value is finite and at most a few ulp beyond ±1.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::blocks::{self, AllValues, Coder, Instructions, STEP, Values};
use crate::codebook::{FP4_CODE_OF_RANK, FP4_SIGN, FP4_THRESHOLDS, NF4_THRESHOLDS, QuantType};
use crate::dtype::Element;
use crate::quant::finite::Finite;

/// The instructions of this path.
pub(super) struct Avx512;

/// Quantizes whole blocks.
///
/// # Safety
/// AVX-512 F, BW and VL. `input` is `absmax.len()` blocks long, `packed` half as many bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c,fma")]
pub(super) unsafe fn quantize<T: Element>(
    input: &[T],
    quant_type: QuantType,
    blocksize: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Finite {
    // SAFETY: the caller's.
    unsafe { blocks::quantize::<Avx512, T>(input, quant_type, blocksize, packed, absmax) }
}

/// Dequantizes whole blocks.
///
/// # Safety
/// AVX-512 F, BW and VL. `out` is `absmax.len()` blocks long, `packed` half as many bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c,fma")]
pub(super) unsafe fn dequantize<T: Element>(
    packed: &[u8],
    absmax: &[f32],
    quant_type: QuantType,
    blocksize: usize,
    out: &mut [T],
) {
    // SAFETY: the caller's.
    unsafe { blocks::dequantize::<Avx512, T>(packed, absmax, quant_type, blocksize, out) }
}

impl Instructions for Avx512 {
    type Vector = __m512;
    type Codebook = __m512;
    type Nf4 = Nf4;
    type Fp4 = Fp4;

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn codebook(values: &[f32; 16]) -> __m512 {
        // SAFETY: sixteen values.
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }
}

impl AllValues for Avx512 {}

/// The 32 values from `at` on, times `inverse`: those at even positions, those at odd positions.
///
/// # Safety
/// As [`Coder::encode`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn scaled_pairs<T>(at: *const T, inverse: f32) -> (__m512, __m512)
where
    Avx512: Values<T>,
{
    // SAFETY: the caller's.
    let (even, odd) = unsafe { Avx512::load_pairs(at) };
    let inverse = _mm512_set1_ps(inverse);
    (_mm512_mul_ps(even, inverse), _mm512_mul_ps(odd, inverse))
}

/// Adding this to a float of magnitude below 2^22 leaves its rounded integer in the low bits.
const INTEGER_BITS: f32 = 12_582_912.0; // 1.5 * 2^23

/// Cells to a unit.
const CELLS: f32 = 15.0;

/// One row per cell: the threshold in it (+∞ when there is none), and how many lie in lower cells.
const fn cells<const N: usize>(thresholds: &[f32], offset: f32) -> ([f32; N], [i32; N]) {
    let mut threshold_in = [f32::INFINITY; N];
    let mut below = [0; N];
    let mut i = 0;
    while i < thresholds.len() {
        // Exact in float64, and rounded as the fused multiply-add does: no product is halfway between integers.
        let cell = (thresholds[i] as f64 * CELLS as f64 + offset as f64 + 0.5) as usize;
        assert!(threshold_in[cell] == f32::INFINITY, "two thresholds in one cell");
        threshold_in[cell] = thresholds[i];
        let mut higher = cell + 1;
        while higher < N {
            below[higher] += 1;
            higher += 1;
        }
        i += 1;
    }
    (threshold_in, below)
}

/// Cells of `scaled` from -1 (cell 0) to 1 (cell 30).
pub(super) struct Nf4 {
    thresholds: [__m512; 2],
    below: [__m512i; 2],
    below_high: [__m512i; 2],
}

const NF4_CELLS: ([f32; 32], [i32; 32]) = cells(&NF4_THRESHOLDS, CELLS);

impl Nf4 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn find(&self, scaled: __m512, below: &[__m512i; 2], one: i32) -> __m512i {
        let cell = _mm512_fmadd_ps(scaled, _mm512_set1_ps(CELLS), _mm512_set1_ps(INTEGER_BITS + CELLS));
        let cell = _mm512_castps_si512(cell); // the look-ups use the low five bits
        let threshold = _mm512_permutex2var_ps(self.thresholds[0], cell, self.thresholds[1]);
        let exceeds = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(scaled, threshold);
        let code = _mm512_permutex2var_epi32(below[0], cell, below[1]);
        _mm512_mask_add_epi32(code, exceeds, code, _mm512_set1_epi32(one))
    }
}

impl Coder<Avx512> for Nf4 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn new() -> Self {
        let (thresholds, below) = &NF4_CELLS;
        // SAFETY: both tables have 32 entries.
        let (thresholds, below) = unsafe {
            (
                [_mm512_loadu_ps(thresholds.as_ptr()), _mm512_loadu_ps(thresholds[16..].as_ptr())],
                [_mm512_loadu_si512(below.as_ptr().cast()), _mm512_loadu_si512(below[16..].as_ptr().cast())],
            )
        };
        let below_high = [_mm512_slli_epi32::<4>(below[0]), _mm512_slli_epi32::<4>(below[1])];
        Self { thresholds, below, below_high }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn encode<T>(&self, at: *const T, inverse: f32, bytes: *mut u8)
    where
        Avx512: Values<T>,
    {
        // SAFETY: the caller's.
        unsafe {
            let (even, odd) = scaled_pairs(at, inverse);
            let pairs = _mm512_or_si512(self.find(even, &self.below_high, 16), self.find(odd, &self.below, 1));
            _mm_storeu_si128(bytes.cast(), _mm512_cvtepi32_epi8(pairs));
        }
    }
}

/// Cells of `|scaled|` from 0 (cell 0) to 1 (cell 15).
pub(super) struct Fp4 {
    threshold: __m512,
    /// The codes of the ranks below and above the cell's threshold.
    below: __m512i,
    above: __m512i,
}

const FP4_CELLS: ([f32; 16], [i32; 16]) = cells(&FP4_THRESHOLDS, 0.0);

impl Fp4 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn find(&self, scaled: __m512) -> __m512i {
        let magnitude = _mm512_abs_ps(scaled);
        let cell = _mm512_fmadd_ps(magnitude, _mm512_set1_ps(CELLS), _mm512_set1_ps(INTEGER_BITS));
        let cell = _mm512_castps_si512(cell); // the look-ups use the low four bits
        let exceeds = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(magnitude, _mm512_permutexvar_ps(cell, self.threshold));
        let code = _mm512_permutexvar_epi32(cell, self.below);
        let code = _mm512_mask_permutexvar_epi32(code, exceeds, cell, self.above);
        let negative = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(scaled, _mm512_setzero_ps());
        _mm512_mask_or_epi32(code, negative, code, _mm512_set1_epi32(FP4_SIGN as i32))
    }
}

impl Coder<Avx512> for Fp4 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn new() -> Self {
        let (thresholds, ranks) = &FP4_CELLS;
        let below = ranks.map(|rank| i32::from(FP4_CODE_OF_RANK[rank as usize]));
        let above = ranks.map(|rank| i32::from(FP4_CODE_OF_RANK[(rank as usize + 1).min(7)]));
        // SAFETY: all have 16 entries.
        unsafe {
            Self {
                threshold: _mm512_loadu_ps(thresholds.as_ptr()),
                below: _mm512_loadu_si512(below.as_ptr().cast()),
                above: _mm512_loadu_si512(above.as_ptr().cast()),
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn encode<T>(&self, at: *const T, inverse: f32, bytes: *mut u8)
    where
        Avx512: Values<T>,
    {
        // SAFETY: the caller's.
        unsafe {
            let (even, odd) = scaled_pairs(at, inverse);
            let pairs = _mm512_or_si512(_mm512_slli_epi32::<4>(self.find(even)), self.find(odd));
            _mm_storeu_si128(bytes.cast(), _mm512_cvtepi32_epi8(pairs));
        }
    }
}

/// The largest of 32 unsigned 16-bit integers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn reduce_max_epu16(v: __m512i) -> u16 {
    let v = _mm256_max_epu16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64::<1>(v));
    let v = _mm_max_epu16(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
    let complement = _mm_xor_si128(v, _mm_set1_epi16(-1));
    !(_mm_cvtsi128_si32(_mm_minpos_epu16(complement)) as u16)
}

/// The largest of the 16-bit patterns without their sign bits: magnitudes are ordered as their patterns, infinity
/// above all finite ones and NaN above infinity.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn magnitude_16(at: *const u16, n: usize) -> u16 {
    let magnitude = _mm512_set1_epi16(0x7fff);
    let mut max = _mm512_setzero_si512();
    for i in (0..n).step_by(32) {
        // SAFETY: the caller's.
        let v = unsafe { _mm512_loadu_si512(at.add(i).cast()) };
        max = _mm512_max_epu16(max, _mm512_and_si512(v, magnitude));
    }
    reduce_max_epu16(max)
}

/// Looks 32 codes up in sixteen 16-bit values that are there twice.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn look_up_16(table: __m512i, codes: *const u8, out: *mut u16) {
    // SAFETY: the caller's.
    unsafe {
        let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.cast()));
        // The look-up uses the low five bits, and the fifth does not matter.
        let indices = _mm512_or_si512(_mm512_srli_epi32::<4>(bytes), _mm512_slli_epi32::<16>(bytes));
        _mm512_storeu_si512(out.cast(), _mm512_permutexvar_epi16(indices, table));
    }
}

impl Values<bf16> for Avx512 {
    type Table = __m512i;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn magnitude(at: *const bf16, n: usize) -> f32 {
        // SAFETY: the caller's.
        f32::from_bits(u32::from(unsafe { magnitude_16(at.cast(), n) }) << 16)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load_pairs(at: *const bf16) -> (__m512, __m512) {
        // SAFETY: the caller's.
        let v = unsafe { _mm512_loadu_si512(at.cast()) };
        let odd = _mm512_and_si512(v, _mm512_set1_epi32(0xffff_0000_u32 as i32));
        (_mm512_castsi512_ps(_mm512_slli_epi32::<16>(v)), _mm512_castsi512_ps(odd))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn table(codebook: __m512, scale: f32) -> __m512i {
        let values = _mm512_mul_ps(codebook, _mm512_set1_ps(scale));
        // To nearest, ties to even. The processor's own conversion would flush denormals.
        let bits = _mm512_castps_si512(values);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn look_up(table: __m512i, codes: *const u8, out: *mut bf16) {
        // SAFETY: the caller's.
        unsafe { look_up_16(table, codes, out.cast()) }
    }
}

impl Values<f16> for Avx512 {
    type Table = __m512i;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
    unsafe fn magnitude(at: *const f16, n: usize) -> f32 {
        // SAFETY: the caller's.
        let bits = unsafe { magnitude_16(at.cast(), n) };
        _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load_pairs(at: *const f16) -> (__m512, __m512) {
        // SAFETY: the caller's.
        let v = unsafe { _mm512_loadu_si512(at.cast()) };
        let even = _mm512_cvtepi32_epi16(v);
        let odd = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(v));
        (_mm512_cvtph_ps(even), _mm512_cvtph_ps(odd))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn table(codebook: __m512, scale: f32) -> __m512i {
        let values = _mm512_mul_ps(codebook, _mm512_set1_ps(scale));
        _mm512_broadcast_i64x4(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(values))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn look_up(table: __m512i, codes: *const u8, out: *mut f16) {
        // SAFETY: the caller's.
        unsafe { look_up_16(table, codes, out.cast()) }
    }
}

impl Values<f32> for Avx512 {
    type Table = __m512i;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn magnitude(at: *const f32, n: usize) -> f32 {
        let magnitude = _mm512_set1_epi32(0x7fff_ffff);
        let mut max = [_mm512_setzero_si512(); 2];
        for i in (0..n).step_by(STEP) {
            // SAFETY: the caller's.
            let v = unsafe { [_mm512_loadu_si512(at.add(i).cast()), _mm512_loadu_si512(at.add(i + 16).cast())] };
            max[0] = _mm512_max_epi32(max[0], _mm512_and_si512(v[0], magnitude));
            max[1] = _mm512_max_epi32(max[1], _mm512_and_si512(v[1], magnitude));
        }
        f32::from_bits(_mm512_reduce_max_epi32(_mm512_max_epi32(max[0], max[1])) as u32)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load_pairs(at: *const f32) -> (__m512, __m512) {
        // SAFETY: the caller's.
        let (a, b) = unsafe { (_mm512_loadu_ps(at), _mm512_loadu_ps(at.add(16))) };
        let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        let odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
        (_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn table(codebook: __m512, scale: f32) -> __m512i {
        let values = _mm512_mul_ps(codebook, _mm512_set1_ps(scale));
        _mm512_castps_si512(values)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn look_up(table: __m512i, codes: *const u8, out: *mut f32) {
        for half in 0..2 {
            // SAFETY: the caller's.
            unsafe {
                let bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(codes.add(8 * half).cast()));
                // The look-up uses the low four bits.
                let indices = _mm512_or_si512(_mm512_srli_epi64::<4>(bytes), _mm512_slli_epi64::<32>(bytes));
                _mm512_storeu_si512(out.add(16 * half).cast(), _mm512_permutexvar_epi32(indices, table));
            }
        }
    }
}
