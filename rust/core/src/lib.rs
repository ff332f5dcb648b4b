//! 4-bit model weights in the format of bitsandbytes: the core of halfbyte.
//!
//! Neither Python nor CUDA is needed: the crates `halfbyte-python` and `halfbyte-cuda` stand above this one.
//! A module imports only from those named before it:
//!
//! | floor | modules |
//! |---|---|
//! | plain facts | [`error`], [`codebook`], [`geometry`], [`dtype`], [`simd`] |
//! | arithmetic | [`quant`], [`gemm`] |
//! | checkpoints | [`checkpoint`] |

pub mod checkpoint;
pub mod codebook;
pub mod dtype;
pub mod error;
pub mod gemm;
pub mod geometry;
pub mod quant;
pub mod simd;

pub use error::{Error, Result};
