//! Every path gives the bits of the scalar definition, for any bits that come in.

use half::{bf16, f16};
use proptest::prelude::*;

use crate::codebook::QuantType;
use crate::dtype::Element;
use crate::error::Error;
use crate::geometry::{BLOCK_SIZES, BlockSize, packed_len};
use crate::quant::blockwise4::{
    STAGE, Stores, TASK, dequantize, dequantize_serial_with, dequantize_task, quantize, quantize_serial_with, scalar,
};
use crate::quant::{Finite, first_nonfinite};
use crate::simd::Simd;

/// Tests see values as bits: a float32 does not tell every pair of them apart.
trait Bits: Element {
    fn from_low_bits(bits: u32) -> Self;
    fn bits(self) -> u32;
}

impl Bits for f32 {
    fn from_low_bits(bits: u32) -> Self {
        f32::from_bits(bits)
    }
    fn bits(self) -> u32 {
        self.to_bits()
    }
}

impl Bits for f16 {
    fn from_low_bits(bits: u32) -> Self {
        f16::from_bits(bits as u16)
    }
    fn bits(self) -> u32 {
        self.to_bits().into()
    }
}

impl Bits for bf16 {
    fn from_low_bits(bits: u32) -> Self {
        bf16::from_bits(bits as u16)
    }
    fn bits(self) -> u32 {
        self.to_bits().into()
    }
}

fn bits<T: Bits>(values: &[T]) -> Vec<u32> {
    values.iter().map(|v| v.bits()).collect()
}

type Quantized = (Finite, Vec<u8>, Vec<u32>);

fn quantized<T: Bits>(
    input: &[T],
    blocksize: BlockSize,
    run: impl FnOnce(&mut [u8], &mut [f32]) -> Finite,
) -> Quantized {
    let mut packed = vec![0xEE; packed_len(input.len())];
    let mut absmax = vec![f32::NAN; blocksize.absmax_len(input.len())];
    let finite = run(&mut packed, &mut absmax);
    (finite, packed, bits(&absmax))
}

fn by_definition<T: Bits>(input: &[T], quant_type: QuantType, blocksize: BlockSize) -> Quantized {
    quantized(input, blocksize, |packed, absmax| scalar::quantize(input, quant_type, blocksize.get(), packed, absmax))
}

fn assert_quantizes_alike<T: Bits>(input: &[T], quant_type: QuantType, blocksize: BlockSize) {
    let expected = by_definition(input, quant_type, blocksize);
    for simd in Simd::available() {
        let found = quantized(input, blocksize, |packed, absmax| {
            quantize_serial_with(simd, input, quant_type, blocksize, packed, absmax).unwrap()
        });
        if found != expected {
            let at = found.1.iter().zip(&expected.1).position(|(a, b)| a != b).unwrap_or(0);
            let values = &input[2 * at..(2 * at + 2).min(input.len())];
            panic!(
                "{simd} {} {quant_type} {blocksize:?} n={}: byte {at} is {:?}, not {:?}, of {values:?}; {:?} {:?}",
                T::DTYPE,
                input.len(),
                found.1.get(at),
                expected.1.get(at),
                (found.0, &found.2),
                (expected.0, &expected.2),
            );
        }
    }
    assert_eq!(expected.0 == Finite::HasNonFinite, first_nonfinite(input).is_some());
}

fn assert_dequantizes_alike<T: Bits>(packed: &[u8], absmax: &[f32], n: usize, quant_type: QuantType, size: BlockSize) {
    let mut expected = vec![T::default(); n];
    scalar::dequantize(packed, absmax, quant_type, size.get(), &mut expected);
    let expected = bits(&expected);
    for simd in Simd::available() {
        for stores in [Stores::Cached, Stores::Streaming] {
            // Off the alignment that streaming stores want, and with room to see a store too far.
            let mut out = vec![T::from_f32(0.5); n + 2];
            dequantize_task(simd, stores, packed, absmax, quant_type, size.get(), &mut out[1..=n]);
            assert_eq!(bits(&out[1..=n]), expected, "{simd} {} {quant_type} {size:?} {stores:?}", T::DTYPE);
            assert_eq!((out[0], out[n + 1]), (T::from_f32(0.5), T::from_f32(0.5)), "{simd} {}", T::DTYPE);
        }
    }
}

