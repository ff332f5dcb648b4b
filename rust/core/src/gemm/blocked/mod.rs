//! Products with many rows: a tile of the weight is decoded into a buffer that stays in the second-level cache and
//! multiplied with all rows of a block of activations.
//!
//! Every value of a result is the sum, over chunks of the summed dimension in order, of what one block product gives;
//! no thread and no size but that of the chunk has a part in it.

pub mod kernel;
mod pack;
pub mod scalar;
pub mod source;
pub mod tiled;

use self::kernel::{CHUNK, Kernel, Rows, Sums};
use self::pack::{Chunk, Panels};
use self::source::Source;
use super::matrix::Matrix;
use super::out::{MOST_COLS, Out};
use super::scratch::Scratch;
use super::weight::Weight;
use super::workers::Workers;

/// Rows of activations that share a decoded tile.
const FORWARD_ROWS: usize = 512;

/// Rows of gradients that share a decoded tile.
const BACKWARD_ROWS: usize = 256;

/// Columns of a backward tile at most: a multiple of every `Kernel::LANES`.
const TILE_COLS: usize = 512;

/// Words from one panel of a backward tile to the next, beyond those of the panel: a cache line, so that the panels' words
/// of one row fall into different sets of the cache.
const PANEL_GAP: usize = 16;

/// Rows of a tile that are asked for before they are needed.
const ROWS_AHEAD: usize = 16;

/// Words between rows of a tile or of sums, beyond what is in them: a cache line, so that rows fall into different sets of
/// the cache.
const ROW_GAP: usize = 16;

/// Chunks of a forward tile: a kibibyte of codes in a row. Memory is slow to give less from each of many places.
const TILE_CHUNKS: usize = 4;

/// Words between rows of a forward tile.
const TILE_STRIDE: usize = TILE_CHUNKS * CHUNK + ROW_GAP;

/// `out[m, n] = x[m, k] · weight[n, k]ᵀ`. Lanes are rows of `x`.
pub fn forward<K: Kernel>(x: Matrix<'_>, m: usize, weight: &Weight<'_>, out: &Out<'_>, workers: Workers<'_>) {
    const { assert!(K::TILE_ROWS <= MOST_COLS) }
    let (wanted, n, k) = (&out.wanted, out.wanted.len(), weight.cols());
    let tile_rows = n.div_ceil(4 * workers.threads()).next_multiple_of(K::ROWS).min(K::TILE_ROWS);
    let chunks: Vec<Chunk> = Chunk::all::<K>(k).collect();
    for block in (0..m).step_by(FORWARD_ROWS) {
        let block = block..m.min(block + FORWARD_ROWS);
        let panels = Panels::pack::<K>(x, block.clone(), K::LANES, K::LANES, workers);
        let lanes = panels.groups() * K::LANES + ROW_GAP;
        workers.for_each(n.div_ceil(tile_rows), |task| {
            let rows = wanted.start + task * tile_rows..wanted.end.min(wanted.start + (task + 1) * tile_rows);
            let padded = rows.len().next_multiple_of(K::ROW_STEP);
            Scratch::with(|scratch| {
                // SAFETY: the path is available.
                let _session = unsafe { K::session() };
                let tile = scratch.tile.at_least(K::TILE_ROWS * TILE_STRIDE);
                let sums = bytemuck::cast_slice_mut(scratch.sums.at_least(padded * lanes));
                tile[rows.len() * TILE_STRIDE..padded * TILE_STRIDE].fill(0);
                for span in chunks.chunks(TILE_CHUNKS) {
                    let words = span[0].start..span[span.len() - 1].start + span[span.len() - 1].len;
                    let cols = Chunk { start: words.start, len: words.len() }.values::<K>(k);
                    for (row, tile) in rows.clone().zip(tile.chunks_exact_mut(TILE_STRIDE)) {
                        weight.prefetch(row + ROWS_AHEAD..row + ROWS_AHEAD + 1, cols.clone());
                        tile[words.len() - 1] = 0; // for a value without a partner
                        let run = weight.run(row, cols.clone(), &mut scratch.scales[0]);
                        // SAFETY: the path is available, and a row of the tile has room for the values of its chunks.
                        unsafe { K::decode(&run, tile.as_mut_ptr().cast()) }
                    }
                    for &chunk in span {
                        for group in 0..panels.groups() {
                            let panel = panels.panel(chunk, group);
                            for i in (0..padded).step_by(K::ROWS) {
                                let rows = Rows {
                                    words: &raw const tile[i * TILE_STRIDE + chunk.start - words.start],
                                    row_stride: TILE_STRIDE,
                                    word_stride: 1,
                                    count: K::ROWS.min(padded - i),
                                };
                                let at = &raw mut sums[i * lanes + group * K::LANES];
                                let sums = Sums { at, stride: lanes, first: chunk.start == 0 };
                                // SAFETY: the path is available; tile and sums have `padded` rows.
                                unsafe { K::product(chunk.len, panel.as_ptr(), rows, sums) }
                            }
                        }
                    }
                }
                // SAFETY: this task alone has these rows of the weight, which are columns of the result.
                unsafe { out.store_transposed(sums, lanes, rows.start, rows.len(), block.clone()) }
            });
        });
    }
}

