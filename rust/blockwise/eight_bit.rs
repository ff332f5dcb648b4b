//! Blockwise 8-bit quantization with any ascending map of 256 values.

use std::sync::LazyLock;

use super::check_length;
use crate::codebook::dynamic_map;
use crate::error::{Error, Result};
use crate::geometry::BlockSize;

/// A checked 256-value map, with the boundaries between its codes.
///
/// The code of a scaled value is that of the nearest map value. A value midway between two (their float32 midpoint)
/// gets the **even** one of the two codes; NaN gets code 0.
#[derive(Debug, Clone)]
pub struct ByteMap {
    values: [f32; 256],
    /// The code of `x` is the number of boundaries that `x` exceeds.
    boundaries: [f32; 255],
}

impl ByteMap {
    /// Checks that the values are finite and ascend (equal neighbours are allowed: shorter maps are padded so).
    pub fn new(values: &[f32; 256]) -> Result<Self> {
        if let Some(i) = values.iter().position(|v| !v.is_finite()) {
            return Err(Error::argument(
                "map",
                format!("{} at {i}", values[i]),
                "256 finite values in ascending order",
            ));
        }
        if let Some(i) = values.windows(2).position(|w| w[0] > w[1]) {
            let found = format!("{} at {i} before {} at {}", values[i], values[i + 1], i + 1);
            return Err(Error::argument("map", found, "256 finite values in ascending order"));
        }
        Ok(Self::from_checked(values))
    }

    fn from_checked(values: &[f32; 256]) -> Self {
        let boundaries = std::array::from_fn(|i| {
            let middle = (values[i] + values[i + 1]) * 0.5;
            // A tie goes to the even code: above an odd one it must count as exceeding the boundary, unless the
            // middle is the lower value itself.
            if i % 2 == 1 && middle > values[i] { middle.next_down() } else { middle }
        });
        Self { values: *values, boundaries }
    }

    /// The signed dynamic map of the format.
    pub fn dynamic() -> &'static Self {
        static DYNAMIC: LazyLock<ByteMap> = LazyLock::new(|| ByteMap::from_checked(dynamic_map()));
        &DYNAMIC
    }

    /// The value of each code.
    pub fn values(&self) -> &[f32; 256] {
        &self.values
    }

    /// The code of a scaled value.
    #[inline]
    pub fn code(&self, scaled: f32) -> u8 {
        let mut code = 0usize;
        for step in [128, 64, 32, 16, 8, 4, 2, 1] {
            code += if scaled > self.boundaries[code + step - 1] { step } else { 0 };
        }
        code as u8
    }
}

/// Quantizes to 8 bits: one scale per block in `absmax`, one code per value in `codes`.
///
/// As in 4 bits: NaN does not count for the scale, `scaled = x * (1 / absmax)` in float32; of an all-zero block
/// every scaled value is NaN and so every code 0.
///
/// # Errors
/// [`Error::Argument`] when `codes` does not have the length of `input`, or `absmax` not one scale per block.
pub fn quantize_8bit(
    input: &[f32],
    map: &ByteMap,
    blocksize: BlockSize,
    codes: &mut [u8],
    absmax: &mut [f32],
) -> Result<()> {
    check_length("codes", codes.len(), input.len(), "one code per value")?;
    check_length("absmax", absmax.len(), blocksize.absmax_len(input.len()), "one scale per block")?;
    let blocks = input.chunks(blocksize.get()).zip(codes.chunks_mut(blocksize.get())).zip(absmax);
    for ((block, codes), scale) in blocks {
        let max = block.iter().fold(0.0f32, |max, v| max.max(v.abs()));
        *scale = max;
        let inverse = 1.0 / max;
        for (value, code) in block.iter().zip(codes) {
            *code = map.code(value * inverse);
        }
    }
    Ok(())
}

/// Reads 8-bit codes back: `map[code] * absmax[block]` in float32.
///
/// # Errors
/// [`Error::Argument`] when `codes` does not have the length of `out`, or `absmax` not one scale per block.
pub fn dequantize_8bit(
    codes: &[u8],
    absmax: &[f32],
    map: &[f32; 256],
    blocksize: BlockSize,
    out: &mut [f32],
) -> Result<()> {
    check_length("codes", codes.len(), out.len(), "one code per value")?;
    check_length("absmax", absmax.len(), blocksize.absmax_len(out.len()), "one scale per block")?;
    let blocks = out.chunks_mut(blocksize.get()).zip(codes.chunks(blocksize.get())).zip(absmax);
    for ((block, codes), &scale) in blocks {
        for (value, &code) in block.iter_mut().zip(codes) {
            *value = map[usize::from(code)] * scale;
        }
    }
    Ok(())
}
