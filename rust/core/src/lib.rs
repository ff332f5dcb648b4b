//! 4-bit model weights in the format of bitsandbytes: the core of halfbyte.
//!
//! Neither Python nor CUDA is needed: the crates `halfbyte-python` and `halfbyte-cuda` stand above this one.
//! A module imports only from those named before it:
//!
//! | floor | modules |
//! |---|---|
//! | plain facts | [`error`], [`codebook`], [`geometry`] |
//! | arithmetic | [`blockwise`], [`nested`], [`rowwise`], [`matmul`] |
//! | checkpoints | [`checkpoint`] |

pub mod blockwise;
pub mod checkpoint;
pub mod codebook;
pub mod error;
pub mod geometry;
pub mod matmul;
pub mod nested;
pub mod rowwise;

pub use error::{Error, Result};