/// `out[m, k] = grad[m, n] · weight[n, k]`. Lanes are columns of the weight.
pub fn backward<K: Kernel>(grad: Matrix<'_>, m: usize, weight: &impl Source, out: &Out<'_>, workers: Workers<'_>) {
    let (n, k) = (weight.rows(), weight.cols());
    let tile_cols = k.div_ceil(4 * workers.threads()).next_multiple_of(K::LANES).min(TILE_COLS);
    for block in (0..m).step_by(BACKWARD_ROWS) {
        let block = block..m.min(block + BACKWARD_ROWS);
        let width = if K::WORDS_TOGETHER { 1 } else { K::ROWS };
        let panels = Panels::pack::<K>(grad, block.clone(), width, K::ROWS, workers);
        let groups = block.len().div_ceil(K::ROWS);
        workers.for_each(k.div_ceil(tile_cols), |task| {
            let cols = task * tile_cols..k.min((task + 1) * tile_cols);
            let padded = cols.len().next_multiple_of(K::LANES);
            let stride = padded + ROW_GAP;
            Scratch::with(|scratch| {
                // SAFETY: the path is available.
                let _session = unsafe { K::session() };
                let tile = scratch.tile.at_least(TILE_COLS / K::LANES * (CHUNK * K::LANES + PANEL_GAP));
                let sums: &mut [f32] = bytemuck::cast_slice_mut(scratch.sums.at_least(groups * K::ROWS * stride));
                for chunk in Chunk::all::<K>(n) {
                    decode_lanes::<K>(weight, chunk, cols.clone(), padded, tile, &mut scratch.scales);
                    for panel in 0..padded / K::LANES {
                        let lanes = &tile[panel * (chunk.len * K::LANES + PANEL_GAP)..][..chunk.len * K::LANES];
                        for group in 0..groups {
                            let rows = Rows {
                                words: panels.words_from(chunk, group * (K::ROWS / width)),
                                row_stride: if K::WORDS_TOGETHER { chunk.len } else { 1 },
                                word_stride: width,
                                count: K::ROWS.min(block.len() - group * K::ROWS),
                            };
                            let at = &raw mut sums[group * K::ROWS * stride + panel * K::LANES];
                            let sums = Sums { at, stride, first: chunk.start == 0 };
                            // SAFETY: the path is available; groups and sums have whole `K::ROWS` rows.
                            unsafe { K::product(chunk.len, lanes.as_ptr(), rows, sums) }
                        }
                    }
                }
                for (row, sums) in block.clone().zip(sums.chunks_exact_mut(stride)) {
                    // SAFETY: this task alone has these columns.
                    unsafe { out.store(row, cols.start, &mut sums[..cols.len()]) }
                }
            });
        });
    }
}

