//! The destination of a run: nothing appears in it before it is complete, and an interrupted run can go on.
//!
//! Everything is written to a hidden folder inside the destination (so on the same file system), each file under a
//! temporary name until it is complete and on disk. When all are there a *commit* moves them out by renames,
//! config.json last. A journal in the hidden folder says what is being made of what; a run that finds it can go on
//! where the other stopped, or finish the other's commit. An earlier output in the destination stays as it is until
//! the commit.
//!
//! ```text
//! DST/.halfbyte-partial/journal.json            what is being made, and how far: {"phase": "write" | "commit", …}
//! DST/.halfbyte-partial/lock                    held by the running process
//! DST/.halfbyte-partial/files/NAME.partial      being written
//! DST/.halfbyte-partial/files/NAME              complete
//! ```

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::file;
use super::source::{CONFIG_FILE, INDEX_FILE};
use crate::error::{Error, Result};

/// The hidden folder inside a destination.
pub const STAGE_FOLDER: &str = ".halfbyte-partial";

/// Version of the journal; another version's runs are not continued.
const JOURNAL_VERSION: u64 = 1;

/// What to do about a destination that holds something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// It must be new or empty.
    New,
    /// Its checkpoint is replaced when the new one is complete.
    Overwrite,
    /// An interrupted run goes on.
    Resume,
}

impl std::str::FromStr for Mode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "new" => Ok(Self::New),
            "overwrite" => Ok(Self::Overwrite),
            "resume" => Ok(Self::Resume),
            _ => Err(Error::argument("mode", format!("{text:?}"), "new, overwrite or resume")),
        }
    }
}

/// What [`Stage::open`] found.
pub enum Opened {
    /// Files are to be written.
    Write(Stage),
    /// The destination is complete; `Resume` has nothing to do.
    Complete,
}

/// A destination being written. Dropping it without [`Stage::commit`] or [`Stage::keep`] removes what it made.
pub struct Stage {
    destination: PathBuf,
    /// Folders above the files that this run made, the outermost first; removed again when nothing comes of it.
    made: Vec<PathBuf>,
    journal: Value,
    _lock: File,
    durable: bool,
    settled: bool,
}

impl Stage {
    /// Prepares `destination`.
    ///
    /// `identity` describes source and options: an interrupted run goes on only when it is the same. `complete` tells
    /// whether the destination holds the finished output of this plan.
    pub fn open(
        destination: &Path,
        source: &Path,
        mode: Mode,
        identity: &Value,
        durable: bool,
        complete: impl FnOnce(&Path) -> bool,
    ) -> Result<Opened> {
        let destination = file::resolve(destination)?;
        refuse_overlap(&destination, source)?;
        let in_use = contents(&destination)?;
        let stage = destination.join(STAGE_FOLDER);
        let interrupted = in_use.contains(STAGE_FOLDER);
        let occupied = in_use.iter().any(|n| n != STAGE_FOLDER);
        let mut go_on = None;
        match mode {
            Mode::New if interrupted => {
                return Err(Error::destination(
                    &destination,
                    "holds a run that was interrupted: --resume continues it, --overwrite starts again",
                ));
            }
            Mode::New if occupied => {
                return Err(Error::destination(
                    &destination,
                    "is not empty: choose another folder, or --overwrite to replace its checkpoint",
                ));
            }
            Mode::Resume if interrupted => go_on = read_journal(&stage)?,
            Mode::Resume if occupied => {
                if complete(&destination) {
                    return Ok(Opened::Complete);
                }
                return Err(Error::destination(
                    &destination,
                    "holds files and no interrupted run, so there is nothing to resume: --overwrite replaces its checkpoint",
                ));
            }
            _ => {}
        }
        if let Some(journal) = &go_on
            && journal.get("identity") != Some(identity)
        {
            return Err(Error::destination(
                &destination,
                format!(
                    "holds an interrupted run of another kind ({}): --overwrite starts again",
                    difference(journal, identity)
                ),
            ));
        }
        let made = make_folders(&stage)?;
        let lock = lock(&stage.join("lock"), &destination)?;
        let committing = go_on.as_ref().is_some_and(|j| j["phase"] == "commit");
        let fresh = json!({
            "version": JOURNAL_VERSION,
            "phase": "write",
            // A resumed run finds other files only when the first one was allowed to replace them.
            "replace": mode == Mode::Overwrite || occupied,
            "identity": identity,
        });
        let mut this =
            Self { journal: go_on.clone().unwrap_or(fresh), destination, made, _lock: lock, durable, settled: false };
        if go_on.is_none() {
            this.clear_files()?;
            this.write_journal()?;
        } else if committing {
            this.settled = true;
        }
        Ok(Opened::Write(this))
    }