/// Random bits of several characters: any pattern, ordinary weights, few different magnitudes (many ties with the
/// scale), and values at the thresholds of a block whose scale is a power of two.
fn patterns() -> impl Strategy<Value = Vec<u32>> {
    let weights = (-8.0f32..8.0).prop_map(f32::to_bits);
    let weights_16 = (-8.0f32..8.0).prop_map(|v| u32::from(f16::from_f32(v).to_bits()));
    let weights_bf16 = (-8.0f32..8.0).prop_map(|v| u32::from(bf16::from_f32(v).to_bits()));
    let tiny = (any::<bool>(), 0u32..0x0200_0000).prop_map(|(negative, bits)| bits | u32::from(negative) << 31);
    let special = prop::sample::select(vec![
        0u32,
        0x8000_0000,
        0x8000,
        0x7f80_0000,
        0xff80_0000,
        0x7f80_0001,
        0xffff_ffff,
        0x7fc0_0000,
        0x7f80,
        0x7c00,
        0xfc00,
        0x7fff,
        1,
        0x0080,
        0x0040_0000,
        0x7f7f_ffff,
    ]);
    let near_threshold = (0usize..22, -3i32..4, any::<bool>()).prop_map(|(i, ulps, negative)| {
        let thresholds = crate::codebook::NF4_THRESHOLDS.into_iter().chain(crate::codebook::FP4_THRESHOLDS);
        let threshold = thresholds.into_iter().nth(i).unwrap_or(1.0);
        let bits = threshold.to_bits().wrapping_add_signed(ulps);
        if negative { bits ^ 0x8000_0000 } else { bits }
    });
    let one = Just(1.0f32.to_bits());
    let n = 0usize..4500;
    prop_oneof![
        prop::collection::vec(any::<u32>(), n.clone()),
        prop::collection::vec(weights, n.clone()),
        prop::collection::vec(weights_16, n.clone()),
        prop::collection::vec(weights_bf16, n.clone()),
        prop::collection::vec(tiny.clone(), n.clone()),
        prop::collection::vec(prop_oneof![3 => near_threshold, 1 => one], n.clone()),
        prop::collection::vec(prop_oneof![20 => 0u32..0x0100_0000, 1 => special], n),
    ]
}

fn quant_type() -> impl Strategy<Value = QuantType> {
    prop::sample::select(QuantType::ALL.to_vec())
}

fn block_size() -> impl Strategy<Value = BlockSize> {
    prop::sample::select(BLOCK_SIZES.to_vec()).prop_map(|size| BlockSize::new(size).unwrap())
}

