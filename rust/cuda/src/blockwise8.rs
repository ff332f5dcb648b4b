//! Blockwise quantization to 8 bits with any map, and back: the arithmetic of [`halfbyte::quant::blockwise8::quantize_8bit`] and
//! [`halfbyte::quant::blockwise8::dequantize_8bit`], bit for bit, for blocks of any size.

use halfbyte::dtype::DType;
use halfbyte::error::{Error, Result};
use halfbyte::geometry::BlockSize;

use super::driver::{Device, Stream};
use super::kernels;
use super::launch::{Variant, parameters};
use super::memory::{Memory, block_shift};

const CODES: usize = 256;

const DEQUANTIZE_TILE_BYTES: u64 = kernels::dequantize_blockwise8::TILE_BYTES as u64;
const QUANTIZE_TILE: u64 = kernels::quantize_blockwise8::TILE as u64;
const QUANTIZE_WARPS: u64 = kernels::quantize_blockwise8::WARPS as u64;
const QUANTIZE_WARP_BLOCK: usize = kernels::quantize_blockwise8::WARP_BLOCK;
/// Blocks of threads for each multiprocessor: as many as it takes at once, because each makes a table first.
const QUANTIZE_RESIDENT: u64 = kernels::quantize_blockwise8::RESIDENT as u64;

/// The block size as kernels take it, and how many blocks `n` values are.
fn blocks_of(n: usize, blocksize: usize) -> Result<(i64, usize)> {
    match i64::try_from(blocksize) {
        Ok(size @ 1..) => Ok((size, n.div_ceil(blocksize))),
        _ => Err(Error::argument("blocksize", blocksize, "1 or more, and less than 2^63")),
    }
}

/// Reads `out.count()` values back: `code[codes[i]] * absmax[i / blocksize]` in float32, rounded once. `code` has the value
/// of each code; `blocksize` is any number from 1 on.
///
/// # Errors
/// [`Error::Argument`] for a dtype or a length that does not fit; [`Error::Cuda`] when the launch fails.
///
/// # Safety
/// The memory is of this device, stays valid until the kernel has ended on `stream`, and is not written by others; `out`
/// is neither read nor written by others, and shares nothing with the inputs. The stream is of this device.
#[allow(clippy::too_many_arguments)] // what the kernel needs, each with a type of its own
pub unsafe fn dequantize_8bit(
    device: &Device,
    stream: Stream,
    codes: &Memory,
    absmax: &Memory,
    code: &Memory,
    out: &Memory,
    blocksize: usize,
    variant: Variant,
) -> Result<()> {
    let n = out.of(&DType::FLOATS)?.count();
    let (blocksize, scales) = blocks_of(n, blocksize)?;
    codes.of(&[DType::U8])?.long(n, "one code per value")?;
    absmax.of(&[DType::F32])?.long(scales, "one scale per block")?;
    code.of(&[DType::F32])?.long(CODES, "one value per code")?;
    let kernel = match (variant, out.dtype()) {
        (Variant::Fast, DType::Bf16) => &kernels::DEQUANTIZE_BLOCKWISE8_BF16,
        (Variant::Fast, DType::F16) => &kernels::DEQUANTIZE_BLOCKWISE8_F16,
        (Variant::Fast, _) => &kernels::DEQUANTIZE_BLOCKWISE8_F32,
        (Variant::Reference, DType::Bf16) => &kernels::DEQUANTIZE_BLOCKWISE8_REFERENCE_BF16,
        (Variant::Reference, DType::F16) => &kernels::DEQUANTIZE_BLOCKWISE8_REFERENCE_F16,
        (Variant::Reference, _) => &kernels::DEQUANTIZE_BLOCKWISE8_REFERENCE_F32,
    };
    let tile = match variant {
        Variant::Fast => DEQUANTIZE_TILE_BYTES / out.dtype().size() as u64,
        Variant::Reference => u64::from(kernel.threads),
    };
    let blocks = (n as u64).div_ceil(tile);
    let (codes, absmax, code, out) = (codes.address(), absmax.address(), code.address(), out.address());
    let n = n as i64;
    // SAFETY: the kernel's parameters in its order; lengths were checked, the rest is the caller's.
    unsafe { device.launch(stream, kernel, blocks, 0, parameters![codes, absmax, code, out, n, blocksize]) }
}

