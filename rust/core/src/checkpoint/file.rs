//! Positioned reads and writes, and what else is asked of the operating system.
//!
//! Weights are read with positioned reads into buffers that fit in a core's cache, not through a memory map: a map
//! counts every page it touched as resident memory, faults once per page run, and turns a source that is truncated
//! while it is read into SIGBUS instead of an error.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Fills `buffer` from byte `offset` of `file`.
pub fn read_exact_at(file: &File, path: &Path, buffer: &mut [u8], offset: u64) -> Result<()> {
    #[cfg(unix)]
    let outcome = std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset);
    #[cfg(windows)]
    let outcome = windows_exact(buffer.len(), |done| {
        std::os::windows::fs::FileExt::seek_read(file, &mut buffer[done..], offset + done as u64)
    });
    outcome.map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => Error::file(
            path,
            format!(
                "ends before byte {}: the file was cut short while it was being read",
                offset + buffer.len() as u64
            ),
        ),
        _ => Error::io(path, "read")(e),
    })
}

/// Writes all of `buffer` at byte `offset` of `file`.
pub fn write_all_at(file: &File, path: &Path, buffer: &[u8], offset: u64) -> Result<()> {
    #[cfg(unix)]
    let outcome = step().and_then(|()| std::os::unix::fs::FileExt::write_all_at(file, buffer, offset));
    #[cfg(windows)]
    let outcome = windows_exact(buffer.len(), |done| {
        std::os::windows::fs::FileExt::seek_write(file, &buffer[done..], offset + done as u64)
    });
    outcome.map_err(Error::io(path, "write"))
}

#[cfg(windows)]
fn windows_exact(len: usize, mut step: impl FnMut(usize) -> io::Result<usize>) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        match step(done)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => done += n,
        }
    }
    Ok(())
}

/// Opens a regular file for reading. Anything else (a folder, a pipe that would block) is an error.
pub fn open_regular(path: &Path) -> Result<(File, fs::Metadata)> {
    let facts = fs::metadata(path).map_err(Error::io(path, "open"))?;
    if !facts.is_file() {
        return Err(Error::file(path, "is not a regular file"));
    }
    let file = File::open(path).map_err(Error::io(path, "open"))?;
    let facts = file.metadata().map_err(Error::io(path, "open"))?;
    Ok((file, facts))
}

/// Nanoseconds since the epoch of the last modification, 0 where the system does not tell.
pub fn modified_ns(facts: &fs::Metadata) -> u64 {
    facts
        .modified()
        .ok()
        .and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok())
        .map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}

/// Makes a new file. What has this name goes first: were it a link, writing would change the file that it leads to.
pub fn create(path: &Path) -> Result<File> {
    remove_if_present(path)?;
    step().and_then(|()| File::create_new(path)).map_err(Error::io(path, "create"))
}

/// Whether both are the same existing folder or file, however they are reached: by bind mounts, say, or in another
/// spelling on a file system that does not tell cases apart. False where the system does not tell.
pub fn is_same(a: &Path, b: &Path) -> bool {
    if a == b {
        return true;
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let identity = |path: &Path| fs::metadata(path).ok().map(|f| (f.dev(), f.ino()));
        identity(a).is_some_and(|a| Some(a) == identity(b))
    }
    #[cfg(not(unix))]
    false
}

/// Sets the length of a new file and, where the file system can, reserves its blocks, so that a full disk shows now
/// and not in the middle.
pub fn reserve(file: &File, path: &Path, len: u64) -> Result<()> {
    #[cfg(target_os = "linux")]
    if len > 0 {
        use rustix::fs::{FallocateFlags, fallocate};
        use rustix::io::Errno;
        loop {
            match fallocate(file, FallocateFlags::empty(), 0, len) {
                Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => break,
                // A signal came; what it asks for is looked at elsewhere.
                Err(Errno::INTR) => {}
                Err(e) => return Err(Error::io(path, "reserve space for")(e.into())),
            }
        }
    }
    file.set_len(len).map_err(Error::io(path, "set the length of"))
}

