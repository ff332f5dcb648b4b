//! Destinations that are the source, lead to it, or hold what is in the way.

use std::fs;
use std::path::{Path, PathBuf};

use super::super::stage::STAGE_FOLDER;
use super::{Mode, files, message, quantize, write_checkpoint};

fn source(folder: &Path) -> PathBuf {
    let source = folder.join("source");
    write_checkpoint(&source, 1);
    source
}

const MODES: [Mode; 3] = [Mode::New, Mode::Overwrite, Mode::Resume];

#[test]
fn the_source_is_no_destination() {
    let folder = tempfile::tempdir().unwrap();
    let source = source(folder.path());
    let before = files(&source);
    for mode in MODES {
        for (place, word) in [
            (source.clone(), "is the source itself"),
            (source.join("."), "is the source itself"),
            (source.join("sub/.."), "is the source itself"),
            (source.join("sub"), "is inside the source"),
            (source.join("new/er"), "is inside the source"),
            (folder.path().to_path_buf(), "contains the source"),
            (folder.path().join("source/sub/../.."), "contains the source"),
        ] {
            let text = message(quantize(&source, &place, mode), "source");
            assert!(text.contains(word), "{text}");
            assert_eq!(files(&source), before);
        }
    }
}

#[test]
fn a_destination_that_is_in_use_or_no_folder_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let source = source(folder.path());
    let file = folder.path().join("file");
    fs::write(&file, "mine").unwrap();
    for mode in MODES {
        message(quantize(&source, &file, mode), "file");
        message(quantize(&source, &file.join("below"), mode), "file");
        assert_eq!(fs::read(&file).unwrap(), b"mine");
    }
    let full = folder.path().join("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("thesis.txt"), "mine").unwrap();
    assert!(message(quantize(&source, &full, Mode::New), "full").contains("--overwrite"));
    assert!(message(quantize(&source, &full, Mode::Resume), "full").contains("--overwrite"));
    assert_eq!(files(&full).len(), 1);
    quantize(&source, &full, Mode::Overwrite).unwrap();
    assert_eq!(fs::read(full.join("thesis.txt")).unwrap(), b"mine");
}

#[test]
fn what_is_in_the_way_is_found_before_anything_is_written() {
    for name in ["tokenizer.json", "config.json", "model-00002-of-00003.safetensors", "sub/deep/note.txt"] {
        let folder = tempfile::tempdir().unwrap();
        let source = source(folder.path());
        let out = folder.path().join("out");
        fs::create_dir_all(out.join(name)).unwrap();
        fs::write(out.join("config.json.bak"), "").unwrap();
        let text = message(quantize(&source, &out, Mode::Overwrite), name);
        assert!(text.contains("is a folder where"), "{text}");
        assert_eq!(files(&out).len(), 1);
    }
    let folder = tempfile::tempdir().unwrap();
    let source = source(folder.path());
    let out = folder.path().join("out");
    fs::create_dir(&out).unwrap();
    // Folders where an earlier checkpoint would have files that are removed.
    for name in ["model.safetensors", "model-00001-of-00009.safetensors"] {
        fs::create_dir(out.join(name)).unwrap();
    }
    quantize(&source, &out, Mode::Overwrite).unwrap();
    assert!(out.join("model.safetensors").is_dir());
    fs::remove_dir_all(&out).unwrap();
    fs::create_dir(&out).unwrap();
    fs::write(out.join("sub"), "a file").unwrap();
    assert!(message(quantize(&source, &out, Mode::Overwrite), "sub").contains("folder of its own"));
    assert_eq!(files(&out).len(), 1);
    fs::remove_file(out.join("sub")).unwrap();
    fs::write(out.join(STAGE_FOLDER), "a file").unwrap();
    for mode in MODES {
        assert!(message(quantize(&source, &out, mode), STAGE_FOLDER).contains("no folder"));
    }
}

