//! The kernels on device memory of Python's. The caller keeps the memory alive until the stream has come past the call.
//! The GIL is released meanwhile: opening a device and loading kernels take long, and a launch waits where too many are
//! on their way.

use halfbyte::dtype::DType;
use halfbyte::error::{Error, Result};
use halfbyte::geometry::BlockSize;
use halfbyte_cuda::{self as cuda, Device, Gemm4bit, Memory, QuantizedAbsmax, Scales, Stream, Table, Variant};
use halfbyte_cuda::{driver, kernels};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::buffer::RawBuffer;
use super::error::to_py;

/// Adds this room's functions to the module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    cuda::listen(log_warning);
    m.add_function(wrap_pyfunction!(cuda_driver_version, m)?)?;
    m.add_function(wrap_pyfunction!(cuda_device_count, m)?)?;
    m.add_function(wrap_pyfunction!(cuda_device_memory, m)?)?;
    m.add_function(wrap_pyfunction!(cuda_device, m)?)?;
    m.add_function(wrap_pyfunction!(cuda_kernels, m)?)?;
    m.add_function(wrap_pyfunction!(cuda_kernel_form, m)?)?;
    m.add_function(wrap_pyfunction!(cuda_kernel_ptx, m)?)?;
    m.add_function(wrap_pyfunction!(cuda_prepare, m)?)?;
    m.add_function(wrap_pyfunction!(cuda_quantize_4bit, m)?)?;
    m.add_function(wrap_pyfunction!(cuda_dequantize_4bit, m)?)?;
    m.add_function(wrap_pyfunction!(cuda_compress_workspace, m)?)?;
    m.add_function(wrap_pyfunction!(cuda_compress_absmax, m)?)?;
    m.add_function(wrap_pyfunction!(cuda_quantize_4bit_nested, m)?)?;
    m.add_function(wrap_pyfunction!(cuda_expand_absmax, m)?)?;
    m.add_function(wrap_pyfunction!(cuda_embedding_4bit, m)?)?;
    m.add_function(wrap_pyfunction!(cuda_quantize_8bit, m)?)?;
    m.add_function(wrap_pyfunction!(cuda_dequantize_8bit, m)?)?;
    m.add_function(wrap_pyfunction!(cuda_quantize_rows, m)?)?;
    m.add_function(wrap_pyfunction!(cuda_dequantize_rows, m)?)?;
    m.add_function(wrap_pyfunction!(cuda_matmul_4bit, m)?)
}

/// The CUDA version that the driver supports.
#[pyfunction]
fn cuda_driver_version(py: Python<'_>) -> PyResult<(i32, i32)> {
    py.detach(driver::supported_cuda).map_err(to_py)
}

/// The number of visible devices.
#[pyfunction]
fn cuda_device_count(py: Python<'_>) -> PyResult<usize> {
    py.detach(driver::device_count).map_err(to_py)
}

/// Bytes of memory that a device has.
#[pyfunction]
fn cuda_device_memory(py: Python<'_>, device: usize) -> PyResult<usize> {
    py.detach(|| driver::device_memory(device)).map_err(to_py)
}

/// Name, compute capability, multiprocessors and shared memory per block of a device.
#[pyfunction]
fn cuda_device(py: Python<'_>, device: usize) -> PyResult<(String, (i32, i32), u32, u32)> {
    let device = open(py, device)?;
    let capability = device.capability();
    let shared = device.shared_per_block();
    Ok((device.name().to_owned(), (capability.0, capability.1), device.multiprocessors(), shared))
}

/// A warning of `logging`, in whatever thread; none when Python is ending.
fn log_warning(text: &str) {
    // A handler that fails must not fail the kernel's launch: logging says on stderr what was wrong with it.
    Python::try_attach(|py| -> PyResult<()> {
        let logger =
            py.import(intern!(py, "logging"))?.call_method1(intern!(py, "getLogger"), ("halfbyte.backends.cuda",))?;
        logger.call_method1(intern!(py, "warning"), ("%s", text)).map(|_| ())
    });
}

/// The names of the kernels that this build has.
#[pyfunction]
fn cuda_kernels() -> Vec<&'static str> {
    kernels::ALL.iter().filter(|kernel| kernel.is_built()).map(|kernel| kernel.name).collect()
}

