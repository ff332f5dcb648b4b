//! Double quantization: the scales of a 4-bit tensor, themselves quantized to 8 bits.
//!
//! `offset = mean(absmax)`; then `absmax - offset` is quantized in blocks of 256 with the dynamic map. To read:
//! `map[code] * absmax2[block] + offset`, a float32 product and then a float32 sum.

#[cfg(target_arch = "x86_64")]
mod x86;

use rayon::prelude::*;

use crate::codebook::dynamic_map;
use crate::error::Result;
use crate::geometry::{BlockSize, NESTED_BLOCK_SIZE, check_length};
use crate::quant::blockwise8::{ByteMap, quantize_block};

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

/// Scales per parallel task, a multiple of [`NESTED_BLOCK_SIZE`]: some 50 microseconds of work. Up to so many are worked
/// on by the calling thread alone.
pub const TASK: usize = 1 << 13;

/// Quantizes scales to 8 bits, on the calling thread alone. Of no scales at all, the offset is 0.
///
/// Scales that are not finite make the offset, and with it every scale that is read back, not finite.
pub fn quantize_absmax(absmax: &[f32]) -> Nested {
    let mut nested = Nested {
        codes: vec![0; absmax.len()],
        absmax: vec![0.0; BlockSize::NESTED.absmax_len(absmax.len())],
        offset: mean(absmax),
    };
    quantize_task(absmax, nested.offset, &mut nested.codes, &mut nested.absmax);
    nested
}

/// [`quantize_absmax`] into memory of the caller's, on rayon's current threads; gives the offset.
///
/// # Errors
/// [`crate::Error::Argument`] unless `codes` has the length of `absmax` and `absmax2` one scale per 256 codes.
pub fn quantize_absmax_into(absmax: &[f32], codes: &mut [u8], absmax2: &mut [f32]) -> Result<f32> {
    check_length("codes", codes.len(), absmax.len(), "one code per scale")?;
    check_length("absmax2", absmax2.len(), BlockSize::NESTED.absmax_len(absmax.len()), "one scale per 256 codes")?;
    if absmax.len() <= TASK {
        let offset = mean(absmax);
        quantize_task(absmax, offset, codes, absmax2);
        return Ok(offset);
    }
    let sums = absmax.par_chunks(TASK).flat_map_iter(group_sums).collect();
    let offset = mean_of_sums(sums, absmax.len());
    (absmax.par_chunks(TASK), codes.par_chunks_mut(TASK), absmax2.par_chunks_mut(TASK / NESTED_BLOCK_SIZE))
        .into_par_iter()
        .for_each(|(absmax, codes, absmax2)| quantize_task(absmax, offset, codes, absmax2));
    Ok(offset)
}

/// Quantizes scales whose mean is known. The lengths agree.
fn quantize_task(absmax: &[f32], offset: f32, codes: &mut [u8], absmax2: &mut [f32]) {
    let blocks = absmax.chunks(NESTED_BLOCK_SIZE).zip(codes.chunks_mut(NESTED_BLOCK_SIZE)).zip(absmax2);
    for ((absmax, codes), scale) in blocks {
        let mut centred = [0.0; NESTED_BLOCK_SIZE];
        let centred = &mut centred[..absmax.len()];
        for (centred, absmax) in centred.iter_mut().zip(absmax) {
            *centred = absmax - offset;
        }
        *scale = quantize_block(centred, ByteMap::dynamic(), codes);
    }
}

/// Reads doubly quantized scales.
///
/// # Errors
/// [`crate::Error::Argument`] unless `out` has the length of `codes` and `absmax2` one scale per 256 codes.
pub fn dequantize_absmax(codes: &[u8], absmax2: &[f32], offset: f32, out: &mut [f32]) -> Result<()> {
    check_length("out", out.len(), codes.len(), "one scale per code")?;
    check_length("absmax2", absmax2.len(), BlockSize::NESTED.absmax_len(codes.len()), "one scale per 256 codes")?;
    if out.len() <= TASK {
        dequantize_task(codes, absmax2, offset, out);
    } else {
        (codes.par_chunks(TASK), absmax2.par_chunks(TASK / NESTED_BLOCK_SIZE), out.par_chunks_mut(TASK))
            .into_par_iter()
            .for_each(|(codes, absmax2, out)| dequantize_task(codes, absmax2, offset, out));
    }
    Ok(())
}

/// The lengths agree.
fn dequantize_task(codes: &[u8], absmax2: &[f32], offset: f32, out: &mut [f32]) {
    let groups = codes.chunks(NESTED_BLOCK_SIZE).zip(out.chunks_mut(NESTED_BLOCK_SIZE));
    for ((codes, out), &absmax2) in groups.zip(absmax2) {
        dequantize_group(codes, absmax2, offset, out);
    }
}

/// Reads the scales of codes that share one: `map[code] * absmax2 + offset`, rounded twice.
pub(crate) fn dequantize_group(codes: &[u8], absmax2: f32, offset: f32, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if x86::is_available() {
        // SAFETY: the machine has the instructions.
        unsafe { x86::dequantize_group(codes, absmax2, offset, out) }
        return;
    }
    dequantize_group_scalar(codes, absmax2, offset, out);
}

fn dequantize_group_scalar(codes: &[u8], absmax2: f32, offset: f32, out: &mut [f32]) {
    let map = dynamic_map();
    for (scale, &code) in out.iter_mut().zip(codes) {
        *scale = map[usize::from(code)] * absmax2 + offset;
    }
}

