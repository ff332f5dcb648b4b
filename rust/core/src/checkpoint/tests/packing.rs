//! Layouts and the dealing out of tensors to files.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use proptest::prelude::*;
use safetensors::{Dtype, SafeTensors};
use serde_json::json;

use super::super::plan::layout::{Layout, OutputTensor};
use super::super::plan::{Action, Plan};
use super::super::reader::header::SourceFile;
use super::{Mode, dequantize_options, files, message, plan, quantize, weights, write_checkpoint, write_tensors};

fn tensors() -> impl Strategy<Value = Vec<OutputTensor>> {
    let dtype = prop::sample::select(vec![Dtype::F64, Dtype::F32, Dtype::BF16, Dtype::U8, Dtype::BOOL, Dtype::F8_E4M3]);
    let fixed = (".{0,12}", dtype, prop::collection::vec(0usize..5, 0..4))
        .prop_map(|(name, dtype, shape)| OutputTensor::fixed(name, dtype, shape));
    let text = (".{0,12}", 0usize..300).prop_map(|(name, len)| OutputTensor::text(name, len));
    prop::collection::vec(prop_oneof![fixed, text], 0..20).prop_map(|all| {
        let mut names = BTreeSet::from(["__metadata__".to_owned()]);
        all.into_iter().filter(|t| names.insert(t.name.clone())).collect()
    })
}

fn metadata() -> impl Strategy<Value = BTreeMap<String, String>> {
    prop::collection::btree_map(".{0,8}", ".{0,8}", 0..4)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Texts of any length up to the planned one, written where the layout says, make a file that safetensors reads.
    #[test]
    fn laid_out_files_are_read_by_safetensors(all in tensors(), metadata in metadata(), cut in 0.0..=1.0f64) {
        let layout = Layout::new(all.clone(), metadata.clone());
        prop_assert_eq!(layout.header_len % 8, 0);
        let mut end = 8 + layout.header_len;
        for (tensor, &offset) in layout.tensors.iter().zip(&layout.offsets) {
            prop_assert_eq!(offset, end);
            end += tensor.len;
        }
        prop_assert_eq!(end, layout.max_len);
        let mut texts = HashMap::new();
        for (i, tensor) in layout.tensors.iter().enumerate().filter(|(_, t)| t.text) {
            texts.insert(i, vec![b't'; (tensor.len as f64 * cut) as usize]);
        }
        let (tail_start, tail, head) = layout.finish(&texts);
        prop_assert_eq!(head.len() as u64, 8 + layout.header_len);
        let mut file = vec![b'd'; tail_start as usize];
        file[..head.len()].copy_from_slice(&head);
        file.extend_from_slice(&tail);
        prop_assert!(file.len() as u64 <= layout.max_len);
        let (_, read) = SafeTensors::read_metadata(&file).unwrap();
        let found: BTreeMap<String, String> = read.metadata().clone().unwrap_or_default().into_iter().collect();
        prop_assert_eq!(found, metadata);
        let read = SafeTensors::deserialize(&file).unwrap();
        prop_assert_eq!(read.len(), all.len());
        for tensor in &all {
            let view = read.tensor(&tensor.name).unwrap();
            prop_assert_eq!(view.dtype(), tensor.dtype);
            let at = layout.index(tensor).unwrap();
            prop_assert_eq!(&layout.tensors[at].name, &tensor.name);
            if tensor.text {
                prop_assert_eq!(view.data(), &texts[&at][..]);
            } else {
                prop_assert_eq!(view.shape(), &tensor.shape[..]);
                prop_assert_eq!(view.data().len() as u64, tensor.len);
                prop_assert!(view.data().iter().all(|b| *b == b'd'));
            }
        }
    }

    /// Every tensor in one file, in order; none larger than asked but for a weight alone.
    #[test]
    fn files_are_as_large_as_asked(sizes in prop::collection::vec(1usize..40, 1..12), limit in 1u64..6000) {
        let folder = tempfile::tempdir().unwrap();
        let names: Vec<String> = (0..sizes.len()).map(|i| format!("model.layers.{i}.mlp.up_proj.weight")).collect();
        let all: Vec<super::Named> = names.iter().zip(&sizes)
            .map(|(n, &rows)| (n.as_str(), "BF16", vec![rows, 64], weights(rows * 64, 1))).collect();
        write_tensors(&folder.path().join("model.safetensors"), &all);
        let plan = plan(folder.path(), limit).unwrap();
        let shards: Vec<usize> = plan.tensors.iter().map(|t| t.shard).collect();
        prop_assert_eq!(shards.first(), Some(&0));
        prop_assert!(shards.windows(2).all(|w| w[1] == w[0] || w[1] == w[0] + 1));
        prop_assert_eq!(shards.last().map(|n| n + 1), Some(plan.shards.len()));
        let size = |n: usize| -> u64 { plan.tensors.iter().filter(|t| t.shard == n).map(|t| t.bytes_out).sum() };
        for (n, shard) in plan.shards.iter().enumerate() {
            prop_assert!(size(n) <= limit || shard.actions.len() == 1);
            prop_assert_eq!(shard.layout.tensors.iter().map(|t| t.len).sum::<u64>(), size(n));
            if n > 0 {
                // As full as order allows.
                let first = plan.tensors.iter().find(|t| t.shard == n).unwrap();
                prop_assert!(size(n - 1) + first.bytes_out > limit);
            }
        }
    }
}

