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

/// Rows without outliers, as the words at [`quantize_rows_outliers`] say: codes, scales, marks.
fn apart(values: &[f32], columns: usize, threshold: f32) -> (Vec<i8>, Vec<f32>, Vec<u8>) {
    let mut marks = vec![0u8; columns];
    values.iter().enumerate().filter(|(_, x)| x.abs() >= threshold).for_each(|(i, _)| marks[i % columns] = 1);
    let (mut codes, mut scales) = (vec![], vec![]);
    for row in values.chunks(columns) {
        let counts = row.iter().filter(|x| x.abs() < threshold);
        let scale = counts.fold(0.0f32, |scale, x| scale.max(x.abs()));
        scales.push(scale);
        let code = |(x, &mark): (&f32, &u8)| if mark == 1 { 0 } else { (x * 127.0 / scale).round_ties_even() as i8 };
        codes.extend(row.iter().zip(&marks).map(code));
    }
    (codes, scales, marks)
}

/// As [`apart`], by a path.
fn found_apart<T: Element>(simd: Simd, input: &[T], columns: usize, threshold: f32) -> (Vec<i8>, Vec<f32>, Vec<u8>) {
    let rows = input.len() / columns;
    let (mut codes, mut scales, mut marks) = (vec![99; input.len()], vec![9.0; rows], vec![9; columns]);
    let (full, shape) = (Precision::Full, [rows, columns]);
    quantize_rows_outliers(simd, input, full, threshold, shape, &mut codes, &mut scales, &mut marks).unwrap();
    (codes, scales, marks)
}

#[test]
fn outliers_are_kept_apart() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let input = [[1.0, -6.0, 3.0, nan], [5.9, 1.0, 0.0, -2.0], [nan, inf, -7.0, 6.5]];
    for simd in Simd::available() {
        let (codes, scales, marks) = found_apart(simd, input.as_flattened(), 4, 6.0);
        assert_eq!(marks, [0, 1, 1, 1], "{simd}");
        assert_eq!(scales, [3.0, 5.9, 0.0], "{simd}: a small value in a marked column counts");
        assert_eq!(codes, [42, 0, 0, 0, 127, 0, 0, 0, 0, 0, 0, 0], "{simd}");
        // An infinite threshold marks infinities alone.
        let (_, scales, marks) = found_apart(simd, input.as_flattened(), 4, inf);
        assert_eq!((marks, scales), (vec![0, 1, 0, 0], vec![6.0, 5.9, 7.0]), "{simd}");
    }
}

#[test]
fn outliers_of_nothing_and_wrong_calls() {
    let call = |shape: [usize; 2], threshold: f32, lengths: [usize; 3]| {
        let [n, rows, columns] = lengths;
        let (input, mut codes) = (vec![1.0f32; n], vec![9; n]);
        let (mut scales, mut marks) = (vec![9.0; rows], vec![9; columns]);
        let full = Precision::Full;
        quantize_rows_outliers(Simd::Scalar, &input, full, threshold, shape, &mut codes, &mut scales, &mut marks)
            .map(|()| (scales, marks))
            .map_err(|error| error.to_string())
    };
    assert_eq!(call([0, 3], 6.0, [0, 0, 3]), Ok((vec![], vec![0; 3])));
    assert_eq!(call([3, 0], 6.0, [0, 3, 0]), Ok((vec![0.0; 3], vec![])));
    for threshold in [0.0, -1.0, f32::NAN] {
        let error = format!("threshold must be a number greater than 0, got {threshold}");
        assert_eq!(call([2, 2], threshold, [4, 2, 2]), Err(error));
    }
    assert!(call([2, 2], 1.0, [3, 2, 2]).unwrap_err().starts_with("input must be "));
    assert!(call([2, 2], 1.0, [4, 1, 2]).unwrap_err().starts_with("scales must be "));
    assert!(call([2, 2], 1.0, [4, 2, 3]).unwrap_err().starts_with("outliers must be "));
    assert!(call([usize::MAX, 2], 1.0, [4, 2, 3]).unwrap_err().starts_with("rows must be "));
}