/// The mean, in an order that any device can follow to the same bits: float64 sums by a binary tree inside groups
/// of 256 (the last filled up with zeros), the group sums by the same tree until one is left, divided by the count
/// in float64, rounded once. Of nothing: 0.
pub fn mean(values: &[f32]) -> f32 {
    mean_of_sums(group_sums(values).collect(), values.len())
}

/// The sums of the groups of 256.
fn group_sums(values: &[f32]) -> impl Iterator<Item = f64> {
    values.chunks(NESTED_BLOCK_SIZE).map(|group| tree_sum(group, |&v| f64::from(v)))
}

/// The mean of `count` values from the sums of their groups.
fn mean_of_sums(mut sums: Vec<f64>, count: usize) -> f32 {
    while sums.len() > 1 {
        sums = sums.chunks(NESTED_BLOCK_SIZE).map(|group| tree_sum(group, |&s| s)).collect();
    }
    sums.first().map_or(0.0, |sum| (sum / count as f64) as f32)
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn groups_have_the_same_bits_on_every_path() {
        let codes: Vec<u8> = (0..=255).map(|i: u8| i.wrapping_mul(37)).collect();
        for (absmax2, offset) in [(0.37, 0.011), (f32::MIN_POSITIVE, -1e-39), (f32::INFINITY, 1.0), (f32::NAN, 0.0)] {
            for (start, stop) in [(0, 256), (0, 64), (3, 68), (7, 8), (5, 5), (100, 256), (255, 256), (1, 130)] {
                let codes = &codes[start..stop];
                // One more, which is left alone.
                let mut found = vec![7.0f32; codes.len() + 1];
                let mut expected = found.clone();
                dequantize_group(codes, absmax2, offset, &mut found[..codes.len()]);
                dequantize_group_scalar(codes, absmax2, offset, &mut expected[..codes.len()]);
                for (found, expected) in found.iter().zip(&expected) {
                    assert!(found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan());
                }
            }
        }
    }

    #[test]
    fn the_mean_follows_its_tree() {
        // 2^53 + 1 + 1 + … keeps none of the ones when summed in a row; a tree keeps those that meet each other first.
        let mut values = vec![1.0f32; 256];
        values[0] = 9_007_199_254_740_992.0;
        assert_eq!(tree_sum(&values, |&v| f64::from(v)), 9_007_199_254_740_992.0 + 254.0);
        // Three levels, with the mean of equal values being that value.
        assert_eq!(mean(&vec![0.1; 256 * 256 + 1]), 0.1);
        assert_eq!(mean(&[1.0, 2.0]), 1.5);
        assert_eq!(mean(&[]), 0.0);
    }

    #[test]
    fn of_nothing_and_of_equal_scales() {
        let nothing = quantize_absmax(&[]);
        assert_eq!(nothing, Nested { codes: vec![], absmax: vec![], offset: 0.0 });
        // Centred on zero all scaled values are NaN: codes 0, and a scale of 0 that makes them harmless.
        let equal = quantize_absmax(&[0.25; 300]);
        assert_eq!((&equal.codes, &equal.absmax, equal.offset), (&vec![0; 300], &vec![0.0; 2], 0.25));
        let mut out = [0.0; 300];
        dequantize_absmax(&equal.codes, &equal.absmax, equal.offset, &mut out).unwrap();
        assert_eq!(out, [0.25; 300]);
    }

    #[test]
    fn wrong_lengths_are_errors() {
        assert!(dequantize_absmax(&[0; 257], &[1.0], 0.0, &mut [0.0; 257]).is_err());
        assert!(dequantize_absmax(&[0; 257], &[1.0; 2], 0.0, &mut [0.0; 256]).is_err());
        let error = quantize_absmax_into(&[0.0; 257], &mut [0; 257], &mut [0.0; 1]).unwrap_err();
        assert_eq!(error.to_string(), "absmax2 must be 2 elements long (one scale per 256 codes), got 1");
    }

    #[test]
    fn threads_change_no_bit() {
        for len in [1, 255, TASK - 1, TASK, TASK + 1, 3 * TASK + 777] {
            let scales: Vec<f32> =
                (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 * 1e-7).collect();
            let expected = quantize_absmax(&scales);
            let mut codes = vec![0; len];
            let mut absmax = vec![0.0; len.div_ceil(NESTED_BLOCK_SIZE)];
            let offset = quantize_absmax_into(&scales, &mut codes, &mut absmax).unwrap();
            assert_eq!(Nested { codes, absmax, offset }, expected, "{len}");
            let mut sum = 0.0;
            scales.iter().for_each(|&scale| sum += f64::from(scale));
            assert!((f64::from(offset) / (sum / len as f64) - 1.0).abs() < 1e-6 || len == 1, "{len}");
        }
    }

    proptest! {
        #[test]
        fn scales_come_back_within_half_a_step(scales in prop::collection::vec(0.0f32..4.0, 1..1000)) {
            let nested = quantize_absmax(&scales);
            let mut out = vec![0.0; scales.len()];
            dequantize_absmax(&nested.codes, &nested.absmax, nested.offset, &mut out).unwrap();
            for (i, (a, b)) in scales.iter().zip(&out).enumerate() {
                // The widest gap of the map is 0.0140625, but the lowest value is 0.00703 short of -1.
                let step = nested.absmax[i / 256] * 0.00704 + 1e-6;
                prop_assert!((a - b).abs() <= step, "{a} {b} {step}");
            }
        }
    }
}
