//! Products with few rows: codes are looked up into registers and multiplied there. The weight is decoded nowhere, and
//! a scale is applied once to the sum of its block.
//!
//! This takes rows that begin with a block or a half of one, in steps of 64 values: `k` a multiple of 64 and blocks of
//! at least 64. 64 packed bytes at a time are a *group* of 128 values. A register of them is shifted by 0, 4, 8, … bits,
//! which brings each nibble of its words (of 16 or 32 bits) to the low end in turn, where the look-up wants it; the
//! activations are laid out in that order instead of the weight's.

pub mod tiles;

use std::ops::Range;

use super::matrix::Matrix;
use super::out::Out;
use super::scratch::{Scratch, Words};
use super::weight::{Weight, lead_of};
use super::workers::Workers;

/// Values of a group.
pub const GROUP: usize = 128;

/// Which of a 16-bit word's four values its nibbles are, lowest nibble first.
pub const ORDER: [usize; 4] = [1, 0, 3, 2];

/// Bytes of activations that stay in the first-level cache: of longer rows, a part is multiplied with a task's rows of
/// the weight before the next part is.
const PART: usize = 32 << 10;

/// Rows of the weight in a task, at most.
const TASK: usize = 32;

/// Bytes of codes in a task, at most: those of two tasks are in the second-level cache.
const TASK_BYTES: usize = 256 << 10;

/// Rows of the weight that are multiplied together, at most.
pub const ROWS: usize = 4;

/// Words of the sums of one row of the weight: a register of 16 for each lane.
const SUMS: usize = LANES * 16;

/// Columns that a stripe is made of: they are in one block.
pub const PIECE: usize = GROUP / 2;

/// Rows of a stripe, at most: while one is multiplied, the codes of the next are on their way.
pub const STRIPE_ROWS: usize = 16;

/// Columns of a stripe, at most: their sums stay in the first-level cache.
const STRIPE_COLS: usize = 1024;

/// Rows of activations that are multiplied with the same look-ups.
pub const LANES: usize = 4;

/// The products of a band of the weight with some rows of activations.
pub type BandProduct = unsafe fn(&Band) -> [[f32; LANES]; ROWS];

