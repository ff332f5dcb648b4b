//! Rows to 8 bits and back: the statistics of LLM.int8().
//!
//! The scale of a row is its largest magnitude, and a code is `round(x * 127 / scale)`: a float32 product, a float32
//! quotient, the nearest integer, of two equally near the even one. To read: `code * scale * (1 / 127)`, two float32
//! products, rounded once to the output's type.

use rayon::prelude::*;

use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::geometry::{check_length, element_count};
use crate::quant::blockwise4::TASK;

/// Values that are converted together: a few cache lines, and enough for every vector unit.
const CHUNK: usize = 256;

/// From here on a row is divided by 256 first, with its scale: the product with 127 could overflow.
const LARGE: f32 = f32::from_bits((127 + 120) << 23); // 2^120

/// 1.5 * 2^23: a float32 of this size has no fraction, so that adding it rounds to an integer, in the low bits.
const ROUNDER: f32 = 12_582_912.0;

/// Quantizes each row of `input`, `[rows][columns]`, to `codes` and one scale in `scales`.
///
/// NaN does not count for the scale; its code is 0, as is every code of a row of zeros. A row with an infinity has an
/// infinite scale and codes 0. The result does not depend on the number of threads.
///
/// # Errors
/// [`Error::Argument`] unless `input` and `codes` have `rows * columns` elements and `scales` has `rows`.
pub fn quantize_rows<T: Element>(
    input: &[T],
    rows: usize,
    columns: usize,
    codes: &mut [i8],
    scales: &mut [f32],
) -> Result<()> {
    check("input", input.len(), codes.len(), scales.len(), rows, columns)?;
    if columns == 0 {
        scales.fill(0.0);
        return Ok(());
    }
    (input.par_chunks(columns), codes.par_chunks_mut(columns), scales)
        .into_par_iter()
        .with_min_len(TASK.div_ceil(columns))
        .for_each(|(row, codes, scale)| *scale = quantize_row(row, codes));
    Ok(())
}

/// Reads rows back: the way back of [`quantize_rows`].
///
/// # Errors
/// [`Error::Argument`] unless `codes` and `out` have `rows * columns` elements and `scales` has `rows`.
pub fn dequantize_rows<T: Element>(
    codes: &[i8],
    scales: &[f32],
    rows: usize,
    columns: usize,
    out: &mut [T],
) -> Result<()> {
    check("out", out.len(), codes.len(), scales.len(), rows, columns)?;
    if columns == 0 {
        return Ok(());
    }
    (codes.par_chunks(columns), scales, out.par_chunks_mut(columns))
        .into_par_iter()
        .with_min_len(TASK.div_ceil(columns))
        .for_each(|(codes, &scale, row)| {
            for (value, &code) in row.iter_mut().zip(codes) {
                *value = T::from_f32(f32::from(code) * scale * (1.0 / 127.0));
            }
        });
    Ok(())
}

fn check(
    argument: &'static str,
    values: usize,
    codes: usize,
    scales: usize,
    rows: usize,
    columns: usize,
) -> Result<()> {
    let n = element_count(&[rows, columns]).ok_or_else(|| {
        Error::argument("rows x columns", format!("{rows} x {columns}"), "a number of elements that fits in memory")
    })?;
    check_length(argument, values, n, "rows x columns")?;
    check_length("codes", codes, n, "rows x columns")?;
    check_length("scales", scales, rows, "one scale per row")
}

/// The codes of one row; gives its scale.
fn quantize_row<T: Element>(row: &[T], codes: &mut [i8]) -> f32 {
    let mut buffer = [0.0; CHUNK];
    let scale = row.chunks(CHUNK).fold(0.0f32, |scale, chunk| scale.max(largest(to_f32(chunk, &mut buffer))));
    let (factor, divisor) = if scale >= LARGE { (127.0 / 256.0, scale / 256.0) } else { (127.0, scale) };
    for (chunk, codes) in row.chunks(CHUNK).zip(codes.chunks_mut(CHUNK)) {
        for (code, &x) in codes.iter_mut().zip(to_f32(chunk, &mut buffer)) {
            *code = round_to_code(x * factor / divisor);
        }
    }
    scale
}

fn to_f32<'a, T: Element>(chunk: &[T], buffer: &'a mut [f32; CHUNK]) -> &'a [f32] {
    for (out, &value) in buffer.iter_mut().zip(chunk) {
        *out = value.to_f32();
    }
    &buffer[..chunk.len()]
}

