//! What the products of codes need of a path.
//!
//! Everything is made of 32-bit *words* of codes that lie next to each other along the dimension that is summed over: two
//! of 16 bits, or four of 8 bits. Sums are int32 and wrap: where the result fits, it is exact, whatever the order.

use crate::gemm::blocked::kernel::Rows;
use crate::gemm::weight::prefetch_to_second_level;

/// The words of a chunk: a panel of 32 lanes and that many words fills the first-level cache.
pub const CHUNK: usize = 256;

/// Rows of activations that are multiplied with the same codes of a few rows of the weight.
pub const LANES: usize = 4;

/// Codes that a [`Pair`] is multiplied in steps of: a cache line of the weight.
pub const STEP: usize = 64;

/// Where a block product adds to.
#[derive(Clone, Copy)]
pub struct Sums {
    /// Row 0, lane 0.
    pub at: *mut i32,
    /// Values from one row to the next.
    pub stride: usize,
    /// Whether what is there is overwritten, not added to.
    pub first: bool,
}

/// Two rows of a weight, and the activations that they are multiplied with.
pub struct Pair {
    /// The rows, which may be the same one.
    pub rows: [*const i8; 2],
    /// Codes in each.
    pub len: usize,
    /// Where prefetching begins: two cache lines for each step. It may lie outside of the weight.
    pub ahead: *const u8,
    /// Words of activations, zeros up to a multiple of [`STEP`] codes.
    pub x: *const u32,
    /// Words from one row of activations to the next.
    pub x_stride: usize,
}

impl Pair {
    /// Prefetches the two cache lines of a step.
    #[inline(always)]
    pub fn prefetch(&self, step: usize) {
        let at = self.ahead.wrapping_add(2 * step * STEP);
        prefetch_to_second_level(at);
        prefetch_to_second_level(at.wrapping_add(STEP));
    }

    /// The last codes, which are no whole step, of both rows: zeros behind them.
    ///
    /// # Safety
    /// Both rows are readable.
    #[inline(always)]
    pub unsafe fn last(&self) -> [[i8; STEP]; 2] {
        let (whole, rest) = (self.len / STEP * STEP, self.len % STEP);
        self.rows.map(|row| {
            let mut codes = [0; STEP];
            // SAFETY: the caller's.
            unsafe { std::ptr::copy_nonoverlapping(row.add(whole), codes.as_mut_ptr(), rest) }
            codes
        })
    }
}

/// The sums of a pair with some rows of activations.
pub type PairProduct = unsafe fn(&Pair) -> [[i32; LANES]; 2];

/// One path's instructions.
pub trait Kernel {
    /// Codes in a word: 2 or 4.
    const DEPTH: usize;
    /// Lanes of a panel.
    const LANES: usize;
    /// The most rows of a block product.
    const ROWS: usize;
    /// Numbers of rows are rounded up to multiples of this, which divides `ROWS`.
    const ROW_STEP: usize;
    /// Rows of a tile at most: a multiple of `ROWS`, no more than [`MOST_COLS`](crate::gemm::out::MOST_COLS).
    const TILE_ROWS: usize;
    /// Up to so many rows of activations are multiplied by [`Self::PAIRS`].
    const FEW_ROWS: usize;
    /// Whether block products are of the weight's codes plus 128: then a sum is larger than that of the codes by 128 times
    /// the sum of the activations' codes.
    const OFFSET: bool;
    /// The same of [`Self::PAIRS`].
    const PAIR_OFFSET: bool = Self::OFFSET;
    /// The products of a pair with 1 to [`LANES`] rows of activations, by the number of these.
    ///
    /// To call one, the machine must have the path, and all of the pair be readable.
    const PAIRS: [PairProduct; LANES];

    /// What a thread must have while it makes block products.
    type Session;

    /// # Safety
    /// The machine has the path.
    unsafe fn session() -> Self::Session;

    /// The block product of `words` words. `lanes` is `[words][LANES]`; rows' words are next to each other.
    ///
    /// # Safety
    /// The machine has the path, and the thread a session. `lanes` and `rows` are readable and `sums` writable as far as
    /// described.
    unsafe fn product(words: usize, lanes: *const u32, rows: Rows, sums: Sums);

    /// Codes of a row of the weight as words, with the offset.
    ///
    /// # Safety
    /// The machine has the path; `out` has room for the words.
    unsafe fn weight_words(codes: &[i8], out: *mut u32);
}

/// Codes of activations as words of `depth` codes; what the last word lacks is zero.
pub fn words(depth: usize, codes: &[i8], out: &mut [u32]) {
    debug_assert_eq!(out.len(), codes.len().div_ceil(depth));
    if depth == 2 {
        let out: &mut [i16] = bytemuck::cast_slice_mut(out);
        out.iter_mut().zip(codes).for_each(|(out, &code)| *out = i16::from(code));
        out[codes.len()..].fill(0);
    } else {
        let out: &mut [i8] = bytemuck::cast_slice_mut(out);
        out[..codes.len()].copy_from_slice(codes);
        out[codes.len()..].fill(0);
    }
}