/// Decodes columns `cols` of the rows of a chunk as `[panel][word][LANES]`, with gaps between panels; lanes beyond the
/// columns are zeros.
fn decode_lanes<K: Kernel>(
    weight: &impl Source,
    chunk: Chunk,
    cols: std::ops::Range<usize>,
    padded: usize,
    tile: &mut [u32],
    scales: &mut [Vec<f32>; 2],
) {
    let mut decoded = [[0u32; TILE_COLS]; 2];
    let rows = chunk.values::<K>(weight.rows());
    for word in 0..chunk.len {
        let ahead = rows.start + word * K::DEPTH + ROWS_AHEAD;
        weight.prefetch(ahead..ahead + K::DEPTH, cols.clone());
        let first_row = rows.start + word * K::DEPTH;
        if K::DEPTH == 2 && first_row + 1 < rows.end && cols.len() == padded {
            let out = &raw mut tile[word * K::LANES];
            let stride = chunk.len * K::LANES + PANEL_GAP;
            // SAFETY: the path is available, and each panel has room for its lanes of a word.
            if unsafe { weight.decode_pair::<K>(first_row, cols.clone(), scales, out, stride) } {
                continue;
            }
        }
        for (i, decoded) in decoded.iter_mut().enumerate().take(K::DEPTH) {
            let row = first_row + i;
            if row < rows.end {
                let out = decoded.as_mut_ptr().cast();
                // SAFETY: the path is available, and a word has room for at least one value.
                unsafe { weight.decode::<K>(row, cols.clone(), &mut scales[0], out) }
            } else {
                decoded.fill(0); // a row without a partner
            }
        }
        for panel in 0..padded / K::LANES {
            let to = panel * (chunk.len * K::LANES + PANEL_GAP) + word * K::LANES;
            let to = &mut tile[to..to + K::LANES];
            let [first, second] = &decoded;
            let from = panel * K::LANES / K::DEPTH..(panel + 1) * K::LANES / K::DEPTH;
            // SAFETY: the path is available, and all three hold a panel's lanes.
            unsafe { K::weave(&first[from.clone()], &second[from], to) }
        }
    }
}

/// `out[m, n] = x[m, k] · weight[n, k]ᵀ` for few rows of `x`: each row of the weight is decoded, a chunk at a time, and
/// multiplied with all of `x`.
pub fn forward_few<K: Kernel>(x: Matrix<'_>, m: usize, weight: &Weight<'_>, out: &Out<'_>, workers: Workers<'_>) {
    let (wanted, n, k) = (&out.wanted, out.wanted.len(), weight.cols());
    let panels = Panels::pack::<K>(x, 0..m, 1, 1, workers); // groups of one row: rows as they are
    let tile_rows = n.div_ceil(8 * workers.threads()).next_multiple_of(16).min(K::TILE_ROWS);
    workers.for_each(n.div_ceil(tile_rows), |task| {
        let rows = wanted.start + task * tile_rows..wanted.end.min(wanted.start + (task + 1) * tile_rows);
        Scratch::with(|scratch| {
            let words = scratch.tile.at_least(CHUNK);
            let sums: &mut [f32] = bytemuck::cast_slice_mut(scratch.sums.at_least(m * rows.len()));
            sums.fill(0.0);
            for row in rows.clone() {
                for chunk in Chunk::all::<K>(k) {
                    words[chunk.len - 1] = 0; // for a value without a partner
                    let run = weight.run(row, chunk.values::<K>(k), &mut scratch.scales[0]);
                    // SAFETY: the path is available, and a chunk of words has room for its values.
                    unsafe { K::decode(&run, words.as_mut_ptr().cast()) }
                    for i in 0..m {
                        // SAFETY: the path is available, and both have the chunk's words.
                        let dot = unsafe { K::dot(chunk.len, words.as_ptr(), panels.panel(chunk, i).as_ptr()) };
                        sums[i * rows.len() + row - rows.start] += dot;
                    }
                }
            }
            for (i, sums) in sums.chunks_exact_mut(rows.len()).enumerate() {
                // SAFETY: this task alone has these rows of the weight, which are columns of the result.
                unsafe { out.store(i, rows.start, sums) }
            }
        });
    });
}
