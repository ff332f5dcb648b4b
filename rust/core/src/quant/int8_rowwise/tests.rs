use half::{bf16, f16};
use proptest::prelude::*;
use safetensors::{Dtype, SafeTensors};

use super::scalar::LARGE;
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
    assert_eq!(error.to_string(), "codes is 5 elements long: expected 6 elements (rows x columns)");
    let error = dequantize_rows(&[0; 6], &[0.0; 3], 2, 3, &mut [0.0f32; 6]).unwrap_err();
    assert_eq!(error.to_string(), "scales is 3 elements long: expected 2 elements (one scale per row)");
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
