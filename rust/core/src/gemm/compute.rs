//! The type that a product is computed in.

use std::str::FromStr;

use crate::error::{Error, Result};

/// The type that activations are rounded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compute {
    /// float32
    F32,
    /// float16
    F16,
    /// bfloat16
    Bf16,
}

impl Compute {
    /// Every type.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// The name in torch.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }
}

impl FromStr for Compute {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|c| c.as_str() == name).ok_or_else(|| {
            let legal = Self::ALL.map(Self::as_str);
            Error::argument("compute_dtype", format!("{name:?}"), format!("one of {legal:?}"))
        })
    }
}
