//! Sources that are refused for what their tensors are, whatever config.json says, and values that a dtype cannot hold.

use safetensors::Dtype;

use super::super::verify::Status;
use super::super::weights::find_quantized;
use super::*;

const Q: &str = "model.layers.0.self_attn.q_proj";

/// A checkpoint of a dense layer and these tensors.
fn checkpoint_with(tensors: &[Named<'_>]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let dense = ("model.layers.0.mlp.up_proj.weight", "BF16", vec![16, 64], weights(16 * 64, 1));
    let all: Vec<Named<'_>> = std::iter::once(dense).chain(tensors.iter().cloned()).collect();
    write_tensors(&folder.path().join("model.safetensors"), &all);
    folder
}

#[test]
fn tensors_beside_quantized_weights_are_refused_by_name() {
    for (companion, dtype, size) in [
        ("weight_scale_inv", "F32", 4),
        ("weight_scale", "BF16", 2),
        ("weight_scale_2", "F32", 4),
        ("weight_packed", "I32", 4),
        ("qweight", "I32", 4),
        ("qzeros", "I32", 4),
        ("g_idx", "I32", 4),
        ("W_q", "U8", 1),
        ("weight.quant_state.bitsandbytes__nf4", "U8", 1),
        ("weight._data", "I8", 1),
    ] {
        for prefix in ["", "language_model.", "module."] {
            let name = format!("{prefix}{Q}.{companion}");
            let folder = checkpoint_with(&[(&name, dtype, vec![16, 1], vec![0; 16 * size])]);
            let text = message(plan(folder.path(), 1 << 30), "model.safetensors");
            assert!(text.contains(&name) && text.contains("already"), "{text}");
        }
    }
}

#[test]
fn tensors_beside_packed_codes_are_refused_by_name() {
    for (companion, dtype, codes) in [
        ("SCB", "F32", "I8"),
        ("weight_format", "U8", "I8"),
        ("weight.absmax", "F32", "U8"),
        ("weight.quant_map", "F32", "U8"),
        ("weight.nested_absmax", "F32", "I16"),
    ] {
        let (weight, name) = (format!("{Q}.weight"), format!("{Q}.{companion}"));
        let size = if dtype == "F32" { 4 } else { 1 };
        let beside = (name.as_str(), dtype, vec![16, 1], vec![0; 16 * size]);
        // One dimension, so that the weight is none that is refused by itself.
        let item = if codes == "I16" { 2 } else { 1 };
        let folder = checkpoint_with(&[(&weight, codes, vec![16], vec![0; 16 * item]), beside]);
        let text = message(plan(folder.path(), 1 << 30), "model.safetensors");
        assert!(text.contains(&name) && text.contains("already"), "{text}");
    }
}

#[test]
fn tensors_of_a_dense_model_may_have_the_names_of_companions() {
    let own = |name| (name, "F32", vec![16], vec![0; 64]);
    let tensors = [
        ("fc.weight", "BF16", vec![16, 64], weights(16 * 64, 1)),
        own("fc.SCB"),
        own("fc.absmax"),
        own("fc.quant_map"),
        own("observer.absmax"),
        own("observer.quant_map"),
        own("observer.nested_absmax"),
        own("observer.SCB"),
        own("other.weight_format"),
    ];
    let folder = checkpoint_with(&tensors);
    let planned = plan(folder.path(), 1 << 30).unwrap();
    let kept: Vec<_> = planned.tensors.iter().filter(|t| t.to == "keep").map(|t| t.name.as_str()).collect();
    assert_eq!(kept.len(), tensors.len() - 1, "{kept:?}");
    assert!(find_quantized(&Checkpoint::open(folder.path()).unwrap(), None).unwrap().is_empty());
    // In the output they stand beside packed weights, and are still what they were.
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("out");
    convert(&planned, &out).unwrap();
    let names: Vec<String> = find_quantized(&Checkpoint::open(&out).unwrap(), None)
        .unwrap()
        .iter()
        .map(|weight| weight.name().to_owned())
        .collect();
    assert_eq!(names, ["fc.weight", "model.layers.0.mlp.up_proj.weight"]);
    // One that a part of the packed weight would need is in the way.
    let folder = checkpoint_with(&[tensors[0].clone(), own("fc.weight.absmax")]);
    let text = message(plan(folder.path(), 1 << 30), folder.path().to_str().unwrap());
    assert!(text.contains("\"fc.weight.absmax\"") && !text.contains("already"), "{text}");
}

#[test]
fn weights_of_quantized_dtypes_are_refused_by_name() {
    for (name, dtype, shape, size) in [
        ("q_proj.weight", "F8_E4M3", vec![16, 64], 1),
        ("q_proj.weight", "F8_E5M2", vec![16, 64], 1),
        ("q_proj.weight", "I8", vec![16, 64], 1),
        ("q_proj.weight", "U8", vec![16, 64], 1),
        ("q_proj.weight", "U32", vec![16, 8], 4),
        ("mlp.experts.gate_up_proj", "F8_E4M3", vec![2, 16, 64], 1),
        ("mlp.experts.gate_up_proj_blocks", "U8", vec![2, 16, 64], 1),
    ] {
        let tensor = (name, dtype, shape.clone(), vec![0; shape.iter().product::<usize>() * size]);
        let scales = ("mlp.experts.gate_up_proj_scales", "U8", vec![2, 16], vec![0; 32]);
        let folder = checkpoint_with(&[tensor, scales]);
        let text = message(plan(folder.path(), 1 << 30), "model.safetensors");
        assert!(text.contains(name) && text.contains("already"), "{text}");
    }
}

#[test]
fn tensors_of_dense_models_are_not_taken_for_companions() {
    let bytes = |n: usize| vec![0; n];
    let folder = checkpoint_with(&[
        ("logit_scale", "F32", vec![], bytes(4)),
        ("blocks.0.layer_scale.scale", "BF16", vec![64], bytes(128)),
        ("blocks.0.attn.relative_position_index", "I64", vec![4, 4], bytes(128)),
        ("embeddings.position_ids", "I32", vec![1, 16], bytes(64)),
        ("attn.bias", "U8", vec![1, 1, 4, 4], bytes(16)),
        ("attn.mask", "BOOL", vec![4, 4], bytes(16)),
        ("steps.weight", "I64", vec![4, 4], bytes(128)),
        ("quantizer.codebooks", "BF16", vec![4, 8], bytes(64)),
        ("vq.scales", "BF16", vec![8], bytes(16)),
    ]);
    plan(folder.path(), 1 << 30).unwrap();
}

#[test]
fn a_sharded_source_is_judged_by_all_of_its_shards() {
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(folder.path(), 3);
    let index = folder.path().join("model.safetensors.index.json");
    let mut listed: Value = serde_json::from_slice(&fs::read(&index).unwrap()).unwrap();
    let name = format!("{Q}.weight_scale_inv");
    write_tensors(&folder.path().join("part-3.safetensors"), &[(&name, "F32", vec![1, 1], vec![0; 4])]);
    listed["weight_map"][&name] = json!("part-3.safetensors");
    fs::write(&index, listed.to_string()).unwrap();
    assert!(message(plan(folder.path(), 1 << 30), "part-3.safetensors").contains(&name));
}

#[test]
fn adapters_are_called_adapters() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter_model.safetensors");
    let name = format!("base_model.model.{Q}.lora_A.weight");
    write_tensors(&path, &[(&name, "BF16", vec![8, 64], weights(8 * 64, 1))]);
    assert!(message(plan(&path, 1 << 30), "adapter_model.safetensors").contains("adapter"));
    fs::write(folder.path().join("adapter_config.json"), "{}").unwrap();
    assert!(message(plan(folder.path(), 1 << 30), folder.path().to_str().unwrap()).contains("merge"));
    // Layers that a model has beside its own dense ones are no adapter.
    let folder = checkpoint_with(&[(&name, "BF16", vec![8, 64], weights(8 * 64, 1))]);
    plan(folder.path(), 1 << 30).unwrap();
}

