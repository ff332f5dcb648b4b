//! Products with weights of 8-bit rows, on memory of Python's. The caller keeps the memory alive and to itself during the
//! call.

use halfbyte::dtype::DType;
use halfbyte::error::Result;
use halfbyte::gemm::int8::{self, Path, Weight};
use halfbyte::gemm::{self, Compute};
use halfbyte::geometry::weight_count;
use pyo3::prelude::*;

use super::buffer::{Buffer, RawBuffer, check_disjoint};
use super::error::to_py;
use super::gemm::{float, floats, floats_mut, matrix, run};

/// Adds this room's functions to the module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<CpuLinear8bit>()?;
    m.add_function(wrap_pyfunction!(int8_matmul, m)?)?;
    m.add_function(wrap_pyfunction!(int8_scaled_mm, m)?)?;
    m.add_function(wrap_pyfunction!(int8_path, m)?)
}

/// Products with 8-bit weights of one shape: what does not change from call to call is checked once.
#[pyclass(frozen, module = "halfbyte._native")]
struct CpuLinear8bit {
    dtype: DType,
    compute: Compute,
    n: usize,
    k: usize,
    values: usize,
    bias: Option<DType>,
}

impl CpuLinear8bit {
    /// Checks the weight's memory and calls `work` with it; `out` must be apart from it and from `inputs`.
    fn with<R>(
        &self,
        codes: usize,
        scales: usize,
        inputs: &[&Buffer],
        out: &Buffer,
        work: impl FnOnce(&Weight<'_>) -> Result<R>,
    ) -> Result<R> {
        let codes = Buffer::of("codes", codes, self.values, DType::I8)?;
        let scales = Buffer::of("scales", scales, self.n, DType::F32)?;
        check_disjoint(inputs, &[out])?;
        check_disjoint(&[&codes, &scales], &[out])?;
        // SAFETY: not written to, and the Python caller's to keep for the call.
        let (codes, scales) = unsafe { (codes.slice()?, scales.slice()?) };
        work(&Weight::new(codes, scales, self.n, self.k)?)
    }
}

#[pymethods]
impl CpuLinear8bit {
    /// Check the kind.
    #[new]
    #[pyo3(signature = (dtype, n, k, bias = None))]
    fn new(dtype: &str, n: usize, k: usize, bias: Option<&str>) -> PyResult<Self> {
        let check = || {
            Ok(Self {
                dtype: float("dtype", dtype)?,
                compute: dtype.parse()?,
                n,
                k,
                values: weight_count(n, k)?,
                bias: bias.map(|bias| float("bias", bias)).transpose()?,
            })
        };
        check().map_err(to_py)
    }

    /// `out[m, n] = x[m, k] · weight[n, k]ᵀ + bias[n]`; all but `m`, `threshold` and `threads` are addresses.
    #[allow(clippy::too_many_arguments, reason = "a product has that many")]
    fn forward(
        &self,
        py: Python<'_>,
        m: usize,
        x: usize,
        codes: usize,
        scales: usize,
        bias: usize,
        threshold: f64,
        out: usize,
        threads: usize,
    ) -> PyResult<()> {
        run(py, [m, self.n, self.k], threads, |workers| {
            let x = matrix("x", x, m, self.k, self.dtype)?;
            let out = matrix("out", out, m, self.n, self.dtype)?;
            let bias = self.bias.map(|dtype| Buffer::of("bias", bias, self.n, dtype)).transpose()?;
            let inputs = [&x, bias.as_ref().unwrap_or(&x)];
            self.with(codes, scales, &inputs, &out, |weight| {
                // SAFETY: `out` is apart from all others, and all are the Python caller's to keep for the call.
                let (x, bias, out) =
                    unsafe { (floats(&x)?, bias.as_ref().map(|bias| floats(bias)).transpose()?, floats_mut(&out)?) };
                int8::linear(Path::active()?, workers, m, x, weight, bias, narrow(threshold), out)
            })
        })
    }

