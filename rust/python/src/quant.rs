//! The arithmetic on memory of Python's. The caller keeps the memory alive and to itself during the call; the GIL is
//! released meanwhile.

use half::{bf16, f16};
use halfbyte::codebook::QuantType;
use halfbyte::dtype::{DType, Element};
use halfbyte::error::{Error, Result};
use halfbyte::geometry::BlockSize;
use halfbyte::quant::blockwise4::{self, TASK};
use halfbyte::quant::blockwise8::{self, ByteMap};
use halfbyte::quant::{Finite, absmax};
use halfbyte::simd::Simd;
use pyo3::prelude::*;

use super::buffer::{Buffer, Plain, RawBuffer, check_disjoint};
use super::error::to_py;
use super::threads;

/// Adds this room's functions to the module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(quantize_4bit, m)?)?;
    m.add_function(wrap_pyfunction!(dequantize_4bit, m)?)?;
    m.add_function(wrap_pyfunction!(quantize_8bit, m)?)?;
    m.add_function(wrap_pyfunction!(dequantize_8bit, m)?)?;
    m.add_function(wrap_pyfunction!(compress_absmax, m)?)?;
    m.add_function(wrap_pyfunction!(expand_absmax, m)?)?;
    m.add_function(wrap_pyfunction!(codebook, m)?)?;
    m.add_function(wrap_pyfunction!(quant_map, m)?)?;
    m.add_function(wrap_pyfunction!(dynamic_map, m)?)?;
    m.add_function(wrap_pyfunction!(simd, m)?)?;
    m.add_function(wrap_pyfunction!(cpu_features, m)?)?;
    m.add_function(wrap_pyfunction!(set_threads, m)?)?;
    m.add_function(wrap_pyfunction!(follow_threads, m)?)?;
    m.add_function(wrap_pyfunction!(get_threads, m)?)
}

/// Quantize `input` to 4 bits. False when it holds NaN or an infinity.
#[pyfunction]
fn quantize_4bit(
    py: Python<'_>,
    input: RawBuffer,
    packed: RawBuffer,
    absmax: RawBuffer,
    quant_type: &str,
    blocksize: usize,
) -> PyResult<bool> {
    let quant_type = quant_type.parse().map_err(to_py)?;
    py.detach(|| {
        let (input, packed, absmax) = (buffer("input", input)?, buffer("packed", packed)?, buffer("absmax", absmax)?);
        let blocksize = BlockSize::new(blocksize)?;
        match input.dtype() {
            DType::F32 => quantize::<f32>(&input, &packed, &absmax, quant_type, blocksize),
            DType::F16 => quantize::<f16>(&input, &packed, &absmax, quant_type, blocksize),
            DType::Bf16 => quantize::<bf16>(&input, &packed, &absmax, quant_type, blocksize),
            _ => Err(input.wrong_dtype(&DType::FLOATS)),
        }
    })
    .map_err(to_py)
}

fn quantize<T: Element + Plain>(
    input: &Buffer,
    packed: &Buffer,
    absmax: &Buffer,
    quant_type: QuantType,
    blocksize: BlockSize,
) -> Result<bool> {
    check_disjoint(&[input], &[packed, absmax])?;
    // SAFETY: disjoint, and the Python caller's to keep for the call.
    let (input, packed, absmax) = unsafe { (input.slice::<T>()?, packed.slice_mut()?, absmax.slice_mut()?) };
    let finite = in_parallel(input.len(), TASK, || blockwise4::quantize(input, quant_type, blocksize, packed, absmax))?;
    Ok(finite == Finite::AllFinite)
}

