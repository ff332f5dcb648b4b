//! The kernels of `kernels/` on NVIDIA GPUs: launched on a stream of the caller's, in memory of the caller's.
//!
//! Nothing here allocates on the device, waits for it, or touches another stream. A launcher checks what numbers can be
//! checked, picks the kernel, and gives the launch to [`driver`], the only file that knows the driver's library.

mod blockwise4;
mod blockwise8;
mod capability;
mod dequantize_absmax;
pub mod driver;
mod embedding;
pub mod experts;
mod family;
mod gemm;
pub mod int8;
mod int8_rowwise;
pub mod kernels;
mod launch;
mod lora;
mod memory;
mod modules;
mod notice;
mod quantize_absmax;

pub use blockwise4::{dequantize, quantize, quantize_nested};
pub use blockwise8::{dequantize_8bit, quantize_8bit};
pub use capability::Capability;
pub use dequantize_absmax::dequantize_absmax;
pub use driver::{Device, Stream};
pub use embedding::{Table, embedding};
pub use gemm::{
    Choice, Dgrad4bit, Gemm4bit, Gemv, dgrad_4bit, dgrad_workspace, gemm_4bit, gemv, rows_at_once,
    rows_without_workspace, tile_pays,
};
pub use int8_rowwise::{dequantize_rows, quantize_rows};
pub use kernels::{Form, Kernel};
pub use launch::Variant;
pub use lora::{Factor, LoraDown, LoraUp, lora_down, lora_ranks, lora_up};
pub use memory::{Memory, Scales};
pub use modules::NO_KERNELS;
pub use notice::listen;
pub use quantize_absmax::{QuantizedAbsmax, quantize_absmax, quantize_absmax_workspace};

#[cfg(test)]
mod tests;
