//! A few threads that take numbered pieces of work in order.
//!
//! Pieces are handed out in ascending order, so that the tensors in flight (and the memory that they need) stay few
//! whatever the length of the list; results never depend on which thread did what.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use super::job::Progress;
use crate::error::{Error, Result};

/// Bytes of dense weights in one piece: half of a 1 MiB second-level cache, a multiple of every block size.
pub const PIECE_BYTES: usize = 512 << 10;

/// Runs `work(local, piece)` for every piece in `0..count` on `threads` threads, each with its own `local`. The first
/// failure stops all; of several at once the one of the earliest piece is reported.
pub fn run<L>(
    threads: usize,
    count: usize,
    progress: &Progress,
    local: impl Fn() -> L + Sync,
    work: impl Fn(&mut L, usize) -> Result<()> + Sync,
) -> Result<()> {
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let failure: Mutex<Option<(usize, Error)>> = Mutex::new(None);
    let body = || {
        let mut state = local();
        while !failed.load(Ordering::Relaxed) {
            let piece = next.fetch_add(1, Ordering::Relaxed);
            if piece >= count {
                return;
            }
            if let Err(error) = progress.check().and_then(|()| work(&mut state, piece)) {
                failed.store(true, Ordering::Relaxed);
                let mut slot = failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                if slot.as_ref().is_none_or(|(earlier, _)| piece < *earlier) {
                    *slot = Some((piece, error));
                }
                return;
            }
        }
    };
    thread::scope(|scope| {
        // The calling thread is one of them.
        for _ in 1..threads.clamp(1, count.max(1)) {
            // Where the system gives no more threads, those that there are do the work.
            if thread::Builder::new().spawn_scoped(scope, body).is_err() {
                break;
            }
        }
        body();
    });
    match failure.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        Some((_, error)) => Err(error),
        None => Ok(()),
    }
}
