//! The kernels of `kernels/` on NVIDIA GPUs: launched on a stream of the caller's, in memory of the caller's.
//!
//! Nothing here allocates on the device, waits for it, or touches another stream. A launcher checks what numbers can be
//! checked, picks the kernel, and gives the launch to [`driver`], the only file that knows the driver's library.

mod blockwise;
mod capability;
mod decode;
pub mod driver;
mod eight_bit;
mod embedding;
mod expand;
mod launch;
mod memory;
mod nested;
mod product;
pub mod ptx;
mod rows;

pub use blockwise::{dequantize, quantize, quantize_nested};
pub use capability::Capability;
pub use decode::rows_at_once;
pub use driver::{Device, Stream};
pub use eight_bit::{dequantize_8bit, quantize_8bit};
pub use embedding::{Table, embedding};
pub use expand::expand;
pub use launch::Variant;
pub use memory::{Memory, Scales};
pub use nested::{Compressed, compress, compress_workspace};
pub use product::{Choice, Product, product};
pub use rows::{dequantize_rows, quantize_rows};

#[cfg(test)]
mod tests;
