//! The values of a matrix of every expert (kernels/experts/experts_dequantize.cu).

use halfbyte::dtype::DType;
use halfbyte::error::Result;

use super::layer::{Experts, Matrices};
use crate::blockwise4::quant_type_parameter;
use crate::driver::Stream;
use crate::kernels::{self, experts_dequantize};
use crate::launch::parameters;
use crate::memory::block_shift;

/// Bytes of a row of the table of addresses.
const ROW: usize = 4 * size_of::<u64>();

/// Launches the kernel for a projection that there is.
///
/// # Safety
/// As [`Experts::launch`].
pub(super) unsafe fn dequantize(
    experts: &Experts,
    stream: Stream,
    matrices: &Matrices,
    projection: usize,
    ends: u64,
    out: u64,
) -> Result<()> {
    let kernel = match (experts.dtype, experts.nested) {
        (DType::Bf16, false) => &kernels::EXPERTS_DEQUANTIZE_BF16,
        (DType::Bf16, true) => &kernels::EXPERTS_DEQUANTIZE_BF16_NESTED,
        (_, false) => &kernels::EXPERTS_DEQUANTIZE_F16,
        (_, true) => &kernels::EXPERTS_DEQUANTIZE_F16_NESTED,
    };
    let values = experts.hidden * experts.intermediate;
    let tiles = values.div_ceil(experts_dequantize::TILE);
    let blocks = (tiles * experts.experts) as u64;
    let rows = matrices.table + (projection * experts.experts * ROW) as u64;
    let (n, tiles) = (values as i64, tiles as u32);
    let (shift, quant_type) = (block_shift(experts.blocksize), quant_type_parameter(experts.quant_type));
    let parameters = parameters![rows, ends, out, n, tiles, shift, quant_type];
    // SAFETY: the kernel's parameters in its order; the rest is the caller's.
    unsafe { experts.device.launch(stream, kernel, blocks, 0, parameters) }
}
