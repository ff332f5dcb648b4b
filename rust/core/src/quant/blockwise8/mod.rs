//! Blockwise 8-bit quantization with any ascending map of 256 values.

use std::sync::LazyLock;

use rayon::prelude::*;

use crate::codebook::dynamic_map;
use crate::error::{Error, Result};
use crate::geometry::{BlockSize, check_length};

/// Values whose codes are searched for together.
const LANES: usize = 8;

/// Values per parallel task, a multiple of every block size. Up to so many are worked on by the calling thread alone.
pub const TASK: usize = 1 << 14;

/// A checked 256-value map, with the boundaries between its codes.
///
/// The code of a scaled value is that of the nearest map value. A value midway between two (their float32 midpoint)
/// gets the **even** one of the two codes; NaN gets code 0.
#[derive(Debug, Clone)]
pub struct ByteMap {
    values: [f32; 256],
    /// The code of `x` is the number of boundaries that `x` exceeds. There are 255, and one that none exceeds.
    boundaries: [f32; 256],
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
            if i == 255 {
                return f32::INFINITY;
            }
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
    pub fn code(&self, scaled: f32) -> u8 {
        self.codes([scaled])[0]
    }

    /// The codes of several scaled values: searches that take turns, so that none waits for memory alone.
    #[inline]
    fn codes<const N: usize>(&self, scaled: [f32; N]) -> [u8; N] {
        let mut codes = [0u8; N];
        for step in [128u8, 64, 32, 16, 8, 4, 2, 1] {
            for (code, &x) in codes.iter_mut().zip(&scaled) {
                // `code` is a multiple of `2 * step`: this is the boundary before `code + step`.
                let exceeds = x > self.boundaries[usize::from(*code | (step - 1))];
                *code |= u8::from(exceeds) * step;
            }
        }
        codes
    }
}

/// Quantizes to 8 bits on rayon's current threads: one scale per block in `absmax`, one code per value in `codes`.
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
    let block = blocksize.get();
    if input.len() <= TASK {
        quantize_task(input, map, block, codes, absmax);
    } else {
        (input.par_chunks(TASK), codes.par_chunks_mut(TASK), absmax.par_chunks_mut(TASK / block))
            .into_par_iter()
            .for_each(|(input, codes, absmax)| quantize_task(input, map, block, codes, absmax));
    }
    Ok(())
}

/// The lengths agree.
fn quantize_task(input: &[f32], map: &ByteMap, block: usize, codes: &mut [u8], absmax: &mut [f32]) {
    for ((input, codes), scale) in input.chunks(block).zip(codes.chunks_mut(block)).zip(absmax) {
        *scale = quantize_block(input, map, codes);
    }
}

/// Quantizes one block; gives its scale. `codes` has the length of `block`.
pub(crate) fn quantize_block(block: &[f32], map: &ByteMap, codes: &mut [u8]) -> f32 {
    let max = block.iter().fold(0.0f32, |max, v| max.max(v.abs()));
    let inverse = 1.0 / max;
    let (whole, rest) = block.as_chunks::<LANES>();
    let (code_whole, code_rest) = codes.as_chunks_mut::<LANES>();
    for (values, codes) in whole.iter().zip(code_whole) {
        *codes = map.codes(values.map(|v| v * inverse));
    }
    for (value, code) in rest.iter().zip(code_rest) {
        *code = map.code(value * inverse);
    }
    max
}

/// Reads 8-bit codes back on rayon's current threads: `map[code] * absmax[block]` in float32.
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
    check_dequantize_lengths(codes, absmax, blocksize, out)?;
    let block = blocksize.get();
    if out.len() <= TASK {
        dequantize_task(codes, absmax, map, block, out);
    } else {
        (codes.par_chunks(TASK), absmax.par_chunks(TASK / block), out.par_chunks_mut(TASK))
            .into_par_iter()
            .for_each(|(codes, absmax, out)| dequantize_task(codes, absmax, map, block, out));
    }
    Ok(())
}

/// [`dequantize_8bit`] on the calling thread alone.
///
/// # Errors
/// As [`dequantize_8bit`].
pub fn dequantize_8bit_serial(
    codes: &[u8],
    absmax: &[f32],
    map: &[f32; 256],
    blocksize: BlockSize,
    out: &mut [f32],
) -> Result<()> {
    check_dequantize_lengths(codes, absmax, blocksize, out)?;
    dequantize_task(codes, absmax, map, blocksize.get(), out);
    Ok(())
}

fn check_dequantize_lengths(codes: &[u8], absmax: &[f32], blocksize: BlockSize, out: &[f32]) -> Result<()> {
    check_length("codes", codes.len(), out.len(), "one code per value")?;
    check_length("absmax", absmax.len(), blocksize.absmax_len(out.len()), "one scale per block")
}