/// In which form kernels are loaded on a device: "cubin" or "ptx".
#[pyfunction]
fn cuda_kernel_form(py: Python<'_>, device: usize) -> PyResult<&'static str> {
    // The smallest that every device takes.
    py.detach(|| Device::get(device)?.load(&kernels::DEQUANTIZE_ABSMAX)).map(cuda::Form::as_str).map_err(to_py)
}

/// The PTX of a kernel for a compute capability, without a zero at its end.
#[pyfunction]
fn cuda_kernel_ptx<'py>(py: Python<'py>, kernel: &str, capability: (i32, i32)) -> PyResult<Bound<'py, PyBytes>> {
    let of = |name: &str| kernels::ALL.iter().find(|k| k.name == name && k.is_built());
    let found = of(kernel).ok_or_else(|| {
        let expected = "the name of a kernel that this build has (cuda_kernels)";
        to_py(Error::argument("kernel", format!("{kernel:?}"), expected))
    })?;
    let image = found.image(cuda::Form::Ptx, cuda::Capability(capability.0, capability.1));
    let image = image.ok_or_else(|| {
        to_py(Error::argument("capability", format!("{capability:?}"), "one that the kernel is compiled for"))
    })?;
    let code = image.code().map_err(|why| to_py(Error::cuda(format!("kernel {kernel}"), format!("its PTX {why}"))))?;
    Ok(PyBytes::new(py, code.strip_suffix(b"\0").unwrap_or(code)))
}

/// Load every kernel that the device takes.
#[pyfunction]
fn cuda_prepare(py: Python<'_>, device: usize) -> PyResult<()> {
    py.detach(|| {
        let device = Device::get(device)?;
        let wanted = |k: &&&kernels::Kernel| k.is_built() && !k.for_tests && k.suits(device.capability());
        kernels::ALL.iter().filter(wanted).try_for_each(|kernel| device.load(kernel).map(|_| ()))
    })
    .map_err(to_py)
}

