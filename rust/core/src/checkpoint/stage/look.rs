//! What a destination holds: nothing, a finished output, or a run that was interrupted.

use std::fs;
use std::io;
use std::path::Path;

use serde_json::Value;

use super::folders::{JOURNAL, STAGE_FOLDER, contents, exists, is_folder};
use super::lock::{in_use, is_locked};
use super::mode::Mode;
use crate::error::{Error, Result};

/// Version of the journal; another version's runs are not continued.
pub(super) const JOURNAL_VERSION: u64 = 1;

/// What a destination holds.
pub(super) enum Found {
    /// The finished output.
    Complete,
    /// A run to go on with: its journal.
    Interrupted(Value),
    /// Nothing that is to be kept until the commit but, perhaps, files to replace.
    Fresh { occupied: bool },
}

/// Looks whether `mode` suits what is in `destination`; `holding` is whether its lock is ours.
pub(super) fn look(
    destination: &Path,
    mode: Mode,
    identity: &Value,
    holding: bool,
    complete: &impl Fn(&Path) -> bool,
) -> Result<Found> {
    let stage = destination.join(STAGE_FOLDER);
    let occupied = contents(destination)?.iter().any(|name| name != STAGE_FOLDER);
    let there = exists(&stage);
    for folder in [&stage, &stage.join("files")] {
        if exists(folder) && !is_folder(folder) {
            return Err(Error::destination(folder, "is no folder: remove it, no run of halfbyte has made it"));
        }
    }
    let journal = match mode {
        // Whatever it says, it is replaced.
        Mode::Overwrite => None,
        _ if !there => None,
        Mode::New | Mode::Resume => read_journal(&stage)?,
    };
    let fresh = Ok(Found::Fresh { occupied });
    match (mode, journal) {
        (Mode::Overwrite, _) => fresh,
        (Mode::New, Some(_)) if !holding && is_locked(&stage) => Err(in_use(destination)),
        (Mode::New, Some(_)) => Err(Error::destination(
            destination,
            "holds a run that was interrupted: --resume continues it, --overwrite starts again",
        )),
        (Mode::New, None) if occupied => Err(Error::destination(
            destination,
            "is not empty: choose another folder, or --overwrite to replace its checkpoint",
        )),
        (Mode::New, None) => fresh,
        (Mode::Resume, Some(journal)) if journal.get("identity") == Some(identity) => Ok(Found::Interrupted(journal)),
        (Mode::Resume, Some(journal)) => Err(Error::destination(
            destination,
            format!(
                "holds an interrupted run of another kind ({}): --overwrite starts again",
                difference(&journal, identity)
            ),
        )),
        (Mode::Resume, None) if occupied && complete(destination) => Ok(Found::Complete),
        // A stage without a journal was left by --overwrite in its first moments.
        (Mode::Resume, None) if occupied && !there => Err(Error::destination(
            destination,
            "holds files that are not the output of this command, and no interrupted run to resume: --overwrite \
             replaces its checkpoint",
        )),
        (Mode::Resume, None) => fresh,
    }
}

/// The journal of an interrupted run; `None` when it stopped before it had written one.
fn read_journal(stage: &Path) -> Result<Option<Value>> {
    let path = stage.join(JOURNAL);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(&path, "read")(e)),
    };
    let journal: Value = serde_json::from_slice(&text).map_err(|e| {
        Error::file(&path, format!("is no valid journal of an interrupted run ({e}): --overwrite starts again"))
    })?;
    if journal["version"] != JOURNAL_VERSION {
        return Err(Error::file(
            &path,
            format!("has the version {}: expected {JOURNAL_VERSION}; --overwrite starts again", journal["version"]),
        ));
    }
    Ok(Some(journal))
}

/// What differs between an interrupted run and this one, in a word or two.
fn difference(journal: &Value, identity: &Value) -> String {
    let (Some(was), Some(is)) = (journal["identity"].as_object(), identity.as_object()) else {
        return "its journal cannot be read".to_owned();
    };
    let keys: Vec<&str> = is.iter().filter(|(k, v)| was.get(*k) != Some(v)).map(|(k, _)| k.as_str()).collect();
    format!("it differs in: {}", keys.join(", "))
}
