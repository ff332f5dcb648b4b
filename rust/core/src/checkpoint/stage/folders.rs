//! What may and may not be in the way of a destination.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::checkpoint::file;
use crate::error::{Error, Result};

/// The hidden folder inside a destination.
pub const STAGE_FOLDER: &str = ".halfbyte-partial";

/// Its file that says what is being made.
pub(super) const JOURNAL: &str = "journal.json";

/// The folder of the files that a run into `destination` has made so far.
pub fn files_in(destination: &Path) -> PathBuf {
    destination.join(STAGE_FOLDER).join("files")
}

pub(super) fn exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// Whether it is a folder itself, not a link to one.
pub(super) fn is_folder(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|facts| facts.is_dir())
}

/// Fails where a file of the output cannot take its place: better now than in the middle of the commit. Links to
/// folders are not followed, so that nothing is written outside the destination.
pub(super) fn refuse_obstacles(destination: &Path, names: &[PathBuf]) -> Result<()> {
    for name in names {
        let path = destination.join(name);
        if is_folder(&path) {
            return Err(Error::destination(path, "is a folder where the output has a file: remove it"));
        }
        for folder in path.ancestors().skip(1).take_while(|f| *f != destination) {
            if exists(folder) && !is_folder(folder) {
                return Err(Error::destination(
                    folder,
                    "is a file or a link where the output has a folder of its own: remove it",
                ));
            }
        }
    }
    Ok(())
}

/// The names in a folder; none when it does not exist. A name that is no Unicode counts as itself, replaced.
pub(super) fn contents(folder: &Path) -> Result<BTreeSet<String>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => {
            return Err(Error::destination(folder, "is a file: expected a folder"));
        }
        Err(e) => return Err(Error::io(folder, "list")(e)),
    };
    entries
        .map(|entry| entry.map(|e| e.file_name().to_string_lossy().into_owned()).map_err(Error::io(folder, "list")))
        .collect()
}

/// The source is never written to, however the two are connected.
pub(super) fn refuse_overlap(destination: &Path, place: &Path) -> Result<()> {
    let problem = if file::is_same(destination, place) {
        "is the source itself"
    } else if destination.ancestors().any(|folder| file::is_same(folder, place)) {
        "is inside the source folder"
    } else if place.ancestors().any(|folder| file::is_same(folder, destination)) {
        if place.is_dir() { "contains the source folder" } else { "contains a file that the source links to" }
    } else {
        return Ok(());
    };
    Err(Error::destination(
        destination,
        format!("{problem} ({}): expected a folder beside it; the source is never changed", place.display()),
    ))
}

/// Makes `folder` and those above it; gives those that were not there, the outermost first.
pub(super) fn make_folders(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut missing: Vec<PathBuf> =
        folder.ancestors().take_while(|f| !f.as_os_str().is_empty() && !f.exists()).map(Path::to_path_buf).collect();
    missing.reverse();
    for (done, path) in missing.iter().enumerate() {
        // One that appeared meanwhile will do.
        if let Err(error) = file::create_folders(path) {
            for made in missing[..done].iter().rev() {
                file::remove_folder(made);
            }
            return Err(error);
        }
    }
    Ok(missing)
}

pub(super) fn remove_partials(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() {
            remove_partials(&path);
        } else if path.extension().is_some_and(|e| e == "partial") {
            let _ = file::remove_if_present(&path);
        }
    }
}
