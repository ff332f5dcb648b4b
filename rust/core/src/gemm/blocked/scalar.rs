//! The portable path of the blocked product.

use super::kernel::{Decoder, Kernel, Rows, STEP, Sums, decode};
use crate::gemm::weight::Run;

/// The portable path: float32 without fused multiply-adds.
pub struct Scalar;

impl Decoder for Scalar {
    type Value = f32;
    type Codebook = [f32; 16];
    type Table = [f32; 16];

    #[inline]
    unsafe fn codebook(values: &[f32; 16]) -> [f32; 16] {
        *values
    }

    #[inline]
    unsafe fn table(codebook: [f32; 16], scale: f32) -> [f32; 16] {
        codebook.map(|v| v * scale)
    }

    #[inline]
    unsafe fn look_up(table: [f32; 16], codes: *const u8, out: *mut f32) {
        for i in 0..STEP / 2 {
            // SAFETY: the caller's.
            unsafe {
                let byte = *codes.add(i);
                *out.add(2 * i) = table[usize::from(byte >> 4)];
                *out.add(2 * i + 1) = table[usize::from(byte & 15)];
            }
        }
    }
}

impl Kernel for Scalar {
    const DEPTH: usize = 1;
    const LANES: usize = 8;
    const ROWS: usize = 4;
    const ROW_STEP: usize = 4;

    type Session = ();

    unsafe fn session() {}

    unsafe fn product(words: usize, lanes: *const u32, rows: Rows, sums: Sums) {
        let mut sum = [[0.0f32; 8]; 4];
        for p in 0..words {
            // SAFETY: the caller's.
            unsafe {
                let lane: [f32; 8] = std::ptr::read_unaligned(lanes.add(p * 8).cast());
                for (i, sum) in sum.iter_mut().enumerate() {
                    let row = f32::from_bits(*rows.words.add(i * rows.row_stride + p * rows.word_stride));
                    for (sum, lane) in sum.iter_mut().zip(lane) {
                        *sum += row * lane;
                    }
                }
            }
        }
        for (i, sum) in sum.iter().enumerate() {
            for (lane, sum) in sum.iter().enumerate() {
                // SAFETY: the caller's.
                unsafe {
                    let at = sums.at.add(i * sums.stride + lane);
                    *at = if sums.first { *sum } else { *at + *sum };
                }
            }
        }
    }

    unsafe fn decode(run: &Run<'_>, out: *mut u8) {
        // SAFETY: the caller's.
        unsafe { decode::<Self>(run, out.cast()) }
    }

    unsafe fn dot(words: usize, a: *const u32, b: *const u32) -> f32 {
        // SAFETY: the caller's.
        let (a, b) = unsafe {
            (std::slice::from_raw_parts(a.cast::<f32>(), words), std::slice::from_raw_parts(b.cast::<f32>(), words))
        };
        let mut sums = [0.0f32; 8];
        let (a_whole, a_rest) = a.as_chunks::<8>();
        let (b_whole, b_rest) = b.as_chunks::<8>();
        for (a, b) in a_whole.iter().zip(b_whole) {
            for i in 0..8 {
                sums[i] += a[i] * b[i];
            }
        }
        sums.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
    }
}
