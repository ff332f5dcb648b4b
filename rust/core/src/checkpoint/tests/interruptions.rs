//! A run that is ended at any of its changes of the disk, as kill -9 would, and then resumed.

use std::fs;
use std::path::Path;

use super::super::file::faults;
use super::super::stage::STAGE_FOLDER;
use super::{Mode, files, message, quantize, write_checkpoint};

/// Ends a run after each number of changes, lets `look` see what there is then, and resumes; gives the number.
fn at_every_change(prepare: impl Fn(&Path), mode: Mode, look: impl Fn(&Path, usize)) -> usize {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source");
    write_checkpoint(&source, 1);
    let before = files(&source);
    let whole = folder.path().join("whole");
    prepare(&whole);
    quantize(&source, &whole, mode).unwrap();
    let whole = files(&whole);
    for changes in 0.. {
        let out = folder.path().join(format!("out-{changes}"));
        prepare(&out);
        faults::allow(changes);
        let outcome = quantize(&source, &out, mode);
        let spent = faults::spent();
        faults::allow(usize::MAX);
        assert_eq!(files(&source), before);
        look(&out, changes);
        if outcome.is_ok() && !spent {
            assert_eq!(files(&out), whole);
            return changes;
        }
        // Again, ended after a few changes of its own; then to the end.
        let mode = if out.join(STAGE_FOLDER).exists() || out.join("model.safetensors.index.json").exists() {
            Mode::Resume
        } else {
            mode
        };
        faults::allow(changes % 7);
        let _ = quantize(&source, &out, mode);
        faults::allow(usize::MAX);
        let shards = complete_shards(&out);
        let report = quantize(&source, &out, mode).unwrap_or_else(|e| panic!("after {changes} changes: {e}"));
        assert_eq!(files(&out), whole, "after {changes} changes");
        assert!(!out.join(STAGE_FOLDER).exists(), "after {changes} changes");
        assert!(report.resumed_shards >= shards, "after {changes} changes");
        assert_eq!(files(&source), before);
    }
    unreachable!()
}

fn complete_shards(out: &Path) -> usize {
    let complete = |n: &&std::path::PathBuf| n.extension().is_some_and(|e| e == "safetensors");
    files(&out.join(STAGE_FOLDER).join("files")).keys().filter(complete).count()
}

#[test]
fn a_new_output_resumes_from_everywhere() {
    let changes = at_every_change(
        |_| (),
        Mode::New,
        |out, changes| {
            if out.join("config.json").exists() {
                for name in ["model-00001-of-00003.safetensors", "model.safetensors.index.json", "sub/deep/note.txt"] {
                    assert!(out.join(name).is_file(), "config.json without {name} after {changes} changes");
                }
            }
        },
    );
    assert!(changes > 60, "{changes} changes are fewer than a run makes");
}

#[test]
fn an_earlier_output_stays_whole_until_the_commit() {
    let old = |out: &Path| {
        fs::create_dir_all(out).unwrap();
        for name in ["model.safetensors", "model-00003-of-00004.safetensors", "tokenizer.json", "config.json"] {
            fs::write(out.join(name), format!("old {name}")).unwrap();
        }
        fs::write(out.join("model_of_mine.safetensors"), "mine").unwrap();
    };
    let changes = at_every_change(old, Mode::Overwrite, |out, changes| {
        assert_eq!(fs::read(out.join("model_of_mine.safetensors")).unwrap(), b"mine");
        let text = |name: &str| fs::read_to_string(out.join(name)).unwrap_or_default();
        if text("config.json").starts_with("old") {
            for name in ["model.safetensors", "model-00003-of-00004.safetensors", "tokenizer.json"] {
                assert_eq!(text(name), format!("old {name}"), "after {changes} changes");
            }
            assert!(!out.join("model.safetensors.index.json").exists(), "after {changes} changes");
        } else if out.join("config.json").exists() {
            assert!(!out.join("model.safetensors").exists(), "after {changes} changes");
            assert!(!out.join("model-00003-of-00004.safetensors").exists(), "after {changes} changes");
            for shard in 1..=3 {
                assert!(out.join(format!("model-{shard:05}-of-00003.safetensors")).exists(), "after {changes} changes");
            }
            assert_eq!(text("tokenizer.json"), "tokens of 1");
        }
    });
    assert!(changes > 60, "{changes} changes are fewer than a run makes");
}

/// A source, and a destination whose run ended after `changes` changes.
fn interrupted(changes: usize) -> (tempfile::TempDir, std::path::PathBuf, std::path::PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let (source, out) = (folder.path().join("source"), folder.path().join("out"));
    write_checkpoint(&source, 1);
    faults::allow(changes);
    quantize(&source, &out, Mode::New).unwrap_err();
    faults::allow(usize::MAX);
    (folder, source, out)
}