#[test]
fn half_precision_is_float16_in_the_range_of_float32() {
    // Where float16 is normal, its rounding is meant; elsewhere the same number of bits counts.
    let halves = (0..=u16::MAX).map(|b| f16::from_bits(b).to_f32()).filter(|x| x.is_normal() && x.abs() > 1e-4);
    let values: Vec<f32> = halves.flat_map(|x| [x, x * 1.000_24, x * 1.000_488_3, x * 1.000_8]).collect();
    let rounded: Vec<f32> =
        values.iter().map(|&x| f16::from_f32(x).to_f32()).map(|x| if x.is_finite() { x } else { 0.0 }).collect();
    let values: Vec<f32> = values.iter().zip(&rounded).map(|(&x, &r)| if r == 0.0 { 0.0 } else { x }).collect();
    for simd in Simd::available() {
        for scale in [1.0, 2f32.powi(100), 2f32.powi(-100)] {
            let wide: Vec<f32> = values.iter().map(|x| x * scale).collect();
            let short: Vec<f32> = rounded.iter().map(|x| x * scale).collect();
            let (mut codes, mut expected) = (vec![9; wide.len()], vec![8; wide.len()]);
            let largest = row::largest(simd, &wide, Precision::Half);
            assert_eq!(largest, row::largest(simd, &short, Precision::Full), "{simd} {scale}");
            row::encode(simd, &wide, Precision::Half, largest, None, &mut codes);
            row::encode(simd, &short, Precision::Full, largest, None, &mut expected);
            assert_eq!(codes, expected, "{simd} {scale}");
        }
        for x in [f32::INFINITY, f32::NAN] {
            assert_eq!(row::largest(simd, &[x, 1.0], Precision::Half), if x.is_nan() { 1.0 } else { x });
        }
    }
}

/// Codes and scales by every path, of one type.
fn check_paths<T: Element>(values: &[f32], columns: usize, threshold: f32) {
    let input: Vec<T> = values.iter().map(|&x| T::from_f32(x)).collect();
    let wide: Vec<f32> = input.iter().map(|x| x.to_f32()).collect();
    let rows = input.len() / columns;
    let expected: Vec<(Vec<i8>, f32)> = wide.chunks(columns).map(definition).collect();
    let codes: Vec<i8> = expected.iter().flat_map(|(codes, _)| codes.clone()).collect();
    let scales: Vec<f32> = expected.iter().map(|(_, scale)| *scale).collect();
    let value = |i: usize| T::from_f32(f32::from(codes[i]) * scales[i / columns] * (1.0 / 127.0));
    for simd in Simd::available() {
        let (mut found, mut found_scales) = (vec![99; input.len()], vec![9.0; rows]);
        quantize_rows_by(simd, &input, rows, columns, &mut found, &mut found_scales).unwrap();
        assert_eq!((&found, &found_scales), (&codes, &scales), "{simd}");
        let mut out = vec![T::default(); input.len()];
        dequantize_rows_by(simd, &codes, &scales, rows, columns, &mut out).unwrap();
        let same = |(i, &x): (usize, &T)| x == value(i) || x.to_f32().is_nan() && value(i).to_f32().is_nan();
        assert!(out.iter().enumerate().all(same), "{simd}");
        let mut rounded = vec![9.0; columns];
        row::read_rounded::<T>(simd, &codes[..columns], scales[0], &mut rounded);
        let same = |(a, b): (&f32, &T)| *a == b.to_f32() || a.is_nan() && b.to_f32().is_nan();
        assert!(rounded.iter().zip(&out).all(same), "{simd}");
        assert_eq!(found_apart(simd, &input, columns, threshold), apart(&wide, columns, threshold), "{simd}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn rows_are_as_defined_on_every_path(
        columns in 1usize..600,
        values in prop::collection::vec(
            prop_oneof![
                4 => -9f32..9.0,
                1 => prop::num::f32::ANY.prop_filter("no overflow", |x| x.is_nan() || x.abs() < LARGE),
            ],
            600..2000,
        ),
        threshold in prop::sample::select(vec![1e-30f32, 0.5, 6.0, 1e20, f32::INFINITY]),
    ) {
        let values = &values[..values.len() / columns * columns];
        check_paths::<f32>(values, columns, threshold);
        check_paths::<f16>(values, columns, threshold);
        check_paths::<bf16>(values, columns, threshold);
    }

    #[test]
    fn values_come_back_within_half_a_step(values in prop::collection::vec(-1e3f32..1e3, 1..1000)) {
        let (codes, scales) = quantized(&values, 1, values.len());
        for (a, b) in values.iter().zip(dequantized(&codes, &scales, values.len())) {
            prop_assert!((a - b).abs() <= scales[0] / 127.0 * 0.50001, "{a} {b}");
        }
    }
}
