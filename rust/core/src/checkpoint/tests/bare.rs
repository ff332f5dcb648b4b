//! Packed experts without the text of a state: shaped by config.json, and refused where their parts do not fit.

use super::super::inspect::inspect;
use super::*;

type Parts = Vec<(&'static str, &'static str, Vec<usize>)>;

/// Two experts of 4 x 64 and 64 x 2 values, which the caller changes.
fn experts(change: impl Fn(&mut Parts)) -> tempfile::TempDir {
    let mut parts: Parts = vec![
        ("experts.down_absmax", "F32", vec![2, 2]),
        ("experts.down_proj", "U8", vec![2, 64]),
        ("experts.gate_up_absmax", "F32", vec![2, 4]),
        ("experts.gate_up_proj", "U8", vec![2, 128]),
        ("norm.weight", "BF16", vec![64]),
    ];
    change(&mut parts);
    let folder = tempfile::tempdir().unwrap();
    let size = |dtype: &str| match dtype {
        "F32" => 4,
        "BF16" => 2,
        _ => 1,
    };
    let parts: Vec<Named> =
        parts.into_iter().map(|(n, d, s)| (n, d, s.clone(), vec![0; s.iter().product::<usize>() * size(d)])).collect();
    write_tensors(&folder.path().join("model.safetensors"), &parts);
    folder
}

fn config() -> Value {
    json!({"text_config": {"hidden_size": 64}, "quantization_config": {"bnb_4bit_quant_type": "nf4"}})
}

fn dequantize(folder: &tempfile::TempDir, config: Option<&Value>) -> Result<Plan> {
    Plan::dequantize(Checkpoint::open(folder.path())?, config, &dequantize_options(1 << 30))
}

#[test]
fn bare_experts_have_the_shapes_that_the_config_tells() {
    let folder = experts(|_| ());
    let found = Checkpoint::open(folder.path()).unwrap();
    let report = inspect(&found, Some(&config())).unwrap();
    let weights: Vec<_> =
        report.weights.iter().map(|w| (w.name.as_str(), &w.shape[..], w.blocksize, w.dtype)).collect();
    assert_eq!(
        weights,
        [
            ("experts.down_proj", &[2, 64, 2][..], Some(64), Some("bfloat16")),
            ("experts.gate_up_proj", &[2, 4, 64][..], Some(64), Some("bfloat16")),
        ]
    );
    assert_eq!(dequantize(&folder, Some(&config())).unwrap().tensors.len(), 3);
    // Without a config they are what they are.
    let report = inspect(&found, None).unwrap();
    assert!(report.weights.is_empty());
    assert_eq!(report.tensors.len(), 5);
}

#[test]
fn broken_bare_experts_are_refused() {
    let refused = |config: &Value, words: &[&str], change: &dyn Fn(&mut Parts)| {
        let text = message(dequantize(&experts(change), Some(config)), "model.safetensors");
        assert!(words.iter().all(|word| text.contains(word)), "{text}: expected {words:?}");
    };
    let good = config();
    refused(&good, &["experts.gate_up_absmax", "[2, blocks]"], &|p| p[2].2 = vec![2, 3]);
    refused(&good, &["experts.gate_up_absmax", "[2, blocks]"], &|p| p[2].2 = vec![1, 4]);
    refused(&good, &["experts.gate_up_absmax", "[2, blocks]"], &|p| p[2].2 = vec![2, 0]);
    refused(&good, &["experts.down_absmax", "F32"], &|p| p[0].1 = "BF16");
    refused(&good, &["experts.down_proj", "[experts, bytes]"], &|p| p[1].2 = vec![128]);
    let mut other = good.clone();
    other["text_config"]["hidden_size"] = json!(48);
    refused(&other, &["experts.down_proj", "hidden_size"], &|_| ());
    other["text_config"] = json!({});
    refused(&other, &["experts.down_proj", "hidden_size"], &|_| ());
}

#[test]
fn bare_experts_are_not_copied_as_if_they_were_dense() {
    let state = r#"{"quant_type":"nf4","blocksize":64,"dtype":"float32","shape":[64]}"#;
    let folder = experts(|p| {
        p.extend([("W", "U8", vec![32, 1]), ("W.absmax", "F32", vec![1])]);
    });
    let path = folder.path().join("model.safetensors");
    let mut all: Vec<(String, &str, Vec<usize>, Vec<u8>)> = Vec::new();
    let found = Checkpoint::open(folder.path()).unwrap();
    for &at in &found.order {
        let tensor = found.tensor(at);
        let dtype = if tensor.dtype == safetensors::Dtype::U8 { "U8" } else { "F32" };
        if tensor.name != "norm.weight" {
            all.push((tensor.name.clone(), dtype, tensor.shape.clone(), found.read(at).unwrap()));
        }
    }
    all.push(("W.quant_state.bitsandbytes__nf4".to_owned(), "U8", vec![state.len()], state.as_bytes().to_vec()));
    let named: Vec<Named> = all.iter().map(|(n, d, s, b)| (n.as_str(), *d, s.clone(), b.clone())).collect();
    drop(found);
    write_tensors(&path, &named);
    let text = message(dequantize(&folder, None), "model.safetensors");
    assert!(text.contains("experts.down_proj") && text.contains("bnb_4bit_quant_type"), "{text}");
}
