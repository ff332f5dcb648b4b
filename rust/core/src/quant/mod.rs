//! Quantization and its way back, on the CPU.

pub mod absmax;
pub mod blockwise4;
pub mod blockwise8;
mod finite;
pub mod int8_rowwise;

pub use finite::{Finite, first_nonfinite};
