//! Registers for tiles, as AMX has them: 16 rows of 64 bytes each.
//!
//! A tile of the first operand has 16 rows of 16 words, one of the second 16 words of 16 lanes, and one of sums 16 rows of
//! 16 lanes: both operands lie in memory as the tiles want them, so that none is laid out anew.

/// With more rows of activations tiles are faster than products in other registers.
pub const DIRECT_ROWS: usize = 2;

/// Rows of a tile, words of a row and lanes of a word.
pub const SIDE: usize = 16;

/// The eight tile registers of a thread. Numbers of registers are below 8; strides are in words.
pub trait Tiles {
    /// While one of these lives, the thread's registers are tiles of 16 rows of 64 bytes.
    type Session;

    /// # Safety
    /// The machine has AMX, and the process may use it.
    unsafe fn session() -> Self::Session;

    /// # Safety
    /// A session lives, as for all of these.
    unsafe fn zero<const TILE: usize>();

    /// # Safety
    /// All 16 rows are readable.
    unsafe fn load<const TILE: usize>(from: *const u32, stride: usize);

    /// # Safety
    /// All 16 rows are writable.
    unsafe fn store<const TILE: usize>(to: *mut f32, stride: usize);

    /// `SUMS[row][lane] += A[row][word] · B[word][lane]`, words being pairs of bfloat16 and sums float32.
    ///
    /// # Safety
    /// Nothing else.
    unsafe fn multiply<const SUMS: usize, const A: usize, const B: usize>();
}

/// Registers that multiply bytes too.
pub trait ByteTiles: Tiles {
    /// `SUMS[row][lane] += A[row][word] · B[word][lane]`, words being four signed bytes and sums int32.
    ///
    /// # Safety
    /// As [`Tiles::zero`].
    unsafe fn multiply_bytes<const SUMS: usize, const A: usize, const B: usize>();
}