/// The device; its kernels are loaded when they are launched.
pub(super) fn open(py: Python<'_>, ordinal: usize) -> PyResult<&'static Device> {
    match Device::ready(ordinal) {
        Some(device) => Ok(device),
        None => py.detach(|| Device::get(ordinal)).map_err(to_py),
    }
}

pub(super) fn memory(argument: &'static str, (address, count, dtype): RawBuffer) -> Result<Memory> {
    let Some(dtype) = DType::ALL.into_iter().find(|d| d.as_str() == dtype) else {
        return Err(Error::dtype(argument, dtype, &DType::ALL));
    };
    Memory::new(argument, address, count, dtype)
}

fn scales(absmax: RawBuffer, absmax2: Option<RawBuffer>, offset: Option<RawBuffer>) -> Result<Scales> {
    let absmax = memory("absmax", absmax)?;
    match (absmax2, offset) {
        (None, None) => Ok(Scales::Plain(absmax)),
        (Some(absmax2), Some(offset)) => Ok(Scales::Nested {
            codes: absmax,
            absmax2: memory("absmax2", absmax2)?,
            offset: memory("offset", offset)?,
        }),
        (None, Some(_)) => Err(Error::argument("absmax2", "None", "given together with offset")),
        (Some(_), None) => Err(Error::argument("offset", "None", "given together with absmax2")),
    }
}

fn variant(reference: bool) -> Variant {
    if reference { Variant::Reference } else { Variant::Fast }
}

/// Quantize `input` to 4 bits.
#[pyfunction]
#[pyo3(signature = (device, stream, input, packed, absmax, quant_type, blocksize, reference=false))]
#[allow(clippy::too_many_arguments)] // Python's arguments
fn cuda_quantize_4bit(
    py: Python<'_>,
    device: usize,
    stream: usize,
    input: RawBuffer,
    packed: RawBuffer,
    absmax: RawBuffer,
    quant_type: &str,
    blocksize: usize,
    reference: bool,
) -> PyResult<()> {
    let check = || {
        let (input, packed, absmax) = (memory("input", input)?, memory("packed", packed)?, memory("absmax", absmax)?);
        Ok((input, packed, absmax, quant_type.parse()?, BlockSize::new(blocksize)?))
    };
    let (input, packed, absmax, quant_type, blocksize) = check().map_err(to_py)?;
    let device = open(py, device)?;
    // SAFETY: the Python caller's to keep.
    py.detach(|| unsafe {
        cuda::quantize(device, Stream(stream), &input, &packed, &absmax, quant_type, blocksize, variant(reference))
    })
    .map_err(to_py)
}

/// Read 4-bit codes back into `out`.
#[pyfunction]
#[pyo3(signature = (device, stream, packed, absmax, absmax2, offset, out, quant_type, blocksize, reference=false))]
#[allow(clippy::too_many_arguments)] // Python's arguments
fn cuda_dequantize_4bit(
    py: Python<'_>,
    device: usize,
    stream: usize,
    packed: RawBuffer,
    absmax: RawBuffer,
    absmax2: Option<RawBuffer>,
    offset: Option<RawBuffer>,
    out: RawBuffer,
    quant_type: &str,
    blocksize: usize,
    reference: bool,
) -> PyResult<()> {
    let check = || {
        let (packed, out) = (memory("packed", packed)?, memory("out", out)?);
        Ok((packed, scales(absmax, absmax2, offset)?, out, quant_type.parse()?, BlockSize::new(blocksize)?))
    };
    let (packed, scales, out, quant_type, blocksize) = check().map_err(to_py)?;
    let device = open(py, device)?;
    // SAFETY: the Python caller's to keep.
    py.detach(|| unsafe {
        cuda::dequantize(device, Stream(stream), &packed, &scales, &out, quant_type, blocksize, variant(reference))
    })
    .map_err(to_py)
}

/// How many float64 `cuda_compress_absmax` needs to work with.
#[pyfunction]
fn cuda_compress_workspace(scales: usize) -> usize {
    cuda::quantize_absmax_workspace(scales)
}

/// Quantize scales to 8 bits.
#[pyfunction]
#[allow(clippy::too_many_arguments)] // Python's arguments
fn cuda_compress_absmax(
    py: Python<'_>,
    device: usize,
    stream: usize,
    absmax: RawBuffer,
    codes: RawBuffer,
    absmax2: RawBuffer,
    offset: RawBuffer,
    workspace: RawBuffer,
) -> PyResult<()> {
    let check = || {
        let (absmax, codes, absmax2) =
            (memory("absmax", absmax)?, memory("codes", codes)?, memory("absmax2", absmax2)?);
        Ok((absmax, codes, absmax2, memory("offset", offset)?, memory("workspace", workspace)?))
    };
    let (absmax, codes, absmax2, offset, workspace) = check().map_err(to_py)?;
    let out = QuantizedAbsmax { codes: &codes, absmax2: &absmax2, offset: &offset, workspace: &workspace };
    let device = open(py, device)?;
    // SAFETY: the Python caller's to keep.
    py.detach(|| unsafe { cuda::quantize_absmax(device, Stream(stream), &absmax, &out) }).map_err(to_py)
}

/// Quantize `input` to 4 bits and its scales to 8 bits.
#[pyfunction]
#[allow(clippy::too_many_arguments)] // Python's arguments
fn cuda_quantize_4bit_nested(
    py: Python<'_>,
    device: usize,
    stream: usize,
    input: RawBuffer,
    packed: RawBuffer,
    absmax_scratch: RawBuffer,
    codes: RawBuffer,
    absmax2: RawBuffer,
    offset: RawBuffer,
    workspace: RawBuffer,
    quant_type: &str,
    blocksize: usize,
) -> PyResult<()> {
    let check = || {
        let (input, packed, scratch) =
            (memory("input", input)?, memory("packed", packed)?, memory("absmax_scratch", absmax_scratch)?);
        let (codes, absmax2) = (memory("codes", codes)?, memory("absmax2", absmax2)?);
        let (offset, workspace) = (memory("offset", offset)?, memory("workspace", workspace)?);
        Ok((
            (input, packed, scratch),
            (codes, absmax2, offset, workspace),
            quant_type.parse()?,
            BlockSize::new(blocksize)?,
        ))
    };
    let ((input, packed, scratch), out, quant_type, blocksize) = check().map_err(to_py)?;
    let out = QuantizedAbsmax { codes: &out.0, absmax2: &out.1, offset: &out.2, workspace: &out.3 };
    let device = open(py, device)?;
    // SAFETY: the Python caller's to keep.
    py.detach(|| unsafe {
        cuda::quantize_nested(device, Stream(stream), &input, &packed, &scratch, &out, quant_type, blocksize)
    })
    .map_err(to_py)
}

/// Read doubly quantized scales back into float32 `out`.
#[pyfunction]
#[pyo3(signature = (device, stream, codes, absmax2, offset, out, reference=false))]
#[allow(clippy::too_many_arguments)] // Python's arguments
fn cuda_expand_absmax(
    py: Python<'_>,
    device: usize,
    stream: usize,
    codes: RawBuffer,
    absmax2: RawBuffer,
    offset: RawBuffer,
    out: RawBuffer,
    reference: bool,
) -> PyResult<()> {
    let check = || {
        let (codes, absmax2) = (memory("codes", codes)?, memory("absmax2", absmax2)?);
        Ok((codes, absmax2, memory("offset", offset)?, memory("out", out)?))
    };
    let (codes, absmax2, offset, out) = check().map_err(to_py)?;
    let device = open(py, device)?;
    // SAFETY: the Python caller's to keep.
    py.detach(|| unsafe {
        cuda::dequantize_absmax(device, Stream(stream), &codes, &absmax2, &offset, &out, variant(reference))
    })
    .map_err(to_py)
}

/// Read rows of a packed table into `out`.
#[pyfunction]
#[pyo3(signature = (
    device, stream, indices, packed, absmax, absmax2, offset, out, rows, columns, quant_type, blocksize, reference=false
))]
#[allow(clippy::too_many_arguments)] // Python's arguments
fn cuda_embedding_4bit(
    py: Python<'_>,
    device: usize,
    stream: usize,
    indices: RawBuffer,
    packed: RawBuffer,
    absmax: RawBuffer,
    absmax2: Option<RawBuffer>,
    offset: Option<RawBuffer>,
    out: RawBuffer,
    rows: usize,
    columns: usize,
    quant_type: &str,
    blocksize: usize,
    reference: bool,
) -> PyResult<()> {
    let check = || {
        let (indices, packed, out) = (memory("indices", indices)?, memory("packed", packed)?, memory("out", out)?);
        let scales = scales(absmax, absmax2, offset)?;
        Ok((indices, packed, scales, out, quant_type.parse()?, BlockSize::new(blocksize)?))
    };
    let (indices, packed, scales, out, quant_type, blocksize) = check().map_err(to_py)?;
    let device = open(py, device)?;
    let table = Table { packed: &packed, scales: &scales, rows, columns, quant_type, blocksize };
    // SAFETY: the Python caller's to keep.
    py.detach(|| unsafe { cuda::embedding(device, Stream(stream), &indices, &table, &out, variant(reference)) })
        .map_err(to_py)
}