/// The largest magnitude; NaN is passed over. The bits of magnitudes are in their order, which integers compare without
/// the exceptions of floats.
fn largest(values: &[f32]) -> f32 {
    const INFINITY: u32 = 0x7f80_0000;
    let largest = values.iter().fold(0, |largest, x| {
        let bits = x.to_bits() & 0x7fff_ffff;
        largest.max(if bits > INFINITY { 0 } else { bits })
    });
    f32::from_bits(largest)
}

/// The nearest integer of a magnitude of at most 127.5, ties to even; 0 of NaN. Without a call, so that loops become
/// vectors.
#[inline]
fn round_to_code(x: f32) -> i8 {
    let rounded = (x + ROUNDER).to_bits() as i8;
    if x.is_nan() { 0 } else { rounded }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use proptest::prelude::*;
    use safetensors::{Dtype, SafeTensors};

    use super::*;

    /// One row, as the words at the top say.
    fn definition(row: &[f32]) -> (Vec<i8>, f32) {
        let scale = row.iter().filter(|x| !x.is_nan()).fold(0.0f32, |scale, x| scale.max(x.abs()));
        // `as` gives 0 of NaN.
        (row.iter().map(|x| (x * 127.0 / scale).round_ties_even() as i8).collect(), scale)
    }

    fn quantized<T: Element>(input: &[T], rows: usize, columns: usize) -> (Vec<i8>, Vec<f32>) {
        let (mut codes, mut scales) = (vec![99; rows * columns], vec![9.0; rows]);
        quantize_rows(input, rows, columns, &mut codes, &mut scales).unwrap();
        (codes, scales)
    }

    fn dequantized(codes: &[i8], scales: &[f32], columns: usize) -> Vec<f32> {
        let mut out = vec![9.0; codes.len()];
        dequantize_rows(codes, scales, scales.len(), columns, &mut out).unwrap();
        out
    }

    fn floats(bytes: &[u8]) -> Vec<f32> {
        bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
    }

    /// Codes that differ from the golden ones, with their values and scales.
    fn golden_differences<T: Element>(
        file: &SafeTensors<'_>,
        [input, codes, scales]: &[String; 3],
        from_bits: fn(u16) -> T,
    ) -> Vec<(f32, f32, i8, i8)> {
        let tensor = |name: &str| file.tensor(name).unwrap();
        let shape = tensor(input).shape().to_vec();
        let halves = tensor(input).data().as_chunks::<2>().0.iter().map(|&b| from_bits(u16::from_le_bytes(b)));
        let input: Vec<T> = halves.collect();
        let (found, found_scales) = quantized(&input, shape[0], shape[1]);
        assert_eq!(found_scales, floats(tensor(scales).data()), "{scales}");
        let expected = tensor(codes).data().iter().map(|&b| b as i8);
        let pairs = found.into_iter().zip(expected).enumerate().filter(|(_, (a, b))| a != b);
        pairs.map(|(i, (a, b))| (input[i].to_f32(), found_scales[i / shape[1]], a, b)).collect()
    }

    #[test]
    fn golden_vectors() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/int8.safetensors");
        let bytes = std::fs::read(path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        for k in 0..3 {
            let names = ["input", "CB", "SCB"].map(|name| format!("r{k}.{name}"));
            let differences = match file.tensor(&names[0]).unwrap().dtype() {
                Dtype::BF16 => golden_differences(&file, &names, bf16::from_bits),
                _ => golden_differences(&file, &names, f16::from_bits),
            };
            assert_eq!(differences, [], "r{k}");
        }
        // Its approximate reciprocal puts two of these values, whose codes are 13.5 and 49.5 exactly, below the middle.
        let names = ["l8.weight", "l8.0.0.sd.weight", "l8.0.0.sd.SCB"].map(str::to_owned);
        let differences = golden_differences(&file, &names, f16::from_bits);
        assert_eq!(differences.len(), 2);
        for (x, scale, found, golden) in differences {
            let exact = f64::from(x) * 127.0 / f64::from(scale);
            assert!((exact - f64::from(golden) - 0.5).abs() < 1e-6 && found == golden + 1, "{exact} {found} {golden}");
        }
        for k in 0..3 {
            let tensor = |name: &str| file.tensor(&format!("r{k}.{name}")).unwrap();
            let codes: Vec<i8> = tensor("CB").data().iter().map(|&b| b as i8).collect();
            let found = dequantized(&codes, &floats(tensor("SCB").data()), tensor("CB").shape()[1]);
            assert_eq!(found, floats(tensor("dequantized").data()), "r{k}");
        }
    }

    #[test]
    fn zeros_nan_infinity_and_sizes() {
        let nan = f32::NAN;
        let input = [
            [0.0, -0.0, 0.0, 0.0],
            [nan, 1.0, -2.0, 0.5],
            [f32::INFINITY, 1.0, f32::NEG_INFINITY, nan],
            [nan; 4],
            [1e-45, -1e-45, 0.0, 3e-45],
            [f32::MAX, -f32::MAX, f32::MAX / 127.0, f32::MAX / 250.0],
        ];
        let (codes, scales) = quantized(input.as_flattened(), 6, 4);
        assert_eq!(scales, [0.0, 2.0, f32::INFINITY, 0.0, 3e-45, f32::MAX]);
        let expected = [[0; 4], [0, 64, -127, 32], [0; 4], [0; 4], [64, -64, 0, 127], [127, -127, 1, 1]];
        assert_eq!(codes, expected.as_flattened());
    }

    #[test]
    fn a_tie_goes_to_the_even_code() {
        // The scale is 127: codes are the values themselves, rounded.
        let input = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -125.5];
        assert_eq!(quantized(&input, 1, 9).0, [127, 0, 2, 2, 0, -2, -2, 126, -126]);
    }

    #[test]
    fn rows_without_columns_and_wrong_lengths() {
        assert_eq!(quantized::<f32>(&[], 3, 0), (vec![], vec![0.0; 3]));
        assert_eq!(quantized::<f32>(&[], 0, 3), (vec![], vec![]));
        dequantize_rows::<f32>(&[], &[1.0; 3], 3, 0, &mut []).unwrap();
        let error = quantize_rows(&[1.0f32; 6], 2, 3, &mut [0; 5], &mut [0.0; 2]).unwrap_err();
        assert_eq!(error.to_string(), "codes must be 6 elements long (rows x columns), got 5");
        let error = dequantize_rows(&[0; 6], &[0.0; 3], 2, 3, &mut [0.0f32; 6]).unwrap_err();
        assert_eq!(error.to_string(), "scales must be 2 elements long (one scale per row), got 3");
        assert!(quantize_rows::<f32>(&[], usize::MAX, 3, &mut [], &mut []).is_err());
    }

    #[test]
    fn every_16_bit_value_in_a_row_of_any_size() {
        for largest in [1.0f32, 0.3, 61.7, 65504.0, 6e-8, 2e-5] {
            let values: Vec<f32> =
                (0..=u16::MAX).map(|b| f16::from_bits(b).to_f32()).filter(|x| x.abs() <= largest).collect();
            let row: Vec<f16> = std::iter::once(largest).chain(values).map(f16::from_f32).collect();
            let wide: Vec<f32> = row.iter().map(|x| x.to_f32()).collect();
            let (codes, scale) = definition(&wide);
            assert_eq!(quantized(&row, 1, row.len()), (codes, vec![scale]));
        }
    }

    proptest! {
        #[test]
        fn rows_are_as_defined(
            columns in 1usize..600,
            values in prop::collection::vec(
                prop::num::f32::ANY.prop_filter("no overflow", |x| x.is_nan() || x.abs() < LARGE),
                1..2000,
            ),
        ) {
            let rows = values.len() / columns;
            let values = &values[..rows * columns];
            let (codes, scales) = quantized(values, rows, columns);
            for (r, row) in values.chunks(columns).enumerate() {
                let (expected, scale) = definition(row);
                prop_assert_eq!(&codes[r * columns..][..columns], expected);
                prop_assert_eq!(scales[r], scale);
            }
        }

        #[test]
        fn values_come_back_within_half_a_step(values in prop::collection::vec(-1e3f32..1e3, 1..1000)) {
            let (codes, scales) = quantized(&values, 1, values.len());
            for (a, b) in values.iter().zip(dequantized(&codes, &scales, values.len())) {
                prop_assert!((a - b).abs() <= scales[0] / 127.0 * 0.50001, "{a} {b}");
            }
        }
    }
}
