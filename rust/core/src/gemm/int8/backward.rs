//! `grad · W` with the rows of `W` read back: the blocked product of 4-bit weights, on the codes of 8-bit rows.

use std::ops::Range;

use half::{bf16, f16};

use super::codes::Codes;
use crate::gemm::blocked::kernel::Kernel;
use crate::gemm::blocked::source::Source;
use crate::gemm::compute::Compute;
use crate::gemm::weight::prefetch;
use crate::quant::int8_rowwise::row;
use crate::simd::Simd;

/// A weight of 8-bit rows, whose values are rounded to the type that a product is computed in.
pub struct Rows<'a> {
    pub simd: Simd,
    pub codes: Codes<'a>,
    pub scales: &'a [f32],
    pub compute: Compute,
}

impl Source for Rows<'_> {
    fn rows(&self) -> usize {
        self.codes.rows
    }

    fn cols(&self) -> usize {
        self.codes.cols
    }

    fn prefetch(&self, rows: Range<usize>, cols: Range<usize>) {
        for row in rows.start..rows.end.min(self.codes.rows) {
            let codes = &self.codes.row(row)[cols.start..cols.end.min(self.codes.cols)];
            codes.iter().step_by(64).for_each(|code| prefetch((&raw const *code).cast()));
        }
    }

    unsafe fn decode<K: Kernel>(&self, row: usize, cols: Range<usize>, _: &mut Vec<f32>, out: *mut u8) {
        let (codes, scale) = (&self.codes.row(row)[cols], self.scales[row]);
        if K::DEPTH == 2 {
            // SAFETY: the caller's.
            let out = unsafe { std::slice::from_raw_parts_mut(out.cast::<bf16>(), codes.len()) };
            row::read(self.simd, codes, scale, out);
            return;
        }
        // SAFETY: the caller's.
        let out = unsafe { std::slice::from_raw_parts_mut(out.cast::<f32>(), codes.len()) };
        match self.compute {
            Compute::F32 => row::read(self.simd, codes, scale, out),
            Compute::F16 => row::read_rounded::<f16>(self.simd, codes, scale, out),
            Compute::Bf16 => row::read_rounded::<bf16>(self.simd, codes, scale, out),
        }
    }
}
