//! Double quantization: the arithmetic of [`crate::nested`], bit for bit.

use super::driver::{Device, Kernel, Stream};
use super::memory::{DType, Memory};
use super::parameters;
use super::ptx::Module;
use crate::error::Result;
use crate::geometry::NESTED_BLOCK_SIZE;

// Of kernels/nested.cu: groups of 256 in each block of threads, and the sums that one block adds up.
const THREADS: u32 = 256;
const GROUPS: usize = 8;
const MOST_SUMS: usize = NESTED_BLOCK_SIZE * NESTED_BLOCK_SIZE;

const fn kernel(name: &'static str) -> Kernel {
    Kernel { module: Module::Nested, name, threads: THREADS, large_shared: false }
}

const SUMS: Kernel = kernel("nested_sums");
const SUMS_OF_SUMS: Kernel = kernel("nested_sums_of_sums");
const COMPRESS: Kernel = kernel("nested_compress");

/// How many float64 [`compress`] needs to work with, for so many scales.
pub fn compress_workspace(scales: usize) -> usize {
    let mut sums = scales.div_ceil(NESTED_BLOCK_SIZE);
    let mut total = sums;
    while sums > MOST_SUMS {
        sums = sums.div_ceil(NESTED_BLOCK_SIZE);
        total += sums;
    }
    total
}

/// Quantizes scales to 8 bits, in two launches (one more for each factor of 256 beyond 16.7 million scales).
///
/// # Errors
/// [`crate::Error::Argument`] for a dtype or a length that does not fit; [`crate::Error::Cuda`] when a launch fails.
///
/// # Safety
/// The memory is of this device, stays valid until the kernels have ended on `stream`, and is not written by others;
/// `codes`, `absmax2`, `offset` and `workspace` are neither read nor written by others, and share nothing with each other
/// or with `absmax`. The stream is of this device.
pub unsafe fn compress(
    device: &Device,
    stream: Stream,
    absmax: &Memory,
    codes: &Memory,
    absmax2: &Memory,
    offset: &Memory,
    workspace: &Memory,
) -> Result<()> {
    let n = absmax.of(&[DType::F32])?.count();
    codes.of(&[DType::U8])?.long(n, "one code per scale")?;
    absmax2.of(&[DType::F32])?.long(n.div_ceil(NESTED_BLOCK_SIZE), "one scale per 256 codes")?;
    offset.of(&[DType::F32])?.long(1, "one offset")?;
    workspace.of(&[DType::F64])?.long(compress_workspace(n), "float64 sums to work with")?;
    let blocks = |values: usize| values.div_ceil(NESTED_BLOCK_SIZE * GROUPS) as u64;

    let mut sums = workspace.address();
    let mut count = n.div_ceil(NESTED_BLOCK_SIZE) as i64;
    let (absmax, codes, absmax2, offset) = (absmax.address(), codes.address(), absmax2.address(), offset.address());
    let (grid, n) = (blocks(n), n as i64);
    // SAFETY: the kernel's parameters in its order; lengths were checked, the rest is the caller's.
    unsafe { device.launch(stream, &SUMS, grid, 0, parameters![absmax, sums, n]) }?;
    while count as usize > MOST_SUMS {
        let next = sums + count as u64 * 8;
        // SAFETY: as above; the workspace has room for all levels.
        unsafe { device.launch(stream, &SUMS_OF_SUMS, blocks(count as usize), 0, parameters![sums, next, count]) }?;
        sums = next;
        count = (count as usize).div_ceil(NESTED_BLOCK_SIZE) as i64;
    }
    // SAFETY: as above.
    unsafe { device.launch(stream, &COMPRESS, grid, 0, parameters![absmax, sums, count, codes, absmax2, offset, n]) }
}
