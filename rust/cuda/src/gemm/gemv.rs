//! Products of one vector and a 4-bit weight whose codes stand for values of the caller's.

use halfbyte::dtype::DType;
use halfbyte::error::Result;
use halfbyte::geometry::{BlockSize, strided_lengths};

use crate::driver::{Device, Stream};
use crate::kernels;
use crate::launch::parameters;
use crate::memory::{Memory, block_shift};

const WARPS: u64 = kernels::gemv_4bit::WARPS as u64;

/// `y[n] = W[n][k] · x[k]`.
#[derive(Debug, Clone, Copy)]
pub struct Gemv<'a> {
    /// `[k]`, float16, bfloat16 or float32.
    pub x: &'a Memory,
    /// The codes of `W`: the last row may end before `stride`.
    pub packed: &'a Memory,
    /// Float32 scales, a block running on from one row to the next, `2 * stride` values later.
    pub absmax: &'a Memory,
    /// The 16 values of the codes, float32.
    pub table: &'a Memory,
    /// `[n]`, of the type of `x`.
    pub y: &'a Memory,
    /// Bytes from one row to the next.
    pub stride: usize,
    /// Values that share a scale.
    pub blocksize: BlockSize,
}

/// Makes the product, in float32.
///
/// # Errors
/// [`halfbyte::Error::Argument`] for a dtype or a length that does not fit; [`halfbyte::Error::Cuda`] when the launch fails.
///
/// # Safety
/// The memory is of this device, stays valid until the kernel has ended on `stream`, and is not written by others; `y` is
/// neither read nor written by others, and shares nothing with the inputs. The stream is of this device.
pub unsafe fn gemv(device: &Device, stream: Stream, gemv: &Gemv<'_>) -> Result<()> {
    let dtype = gemv.x.of(&[DType::F16, DType::Bf16, DType::F32])?.dtype();
    let (n, k) = (gemv.y.of(&[dtype])?.count(), gemv.x.count());
    let (bytes, scales) = strided_lengths(n, k, gemv.stride, gemv.blocksize)?;
    gemv.packed.of(&[DType::U8])?.long(bytes, "two codes to a byte")?;
    gemv.absmax.of(&[DType::F32])?.long(scales, "one scale per block")?;
    gemv.table.of(&[DType::F32])?.long(16, "one value per code")?;
    let kernel = match dtype {
        DType::Bf16 => &kernels::GEMV_4BIT_BF16,
        DType::F16 => &kernels::GEMV_4BIT_F16,
        _ => &kernels::GEMV_4BIT_F32,
    };
    let (x, packed, absmax) = (gemv.x.address(), gemv.packed.address(), gemv.absmax.address());
    let (table, y, shift) = (gemv.table.address(), gemv.y.address(), block_shift(gemv.blocksize));
    let (rows, k, stride) = (n as i64, k as i64, gemv.stride as i64);
    let parameters = parameters![x, packed, absmax, table, y, rows, k, stride, shift];
    // SAFETY: the kernel's parameters in its order; lengths were checked, the rest is the caller's.
    unsafe { device.launch(stream, kernel, (n as u64).div_ceil(WARPS), 0, parameters) }
}
