//! The block product by tiles of bytes. Few rows are multiplied by another path.

use std::marker::PhantomData;

use super::kernel::{Kernel, LANES, PairProduct, Sums};
use crate::gemm::blocked::kernel::{self, Rows};
use crate::gemm::blocked::tiled;
use crate::gemm::tiles::{ByteTiles, SIDE, Tiles};

/// Block products by tiles `T`, all else by `K`. A panel has `GROUPS` times 16 lanes, one or two.
pub struct Tiled<K, T, const GROUPS: usize>(PhantomData<(K, T)>);

/// Tiles whose words are four bytes, and sums int32.
struct Bytes<T>(PhantomData<T>);

impl<T: ByteTiles> Tiles for Bytes<T> {
    type Session = T::Session;

    #[inline(always)]
    unsafe fn session() -> T::Session {
        // SAFETY: the caller's.
        unsafe { T::session() }
    }

    #[inline(always)]
    unsafe fn zero<const TILE: usize>() {
        // SAFETY: the caller's.
        unsafe { T::zero::<TILE>() }
    }

    #[inline(always)]
    unsafe fn load<const TILE: usize>(from: *const u32, stride: usize) {
        // SAFETY: the caller's.
        unsafe { T::load::<TILE>(from, stride) }
    }

    #[inline(always)]
    unsafe fn store<const TILE: usize>(to: *mut f32, stride: usize) {
        // SAFETY: the caller's.
        unsafe { T::store::<TILE>(to, stride) }
    }

    #[inline(always)]
    unsafe fn multiply<const SUMS: usize, const A: usize, const B: usize>() {
        // SAFETY: the caller's.
        unsafe { T::multiply_bytes::<SUMS, A, B>() }
    }
}

impl<K: Kernel, T: ByteTiles, const GROUPS: usize> Kernel for Tiled<K, T, GROUPS> {
    const DEPTH: usize = 4;
    const LANES: usize = GROUPS * SIDE;
    const ROWS: usize = 2 * SIDE;
    const ROW_STEP: usize = SIDE;
    const TILE_ROWS: usize = 2 * SIDE * GROUPS;
    const FEW_ROWS: usize = 4;
    const OFFSET: bool = false;
    const PAIR_OFFSET: bool = K::PAIR_OFFSET;
    const PAIRS: [PairProduct; LANES] = K::PAIRS;

    type Session = T::Session;

    unsafe fn session() -> T::Session {
        // SAFETY: the caller's.
        unsafe { T::session() }
    }

    unsafe fn product(words: usize, lanes: *const u32, rows: Rows, sums: Sums) {
        debug_assert!(rows.word_stride == 1 && rows.count <= Self::ROWS);
        let sums = kernel::Sums { at: sums.at.cast(), stride: sums.stride, first: sums.first };
        // SAFETY: the caller's; the tiles do not ask what is in a word.
        unsafe {
            if rows.count > SIDE {
                tiled::product::<Bytes<T>, GROUPS, true>(words, lanes, rows, sums);
            } else {
                tiled::product::<Bytes<T>, GROUPS, false>(words, lanes, rows, sums);
            }
        }
    }

    unsafe fn weight_words(codes: &[i8], out: *mut u32) {
        // SAFETY: the caller's.
        unsafe { std::ptr::copy_nonoverlapping(codes.as_ptr(), out.cast(), codes.len()) }
    }
}
