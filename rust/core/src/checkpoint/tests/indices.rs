//! Indices that lead astray, and folders that hold something else.

use std::fs;
use std::path::Path;

use super::super::reader::{Checkpoint, check_index};
use super::{message, weights, write_checkpoint, write_tensors};

fn refused(text: &str) -> String {
    message(check_index(Path::new("index.json"), text.as_bytes()), "index.json")
}

#[test]
fn bad_indices_are_named() {
    for (text, word) in [
        ("", "EOF"),
        ("[]", "weight_map"),
        ("{}", "weight_map"),
        (r#"{"weight_map":[]}"#, "valid"),
        (r#"{"weight_map":{}}"#, "empty"),
        (r#"{"weight_map":{"a":1}}"#, "valid"),
        (r#"{"weight_map":{"a":null}}"#, "valid"),
        (r#"{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}"#, "two entries named \"a\""),
        (r#"{"weight_map":{"a":"x.safetensors"},"weight_map":{}}"#, "duplicate"),
        (r#"{"weight_map":{"a":"x.bin"}}"#, "x.bin"),
        (r#"{"weight_map":{"a":""}}"#, "\"a\""),
        (r#"{"weight_map":{"a":"../x.safetensors"}}"#, "../x.safetensors"),
        (r#"{"weight_map":{"a":"y/../../x.safetensors"}}"#, "y/../../x.safetensors"),
        (r#"{"weight_map":{"a":"/etc/x.safetensors"}}"#, "/etc/x.safetensors"),
        (r#"{"weight_map":{"a":"./x.safetensors"}}"#, "./x.safetensors"),
        (r#"{"weight_map":{"a":"..\\x.safetensors"}}"#, "inside the folder"),
        (r#"{"weight_map":{"a":"x\u0000.safetensors"}}"#, "inside the folder"),
        (r#"{"weight_map":{"a":".."}}"#, "inside the folder"),
    ] {
        let problem = refused(text);
        assert!(problem.contains(word), "{text}: {problem}");
    }
    // What is not read may be as deep as it likes; what is read may not.
    let nest = |depth: usize| format!("{}1{}", "[".repeat(depth), "]".repeat(depth));
    let deep = format!(r#"{{"metadata":{},"weight_map":{{"a":"x.safetensors"}}}}"#, nest(99_999));
    assert_eq!(check_index(Path::new("x"), deep.as_bytes()).unwrap(), (1, 1));
    assert!(refused(&format!(r#"{{"weight_map":{{"a":{}}}}}"#, nest(99_999))).contains("valid"));
    assert_eq!(
        check_index(Path::new("x"), br#"{"weight_map":{"a":"d/x.safetensors","b":"d/x.safetensors"}}"#).unwrap(),
        (2, 1)
    );
}

fn with_index(index: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("sub")).unwrap();
    write_tensors(
        &folder.path().join("x.safetensors"),
        &[("a", "U8", vec![1], vec![1]), ("b", "U8", vec![1], vec![2])],
    );
    write_tensors(
        &folder.path().join("sub/x.safetensors"),
        &[("b", "U8", vec![1], vec![3]), ("c", "U8", vec![1], vec![4])],
    );
    fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    folder
}

#[test]
fn shards_and_tensors_that_are_missing_are_named() {
    let folder = with_index(r#"{"weight_map":{"a":"x.safetensors","q":"y.safetensors"}}"#);
    let text = message(Checkpoint::open(folder.path()), "model.safetensors.index.json");
    assert!(text.contains("y.safetensors") && text.contains("\"q\""), "{text}");
    let folder = with_index(r#"{"weight_map":{"a":"x.safetensors","q":"x.safetensors"}}"#);
    let text = message(Checkpoint::open(folder.path()), "model.safetensors.index.json");
    assert!(text.contains("x.safetensors") && text.contains("\"q\""), "{text}");
}

#[test]
fn each_shard_answers_for_its_own_tensors() {
    // `b` stands in both files, which have one name in different folders.
    let folder = with_index(r#"{"weight_map":{"a":"x.safetensors","b":"sub/x.safetensors","c":"sub/x.safetensors"}}"#);
    let found = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(found.read(found.find("b").unwrap()).unwrap(), [3]);
    let folder = with_index(r#"{"weight_map":{"a":"x.safetensors","b":"x.safetensors","c":"sub/x.safetensors"}}"#);
    let found = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(found.read(found.find("b").unwrap()).unwrap(), [2]);
    // Said to be in the wrong one of the two.
    let folder = with_index(r#"{"weight_map":{"c":"x.safetensors","b":"sub/x.safetensors"}}"#);
    assert!(message(Checkpoint::open(folder.path()), "index.json").contains("\"c\""));
    // Unlisted and in both.
    let folder = with_index(r#"{"weight_map":{"a":"x.safetensors","c":"sub/x.safetensors"}}"#);
    assert!(message(Checkpoint::open(folder.path()), "sub/x.safetensors").contains("\"b\""));
}

#[test]
fn folders_without_safetensors_say_what_they_hold() {
    let folder = tempfile::tempdir().unwrap();
    let open = || Checkpoint::open(folder.path());
    let name = folder.path().to_str().unwrap();
    assert!(message(open(), name).contains("expected model.safetensors"));
    fs::write(folder.path().join("pytorch_model.bin"), "PK").unwrap();
    assert!(message(open(), name).contains("pickled"));
    fs::write(folder.path().join("other.safetensors"), "").unwrap();
    assert!(message(open(), name).contains("other.safetensors"));
    fs::create_dir(folder.path().join("model.safetensors")).unwrap();
    assert!(message(open(), "model.safetensors").contains("regular file"));
    assert!(message(Checkpoint::open(&folder.path().join("nothing")), "nothing").contains("does not exist"));
    fs::remove_dir(folder.path().join("model.safetensors")).unwrap();
    write_tensors(&folder.path().join("model.safetensors"), &[]);
    assert!(message(open(), "model.safetensors").contains("no tensor"));
}

#[cfg(unix)]
#[test]
fn small_files_are_found_without_following_folders() {
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source");
    write_checkpoint(&source, 1);
    symlink("../../source", source.join("sub/again")).unwrap();
    symlink("loop", source.join("loop")).unwrap();
    symlink("/dev/zero", source.join("zero.txt")).unwrap();
    symlink("tokenizer.json", source.join("linked.json")).unwrap();
    fs::write(source.join("extra.BIN"), "").unwrap();
    fs::create_dir_all(source.join("a/b/c/d/e/f/g/h/i/j")).unwrap();
    fs::write(source.join("a/b/c/d/e/f/g/h/i/j/deep.txt"), "").unwrap();
    let found = Checkpoint::open(&source).unwrap();
    let names: Vec<PathBuf> = found.small_files.iter().map(|f| f.0.clone()).collect();
    assert_eq!(names, ["linked.json", "sub/deep/note.txt", "tokenizer.json"].map(PathBuf::from));
    let left: Vec<String> = found.left_out.iter().map(|(p, why)| format!("{}: {why}", p.display())).collect();
    assert_eq!(left.len(), 3, "{left:?}");
    assert!(left[0].starts_with("a/b/c/d/e/f/g/h/i: a folder"), "{left:?}");
    assert!(left[1].starts_with("extra.BIN: weights") && left[2].starts_with("loop: a link"), "{left:?}");
}

#[test]
fn a_source_that_changes_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    write_tensors(&path, &[("a.weight", "BF16", vec![2, 64], weights(128, 1))]);
    let source = Checkpoint::open(folder.path()).unwrap();
    source.files[0].check_unchanged().unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(40).unwrap();
    assert!(message(source.files[0].check_unchanged(), "model.safetensors").contains("changed"));
    assert!(message(source.read(source.order[0]), "model.safetensors").contains("cut short"));
}
