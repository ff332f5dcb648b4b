//! The 4-bit codebooks by name.

use std::fmt;
use std::str::FromStr;

use crate::error::Error;

/// A 4-bit codebook.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum QuantType {
    /// NormalFloat: quantiles of a normal distribution.
    #[default]
    Nf4,
    /// A 4-bit float: one sign, two exponent, one mantissa bit.
    Fp4,
}

impl QuantType {
    /// The name that checkpoints use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
        }
    }
}

impl fmt::Display for QuantType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for QuantType {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "nf4" => Ok(Self::Nf4),
            "fp4" => Ok(Self::Fp4),
            _ => Err(Error::argument("quant_type", format!("{text:?}"), "nf4 or fp4")),
        }
    }
}
