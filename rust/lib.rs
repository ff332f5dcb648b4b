//! 4-bit model weights in the format of bitsandbytes: the core of halfbyte.
//!
//! A module imports only from those named before it:
//!
//! | floor | modules |
//! |---|---|
//! | plain facts | [`error`], [`codebook`], [`geometry`] |
//! | arithmetic | [`blockwise`], [`nested`], [`rowwise`], [`matmul`] |
//! | checkpoints | [`checkpoint`] |
//! | GPUs | `cuda` (feature `cuda`) |
//! | Python | `python` (feature `python`) |
#![deny(missing_docs)]
#![deny(unsafe_op_in_unsafe_fn)]

pub mod blockwise;
pub mod checkpoint;
pub mod codebook;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod error;
pub mod geometry;
pub mod matmul;
pub mod nested;
#[cfg(feature = "python")]
mod python;
pub mod rowwise;

pub use error::{Error, Result};
