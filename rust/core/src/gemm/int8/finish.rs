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

impl Outliers {
    /// Those of a row.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.columns.len()..][..self.columns.len()]
    }

    /// Those of all rows as `[group][outlier][SIDE rows]`.
    pub fn lanes(&self) -> Vec<[f32; SIDE]> {
        let count = self.columns.len();
        let rows = self.values.len() / count;
        let mut lanes = vec![[0.0; SIDE]; rows.div_ceil(SIDE) * count];
        for row in 0..rows {
            let group = &mut lanes[row / SIDE * count..][..count];
            group.iter_mut().zip(self.row(row)).for_each(|(lanes, x)| lanes[row % SIDE] = *x);
        }
        lanes
    }
}

/// Rows of activations whose outliers are multiplied side by side.
pub const SIDE: usize = 8;

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

    /// Of a row of activations, the products of its outliers with what was gathered.
    pub fn outlier_sums<'s>(&self, row: usize, gathered: &[f32], sums: &'s mut [f32; MOST_COLS]) -> Option<&'s [f32]> {
        let To::Values { simd, outliers: Some(outliers), .. } = &self.to else {
            return None;
        };
        let values = outliers.row(row);
        match simd {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the path is available.
            Simd::Avx2 => unsafe { gathered_sums_avx2(values, gathered, sums) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the path is available.
            Simd::Avx512 => unsafe { gathered_sums_avx512(values, gathered, sums) },
            _ => gathered_sums(values, gathered, sums),
        }
        Some(sums)
    }

    /// What the codes leave out, if anything.
    pub fn outliers(&self) -> Option<&Outliers> {
        match self.to {
            To::Sums(_) => None,
            To::Values { outliers, .. } => outliers,
        }
    }

    /// The products of the outliers of some rows of activations, as [`Outliers::lanes`] gives them, with two rows of the
    /// weight.
    pub fn pair_sums(&self, columns: &[usize], lanes: &[[f32; SIDE]], codes: [&[i8]; 2]) -> [[f32; SIDE]; 2] {
        match &self.to {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the path is available.
            To::Values { simd: Simd::Avx2, .. } => unsafe { pair_sums_avx2(columns, lanes, codes) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the path is available.
            To::Values { simd: Simd::Avx512, .. } => unsafe { pair_sums_avx512(columns, lanes, codes) },
            _ => pair_sums(columns, lanes, codes),
        }
    }

    /// Writes sums, at most [`MOST_COLS`], to columns from `col` on of a row. `offset` is what the sums are too large by;
    /// `outliers` are the products that they leave out, if any.
    ///
    /// # Safety
    /// No other thread writes there.
    pub unsafe fn store(&self, row: usize, col: usize, sums: &mut [i32], offset: i32, outliers: Option<&[f32]>) {
        sums.iter_mut().for_each(|sum| *sum = sum.wrapping_sub(offset));
        match &self.to {
            // SAFETY: the caller's.
            To::Sums(out) => unsafe { out.store(row * self.cols + col, sums) },
            To::Values { simd, row_scales, column_scales, bias, out, .. } => {
                let cols = col..col + sums.len();
                let columns = Columns {
                    scale: row_scales[row],
                    scales: &column_scales[cols.clone()],
                    bias: bias.map(|bias| &bias[cols]),
                    outliers,
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
    outliers: Option<&'a [f32]>,
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
    let scale = columns.scale * (1.0 / 127.0);
    for (value, &sum) in values.iter_mut().zip(sums) {
        *value = sum as f32 * scale;
    }
    if let Some(outliers) = columns.outliers {
        values.iter_mut().zip(outliers).for_each(|(value, sum)| *value += sum);
    }
    for (value, scale) in values.iter_mut().zip(columns.scales) {
        *value *= scale * (1.0 / 127.0);
    }
    if let Some(bias) = columns.bias {
        values.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
    }
}

/// # Safety
/// AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn gathered_sums_avx2(values: &[f32], gathered: &[f32], sums: &mut [f32; MOST_COLS]) {
    gathered_sums(values, gathered, sums);
}

/// # Safety
/// AVX-512 F, BW and VL.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn gathered_sums_avx512(values: &[f32], gathered: &[f32], sums: &mut [f32; MOST_COLS]) {
    gathered_sums(values, gathered, sums);
}

/// # Safety
/// AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn pair_sums_avx2(columns: &[usize], lanes: &[[f32; SIDE]], codes: [&[i8]; 2]) -> [[f32; SIDE]; 2] {
    pair_sums(columns, lanes, codes)
}

/// # Safety
/// AVX-512 F, BW and VL.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pair_sums_avx512(columns: &[usize], lanes: &[[f32; SIDE]], codes: [&[i8]; 2]) -> [[f32; SIDE]; 2] {
    pair_sums(columns, lanes, codes)
}

/// As [`gathered_sums`].
#[inline(always)]
fn pair_sums(columns: &[usize], lanes: &[[f32; SIDE]], codes: [&[i8]; 2]) -> [[f32; SIDE]; 2] {
    let mut sums = [[0.0f32; SIDE]; 2];
    for (&column, x) in columns.iter().zip(lanes) {
        for (codes, sums) in codes.iter().zip(&mut sums) {
            let code = f32::from(codes[column]);
            for i in 0..SIDE {
                sums[i] += x[i] * code;
            }
        }
    }
    sums
}

/// Column after column, from zero.
#[inline(always)]
fn gathered_sums(values: &[f32], gathered: &[f32], sums: &mut [f32; MOST_COLS]) {
    /// Columns whose sums stay in registers.
    const WIDTH: usize = MOST_COLS / 2;
    for (part, to) in sums.as_chunks_mut::<WIDTH>().0.iter_mut().enumerate() {
        let mut sums = [0.0f32; WIDTH];
        for (x, codes) in values.iter().zip(gathered.as_chunks::<MOST_COLS>().0) {
            let codes = &codes[part * WIDTH..][..WIDTH];
            for i in 0..WIDTH {
                sums[i] += x * codes[i];
            }
        }
        *to = sums;
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
