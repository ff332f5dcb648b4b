//! Rows to 8 bits and back: the arithmetic of [`halfbyte::quant::int8_rowwise`], bit for bit.

use halfbyte::dtype::DType;
use halfbyte::error::{Error, Result};
use halfbyte::geometry::element_count;

use super::driver::{Device, Stream};
use super::kernels;
use super::launch::{Variant, parameters};
use super::memory::Memory;

const WARPS: u64 = kernels::int8_rowwise::WARPS as u64;
const WARP_ROW: usize = kernels::int8_rowwise::WARP_ROW;
const TILE_BYTES: u64 = kernels::int8_rowwise::TILE_BYTES as u64;
/// Blocks of threads for each multiprocessor: as many as it takes at once.
const RESIDENT: u64 = 8;

fn check(values: &Memory, codes: &Memory, scales: &Memory, rows: usize, columns: usize) -> Result<usize> {
    let n = element_count(&[rows, columns])
        .filter(|&n| i64::try_from(n).is_ok())
        .ok_or_else(|| Error::argument("rows", format!("{rows} x {columns}"), "less than 2^63 elements"))?;
    values.of(&DType::FLOATS)?.long(n, "rows x columns")?;
    codes.of(&[DType::I8])?.long(n, "rows x columns")?;
    scales.of(&[DType::F32])?.long(rows, "one scale per row")?;
    Ok(n)
}

/// Quantizes each row of `input`, `[rows][columns]`, by its largest magnitude: [`halfbyte::quant::int8_rowwise::quantize_rows`].
///
/// # Errors
/// [`Error::Argument`] for a dtype or a length that does not fit; [`Error::Cuda`] when the launch fails.
///
/// # Safety
/// The memory is of this device, stays valid until the kernel has ended on `stream`, and is not written by others; `codes`
/// and `scales` are neither read nor written by others, and share nothing with each other or with `input`. The stream is of
/// this device.
#[allow(clippy::too_many_arguments)] // what the kernel needs, each with a type of its own
pub unsafe fn quantize_rows(
    device: &Device,
    stream: Stream,
    input: &Memory,
    codes: &Memory,
    scales: &Memory,
    rows: usize,
    columns: usize,
    variant: Variant,
) -> Result<()> {
    check(input, codes, scales, rows, columns)?;
    let kernel = match (variant, input.dtype()) {
        (Variant::Fast, DType::Bf16) => &kernels::QUANTIZE_INT8_ROWWISE_BF16,
        (Variant::Fast, DType::F16) => &kernels::QUANTIZE_INT8_ROWWISE_F16,
        (Variant::Fast, _) => &kernels::QUANTIZE_INT8_ROWWISE_F32,
        (Variant::Reference, DType::Bf16) => &kernels::QUANTIZE_INT8_ROWWISE_REFERENCE_BF16,
        (Variant::Reference, DType::F16) => &kernels::QUANTIZE_INT8_ROWWISE_REFERENCE_F16,
        (Variant::Reference, _) => &kernels::QUANTIZE_INT8_ROWWISE_REFERENCE_F32,
    };
    let resident = u64::from(device.multiprocessors()) * RESIDENT;
    let blocks = match variant {
        Variant::Fast if columns <= WARP_ROW => (rows as u64).div_ceil(WARPS).min(resident),
        Variant::Fast => (rows as u64).min(resident),
        Variant::Reference => (rows as u64).div_ceil(u64::from(kernel.threads)),
    };
    let (input, codes, scales) = (input.address(), codes.address(), scales.address());
    let (rows, columns) = (rows as i64, columns as i64);
    // SAFETY: the kernel's parameters in its order; lengths were checked, the rest is the caller's.
    unsafe { device.launch(stream, kernel, blocks, 0, parameters![input, codes, scales, rows, columns]) }
}

/// Reads rows back: [`halfbyte::quant::int8_rowwise::dequantize_rows`].
///
/// # Errors
/// As [`quantize_rows`].
///
/// # Safety
/// As [`quantize_rows`], the output being `out`.
#[allow(clippy::too_many_arguments)] // what the kernel needs, each with a type of its own
pub unsafe fn dequantize_rows(
    device: &Device,
    stream: Stream,
    codes: &Memory,
    scales: &Memory,
    out: &Memory,
    rows: usize,
    columns: usize,
    variant: Variant,
) -> Result<()> {
    let n = check(out, codes, scales, rows, columns)? as u64;
    let kernel = match (variant, out.dtype()) {
        (Variant::Fast, DType::Bf16) => &kernels::DEQUANTIZE_INT8_ROWWISE_BF16,
        (Variant::Fast, DType::F16) => &kernels::DEQUANTIZE_INT8_ROWWISE_F16,
        (Variant::Fast, _) => &kernels::DEQUANTIZE_INT8_ROWWISE_F32,
        (Variant::Reference, DType::Bf16) => &kernels::DEQUANTIZE_INT8_ROWWISE_REFERENCE_BF16,
        (Variant::Reference, DType::F16) => &kernels::DEQUANTIZE_INT8_ROWWISE_REFERENCE_F16,
        (Variant::Reference, _) => &kernels::DEQUANTIZE_INT8_ROWWISE_REFERENCE_F32,
    };
    let blocks = match variant {
        Variant::Fast => n.div_ceil(TILE_BYTES / out.dtype().size() as u64),
        Variant::Reference => n.div_ceil(u64::from(kernel.threads)),
    };
    let (codes, scales, out) = (codes.address(), scales.address(), out.address());
    let (n, columns) = (n as i64, columns as i64);
    // SAFETY: the kernel's parameters in its order; lengths were checked, the rest is the caller's.
    unsafe { device.launch(stream, kernel, blocks, 0, parameters![codes, scales, out, n, columns]) }
}
