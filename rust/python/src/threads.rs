//! The threads that calls from Python work on.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use halfbyte::error::{Error, Result};
use rayon::{ThreadPool, ThreadPoolBuilder};

/// More threads than any machine this runs on has use for.
const MAX_THREADS: usize = 4096;

/// A pool, and the process that its threads run in: a forked child has none of them.
struct Pool {
    process: u32,
    pool: Arc<ThreadPool>,
}

static POOL: Mutex<Option<Pool>> = Mutex::new(None);

/// Replaces the pool by one of `threads` threads. Work under way ends on the old one.
///
/// # Errors
/// [`Error::Argument`] when `threads` is 0, beyond 4096, or more than the system gives.
pub fn set_threads(threads: usize) -> Result<()> {
    if !(1..=MAX_THREADS).contains(&threads) {
        return Err(Error::argument("threads", threads, format!("from 1 to {MAX_THREADS}")));
    }
    let pool = build(threads)?;
    replace(&mut POOL.lock().unwrap_or_else(PoisonError::into_inner), pool);
    Ok(())
}

/// Has the pool as many threads as torch uses, which are `threads`. A number that others gave with [`set_threads`] stays
/// until torch's own changes.
///
/// # Errors
/// As [`set_threads`].
pub fn follow(threads: usize) -> Result<()> {
    static FOLLOWED: AtomicUsize = AtomicUsize::new(0);
    if FOLLOWED.load(Ordering::Relaxed) != threads {
        set_threads(threads)?;
        FOLLOWED.store(threads, Ordering::Relaxed);
    }
    Ok(())
}

/// The pool. The first call makes one of `RAYON_NUM_THREADS` threads, or of as many as the machine runs at once.
///
/// # Errors
/// [`Error::Argument`] when the system does not give that many.
pub fn pool() -> Result<Arc<ThreadPool>> {
    let mut guard = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    let threads = match guard.as_ref() {
        Some(Pool { process, pool }) if *process == std::process::id() => return Ok(pool.clone()),
        Some(Pool { pool, .. }) => pool.current_num_threads(),
        None => 0, // rayon's default
    };
    let pool = build(threads)?;
    replace(&mut guard, pool.clone());
    Ok(pool)
}

fn build(threads: usize) -> Result<Arc<ThreadPool>> {
    ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("halfbyte-{i}"))
        .build()
        .map(Arc::new)
        .map_err(|error| Error::argument("threads", threads, format!("no more than the system gives ({error})")))
}

fn replace(guard: &mut Option<Pool>, pool: Arc<ThreadPool>) {
    let process = std::process::id();
    if let Some(old) = guard.replace(Pool { process, pool })
        && old.process != process
    {
        // Its threads stayed in the parent: there is nobody to tell that it ends.
        std::mem::forget(old.pool);
    }
}
