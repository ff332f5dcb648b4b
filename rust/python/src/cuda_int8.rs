//! LLM.int8() on device memory of Python's.

use halfbyte::dtype::DType;
use halfbyte::error::{Error, Result};
use halfbyte_cuda::int8::{self, Linear, Scaled};
use halfbyte_cuda::{Device, Memory, Stream};
use pyo3::prelude::*;

use super::buffer::RawBuffer;
use super::cuda::{memory, open};
use super::error::to_py;

/// Adds this room's functions to the module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<CudaLinear8>()?;
    m.add_function(wrap_pyfunction!(cuda_int8_workspace, m)?)?;
    m.add_function(wrap_pyfunction!(cuda_quantize_rows_outliers, m)?)?;
    m.add_function(wrap_pyfunction!(cuda_int8_matmul, m)?)
}

fn float(argument: &'static str, dtype: &str) -> Result<DType> {
    DType::FLOATS.into_iter().find(|d| d.as_str() == dtype).ok_or_else(|| {
        let legal = DType::FLOATS.map(DType::as_str);
        Error::argument(argument, format!("{dtype:?}"), format!("one of {legal:?}"))
    })
}

/// Products `x · Wᵀ + bias` with 8-bit weights of one shape, `x` quantized on the way.
#[pyclass(frozen, module = "halfbyte._native")]
struct CudaLinear8 {
    device: &'static Device,
    n: usize,
    k: usize,
}

#[pymethods]
impl CudaLinear8 {
    #[new]
    fn new(py: Python<'_>, device: usize, n: usize, k: usize) -> PyResult<Self> {
        Ok(Self { device: open(py, device)?, n, k })
    }

    /// Bytes of the workspace of `launch`, which begins at a multiple of 256.
    fn workspace(&self, m: usize) -> PyResult<usize> {
        int8::workspace_bytes(self.device, m, self.k).map_err(to_py)
    }

    /// Make one product on `stream`, with `m` rows of `x`. Addresses are of memory of the device: `x` and `y` in `dtype`,
    /// the codes and scales of the weight, the bias in `bias_dtype` or 0, the workspace. Gives the name of the product's
    /// kernel.
    #[pyo3(signature = (stream, m, dtype, x, codes, scales, bias, bias_dtype, threshold, workspace, y, kernel="best"))]
    #[allow(clippy::too_many_arguments)] // Python's arguments
    fn launch(
        &self,
        py: Python<'_>,
        stream: usize,
        m: usize,
        dtype: &str,
        x: usize,
        codes: usize,
        scales: usize,
        bias: usize,
        bias_dtype: &str,
        threshold: f32,
        workspace: usize,
        y: usize,
        kernel: &str,
    ) -> PyResult<&'static str> {
        let call = || {
            let (n, k) = (self.n, self.k);
            let area = |argument, address, rows: usize, columns: usize, dtype| {
                let Some(count) = rows.checked_mul(columns) else {
                    return Err(Error::argument(argument, format!("{rows} x {columns}"), "less than 2^63 elements"));
                };
                Memory::new(argument, address, count, dtype)
            };
            let dtype = float("dtype", dtype)?;
            let x = area("x", x, m, k, dtype)?;
            let codes = area("codes", codes, n, k, DType::I8)?;
            let scales = Memory::new("scales", scales, n, DType::F32)?;
            let bias = match bias {
                0 => None,
                address => Some(Memory::new("bias", address, n, float("bias_dtype", bias_dtype)?)?),
            };
            let bytes = int8::workspace_bytes(self.device, m, k)?;
            let workspace = Memory::new("workspace", workspace, bytes, DType::U8)?;
            let y = area("y", y, m, n, dtype)?;
            let linear = Linear {
                x: &x,
                codes: &codes,
                scales: &scales,
                bias: bias.as_ref(),
                threshold,
                workspace: &workspace,
                y: &y,
                m,
                n,
                k,
            };
            // SAFETY: the Python caller's to keep.
            unsafe { int8::linear(self.device, Stream(stream), &linear, kernel.parse()?) }
        };
        py.detach(call).map_err(to_py)
    }
}

/// Bytes of the workspace of `cuda_quantize_rows_outliers`, which begins at a multiple of 256.
#[pyfunction]
fn cuda_int8_workspace(py: Python<'_>, device: usize, rows: usize, columns: usize) -> PyResult<usize> {
    int8::workspace_bytes(open(py, device)?, rows, columns).map_err(to_py)
}

/// Quantize rows to 8 bits, each by its largest magnitude below the threshold, all but the columns with values from it on.
#[pyfunction]
#[allow(clippy::too_many_arguments)] // Python's arguments
fn cuda_quantize_rows_outliers(
    py: Python<'_>,
    device: usize,
    stream: usize,
    input: RawBuffer,
    codes: RawBuffer,
    scales: RawBuffer,
    outliers: RawBuffer,
    workspace: RawBuffer,
    rows: usize,
    columns: usize,
    threshold: f32,
) -> PyResult<()> {
    let check = || {
        let (input, codes, scales) = (memory("input", input)?, memory("codes", codes)?, memory("scales", scales)?);
        Ok((input, codes, scales, memory("outliers", outliers)?, memory("workspace", workspace)?))
    };
    let (input, codes, scales, outliers, workspace) = check().map_err(to_py)?;
    let device = open(py, device)?;
    let (stream, shape) = (Stream(stream), (rows, columns));
    // SAFETY: the Python caller's to keep.
    py.detach(|| unsafe {
        int8::quantize_rows_outliers(device, stream, &input, &codes, &scales, &outliers, &workspace, shape, threshold)
    })
    .map_err(to_py)
}

/// Codes times codes: int32 sums, or with the scales of both what they stand for. Gives the name of the kernel.
#[pyfunction]
#[pyo3(signature = (device, stream, a, b, row_scales, column_scales, bias, y, m, n, k, kernel="best"))]
#[allow(clippy::too_many_arguments)] // Python's arguments
fn cuda_int8_matmul(
    py: Python<'_>,
    device: usize,
    stream: usize,
    a: RawBuffer,
    b: RawBuffer,
    row_scales: Option<RawBuffer>,
    column_scales: Option<RawBuffer>,
    bias: Option<RawBuffer>,
    y: RawBuffer,
    m: usize,
    n: usize,
    k: usize,
    kernel: &str,
) -> PyResult<&'static str> {
    let check = || {
        let scales = match (row_scales, column_scales) {
            (None, None) => None,
            (Some(rows), Some(columns)) => Some((memory("row_scales", rows)?, memory("column_scales", columns)?)),
            _ => return Err(Error::argument("column_scales", "one of two scales", "both or none")),
        };
        let bias = bias.map(|bias| memory("bias", bias)).transpose()?;
        Ok((memory("a", a)?, memory("b", b)?, scales, bias, memory("y", y)?, kernel.parse()?))
    };
    let (a, b, scales, bias, y, choice) = check().map_err(to_py)?;
    let device = open(py, device)?;
    let scales = scales.as_ref().map(|(rows, columns)| (rows, columns));
    let scaled = Scaled { a: &a, b: &b, scales, bias: bias.as_ref(), y: &y, m, n, k };
    // SAFETY: the Python caller's to keep.
    py.detach(|| unsafe { int8::scaled(device, Stream(stream), &scaled, choice) }).map_err(to_py)
}