/// Quantize `input` to 8 bits with the map `code`.
#[pyfunction]
#[pyo3(signature = (device, stream, input, code, codes, absmax, blocksize, reference=false))]
#[allow(clippy::too_many_arguments)] // Python's arguments
fn cuda_quantize_8bit(
    py: Python<'_>,
    device: usize,
    stream: usize,
    input: RawBuffer,
    code: RawBuffer,
    codes: RawBuffer,
    absmax: RawBuffer,
    blocksize: usize,
    reference: bool,
) -> PyResult<()> {
    let check = || {
        let (input, code) = (memory("input", input)?, memory("code", code)?);
        Ok((input, code, memory("codes", codes)?, memory("absmax", absmax)?))
    };
    let (input, code, codes, absmax) = check().map_err(to_py)?;
    let device = open(py, device)?;
    // SAFETY: the Python caller's to keep.
    py.detach(|| unsafe {
        cuda::quantize_8bit(device, Stream(stream), &input, &code, &codes, &absmax, blocksize, variant(reference))
    })
    .map_err(to_py)
}

/// Read 8-bit codes back into `out`.
#[pyfunction]
#[pyo3(signature = (device, stream, codes, absmax, code, out, blocksize, reference=false))]
#[allow(clippy::too_many_arguments)] // Python's arguments
fn cuda_dequantize_8bit(
    py: Python<'_>,
    device: usize,
    stream: usize,
    codes: RawBuffer,
    absmax: RawBuffer,
    code: RawBuffer,
    out: RawBuffer,
    blocksize: usize,
    reference: bool,
) -> PyResult<()> {
    let check = || {
        let (codes, absmax) = (memory("codes", codes)?, memory("absmax", absmax)?);
        Ok((codes, absmax, memory("code", code)?, memory("out", out)?))
    };
    let (codes, absmax, code, out) = check().map_err(to_py)?;
    let device = open(py, device)?;
    // SAFETY: the Python caller's to keep.
    py.detach(|| unsafe {
        cuda::dequantize_8bit(device, Stream(stream), &codes, &absmax, &code, &out, blocksize, variant(reference))
    })
    .map_err(to_py)
}

