//! Products on packed weights, on memory of Python's. The caller keeps the memory alive and to itself during the call.

use half::{bf16, f16};
use pyo3::prelude::*;

use super::buffer::{Buffer, DType, RawBuffer, check_disjoint};
use super::error::to_py;
use super::{openmp, threads};
use crate::error::Result;
use crate::geometry::BlockSize;
use crate::matmul::{self, Floats, FloatsMut, Path, Scales, Weight, Workers};

/// Multiplications that take less time than it may take to get the GIL back.
const SMALL_WORK: usize = 1 << 18;

const FLOATS: [DType; 3] = [DType::F16, DType::Bf16, DType::F32];

/// Adds this room's functions to the module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(linear_4bit, m)?)?;
    m.add_function(wrap_pyfunction!(linear_4bit_backward, m)?)?;
    m.add_function(wrap_pyfunction!(matmul_path, m)?)
}

/// A packed weight as Python passes it.
struct RawWeight<'a> {
    packed: RawBuffer,
    absmax: RawBuffer,
    absmax2: Option<RawBuffer>,
    offset: f32,
    quant_type: &'a str,
    blocksize: usize,
    n: usize,
    k: usize,
}

/// The buffers of a weight.
struct Buffers {
    packed: Buffer,
    absmax: Buffer,
    absmax2: Option<Buffer>,
}

impl RawWeight<'_> {
    /// Checks the weight's memory and calls `work` with it; `out` must be apart from it and from `inputs`.
    fn with<R>(self, inputs: &[&Buffer], out: &Buffer, work: impl FnOnce(&Weight<'_>) -> Result<R>) -> Result<R> {
        let (quant_type, blocksize) = (self.quant_type.parse()?, BlockSize::new(self.blocksize)?);
        let buffers = Buffers {
            packed: Buffer::new("packed", self.packed)?,
            absmax: Buffer::new("absmax", self.absmax)?,
            absmax2: self.absmax2.map(|absmax2| Buffer::new("absmax2", absmax2)).transpose()?,
        };
        check_disjoint(inputs, &[out])?;
        check_disjoint(&[&buffers.packed, &buffers.absmax], &[out])?;
        // SAFETY: not written to, and the Python caller's to keep for the call.
        let (packed, scales) = unsafe {
            let scales = match &buffers.absmax2 {
                None => Scales::Plain(buffers.absmax.slice()?),
                Some(absmax2) => {
                    check_disjoint(&[absmax2], &[out])?;
                    Scales::Nested { codes: buffers.absmax.slice()?, absmax: absmax2.slice()?, offset: self.offset }
                }
            };
            (buffers.packed.slice()?, scales)
        };
        work(&Weight::new(packed, scales, quant_type, blocksize, self.n, self.k)?)
    }
}

/// # Safety
/// As [`Buffer::slice`].
unsafe fn floats<'a>(buffer: &Buffer) -> Result<Floats<'a>> {
    // SAFETY: the caller's.
    unsafe {
        Ok(match buffer.dtype() {
            DType::F32 => Floats::F32(buffer.slice()?),
            DType::F16 => Floats::F16(buffer.slice::<f16>()?),
            DType::Bf16 => Floats::Bf16(buffer.slice::<bf16>()?),
            DType::U8 | DType::I8 => return Err(buffer.wrong_dtype(&FLOATS)),
        })
    }
}

/// # Safety
/// As [`Buffer::slice_mut`].
unsafe fn floats_mut<'a>(buffer: &Buffer) -> Result<FloatsMut<'a>> {
    // SAFETY: the caller's.
    unsafe {
        Ok(match buffer.dtype() {
            DType::F32 => FloatsMut::F32(buffer.slice_mut()?),
            DType::F16 => FloatsMut::F16(buffer.slice_mut::<f16>()?),
            DType::Bf16 => FloatsMut::Bf16(buffer.slice_mut::<bf16>()?),
            DType::U8 | DType::I8 => return Err(buffer.wrong_dtype(&FLOATS)),
        })
    }
}