fn quantized(plan: &Plan) -> usize {
    plan.shards.iter().flat_map(|s| &s.actions).filter(|a| matches!(a, Action::Quantize { .. })).count()
}

#[test]
fn the_output_is_a_checkpoint_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let (source, out) = (folder.path().join("source"), folder.path().join("out"));
    write_checkpoint(&source, 1);
    let report = quantize(&source, &out, Mode::New).unwrap();
    assert_eq!(report.shards.len(), 3);
    for name in files(&out).keys().filter(|n| n.extension().is_some_and(|e| e == "safetensors")) {
        SafeTensors::deserialize(&std::fs::read(out.join(name)).unwrap()).unwrap();
        SourceFile::open(&out.join(name)).unwrap();
    }
    // It is refused as a source, and read as a quantized one.
    assert!(message(plan(&out, 1000), "model-00001-of-00003.safetensors").contains("4-bit already"));
    let back = Plan::dequantize(super::Checkpoint::open(&out).unwrap(), None, &dequantize_options(1 << 30)).unwrap();
    assert_eq!(back.tensors.len(), 6);
    assert_eq!(quantized(&plan(&source, 1000).unwrap()), 3);
}

#[test]
fn names_that_collide_with_a_part_are_refused() {
    let name = "model.layers.0.mlp.up_proj.weight";
    for part in [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"] {
        // Before and after the weight.
        for order in [[0, 1], [1, 0]] {
            let folder = tempfile::tempdir().unwrap();
            let other = format!("{name}{part}");
            let both: [super::Named; 2] =
                [(name, "BF16", vec![2, 64], weights(128, 1)), (&other, "F32", vec![1], vec![0; 4])];
            write_tensors(&folder.path().join("model.safetensors"), &order.map(|i| both[i].clone()));
            let text = message(plan(folder.path(), 1000), folder.path().to_str().unwrap());
            assert!(text.contains(&other) && text.ends_with(&format!("{name:?}")), "{text}");
        }
    }
}