    /// `out[m, k] = grad[m, n] · weight[n, k]`; all but `m` and `threads` are addresses.
    #[allow(clippy::too_many_arguments, reason = "a product has that many")]
    fn backward(
        &self,
        py: Python<'_>,
        m: usize,
        grad: usize,
        codes: usize,
        scales: usize,
        out: usize,
        threads: usize,
    ) -> PyResult<()> {
        run(py, [m, self.n, self.k], threads, |workers| {
            let grad = matrix("grad", grad, m, self.n, self.dtype)?;
            let out = matrix("out", out, m, self.k, self.dtype)?;
            self.with(codes, scales, &[&grad], &out, |weight| {
                // SAFETY: `out` is apart from all others, and all are the Python caller's to keep for the call.
                let (grad, out) = unsafe { (floats(&grad)?, floats_mut(&out)?) };
                int8::linear_backward(gemm::Path::active()?, workers, m, grad, weight, out, self.compute)
            })
        })
    }
}

/// As float32; one that is above 0 stays so.
pub fn narrow(threshold: f64) -> f32 {
    let narrow = threshold as f32;
    if threshold > 0.0 { narrow.max(f32::from_bits(1)) } else { narrow }
}

/// `out[m, n] = a[m, k] · b[n, k]ᵀ` of int8, exactly; `a`, `b` and `out` are addresses.
#[pyfunction]
#[allow(clippy::too_many_arguments, reason = "a product has that many")]
fn int8_matmul(
    py: Python<'_>,
    m: usize,
    n: usize,
    k: usize,
    a: usize,
    b: usize,
    out: usize,
    threads: usize,
) -> PyResult<()> {
    run(py, [m, n, k], threads, |workers| {
        let (a, b) = (matrix("a", a, m, k, DType::I8)?, matrix("b", b, n, k, DType::I8)?);
        let out = matrix("out", out, m, n, DType::I32)?;
        check_disjoint(&[&a, &b], &[&out])?;
        // SAFETY: `out` is apart from the others, and all are the Python caller's to keep for the call.
        let (a, b, out) = unsafe { (a.slice()?, b.slice()?, out.slice_mut()?) };
        int8::matmul(Path::active()?, workers, [m, n, k], a, b, out)
    })
}

/// The same, scaled to what the codes stand for, plus bias; `a` and `b` are addresses.
#[pyfunction]
#[allow(clippy::too_many_arguments, reason = "a product has that many")]
fn int8_scaled_mm(
    py: Python<'_>,
    shape: [usize; 3],
    a: usize,
    b: usize,
    row_scales: RawBuffer,
    column_scales: RawBuffer,
    bias: Option<RawBuffer>,
    out: RawBuffer,
    threads: usize,
) -> PyResult<()> {
    let [m, n, k] = shape;
    run(py, shape, threads, |workers| {
        let (a, b) = (matrix("a", a, m, k, DType::I8)?, matrix("b", b, n, k, DType::I8)?);
        let row_scales = Buffer::new("row_scales", row_scales)?;
        let column_scales = Buffer::new("column_scales", column_scales)?;
        let bias = bias.map(|bias| Buffer::new("bias", bias)).transpose()?;
        let out = Buffer::new("out", out)?;
        check_disjoint(&[&a, &b, &row_scales, &column_scales, bias.as_ref().unwrap_or(&a)], &[&out])?;
        // SAFETY: `out` is apart from all others, and all are the Python caller's to keep for the call.
        unsafe {
            let bias = bias.as_ref().map(|bias| floats(bias)).transpose()?;
            let (a, b) = (a.slice()?, b.slice()?);
            let (row_scales, column_scales) = (row_scales.slice()?, column_scales.slice()?);
            let out = floats_mut(&out)?;
            int8::scaled(Path::active()?, workers, shape, a, b, row_scales, column_scales, bias, out)
        }
    })
}

/// The instructions that products of 8-bit codes use.
#[pyfunction]
fn int8_path() -> PyResult<&'static str> {
    Path::active().map(Path::as_str).map_err(to_py)
}
