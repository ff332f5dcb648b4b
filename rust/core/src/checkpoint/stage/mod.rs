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

mod folders;
mod lock;
mod look;
mod mode;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use self::folders::{
    JOURNAL, contents, exists, is_folder, make_folders, refuse_obstacles, refuse_overlap, remove_partials,
};
pub use self::folders::{STAGE_FOLDER, files_in};
use self::lock::lock;
use self::look::{Found, JOURNAL_VERSION, look};
pub use self::mode::Mode;
use super::file;
use super::file_names::{CONFIG_FILE, INDEX_FILE, SINGLE_FILE};
use crate::error::{Error, Result};

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
        files_in(&self.destination)
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