/// Quantize rows to 8 bits, each by its largest magnitude.
#[pyfunction]
#[pyo3(signature = (device, stream, input, codes, scales, rows, columns, reference=false))]
#[allow(clippy::too_many_arguments)] // Python's arguments
fn cuda_quantize_rows(
    py: Python<'_>,
    device: usize,
    stream: usize,
    input: RawBuffer,
    codes: RawBuffer,
    scales: RawBuffer,
    rows: usize,
    columns: usize,
    reference: bool,
) -> PyResult<()> {
    let check = || Ok((memory("input", input)?, memory("codes", codes)?, memory("scales", scales)?));
    let (input, codes, scales) = check().map_err(to_py)?;
    let device = open(py, device)?;
    // SAFETY: the Python caller's to keep.
    py.detach(|| unsafe {
        cuda::quantize_rows(device, Stream(stream), &input, &codes, &scales, rows, columns, variant(reference))
    })
    .map_err(to_py)
}

/// Read 8-bit rows back into `out`.
#[pyfunction]
#[pyo3(signature = (device, stream, codes, scales, out, rows, columns, reference=false))]
#[allow(clippy::too_many_arguments)] // Python's arguments
fn cuda_dequantize_rows(
    py: Python<'_>,
    device: usize,
    stream: usize,
    codes: RawBuffer,
    scales: RawBuffer,
    out: RawBuffer,
    rows: usize,
    columns: usize,
    reference: bool,
) -> PyResult<()> {
    let check = || Ok((memory("codes", codes)?, memory("scales", scales)?, memory("out", out)?));
    let (codes, scales, out) = check().map_err(to_py)?;
    let device = open(py, device)?;
    // SAFETY: the Python caller's to keep.
    py.detach(|| unsafe {
        cuda::dequantize_rows(device, Stream(stream), &codes, &scales, &out, rows, columns, variant(reference))
    })
    .map_err(to_py)
}

/// `y = x · Wᵀ + bias`; gives the name of the kernel that was used.
#[pyfunction]
#[pyo3(signature = (
    device, stream, x, packed, absmax, absmax2, offset, bias, y, m, n, k, quant_type, blocksize, kernel="best",
    workspace=None
))]
#[allow(clippy::too_many_arguments)] // Python's arguments
fn cuda_matmul_4bit(
    py: Python<'_>,
    device: usize,
    stream: usize,
    x: RawBuffer,
    packed: RawBuffer,
    absmax: RawBuffer,
    absmax2: Option<RawBuffer>,
    offset: Option<RawBuffer>,
    bias: Option<RawBuffer>,
    y: RawBuffer,
    m: usize,
    n: usize,
    k: usize,
    quant_type: &str,
    blocksize: usize,
    kernel: &str,
    workspace: Option<RawBuffer>,
) -> PyResult<&'static str> {
    let workspace = workspace.map(|workspace| memory("workspace", workspace)).transpose().map_err(to_py)?;
    let check = || {
        let (x, packed, y) = (memory("x", x)?, memory("packed", packed)?, memory("y", y)?);
        let bias = bias.map(|bias| memory("bias", bias)).transpose()?;
        let scales = scales(absmax, absmax2, offset)?;
        Ok((x, packed, scales, bias, y, quant_type.parse()?, BlockSize::new(blocksize)?, kernel.parse()?))
    };
    let (x, packed, scales, bias, y, quant_type, blocksize, kernel) = check().map_err(to_py)?;
    let device = open(py, device)?;
    let product = Gemm4bit {
        x: &x,
        packed: &packed,
        scales: &scales,
        bias: bias.as_ref(),
        y: &y,
        m,
        n,
        k,
        quant_type,
        blocksize,
        workspace: workspace.as_ref(),
    };
    // SAFETY: the Python caller's to keep.
    py.detach(|| unsafe { cuda::gemm_4bit(device, Stream(stream), &product, kernel) }).map_err(to_py)
}
