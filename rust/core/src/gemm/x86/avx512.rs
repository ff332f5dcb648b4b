//! The AVX-512 paths: float32, and bfloat16 where the processor multiplies pairs of them.

use std::arch::x86_64::*;

use crate::gemm::blocked::kernel::{Decoder, Kernel, Rows, STEP, Sums, decode};
use crate::gemm::direct::tiles::{DecodesGroups, Group, ROWS, STEPS};
use crate::gemm::tiles::SIDE;
use crate::gemm::weight::{Run, prefetch};

/// AVX-512 F, BW and VL.
pub struct Avx512;

impl Decoder for Avx512 {
    type Value = f32;
    type Codebook = __m512;
    type Table = __m512;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c,fma")]
    unsafe fn codebook(values: &[f32; 16]) -> __m512 {
        // SAFETY: sixteen values.
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c,fma")]
    unsafe fn table(codebook: __m512, scale: f32) -> __m512 {
        _mm512_mul_ps(codebook, _mm512_set1_ps(scale))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c,fma")]
    unsafe fn look_up(table: __m512, codes: *const u8, out: *mut f32) {
        for half in 0..2 {
            // SAFETY: the caller's.
            unsafe {
                let bytes = _mm_loadl_epi64(codes.add(8 * half).cast());
                let bytes = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, bytes));
                // High nibbles to the even lanes; the look-up uses the low four bits.
                let index = _mm512_mask_srli_epi32::<4>(bytes, 0x5555, bytes);
                _mm512_storeu_ps(out.add(16 * half), _mm512_permutexvar_ps(index, table));
            }
        }
    }
}

impl Kernel for Avx512 {
    const DEPTH: usize = 1;
    const LANES: usize = 32;
    const ROWS: usize = 12;
    const ROW_STEP: usize = 4;

    type Session = ();

    unsafe fn session() {}