fn from_patterns<T: Bits>(patterns: &[u32]) -> Vec<T> {
    patterns.iter().map(|&bits| T::from_low_bits(bits)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn quantizes_any_bits_as_defined(patterns in patterns(), quant_type in quant_type(), size in block_size()) {
        assert_quantizes_alike(&from_patterns::<f32>(&patterns), quant_type, size);
        assert_quantizes_alike(&from_patterns::<f16>(&patterns), quant_type, size);
        assert_quantizes_alike(&from_patterns::<bf16>(&patterns), quant_type, size);
    }

    #[test]
    fn dequantizes_any_bits_as_defined(
        packed in prop::collection::vec(any::<u8>(), 0..5000),
        odd in any::<bool>(),
        scales in patterns(),
        quant_type in quant_type(),
        size in block_size(),
    ) {
        let n = (2 * packed.len()).saturating_sub(usize::from(odd));
        let blocks = size.absmax_len(n);
        let scales: Vec<f32> = scales.into_iter().map(f32::from_bits).chain(std::iter::repeat(0.75)).take(blocks).collect();
        assert_dequantizes_alike::<f32>(&packed, &scales, n, quant_type, size);
        assert_dequantizes_alike::<f16>(&packed, &scales, n, quant_type, size);
        assert_dequantizes_alike::<bf16>(&packed, &scales, n, quant_type, size);
    }
}

/// Scales of every kind: zero, denormal, without a finite reciprocal, ordinary, huge, infinite, NaN.
const SCALES: [f32; 16] = [
    0.0,
    1e-45,
    1e-40,
    2.9e-39,
    3.0e-39,
    1.2e-38,
    6e-8,
    6.1e-5,
    0.0123,
    0.75,
    1.0,
    3.0,
    65504.0,
    3.3e38,
    f32::INFINITY,
    f32::NAN,
];

/// Every 16-bit pattern, in blocks whose largest value is that of the block or a given scale.
fn every_pattern<T: Bits>() {
    let all: Vec<T> = (0..=u16::MAX).map(|bits| T::from_low_bits(bits.into())).collect();
    for quant_type in QuantType::ALL {
        for scale in SCALES {
            let scale = T::from_f32(scale);
            // As many patterns as fit below the scale share its block; those above it have one of their own.
            let magnitude = |v: T| v.bits() & 0x7fff;
            let below: Vec<T> = all.iter().copied().filter(|v| magnitude(*v) <= scale.bits()).collect();
            // Whole blocks, which the SIMD paths take.
            let below: Vec<T> = below.iter().copied().cycle().take(below.len().next_multiple_of(31)).collect();
            let input: Vec<T> = below.chunks(31).flat_map(|c| [&[scale], c].concat()).collect();
            assert_quantizes_alike(&input, quant_type, BlockSize::new(32).unwrap());
        }
        for size in [32, 64, 4096] {
            assert_quantizes_alike(&all, quant_type, BlockSize::new(size).unwrap());
        }
    }
}

#[test]
fn quantizes_every_bf16_as_defined() {
    every_pattern::<bf16>();
}

#[test]
fn quantizes_every_f16_as_defined() {
    every_pattern::<f16>();
}

/// Every code under every bf16 and f16 as a scale, and under those of [`SCALES`].
#[test]
fn dequantizes_every_code_as_defined() {
    let codes: [u8; 16] =
        [0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef, 0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe];
    let scales: Vec<f32> = (0..=u16::MAX)
        .flat_map(|bits| [bf16::from_bits(bits).to_f32(), f16::from_bits(bits).to_f32()])
        .chain(SCALES)
        .collect();
    let packed = codes.repeat(scales.len());
    let n = 2 * packed.len();
    for quant_type in QuantType::ALL {
        let size = BlockSize::new(32).unwrap();
        assert_dequantizes_alike::<f32>(&packed, &scales, n, quant_type, size);
        assert_dequantizes_alike::<f16>(&packed, &scales, n, quant_type, size);
        assert_dequantizes_alike::<bf16>(&packed, &scales, n, quant_type, size);
    }
}

#[test]
fn threads_do_not_change_a_byte() {
    let n = 3 * TASK + 4097;
    let input: Vec<bf16> =
        (0..n as u32).map(|i| bf16::from_bits((i.wrapping_mul(2_654_435_761) >> 16) as u16)).collect();
    let size = BlockSize::DEFAULT;
    for quant_type in QuantType::ALL {
        let expected = by_definition(&input, quant_type, size);
        let scales: Vec<f32> = expected.2.iter().map(|&b| f32::from_bits(b)).collect();
        let mut values = vec![bf16::ZERO; n];
        scalar::dequantize(&expected.1, &scales, quant_type, size.get(), &mut values);
        for threads in [1, 2, 3, 7] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let found = quantized(&input, size, |packed, absmax| {
                pool.install(|| quantize(&input, quant_type, size, packed, absmax)).unwrap()
            });
            assert_eq!(found, expected, "{threads} threads");
            let mut out = vec![bf16::ONE; n];
            pool.install(|| dequantize(&expected.1, &scales, quant_type, size, &mut out)).unwrap();
            assert_eq!(bits(&out), bits(&values), "{threads} threads");
        }
    }
}

