//! The products of LoRA adapters on device memory of Python's. Numbers alone come in: a training step makes hundreds of these calls.

use halfbyte::dtype::DType;
use halfbyte::error::{Error, Result};
use halfbyte_cuda::{self as cuda, Factor, LoraDown, LoraUp, Memory, Stream};
use pyo3::prelude::*;

use super::cuda::open;
use super::cuda_linear::rows as rows_at;
use super::error::to_py;

/// Adds this room's functions to the module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(cuda_lora_ranks, m)?)?;
    m.add_function(wrap_pyfunction!(cuda_lora_down, m)?)?;
    m.add_function(wrap_pyfunction!(cuda_lora_up, m)?)
}

/// The largest rank that `cuda_lora_down` and `cuda_lora_up` have kernels for on a device; 0 if it has none.
#[pyfunction]
fn cuda_lora_ranks(py: Python<'_>, device: usize) -> PyResult<usize> {
    open(py, device).map(cuda::lora_ranks)
}

/// The type of the products.
fn products(dtype: &str) -> Result<DType> {
    let legal = [DType::F16, DType::Bf16];
    legal.into_iter().find(|d| d.as_str() == dtype).ok_or_else(|| Error::dtype("dtype", dtype, &legal))
}

fn float_or(is_float: bool, dtype: DType) -> DType {
    if is_float { DType::F32 } else { dtype }
}

/// Rows at an address, or `None` where that is 0.
fn rows_or_none(
    argument: &'static str,
    address: usize,
    m: usize,
    columns: usize,
    dtype: DType,
) -> Result<Option<Memory>> {
    (address != 0).then(|| rows_at(argument, address, m, columns, dtype)).transpose()
}

/// Multiply `x` `[rows, columns]` by a factor `[rank, columns]`: `h` `[rows, rank]`; `cast` becomes `x` in the dtype of `h`. All are
/// addresses, of float32 where that is said; `cast` may be 0.
#[pyfunction]
#[pyo3(signature = (device, stream, dtype, x, x_is_float, factor, factor_is_float, cast, h, rows, columns, rank))]
#[allow(clippy::too_many_arguments)] // Python's arguments
fn cuda_lora_down(
    py: Python<'_>,
    device: usize,
    stream: usize,
    dtype: &str,
    x: usize,
    x_is_float: bool,
    factor: usize,
    factor_is_float: bool,
    cast: usize,
    h: usize,
    rows: usize,
    columns: usize,
    rank: usize,
) -> PyResult<()> {
    let device = open(py, device)?;
    let call = || {
        let dtype = products(dtype)?;
        let x = rows_at("x", x, rows, columns, float_or(x_is_float, dtype))?;
        let values = rows_at("factor", factor, rank, columns, float_or(factor_is_float, dtype))?;
        let cast = rows_or_none("cast", cast, rows, columns, dtype)?;
        let h = rows_at("h", h, rows, rank, dtype)?;
        let factor = Factor { values: &values, rank, columns, transposed: false };
        let product = LoraDown { x: &x, factor: &factor, cast: cast.as_ref(), h: &h, rows };
        // SAFETY: the Python caller's to keep.
        unsafe { cuda::lora_down(device, Stream(stream), &product) }
    };
    py.detach(call).map_err(to_py)
}

/// Add `scaling · h · factor` to `y` `[rows, columns]`, or to zeros where it is 0: `out`, which may be `y`. `turned`, or 0, becomes the
/// factor `[rank, columns]` in the dtype of `h`. All are addresses, of float32 where that is said.
#[pyfunction]
#[pyo3(signature = (
    device, stream, dtype, y, y_is_float, h, factor, factor_is_float, transposed, scaling, out, out_is_float, turned, rows, columns,
    rank
))]
#[allow(clippy::too_many_arguments)] // Python's arguments
fn cuda_lora_up(
    py: Python<'_>,
    device: usize,
    stream: usize,
    dtype: &str,
    y: usize,
    y_is_float: bool,
    h: usize,
    factor: usize,
    factor_is_float: bool,
    transposed: bool,
    scaling: f32,
    out: usize,
    out_is_float: bool,
    turned: usize,
    rows: usize,
    columns: usize,
    rank: usize,
) -> PyResult<()> {
    let device = open(py, device)?;
    let call = || {
        let dtype = products(dtype)?;
        let y = rows_or_none("y", y, rows, columns, float_or(y_is_float, dtype))?;
        let h = rows_at("h", h, rows, rank, dtype)?;
        let values = rows_at("factor", factor, rank, columns, float_or(factor_is_float, dtype))?;
        let out = rows_at("out", out, rows, columns, float_or(out_is_float, dtype))?;
        let turned = rows_or_none("turned", turned, rank, columns, dtype)?;
        let factor = Factor { values: &values, rank, columns, transposed };
        let (y, turned) = (y.as_ref(), turned.as_ref());
        let product = LoraUp { y, h: &h, factor: &factor, scaling, out: &out, turned, rows };
        // SAFETY: the Python caller's to keep.
        unsafe { cuda::lora_up(device, Stream(stream), &product) }
    };
    py.detach(call).map_err(to_py)
}
