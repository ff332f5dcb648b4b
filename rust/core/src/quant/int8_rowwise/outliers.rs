//! Rows to 8 bits without the columns that have outliers.

use std::sync::Mutex;
use std::sync::PoisonError;

use rayon::prelude::*;

use super::row::{self, Precision};
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::geometry::{check_length, element_count};
use crate::quant::blockwise4::TASK;
use crate::simd::Simd;

/// Quantizes each row of `input`, `[rows][columns]`, as [`super::quantize_rows`] does, but for outliers: values whose
/// magnitude is at least `threshold`. They do not count for the scale of their row, and a column with one, in whatever row,
/// has codes 0 in all rows and the mark 1 in `outliers`, others 0. NaN is no outlier.
///
/// So the scale of a row is its largest magnitude below the threshold, be it in a marked column or not.
///
/// # Errors
/// [`Error::Argument`] unless `threshold` is above 0, `input` and `codes` have `rows * columns` elements, `scales` has
/// `rows` and `outliers` `columns`, and when this machine lacks the path.
#[allow(clippy::too_many_arguments, reason = "a matrix and what becomes of it")]
pub fn quantize_rows_outliers<T: Element>(
    simd: Simd,
    input: &[T],
    precision: Precision,
    threshold: f32,
    [rows, columns]: [usize; 2],
    codes: &mut [i8],
    scales: &mut [f32],
    outliers: &mut [u8],
) -> Result<()> {
    let simd = simd.checked()?;
    let n = element_count(&[rows, columns])
        .ok_or_else(|| Error::argument("rows", format!("{rows} x {columns}"), "less elements than memory has bytes"))?;
    check_length("input", input.len(), n, "rows x columns")?;
    check_length("codes", codes.len(), n, "rows x columns")?;
    check_length("scales", scales.len(), rows, "one scale per row")?;
    check_length("outliers", outliers.len(), columns, "one mark per column")?;
    if threshold.is_nan() || threshold <= 0.0 {
        return Err(Error::argument("threshold", threshold, "a number greater than 0"));
    }
    outliers.fill(0);
    scales.fill(0.0);
    if n == 0 {
        return Ok(());
    }
    let rows_of_task = TASK.div_ceil(columns);
    let marked = Mutex::new(&mut *outliers);
    (input.par_chunks(columns * rows_of_task), scales.par_chunks_mut(rows_of_task)).into_par_iter().for_each(
        |(input, scales)| {
            let mut marks = vec![0; columns];
            for (row, scale) in input.chunks_exact(columns).zip(scales) {
                *scale = row::largest_below(simd, row, precision, threshold, &mut marks);
            }
            let mut all = marked.lock().unwrap_or_else(PoisonError::into_inner);
            all.iter_mut().zip(marks).for_each(|(all, mark)| *all |= mark);
        },
    );
    let marks = outliers.contains(&1).then_some(&*outliers);
    (input.par_chunks(columns), codes.par_chunks_mut(columns), scales)
        .into_par_iter()
        .with_min_len(rows_of_task)
        .for_each(|(row, codes, scale)| row::encode(simd, row, precision, *scale, marks, codes));
    Ok(())
}
