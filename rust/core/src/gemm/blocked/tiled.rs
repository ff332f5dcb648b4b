//! The blocked product by tiles. Codes are looked up by another path.

use std::marker::PhantomData;

use super::kernel::{Kernel, Rows, Sums};
use crate::gemm::tiles::{DIRECT_ROWS, SIDE, Tiles};
use crate::gemm::weight::Run;

/// Products by tiles `T`, all else by `K`. A panel has `GROUPS` times 16 lanes, one or two.
pub struct Tiled<K, T, const GROUPS: usize>(PhantomData<(K, T)>);

impl<K: Kernel, T: Tiles, const GROUPS: usize> Kernel for Tiled<K, T, GROUPS> {
    const DEPTH: usize = 2;
    const LANES: usize = GROUPS * SIDE;
    const ROWS: usize = 2 * SIDE;
    const ROW_STEP: usize = SIDE;
    const TILE_ROWS: usize = 2 * SIDE * GROUPS;
    const FEW_ROWS: usize = DIRECT_ROWS;
    const WORDS_TOGETHER: bool = true;

    type Session = T::Session;

    unsafe fn session() -> T::Session {
        // SAFETY: the caller's.
        unsafe { T::session() }
    }

    unsafe fn product(words: usize, lanes: *const u32, rows: Rows, sums: Sums) {
        debug_assert!(rows.word_stride == 1 && rows.count <= Self::ROWS);
        // SAFETY: the caller's.
        unsafe {
            if rows.count > SIDE {
                product::<T, GROUPS, true>(words, lanes, rows, sums);
            } else {
                product::<T, GROUPS, false>(words, lanes, rows, sums);
            }
        }
    }

    unsafe fn decode(run: &Run<'_>, out: *mut u8) {
        // SAFETY: the caller's.
        unsafe { K::decode(run, out) }
    }

    unsafe fn decode_pair(first: &Run<'_>, second: &Run<'_>, out: *mut u32, stride: usize) -> bool {
        // SAFETY: the caller's; panels of `K` are as wide.
        K::LANES == Self::LANES && unsafe { K::decode_pair(first, second, out, stride) }
    }

    unsafe fn dot(words: usize, a: *const u32, b: *const u32) -> f32 {
        // SAFETY: the caller's.
        unsafe { K::dot(words, a, b) }
    }

    unsafe fn weave(first: &[u32], second: &[u32], out: &mut [u32]) {
        // SAFETY: the caller's.
        unsafe { K::weave(first, second, out) }
    }
}

/// The block product of one or two tiles of rows. Sums are tiles 0 to 3, rows 4 and 5, lanes 6 and 7.
///
/// # Safety
/// As [`Kernel::product`].
#[inline(always)]
pub unsafe fn product<T: Tiles, const GROUPS: usize, const TWO: bool>(
    words: usize,
    lanes: *const u32,
    rows: Rows,
    sums: Sums,
) {
    let second = SIDE * sums.stride;
    // SAFETY: the caller's; of the last words, which are no whole tile, there are copies.
    unsafe {
        if sums.first {
            T::zero::<0>();
            T::zero::<1>();
            T::zero::<2>();
            T::zero::<3>();
        } else {
            T::load::<0>(sums.at.cast(), sums.stride);
            if GROUPS == 2 {
                T::load::<1>(sums.at.add(SIDE).cast(), sums.stride);
            }
            if TWO {
                T::load::<2>(sums.at.add(second).cast(), sums.stride);
            }
            if TWO && GROUPS == 2 {
                T::load::<3>(sums.at.add(second + SIDE).cast(), sums.stride);
            }
        }
        let whole = words - words % SIDE;
        for p in (0..whole).step_by(SIDE) {
            let row = rows.words.add(p);
            step::<T, GROUPS, TWO>(lanes.add(p * GROUPS * SIDE), row, rows.row_stride);
        }
        if whole < words {
            let mut last_lanes = [[0u32; 2 * SIDE]; SIDE];
            let mut last_rows = [[0u32; SIDE]; 2 * SIDE];
            for p in whole..words {
                let word = lanes.add(p * GROUPS * SIDE);
                let to = last_lanes.as_mut_ptr().cast::<u32>().add((p - whole) * GROUPS * SIDE);
                std::ptr::copy_nonoverlapping(word, to, GROUPS * SIDE);
            }
            for (i, row) in last_rows.iter_mut().enumerate().take(if TWO { 2 * SIDE } else { SIDE }) {
                let words_of_row = rows.words.add(i * rows.row_stride + whole);
                std::ptr::copy_nonoverlapping(words_of_row, row.as_mut_ptr(), words - whole);
            }
            step::<T, GROUPS, TWO>(last_lanes.as_ptr().cast(), last_rows.as_ptr().cast(), SIDE);
        }
        T::store::<0>(sums.at, sums.stride);
        if GROUPS == 2 {
            T::store::<1>(sums.at.add(SIDE), sums.stride);
        }
        if TWO {
            T::store::<2>(sums.at.add(second), sums.stride);
        }
        if TWO && GROUPS == 2 {
            T::store::<3>(sums.at.add(second + SIDE), sums.stride);
        }
    }
}

/// The products of 16 words.
///
/// # Safety
/// As [`product`].
#[inline(always)]
unsafe fn step<T: Tiles, const GROUPS: usize, const TWO: bool>(lanes: *const u32, rows: *const u32, row_stride: usize) {
    // SAFETY: the caller's.
    unsafe {
        T::load::<6>(lanes, GROUPS * SIDE);
        T::load::<4>(rows, row_stride);
        T::multiply::<0, 4, 6>();
        if GROUPS == 2 {
            T::load::<7>(lanes.add(SIDE), GROUPS * SIDE);
            T::multiply::<1, 4, 7>();
        }
        if TWO {
            T::load::<5>(rows.add(SIDE * row_stride), row_stride);
            T::multiply::<2, 5, 6>();
        }
        if TWO && GROUPS == 2 {
            T::multiply::<3, 5, 7>();
        }
    }
}
