//! The plain kernel (kernels/gemm/simt): any shape, alignment, block size and type.

use halfbyte::dtype::DType;

use crate::kernels::{self, Kernel};

/// Elements of `y` that a block of threads makes: one for each warp.
pub(super) const ELEMENTS: usize = kernels::gemm_4bit_simt::WARPS;

pub(super) fn kernel(dtype: DType, nested: bool) -> &'static Kernel {
    match (dtype, nested) {
        (DType::Bf16, false) => &kernels::GEMM_4BIT_SIMT_BF16,
        (DType::Bf16, true) => &kernels::GEMM_4BIT_SIMT_BF16_NESTED,
        (DType::F16, false) => &kernels::GEMM_4BIT_SIMT_F16,
        (DType::F16, true) => &kernels::GEMM_4BIT_SIMT_F16_NESTED,
        (_, false) => &kernels::GEMM_4BIT_SIMT_F32,
        (_, true) => &kernels::GEMM_4BIT_SIMT_F32_NESTED,
    }
}