/// Read 4-bit codes back into `out`.
#[pyfunction]
fn dequantize_4bit(
    py: Python<'_>,
    packed: RawBuffer,
    absmax: RawBuffer,
    out: RawBuffer,
    quant_type: &str,
    blocksize: usize,
) -> PyResult<()> {
    let quant_type = quant_type.parse().map_err(to_py)?;
    py.detach(|| {
        let (packed, absmax, out) = (buffer("packed", packed)?, buffer("absmax", absmax)?, buffer("out", out)?);
        let blocksize = BlockSize::new(blocksize)?;
        match out.dtype() {
            DType::F32 => dequantize::<f32>(&packed, &absmax, &out, quant_type, blocksize),
            DType::F16 => dequantize::<f16>(&packed, &absmax, &out, quant_type, blocksize),
            DType::Bf16 => dequantize::<bf16>(&packed, &absmax, &out, quant_type, blocksize),
            _ => Err(out.wrong_dtype(&DType::FLOATS)),
        }
    })
    .map_err(to_py)
}

fn dequantize<T: Element + Plain>(
    packed: &Buffer,
    absmax: &Buffer,
    out: &Buffer,
    quant_type: QuantType,
    blocksize: BlockSize,
) -> Result<()> {
    check_disjoint(&[packed, absmax], &[out])?;
    // SAFETY: disjoint, and the Python caller's to keep for the call.
    let (packed, absmax, out) = unsafe { (packed.slice()?, absmax.slice()?, out.slice_mut::<T>()?) };
    in_parallel(out.len(), TASK, || blockwise4::dequantize(packed, absmax, quant_type, blocksize, out))
}

/// Quantize float32 values to 8 bits with an ascending map of 256 values.
#[pyfunction]
fn quantize_8bit(
    py: Python<'_>,
    input: RawBuffer,
    map: RawBuffer,
    codes: RawBuffer,
    absmax: RawBuffer,
    blocksize: usize,
) -> PyResult<()> {
    py.detach(|| {
        let (input, map) = (buffer("input", input)?, buffer("map", map)?);
        let (codes, absmax) = (buffer("codes", codes)?, buffer("absmax", absmax)?);
        check_disjoint(&[&input, &map], &[&codes, &absmax])?;
        let map = ByteMap::new(&map_values(&map)?)?;
        // SAFETY: disjoint, and the Python caller's to keep for the call.
        let (input, codes, absmax) = unsafe { (input.slice()?, codes.slice_mut()?, absmax.slice_mut()?) };
        let blocksize = BlockSize::new(blocksize)?;
        let work = || blockwise8::quantize_8bit(input, &map, blocksize, codes, absmax);
        in_parallel(input.len(), blockwise8::TASK, work)
    })
    .map_err(to_py)
}

/// Read 8-bit codes back into float32 `out`.
#[pyfunction]
fn dequantize_8bit(
    py: Python<'_>,
    codes: RawBuffer,
    absmax: RawBuffer,
    map: RawBuffer,
    out: RawBuffer,
    blocksize: usize,
) -> PyResult<()> {
    py.detach(|| {
        let (codes, absmax) = (buffer("codes", codes)?, buffer("absmax", absmax)?);
        let (map, out) = (buffer("map", map)?, buffer("out", out)?);
        check_disjoint(&[&codes, &absmax, &map], &[&out])?;
        let map = map_values(&map)?;
        // SAFETY: disjoint, and the Python caller's to keep for the call.
        let (codes, absmax, out) = unsafe { (codes.slice()?, absmax.slice()?, out.slice_mut()?) };
        let blocksize = BlockSize::new(blocksize)?;
        let work = || blockwise8::dequantize_8bit(codes, absmax, &map, blocksize, out);
        in_parallel(codes.len(), blockwise8::TASK, work)
    })
    .map_err(to_py)
}

fn map_values(map: &Buffer) -> Result<[f32; 256]> {
    // SAFETY: the Python caller's to keep for the call; copied at once.
    let values: &[f32] = unsafe { map.slice()? };
    values.try_into().map_err(|_| Error::argument("map", map.count(), "256 elements long"))
}

