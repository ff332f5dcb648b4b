//! What is between the projections of an expert, in float32.

use std::str::FromStr;

use crate::error::{Error, Result};

/// A function of what the gate and the up projection give, or of the latter alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `v · sigmoid(v)`
    Silu,
    /// `v · Φ(v)`
    Gelu,
    /// The same, approximated by a hyperbolic tangent.
    GeluTanh,
    /// `max(v, 0)²`
    Relu2,
    /// That of gpt-oss: both clamped to 7, `gate · sigmoid(1.702 · gate) · (up + 1)`.
    ClampedSwiglu,
}

/// Of gpt-oss.
const LIMIT: f32 = 7.0;
const ALPHA: f32 = 1.702;

impl Activation {
    /// Every one.
    pub const ALL: [Self; 5] = [Self::Silu, Self::Gelu, Self::GeluTanh, Self::Relu2, Self::ClampedSwiglu];

    /// The name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Silu => "silu",
            Self::Gelu => "gelu",
            Self::GeluTanh => "gelu_tanh",
            Self::Relu2 => "relu2",
            Self::ClampedSwiglu => "clamped_swiglu",
        }
    }

    /// Whether it is one of experts with a gate only.
    pub const fn needs_gate(self) -> bool {
        matches!(self, Self::ClampedSwiglu)
    }

    /// `up = act(gate) · up`.
    pub fn gated(self, gate: &[f32], up: &mut [f32]) {
        fn each(gate: &[f32], up: &mut [f32], function: impl Fn(f32) -> f32) {
            up.iter_mut().zip(gate).for_each(|(up, &gate)| *up *= function(gate));
        }
        match self {
            Self::Silu => each(gate, up, silu),
            Self::Gelu => each(gate, up, gelu),
            Self::GeluTanh => each(gate, up, gelu_tanh),
            Self::Relu2 => each(gate, up, relu2),
            Self::ClampedSwiglu => up.iter_mut().zip(gate).for_each(|(up, &gate)| {
                let gate = at_most(gate, LIMIT);
                *up = gate * sigmoid(ALPHA * gate) * (at_most(-at_most(-*up, LIMIT), LIMIT) + 1.0);
            }),
        }
    }

    /// `up = act(up)`.
    pub fn plain(self, up: &mut [f32]) {
        match self {
            Self::Silu => up.iter_mut().for_each(|up| *up = silu(*up)),
            Self::Gelu => up.iter_mut().for_each(|up| *up = gelu(*up)),
            Self::GeluTanh => up.iter_mut().for_each(|up| *up = gelu_tanh(*up)),
            Self::Relu2 => up.iter_mut().for_each(|up| *up = relu2(*up)),
            Self::ClampedSwiglu => unreachable!("checked: there is no gate"),
        }
    }
}

impl FromStr for Activation {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|activation| activation.as_str() == name).ok_or_else(|| {
            let legal = Self::ALL.map(Self::as_str);
            Error::argument("activation", format!("{name:?}"), format!("one of {legal:?}"))
        })
    }
}

/// NaN stays NaN, unlike with `f32::min`.
#[inline(always)]
fn at_most(v: f32, limit: f32) -> f32 {
    if v > limit { limit } else { v }
}

/// `e^v` to about one unit in the last place, in steps that compilers vectorize; at least `e^-87`, infinite from 88.4 on.
#[inline(always)]
fn exp(v: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts, the first exact in few bits.
    const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    /// Added and taken away again, it rounds to whole numbers.
    const ROUND: f32 = 12_582_912.0;
    let v = v.clamp(-87.0, 89.0);
    let shifted = v * LOG2_E + ROUND;
    let power = shifted - ROUND;
    let rest = v - power * LN2[0] - power * LN2[1];
    let mut sum = 1.987_569_1e-4;
    for factor in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1] {
        sum = sum * rest + factor;
    }
    let near_one = sum * rest * rest + rest + 1.0;
    // The whole number is in the low bits of `shifted`, and goes into the exponent.
    near_one * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23)
}