fn convert(plan: &Plan, to: &Path) -> Result<RunReport> {
    let options = RunOptions { mode: Mode::New, config_text: None, threads: 1, durable: false };
    execute::run(plan, to, &options, &Progress::default())
}

#[test]
fn values_that_a_dtype_cannot_hold_are_an_error() {
    let huge = |n: usize| half::bf16::from_f32(1e5).to_le_bytes().repeat(n);
    for name in ["model.layers.0.input_layernorm.weight", "model.layers.0.mlp.down_proj.weight"] {
        let shape = if name.contains("norm") { vec![64] } else { vec![1, 64] };
        let folder = checkpoint_with(&[(name, "BF16", shape, huge(64))]);
        let options = |allow_nonfinite, dtype| QuantizeOptions { dtype, allow_nonfinite, ..quantize_options(1 << 30) };
        let planned = |options: QuantizeOptions| {
            Plan::quantize(Checkpoint::open(folder.path()).unwrap(), None, &options, None).unwrap()
        };
        let out = folder.path().with_extension("out");
        let error = convert(&planned(options(false, Some(Dtype::F16))), &out).unwrap_err();
        assert!(matches!(error, Error::TooLarge { index: 0, dtype: "float16", .. }), "{error}");
        assert!(message::<()>(Err(error), "model.safetensors").contains(name));
        assert!(!out.exists());
        convert(&planned(options(false, Some(Dtype::F32))), &out).unwrap();
        if !name.contains("norm") {
            let back = folder.path().with_extension("back");
            let source = || Checkpoint::open(&out).unwrap();
            let to = |dtype| DequantizeOptions { dtype: Some(dtype), ..dequantize_options(1 << 30) };
            let to_f16 = Plan::dequantize(source(), None, &to(Dtype::F16)).unwrap();
            assert!(matches!(convert(&to_f16, &back).unwrap_err(), Error::TooLarge { .. }));
            let to_bf16 = Plan::dequantize(source(), None, &to(Dtype::BF16)).unwrap();
            convert(&to_bf16, &back).unwrap();
            fs::remove_dir_all(&back).unwrap();
        }
        fs::remove_dir_all(&out).unwrap();
        convert(&planned(options(true, Some(Dtype::F16))), &out).unwrap();
        fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn what_the_headers_transposed_is_turned_back() {
    let folder = checkpoint_with(&[
        ("h.0.c_attn.weight", "BF16", vec![64, 192], weights(64 * 192, 2)),
        ("h.0.c_attn.bias", "BF16", vec![192], weights(192, 3)),
        ("h.0.c_proj.weight", "BF16", vec![64, 64], weights(64 * 64, 4)),
        ("h.0.c_proj.bias", "BF16", vec![64], weights(64, 5)),
    ]);
    let config = json!({"model_type": "mygpt", "architectures": ["MyGPT"], "auto_map": {}});
    let open = |path: &Path| Checkpoint::open(path).unwrap();
    let (out, back) = (folder.path().with_extension("out"), folder.path().with_extension("back"));
    let planned = Plan::quantize(open(folder.path()), Some(&config), &quantize_options(1 << 30), None).unwrap();
    convert(&planned, &out).unwrap();
    let report = super::super::verify::verify(&open(folder.path()), &open(&out), None, None, 1, &Progress::default());
    let identical = report.unwrap().tensors.iter().filter(|t| t.status == Status::Identical).count();
    assert_eq!(identical, 5);
    convert(&Plan::dequantize(open(&out), Some(&config), &dequantize_options(1 << 30)).unwrap(), &back).unwrap();
    let (before, after) = (open(folder.path()), open(&back));
    for name in ["h.0.c_attn.weight", "h.0.c_proj.weight"] {
        let values = |c: &Checkpoint| {
            let at = c.find(name).unwrap();
            (c.tensor(at).shape.clone(), super::super::cast::cast_to_vec(Dtype::BF16, Dtype::F32, &c.read(at).unwrap()))
        };
        let ((shape, x), (turned, y)) = (values(&before), values(&after));
        assert_eq!(shape, turned);
        let far = x.chunks(4).zip(y.chunks(4)).map(|(x, y)| {
            (f32::from_le_bytes(x.try_into().unwrap()) - f32::from_le_bytes(y.try_into().unwrap())).abs()
        });
        assert!(far.fold(0.0, f32::max) < 0.2, "{name}: values are not where they were");
    }
    assert!(!after.metadata().contains_key("halfbyte.conv1d"));
    fs::remove_dir_all(&out).unwrap();
    fs::remove_dir_all(&back).unwrap();
}