/// Runs `work` with its threads; small work on this one, and without letting go of the GIL.
fn run(
    py: Python<'_>,
    multiplications: [usize; 3],
    threads: usize,
    work: impl FnOnce(Workers<'_>) -> Result<()> + Send,
) -> PyResult<()> {
    let amount = multiplications.into_iter().fold(1usize, usize::saturating_mul);
    if amount <= SMALL_WORK {
        return work(Workers::serial()).map_err(to_py);
    }
    py.detach(|| {
        if threads <= 1 {
            return work(Workers::serial());
        }
        match openmp::parallel() {
            // SAFETY: the runtime's own function.
            Some(parallel) => work(unsafe { Workers::open_mp(parallel, threads) }),
            None => work(Workers::new(&*threads::pool()?, threads)),
        }
    })
    .map_err(to_py)
}

/// `out[m, n] = x[m, k] · weight[n, k]ᵀ + bias[n]`.
#[pyfunction]
#[pyo3(signature = (x, packed, absmax, bias, out, m, n, k, quant_type, blocksize, compute_dtype, threads, absmax2 = None, offset = 0.0))]
#[allow(clippy::too_many_arguments, reason = "a product has that many")]
fn linear_4bit(
    py: Python<'_>,
    x: RawBuffer,
    packed: RawBuffer,
    absmax: RawBuffer,
    bias: Option<RawBuffer>,
    out: RawBuffer,
    m: usize,
    n: usize,
    k: usize,
    quant_type: &str,
    blocksize: usize,
    compute_dtype: &str,
    threads: usize,
    absmax2: Option<RawBuffer>,
    offset: f32,
) -> PyResult<()> {
    let weight = RawWeight { packed, absmax, absmax2, offset, quant_type, blocksize, n, k };
    run(py, [m, n, k], threads, |workers| {
        let (x, out) = (Buffer::new("x", x)?, Buffer::new("out", out)?);
        let bias = bias.map(|bias| Buffer::new("bias", bias)).transpose()?;
        let compute = compute_dtype.parse()?;
        let inputs = [&x, bias.as_ref().unwrap_or(&x)];
        weight.with(&inputs, &out, |weight| {
            // SAFETY: `out` is apart from all others, and all are the Python caller's to keep for the call.
            let (x, bias, out) =
                unsafe { (floats(&x)?, bias.as_ref().map(|bias| floats(bias)).transpose()?, floats_mut(&out)?) };
            matmul::linear(Path::active()?, workers, m, x, weight, bias, out, compute)
        })
    })
}

/// `out[m, k] = grad[m, n] · weight[n, k]`.
#[pyfunction]
#[pyo3(signature = (grad, packed, absmax, out, m, n, k, quant_type, blocksize, compute_dtype, threads, absmax2 = None, offset = 0.0))]
#[allow(clippy::too_many_arguments, reason = "a product has that many")]
fn linear_4bit_backward(
    py: Python<'_>,
    grad: RawBuffer,
    packed: RawBuffer,
    absmax: RawBuffer,
    out: RawBuffer,
    m: usize,
    n: usize,
    k: usize,
    quant_type: &str,
    blocksize: usize,
    compute_dtype: &str,
    threads: usize,
    absmax2: Option<RawBuffer>,
    offset: f32,
) -> PyResult<()> {
    let weight = RawWeight { packed, absmax, absmax2, offset, quant_type, blocksize, n, k };
    run(py, [m, n, k], threads, |workers| {
        let (grad, out) = (Buffer::new("grad", grad)?, Buffer::new("out", out)?);
        let compute = compute_dtype.parse()?;
        weight.with(&[&grad], &out, |weight| {
            // SAFETY: `out` is apart from all others, and all are the Python caller's to keep for the call.
            let (grad, out) = unsafe { (floats(&grad)?, floats_mut(&out)?) };
            matmul::linear_backward(Path::active()?, workers, m, grad, weight, out, compute)
        })
    })
}

/// The instructions that products use.
#[pyfunction]
fn matmul_path() -> PyResult<&'static str> {
    Path::active().map(Path::as_str).map_err(to_py)
}
