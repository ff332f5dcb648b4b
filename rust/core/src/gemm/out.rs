//! The result of a product, as its threads write it.

use std::ops::Range;

use super::floats::Shared;

/// Columns that are written together, at most.
pub(super) const MOST_COLS: usize = 64;

/// The result, and what is added to it.
pub(super) struct Out<'a> {
    pub values: Shared<'a>,
    /// Values in a row.
    pub cols: usize,
    /// One float32 per column of the product.
    pub bias: Option<&'a [f32]>,
    /// The row of the result that is the product's first.
    pub first: usize,
    /// The columns of the product that are computed: the result has no others.
    pub wanted: Range<usize>,
}

impl<'a> Out<'a> {
    /// All of a product.
    pub fn all(values: Shared<'a>, cols: usize, bias: Option<&'a [f32]>) -> Self {
        Self { values, cols, bias, first: 0, wanted: 0..cols }
    }

    /// Adds the bias to `values`, rounds them, and writes them to columns from `col` on of a row.
    ///
    /// # Safety
    /// No other thread writes there.
    pub unsafe fn store(&self, row: usize, col: usize, values: &mut [f32]) {
        if let Some(bias) = self.bias {
            values.iter_mut().zip(&bias[col..]).for_each(|(v, b)| *v += b);
        }
        // SAFETY: the caller's.
        unsafe { self.values.store((self.first + row) * self.cols + col - self.wanted.start, values) }
    }

    /// Writes `[columns][lanes]` sums to rows `block` of the result: `cols` columns, at most [`MOST_COLS`], from `col` on.
    ///
    /// # Safety
    /// No other thread writes there.
    pub unsafe fn store_transposed(&self, sums: &[f32], lanes: usize, col: usize, cols: usize, block: Range<usize>) {
        const SIDE: usize = 16;
        let mut square = [[0.0f32; MOST_COLS]; SIDE];
        for row in block.clone().step_by(SIDE) {
            let first = row - block.start;
            for (c, sums) in sums.chunks_exact(lanes).take(cols).enumerate() {
                for (values, sum) in square.iter_mut().zip(&sums[first..]) {
                    values[c] = *sum;
                }
            }
            for (row, values) in (row..block.end).zip(&mut square) {
                // SAFETY: the caller's.
                unsafe { self.store(row, col, &mut values[..cols]) }
            }
        }
    }
}
