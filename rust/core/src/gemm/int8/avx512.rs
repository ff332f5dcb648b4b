//! The AVX-512 paths: codes widened to 16 bits, or as bytes with AVX512-VNNI.

use std::arch::x86_64::*;

use super::kernel::{Kernel, LANES, Pair, PairProduct, STEP, Sums};
use crate::gemm::blocked::kernel::Rows;

/// AVX-512 F, BW and VL.
pub struct Avx512;

impl Kernel for Avx512 {
    const DEPTH: usize = 2;
    const LANES: usize = 32;
    const ROWS: usize = 12;
    const ROW_STEP: usize = 4;
    const TILE_ROWS: usize = 48;
    const FEW_ROWS: usize = 8;
    const OFFSET: bool = false;
    const PAIRS: [PairProduct; LANES] = [pair_wide::<1>, pair_wide::<2>, pair_wide::<3>, pair_wide::<4>];

    type Session = ();

    unsafe fn session() {}

    unsafe fn product(words: usize, lanes: *const u32, rows: Rows, sums: Sums) {
        // SAFETY: the caller's.
        unsafe {
            match rows.count {
                0..=4 => product_wide::<4>(words, lanes, rows, sums),
                5..=8 => product_wide::<8>(words, lanes, rows, sums),
                _ => product_wide::<12>(words, lanes, rows, sums),
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn weight_words(codes: &[i8], out: *mut u32) {
        let out = out.cast::<i16>();
        let (whole, rest) = codes.as_chunks::<32>();
        for (i, codes) in whole.iter().enumerate() {
            // SAFETY: 32 codes, and room for them.
            unsafe {
                let wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(codes.as_ptr().cast()));
                _mm512_storeu_si512(out.add(32 * i).cast(), wide);
            }
        }
        for (i, &code) in rest.iter().enumerate() {
            // SAFETY: the caller's.
            unsafe { *out.add(32 * whole.len() + i) = i16::from(code) }
        }
    }
}

/// AVX-512 F, BW, VL and AVX512-VNNI. One factor of its products is unsigned: the weight's codes plus 128.
pub struct Vnni;

/// What turns a code into the unsigned code plus 128.
const SIGN: u8 = 0x80;

impl Kernel for Vnni {
    const DEPTH: usize = 4;
    const LANES: usize = 32;
    const ROWS: usize = 12;
    const ROW_STEP: usize = 4;
    const TILE_ROWS: usize = 48;
    const FEW_ROWS: usize = 20;
    const OFFSET: bool = true;
    const PAIRS: [PairProduct; LANES] = [pair_bytes::<1>, pair_bytes::<2>, pair_bytes::<3>, pair_bytes::<4>];

    type Session = ();

    unsafe fn session() {}

    unsafe fn product(words: usize, lanes: *const u32, rows: Rows, sums: Sums) {
        // SAFETY: the caller's.
        unsafe {
            match rows.count {
                0..=4 => product_bytes::<4>(words, lanes, rows, sums),
                5..=8 => product_bytes::<8>(words, lanes, rows, sums),
                _ => product_bytes::<12>(words, lanes, rows, sums),
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn weight_words(codes: &[i8], out: *mut u32) {
        let out = out.cast::<u8>();
        let (whole, rest) = codes.as_chunks::<64>();
        for (i, codes) in whole.iter().enumerate() {
            // SAFETY: 64 codes, and room for them.
            unsafe {
                let codes = _mm512_loadu_si512(codes.as_ptr().cast());
                let offset = _mm512_xor_si512(codes, _mm512_set1_epi8(SIGN as i8));
                _mm512_storeu_si512(out.add(64 * i).cast(), offset);
            }
        }
        for (i, &code) in rest.iter().enumerate() {
            // SAFETY: the caller's.
            unsafe { *out.add(64 * whole.len() + i) = code as u8 ^ SIGN }
        }
    }
}

/// # Safety
/// As [`Kernel::product`], `N` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn product_wide<const N: usize>(words: usize, mut lanes: *const u32, rows: Rows, sums: Sums) {
    let mut sum = [[_mm512_setzero_si512(); 2]; N];
    let mut row = rows.words;
    for _ in 0..words {
        // SAFETY: the caller's.
        unsafe {
            let lane = [_mm512_loadu_si512(lanes.cast()), _mm512_loadu_si512(lanes.add(16).cast())];
            for (i, sum) in sum.iter_mut().enumerate() {
                let pair = _mm512_set1_epi32(*row.add(i * rows.row_stride) as i32);
                sum[0] = _mm512_add_epi32(sum[0], _mm512_madd_epi16(lane[0], pair));
                sum[1] = _mm512_add_epi32(sum[1], _mm512_madd_epi16(lane[1], pair));
            }
            (lanes, row) = (lanes.add(32), row.add(1));
        }
    }
    // SAFETY: the caller's.
    unsafe { store(&sum, sums) }
}

/// # Safety
/// As [`Kernel::product`], `N` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn product_bytes<const N: usize>(words: usize, mut lanes: *const u32, rows: Rows, sums: Sums) {
    let mut sum = [[_mm512_setzero_si512(); 2]; N];
    let mut row = rows.words;
    for _ in 0..words {
        // SAFETY: the caller's.
        unsafe {
            let lane = [_mm512_loadu_si512(lanes.cast()), _mm512_loadu_si512(lanes.add(16).cast())];
            for (i, sum) in sum.iter_mut().enumerate() {
                let four = _mm512_set1_epi32(*row.add(i * rows.row_stride) as i32);
                sum[0] = _mm512_dpbusd_epi32(sum[0], four, lane[0]);
                sum[1] = _mm512_dpbusd_epi32(sum[1], four, lane[1]);
            }
            (lanes, row) = (lanes.add(32), row.add(1));
        }
    }
    // SAFETY: the caller's.
    unsafe { store(&sum, sums) }
}

/// Writes `N` rows of sums.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store<const N: usize>(sum: &[[__m512i; 2]; N], sums: Sums) {
    for (i, sum) in sum.iter().enumerate() {
        for (half, &sum) in sum.iter().enumerate() {
            // SAFETY: the caller's.
            unsafe {
                let at = sums.at.add(i * sums.stride + 16 * half).cast::<__m512i>();
                let sum = if sums.first { sum } else { _mm512_add_epi32(_mm512_loadu_si512(at), sum) };
                _mm512_storeu_si512(at, sum);
            }
        }
    }
}

/// # Safety
/// As the functions of [`Kernel::PAIRS`], `N` rows of activations.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pair_wide<const N: usize>(pair: &Pair) -> [[i32; LANES]; 2] {
    let mut sums = [[_mm512_setzero_si512(); N]; 2];
    let whole = pair.len / STEP;
    for step in 0..whole {
        // SAFETY: the caller's.
        unsafe {
            let rows = pair.rows.map(|row| row.add(step * STEP));
            pair.prefetch(step);
            add_wide::<N>(rows, pair.x.add(step * STEP / 2), pair.x_stride, &mut sums);
        }
    }
    if !pair.len.is_multiple_of(STEP) {
        // SAFETY: the caller's; activations go on with zeros.
        unsafe {
            let last = pair.last();
            add_wide::<N>([last[0].as_ptr(), last[1].as_ptr()], pair.x.add(whole * STEP / 2), pair.x_stride, &mut sums);
        }
    }
    totals(sums)
}

/// Adds the products of [`STEP`] codes of two rows.
///
/// # Safety
/// AVX-512 F and BW; the rows have as many readable codes, `N` rows of activations as many words of them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn add_wide<const N: usize>(rows: [*const i8; 2], x: *const u32, x_stride: usize, sums: &mut [[__m512i; N]; 2]) {
    for part in 0..STEP / 32 {
        // SAFETY: the caller's.
        unsafe {
            let codes = rows.map(|row| _mm512_cvtepi8_epi16(_mm256_loadu_si256(row.add(32 * part).cast())));
            for lane in 0..N {
                let x = _mm512_loadu_si512(x.add(lane * x_stride + 16 * part).cast());
                sums[0][lane] = _mm512_add_epi32(sums[0][lane], _mm512_madd_epi16(codes[0], x));
                sums[1][lane] = _mm512_add_epi32(sums[1][lane], _mm512_madd_epi16(codes[1], x));
            }
        }
    }
}