/// The lengths agree.
fn dequantize_task(codes: &[u8], absmax: &[f32], map: &[f32; 256], block: usize, out: &mut [f32]) {
    for ((out, codes), &scale) in out.chunks_mut(block).zip(codes.chunks(block)).zip(absmax) {
        for (value, &code) in out.iter_mut().zip(codes) {
            *value = map[usize::from(code)] * scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The search that the codes of the format come from: seven halvings among the values, ending on an even code;
    /// then the midpoint to the neighbour on the side of `x`.
    fn search(map: &[f32; 256], x: f32) -> u8 {
        let (mut pivot, mut lower, mut upper) = (127usize, 0usize, 255usize);
        for step in [64, 32, 16, 8, 4, 2, 1] {
            if x > map[pivot] {
                lower = pivot;
                pivot += step;
            } else {
                upper = pivot;
                pivot -= step;
            }
        }
        let code = if x > map[pivot] {
            if x > (map[upper] + map[pivot]) * 0.5 { upper } else { pivot }
        } else if x < (map[lower] + map[pivot]) * 0.5 {
            lower
        } else {
            pivot
        };
        code as u8
    }

    fn assert_as_searched(values: &[f32; 256], xs: impl IntoIterator<Item = f32>) {
        let map = ByteMap::new(values).unwrap();
        for x in xs {
            assert_eq!(map.code(x), search(values, x), "{x}");
        }
    }

    fn neighbourhood(values: &[f32; 256]) -> Vec<f32> {
        let middles = values.windows(2).map(|w| (w[0] + w[1]) * 0.5);
        let points = values.iter().copied().chain(middles);
        points
            .chain([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN])
            .flat_map(|x| [x.next_down(), x, x.next_up()])
            .collect()
    }

    #[test]
    fn dynamic_codes_are_those_of_the_search() {
        assert_as_searched(dynamic_map(), neighbourhood(dynamic_map()));
        let map = ByteMap::dynamic();
        assert_eq!((map.code(f32::NAN), map.code(1.0), map.code(-1.0), map.code(0.0)), (0, 255, 0, 127));
        for (code, &value) in dynamic_map().iter().enumerate() {
            assert_eq!(usize::from(map.code(value)), code);
        }
    }

    #[test]
    fn a_tie_goes_to_the_even_code() {
        let values: [f32; 256] = std::array::from_fn(|i| (i as f32 - 128.0) / 128.0);
        let map = ByteMap::new(&values).unwrap();
        for low in 0..255u8 {
            let middle = (values[usize::from(low)] + values[usize::from(low) + 1]) * 0.5;
            assert_eq!(map.code(middle), low + low % 2);
        }
    }

    #[test]
    fn unsuitable_maps_are_errors() {
        let mut values = *dynamic_map();
        values.swap(3, 4);
        let message = ByteMap::new(&values).unwrap_err().to_string();
        assert!(message.starts_with("map must be 256 finite values in ascending order, got "), "{message}");
        values[0] = f32::NAN;
        assert!(ByteMap::new(&values).unwrap_err().to_string().ends_with("in ascending order, got NaN at 0"));
    }

    #[test]
    fn all_zero_blocks_and_lengths() {
        let (mut codes, mut absmax) = ([9; 65], [9.0; 2]);
        let mut input = [0.0; 65];
        input[64] = -3.0;
        quantize_8bit(&input, ByteMap::dynamic(), BlockSize::DEFAULT, &mut codes, &mut absmax).unwrap();
        assert_eq!((codes, absmax), ([0; 65], [0.0, 3.0]));
        let mut out = [1.0; 65];
        dequantize_8bit(&codes, &absmax, dynamic_map(), BlockSize::DEFAULT, &mut out).unwrap();
        assert_eq!((out[0], out[64]), (0.0, dynamic_map()[0] * 3.0));
        assert!(quantize_8bit(&input, ByteMap::dynamic(), BlockSize::DEFAULT, &mut codes[1..], &mut absmax).is_err());
        assert!(dequantize_8bit(&codes, &absmax[1..], dynamic_map(), BlockSize::DEFAULT, &mut out).is_err());
    }

    #[test]
    fn threads_change_no_bit() {
        for block in [32, 4096] {
            let blocksize = BlockSize::new(block).unwrap();
            let len = 2 * TASK + 1234;
            let input: Vec<f32> =
                (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) as i32) as f32 * 1e-9).collect();
            let mut codes = [vec![0; len], vec![0; len]];
            let mut absmax = [vec![0.0; len.div_ceil(block)], vec![0.0; len.div_ceil(block)]];
            let [threaded, alone] = &mut codes;
            let [threaded_absmax, alone_absmax] = &mut absmax;
            quantize_8bit(&input, ByteMap::dynamic(), blocksize, threaded, threaded_absmax).unwrap();
            quantize_task(&input, ByteMap::dynamic(), block, alone, alone_absmax);
            assert_eq!(threaded, alone);
            assert_eq!(threaded_absmax, alone_absmax);
            let mut out = [vec![0.0; len], vec![0.0; len]];
            dequantize_8bit(threaded, threaded_absmax, dynamic_map(), blocksize, &mut out[0]).unwrap();
            dequantize_8bit_serial(threaded, threaded_absmax, dynamic_map(), blocksize, &mut out[1]).unwrap();
            assert_eq!(out[0], out[1]);
            assert!(out[0].iter().any(|v| *v != 0.0));
        }
    }

    proptest! {
        #[test]
        fn codes_of_any_map_are_those_of_the_search(
            mut values in prop::collection::vec(prop_oneof![-1.0f32..1.0, Just(0.0), Just(0.5)], 256),
            xs in prop::collection::vec(-1.1f32..1.1, 100),
        ) {
            values.sort_by(f32::total_cmp);
            let values: &[f32; 256] = values.as_slice().try_into().unwrap();
            assert_as_searched(values, xs.into_iter().chain(neighbourhood(values)));
        }
    }
}
