//! Double quantization: the scales of a 4-bit tensor, themselves quantized to 8 bits.
//!
//! `offset = mean(absmax)`; then `absmax - offset` is quantized in blocks of 256 with the dynamic map. To read:
//! `map[code] * absmax2[block] + offset`, a float32 product and then a float32 sum.

use crate::blockwise::{ByteMap, check_length, dequantize_8bit, quantize_8bit};
use crate::codebook::dynamic_map;
use crate::error::Result;
use crate::geometry::{BlockSize, NESTED_BLOCK_SIZE};

/// Doubly quantized scales.
#[derive(Debug, Clone, PartialEq)]
pub struct Nested {
    /// One 8-bit code per scale.
    pub codes: Vec<u8>,
    /// One float32 scale per 256 codes.
    pub absmax: Vec<f32>,
    /// The mean of the original scales.
    pub offset: f32,
}

/// Quantizes scales to 8 bits. Of no scales at all, the offset is 0.
///
/// Scales that are not finite make the offset, and with it every scale that is read back, not finite.
pub fn compress(absmax: &[f32]) -> Nested {
    let offset = mean(absmax);
    let centred: Vec<f32> = absmax.iter().map(|a| a - offset).collect();
    let mut nested =
        Nested { codes: vec![0; absmax.len()], absmax: vec![0.0; BlockSize::NESTED.absmax_len(absmax.len())], offset };
    quantize_8bit(&centred, ByteMap::dynamic(), BlockSize::NESTED, &mut nested.codes, &mut nested.absmax)
        .expect("lengths agree by construction");
    nested
}

/// Reads doubly quantized scales.
///
/// # Errors
/// [`crate::Error::Argument`] unless `out` has the length of `codes` and `absmax2` one scale per 256 codes.
pub fn expand(codes: &[u8], absmax2: &[f32], offset: f32, out: &mut [f32]) -> Result<()> {
    check_length("out", out.len(), codes.len(), "one scale per code")?;
    dequantize_8bit(codes, absmax2, dynamic_map(), BlockSize::NESTED, out)?;
    for scale in out {
        *scale += offset;
    }
    Ok(())
}

/// The mean, in an order that any device can follow to the same bits: float64 sums by a binary tree inside groups
/// of 256 (the last filled up with zeros), the group sums by the same tree until one is left, divided by the count
/// in float64, rounded once. Of nothing: 0.
pub fn mean(values: &[f32]) -> f32 {
    if values.is_empty() {
        return 0.0;
    }
    let mut sums: Vec<f64> = values.chunks(NESTED_BLOCK_SIZE).map(|group| tree_sum(group, |&v| f64::from(v))).collect();
    while sums.len() > 1 {
        sums = sums.chunks(NESTED_BLOCK_SIZE).map(|group| tree_sum(group, |&s| s)).collect();
    }
    (sums[0] / values.len() as f64) as f32
}

/// `x[i] += x[i + 128]`, then 64, … 1.
fn tree_sum<T>(group: &[T], to_f64: impl Fn(&T) -> f64) -> f64 {
    let mut x = [0.0; NESTED_BLOCK_SIZE];
    for (slot, value) in x.iter_mut().zip(group) {
        *slot = to_f64(value);
    }
    let mut half = NESTED_BLOCK_SIZE / 2;
    while half > 0 {
        let (low, high) = x.split_at_mut(half);
        for (a, b) in low.iter_mut().zip(high) {
            *a += *b;
        }
        half /= 2;
    }
    x[0]
}