/// Bytes that an ordinary user may still write to the file system of `folder`; `None` where the system does not tell.
pub fn free_space(folder: &Path) -> Option<u64> {
    #[cfg(unix)]
    {
        let facts = rustix::fs::statvfs(folder).ok()?;
        // Some network file systems answer with zeros.
        (facts.f_blocks > 0).then(|| facts.f_bavail.saturating_mul(facts.f_frsize))
    }
    #[cfg(not(unix))]
    {
        let _ = folder;
        None
    }
}

/// Makes the entries of `folder` durable (its renames and removals). Systems that cannot open folders need no such call.
pub fn sync_folder(folder: &Path) -> Result<()> {
    #[cfg(unix)]
    File::open(folder).and_then(|f| f.sync_all()).map_err(Error::io(folder, "sync"))?;
    #[cfg(not(unix))]
    let _ = folder;
    Ok(())
}

/// Makes a folder and those above it.
pub fn create_folders(path: &Path) -> Result<()> {
    step().and_then(|()| fs::create_dir_all(path)).map_err(Error::io(path, "make the folder"))
}

/// Renames within one file system.
pub fn rename(from: &Path, to: &Path) -> Result<()> {
    step().and_then(|()| fs::rename(from, to)).map_err(Error::io(to, "rename into place"))
}

/// Removes a folder with all that is in it; one that is not there is no failure.
pub fn remove_tree(path: &Path) -> Result<()> {
    #[cfg(test)]
    let outcome = faults::remove_tree(path);
    #[cfg(not(test))]
    let outcome = fs::remove_dir_all(path);
    match outcome {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io(path, "remove")(e)),
        _ => Ok(()),
    }
}

/// Removes an empty folder; tells nothing, for there is nothing to be done about it.
pub fn remove_folder(path: &Path) {
    let _ = step().and_then(|()| fs::remove_dir(path));
}

/// Removes a file; one that is not there is no failure.
pub fn remove_if_present(path: &Path) -> Result<()> {
    match step().and_then(|()| fs::remove_file(path)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io(path, "remove")(e)),
        _ => Ok(()),
    }
}

/// The absolute path without links, also when the last parts do not exist yet.
pub fn resolve(path: &Path) -> Result<PathBuf> {
    let absolute = std::path::absolute(path).map_err(Error::io(path, "resolve"))?;
    let mut missing = Vec::new();
    let mut existing = absolute.as_path();
    loop {
        match existing.canonicalize() {
            Ok(mut found) => {
                found.extend(missing.iter().rev());
                return Ok(found);
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound && fs::symlink_metadata(existing).is_err() => {
                match (existing.parent(), existing.file_name()) {
                    (Some(parent), Some(name)) => {
                        missing.push(name.to_owned());
                        existing = parent;
                    }
                    _ => return Err(Error::io(path, "resolve")(e)),
                }
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(Error::destination(existing, "is a link that leads nowhere: expected a folder"));
            }
            Err(e) => return Err(Error::io(existing, "resolve")(e)),
        }
    }
}

/// Stands before every change of the disk, so that tests can end a run at each of them as kill -9 would.
#[cfg(not(test))]
#[inline(always)]
fn step() -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
use faults::step;

/// Ending a run at a chosen change of the disk.
#[cfg(test)]
pub mod faults {
    use std::cell::Cell;
    use std::fs;
    use std::io;
    use std::path::Path;

    thread_local! {
        static LEFT: Cell<usize> = const { Cell::new(usize::MAX) };
    }

    /// Allows this thread so many changes; all later ones fail, those that would clean up too.
    pub fn allow(changes: usize) {
        LEFT.set(changes);
    }

    /// Whether a change has failed, or none more is allowed.
    pub fn spent() -> bool {
        LEFT.get() == 0
    }

    pub(super) fn step() -> io::Result<()> {
        match LEFT.get() {
            usize::MAX => Ok(()),
            0 => Err(io::Error::other("the test ends here")),
            left => {
                LEFT.set(left - 1);
                Ok(())
            }
        }
    }

    /// One change for each file.
    pub(super) fn remove_tree(path: &Path) -> io::Result<()> {
        if fs::symlink_metadata(path)?.is_dir() {
            for entry in fs::read_dir(path)? {
                remove_tree(&entry?.path())?;
            }
            step().and_then(|()| fs::remove_dir(path))
        } else {
            step().and_then(|()| fs::remove_file(path))
        }
    }
}