#[test]
fn a_finished_output_is_complete_while_it_is_newer_than_the_source() {
    let folder = tempfile::tempdir().unwrap();
    let source = source(folder.path());
    let out = folder.path().join("out");
    quantize(&source, &out, Mode::New).unwrap();
    let whole = files(&out);
    assert!(quantize(&source, &out, Mode::Resume).unwrap().already_complete);
    // A stage without a journal is what a run killed in its last moment leaves.
    fs::create_dir(out.join(STAGE_FOLDER)).unwrap();
    assert!(quantize(&source, &out, Mode::Resume).unwrap().already_complete);
    assert_eq!(files(&out), whole);
    assert!(!out.join(STAGE_FOLDER).exists());
    // The same names and shapes with other values.
    write_checkpoint(&source, 2);
    let file = fs::File::options().write(true).open(source.join("part-0.safetensors")).unwrap();
    file.set_modified(std::time::SystemTime::now() + std::time::Duration::from_secs(2)).unwrap();
    assert!(message(quantize(&source, &out, Mode::Resume), "out").contains("--overwrite"));
    // One that lost a tensor.
    let other = folder.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::copy(out.join("config.json"), other.join("config.json")).unwrap();
    assert!(message(quantize(&source, &other, Mode::Resume), "other").contains("--overwrite"));
}

#[cfg(unix)]
mod links {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_to_the_source_are_seen_through() {
        let folder = tempfile::tempdir().unwrap();
        let source = source(folder.path());
        let before = files(&source);
        let link = folder.path().join("link");
        symlink("source", &link).unwrap();
        symlink("link", folder.path().join("link2")).unwrap();
        symlink(folder.path(), folder.path().join("up")).unwrap();
        for mode in MODES {
            for place in ["link", "link2", "link/new", "link2/sub/deep/er", "up/source", "up/link/sub", "up"] {
                message(quantize(&source, &folder.path().join(place), mode), "source");
                message(quantize(&link, &folder.path().join(place), mode), "source");
            }
            assert_eq!(files(&source), before);
        }
        symlink("nowhere", folder.path().join("dangling")).unwrap();
        symlink("circle", folder.path().join("circle")).unwrap();
        message(quantize(&source, &folder.path().join("dangling"), Mode::New), "dangling");
        message(quantize(&source, &folder.path().join("circle/x"), Mode::New), "circle");
        // A link to an empty folder is as good as the folder.
        fs::create_dir(folder.path().join("empty")).unwrap();
        symlink("empty", folder.path().join("to-empty")).unwrap();
        quantize(&source, &folder.path().join("to-empty"), Mode::New).unwrap();
        assert!(folder.path().join("empty/config.json").exists());
    }

    #[test]
    fn a_source_of_links_is_followed_to_its_files() {
        let folder = tempfile::tempdir().unwrap();
        let store = source(folder.path());
        let linked = folder.path().join("linked");
        fs::create_dir(&linked).unwrap();
        for name in files(&store).keys().filter(|n| n.components().count() == 1) {
            symlink(Path::new("../source").join(name), linked.join(name)).unwrap();
        }
        let before = files(&store);
        for mode in MODES {
            assert!(message(quantize(&linked, &store, mode), "source").contains("links to"));
            assert_eq!(files(&store), before);
        }
        quantize(&linked, &folder.path().join("out"), Mode::New).unwrap();
        assert_eq!(files(&store), before);
    }

    #[test]
    fn hard_links_to_the_source_keep_their_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let source = source(folder.path());
        let before = files(&source);
        let out = folder.path().join("out");
        fs::create_dir_all(out.join("sub/deep")).unwrap();
        fs::create_dir_all(out.join(STAGE_FOLDER).join("files")).unwrap();
        for name in before.keys() {
            fs::hard_link(source.join(name), out.join(name)).unwrap();
        }
        for name in ["lock", "files/model-00001-of-00003.safetensors.partial"] {
            fs::hard_link(source.join("part-0.safetensors"), out.join(STAGE_FOLDER).join(name)).unwrap();
        }
        quantize(&source, &out, Mode::Overwrite).unwrap();
        assert_eq!(files(&source), before);
        assert_eq!(fs::read(out.join("config.json")).unwrap(), b"{\"new\": 1}");
    }

    #[test]
    fn links_inside_the_destination_lead_nothing_outside() {
        for (link, target) in [
            (STAGE_FOLDER, "../source"),
            ("sub", "../source/sub"),
            ("sub/deep", "../../source/sub/deep"),
            (".halfbyte-partial/files", "../../source"),
            (".halfbyte-partial/lock", "../../source/tokenizer.json"),
            (".halfbyte-partial/journal.json.partial", "../../source/tokenizer.json"),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let source = source(folder.path());
            fs::write(source.join("lock"), "precious").unwrap();
            let before = files(&source);
            let out = folder.path().join("out");
            fs::create_dir_all(out.join(link).parent().unwrap()).unwrap();
            symlink(target, out.join(link)).unwrap();
            for mode in MODES {
                let _ = quantize(&source, &out, mode);
                assert_eq!(files(&source), before, "through {link}");
            }
        }
    }
}
