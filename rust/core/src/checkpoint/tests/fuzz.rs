//! Arbitrary and damaged bytes: read or refused in one line, never a panic, and nothing that safetensors refuses.

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::json;

use super::super::inspect::inspect;
use super::super::options::QuantizeOptions;
use super::super::reader::header::{SourceFile, parse};
use super::super::reader::{Checkpoint, check_index};
use super::super::state::State;
use super::super::weight_type::WeightType;
use super::{Plan, dequantize_options, file_bytes, plan, quantize_options, weights, write_tensors};
use crate::error::Result;

/// The outcome's message is one line, and no mistake of ours.
fn one_line<T>(outcome: Result<T>) -> std::result::Result<Option<T>, TestCaseError> {
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(error) => {
            let text = error.to_string();
            prop_assert!(!text.contains(char::is_control), "{:?}", text);
            prop_assert!(
                !matches!(error.kind(), crate::error::ErrorKind::Bug | crate::error::ErrorKind::System),
                "{}",
                text
            );
            Ok(None)
        }
    }
}

/// JSON in the form of a header, with everything off by a little.
fn almost_header() -> impl Strategy<Value = String> {
    let number = prop_oneof![
        5 => (0u64..20).prop_map(|n| n.to_string()),
        1 => any::<u64>().prop_map(|n| n.to_string()),
        1 => prop::sample::select(vec!["-1", "1.0", "1e3", "null", "\"1\"", "18446744073709551616", "true", "[]"]).prop_map(str::to_owned),
    ];
    let list = prop::collection::vec(number.clone(), 0..4).prop_map(|v| format!("[{}]", v.join(",")));
    let offsets = prop_oneof![4 => (number.clone(), number).prop_map(|(a, b)| format!("[{a},{b}]")), 1 => list.clone()];
    let dtype =
        prop::sample::select(vec!["\"U8\"", "\"F32\"", "\"F4\"", "\"F6_E2M3\"", "\"BF16\"", "\"X\"", "7", "null"]);
    let entry = (dtype, list, offsets, 0..12).prop_map(|(d, s, o, extra)| match extra {
        0 => format!(r#"{{"dtype":{d},"shape":{s},"data_offsets":{o},"more":1}}"#),
        1 => format!(r#"{{"shape":{s},"data_offsets":{o}}}"#),
        2 => "null".to_owned(),
        _ => format!(r#"{{"dtype":{d},"shape":{s},"data_offsets":{o}}}"#),
    });
    let name = prop::sample::select(vec!["a", "b", "c", "d", "__metadata__", "\\n\\u001b[2J", "\\u0000", "é", ""]);
    prop::collection::vec((name, entry), 0..4).prop_map(|all| {
        format!("{{{}}}", all.iter().map(|(n, e)| format!("\"{n}\":{e}")).collect::<Vec<_>>().join(","))
    })
}

/// A valid file with a plain and a 4-bit weight.
fn valid_file() -> Vec<u8> {
    let state = br#"{"quant_type":"nf4","blocksize":64,"dtype":"float32","shape":[2,64],"nested_blocksize":256,"nested_offset":0.5}"#;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x");
    write_tensors(
        &path,
        &[
            ("model.layers.0.mlp.up_proj.weight", "BF16", vec![2, 64], weights(128, 1)),
            ("lm_head.weight", "F32", vec![1, 2], vec![0; 8]),
            ("W", "U8", vec![64, 1], vec![0; 64]),
            ("W.absmax", "U8", vec![2], vec![0; 2]),
            ("W.nested_absmax", "F32", vec![1], vec![0; 4]),
            ("W.nested_quant_map", "F32", vec![256], vec![0; 1024]),
            ("v.weight", "I8", vec![2, 3], vec![1; 6]),
            ("v.SCB", "F32", vec![2], vec![0; 8]),
            ("v.weight_format", "U8", vec![], vec![0]),
            ("W.quant_state.bitsandbytes__nf4", "U8", vec![state.len()], state.to_vec()),
        ],
    );
    fs::read(path).unwrap()
}

/// One damage.
#[derive(Debug, Clone)]
enum Damage {
    Flip(prop::sample::Index, u8),
    Set(prop::sample::Index, u8),
    Cut(prop::sample::Index),
    Splice(prop::sample::Index, prop::sample::Index, usize),
    Digit(prop::sample::Index, u8),
}

fn damages() -> impl Strategy<Value = Vec<Damage>> {
    let index = any::<prop::sample::Index>;
    prop::collection::vec(
        prop_oneof![
            1 => (index(), 0u8..8).prop_map(|(i, b)| Damage::Flip(i, 1 << b)),
            1 => (index(), prop::sample::select(b"0123456789[]{},:\"-e\\ \x00\xff".to_vec())).prop_map(|(i, b)| Damage::Set(i, b)),
            1 => index().prop_map(Damage::Cut),
            1 => (index(), index(), 1usize..40).prop_map(|(a, b, n)| Damage::Splice(a, b, n)),
            3 => (index(), b'0'..=b'9').prop_map(|(i, d)| Damage::Digit(i, d)),
        ],
        1..4,
    )
}

fn damaged(mut bytes: Vec<u8>, damages: &[Damage]) -> Vec<u8> {
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize + 8;
    for damage in damages {
        // Mostly in the header, where it matters.
        let end = header.min(bytes.len());
        if end == 0 {
            break;
        }
        match damage {
            Damage::Flip(at, bit) => bytes[at.index(end)] ^= bit,
            Damage::Set(at, byte) => bytes[at.index(end)] = *byte,
            Damage::Cut(at) => bytes.truncate(at.index(bytes.len())),
            Damage::Splice(from, to, len) => {
                let from = from.index(end);
                let part = bytes[from..(from + len).min(end)].to_vec();
                let to = to.index(end);
                bytes.splice(to..to, part);
            }
            Damage::Digit(at, digit) => {
                let digits: Vec<usize> = (8..end).filter(|&i| bytes[i].is_ascii_digit()).collect();
                if !digits.is_empty() {
                    bytes[digits[at.index(digits.len())]] = *digit;
                }
            }
        }
    }
    bytes
}

/// Opens and plans the checkpoint of these bytes in every way.
fn try_everything(folder: &Path, bytes: &[u8]) -> std::result::Result<(), TestCaseError> {
    let path = folder.join("model.safetensors");
    fs::write(&path, bytes).unwrap();
    if let Some(file) = one_line(SourceFile::open(&path))? {
        let read = SafeTensors::deserialize(bytes);
        prop_assert!(read.is_ok(), "accepted what safetensors refuses: {:?}", read.err());
        let read = read.unwrap();
        prop_assert_eq!(read.len(), file.tensors.len());
        for tensor in &file.tensors {
            let view = read.tensor(&tensor.name).unwrap();
            let data = &bytes[tensor.offset as usize..(tensor.offset + tensor.len) as usize];
            prop_assert_eq!((view.dtype(), view.shape(), view.data()), (tensor.dtype, &tensor.shape[..], data));
        }
    }
    let Some(found) = one_line(Checkpoint::open(folder))? else { return Ok(()) };
    one_line(inspect(&found, None))?;
    one_line(Plan::dequantize(found, None, &dequantize_options(100)))?;
    if let Some(plan) = one_line(plan(folder, 100))? {
        plan.report();
    }
    let int8 = QuantizeOptions { quant_type: WeightType::Int8, ..quantize_options(100) };
    one_line(Plan::quantize(Checkpoint::open(folder).unwrap(), None, &int8, None))?;
    let config = json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama"});
    let found = Checkpoint::open(folder).unwrap();
    one_line(Plan::quantize(found, Some(&config), &quantize_options(1 << 30), None))?;
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(700))]

    #[test]
    fn damaged_files(damages in damages()) {
        let folder = tempfile::tempdir().unwrap();
        try_everything(folder.path(), &damaged(valid_file(), &damages))?;
    }

    #[test]
    fn arbitrary_files(header in prop::collection::vec(any::<u8>(), 0..100), len in prop_oneof![0u64..100, any::<u64>()]) {
        let folder = tempfile::tempdir().unwrap();
        let mut bytes = len.to_le_bytes().to_vec();
        bytes.extend(header);
        try_everything(folder.path(), &bytes)?;
    }

    #[test]
    fn almost_headers(header in almost_header(), data in 0usize..40) {
        let bytes = file_bytes(&header, &vec![0; data]);
        if one_line(parse(Path::new("x"), header.as_bytes(), data as u64))?.is_some() {
            let read = SafeTensors::deserialize(&bytes);
            prop_assert!(read.is_ok(), "accepted what safetensors refuses: {:?}", read.err());
        }
    }

    #[test]
    fn arbitrary_text_as_index_and_state(text in "[\\[\\]{}:,\"a-z0-9.\\\\\n -]{0,60}", bytes in prop::collection::vec(any::<u8>(), 0..60)) {
        for text in [text.as_bytes(), &bytes] {
            one_line(check_index(Path::new("x"), text))?;
            let wrapped = [br#"{"weight_map":{"a":""#, text, br#".safetensors"}}"#].concat();
            one_line(check_index(Path::new("x"), &wrapped))?;
            if let Err(problem) = State::parse(text) {
                prop_assert!(!problem.contains('\n'));
            }
        }
    }
}
