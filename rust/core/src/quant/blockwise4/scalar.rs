//! The definition: one value after another, in the order of the format's description. The SIMD paths must give the
//! same bits.

use crate::codebook::{FP4_CODE_OF_RANK, FP4_SIGN, FP4_THRESHOLDS, NF4_THRESHOLDS, QuantType};
use crate::dtype::Element;
use crate::quant::finite::Finite;

/// The code of a scaled value. NaN exceeds no threshold and is not below zero: code 0.
#[inline]
pub(super) fn code(scaled: f32, quant_type: QuantType) -> u8 {
    match quant_type {
        QuantType::Nf4 => NF4_THRESHOLDS.iter().map(|&t| u8::from(scaled > t)).sum(),
        QuantType::Fp4 => {
            let magnitude = scaled.abs();
            let rank: u8 = FP4_THRESHOLDS.iter().map(|&t| u8::from(magnitude > t)).sum();
            FP4_CODE_OF_RANK[usize::from(rank)] | if scaled < 0.0 { FP4_SIGN } else { 0 }
        }
    }
}

/// Quantizes consecutive blocks. `packed` and `absmax` have exactly the lengths that `input` needs.
pub(super) fn quantize<T: Element>(
    input: &[T],
    quant_type: QuantType,
    blocksize: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> Finite {
    let mut finite = true;
    for ((block, bytes), scale) in input.chunks(blocksize).zip(packed.chunks_mut(blocksize / 2)).zip(absmax) {
        let mut max = 0.0f32;
        for value in block {
            finite &= value.is_finite();
            max = max.max(value.to_f32().abs()); // `f32::max` passes NaN over
        }
        *scale = max;
        let inverse = 1.0 / max;
        for (pair, byte) in block.chunks(2).zip(bytes) {
            let high = code(pair[0].to_f32() * inverse, quant_type);
            // An odd block is filled up with a zero.
            let low = code(pair.get(1).map_or(0.0, |v| v.to_f32()) * inverse, quant_type);
            *byte = high << 4 | low;
        }
    }
    if finite { Finite::AllFinite } else { Finite::HasNonFinite }
}

/// What each of the sixteen codes means in a block with this scale.
#[inline]
pub(super) fn block_values<T: Element>(absmax: f32, quant_type: QuantType) -> [T; 16] {
    quant_type.values().map(|v| T::from_f32(v * absmax))
}

/// Dequantizes consecutive blocks. `packed` and `absmax` have exactly the lengths that `out` needs.
pub(super) fn dequantize<T: Element>(
    packed: &[u8],
    absmax: &[f32],
    quant_type: QuantType,
    blocksize: usize,
    out: &mut [T],
) {
    for ((block, bytes), &scale) in out.chunks_mut(blocksize).zip(packed.chunks(blocksize / 2)).zip(absmax) {
        let values = block_values::<T>(scale, quant_type);
        for (pair, &byte) in block.chunks_mut(2).zip(bytes) {
            pair[0] = values[usize::from(byte >> 4)];
            if let Some(second) = pair.get_mut(1) {
                *second = values[usize::from(byte & 15)];
            }
        }
    }
}
