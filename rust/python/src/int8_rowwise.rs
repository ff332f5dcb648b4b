//! Rows to 8 bits and back, on memory of Python's.

use half::{bf16, f16};
use halfbyte::dtype::{DType, Element};
use halfbyte::error::Result;
use halfbyte::quant::blockwise4::TASK;
use halfbyte::quant::int8_rowwise::{self, Precision};
use halfbyte::simd::Simd;
use pyo3::prelude::*;

use super::buffer::{Buffer, Plain, RawBuffer, check_disjoint};
use super::error::to_py;
use super::int8::narrow;
use super::quant::in_parallel;

/// Adds this room's functions to the module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(quantize_rows, m)?)?;
    m.add_function(wrap_pyfunction!(quantize_rows_outliers, m)?)?;
    m.add_function(wrap_pyfunction!(dequantize_rows, m)?)
}

/// Quantize rows to 8 bits, each by its largest magnitude.
#[pyfunction]
fn quantize_rows(
    py: Python<'_>,
    input: RawBuffer,
    codes: RawBuffer,
    scales: RawBuffer,
    rows: usize,
    columns: usize,
) -> PyResult<()> {
    py.detach(|| {
        let (input, codes) = (Buffer::new("input", input)?, Buffer::new("codes", codes)?);
        let scales = Buffer::new("scales", scales)?;
        match input.dtype() {
            DType::F32 => quantize::<f32>(&input, &codes, &scales, rows, columns),
            DType::F16 => quantize::<f16>(&input, &codes, &scales, rows, columns),
            DType::Bf16 => quantize::<bf16>(&input, &codes, &scales, rows, columns),
            _ => Err(input.wrong_dtype(&DType::FLOATS)),
        }
    })
    .map_err(to_py)
}

fn quantize<T: Element + Plain>(
    input: &Buffer,
    codes: &Buffer,
    scales: &Buffer,
    rows: usize,
    columns: usize,
) -> Result<()> {
    check_disjoint(&[input], &[codes, scales])?;
    // SAFETY: disjoint, and the Python caller's to keep for the call.
    let (input, codes, scales) = unsafe { (input.slice::<T>()?, codes.slice_mut()?, scales.slice_mut()?) };
    in_parallel(input.len(), TASK, || int8_rowwise::quantize_rows(input, rows, columns, codes, scales))
}

/// Quantize rows to 8 bits, each by its largest magnitude below the threshold, without the columns that have others.
#[pyfunction]
#[allow(clippy::too_many_arguments, reason = "a matrix and what becomes of it")]
fn quantize_rows_outliers(
    py: Python<'_>,
    input: RawBuffer,
    codes: RawBuffer,
    scales: RawBuffer,
    outliers: RawBuffer,
    rows: usize,
    columns: usize,
    threshold: f64,
) -> PyResult<()> {
    py.detach(|| {
        let (input, codes) = (Buffer::new("input", input)?, Buffer::new("codes", codes)?);
        let (scales, outliers) = (Buffer::new("scales", scales)?, Buffer::new("outliers", outliers)?);
        let apart = |shape| Apart { input: &input, codes: &codes, scales: &scales, outliers: &outliers, shape };
        match input.dtype() {
            DType::F32 => apart([rows, columns]).quantize::<f32>(threshold),
            DType::F16 => apart([rows, columns]).quantize::<f16>(threshold),
            DType::Bf16 => apart([rows, columns]).quantize::<bf16>(threshold),
            _ => Err(input.wrong_dtype(&DType::FLOATS)),
        }
    })
    .map_err(to_py)
}

/// Rows whose outliers are kept apart.
struct Apart<'a> {
    input: &'a Buffer,
    codes: &'a Buffer,
    scales: &'a Buffer,
    outliers: &'a Buffer,
    shape: [usize; 2],
}

impl Apart<'_> {
    fn quantize<T: Element + Plain>(self, threshold: f64) -> Result<()> {
        let Self { input, codes, scales, outliers, shape } = self;
        check_disjoint(&[input], &[codes, scales, outliers])?;
        // SAFETY: disjoint, and the Python caller's to keep for the call.
        let (input, codes, scales, outliers) =
            unsafe { (input.slice::<T>()?, codes.slice_mut()?, scales.slice_mut()?, outliers.slice_mut()?) };
        let (simd, threshold) = (Simd::active()?, narrow(threshold));
        in_parallel(input.len(), TASK, || {
            let full = Precision::Full;
            int8_rowwise::quantize_rows_outliers(simd, input, full, threshold, shape, codes, scales, outliers)
        })
    }
}

/// Read 8-bit rows back into `out`.
#[pyfunction]
fn dequantize_rows(
    py: Python<'_>,
    codes: RawBuffer,
    scales: RawBuffer,
    out: RawBuffer,
    rows: usize,
    columns: usize,
) -> PyResult<()> {
    py.detach(|| {
        let (codes, scales) = (Buffer::new("codes", codes)?, Buffer::new("scales", scales)?);
        let out = Buffer::new("out", out)?;
        match out.dtype() {
            DType::F32 => dequantize::<f32>(&codes, &scales, &out, rows, columns),
            DType::F16 => dequantize::<f16>(&codes, &scales, &out, rows, columns),
            DType::Bf16 => dequantize::<bf16>(&codes, &scales, &out, rows, columns),
            _ => Err(out.wrong_dtype(&DType::FLOATS)),
        }
    })
    .map_err(to_py)
}

fn dequantize<T: Element + Plain>(
    codes: &Buffer,
    scales: &Buffer,
    out: &Buffer,
    rows: usize,
    columns: usize,
) -> Result<()> {
    check_disjoint(&[codes, scales], &[out])?;
    // SAFETY: disjoint, and the Python caller's to keep for the call.
    let (codes, scales, out) = unsafe { (codes.slice()?, scales.slice()?, out.slice_mut::<T>()?) };
    in_parallel(out.len(), TASK, || int8_rowwise::dequantize_rows(codes, scales, rows, columns, out))
}
