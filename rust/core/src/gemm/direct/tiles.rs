//! The product of few rows by tiles. Some rows of the weight are decoded, a cache line of codes of each at a time, into a
//! buffer that stays in the first-level cache, and multiplied from there; their sums stay in tiles for all of K.
//!
//! This takes the weights that the other direct products take. As there, a line of codes is shifted by 0, 4, 8 and 12 bits, which brings
//! each nibble of its 16-bit words to the low end in turn; the activations are laid out in that order.

use super::{GROUP, ORDER};
use crate::gemm::matrix::Matrix;
use crate::gemm::out::Out;
use crate::gemm::scratch::{Scratch, SharedWords, Words};
use crate::gemm::tiles::{SIDE, Tiles};
use crate::gemm::weight::Weight;
use crate::gemm::workers::Workers;

/// Rows of the weight in a task: two tiles.
pub const ROWS: usize = 2 * SIDE;

/// Steps of 16 words in a group: one for each nibble of a 16-bit word of codes.
pub const STEPS: usize = 4;

/// Words of a decoded group.
const GROUP_WORDS: usize = STEPS * ROWS * SIDE;

/// The two values of a group of 128 that make word `word` of step `step`.
pub fn values_at(step: usize, word: usize) -> [usize; 2] {
    [8 * word + ORDER[step], 8 * word + 4 + ORDER[step]]
}

/// A group of some rows of a weight.
pub struct Group<'a> {
    /// The codebook.
    pub values: &'static [f32; 16],
    /// The codes of the first row.
    pub codes: *const u8,
    /// Values from one row to the next.
    pub cols: usize,
    /// How many rows.
    pub rows: usize,
    /// Whether all 128 values are there; else it is the first 64, and all others are decoded to zeros.
    pub whole: bool,
    /// Scales of blocks from some place on.
    pub scales: &'a [f32],
    /// The group's first value, counted from there.
    pub start: usize,
    /// The base-2 logarithm of the block size.
    pub shift: u32,
    /// Bytes from codes to those that are asked for meanwhile.
    pub ahead: usize,
    /// `[STEPS][ROWS][SIDE]`, words as [`values_at`] says.
    pub out: *mut u32,
}

impl Group<'_> {
    /// The codes of a row.
    ///
    /// # Safety
    /// There is that row.
    #[inline(always)]
    pub unsafe fn codes_of(&self, row: usize) -> *const u8 {
        // SAFETY: the caller's.
        unsafe { self.codes.add(row * self.cols / 2) }
    }

    /// The scales of both halves of a row; of one that is not there, zero.
    #[inline(always)]
    pub fn scales_of(&self, row: usize) -> [f32; 2] {
        let at = self.start + row * self.cols;
        let second = if self.whole { self.scales[(at + GROUP / 2) >> self.shift] } else { 0.0 };
        [self.scales[at >> self.shift], second]
    }
}

/// A path that decodes groups.
pub trait DecodesGroups {
    /// # Safety
    /// The machine has the path; all of the group is readable, and its output writable.
    unsafe fn decode_group(group: &Group<'_>);
}

/// `out[m, n] = x[m, k] · weight[n, k]ᵀ` for at most 16 rows of `x`.
pub fn forward<K: DecodesGroups, T: Tiles>(
    x: Matrix<'_>,
    m: usize,
    weight: &Weight<'_>,
    out: &Out<'_>,
    workers: Workers<'_>,
) {
    let (wanted, k) = (&out.wanted, weight.cols());
    let lanes = lay_out(x, m, workers);
    let lanes = lanes.as_slice();
    workers.for_each(wanted.len().div_ceil(ROWS), |task| {
        let rows = wanted.start + task * ROWS..wanted.end.min(wanted.start + (task + 1) * ROWS);
        Scratch::with(|scratch| {
            let groups = scratch.tile.at_least(2 * GROUP_WORDS);
            let sums: &mut [f32] = bytemuck::cast_slice_mut(scratch.sums.at_least(ROWS * SIDE));
            let blocks = weight.blocks_of(rows.start * k..rows.end * k);
            let origin = blocks.start * weight.blocksize();
            let scales = weight.scales(blocks, &mut scratch.scales[0]);
            // SAFETY: the path is available; a group's rows, codes and scales are as many as `k` says, and tiles of rows that
            // are not there hold what was in the buffer before: their sums are not stored.
            unsafe {
                let _session = T::session();
                T::zero::<0>();
                T::zero::<1>();
                for (group, lanes) in lanes.chunks_exact(STEPS * SIDE * SIDE).enumerate() {
                    // Two in turn: one is multiplied while the other is written.
                    let decoded = &mut groups[group % 2 * GROUP_WORDS..][..GROUP_WORDS];
                    let first = rows.start * k + group * GROUP;
                    K::decode_group(&Group {
                        values: weight.values(),
                        codes: &raw const weight.packed()[first / 2],
                        cols: k,
                        rows: rows.len(),
                        whole: (group + 1) * GROUP <= k,
                        scales,
                        start: first - origin,
                        shift: weight.blocksize().trailing_zeros(),
                        ahead: ROWS * k / 2,
                        out: decoded.as_mut_ptr(),
                    });
                    for (decoded, lanes) in decoded.chunks_exact(ROWS * SIDE).zip(lanes.chunks_exact(SIDE * SIDE)) {
                        T::load::<6>(lanes.as_ptr(), SIDE);
                        T::load::<4>(decoded.as_ptr(), SIDE);
                        T::multiply::<0, 4, 6>();
                        T::load::<5>(decoded[SIDE * SIDE..].as_ptr(), SIDE);
                        T::multiply::<1, 5, 6>();
                    }
                }
                T::store::<0>(sums.as_mut_ptr(), SIDE);
                T::store::<1>(sums[SIDE * SIDE..].as_mut_ptr(), SIDE);
            }
            // SAFETY: this task alone has these rows of the weight, which are columns of the result.
            unsafe { out.store_transposed(sums, SIDE, rows.start, rows.len(), 0..m) }
        });
    });
}

/// All rows of `x` as `[group][STEPS][word][lane]`; what is missing is zero.
fn lay_out(x: Matrix<'_>, m: usize, workers: Workers<'_>) -> Words {
    let groups = x.cols.div_ceil(GROUP);
    let mut words = Words::zeroed(groups * STEPS * SIDE * SIDE);
    let shared = SharedWords::new(&mut words);
    workers.for_each(groups, |group| {
        // SAFETY: every group has its own words.
        let words = unsafe { shared.part(group * STEPS * SIDE * SIDE, STEPS * SIDE * SIDE) };
        let cols = group * GROUP..x.cols.min((group + 1) * GROUP);
        let mut values = [0u16; GROUP];
        for lane in 0..m {
            x.floats.to_bf16(lane * x.cols + cols.start..lane * x.cols + cols.end, &mut values[..cols.len()]);
            for (i, word) in words.chunks_exact_mut(SIDE).enumerate() {
                let [low, high] = values_at(i / SIDE, i % SIDE).map(|at| u32::from(values[at]));
                word[lane] = low | high << 16;
            }
        }
    });
    words
}
