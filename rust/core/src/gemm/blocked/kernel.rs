//! What the blocked product needs of a path.
//!
//! Everything is made of 32-bit *words*: one float32, or two bfloat16 that lie next to each other along the dimension
//! that is summed over. A block product adds up, over words `p`,
//! `c[i][lane] += rows(i, p) · lanes(p, lane)`: one vector of lanes against one broadcast word for every row.

use crate::gemm::weight::Run;

/// The words of a chunk: a panel of 32 lanes and that many words fills the first-level cache.
pub const CHUNK: usize = 256;

/// Values that [`decode`] looks up at a time: 16 packed bytes. All block sizes are multiples.
pub const STEP: usize = 32;

/// One of the two operands of a block product.
#[derive(Clone, Copy)]
pub struct Rows {
    /// Row 0, word 0.
    pub words: *const u32,
    /// Words from one row to the next.
    pub row_stride: usize,
    /// Words from one `p` to the next.
    pub word_stride: usize,
    /// How many rows count; they are read, and written to `c`, up to the next multiple of [`Kernel::ROW_STEP`].
    pub count: usize,
}

/// Where a block product adds to.
#[derive(Clone, Copy)]
pub struct Sums {
    /// Row 0, lane 0.
    pub at: *mut f32,
    /// Values from one row to the next.
    pub stride: usize,
    /// Whether what is there is overwritten, not added to.
    pub first: bool,
}

/// One path's instructions.
pub trait Kernel {
    /// Values in a word: 1 for float32, 2 for bfloat16.
    const DEPTH: usize;
    /// Lanes of a panel.
    const LANES: usize;
    /// The most rows of a block product.
    const ROWS: usize;
    /// Numbers of rows are rounded up to multiples of this, which divides `ROWS`.
    const ROW_STEP: usize;
    /// Rows of a forward tile at most: a multiple of `ROWS`, no more than [`MOST_COLS`](crate::gemm::out::MOST_COLS).
    const TILE_ROWS: usize = 48;
    /// Up to so many rows of activations are multiplied without laying them out for the block product.
    const FEW_ROWS: usize = 8;
    /// Whether `word_stride` must be 1.
    const WORDS_TOGETHER: bool = false;

    /// What a thread must have while it makes block products.
    type Session;

    /// # Safety
    /// The machine has the path.
    unsafe fn session() -> Self::Session;

    /// The block product of `words` words. `lanes` is `[words][LANES]`.
    ///
    /// # Safety
    /// The machine has the path, and the thread a session. `lanes` and `rows` are readable and `sums` writable as far as
    /// described.
    unsafe fn product(words: usize, lanes: *const u32, rows: Rows, sums: Sums);

    /// Decodes a run to consecutive values: float32, or bfloat16 for `DEPTH == 2`.
    ///
    /// # Safety
    /// The machine has the path. `out` has room for `run.len` values of `4 / DEPTH` bytes; `run` is of one weight.
    unsafe fn decode(run: &Run<'_>, out: *mut u8);

    /// The sum of the products of two lists of words.
    ///
    /// # Safety
    /// The machine has the path; both have `words` readable words.
    unsafe fn dot(words: usize, a: *const u32, b: *const u32) -> f32;

    /// Brings values of one or two rows of a weight into lanes: for `DEPTH == 1` a copy of `first`, for `DEPTH == 2`
    /// the pairs of both. `out` is `LANES` words, the others hold as many values.
    ///
    /// # Safety
    /// The machine has the path.
    #[inline(always)]
    unsafe fn weave(first: &[u32], second: &[u32], out: &mut [u32]) {
        debug_assert!(Self::DEPTH == 1 && second.len() == out.len());
        // The number is known when this is compiled: a few moves, not a call.
        out[..Self::LANES].copy_from_slice(&first[..Self::LANES]);
    }

    /// Decodes the same columns of two rows of a weight and brings them into panels of `LANES` words, which are `stride`
    /// words apart: [`Self::decode`] of both, then [`Self::weave`]. Gives false, having done nothing, when it does not take
    /// such runs.
    ///
    /// # Safety
    /// The machine has the path. `out` has room for the panels; the runs are of one weight and of one length.
    #[inline(always)]
    unsafe fn decode_pair(first: &Run<'_>, second: &Run<'_>, out: *mut u32, stride: usize) -> bool {
        let _ = (first, second, out, stride);
        false
    }
}

/// How one path looks codes up in a block's sixteen values.
pub trait Decoder {
    /// A decoded value.
    type Value: Copy;
    /// The codebook, as [`Self::table`] wants it.
    type Codebook: Copy;
    /// A block's sixteen values, ready for look-ups.
    type Table: Copy;

