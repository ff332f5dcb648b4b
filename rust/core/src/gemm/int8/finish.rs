//! What becomes of exact sums: they are stored as they are, or as what they stand for.
//!
//! The latter is float32 arithmetic without a fused multiply-add, in this order and rounded once, at the end:
//! `sum * (row's scale * (1 / 127))`, plus the product of the outliers where there are any, times `(column's scale *
//! (1 / 127))`, plus the bias. The product of the outliers is that of the activations as they are with the weight's
//! codes, column after column. All paths are compiled from one text, so their bits are the same.

use std::ops::Range;

use super::codes::Codes;
use crate::gemm::floats::Shared;
use crate::gemm::out::MOST_COLS;
use crate::simd::Simd;

/// Columns of activations that have no codes, because there are outliers in them.
pub struct Outliers {
    /// Which, ascending.
    pub columns: Vec<usize>,
    /// Their values, `[rows][columns]`.
    pub values: Vec<f32>,
}

/// Where sums go.
pub enum To<'a> {
    /// As they are.
    Sums(SharedSums<'a>),
    /// As what they stand for.
    Values {
        /// Instructions of this machine.
        simd: Simd,
        /// One scale per row.
        row_scales: &'a [f32],
        /// One scale per column.
        column_scales: &'a [f32],
        /// One per column.
        bias: Option<&'a [f32]>,
        /// What the codes leave out.
        outliers: Option<&'a Outliers>,
        /// The result.
        out: Shared<'a>,
    },
}

/// The result of a product of codes.
pub struct Finish<'a> {
    /// Values in a row.
    pub cols: usize,
    /// Where sums go.
    pub to: To<'a>,
}

impl Finish<'_> {
    /// The columns of outliers of some rows of the weight, at most [`MOST_COLS`], as `[column][MOST_COLS]`.
    pub fn gather(&self, weight: Codes<'_>, rows: Range<usize>, gathered: &mut Vec<f32>) {
        gathered.clear();
        if let To::Values { outliers: Some(outliers), .. } = &self.to {
            gathered.resize(outliers.columns.len() * MOST_COLS, 0.0);
            for (i, row) in rows.enumerate() {
                let row = weight.row(row);
                for (&column, to) in outliers.columns.iter().zip(gathered.iter_mut().skip(i).step_by(MOST_COLS)) {
                    *to = f32::from(row[column]);
                }
            }
        }
    }

    /// Writes sums, at most [`MOST_COLS`], to columns from `col` on of a row; `gathered` is of these columns. `offset` is
    /// what the sums are too large by.
    ///
    /// # Safety
    /// No other thread writes there.
    pub unsafe fn store(&self, row: usize, col: usize, sums: &mut [i32], offset: i32, gathered: &[f32]) {
        sums.iter_mut().for_each(|sum| *sum = sum.wrapping_sub(offset));
        match &self.to {
            // SAFETY: the caller's.
            To::Sums(out) => unsafe { out.store(row * self.cols + col, sums) },
            To::Values { simd, row_scales, column_scales, bias, outliers, out } => {
                let cols = col..col + sums.len();
                let columns = Columns {
                    scale: row_scales[row],
                    scales: &column_scales[cols.clone()],
                    bias: bias.map(|bias| &bias[cols]),
                    outliers: outliers.map_or(&[], |o| &o.values[row * o.columns.len()..][..o.columns.len()]),
                    gathered,
                };
                let mut values = [0.0; MOST_COLS];
                let values = &mut values[..sums.len()];
                // SAFETY: the caller's; the path is available.
                unsafe {
                    match simd {
                        #[cfg(target_arch = "x86_64")]
                        Simd::Avx2 => values_avx2(sums, &columns, values),
                        #[cfg(target_arch = "x86_64")]
                        Simd::Avx512 => values_avx512(sums, &columns, values),
                        _ => values_of(sums, &columns, values),
                    }
                    out.store(row * self.cols + col, values);
                }
            }
        }
    }
}

/// What is needed for some values of a row.
struct Columns<'a> {
    scale: f32,
    scales: &'a [f32],
    bias: Option<&'a [f32]>,
    /// The row's outliers.
    outliers: &'a [f32],
    /// `[outlier][MOST_COLS]`
    gathered: &'a [f32],
}

/// # Safety
/// AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn values_avx2(sums: &[i32], columns: &Columns<'_>, values: &mut [f32]) {
    values_of(sums, columns, values);
}

/// # Safety
/// AVX-512 F, BW and VL.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn values_avx512(sums: &[i32], columns: &Columns<'_>, values: &mut [f32]) {
    values_of(sums, columns, values);
}

#[inline(always)]
fn values_of(sums: &[i32], columns: &Columns<'_>, values: &mut [f32]) {
    /// Columns whose sums stay in registers.
    const WIDTH: usize = MOST_COLS / 2;
    let scale = columns.scale * (1.0 / 127.0);
    for (value, &sum) in values.iter_mut().zip(sums) {
        *value = sum as f32 * scale;
    }
    if !columns.outliers.is_empty() {
        for (part, values) in values.chunks_mut(WIDTH).enumerate() {
            let mut sums = [0.0f32; WIDTH];
            for (x, codes) in columns.outliers.iter().zip(columns.gathered.chunks_exact(MOST_COLS)) {
                let codes: &[f32; WIDTH] = codes[part * WIDTH..][..WIDTH].try_into().expect("as many");
                for (sum, code) in sums.iter_mut().zip(codes) {
                    *sum += x * code;
                }
            }
            values.iter_mut().zip(sums).for_each(|(value, sum)| *value += sum);
        }
    }
    for (value, scale) in values.iter_mut().zip(columns.scales) {
        *value *= scale * (1.0 / 127.0);
    }
    if let Some(bias) = columns.bias {
        values.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
    }
}

/// Sums that several threads write, each its own part.
pub struct SharedSums<'a> {
    pointer: *mut i32,
    len: usize,
    memory: std::marker::PhantomData<&'a mut [i32]>,
}

// SAFETY: the memory is borrowed mutably for 'a, and `store` asks its callers to write disjoint parts.
unsafe impl Sync for SharedSums<'_> {}

impl<'a> SharedSums<'a> {
    pub fn new(sums: &'a mut [i32]) -> Self {
        Self { pointer: sums.as_mut_ptr(), len: sums.len(), memory: std::marker::PhantomData }
    }

    /// # Safety
    /// No other thread writes to these places meanwhile.
    unsafe fn store(&self, at: usize, sums: &[i32]) {
        let end = at.checked_add(sums.len());
        assert!(end.is_some_and(|end| end <= self.len), "a result beyond its memory");
        // SAFETY: within the memory, and nobody else's.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(at), sums.len()).copy_from_slice(sums) }
    }
}