/// A path's direct product.
#[derive(Clone, Copy)]
pub struct Direct {
    /// Up to so many rows of activations are multiplied in this way.
    pub rows: usize,
    /// Words of a group of activations.
    pub group_words: usize,
    /// Lays one row of activations out: `[groups][group_words]`, what is missing in the last is zero.
    ///
    /// # Safety
    /// The machine has the path.
    pub prepare: unsafe fn(Matrix<'_>, row: usize, out: &mut [u32]),
    /// By the number of rows of activations, 1 to [`LANES`]: how many rows of the weight a band has, at most [`ROWS`], and the
    /// function that multiplies it with them.
    ///
    /// # Safety
    /// The machine has the path; all of `Band` is readable, and its sums writable.
    pub bands: [(usize, BandProduct); LANES],
    /// Up to so many rows of gradients are multiplied by [`Direct::stripe`].
    pub backward_rows: usize,
    /// Adds the products of one stripe of the weight with 1 to [`LANES`] rows of gradients to the sums, by the number of
    /// these.
    ///
    /// # Safety
    /// The machine has the path; all of `Stripe` is readable, and its sums writable.
    pub stripe: [unsafe fn(&Stripe); LANES],
}

/// A band, which is a few rows of a weight, and what it is multiplied with.
pub struct Band {
    /// The packed rows. Where the weight has fewer, the last one again.
    pub codes: [*const u8; ROWS],
    /// The scales of the rows' halves of groups.
    pub scales: [*const f32; ROWS],
    /// The codebook.
    pub values: &'static [f32; 16],
    /// Whole groups in a row.
    pub groups: usize,
    /// The whole groups that are multiplied now.
    pub part: Range<usize>,
    /// Whether half a group follows, now.
    pub half: bool,
    /// Where prefetching begins: one cache line for each row and group of this part. It may lie outside of the weight.
    pub ahead: *const u8,
    /// `[rows][lanes]`: sums of the parts before this one, unless it is the first; of this one too when it is not the last.
    pub sums: *mut [f32; 16],
    /// Whether this is the first part.
    pub first: bool,
    /// Whether this is the last part. Only then is the result worth something.
    pub last: bool,
    /// Prepared activations.
    pub x: *const u32,
    /// Words between rows of activations.
    pub x_stride: usize,
}

/// Some rows and columns of a weight, and what they are multiplied with.
pub struct Stripe {
    /// The packed values of the first row.
    pub codes: *const u8,
    /// Bytes from one row to the next.
    pub stride: usize,
    /// Rows, at most [`STRIPE_ROWS`].
    pub rows: usize,
    /// Columns, in pieces of [`PIECE`].
    pub pieces: usize,
    /// The codebook.
    pub values: &'static [f32; 16],
    /// Gradient times scale: `[rows of gradients][pieces][STRIPE_ROWS]`.
    pub factors: *const f32,
    /// `[rows of gradients][pieces][PIECE]`, in the order of [`value_at`].
    pub sums: *mut f32,
}

/// Whether the direct product takes this weight.
pub fn takes(weight: &Weight<'_>) -> bool {
    weight.cols().is_multiple_of(GROUP / 2) && weight.blocksize() >= GROUP / 2 && weight.cols() > 0
}

/// Which of the 64 values of 32 packed bytes comes at `place`, where bytes are looked up in registers of 32, their high
/// nibbles first, and four neighbours from each half of such a register share one of eight values.
pub fn value_at(place: usize) -> usize {
    let (nibble, register, lane) = (place / 32, place / 8 % 4, place % 8);
    2 * (lane / 4 * 16 + register * 4 + lane % 4) + nibble
}

/// `out[m, n] = x[m, k] · weight[n, k]ᵀ`.
pub fn forward(direct: Direct, x: Matrix<'_>, m: usize, weight: &Weight<'_>, out: &Out<'_>, workers: Workers<'_>) {
    let (wanted, n, k) = (&out.wanted, out.wanted.len(), weight.cols());
    let stride = k.div_ceil(GROUP) * direct.group_words;
    let mut prepared = Words::zeroed(m * stride);
    for (row, words) in prepared.as_mut_slice().chunks_exact_mut(stride).take(m).enumerate() {
        // SAFETY: the path is available.
        unsafe { (direct.prepare)(x, row, words) }
    }
    let prepared = prepared.as_slice();
    let most_rows = (TASK_BYTES / (k / 2) / ROWS * ROWS).clamp(ROWS, TASK);
    let task_rows = n.div_ceil(8 * workers.threads()).next_multiple_of(16).min(most_rows);
    workers.for_each(n.div_ceil(task_rows), |task| {
        let rows = wanted.start + task * task_rows..wanted.end.min(wanted.start + (task + 1) * task_rows);
        Scratch::with(|scratch| {
            let results: &mut [f32] = bytemuck::cast_slice_mut(scratch.tile.at_least(m * TASK));
            let sums = scratch.sums.at_least(TASK * SUMS);
            let scales = weight.scales_of_pieces(rows.start * k..rows.end * k, PIECE, &mut scratch.scales);
            weight.prefetch_scales(rows.end * k..(rows.end + task_rows).min(weight.rows()) * k);
            for first_lane in (0..m).step_by(LANES) {
                let count = LANES.min(m - first_lane);
                let (band_rows, product) = direct.bands[count - 1];
                let groups = k / GROUP;
                let part = PART / (count * direct.group_words * size_of::<u32>());
                // A task that is multiplied part by part is not read in order: the next task is prefetched meanwhile.
                let lead = if groups > part { rows.len() * k / 2 } else { lead_of((band_rows - 1) * k / 2) };
                let mut ahead = (&raw const weight.packed()[rows.start * k / 2]).wrapping_add(lead);
                for start in (0..groups.max(1)).step_by(part) {
                    let end = groups.min(start + part);
                    for (row, sums) in rows.clone().step_by(band_rows).zip(sums.chunks_exact_mut(band_rows * SUMS)) {
                        let all = std::array::from_fn(|i| (row + i.min(band_rows - 1)).min(rows.end - 1));
                        let band = Band {
                            codes: all.map(|row| &raw const weight.packed()[row * k / 2]),
                            scales: all.map(|row| &raw const scales[(row - rows.start) * (k / PIECE)]),
                            values: weight.values(),
                            groups,
                            part: start..end,
                            half: end == groups && !k.is_multiple_of(GROUP),
                            ahead,
                            sums: sums.as_mut_ptr().cast(),
                            first: start == 0,
                            last: end == groups,
                            x: &raw const prepared[first_lane * stride],
                            x_stride: stride,
                        };
                        // SAFETY: the path is available; rows, scales and activations are as long as `k` says.
                        let result = unsafe { product(&band) };
                        ahead = ahead
                            .wrapping_add(band_rows * ((end - start) * GROUP / 2 + usize::from(band.half) * GROUP / 4));
                        if !band.last {
                            continue;
                        }
                        for (row, result) in (row..rows.end).zip(result).take(band_rows) {
                            for (lane, result) in result.into_iter().enumerate().take(count) {
                                results[(first_lane + lane) * TASK + row - rows.start] = result;
                            }
                        }
                    }
                }
            }
            for (row, results) in results.chunks_exact_mut(TASK).enumerate() {
                // SAFETY: this task alone has these rows of the weight, which are columns of the result.
                unsafe { out.store(row, rows.start, &mut results[..rows.len()]) }
            }
        });
    });
}

/// `out[m, k] = grad[m, n] · weight[n, k]`. A sum is made of all rows of the weight in order, whoever makes it.
pub fn backward(direct: Direct, grad: Matrix<'_>, m: usize, weight: &Weight<'_>, out: &Out<'_>, workers: Workers<'_>) {
    let (n, k) = (weight.rows(), weight.cols());
    let mut gradients = Words::zeroed(m * n);
    let gradients: &mut [f32] = bytemuck::cast_slice_mut(gradients.as_mut_slice());
    grad.floats.to_f32(0..m * n, grad.compute, &mut gradients[..m * n]);
    let gradients = &*gradients;
    let stripe_cols = k.div_ceil(2 * workers.threads()).next_multiple_of(PIECE).min(STRIPE_COLS);
    workers.for_each(k.div_ceil(stripe_cols), |task| {
        let cols = task * stripe_cols..k.min((task + 1) * stripe_cols);
        let pieces = cols.len() / PIECE;
        Scratch::with(|scratch| {
            let sums: &mut [f32] = bytemuck::cast_slice_mut(scratch.sums.at_least(LANES * STRIPE_COLS));
            let factors: &mut [f32] =
                bytemuck::cast_slice_mut(scratch.tile.at_least(LANES * STRIPE_COLS / PIECE * STRIPE_ROWS));
            for first_lane in (0..m).step_by(LANES) {
                let count = LANES.min(m - first_lane);
                let sums = &mut sums[..count * cols.len()];
                sums.fill(0.0);
                for start in (0..n).step_by(STRIPE_ROWS) {
                    let rows = start..n.min(start + STRIPE_ROWS);
                    weight.prefetch(rows.end..rows.end + STRIPE_ROWS, cols.clone());
                    for row in rows.clone() {
                        let first = row * k + cols.start;
                        let blocks = weight.blocks_of(first..row * k + cols.end);
                        let origin = blocks.start * weight.blocksize();
                        let shift = weight.blocksize().trailing_zeros();
                        let scales = weight.scales(blocks, &mut scratch.scales[0]);
                        for lane in 0..count {
                            let gradient = gradients[(first_lane + lane) * n + row];
                            let factors = &mut factors[lane * pieces * STRIPE_ROWS + row - start..];
                            for (piece, factor) in factors.iter_mut().step_by(STRIPE_ROWS).take(pieces).enumerate() {
                                *factor = gradient * scales[(first - origin + piece * PIECE) >> shift];
                            }
                        }
                    }
                    let stripe = Stripe {
                        codes: &raw const weight.packed()[(start * k + cols.start) / 2],
                        stride: k / 2,
                        rows: rows.len(),
                        pieces,
                        values: weight.values(),
                        factors: factors.as_ptr(),
                        sums: sums.as_mut_ptr(),
                    };
                    // SAFETY: the path is available; rows, factors and sums are as long as `Stripe` says.
                    unsafe { (direct.stripe[count - 1])(&stripe) }
                }
                let mut natural = [0.0; STRIPE_COLS];
                for (lane, sums) in sums.chunks_exact(cols.len()).enumerate() {
                    for (natural, sums) in natural.chunks_exact_mut(PIECE).zip(sums.chunks_exact(PIECE)) {
                        sums.iter().enumerate().for_each(|(place, sum)| natural[value_at(place)] = *sum);
                    }
                    // SAFETY: this task alone has these columns.
                    unsafe { out.store(first_lane + lane, cols.start, &mut natural[..cols.len()]) }
                }
            }
        });
    });
}