type Parts = Vec<(String, &'static str, Vec<usize>, Vec<u8>)>;

/// A 4-bit weight as parts, one of which the caller changes.
fn four_bit(change: impl Fn(&mut Parts)) -> tempfile::TempDir {
    let state = br#"{"quant_type":"nf4","blocksize":64,"dtype":"float32","shape":[2,64],"nested_blocksize":256,"nested_dtype":"float32","nested_offset":0.5}"#;
    let mut parts = vec![
        ("W".to_owned(), "U8", vec![64, 1], vec![0; 64]),
        ("W.absmax".to_owned(), "U8", vec![2], vec![0; 2]),
        ("W.nested_absmax".to_owned(), "F32", vec![1], vec![0; 4]),
        ("W.nested_quant_map".to_owned(), "F32", vec![256], vec![0; 1024]),
        ("W.quant_map".to_owned(), "F32", vec![16], vec![0; 64]),
        ("W.quant_state.bitsandbytes__nf4".to_owned(), "U8", vec![state.len()], state.to_vec()),
    ];
    change(&mut parts);
    let folder = tempfile::tempdir().unwrap();
    let parts: Vec<super::Named> = parts.iter().map(|(n, d, s, b)| (n.as_str(), *d, s.clone(), b.clone())).collect();
    write_tensors(&folder.path().join("model.safetensors"), &parts);
    folder
}

#[test]
fn broken_4_bit_weights_are_refused() {
    let open = |folder: &tempfile::TempDir, config: Option<&serde_json::Value>| {
        Plan::dequantize(super::Checkpoint::open(folder.path()).unwrap(), config, &dequantize_options(1 << 30))
    };
    assert_eq!(open(&four_bit(|_| ()), None).unwrap().tensors.len(), 1);
    let refused = |word: &str, change: &dyn Fn(&mut Parts)| {
        let folder = four_bit(change);
        let text = message(open(&folder, None), "model.safetensors");
        assert!(text.contains(word), "{text}: expected {word:?}");
        let found = super::Checkpoint::open(folder.path()).unwrap();
        message(super::super::inspect::inspect(&found, None), "model.safetensors");
    };
    for part in ["", ".absmax", ".nested_absmax", ".nested_quant_map"] {
        refused(&format!("W{part}\""), &|p| p.retain(|t| t.0 != format!("W{part}")));
    }
    refused("64 packed bytes", &|p| (p[0].2, p[0].3) = (vec![63, 1], vec![0; 63]));
    refused("packed", &|p| p[0].1 = "F8_E4M3");
    refused("W.absmax", &|p| (p[1].2, p[1].3) = (vec![3], vec![0; 3]));
    refused("W.absmax", &|p| (p[1].1, p[1].3) = ("F32", vec![0; 8]));
    refused("[256]", &|p| (p[3].2, p[3].3) = (vec![255], vec![0; 1020]));
    refused("fp4", &|p| p[5].0 = "W.quant_state.bitsandbytes__fp4".to_owned());
    refused("valid", &|p| p[5].3[0] = b'[');
    refused("uint8", &|p| (p[5].1, p[5].2, p[5].3) = ("F32", vec![1], vec![0; 4]));
    refused("two quantization states", &|p| {
        let mut twin = p[5].clone();
        twin.0 = "W.quant_state.bitsandbytes__fp4".to_owned();
        let at = twin.3.windows(3).position(|w| w == b"nf4").unwrap();
        twin.3[at] = b'f';
        twin.3[at + 1] = b'p';
        p.push(twin);
    });
    // A Conv1D weight has two dimensions, whatever the state says.
    let config = json!({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"});
    let folder = four_bit(|p| {
        for part in &mut *p {
            part.0 = part.0.replacen('W', "transformer.h.0.attn.c_attn.weight", 1);
        }
        let text = String::from_utf8(p[5].3.clone()).unwrap().replace("[2,64]", "[128]");
        (p[5].2, p[5].3) = (vec![text.len()], text.into_bytes());
    });
    assert!(message(open(&folder, Some(&config)), "model.safetensors").contains("two dimensions"));
}

#[test]
fn headers_of_the_output_stay_within_what_safetensors_reads() {
    // 8 names of 4 MB: six entries each would make a header of 200 MB.
    let folder = tempfile::tempdir().unwrap();
    let names: Vec<String> = (0..8).map(|i| format!("{}.{i}.weight", "a".repeat(4_000_000))).collect();
    let all: Vec<super::Named> = names.iter().map(|n| (n.as_str(), "BF16", vec![1, 64], weights(64, 1))).collect();
    write_tensors(&folder.path().join("model.safetensors"), &all);
    let plan = plan(folder.path(), 1 << 40).unwrap();
    assert!(plan.shards.len() > 1);
    assert!(plan.shards.iter().all(|s| s.layout.header_len <= 100_000_000));
    assert_eq!(plan.tensors.len(), 8);
    // A single one that is too long is refused.
    let name = format!("{}.weight", "a".repeat(20_000_000));
    write_tensors(&folder.path().join("model.safetensors"), &[(name.as_str(), "BF16", vec![1, 64], weights(64, 1))]);
    assert!(message(super::plan(folder.path(), 1 << 40), "has so long names").len() < 1000);
}
