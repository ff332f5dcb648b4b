//! The portable path: what all others compute.

use super::kernel::{Kernel, LANES, Pair, PairProduct, STEP, Sums};
use crate::gemm::blocked::kernel::Rows;

/// Bytes, one by one.
pub struct Scalar;

impl Kernel for Scalar {
    const DEPTH: usize = 4;
    const LANES: usize = 8;
    const ROWS: usize = 4;
    const ROW_STEP: usize = 4;
    const TILE_ROWS: usize = 48;
    const FEW_ROWS: usize = 8;
    const OFFSET: bool = false;
    const PAIRS: [PairProduct; LANES] = [pair::<1>, pair::<2>, pair::<3>, pair::<4>];

    type Session = ();

    unsafe fn session() {}

    unsafe fn product(words: usize, lanes: *const u32, rows: Rows, sums: Sums) {
        for i in 0..rows.count.next_multiple_of(Self::ROW_STEP) {
            let mut sum = [0i32; Self::LANES];
            for p in 0..words {
                // SAFETY: the caller's.
                let row = unsafe { (*rows.words.add(i * rows.row_stride + p)).to_ne_bytes() };
                for (lane, sum) in sum.iter_mut().enumerate() {
                    // SAFETY: the caller's.
                    let lane = unsafe { (*lanes.add(p * Self::LANES + lane)).to_ne_bytes() };
                    for (a, b) in row.into_iter().zip(lane) {
                        *sum = sum.wrapping_add(i32::from(a as i8) * i32::from(b as i8));
                    }
                }
            }
            for (lane, sum) in sum.into_iter().enumerate() {
                // SAFETY: the caller's.
                unsafe {
                    let at = sums.at.add(i * sums.stride + lane);
                    *at = if sums.first { sum } else { (*at).wrapping_add(sum) };
                }
            }
        }
    }

    unsafe fn weight_words(codes: &[i8], out: *mut u32) {
        // SAFETY: the caller's.
        unsafe { std::ptr::copy_nonoverlapping(codes.as_ptr(), out.cast(), codes.len()) }
    }
}

/// # Safety
/// All of the pair is readable.
unsafe fn pair<const N: usize>(pair: &Pair) -> [[i32; LANES]; 2] {
    let mut sums = [[0i32; LANES]; 2];
    for (row, sums) in pair.rows.into_iter().zip(&mut sums) {
        for (lane, sum) in sums.iter_mut().enumerate().take(N) {
            // SAFETY: the caller's.
            let (row, x) = unsafe {
                let x = pair.x.add(lane * pair.x_stride).cast::<i8>();
                (std::slice::from_raw_parts(row, pair.len), std::slice::from_raw_parts(x, pair.len))
            };
            for (row, x) in row.chunks(STEP).zip(x.chunks(STEP)) {
                let products = row.iter().zip(x).map(|(&a, &b)| i32::from(a) * i32::from(b));
                *sum = sum.wrapping_add(products.sum::<i32>());
            }
        }
    }
    sums
}