#[test]
fn what_is_resumed_is_the_same_run() {
    let (_folder, source, out) = interrupted(50);
    assert!(complete_shards(&out) > 0);
    assert!(message(quantize(&source, &out, Mode::New), "out").contains("--resume"));
    // Another size of shards.
    let plan = super::plan(&source, 5000).unwrap();
    let options = super::RunOptions { mode: Mode::Resume, config_text: None, threads: 1, durable: false };
    let other = super::execute::run(&plan, &out, &options, &super::Progress::default());
    let text = message(other, "out");
    assert!(text.contains("options") && text.contains("output files") && text.contains("--overwrite"), "{text}");
    // A small file of the same length, written later; a weight written again.
    let held = files(&out);
    for name in ["tokenizer.json", "part-1.safetensors"] {
        let bytes = fs::read(source.join(name)).unwrap();
        let facts = fs::metadata(source.join(name)).unwrap();
        fs::write(source.join(name), &bytes).unwrap();
        let later = facts.modified().unwrap() + std::time::Duration::from_secs(1);
        let touch = |time| fs::File::options().write(true).open(source.join(name)).unwrap().set_modified(time).unwrap();
        touch(later);
        assert!(message(quantize(&source, &out, Mode::Resume), "out").contains("differs in: "));
        touch(facts.modified().unwrap());
    }
    assert_eq!(files(&out), held, "a refused resumption changes nothing");
    quantize(&source, &out, Mode::Resume).unwrap();
}

#[test]
fn finished_shards_are_not_made_again() {
    let (_folder, source, out) = interrupted(50);
    let shard = out.join(STAGE_FOLDER).join("files/model-00001-of-00003.safetensors");
    let modified = fs::metadata(&shard).unwrap().modified().unwrap();
    let report = quantize(&source, &out, Mode::Resume).unwrap();
    assert!(report.resumed_shards >= 1);
    assert_eq!(fs::metadata(out.join("model-00001-of-00003.safetensors")).unwrap().modified().unwrap(), modified);
}

#[test]
fn a_journal_that_cannot_be_read_is_named() {
    for text in ["", "[]", "{\"version\": 99}", "null", "\u{1}\n"] {
        let (_folder, source, out) = interrupted(50);
        fs::write(out.join(STAGE_FOLDER).join("journal.json"), text).unwrap();
        let held = files(&out);
        for mode in [Mode::Resume, Mode::New] {
            assert!(message(quantize(&source, &out, mode), "journal.json").contains("--overwrite"), "{text:?}");
        }
        assert_eq!(files(&out), held);
        quantize(&source, &out, Mode::Overwrite).unwrap();
    }
}

#[test]
fn leftovers_in_the_stage_do_no_harm() {
    let (_folder, source, out) = interrupted(50);
    let stage = out.join(STAGE_FOLDER);
    fs::write(stage.join("files/model-00003-of-00003.safetensors.partial"), vec![7; 100_000]).unwrap();
    fs::write(stage.join("files/stranger"), "x").unwrap();
    fs::write(stage.join("journal.json.partial"), "x").unwrap();
    quantize(&source, &out, Mode::Resume).unwrap();
    assert!(!out.join("stranger").exists() && !stage.exists());
}

#[test]
fn one_run_at_a_time() {
    let (_folder, source, out) = interrupted(50);
    let held = files(&out);
    let lock = fs::File::options().write(true).open(out.join(STAGE_FOLDER).join("lock")).unwrap();
    lock.lock().unwrap();
    for mode in [Mode::New, Mode::Resume, Mode::Overwrite] {
        assert!(message(quantize(&source, &out, mode), "out").contains("another halfbyte process"));
        assert_eq!(files(&out), held);
    }
    drop(lock);
    quantize(&source, &out, Mode::Resume).unwrap();
}

#[test]
fn a_failed_run_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (source, out) = (folder.path().join("source"), folder.path().join("a/b/out"));
    write_checkpoint(&source, 1);
    let path = source.join("part-2.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let nan = bytes.len() - 64 * 2 - 6;
    bytes[nan..nan + 2].copy_from_slice(&[0xc0, 0x7f]);
    fs::write(&path, bytes).unwrap();
    let text = message(quantize(&source, &out, Mode::New), "part-2.safetensors");
    assert!(
        text.contains("model.layers.2.mlp.up_proj.weight") && text.contains("element 1021") && text.contains("NaN")
    );
    assert!(!folder.path().join("a").exists());
    // Nor does one over an earlier output, which stays.
    fs::create_dir_all(&out).unwrap();
    fs::write(out.join("config.json"), "old").unwrap();
    quantize(&source, &out, Mode::Overwrite).unwrap_err();
    assert_eq!(files(&out).len(), 1);
}
