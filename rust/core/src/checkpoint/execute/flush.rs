//! Writing to disk while there is still work to do.
//!
//! A file that must be durable before it counts is synced at its end. The system would begin to write then, with
//! nothing left to overlap: so a thread of its own syncs what is there each time enough has come together.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread;

/// Bytes between two syncs: a tenth of a second of a fast disk, so that few are outstanding at the end.
const STEP: u64 = 64 << 20;

/// Counts what is written and wakes the thread that syncs.
pub struct Flusher {
    written: AtomicU64,
    wake: Option<Sender<()>>,
}

impl Flusher {
    /// One that does nothing.
    pub fn idle() -> Self {
        Self { written: AtomicU64::new(0), wake: None }
    }

    /// Runs `body` with a flusher for `file` beside it; gives the result of `body`, and the first failure of a sync,
    /// which the system tells only once.
    pub fn scope<T>(file: &File, body: impl FnOnce(&Self) -> T) -> (T, io::Result<()>) {
        let (wake, woken) = channel();
        let flusher = Self { written: AtomicU64::new(0), wake: Some(wake) };
        thread::scope(|scope| {
            // Where the system gives no more threads, the one sync at the end has to do.
            let Ok(syncing) = thread::Builder::new().spawn_scoped(scope, move || sync_when_woken(file, &woken)) else {
                return (body(&Self::idle()), Ok(()));
            };
            let value = body(&flusher);
            // Hangs up; the thread ends after the sync that it is in.
            drop(flusher);
            (value, syncing.join().unwrap_or_else(|_| Err(io::Error::other("the syncing thread panicked"))))
        })
    }

    /// Counts bytes that were written.
    pub fn add(&self, bytes: u64) {
        let Some(wake) = &self.wake else { return };
        let before = self.written.fetch_add(bytes, Ordering::Relaxed);
        if before / STEP != (before + bytes) / STEP {
            // It has hung up only when it failed, which it tells at the end.
            let _ = wake.send(());
        }
    }
}

fn sync_when_woken(file: &File, woken: &Receiver<()>) -> io::Result<()> {
    while woken.recv().is_ok() {
        // One sync serves all calls that came during the last one; none is begun after the end.
        loop {
            match woken.try_recv() {
                Ok(()) => {}
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return Ok(()),
            }
        }
        file.sync_data()?;
    }
    Ok(())
}
