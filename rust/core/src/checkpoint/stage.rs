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
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use super::file;
use super::file_names::{CONFIG_FILE, INDEX_FILE, SINGLE_FILE};
use crate::error::{Error, Result};

/// The hidden folder inside a destination.
pub const STAGE_FOLDER: &str = ".halfbyte-partial";

/// Its file that says what is being made.
const JOURNAL: &str = "journal.json";

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
    /// The files of the output in the order in which they appear.
    names: Vec<PathBuf>,
    _lock: File,
    durable: bool,
    settled: bool,
}

impl Stage {
    /// Prepares `destination` for the files `names`, config.json last.
    ///
    /// `source` are the places that must not be written to. `identity` describes source and options: an interrupted
    /// run goes on only when it is the same. `complete` tells whether the destination holds the finished output of
    /// this plan.
    pub fn open(
        destination: &Path,
        source: &[PathBuf],
        names: Vec<PathBuf>,
        mode: Mode,
        identity: &Value,
        durable: bool,
        complete: impl Fn(&Path) -> bool,
    ) -> Result<Opened> {
        let destination = file::resolve(destination)?;
        for place in source {
            refuse_overlap(&destination, place)?;
        }
        refuse_obstacles(&destination, &names)?;
        let stage = destination.join(STAGE_FOLDER);
        // What is refused is refused before anything is made.
        let found = look(&destination, mode, identity, false, &complete)?;
        if let Found::Complete = found
            && !exists(&stage)
        {
            return Ok(Opened::Complete);
        }
        let mut made = make_folders(&stage)?;
        let lock = lock(&stage, &destination, &mut made).inspect_err(|error| {
            if matches!(error, Error::Io { .. }) && made.contains(&stage) {
                discard(&stage, &made);
            }
        })?;
        // Another process may have written, or ended, until the lock was ours.
        let found = look(&destination, mode, identity, true, &complete).inspect_err(|_| {
            if !exists(&stage.join(JOURNAL)) {
                discard(&stage, &made);
            }
        })?;
        let (journal, occupied) = match found {
            Found::Complete => {
                discard(&stage, &made);
                return Ok(Opened::Complete);
            }
            Found::Interrupted(journal) => (Some(journal), true),
            Found::Fresh { occupied } => (None, occupied),
        };
        let replace = mode == Mode::Overwrite || occupied;
        let fresh = json!({"version": JOURNAL_VERSION, "phase": "write", "replace": replace, "identity": identity});
        let go_on = journal.is_some();
        let mut this =
            Self { journal: journal.unwrap_or(fresh), destination, names, made, _lock: lock, durable, settled: go_on };
        if !go_on {
            this.clear_files()?;
            this.write_journal()?;
        } else if !this.committing() {
            this.settled = false;
            // Their room is needed again.
            remove_partials(&this.files());
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
            file::create_folders(folder)?;
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
        let mut out = file::create(&partial)?;
        out.write_all(bytes).map_err(Error::io(&partial, "write"))?;
        self.accept(name, &partial, &out)
    }

    /// Whether a complete file of this name is there.
    pub fn has(&self, name: &Path) -> bool {
        self.files().join(name).is_file()
    }

    /// Moves every file into the destination, config.json last, and ends the run. Files of an earlier checkpoint that
    /// the new one does not replace are removed.
    pub fn commit(mut self) -> Result<()> {
        // All files are complete: whatever goes wrong from here on, a resumed run only has to move them.
        self.settled = true;
        refuse_obstacles(&self.destination, &self.names)?;
        self.journal["phase"] = json!("commit");
        self.write_journal()?;
        let files = self.files();
        let config = Path::new(CONFIG_FILE);
        if self.journal["replace"] == true {
            // A half-replaced folder must not look like a model. A config.json that has moved already is the new one.
            if files.join(config).is_file() || !self.names.iter().any(|n| n == config) {
                file::remove_if_present(&self.destination.join(config))?;
            }
            self.remove_stale()?;
        }
        let mut folders = BTreeSet::from([self.destination.clone()]);
        for name in &self.names {
            let (from, to) = (files.join(name), self.destination.join(name));
            if let Some(folder) = to.parent() {
                file::create_folders(folder)?;
                let inside = folder.ancestors().take_while(|f| *f != self.destination);
                folders.extend(inside.map(Path::to_path_buf));
            }
            if name == config {
                self.sync(&folders)?;
            }
            match file::rename(&from, &to) {
                // Moved by the run that was interrupted in its commit.
                Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound && to.is_file() => {}
                outcome => outcome?,
            }
        }
        self.sync(&folders)?;
        let stage = self.stage();
        // The journal goes last: without it a stage is rubbish, with it a promise.
        file::remove_tree(&files)?;
        file::remove_if_present(&stage.join(JOURNAL))?;
        file::remove_tree(&stage)?;
        folders.extend(self.destination.parent().map(Path::to_path_buf));
        folders.extend(self.made.iter().filter_map(|f| f.parent()).map(Path::to_path_buf));
        folders.remove(&stage);
        self.sync(&folders)
    }

    fn sync(&self, folders: &BTreeSet<PathBuf>) -> Result<()> {
        if self.durable {
            folders.iter().try_for_each(|folder| file::sync_folder(folder))?;
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
        file::remove_if_present(&stage.join(JOURNAL))?;
        let files = self.files();
        file::remove_tree(&files)?;
        file::create_folders(&files)
    }

    fn write_journal(&self) -> Result<()> {
        let path = self.stage().join(JOURNAL);
        let partial = self.stage().join("journal.json.partial");
        let mut out = file::create(&partial)?;
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

    /// Removes the weight files of an earlier checkpoint that are not made anew: those that a loader would find.
    fn remove_stale(&self) -> Result<()> {
        let new: BTreeSet<&Path> = self.names.iter().map(PathBuf::as_path).collect();
        for name in contents(&self.destination)? {
            let stale = name == SINGLE_FILE || name == INDEX_FILE || is_shard(&name);
            let path = self.destination.join(&name);
            // No loader takes a folder for weights.
            if stale && !new.contains(Path::new(&name)) && !is_folder(&path) {
                file::remove_if_present(&path)?;
            }
        }
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if !self.settled {
            discard(&self.stage(), &self.made);
        }
    }
}

/// Removes what a run has made. What cannot be removed is a hidden folder that says so itself.
fn discard(stage: &Path, made: &[PathBuf]) {
    let _ = file::remove_tree(stage);
    for folder in made.iter().rev() {
        file::remove_folder(folder);
    }
}

/// Is it `model-00001-of-00002.safetensors` or its like?
fn is_shard(name: &str) -> bool {
    let number = |text: &str| text.len() >= 5 && text.bytes().all(|b| b.is_ascii_digit());
    name.strip_prefix("model-")
        .and_then(|rest| rest.strip_suffix(".safetensors"))
        .and_then(|numbers| numbers.split_once("-of-"))
        .is_some_and(|(part, count)| number(part) && number(count))
}

/// What a destination holds.
enum Found {
    /// The finished output.
    Complete,
    /// A run to go on with: its journal.
    Interrupted(Value),
    /// Nothing that is to be kept until the commit but, perhaps, files to replace.
    Fresh { occupied: bool },
}

/// Looks whether `mode` suits what is in `destination`; `holding` is whether its lock is ours.
fn look(
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

fn in_use(destination: &Path) -> Error {
    Error::destination(destination, "is being written by another halfbyte process: wait for it, or stop it")
}

fn exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// Whether it is a folder itself, not a link to one.
fn is_folder(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|facts| facts.is_dir())
}

/// Fails where a file of the output cannot take its place: better now than in the middle of the commit. Links to
/// folders are not followed, so that nothing is written outside the destination.
fn refuse_obstacles(destination: &Path, names: &[PathBuf]) -> Result<()> {
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
fn refuse_overlap(destination: &Path, place: &Path) -> Result<()> {
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
fn make_folders(folder: &Path) -> Result<Vec<PathBuf>> {
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

/// Takes the lock of a stage; adds to `made` what was removed meanwhile and had to be made again.
fn lock(stage: &Path, destination: &Path, made: &mut Vec<PathBuf>) -> Result<File> {
    let path = stage.join("lock");
    // Who only looks whether there is a lock holds it for a moment.
    for wait in [0, 5, 20, 50] {
        thread::sleep(Duration::from_millis(wait));
        let lock = match open_lock(&path, true) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                made.extend(make_folders(stage)?);
                continue;
            }
            outcome => outcome.map_err(Error::io(&path, "create"))?,
        };
        match lock.try_lock() {
            Ok(()) if is_still(&lock, &path) => return Ok(lock),
            // It was removed, with its stage, by the process that held it.
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {}
            // File systems without locks: two runs at once are the user's care there.
            Err(fs::TryLockError::Error(_)) => return Ok(lock),
        }
    }
    Err(in_use(destination))
}

/// Whether another process holds the lock of a stage.
fn is_locked(stage: &Path) -> bool {
    open_lock(&stage.join("lock"), false).is_ok_and(|f| matches!(f.try_lock(), Err(fs::TryLockError::WouldBlock)))
}

/// Opens a lock file as it is; a link is not followed.
fn open_lock(path: &Path, create: bool) -> io::Result<File> {
    let mut options = fs::OpenOptions::new();
    options.read(true).write(true).create(create);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, rustix::fs::OFlags::NOFOLLOW.bits().cast_signed());
    options.open(path)
}

fn is_still(file: &File, path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let identity = |facts: fs::Metadata| (facts.dev(), facts.ino());
        let there = fs::symlink_metadata(path).map(identity);
        there.is_ok_and(|there| file.metadata().map(identity).is_ok_and(|ours| ours == there))
    }
    #[cfg(not(unix))]
    {
        let _ = file;
        path.exists()
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

fn remove_partials(folder: &Path) {
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
