//! Rows to 8 bits and back: the statistics of LLM.int8().
//!
//! The scale of a row is its largest magnitude, and a code is `round(x * 127 / scale)`: a float32 product, a float32
//! quotient, the nearest integer, of two equally near the even one. To read: `code * scale * (1 / 127)`, two float32
//! products, rounded once to the output's type.
//!
//! With a threshold, values of at least that magnitude are outliers: see [`quantize_rows_outliers`].
//!
//! The scalar path is the definition; the SIMD paths give the same bits. So does every number of threads.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod outliers;
pub(crate) mod row;
mod scalar;

use rayon::prelude::*;

use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::geometry::{check_length, element_count};
use crate::quant::blockwise4::TASK;
use crate::simd::Simd;

pub use outliers::quantize_rows_outliers;
pub use row::Precision;

/// Quantizes each row of `input`, `[rows][columns]`, to `codes` and one scale in `scales`.
///
/// NaN does not count for the scale; its code is 0, as is every code of a row of zeros. A row with an infinity has an
/// infinite scale and codes 0. The result does not depend on the number of threads.
///
/// # Errors
/// [`Error::Argument`] unless `input` and `codes` have `rows * columns` elements and `scales` has `rows`, and when
/// `HALFBYTE_SIMD` names no path of this machine.
pub fn quantize_rows<T: Element>(
    input: &[T],
    rows: usize,
    columns: usize,
    codes: &mut [i8],
    scales: &mut [f32],
) -> Result<()> {
    quantize_rows_by(Simd::active()?, input, rows, columns, codes, scales)
}

/// [`quantize_rows`] by a path.
///
/// # Errors
/// As there, and when this machine lacks the path.
pub fn quantize_rows_by<T: Element>(
    simd: Simd,
    input: &[T],
    rows: usize,
    columns: usize,
    codes: &mut [i8],
    scales: &mut [f32],
) -> Result<()> {
    let simd = simd.checked()?;
    check("input", input.len(), codes.len(), scales.len(), rows, columns)?;
    if columns == 0 {
        scales.fill(0.0);
        return Ok(());
    }
    (input.par_chunks(columns), codes.par_chunks_mut(columns), scales)
        .into_par_iter()
        .with_min_len(TASK.div_ceil(columns))
        .for_each(|(values, codes, scale)| {
            *scale = row::largest(simd, values, Precision::Full);
            row::encode(simd, values, Precision::Full, *scale, None, codes);
        });
    Ok(())
}

/// Reads rows back: the way back of [`quantize_rows`].
///
/// # Errors
/// [`Error::Argument`] unless `codes` and `out` have `rows * columns` elements and `scales` has `rows`, and when
/// `HALFBYTE_SIMD` names no path of this machine.
pub fn dequantize_rows<T: Element>(
    codes: &[i8],
    scales: &[f32],
    rows: usize,
    columns: usize,
    out: &mut [T],
) -> Result<()> {
    dequantize_rows_by(Simd::active()?, codes, scales, rows, columns, out)
}

/// [`dequantize_rows`] by a path.
///
/// # Errors
/// As there, and when this machine lacks the path.
pub fn dequantize_rows_by<T: Element>(
    simd: Simd,
    codes: &[i8],
    scales: &[f32],
    rows: usize,
    columns: usize,
    out: &mut [T],
) -> Result<()> {
    let simd = simd.checked()?;
    check("out", out.len(), codes.len(), scales.len(), rows, columns)?;
    if columns == 0 {
        return Ok(());
    }
    (codes.par_chunks(columns), scales, out.par_chunks_mut(columns))
        .into_par_iter()
        .with_min_len(TASK.div_ceil(columns))
        .for_each(|(codes, &scale, out)| row::read(simd, codes, scale, out));
    Ok(())
}

fn check(
    argument: &'static str,
    values: usize,
    codes: usize,
    scales: usize,
    rows: usize,
    columns: usize,
) -> Result<()> {
    let n = element_count(&[rows, columns])
        .ok_or_else(|| Error::argument("rows", format!("{rows} x {columns}"), "less elements than memory has bytes"))?;
    check_length(argument, values, n, "rows x columns")?;
    check_length("codes", codes, n, "rows x columns")?;
    check_length("scales", scales, rows, "one scale per row")
}

#[cfg(test)]
mod tests;
