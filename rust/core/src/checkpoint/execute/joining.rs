//! What an action that puts the matrices of experts together works on.

use crate::checkpoint::fused::Fusion;
use crate::checkpoint::matrix::strip_rows;
use crate::checkpoint::weights::Quantized;

/// What one action puts together.
pub(super) struct Joining<'a> {
    pub sources: &'a [Quantized],
    pub fusion: &'a Fusion,
    pub expert: usize,
    pub output: usize,
}

/// How many values of each matrix to take at a time: whole rows, and a whole number of blocks of each.
pub(super) fn join_step(fusion: &Fusion, sources: &[Quantized], size: usize) -> usize {
    let [_, columns] = fusion.matrix_shape();
    let blocks = sources.iter().map(|weight| match weight {
        Quantized::FourBit(weight) => weight.state.blocksize.get(),
        Quantized::Int8(_) => 1,
    });
    strip_rows(columns, size, blocks.max().unwrap_or(1)) * columns
}