#[inline(always)]
fn sigmoid(v: f32) -> f32 {
    1.0 / (1.0 + exp(-v))
}

#[inline(always)]
fn silu(v: f32) -> f32 {
    v * sigmoid(v)
}

#[inline(always)]
fn gelu(v: f32) -> f32 {
    // Numerical Recipes' erfc: its relative error is below 1.2e-7 everywhere.
    const FACTORS: [f32; 9] = [
        -0.822_152_23,
        1.488_515_9,
        -1.135_204,
        0.278_868_07,
        -0.186_288_06,
        0.096_784_18,
        0.374_091_96,
        1.000_023_7,
        -1.265_512_2,
    ];
    let z = v.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.5 * z);
    let mut sum = 0.170_872_77;
    for factor in FACTORS {
        sum = sum * t + factor;
    }
    let beyond = 0.5 * t * exp(sum - z * z); // of a normal number, that it is beyond |v| on one side
    v * if v > 0.0 { 1.0 - beyond } else { beyond }
}

#[inline(always)]
fn gelu_tanh(v: f32) -> f32 {
    const INNER: f32 = 0.797_884_6; // √(2/π)
    v * sigmoid(2.0 * INNER * (v + 0.044_715 * v * v * v))
}

#[inline(always)]
fn relu2(v: f32) -> f32 {
    let v = if v < 0.0 { 0.0 } else { v };
    v * v
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exact(activation: Activation, v: f64) -> f64 {
        let sigmoid = |v: f64| 1.0 / (1.0 + (-v).exp());
        match activation {
            Activation::Silu => v * sigmoid(v),
            Activation::Gelu => {
                // Simpson's rule for Φ, from 0 on.
                let steps = 2000;
                let h = v.abs() / f64::from(steps);
                let density = |i: i32| (-0.5 * (h * f64::from(i)).powi(2)).exp();
                let inner: f64 = (1..steps).map(|i| density(i) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum();
                let half = (density(0) + inner + density(steps)) * h / 3.0 / (2.0 * std::f64::consts::PI).sqrt();
                v * (0.5 + half.copysign(v))
            }
            Activation::GeluTanh => {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (v + 0.044_715 * v.powi(3));
                0.5 * v * (1.0 + inner.tanh())
            }
            Activation::Relu2 => v.max(0.0).powi(2),
            Activation::ClampedSwiglu => v.min(7.0) * sigmoid(1.702 * v.min(7.0)),
        }
    }

    #[test]
    fn activations_are_those_of_float64() {
        for activation in Activation::ALL {
            for i in -4000..4000 {
                let v = i as f32 * 0.003;
                let mut made = [1.0];
                if activation == Activation::ClampedSwiglu {
                    made[0] = 0.0; // `up + 1`
                }
                activation.gated(&[v], &mut made);
                let expected = exact(activation, f64::from(v));
                let bound = 4e-7 * f64::from(v.abs()).max(expected.abs());
                assert!(
                    (f64::from(made[0]) - expected).abs() <= bound,
                    "{activation:?} of {v}: {}, {expected}",
                    made[0]
                );
            }
        }
    }

    #[test]
    fn what_is_not_finite_or_large_ends_as_it_should() {
        for activation in Activation::ALL {
            let mut made = [1.0, 1.0, 1.0];
            activation.gated(&[f32::NAN, 1e30, -1e30], &mut made);
            assert!(made[0].is_nan(), "{activation:?}");
            assert!(made[1] > 6.9, "{activation:?}");
            assert!(made[2].abs() < 1e-6, "{activation:?}: {}", made[2]);
        }
    }

    #[test]
    fn names_are_read_back() {
        for activation in Activation::ALL {
            assert_eq!(activation.as_str().parse::<Activation>().unwrap(), activation);
        }
        let message = "tanh".parse::<Activation>().unwrap_err().to_string();
        assert!(message.contains("activation") && message.contains("\"silu\""), "{message}");
    }
}
