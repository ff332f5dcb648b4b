//! Layers of experts, and what a call of one is given.

use halfbyte::codebook::QuantType;
use halfbyte::dtype::DType;
use halfbyte::error::{Error, Result};
use halfbyte::geometry::BlockSize;

use crate::driver::Device;

/// What x, y, the workspace and the weights' codes begin at multiples of.
pub(super) const ALIGNMENT: u64 = 16;

/// What becomes of the products of gate and up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `silu(gate) * up`
    Silu,
    /// `gelu(gate) * up`, by the error function.
    Gelu,
    /// The same by tanh.
    GeluTanh,
    /// `relu(gate)^2 * up`
    Relu2,
    /// gpt-oss's: `min(gate, 7) * sigmoid(1.702 * min(gate, 7)) * (clamp(up, -7, 7) + 1)`
    ClampedSwiglu,
}

impl Activation {
    const NAMES: [(&'static str, Self); 5] = [
        ("silu", Self::Silu),
        ("gelu", Self::Gelu),
        ("gelu_tanh", Self::GeluTanh),
        ("relu2", Self::Relu2),
        ("clamped_swiglu", Self::ClampedSwiglu),
    ];
}

impl std::str::FromStr for Activation {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let legal = Self::NAMES.map(|(name, _)| name);
        let found = Self::NAMES.into_iter().find(|(n, _)| *n == name);
        found
            .map(|(_, activation)| activation)
            .ok_or_else(|| Error::argument("activation", format!("{name:?}"), format!("one of {legal:?}")))
    }
}

/// Experts of one shape.
#[derive(Debug, Clone, Copy)]
pub struct Experts {
    pub(super) device: &'static Device,
    /// Of x and y.
    pub(super) dtype: DType,
    pub(super) experts: usize,
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    pub(super) gated: bool,
    pub(super) quant_type: QuantType,
    pub(super) blocksize: BlockSize,
    pub(super) nested: bool,
}

/// What the router said, in device memory.
#[derive(Debug, Clone, Copy)]
pub struct Choices {
    /// Rows of x.
    pub tokens: usize,
    /// Choices of each.
    pub top_k: usize,
    /// int64 `[tokens][top_k]`; from the number of experts on, or below 0: none.
    pub ids: u64,
}

impl Choices {
    pub(super) fn slots(&self) -> usize {
        self.tokens * self.top_k
    }
}

/// Which weight each choice has: `[tokens][top_k]`.
#[derive(Debug, Clone, Copy)]
pub struct Weights {
    /// In device memory.
    pub address: u64,
    /// float32, or that of x.
    pub dtype: DType,
}

/// Addresses of the weights.
#[derive(Debug, Clone, Copy)]
pub struct Matrices {
    /// int64 `[gate, up and down, or up and down][experts][4]`: addresses of codes, of absmax, of absmax2 and of the offset.
    pub table: u64,
    /// uint8 `[3 or 2][experts][2][128]`: what the copy engine knows of the codes and scales; 0 for none.
    pub maps: u64,
    /// `[experts][2 * intermediate]`, gate first, or `[experts][intermediate]` without one; 0 for none.
    pub up_bias: u64,
    /// `[experts][hidden]`; 0 for none.
    pub down_bias: u64,
}
