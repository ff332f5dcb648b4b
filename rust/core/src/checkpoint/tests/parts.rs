//! Weights in subfolders: other models are copied, this model in another form is not, and both are said.

use super::*;

fn open_with(files: &[(&str, &[Named<'_>])], raw: &[&str]) -> (tempfile::TempDir, Checkpoint) {
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(folder.path(), 1);
    for (name, tensors) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        write_tensors(&path, tensors);
    }
    for name in raw {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "x").unwrap();
    }
    let found = Checkpoint::open(folder.path()).unwrap();
    (folder, found)
}

#[test]
fn weights_of_other_models_are_copied_and_said() {
    let dense: &[Named<'_>] = &[("linear.weight", "F32", vec![2, 4], vec![7; 32])];
    let (_kept, found) = open_with(
        &[("2_Dense/model.safetensors", dense), ("vocoder/part-1.safetensors", dense)],
        &["vocoder/model.safetensors.index.json", "3_Dense/pytorch_model.bin", "2_Dense/pytorch_model.bin"],
    );
    let copied: Vec<&str> = found.small_files.iter().filter_map(|f| f.0.to_str()).collect();
    for name in [
        "2_Dense/model.safetensors",
        "vocoder/part-1.safetensors",
        "vocoder/model.safetensors.index.json",
        "3_Dense/pytorch_model.bin",
    ] {
        assert!(copied.contains(&name), "{name}: {copied:?}");
    }
    assert!(found.notes.iter().any(|note| note.contains("2_Dense/model.safetensors")), "{:?}", found.notes);
    let left: Vec<&str> = found.left_out.iter().filter_map(|f| f.0.to_str()).collect();
    assert_eq!(left, ["2_Dense/pytorch_model.bin"]);
    let out = tempfile::tempdir().unwrap();
    quantize(&found.folder, &out.path().join("out"), Mode::New).unwrap();
    let (before, after) = (files(&found.folder), files(&out.path().join("out")));
    let name = Path::new("2_Dense/model.safetensors");
    assert_eq!(before[name], after[name]);
}

#[test]
fn other_forms_of_the_model_stay_out_and_are_said() {
    let again = ["model.layers.0.mlp.up_proj.weight", "model.layers.0.norm.weight"];
    let again: Vec<Named<'_>> = again.iter().map(|name| (*name, "F16", vec![1, 2], vec![0; 4])).collect();
    let other: &[Named<'_>] = &[("w", "F32", vec![1], vec![0; 4])];
    let (_kept, found) = open_with(
        &[
            ("fp16/model.safetensors", &again),
            ("original/consolidated.safetensors", other),
            ("checkpoint-500/model.safetensors", other),
        ],
        &[
            "onnx/model.onnx",
            "openvino/openvino_model.bin",
            "sub/model.gguf",
            "sub/optimizer.pt",
            "fp16/model.safetensors.index.json",
        ],
    );
    assert_eq!(found.small_files.len(), 2, "{:?}", found.small_files);
    let left: BTreeMap<&str, &str> =
        found.left_out.iter().map(|(name, why)| (name.to_str().unwrap(), why.as_str())).collect();
    for (name, why) in [
        ("fp16/model.safetensors", "same names"),
        ("original/consolidated.safetensors", "another form"),
        ("checkpoint-500/model.safetensors", "training"),
        ("onnx/model.onnx", "another form"),
        ("openvino/openvino_model.bin", "another form"),
        ("sub/model.gguf", "another form"),
        ("sub/optimizer.pt", "training"),
    ] {
        assert!(left[name].contains(why), "{name}: {left:?}");
    }
}

#[test]
fn shards_in_a_subfolder_are_read_and_not_copied() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    fs::create_dir(path.join("w")).unwrap();
    let name = "model.layers.0.mlp.up_proj.weight";
    write_tensors(&path.join("w/model.safetensors"), &[(name, "BF16", vec![16, 64], weights(1024, 1))]);
    let index = json!({"weight_map": {name: "w/model.safetensors"}});
    fs::write(path.join("model.safetensors.index.json"), index.to_string()).unwrap();
    let found = Checkpoint::open(path).unwrap();
    assert_eq!((found.order.len(), found.small_files.len(), found.left_out.len()), (1, 0, 0));
}