/// # Safety
/// As the functions of [`Kernel::PAIRS`], `N` rows of activations.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn pair_bytes<const N: usize>(pair: &Pair) -> [[i32; LANES]; 2] {
    let mut sums = [[_mm512_setzero_si512(); N]; 2];
    let whole = pair.len / STEP;
    for step in 0..whole {
        // SAFETY: the caller's.
        unsafe {
            let rows = pair.rows.map(|row| row.add(step * STEP));
            pair.prefetch(step);
            add_bytes::<N>(rows, pair.x.add(step * STEP / 4), pair.x_stride, &mut sums);
        }
    }
    if !pair.len.is_multiple_of(STEP) {
        // SAFETY: the caller's; activations go on with zeros.
        unsafe {
            let last = pair.last();
            let rows = [last[0].as_ptr(), last[1].as_ptr()];
            add_bytes::<N>(rows, pair.x.add(whole * STEP / 4), pair.x_stride, &mut sums);
        }
    }
    totals(sums)
}

/// Adds the products of [`STEP`] codes of two rows, plus 128 each.
///
/// # Safety
/// AVX512-VNNI; the rows have as many readable codes, `N` rows of activations as many words of them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn add_bytes<const N: usize>(
    rows: [*const i8; 2],
    x: *const u32,
    x_stride: usize,
    sums: &mut [[__m512i; N]; 2],
) {
    // SAFETY: the caller's.
    unsafe {
        let sign = _mm512_set1_epi8(SIGN as i8);
        let codes = rows.map(|row| _mm512_xor_si512(_mm512_loadu_si512(row.cast()), sign));
        for lane in 0..N {
            let x = _mm512_loadu_si512(x.add(lane * x_stride).cast());
            sums[0][lane] = _mm512_dpbusd_epi32(sums[0][lane], codes[0], x);
            sums[1][lane] = _mm512_dpbusd_epi32(sums[1][lane], codes[1], x);
        }
    }
}

/// The sums across lanes.
#[inline]
#[target_feature(enable = "avx512f")]
fn totals<const N: usize>(sums: [[__m512i; N]; 2]) -> [[i32; LANES]; 2] {
    let mut totals = [[0; LANES]; 2];
    for (totals, sums) in totals.iter_mut().zip(sums) {
        for (total, sum) in totals.iter_mut().zip(sums) {
            *total = _mm512_reduce_add_epi32(sum);
        }
    }
    totals
}
