//! Golden vectors made by bitsandbytes on CUDA: the same bytes, the same scales, the same values read back.

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use crate::codebook::{FP4_CODE_OF_RANK, FP4_THRESHOLDS, QuantType, dynamic_map};
use crate::dtype::{DType, Element};
use crate::geometry::{BlockSize, packed_len};
use crate::quant::Finite;
use crate::quant::absmax::{dequantize_absmax, quantize_absmax};
use crate::quant::blockwise4::{dequantize, dequantize_serial, quantize, quantize_serial};

#[derive(Deserialize)]
struct Case {
    quant_type: String,
    blocksize: usize,
    nested: bool,
}

/// The part of a quantization state that tells how to read nested scales.
#[derive(Deserialize)]
struct State {
    nested_offset: Option<f64>,
}

struct Golden<'a> {
    file: &'a SafeTensors<'a>,
    prefix: String,
    quant_type: QuantType,
    blocksize: BlockSize,
    nested: bool,
}

impl Golden<'_> {
    fn bytes(&self, name: &str) -> &[u8] {
        self.file.tensor(&format!("{}.{name}", self.prefix)).unwrap().data()
    }

    fn values<T: Element>(&self, name: &str) -> Vec<T> {
        let tensor = self.file.tensor(&format!("{}.{name}", self.prefix)).unwrap();
        values(tensor.data())
    }

    fn offset(&self) -> f32 {
        let state = self.bytes(&format!("weight.quant_state.bitsandbytes__{}", self.quant_type));
        serde_json::from_slice::<State>(state).unwrap().nested_offset.unwrap() as f32
    }
}

fn values<T: Element>(bytes: &[u8]) -> Vec<T> {
    // Going through float32 loses nothing: every 16-bit value has its own float32.
    match T::DTYPE {
        DType::F32 => bytes.as_chunks().0.iter().map(|b| T::from_f32(f32::from_le_bytes(*b))).collect(),
        DType::F16 => bytes.as_chunks().0.iter().map(|b| T::from_f32(f16::from_le_bytes(*b).to_f32())).collect(),
        _ => bytes.as_chunks().0.iter().map(|b| T::from_f32(bf16::from_le_bytes(*b).to_f32())).collect(),
    }
}

/// Calls the right one of three closures for the dtype of every case; returns how many cases there were.
fn for_each_case(mut each: impl FnMut(&Golden, Dtype)) -> usize {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/blockwise4.safetensors");
    let data = std::fs::read(path).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&data).unwrap();
    let file = SafeTensors::deserialize(&data).unwrap();
    let cases: Vec<Case> = serde_json::from_str(&metadata.metadata().as_ref().unwrap()["cases"]).unwrap();
    for (k, case) in cases.iter().enumerate() {
        let golden = Golden {
            file: &file,
            prefix: format!("c{k:03}"),
            quant_type: case.quant_type.parse().unwrap(),
            blocksize: BlockSize::new(case.blocksize).unwrap(),
            nested: case.nested,
        };
        let dtype = file.tensor(&format!("c{k:03}.input")).unwrap().dtype();
        each(&golden, dtype);
    }
    cases.len()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Distance in representable values; both finite and of one sign.
fn ulps(a: f32, b: f32) -> u32 {
    a.to_bits().abs_diff(b.to_bits())
}

fn nibbles(packed: &[u8]) -> impl Iterator<Item = u8> {
    packed.iter().flat_map(|b| [b >> 4, b & 15])
}

#[derive(Default)]
struct Mismatches {
    codes: usize,
    of: usize,
    nested_codes: usize,
}

