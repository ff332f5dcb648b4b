//! Rounds activations to words and lays them out for the block product.

use std::ops::Range;

use super::kernel::{CHUNK, Kernel};
use crate::gemm::matrix::Matrix;
use crate::gemm::scratch::{SharedWords, Words};
use crate::gemm::workers::Workers;

/// Rows of a matrix in groups of `width`: `[chunk][group][word][width]`.
pub struct Panels {
    words: Words,
    width: usize,
    groups: usize,
}

/// Words `chunk` of all rows.
#[derive(Clone, Copy)]
pub struct Chunk {
    /// The first word.
    pub start: usize,
    /// How many.
    pub len: usize,
}

impl Chunk {
    /// The values of the chunk, of `cols` in all.
    pub fn values<K: Kernel>(self, cols: usize) -> Range<usize> {
        self.start * K::DEPTH..((self.start + self.len) * K::DEPTH).min(cols)
    }

    /// All chunks of `cols` values.
    pub fn all<K: Kernel>(cols: usize) -> impl Iterator<Item = Self> {
        let words = cols.div_ceil(K::DEPTH);
        (0..words).step_by(CHUNK).map(move |start| Self { start, len: CHUNK.min(words - start) })
    }
}

impl Panels {
    /// Packs `rows` of `matrix`. Behind them are rows of zeros, up to a multiple of `multiple`, which is one of `width`.
    pub fn pack<K: Kernel>(
        matrix: Matrix<'_>,
        rows: Range<usize>,
        width: usize,
        multiple: usize,
        workers: Workers<'_>,
    ) -> Self {
        let groups = rows.len().next_multiple_of(multiple) / width;
        let mut words = Words::zeroed(matrix.cols.div_ceil(K::DEPTH) * groups * width);
        let chunks: Vec<Chunk> = Chunk::all::<K>(matrix.cols).collect();
        let shared = SharedWords::new(&mut words);
        workers.for_each(chunks.len() * groups, |task| {
            let (chunk, group) = (chunks[task / groups], task % groups);
            // SAFETY: every chunk and group has its own words.
            let panel = unsafe { shared.part((chunk.start * groups + group * chunk.len) * width, chunk.len * width) };
            let first = (rows.start + group * width).min(rows.end);
            let mut row_words = [0u32; CHUNK];
            for i in 0..width.min(rows.end - first) {
                let row_words = &mut row_words[..chunk.len];
                matrix.words(K::DEPTH, first + i, chunk.values::<K>(matrix.cols), row_words);
                for (to, word) in panel.chunks_exact_mut(width).zip(row_words) {
                    to[i] = *word;
                }
            }
        });
        Self { words, width, groups }
    }

    /// How many groups of rows.
    pub fn groups(&self) -> usize {
        self.groups
    }

    /// The first word of a chunk of a group, and of all groups behind it.
    pub fn words_from(&self, chunk: Chunk, group: usize) -> *const u32 {
        self.words.as_slice()[(chunk.start * self.groups + group * chunk.len) * self.width..].as_ptr()
    }

    /// One chunk of one group: `[chunk.len][width]`.
    pub fn panel(&self, chunk: Chunk, group: usize) -> &[u32] {
        &self.words.as_slice()[(chunk.start * self.groups + group * chunk.len) * self.width..][..chunk.len * self.width]
    }
}