    unsafe fn product(words: usize, lanes: *const u32, rows: Rows, sums: Sums) {
        // SAFETY: the caller's.
        unsafe {
            match rows.count {
                0..=4 => product_f32::<4>(words, lanes.cast(), rows, sums),
                5..=8 => product_f32::<8>(words, lanes.cast(), rows, sums),
                _ => product_f32::<12>(words, lanes.cast(), rows, sums),
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c,fma")]
    unsafe fn decode(run: &Run<'_>, out: *mut u8) {
        // SAFETY: the caller's.
        unsafe { decode::<Self>(run, out.cast()) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c,fma")]
    unsafe fn dot(words: usize, a: *const u32, b: *const u32) -> f32 {
        let (a, b) = (a.cast::<f32>(), b.cast::<f32>());
        let mut sums = [_mm512_setzero_ps(); 4];
        let whole = words - words % 64;
        // SAFETY: the caller's; the masks cover what is left.
        unsafe {
            for p in (0..whole).step_by(64) {
                for (i, sum) in sums.iter_mut().enumerate() {
                    let (a, b) = (_mm512_loadu_ps(a.add(p + 16 * i)), _mm512_loadu_ps(b.add(p + 16 * i)));
                    *sum = _mm512_fmadd_ps(a, b, *sum);
                }
            }
            for p in (whole..words).step_by(16) {
                let mask = low_bits(words - p);
                let (a, b) = (_mm512_maskz_loadu_ps(mask, a.add(p)), _mm512_maskz_loadu_ps(mask, b.add(p)));
                sums[0] = _mm512_fmadd_ps(a, b, sums[0]);
            }
        }
        total(sums)
    }
}

/// AVX-512 F, BW, VL and AVX512-BF16.
pub struct Avx512Bf16;

impl Decoder for Avx512Bf16 {
    type Value = u16;
    type Codebook = __m512;
    /// Sixteen bfloat16, twice.
    type Table = __m512i;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn codebook(values: &[f32; 16]) -> __m512 {
        // SAFETY: sixteen values.
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn table(codebook: __m512, scale: f32) -> __m512i {
        let values = _mm512_mul_ps(codebook, _mm512_set1_ps(scale));
        bits(_mm512_cvtne2ps_pbh(values, values))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn look_up(table: __m512i, codes: *const u8, out: *mut u16) {
        // SAFETY: the caller's.
        unsafe { _mm512_storeu_si512(out.cast(), Self::values_of(table, codes)) }
    }
}

impl Avx512Bf16 {
    /// The values of the [`STEP`] codes in 16 bytes.
    ///
    /// # Safety
    /// The machine has the path; 16 readable bytes at `codes`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn values_of(table: __m512i, codes: *const u8) -> __m512i {
        // SAFETY: the caller's.
        let bytes = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(codes.cast()) });
        // The look-up uses the low five bits, and the fifth does not matter.
        let index = _mm512_or_si512(_mm512_srli_epi32::<4>(bytes), _mm512_slli_epi32::<16>(bytes));
        _mm512_permutexvar_epi16(index, table)
    }
}

impl Kernel for Avx512Bf16 {
    const DEPTH: usize = 2;
    const LANES: usize = 32;
    const ROWS: usize = 12;
    const ROW_STEP: usize = 4;

    type Session = ();

    unsafe fn session() {}

    unsafe fn product(words: usize, lanes: *const u32, rows: Rows, sums: Sums) {
        // SAFETY: the caller's.
        unsafe {
            match rows.count {
                0..=4 => product_bf16::<4>(words, lanes, rows, sums),
                5..=8 => product_bf16::<8>(words, lanes, rows, sums),
                _ => product_bf16::<12>(words, lanes, rows, sums),
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn decode(run: &Run<'_>, out: *mut u8) {
        // SAFETY: the caller's.
        unsafe { decode::<Self>(run, out.cast()) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn dot(words: usize, a: *const u32, b: *const u32) -> f32 {
        let mut sums = [_mm512_setzero_ps(); 4];
        let whole = words - words % 64;
        // SAFETY: the caller's; the masks cover what is left.
        unsafe {
            for p in (0..whole).step_by(64) {
                for (i, sum) in sums.iter_mut().enumerate() {
                    let a = _mm512_loadu_si512(a.add(p + 16 * i).cast());
                    let b = _mm512_loadu_si512(b.add(p + 16 * i).cast());
                    *sum = _mm512_dpbf16_ps(*sum, pairs(a), pairs(b));
                }
            }
            for p in (whole..words).step_by(16) {
                let mask = low_bits(words - p);
                let a = _mm512_maskz_loadu_epi32(mask, a.add(p).cast());
                let b = _mm512_maskz_loadu_epi32(mask, b.add(p).cast());
                sums[0] = _mm512_dpbf16_ps(sums[0], pairs(a), pairs(b));
            }
        }
        total(sums)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn weave(first: &[u32], second: &[u32], out: &mut [u32]) {
        for ((first, second), out) in first.chunks_exact(8).zip(second.chunks_exact(8)).zip(out.chunks_exact_mut(16)) {
            // SAFETY: sixteen values each.
            unsafe {
                let first = _mm512_cvtepu16_epi32(_mm256_loadu_si256(first.as_ptr().cast()));
                let second = _mm512_cvtepu16_epi32(_mm256_loadu_si256(second.as_ptr().cast()));
                let both = _mm512_or_si512(first, _mm512_slli_epi32::<16>(second));
                _mm512_storeu_si512(out.as_mut_ptr().cast(), both);
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn decode_pair(first: &Run<'_>, second: &Run<'_>, out: *mut u32, stride: usize) -> bool {
        let whole = |run: &Run<'_>| run.start.is_multiple_of(STEP) && run.len.is_multiple_of(STEP);
        if !(whole(first) && whole(second)) {
            return false;
        }
        // SAFETY: the caller's: of both rows there are codes and scales of `len` values.
        unsafe {
            let low = _mm512_loadu_si512(PAIRED.as_ptr().cast());
            let high = _mm512_loadu_si512(PAIRED.as_ptr().add(32).cast());
            let codebook = Self::codebook(first.values);
            let (mut first, mut second) = (Steps::new(first), Steps::new(second));
            for panel in 0..first.steps {
                let (a, b) = (first.next(codebook), second.next(codebook));
                let to = out.add(panel * stride);
                _mm512_storeu_si512(to.cast(), _mm512_permutex2var_epi16(a, low, b));
                _mm512_storeu_si512(to.add(16).cast(), _mm512_permutex2var_epi16(a, high, b));
            }
        }
        true
    }
}

impl DecodesGroups for Avx512Bf16 {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn decode_group(group: &Group<'_>) {
        // SAFETY: the caller's.
        unsafe {
            let values = _mm512_loadu_ps(group.values.as_ptr());
            let nibble = _mm512_set1_epi16(0x000f);
            // The second half's values are the table's second sixteen.
            let half = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi16(0x0010));
            for row in 0..group.rows {
                let codes = group.codes_of(row);
                prefetch(codes.wrapping_add(group.ahead));
                let [first, second] = group.scales_of(row);
                let (first, second) = (_mm512_set1_ps(first), _mm512_set1_ps(second));
                let table = bits(_mm512_cvtne2ps_pbh(_mm512_mul_ps(values, second), _mm512_mul_ps(values, first)));
                let codes = if group.whole {
                    _mm512_loadu_si512(codes.cast())
                } else {
                    _mm512_zextsi256_si512(_mm256_loadu_si256(codes.cast()))
                };
                let shifted = [
                    codes,
                    _mm512_srli_epi16::<4>(codes),
                    _mm512_srli_epi16::<8>(codes),
                    _mm512_srli_epi16::<12>(codes),
                ];
                for step in 0..STEPS {
                    /// `a & b | c`
                    const AND_OR: i32 = 0xea;
                    let index = _mm512_ternarylogic_epi32::<AND_OR>(shifted[step], nibble, half);
                    let out = group.out.add((step * ROWS + row) * SIDE);
                    _mm512_storeu_si512(out.cast(), _mm512_permutexvar_epi16(index, table));
                }
            }
        }
    }
}

/// Of two registers of 32 values one after the other: the first of both, the second of both, and so on.
const PAIRED: [u16; 64] = {
    let mut places = [0; 64];
    let mut i = 0;
    while i < 64 {
        places[i] = (i / 2 + i % 2 * 32) as u16;
        i += 1;
    }
    places
};

/// A run of whole steps, decoded to bfloat16 one after the other.
struct Steps<'a> {
    codes: *const u8,
    scales: &'a [f32],
    /// Steps of a block, less one: a power of two, less one.
    mask: usize,
    /// Where in its block the next step is.
    at: usize,
    /// The block that it is in.
    block: usize,
    table: __m512i,
    steps: usize,
}

impl<'a> Steps<'a> {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new(run: &Run<'a>) -> Self {
        let codes = run.packed[run.start / 2..(run.start + run.len) / 2].as_ptr();
        let (mask, first) = (run.blocksize / STEP - 1, run.start / STEP);
        // In the middle of a block, its table is made as if it began there.
        Self {
            codes,
            scales: run.scales,
            mask,
            at: first & mask,
            block: 0,
            table: _mm512_setzero_si512(),
            steps: run.len / STEP,
        }
    }

    /// # Safety
    /// The machine has the path, and there is a next one.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn next(&mut self, codebook: __m512) -> __m512i {
        // SAFETY: the caller's.
        unsafe {
            if self.at == 0 || self.block == 0 {
                self.table = Avx512Bf16::table(codebook, self.scales[self.block]);
                self.block += 1;
            }
            self.at = (self.at + 1) & self.mask;
            let values = Avx512Bf16::values_of(self.table, self.codes);
            self.codes = self.codes.add(STEP / 2);
            values
        }
    }
}

/// A register as pairs of bfloat16.
#[inline]
#[target_feature(enable = "avx512f")]
pub fn pairs(v: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits of any value.
    unsafe { std::mem::transmute(v) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub fn bits(v: __m512bh) -> __m512i {
    // SAFETY: both are 512 bits of any value.
    unsafe { std::mem::transmute(v) }
}

/// A mask of the first `n` lanes, at most 16.
fn low_bits(n: usize) -> __mmask16 {
    if n >= 16 { !0 } else { (1 << n) - 1 }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn total(sums: [__m512; 4]) -> f32 {
    _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])))
}

/// Writes `N` rows of sums.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store<const N: usize>(sum: &[[__m512; 2]; N], sums: Sums) {
    for (i, sum) in sum.iter().enumerate() {
        for (half, &sum) in sum.iter().enumerate() {
            // SAFETY: the caller's.
            unsafe {
                let at = sums.at.add(i * sums.stride + 16 * half);
                _mm512_storeu_ps(at, if sums.first { sum } else { _mm512_add_ps(_mm512_loadu_ps(at), sum) });
            }
        }
    }
}

/// # Safety
/// As [`Kernel::product`], `N` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c,fma")]
unsafe fn product_f32<const N: usize>(words: usize, mut lanes: *const f32, rows: Rows, sums: Sums) {
    let mut sum = [[_mm512_setzero_ps(); 2]; N];
    let mut row = rows.words.cast::<f32>();
    for _ in 0..words {
        // SAFETY: the caller's.
        unsafe {
            let lane = [_mm512_loadu_ps(lanes), _mm512_loadu_ps(lanes.add(16))];
            for (i, sum) in sum.iter_mut().enumerate() {
                let value = _mm512_set1_ps(*row.add(i * rows.row_stride));
                sum[0] = _mm512_fmadd_ps(lane[0], value, sum[0]);
                sum[1] = _mm512_fmadd_ps(lane[1], value, sum[1]);
            }
            (lanes, row) = (lanes.add(32), row.add(rows.word_stride));
        }
    }
    // SAFETY: the caller's.
    unsafe { store(&sum, sums) }
}

/// # Safety
/// As [`Kernel::product`], `N` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn product_bf16<const N: usize>(words: usize, mut lanes: *const u32, rows: Rows, sums: Sums) {
    let mut sum = [[_mm512_setzero_ps(); 2]; N];
    let mut row = rows.words;
    for _ in 0..words {
        // SAFETY: the caller's.
        unsafe {
            let lane = [pairs(_mm512_loadu_si512(lanes.cast())), pairs(_mm512_loadu_si512(lanes.add(16).cast()))];
            for (i, sum) in sum.iter_mut().enumerate() {
                let pair = pairs(_mm512_set1_epi32(*row.add(i * rows.row_stride) as i32));
                sum[0] = _mm512_dpbf16_ps(sum[0], lane[0], pair);
                sum[1] = _mm512_dpbf16_ps(sum[1], lane[1], pair);
            }
            (lanes, row) = (lanes.add(32), row.add(rows.word_stride));
        }
    }
    // SAFETY: the caller's.
    unsafe { store(&sum, sums) }
}
