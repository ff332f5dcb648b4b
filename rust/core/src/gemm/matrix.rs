//! Activations and gradients as a matrix.

use std::ops::Range;

use super::compute::Compute;
use super::floats::Floats;

/// A row-major list of floats, `[rows, cols]`, and what they are rounded to.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    pub floats: Floats<'a>,
    pub cols: usize,
    pub compute: Compute,
}

impl Matrix<'_> {
    /// Columns `cols` of a row as words of `depth` values, float32 or bfloat16; a last value without a partner gets a
    /// zero.
    pub fn words(self, depth: usize, row: usize, cols: Range<usize>, out: &mut [u32]) {
        let range = row * self.cols + cols.start..row * self.cols + cols.end;
        if depth == 1 {
            self.floats.to_f32(range, self.compute, bytemuck::cast_slice_mut(out));
        } else {
            let out: &mut [u16] = bytemuck::cast_slice_mut(out);
            let (out, rest) = out.split_at_mut(cols.len());
            self.floats.to_bf16(range, out);
            rest.fill(0);
        }
    }
}