    /// Once for all blocks of a run.
    ///
    /// # Safety
    /// The machine has the path.
    unsafe fn codebook(values: &[f32; 16]) -> Self::Codebook;

    /// The values of a block with this scale.
    ///
    /// # Safety
    /// The machine has the path.
    unsafe fn table(codebook: Self::Codebook, scale: f32) -> Self::Table;

    /// Writes the values of the [`STEP`] codes in 16 bytes.
    ///
    /// # Safety
    /// The machine has the path; 16 readable bytes at `codes`, `STEP` writable values at `out`.
    unsafe fn look_up(table: Self::Table, codes: *const u8, out: *mut Self::Value);
}

/// Decodes a run, block by block. Inlined into a function of each path that enables its instructions.
///
/// # Safety
/// As [`Kernel::decode`], with the values of `D`.
#[inline(always)]
pub unsafe fn decode<D: Decoder>(run: &Run<'_>, out: *mut D::Value) {
    let (mut at, end, mut out) = (run.start, run.start + run.len, out);
    let shift = run.blocksize.trailing_zeros();
    let first = at >> shift;
    // SAFETY: the caller's.
    let codebook = unsafe { D::codebook(run.values) };
    if at.is_multiple_of(STEP) && end.is_multiple_of(STEP) {
        // The usual weight: nothing but whole steps.
        let mut codes = run.packed[at / 2..end / 2].as_ptr();
        let mut scales = run.scales.iter();
        while let Some(&scale) = scales.next()
            && at < end
        {
            let stop = (((at >> shift) + 1) << shift).min(end);
            // SAFETY: `codes` has the bytes of values up to `end`, and `out` has room for them.
            unsafe {
                let table = D::table(codebook, scale);
                for _ in 0..(stop - at) / STEP {
                    D::look_up(table, codes, out);
                    (codes, out) = (codes.add(STEP / 2), out.add(STEP));
                }
            }
            at = stop;
        }
        return;
    }
    while at < end {
        let block = at >> shift;
        let stop = ((block + 1) << shift).min(end);
        // SAFETY: `codes` reads bytes of values `at..stop` only, and `out` has room for them.
        unsafe {
            let table = D::table(codebook, run.scales[block - first]);
            if at % 2 == 1 {
                // In the middle of a byte: the one before goes to waste.
                part::<D>(run.packed, table, at, 1, out);
                (at, out) = (at + 1, out.add(1));
            }
            while at + STEP <= stop {
                debug_assert!(at / 2 + STEP / 2 <= run.packed.len());
                D::look_up(table, run.packed.as_ptr().add(at / 2), out);
                (at, out) = (at + STEP, out.add(STEP));
            }
            if at < stop {
                part::<D>(run.packed, table, at, stop - at, out);
                (at, out) = (stop, out.add(stop - at));
            }
        }
    }
}

/// Decodes fewer than [`STEP`] values, by way of buffers that have room for `STEP`.
#[inline]
unsafe fn part<D: Decoder>(packed: &[u8], table: D::Table, at: usize, len: usize, out: *mut D::Value) {
    let mut codes = [0u8; STEP / 2];
    let bytes = &packed[at / 2..(at + len).div_ceil(2)];
    codes[..bytes.len()].copy_from_slice(bytes);
    let mut values = [std::mem::MaybeUninit::<D::Value>::uninit(); STEP];
    // SAFETY: the buffers hold `STEP` values, and `out` has room for `len`, which are fewer (with the odd one).
    unsafe {
        D::look_up(table, codes.as_ptr(), values.as_mut_ptr().cast());
        std::ptr::copy_nonoverlapping(values.as_ptr().cast::<D::Value>().add(at % 2), out, len);
    }
}
