//! What a weight is quantized to.

use std::fmt;
use std::str::FromStr;

use crate::codebook::QuantType;
use crate::error::{Error, Result};

/// What a weight is quantized to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightType {
    /// 4 bits a value, in blocks that share a scale.
    FourBit(QuantType),
    /// 8 bits a value, in rows that share a scale: LLM.int8().
    Int8,
}

impl WeightType {
    /// The name in options, rules and reports: `nf4`, `fp4` or `int8`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::FourBit(quant_type) => quant_type.as_str(),
            Self::Int8 => "int8",
        }
    }
}

impl Default for WeightType {
    fn default() -> Self {
        Self::FourBit(QuantType::default())
    }
}

impl fmt::Display for WeightType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for WeightType {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let four_bit = QuantType::ALL.into_iter().map(Self::FourBit);
        four_bit
            .chain([Self::Int8])
            .find(|t| t.as_str() == name)
            .ok_or_else(|| Error::argument("quant_type", format!("{name:?}"), "\"nf4\", \"fp4\" or \"int8\""))
    }
}