/// Quantize float32 scales to 8 bits; gives the offset.
#[pyfunction]
fn compress_absmax(py: Python<'_>, absmax: RawBuffer, codes: RawBuffer, absmax2: RawBuffer) -> PyResult<f32> {
    py.detach(|| {
        let (absmax, codes) = (buffer("absmax", absmax)?, buffer("codes", codes)?);
        let absmax2 = buffer("absmax2", absmax2)?;
        check_disjoint(&[&absmax], &[&codes, &absmax2])?;
        // SAFETY: disjoint, and the Python caller's to keep for the call.
        let (absmax, codes, absmax2) = unsafe { (absmax.slice()?, codes.slice_mut()?, absmax2.slice_mut()?) };
        in_parallel(absmax.len(), absmax::TASK, || absmax::quantize_absmax_into(absmax, codes, absmax2))
    })
    .map_err(to_py)
}

/// Read doubly quantized scales back into float32 `out`.
#[pyfunction]
fn expand_absmax(py: Python<'_>, codes: RawBuffer, absmax2: RawBuffer, offset: f32, out: RawBuffer) -> PyResult<()> {
    py.detach(|| {
        let (codes, absmax2, out) = (buffer("codes", codes)?, buffer("absmax2", absmax2)?, buffer("out", out)?);
        check_disjoint(&[&codes, &absmax2], &[&out])?;
        // SAFETY: disjoint, and the Python caller's to keep for the call.
        let (codes, absmax2, out) = unsafe { (codes.slice()?, absmax2.slice()?, out.slice_mut()?) };
        in_parallel(codes.len(), blockwise8::TASK, || absmax::dequantize_absmax(codes, absmax2, offset, out))
    })
    .map_err(to_py)
}

/// The value of each 4-bit code.
#[pyfunction]
fn codebook(quant_type: &str) -> PyResult<[f32; 16]> {
    quant_type.parse().map(|t: QuantType| *t.values()).map_err(to_py)
}

/// The codebook as it is stored beside a weight: without a negative zero.
#[pyfunction]
fn quant_map(quant_type: &str) -> PyResult<[f32; 16]> {
    quant_type.parse().map(QuantType::quant_map).map_err(to_py)
}

/// The value of each 8-bit code of doubly quantized scales.
#[pyfunction]
fn dynamic_map() -> Vec<f32> {
    halfbyte::codebook::dynamic_map().to_vec()
}

/// The instructions in use.
#[pyfunction]
fn simd() -> PyResult<&'static str> {
    Simd::active().map(Simd::as_str).map_err(to_py)
}

/// What this processor has of the instructions that matter here.
#[pyfunction]
fn cpu_features() -> Vec<&'static str> {
    #[allow(unused_mut, reason = "on other processors nothing is looked for")]
    let mut features = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! detect {
            ($($name:tt),*) => { $(if is_x86_feature_detected!($name) { features.push($name) })* };
        }
        detect!("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512vbmi", "avx512vnni", "avx512bf16");
    }
    features
}

/// Use this many threads from now on.
#[pyfunction]
fn set_threads(threads: usize) -> PyResult<()> {
    threads::set_threads(threads).map_err(to_py)
}

/// Use as many threads as torch, whose number this is, until it changes.
#[pyfunction]
fn follow_threads(threads: usize) -> PyResult<()> {
    threads::follow(threads).map_err(to_py)
}

/// How many threads are used.
#[pyfunction]
fn get_threads() -> PyResult<usize> {
    Ok(threads::pool().map_err(to_py)?.current_num_threads())
}

fn buffer(argument: &'static str, raw: RawBuffer) -> Result<Buffer> {
    Buffer::new(argument, raw)
}

/// Runs work on `n` values on the pool, or here when there is only one task of it; `task` is the values of a task.
pub(super) fn in_parallel<R: Send>(n: usize, task: usize, work: impl FnOnce() -> Result<R> + Send) -> Result<R> {
    if n <= task { work() } else { threads::pool()?.install(work) }
}
