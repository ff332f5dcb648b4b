//! Doubly quantized scales to float32: the arithmetic of [`halfbyte::quant::absmax::dequantize_absmax`], bit for bit.

use halfbyte::dtype::DType;
use halfbyte::error::Result;
use halfbyte::geometry::NESTED_BLOCK_SIZE;

use super::driver::{Device, Stream};
use super::kernels;
use super::launch::{Variant, parameters};
use super::memory::Memory;

const TILE: u64 = kernels::dequantize_absmax::TILE as u64;

/// Reads `out.count()` scales back: one product and one sum each.
///
/// # Errors
/// [`halfbyte::Error::Argument`] for a dtype or a length that does not fit; [`halfbyte::Error::Cuda`] when the launch fails.
///
/// # Safety
/// The memory is of this device, stays valid until the kernel has ended on `stream`, and is not written by others; `out`
/// is neither read nor written by others, and shares nothing with the inputs. The stream is of this device.
pub unsafe fn dequantize_absmax(
    device: &Device,
    stream: Stream,
    codes: &Memory,
    absmax2: &Memory,
    offset: &Memory,
    out: &Memory,
    variant: Variant,
) -> Result<()> {
    let n = out.of(&[DType::F32])?.count();
    codes.of(&[DType::U8])?.long(n, "one code per scale")?;
    absmax2.of(&[DType::F32])?.long(n.div_ceil(NESTED_BLOCK_SIZE), "one scale per 256 codes")?;
    offset.of(&[DType::F32])?.long(1, "one offset")?;
    let (kernel, tile) = match variant {
        Variant::Fast => (&kernels::DEQUANTIZE_ABSMAX, TILE),
        Variant::Reference => {
            let kernel = &kernels::DEQUANTIZE_ABSMAX_REFERENCE;
            (kernel, u64::from(kernel.threads))
        }
    };
    let blocks = (n as u64).div_ceil(tile);
    let (codes, absmax2, offset, out) = (codes.address(), absmax2.address(), offset.address(), out.address());
    let n = n as i64;
    // SAFETY: the kernel's parameters in its order; lengths were checked, the rest is the caller's.
    unsafe { device.launch(stream, kernel, blocks, 0, parameters![codes, absmax2, offset, out, n]) }
}
