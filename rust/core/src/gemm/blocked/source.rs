//! What the blocked product needs of a weight.

use std::ops::Range;

use super::kernel::Kernel;
use crate::gemm::weight::Weight;

/// A weight whose rows are decoded as they are needed.
pub trait Source: Sync {
    /// Rows: output features.
    fn rows(&self) -> usize;

    /// Columns: input features.
    fn cols(&self) -> usize;

    /// Asks for what is read to decode columns `cols` of some rows, which is needed soon.
    fn prefetch(&self, rows: Range<usize>, cols: Range<usize>);

    /// Decodes columns of a row to consecutive values, as [`Kernel::decode`] does. `buffer` is for scales.
    ///
    /// # Safety
    /// As there.
    unsafe fn decode<K: Kernel>(&self, row: usize, cols: Range<usize>, buffer: &mut Vec<f32>, out: *mut u8);

    /// Decodes the same columns of a row and of the next, as [`Kernel::decode_pair`] does.
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    unsafe fn decode_pair<K: Kernel>(
        &self,
        row: usize,
        cols: Range<usize>,
        buffers: &mut [Vec<f32>; 2],
        out: *mut u32,
        stride: usize,
    ) -> bool {
        let _ = (row, cols, buffers, out, stride);
        false
    }
}

impl Source for Weight<'_> {
    fn rows(&self) -> usize {
        self.rows()
    }

    fn cols(&self) -> usize {
        self.cols()
    }

    fn prefetch(&self, rows: Range<usize>, cols: Range<usize>) {
        self.prefetch(rows, cols);
    }

    #[inline]
    unsafe fn decode<K: Kernel>(&self, row: usize, cols: Range<usize>, buffer: &mut Vec<f32>, out: *mut u8) {
        // SAFETY: the caller's.
        unsafe { K::decode(&self.run(row, cols, buffer), out) }
    }

    #[inline]
    unsafe fn decode_pair<K: Kernel>(
        &self,
        row: usize,
        cols: Range<usize>,
        buffers: &mut [Vec<f32>; 2],
        out: *mut u32,
        stride: usize,
    ) -> bool {
        let [first, second] = buffers;
        let (first, second) = (self.run(row, cols.clone(), first), self.run(row + 1, cols, second));
        // SAFETY: the caller's.
        unsafe { K::decode_pair(&first, &second, out, stride) }
    }
}
