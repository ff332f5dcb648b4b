//! The products of LoRA adapters on device memory of Python's.

use halfbyte_cuda::{self as cuda, Factor, Stream};
use pyo3::prelude::*;

use super::buffer::RawBuffer;
use super::cuda::{memory, open};
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

/// Multiply `x` `[rows, columns]` by a factor `[rank, columns]`: `h` `[rows, rank]`; `cast` becomes `x` in the dtype of `h`.
#[pyfunction]
#[pyo3(signature = (device, stream, x, factor, cast, h, rows, columns, rank))]
#[allow(clippy::too_many_arguments)] // Python's arguments
fn cuda_lora_down(
    py: Python<'_>,
    device: usize,
    stream: usize,
    x: RawBuffer,
    factor: RawBuffer,
    cast: Option<RawBuffer>,
    h: RawBuffer,
    rows: usize,
    columns: usize,
    rank: usize,
) -> PyResult<()> {
    let check = || {
        let cast = cast.map(|cast| memory("cast", cast)).transpose()?;
        Ok((memory("x", x)?, memory("factor", factor)?, cast, memory("h", h)?))
    };
    let (x, values, cast, h) = check().map_err(to_py)?;
    let device = open(py, device)?;
    let factor = Factor { values: &values, rank, columns, transposed: false };
    // SAFETY: the Python caller's to keep.
    py.detach(|| unsafe { cuda::lora_down(device, Stream(stream), &x, &factor, cast.as_ref(), &h, rows) })
        .map_err(to_py)
}

/// Add `scaling · h · factor` to `y` `[rows, columns]`, or to zeros: `out`, which may be `y`. `turned` becomes the factor
/// `[rank, columns]` in the dtype of `h`.
#[pyfunction]
#[pyo3(signature = (device, stream, y, h, factor, transposed, scaling, out, turned, rows, columns, rank))]
#[allow(clippy::too_many_arguments)] // Python's arguments
fn cuda_lora_up(
    py: Python<'_>,
    device: usize,
    stream: usize,
    y: Option<RawBuffer>,
    h: RawBuffer,
    factor: RawBuffer,
    transposed: bool,
    scaling: f32,
    out: RawBuffer,
    turned: Option<RawBuffer>,
    rows: usize,
    columns: usize,
    rank: usize,
) -> PyResult<()> {
    let check = || {
        let y = y.map(|y| memory("y", y)).transpose()?;
        let turned = turned.map(|turned| memory("turned", turned)).transpose()?;
        Ok((y, memory("h", h)?, memory("factor", factor)?, memory("out", out)?, turned))
    };
    let (y, h, values, out, turned) = check().map_err(to_py)?;
    let device = open(py, device)?;
    let factor = Factor { values: &values, rank, columns, transposed };
    // SAFETY: the Python caller's to keep.
    py.detach(|| unsafe {
        cuda::lora_up(device, Stream(stream), y.as_ref(), &h, &factor, scaling, &out, turned.as_ref(), rows)
    })
    .map_err(to_py)
}