    /// Whether the run before this one had begun to move finished files: then all of them are there.
    pub fn committing(&self) -> bool {
        self.journal["phase"] == "commit"
    }

    /// The folder that files are written to.
    pub fn files(&self) -> PathBuf {
        self.stage().join("files")
    }

    /// The destination.
    pub fn destination(&self) -> &Path {
        &self.destination
    }

    /// The path of a file while it is being written. Folders above it are made.
    pub fn partial(&self, name: &Path) -> Result<PathBuf> {
        let mut path = self.files().join(name).into_os_string();
        path.push(".partial");
        let path = PathBuf::from(path);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(Error::io(folder, "make"))?;
        }
        Ok(path)
    }

    /// Takes a written file as complete.
    pub fn accept(&self, name: &Path, partial: &Path, written: &File) -> Result<()> {
        if self.durable {
            written.sync_all().map_err(Error::io(partial, "sync"))?;
        }
        let path = self.files().join(name);
        file::rename(partial, &path)?;
        if self.durable
            && let Some(folder) = path.parent()
        {
            file::sync_folder(folder)?;
        }
        Ok(())
    }

    /// Writes a small file whole.
    pub fn write(&self, name: &Path, bytes: &[u8]) -> Result<()> {
        let partial = self.partial(name)?;
        let mut out = File::create(&partial).map_err(Error::io(&partial, "create"))?;
        out.write_all(bytes).map_err(Error::io(&partial, "write"))?;
        self.accept(name, &partial, &out)
    }

    /// Whether a complete file of this name is there.
    pub fn has(&self, name: &Path) -> bool {
        self.files().join(name).is_file()
    }

    /// Moves every file of `names` into the destination, in this order, and ends the run. `names` ends with
    /// config.json, if there is one. Files of an earlier checkpoint that the new one does not replace are removed.
    pub fn commit(mut self, names: &[PathBuf]) -> Result<()> {
        // From here on the outcome is decided; whoever finds the journal finishes.
        self.settled = true;
        self.journal["phase"] = json!("commit");
        self.write_journal()?;
        let files = self.files();
        if self.journal["replace"] == true {
            // A half-replaced folder must not look like a model. A config.json that has moved already is the new one.
            let config = Path::new(CONFIG_FILE);
            if files.join(config).is_file() || !names.iter().any(|n| n == config) {
                file::remove_if_present(&self.destination.join(config))?;
            }
            self.remove_stale(names)?;
        }
        for name in names {
            let (from, to) = (files.join(name), self.destination.join(name));
            if let Some(folder) = to.parent() {
                fs::create_dir_all(folder).map_err(Error::io(folder, "make"))?;
            }
            match fs::rename(&from, &to) {
                // Moved by the run that was interrupted in its commit.
                Err(e) if e.kind() == io::ErrorKind::NotFound && to.is_file() => {}
                outcome => outcome.map_err(Error::io(&to, "rename into place"))?,
            }
        }
        if self.durable {
            file::sync_folder(&self.destination)?;
        }
        let stage = self.stage();
        // The journal goes last: without it a stage is rubbish, with it a promise.
        let _ = fs::remove_dir_all(&files);
        fs::remove_dir_all(&stage).map_err(Error::io(&stage, "remove"))?;
        if self.durable {
            file::sync_folder(&self.destination)?;
            if let Some(parent) = self.destination.parent() {
                file::sync_folder(parent)?;
            }
        }
        Ok(())
    }

    /// Leaves what is complete for a later run to go on with.
    pub fn keep(mut self) {
        self.settled = true;
        remove_partials(&self.files());
    }

    fn stage(&self) -> PathBuf {
        self.destination.join(STAGE_FOLDER)
    }

    fn clear_files(&self) -> Result<()> {
        let stage = self.stage();
        file::remove_if_present(&stage.join("journal.json"))?;
        let files = self.files();
        match fs::remove_dir_all(&files) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(Error::io(&files, "remove")(e)),
            _ => {}
        }
        fs::create_dir_all(&files).map_err(Error::io(&files, "make"))
    }

    fn write_journal(&self) -> Result<()> {
        let path = self.stage().join("journal.json");
        let partial = self.stage().join("journal.json.partial");
        let mut out = File::create(&partial).map_err(Error::io(&partial, "create"))?;
        out.write_all(self.journal.to_string().as_bytes()).map_err(Error::io(&partial, "write"))?;
        if self.durable {
            out.sync_all().map_err(Error::io(&partial, "sync"))?;
        }
        file::rename(&partial, &path)?;
        if self.durable {
            file::sync_folder(&self.stage())?;
        }
        Ok(())
    }

    /// Removes the weight files of an earlier checkpoint: its index and `model*.safetensors` that are not made anew.
    fn remove_stale(&self, names: &[PathBuf]) -> Result<()> {
        let new: BTreeSet<&Path> = names.iter().map(PathBuf::as_path).collect();
        for name in contents(&self.destination)? {
            let weights = name.starts_with("model") && name.ends_with(".safetensors");
            if (weights || name == INDEX_FILE) && !new.contains(Path::new(&name)) {
                file::remove_if_present(&self.destination.join(&name))?;
            }
        }
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if self.settled {
            return;
        }
        // A failed run leaves nothing behind; what cannot be removed is a hidden folder that says so itself.
        let _ = fs::remove_dir_all(self.stage());
        for folder in self.made.iter().rev() {
            let _ = fs::remove_dir(folder);
        }
    }
}

