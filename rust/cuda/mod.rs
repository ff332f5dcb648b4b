//! The kernels of `kernels/` on NVIDIA GPUs: launched on a stream of the caller's, in memory of the caller's.
//!
//! Nothing here allocates on the device, waits for it, or touches another stream. A launcher checks what numbers can be
//! checked, picks the kernel, and gives the launch to [`driver`], the only file that knows the driver's library.

mod blockwise;
mod decode;
pub mod driver;
mod eight_bit;
mod embedding;
mod expand;
mod gemm;
mod memory;
mod nested;
mod product;
pub(crate) mod ptx;
mod rows;

pub use blockwise::{dequantize, quantize, quantize_nested};
pub use decode::rows_at_once;
pub use driver::{Device, Stream};
pub use eight_bit::{dequantize_8bit, quantize_8bit};
pub use embedding::{Table, embedding};
pub use expand::expand;
pub use gemm::gemm_pays;
pub use memory::{DType, Memory, Scales};
pub use nested::{Compressed, compress, compress_workspace};
pub use product::{Choice, Product, product};
pub use rows::{dequantize_rows, quantize_rows};

/// Which of two kernels with the same meaning.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Variant {
    /// The fastest one that takes the arguments.
    #[default]
    Fast,
    /// The plain one that defines the result: for tests.
    Reference,
}

/// The kernel's parameters, as the driver wants them: the addresses of variables. Of variables alone, because a temporary
/// value would be gone when the driver reads it.
macro_rules! parameters {
    ($($variable:ident),* $(,)?) => {
        &mut [$(std::ptr::from_ref(&$variable).cast_mut().cast::<std::ffi::c_void>()),*]
    };
}
use parameters;

#[cfg(test)]
mod tests;