/// Quantizes `input` to 8 bits with the map `code`: 256 finite float32 values, ascending. What the map holds is not known
/// here; with another one the codes mean nothing.
///
/// `blocksize` is any number from 1 on. The format's ([`halfbyte::geometry::BLOCK_SIZES`]) are fast, and NaN does not count
/// for their scales; with any other a NaN is the scale of its block, whose codes are then all 0.
///
/// # Errors
/// As [`dequantize_8bit`].
///
/// # Safety
/// As [`dequantize_8bit`], the outputs being `codes` and `absmax`.
#[allow(clippy::too_many_arguments)] // what the kernel needs, each with a type of its own
pub unsafe fn quantize_8bit(
    device: &Device,
    stream: Stream,
    input: &Memory,
    code: &Memory,
    codes: &Memory,
    absmax: &Memory,
    blocksize: usize,
    variant: Variant,
) -> Result<()> {
    let n = input.of(&DType::FLOATS)?.count();
    let (size, scales) = blocks_of(n, blocksize)?;
    code.of(&[DType::F32])?.long(CODES, "one value per code")?;
    codes.of(&[DType::U8])?.long(n, "one code per value")?;
    absmax.of(&[DType::F32])?.long(scales, "one scale per block")?;

    let of_format = BlockSize::new(blocksize).ok();
    let kernel = match (variant, of_format, input.dtype()) {
        (Variant::Fast, Some(_), DType::Bf16) => &kernels::QUANTIZE_BLOCKWISE8_BF16,
        (Variant::Fast, Some(_), DType::F16) => &kernels::QUANTIZE_BLOCKWISE8_F16,
        (Variant::Fast, Some(_), _) => &kernels::QUANTIZE_BLOCKWISE8_F32,
        (Variant::Fast, None, DType::Bf16) => &kernels::QUANTIZE_BLOCKWISE8_ANY_BF16,
        (Variant::Fast, None, DType::F16) => &kernels::QUANTIZE_BLOCKWISE8_ANY_F16,
        (Variant::Fast, None, _) => &kernels::QUANTIZE_BLOCKWISE8_ANY_F32,
        (Variant::Reference, _, DType::Bf16) => &kernels::QUANTIZE_BLOCKWISE8_REFERENCE_BF16,
        (Variant::Reference, _, DType::F16) => &kernels::QUANTIZE_BLOCKWISE8_REFERENCE_F16,
        (Variant::Reference, _, _) => &kernels::QUANTIZE_BLOCKWISE8_REFERENCE_F32,
    };
    let resident = u64::from(device.multiprocessors()) * QUANTIZE_RESIDENT;
    let blocks = match (variant, of_format) {
        (Variant::Fast, Some(_)) => (n as u64).div_ceil(QUANTIZE_TILE).min(resident),
        (Variant::Fast, None) if blocksize <= QUANTIZE_WARP_BLOCK => {
            (scales as u64).div_ceil(QUANTIZE_WARPS).min(resident)
        }
        (Variant::Fast, None) => (scales as u64).min(resident),
        (Variant::Reference, _) => (scales as u64).div_ceil(u64::from(kernel.threads)),
    };
    let (input, code, codes, absmax) = (input.address(), code.address(), codes.address(), absmax.address());
    let n = n as i64;
    match of_format {
        Some(blocksize) if variant == Variant::Fast => {
            let shift = block_shift(blocksize);
            // SAFETY: the kernel's parameters in its order; lengths were checked, the rest is the caller's.
            unsafe { device.launch(stream, kernel, blocks, 0, parameters![input, code, codes, absmax, n, shift]) }
        }
        _ => {
            // SAFETY: as above.
            unsafe { device.launch(stream, kernel, blocks, 0, parameters![input, code, codes, absmax, n, size]) }
        }
    }
}
