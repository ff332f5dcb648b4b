//! Nested scales by AVX512-VBMI: the map is looked up by bytes of its values, 64 codes at a time.

use std::arch::x86_64::*;
use std::sync::LazyLock;

use crate::codebook::dynamic_map;
use crate::simd::Simd;

/// Codes that are looked up together.
const CODES: usize = 64;

/// Byte `i` of each of the map's values: `[4][256]`.
static PLANES: LazyLock<[[u8; 256]; 4]> =
    LazyLock::new(|| std::array::from_fn(|i| dynamic_map().map(|value| value.to_le_bytes()[i])));

/// Which code to look up at each place, so that the values are in order after their bytes were interleaved in lanes of 16.
static ORDER: [u8; CODES] = {
    let mut order = [0; CODES];
    let mut place = 0;
    while place < CODES {
        let (lane, register, value) = (place / 16, place / 4 % 4, place % 4);
        order[place] = (16 * register + 4 * lane + value) as u8;
        place += 1;
    }
    order
};

/// Whether the machine has the instructions, and `HALFBYTE_SIMD` leaves the choice open.
pub fn is_available() -> bool {
    static AVAILABLE: LazyLock<bool> =
        LazyLock::new(|| !Simd::is_forced() && Simd::Avx512.is_available() && is_x86_feature_detected!("avx512vbmi"));
    *AVAILABLE
}

/// `map[code] * absmax2 + offset` of each code, rounded twice.
///
/// # Safety
/// The machine has AVX512-BW and AVX512-VBMI.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
pub unsafe fn dequantize_group(codes: &[u8], absmax2: f32, offset: f32, out: &mut [f32]) {
    let planes = &*PLANES;
    let (absmax2, offset) = (_mm512_set1_ps(absmax2), _mm512_set1_ps(offset));
    for (codes, out) in codes.chunks(CODES).zip(out.chunks_mut(CODES)) {
        // SAFETY: masks are as long as what is read and written; a plane is four registers.
        unsafe {
            let order = _mm512_loadu_si512(ORDER.as_ptr().cast());
            let codes = _mm512_maskz_loadu_epi8(u64::MAX >> (CODES - codes.len()), codes.as_ptr().cast());
            let codes = _mm512_permutexvar_epi8(order, codes);
            let upper = _mm512_movepi8_mask(codes);
            let mut bytes = [_mm512_setzero_si512(); 4];
            for (byte, plane) in bytes.iter_mut().zip(planes) {
                let table = |i: usize| _mm512_loadu_si512(plane.as_ptr().add(CODES * i).cast());
                let low = _mm512_permutex2var_epi8(table(0), codes, table(1));
                let high = _mm512_permutex2var_epi8(table(2), codes, table(3));
                *byte = _mm512_mask_mov_epi8(low, upper, high);
            }
            let [a, b, c, d] = bytes;
            let low = [_mm512_unpacklo_epi8(a, b), _mm512_unpacklo_epi8(c, d)];
            let high = [_mm512_unpackhi_epi8(a, b), _mm512_unpackhi_epi8(c, d)];
            let values = [
                _mm512_unpacklo_epi16(low[0], low[1]),
                _mm512_unpackhi_epi16(low[0], low[1]),
                _mm512_unpacklo_epi16(high[0], high[1]),
                _mm512_unpackhi_epi16(high[0], high[1]),
            ];
            for (values, out) in values.into_iter().zip(out.chunks_mut(16)) {
                let scales = _mm512_add_ps(_mm512_mul_ps(_mm512_castsi512_ps(values), absmax2), offset);
                _mm512_mask_storeu_ps(out.as_mut_ptr(), u16::MAX >> (16 - out.len()), scales);
            }
        }
    }
}
