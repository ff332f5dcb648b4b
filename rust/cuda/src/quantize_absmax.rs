//! Double quantization: the arithmetic of [`halfbyte::quant::absmax`], bit for bit.

use halfbyte::dtype::DType;
use halfbyte::error::Result;
use halfbyte::geometry::NESTED_BLOCK_SIZE;

use super::driver::{Device, Stream};
use super::kernels::{self, QUANTIZE_ABSMAX, QUANTIZE_ABSMAX_SUMS, QUANTIZE_ABSMAX_SUMS_OF_SUMS};
use super::launch::parameters;
use super::memory::Memory;

/// Groups of 256 in each block of threads: one for each warp.
const GROUPS: usize = kernels::quantize_absmax::WARPS;
/// Blocks of threads that the last kernel has for each multiprocessor.
const BLOCKS: u64 = kernels::quantize_absmax::BLOCKS as u64;
/// The sums that one block adds up.
const MOST_SUMS: usize = NESTED_BLOCK_SIZE * NESTED_BLOCK_SIZE;

/// The blocks of threads for one group with each warp.
fn blocks(values: usize) -> u64 {
    values.div_ceil(NESTED_BLOCK_SIZE * GROUPS) as u64
}

/// How many float64 [`quantize_absmax`] needs to work with, for so many scales.
pub fn quantize_absmax_workspace(scales: usize) -> usize {
    let mut sums = scales.div_ceil(NESTED_BLOCK_SIZE);
    let mut total = sums;
    while sums > MOST_SUMS {
        sums = sums.div_ceil(NESTED_BLOCK_SIZE);
        total += sums;
    }
    total
}

/// Memory for the scales of one tensor as 8-bit codes, and to work with.
#[derive(Debug, Clone, Copy)]
pub struct QuantizedAbsmax<'a> {
    /// uint8, one for each scale.
    pub codes: &'a Memory,
    /// float32, one for 256 codes.
    pub absmax2: &'a Memory,
    /// float32, one.
    pub offset: &'a Memory,
    /// float64, as many as [`quantize_absmax_workspace`] says; with any content.
    pub workspace: &'a Memory,
}

impl QuantizedAbsmax<'_> {
    pub(super) fn check(&self, scales: usize) -> Result<()> {
        self.codes.of(&[DType::U8])?.long(scales, "one code per scale")?;
        self.absmax2.of(&[DType::F32])?.long(scales.div_ceil(NESTED_BLOCK_SIZE), "one scale per 256 codes")?;
        self.offset.of(&[DType::F32])?.long(1, "one offset")?;
        self.workspace.of(&[DType::F64])?.long(quantize_absmax_workspace(scales), "float64 sums to work with")?;
        Ok(())
    }
}

/// Quantizes scales to 8 bits, in two launches (one more for each factor of 256 beyond 16.7 million scales).
///
/// # Errors
/// [`halfbyte::Error::Argument`] for a dtype or a length that does not fit; [`halfbyte::Error::Cuda`] when a launch fails.
///
/// # Safety
/// The memory is of this device, stays valid until the kernels have ended on `stream`, and is not written by others; that
/// of `out` is neither read nor written by others, and shares nothing with each other or with `absmax`. The stream is of
/// this device.
pub unsafe fn quantize_absmax(device: &Device, stream: Stream, absmax: &Memory, out: &QuantizedAbsmax) -> Result<()> {
    out.check(absmax.of(&[DType::F32])?.count())?;
    // SAFETY: the caller's.
    unsafe {
        write_sums(device, stream, absmax, out)?;
        quantize_absmax_with_sums(device, stream, absmax, out)
    }
}

/// The first step: the sums of the groups of 256 scales, to the beginning of the workspace.
///
/// # Safety
/// As [`quantize_absmax`]; and the arguments were checked.
pub(super) unsafe fn write_sums(device: &Device, stream: Stream, absmax: &Memory, out: &QuantizedAbsmax) -> Result<()> {
    let (grid, n) = (blocks(absmax.count()), absmax.count() as i64);
    let (absmax, sums) = (absmax.address(), out.workspace.address());
    // SAFETY: the kernel's parameters in its order; the rest is the caller's.
    unsafe { device.launch(stream, &QUANTIZE_ABSMAX_SUMS, grid, 0, parameters![absmax, sums, n]) }
}

/// The rest.
///
/// # Safety
/// As [`write_sums`].
pub(super) unsafe fn quantize_absmax_with_sums(
    device: &Device,
    stream: Stream,
    absmax: &Memory,
    out: &QuantizedAbsmax,
) -> Result<()> {
    let n = absmax.count();
    let mut sums = out.workspace.address();
    let mut count = n.div_ceil(NESTED_BLOCK_SIZE) as i64;
    while count as usize > MOST_SUMS {
        let next = sums + count as u64 * 8;
        let grid = blocks(count as usize);
        // SAFETY: the kernel's parameters in its order; the workspace has room for all levels; the rest is the caller's.
        unsafe { device.launch(stream, &QUANTIZE_ABSMAX_SUMS_OF_SUMS, grid, 0, parameters![sums, next, count]) }?;
        sums = next;
        count = (count as usize).div_ceil(NESTED_BLOCK_SIZE) as i64;
    }
    // Of no scales one block, for the offset.
    let grid = blocks(n).clamp(1, u64::from(device.multiprocessors()) * BLOCKS);
    let (absmax, codes, absmax2) = (absmax.address(), out.codes.address(), out.absmax2.address());
    let (offset, n) = (out.offset.address(), n as i64);
    let parameters = parameters![absmax, sums, count, codes, absmax2, offset, n];
    // SAFETY: as above; the kernel waits for those before it.
    unsafe { device.launch_early(stream, &QUANTIZE_ABSMAX, grid, 0, parameters) }
}