/// Results large enough to be streamed on their own account.
#[test]
fn large_results_are_the_same() {
    let n = Stores::STREAMING_BYTES / size_of::<f32>() + STAGE + 33;
    let packed: Vec<u8> = (0..packed_len(n) as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let scales: Vec<f32> = (0..BlockSize::DEFAULT.absmax_len(n)).map(|i| i as f32 * 0.01).collect();
    let mut expected = vec![0.0f32; n];
    scalar::dequantize(&packed, &scales, QuantType::Nf4, 64, &mut expected);
    let mut out = vec![7.0f32; n];
    assert_eq!(Stores::of(&out), Stores::Streaming);
    dequantize(&packed, &scales, QuantType::Nf4, BlockSize::DEFAULT, &mut out).unwrap();
    assert!(bits(&out) == bits(&expected));
}

#[test]
fn odd_blocks_as_documented() {
    let size = BlockSize::DEFAULT;
    let nf4 = |input: &[f32]| by_definition(input, QuantType::Nf4, size);
    // All zero, of either sign: scaled values are NaN, so codes 0, also of the value that fills up.
    assert_eq!(nf4(&[0.0, -0.0, 0.0]), (Finite::AllFinite, vec![0, 0], vec![0]));
    // NaN has code 0 and does not count for the scale; the filling zero has the code of 0.0.
    assert_eq!(nf4(&[f32::NAN, -2.0, 2.0]), (Finite::HasNonFinite, vec![0x00, 0xf7], vec![2.0f32.to_bits()]));
    // An infinity makes the reciprocal 0, and itself NaN.
    assert_eq!(nf4(&[f32::NEG_INFINITY, 2.0]), (Finite::HasNonFinite, vec![0x07], vec![f32::INFINITY.to_bits()]));
    // No finite reciprocal: ±∞ when scaled.
    assert_eq!(nf4(&[1e-40, -1e-45, 0.0]).1, [0xf0, 0x00]);
    // FP4: only values below zero have the sign.
    assert_eq!(by_definition(&[-0.0f32, -1e-9, 1.0, -1.0], QuantType::Fp4, size).1, [0x08, 0x3b]);
    assert_eq!(by_definition(&[] as &[f32], QuantType::Fp4, size), (Finite::AllFinite, vec![], vec![]));
}

#[test]
fn wrong_lengths_are_errors() {
    let input = [1.0f32; 65];
    let size = BlockSize::DEFAULT;
    for (packed, absmax) in [(32, 2), (34, 2), (33, 1), (33, 3), (0, 0)] {
        let (mut packed, mut absmax) = (vec![0; packed], vec![0.0; absmax]);
        let error = quantize(&input, QuantType::Nf4, size, &mut packed, &mut absmax).unwrap_err();
        assert!(matches!(error, Error::Argument { argument: "packed" | "absmax", .. }), "{error}");
        let error = dequantize(&packed, &absmax, QuantType::Nf4, size, &mut [0.0f32; 65]).unwrap_err();
        assert!(matches!(error, Error::Argument { argument: "packed" | "absmax", .. }), "{error}");
    }
    let error = quantize(&input, QuantType::Nf4, size, &mut [0; 32], &mut [0.0; 2]).unwrap_err();
    assert_eq!(error.to_string(), "packed must be 33 elements long (two codes to a byte), got 32");
}

#[test]
fn a_path_that_is_missing_is_an_error() {
    for simd in Simd::ALL.iter().filter(|simd| !simd.is_available()) {
        let error = dequantize_serial_with(*simd, &[], &[], QuantType::Nf4, BlockSize::DEFAULT, &mut [0.0f32; 0]);
        assert!(error.unwrap_err().to_string().starts_with("HALFBYTE_SIMD must be "));
    }
}
