//! One run at a time: the lock of a stage.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use super::folders::make_folders;
use crate::error::{Error, Result};

pub(super) fn in_use(destination: &Path) -> Error {
    Error::destination(destination, "is being written by another halfbyte process: wait for it, or stop it")
}

/// Takes the lock of a stage; adds to `made` what was removed meanwhile and had to be made again.
pub(super) fn lock(stage: &Path, destination: &Path, made: &mut Vec<PathBuf>) -> Result<File> {
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
pub(super) fn is_locked(stage: &Path) -> bool {
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