/// The names in a folder; none when it does not exist. A name that is no Unicode counts as itself, replaced.
fn contents(folder: &Path) -> Result<BTreeSet<String>> {
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
fn refuse_overlap(destination: &Path, source: &Path) -> Result<()> {
    let problem = if destination == source {
        "is the source itself"
    } else if destination.starts_with(source) {
        "is inside the source folder"
    } else if source.starts_with(destination) {
        "contains the source folder"
    } else {
        return Ok(());
    };
    Err(Error::destination(
        destination,
        format!("{problem} ({}): expected a folder beside it; the source is never changed", source.display()),
    ))
}

/// Makes `folder` and those above it; gives those that were not there, the outermost first.
fn make_folders(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut missing: Vec<PathBuf> =
        folder.ancestors().take_while(|f| !f.as_os_str().is_empty() && !f.exists()).map(Path::to_path_buf).collect();
    missing.reverse();
    for (done, path) in missing.iter().enumerate() {
        match fs::create_dir(path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                for made in missing[..done].iter().rev() {
                    let _ = fs::remove_dir(made);
                }
                return Err(Error::io(path, "make the folder")(e));
            }
            _ => {}
        }
    }
    Ok(missing)
}

fn lock(path: &Path, destination: &Path) -> Result<File> {
    let lock = File::create(path).map_err(Error::io(path, "create"))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(fs::TryLockError::WouldBlock) => Err(Error::destination(
            destination,
            "is being written by another halfbyte process: wait for it, or stop it",
        )),
        // File systems without locks: two runs at once are the user's care there.
        Err(fs::TryLockError::Error(_)) => Ok(lock),
    }
}

/// The journal of an interrupted run; `None` when it stopped before it had written one.
fn read_journal(stage: &Path) -> Result<Option<Value>> {
    let path = stage.join("journal.json");
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

fn remove_partials(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() {
            remove_partials(&path);
        } else if path.extension().is_some_and(|e| e == "partial") {
            let _ = fs::remove_file(&path);
        }
    }
}
