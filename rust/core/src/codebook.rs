//! The tables of the format, each written once: NF4, FP4 and the 8-bit dynamic map.

// The format gives its figures to more digits than float32 holds; they stay as given.
#![allow(clippy::excessive_precision)]

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// A 4-bit data type: which sixteen values a code may mean.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum QuantType {
    /// NormalFloat4: the quantiles of a normal distribution (QLoRA, arXiv 2305.14314).
    #[default]
    Nf4,
    /// A sign bit and a 3-bit float.
    Fp4,
}

impl QuantType {
    /// Every type, in the order of their names in messages.
    pub const ALL: [Self; 2] = [Self::Nf4, Self::Fp4];

    /// The name in configurations and quantization states: `nf4` or `fp4`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
        }
    }

    /// The value of each code, for a block whose largest magnitude is 1.
    pub const fn values(self) -> &'static [f32; 16] {
        match self {
            Self::Nf4 => &NF4_VALUES,
            Self::Fp4 => &FP4_VALUES,
        }
    }

    /// The table as it is stored beside a weight: [`Self::values`], except that no zero has a sign.
    pub fn quant_map(self) -> [f32; 16] {
        self.values().map(|v| v + 0.0)
    }
}

impl fmt::Display for QuantType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for QuantType {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|t| t.as_str() == name)
            .ok_or_else(|| Error::argument("quant_type", format!("{name:?}"), "\"nf4\" or \"fp4\""))
    }
}

/// NF4: value of each code, ascending.
pub const NF4_VALUES: [f32; 16] = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
];

/// NF4: the code of a scaled value is the number of these that it exceeds.
///
/// The float32 nearest to each of the format's decimal figures. Those are the midpoints of neighbouring values to 16
/// digits, so four of them (0, 8, 12, 14) lie one float32 off the midpoint that float32 or float64 arithmetic gives:
/// the exact midpoint is a tie between two float32, and the digits cut off decide.
pub const NF4_THRESHOLDS: [f32; 15] = [
    -0.8480964004993439,
    -0.6106329262256622,
    -0.4599952697753906,
    -0.33967943489551544,
    -0.23460740596055984,
    -0.13791173323988914,
    -0.045525018125772476,
    0.03979014977812767,
    0.1202552504837513,
    0.2035212516784668,
    0.2920137718319893,
    0.3893125355243683,
    0.5016634166240692,
    0.6427869200706482,
    0.8614784181118011,
];

/// FP4: the rank of a scaled magnitude is the number of these that it exceeds. The format's own decimal figures,
/// not midpoints.
pub const FP4_THRESHOLDS: [f32; 7] = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333];

/// FP4: the code of each rank of magnitude, smallest first.
pub const FP4_CODE_OF_RANK: [u8; 8] = [0, 1, 6, 7, 4, 5, 2, 3];

/// FP4: the bit of a code that says "below zero".
pub const FP4_SIGN: u8 = 8;

/// FP4: value of each code.
pub const FP4_VALUES: [f32; 16] = {
    const TWELFTHS: [f32; 8] = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0];
    let mut values = [0.0; 16];
    let mut i = 0;
    while i < 8 {
        values[i] = TWELFTHS[i] / 12.0;
        values[i + FP4_SIGN as usize] = -values[i];
        i += 1;
    }
    values
};

/// The signed 8-bit dynamic map with seven exponent bits, ascending: value of each code.
///
/// Dynamic tree quantization (arXiv 2110.02861): for every decade `10^-6 … 10^0` the range `[0.1, 1]` is cut into
/// `2^0 … 2^6` equal parts whose middles, times the decade, are values of both signs; 0 and 1 complete the 256.
pub const fn dynamic_map() -> &'static [f32; 256] {
    &DYNAMIC_MAP
}

static DYNAMIC_MAP: [f32; 256] = build_dynamic_map();

const fn build_dynamic_map() -> [f32; 256] {
    const DECADES: [f32; 7] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];
    const ZERO: usize = 127;
    let mut map = [0.0; 256];
    let mut filled = 0;
    let mut decade = 0;
    while decade < DECADES.len() {
        let parts = 1usize << decade;
        let mut part = 0;
        while part < parts {
            let middle = (decade_boundary(part, parts) + decade_boundary(part + 1, parts)) / 2.0;
            let value = DECADES[decade] * middle;
            filled += 1;
            map[ZERO + filled] = value;
            map[ZERO - filled] = -value;
            part += 1;
        }
        decade += 1;
    }
    map[255] = 1.0;
    map
}

/// Point `i` of `parts + 1` evenly spaced ones from 0.1 to 1, rounded as the format's tables were: a float32 step,
/// taken from the nearer end, one rounding per point. The sum is exact in float64.
const fn decade_boundary(i: usize, parts: usize) -> f32 {
    const START: f32 = 0.1;
    const END: f32 = 1.0;
    let step = ((END - START) / parts as f32) as f64;
    if i < parts.div_ceil(2) {
        (START as f64 + step * i as f64) as f32
    } else {
        (END as f64 - step * (parts - i) as f64) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nf4_thresholds_are_the_midpoints_to_one_bit() {
        for (i, threshold) in NF4_THRESHOLDS.into_iter().enumerate() {
            let middle = (NF4_VALUES[i] + NF4_VALUES[i + 1]) * 0.5;
            let off = threshold.to_bits().abs_diff(middle.to_bits());
            assert_eq!(off, u32::from([0, 8, 12, 14].contains(&i)), "threshold {i}");
        }
        // Rounding the figures by way of float64 would give 0xbf591cd8, 0x3df64862, 0x3f006d04 and 0x3f5c89da.
        let off_middle = [0, 8, 12, 14].map(|i| NF4_THRESHOLDS[i].to_bits());
        assert_eq!(off_middle, [0xbf591cd9, 0x3df64863, 0x3f006d03, 0x3f5c89d9]);
    }

    #[test]
    fn fp4_ranks_ascend() {
        let by_rank = FP4_CODE_OF_RANK.map(|code| FP4_VALUES[usize::from(code)]);
        assert!(by_rank.is_sorted_by(|a, b| a < b), "{by_rank:?}");
        assert_eq!(FP4_VALUES[8].to_bits(), (-0.0f32).to_bits());
    }

    #[test]
    fn dynamic_map_ascends() {
        assert!(dynamic_map().is_sorted_by(|a, b| a < b));
        assert_eq!(dynamic_map()[127], 0.0);
    }

    #[test]
    fn names_round_trip_and_unknown_ones_list_the_legal() {
        for t in QuantType::ALL {
            assert_eq!(t.to_string().parse::<QuantType>().unwrap(), t);
        }
        let message = "int3".parse::<QuantType>().unwrap_err().to_string();
        assert_eq!(message, "quant_type must be \"nf4\" or \"fp4\", got \"int3\"");
    }
}