fn quantizes_as<T: Element>(golden: &Golden, found: &mut Mismatches) {
    let input = golden.values::<T>("input");
    let expected = golden.bytes("weight");
    let mut packed = vec![0; packed_len(input.len())];
    let mut absmax = vec![0.0; golden.blocksize.absmax_len(input.len())];
    let finite = quantize(&input, golden.quant_type, golden.blocksize, &mut packed, &mut absmax).unwrap();
    assert_eq!(finite, Finite::AllFinite, "{}", golden.prefix);

    let mut again = (vec![0; packed.len()], vec![0.0; absmax.len()]);
    let finite = quantize_serial(&input, golden.quant_type, golden.blocksize, &mut again.0, &mut again.1).unwrap();
    assert_eq!((finite, &again.0, bits(&again.1)), (Finite::AllFinite, &packed, bits(&absmax)), "{}", golden.prefix);

    if golden.nested {
        let nested = quantize_absmax(&absmax);
        assert!(ulps(nested.offset, golden.offset()) <= 1, "{}: offset {}", golden.prefix, nested.offset);
        if nested.offset == golden.offset() {
            assert_eq!(bits(&nested.absmax), bits(&golden.values::<f32>("weight.nested_absmax")), "{}", golden.prefix);
            let codes = golden.bytes("weight.absmax");
            found.nested_codes += nested.codes.iter().zip(codes).filter(|(a, b)| a != b).count();
        }
    } else {
        assert_eq!(bits(&absmax), bits(&golden.values::<f32>("weight.absmax")), "{}", golden.prefix);
    }

    found.of += input.len();
    for (i, (ours, theirs)) in nibbles(&packed).zip(nibbles(expected)).enumerate() {
        if ours == theirs {
            continue;
        }
        // The one known difference: an approximate reciprocal moves values over an FP4 threshold within 2 ulp.
        assert_eq!(golden.quant_type, QuantType::Fp4, "{}: code {i} is {ours}, not {theirs}", golden.prefix);
        let rank = |code: u8| FP4_CODE_OF_RANK.iter().position(|&c| c == code & 7).unwrap();
        let (a, b) = (rank(ours), rank(theirs));
        assert_eq!(a.abs_diff(b), 1, "{}: code {i} is {ours}, not {theirs}", golden.prefix);
        let scaled = input[i].to_f32() * (1.0 / absmax[i / golden.blocksize.get()]);
        let threshold = FP4_THRESHOLDS[a.min(b)];
        assert!(ulps(scaled.abs(), threshold) <= 2, "{}: value {i}, {scaled}, is not at {threshold}", golden.prefix);
        assert_eq!(ours & 8, theirs & 8, "{}: sign of value {i}", golden.prefix);
        found.codes += 1;
    }
}

#[test]
fn quantizes_as_bitsandbytes() {
    let mut found = Mismatches::default();
    let cases = for_each_case(|golden, dtype| match dtype {
        Dtype::F32 => quantizes_as::<f32>(golden, &mut found),
        Dtype::F16 => quantizes_as::<f16>(golden, &mut found),
        Dtype::BF16 => quantizes_as::<bf16>(golden, &mut found),
        other => panic!("{other:?}"),
    });
    assert_eq!(cases, 48);
    assert!(found.codes < found.of / 5000, "{} of {} codes differ", found.codes, found.of);
    assert_eq!(found.nested_codes, 0);
}

fn reads_as<T: Element>(golden: &Golden) {
    let expected = golden.values::<T>("dequantized");
    let packed = golden.bytes("weight");
    let mut absmax = vec![0.0; golden.blocksize.absmax_len(expected.len())];
    if golden.nested {
        let absmax2 = golden.values::<f32>("weight.nested_absmax");
        dequantize_absmax(golden.bytes("weight.absmax"), &absmax2, golden.offset(), &mut absmax).unwrap();
    } else {
        absmax = golden.values("weight.absmax");
    }
    let mut out = vec![T::default(); expected.len()];
    let as_bits = |v: &[T]| v.iter().map(|v| v.to_f32().to_bits()).collect::<Vec<_>>();
    dequantize(packed, &absmax, golden.quant_type, golden.blocksize, &mut out).unwrap();
    assert_eq!(as_bits(&out), as_bits(&expected), "{}", golden.prefix);
    out.fill(T::from_f32(7.0));
    dequantize_serial(packed, &absmax, golden.quant_type, golden.blocksize, &mut out).unwrap();
    assert_eq!(as_bits(&out), as_bits(&expected), "{}", golden.prefix);
}

#[test]
fn dequantizes_as_bitsandbytes() {
    for_each_case(|golden, dtype| match dtype {
        Dtype::F32 => reads_as::<f32>(golden),
        Dtype::F16 => reads_as::<f16>(golden),
        Dtype::BF16 => reads_as::<bf16>(golden),
        other => panic!("{other:?}"),
    });
}

#[test]
fn tables_are_bitsandbytes() {
    let mut nested = 0;
    for_each_case(|golden, _| {
        let map = golden.values::<f32>("weight.quant_map");
        assert_eq!(bits(&map), bits(&golden.quant_type.quant_map()));
        if golden.nested {
            assert_eq!(bits(&golden.values::<f32>("weight.nested_quant_map")), bits(dynamic_map()));
            nested += 1;
        }
    });
    assert!(nested > 0);
}
