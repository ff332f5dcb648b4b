//! Products of 8-bit codes of any shape, wherever they lie.

use halfbyte::error::Result;

use super::operands::{Epilogue, KernelName, Operands};
use crate::driver::{Device, Stream};
use crate::kernels::{INT8_PLAIN, int8_plain};
use crate::launch::parameters;

/// # Safety
/// As [`super::scaled`].
pub(super) unsafe fn launch(
    device: &Device,
    stream: Stream,
    operands: &Operands,
    epilogue: &Epilogue,
) -> Result<KernelName> {
    let &Operands { a, pitch, b, m, n, k, .. } = operands;
    let blocks = (n.div_ceil(int8_plain::TILE) as u64).saturating_mul(m.div_ceil(int8_plain::TILE) as u64);
    let epilogue = *epilogue;
    let (pitch, m, n, k) = (pitch as i64, m as i64, n as i64, k as i64);
    // SAFETY: the kernel's parameters in its order; the rest is the caller's.
    unsafe { device.launch(stream, &INT8_PLAIN, blocks, 0, parameters![a, pitch, b, epilogue, m, n, k]) }?;
    Ok(INT8_PLAIN.name)
}
