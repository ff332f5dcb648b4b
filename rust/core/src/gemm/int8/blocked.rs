//! Products of codes with many rows of activations: a tile of the weight is laid out in a buffer that stays in the
//! second-level cache and multiplied with all rows of a block of activations.

use std::ops::Range;

use super::codes::Codes;
use super::finish::Finish;
use super::kernel::{CHUNK, Kernel, Sums, words};
use crate::gemm::blocked::kernel::Rows;
use crate::gemm::out::MOST_COLS;
use crate::gemm::scratch::{Scratch, SharedWords, Words};
use crate::gemm::weight::prefetch;
use crate::gemm::workers::Workers;

/// Rows of activations that share a tile.
const BLOCK_ROWS: usize = 512;

/// Rows of a tile that are asked for before they are needed.
const ROWS_AHEAD: usize = 16;

/// Words between rows of a tile or of sums, beyond what is in them: a cache line, so that rows fall into different sets of
/// the cache.
const ROW_GAP: usize = 16;

/// Chunks of a tile.
const TILE_CHUNKS: usize = 4;

/// Words between rows of a tile.
const TILE_STRIDE: usize = TILE_CHUNKS * CHUNK + ROW_GAP;

/// Rows of activations whose sums are brought into the order of the result together.
const SQUARE: usize = 16;

/// `a[m, k] · b[n, k]ᵀ`. Neither is empty. Lanes are rows of `a`.
pub fn forward<K: Kernel>(a: Codes<'_>, b: Codes<'_>, finish: &Finish<'_>, workers: Workers<'_>) {
    const { assert!(K::TILE_ROWS <= MOST_COLS && K::TILE_ROWS.is_multiple_of(K::ROWS)) }
    let (m, n, k) = (a.rows, b.rows, a.cols);
    let tile_rows = n.div_ceil(4 * workers.threads()).next_multiple_of(K::ROWS).min(K::TILE_ROWS);
    let all_words = k.div_ceil(K::DEPTH);
    let offsets = if K::OFFSET { a.offsets() } else { vec![0; m] };
    for block in (0..m).step_by(BLOCK_ROWS) {
        let block = block..m.min(block + BLOCK_ROWS);
        let panels = Panels::pack::<K>(a, block.clone(), workers);
        let lanes = panels.groups * K::LANES + ROW_GAP;
        workers.for_each(n.div_ceil(tile_rows), |task| {
            let rows = task * tile_rows..n.min((task + 1) * tile_rows);
            let padded = rows.len().next_multiple_of(K::ROW_STEP);
            Scratch::with(|scratch| {
                // SAFETY: the path is available.
                let _session = unsafe { K::session() };
                let tile = scratch.tile.at_least(K::TILE_ROWS * TILE_STRIDE);
                let sums: &mut [i32] = bytemuck::cast_slice_mut(scratch.sums.at_least(padded * lanes));
                for start in (0..all_words).step_by(TILE_CHUNKS * CHUNK) {
                    let span = start..all_words.min(start + TILE_CHUNKS * CHUNK);
                    let cols = span.start * K::DEPTH..k.min(span.end * K::DEPTH);
                    for (row, tile) in rows.clone().zip(tile.chunks_exact_mut(TILE_STRIDE)) {
                        if row + ROWS_AHEAD < n {
                            let ahead = &b.row(row + ROWS_AHEAD)[cols.clone()];
                            ahead.iter().step_by(64).for_each(|code| prefetch((&raw const *code).cast()));
                        }
                        // SAFETY: the path is available, and a row of the tile has room for the codes of its chunks.
                        unsafe { K::weight_words(&b.row(row)[cols.clone()], tile.as_mut_ptr()) }
                    }
                    for chunk in span.clone().step_by(CHUNK) {
                        let chunk = chunk..span.end.min(chunk + CHUNK);
                        for group in 0..panels.groups {
                            let panel = panels.panel(chunk.clone(), group, K::LANES);
                            for i in (0..padded).step_by(K::ROWS) {
                                let rows = Rows {
                                    words: &raw const tile[i * TILE_STRIDE + chunk.start - span.start],
                                    row_stride: TILE_STRIDE,
                                    word_stride: 1,
                                    count: K::ROWS.min(padded - i),
                                };
                                let at = &raw mut sums[i * lanes + group * K::LANES];
                                let sums = Sums { at, stride: lanes, first: chunk.start == 0 };
                                // SAFETY: the path is available; tile and sums have `padded` rows.
                                unsafe { K::product(chunk.len(), panel.as_ptr(), rows, sums) }
                            }
                        }
                    }
                }
                finish.gather(b, rows.clone(), &mut scratch.scales[0]);
                let (mut square, mut outliers) = ([[0i32; MOST_COLS]; SQUARE], [0.0; MOST_COLS]);
                for first in block.clone().step_by(SQUARE) {
                    for (c, sums) in sums.chunks_exact(lanes).take(rows.len()).enumerate() {
                        let sums = &sums[first - block.start..];
                        square.iter_mut().zip(sums).for_each(|(values, sum)| values[c] = *sum);
                    }
                    for (row, values) in (first..block.end).zip(&mut square) {
                        let values = &mut values[..rows.len()];
                        let outliers = finish.outlier_sums(row, &scratch.scales[0], &mut outliers);
                        // SAFETY: this task alone has these rows of the weight, which are columns of the result.
                        unsafe { finish.store(row, rows.start, values, offsets[row], outliers) }
                    }
                }
            });
        });
    }
}

/// Rows of activations in groups of lanes: `[chunk][group][word][lane]`, zeros behind the last.
struct Panels {
    words: Words,
    groups: usize,
}

impl Panels {
    fn pack<K: Kernel>(a: Codes<'_>, rows: Range<usize>, workers: Workers<'_>) -> Self {
        let (groups, all_words) = (rows.len().div_ceil(K::LANES), a.cols.div_ceil(K::DEPTH));
        let mut packed = Words::zeroed(all_words * groups * K::LANES);
        let shared = SharedWords::new(&mut packed);
        workers.for_each(all_words.div_ceil(CHUNK) * groups, |task| {
            let (start, group) = (task / groups * CHUNK, task % groups);
            let len = CHUNK.min(all_words - start);
            // SAFETY: every chunk and group has its own words.
            let panel = unsafe { shared.part((start * groups + group * len) * K::LANES, len * K::LANES) };
            let cols = start * K::DEPTH..a.cols.min((start + len) * K::DEPTH);
            let first = rows.start + group * K::LANES;
            let mut row_words = [0u32; CHUNK];
            for i in 0..K::LANES.min(rows.end - first) {
                let row_words = &mut row_words[..len];
                words(K::DEPTH, &a.row(first + i)[cols.clone()], row_words);
                for (to, word) in panel.chunks_exact_mut(K::LANES).zip(row_words) {
                    to[i] = *word;
                }
            }
        });
        Self { words: packed, groups }
    }

    /// One chunk of one group: `[words][lanes]`.
    fn panel(&self, chunk: Range<usize>, group: usize, lanes: usize) -> &[u32] {
        &self.words.as_slice()[(chunk.start * self.groups + group * chunk.len()) * lanes..][..chunk.len() * lanes]
    }
}
