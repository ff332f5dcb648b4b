//! The threads that share one product.

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::ThreadPool;

/// How many threads work on a product, and whose they are.
#[derive(Debug, Clone, Copy)]
pub struct Workers<'a> {
    pool: Option<&'a ThreadPool>,
    threads: usize,
}

impl<'a> Workers<'a> {
    /// The calling thread alone.
    pub const fn serial() -> Self {
        Self { pool: None, threads: 1 }
    }

    /// The calling thread and up to `threads - 1` of `pool`.
    pub fn new(pool: &'a ThreadPool, threads: usize) -> Self {
        let threads = threads.clamp(1, pool.current_num_threads().max(1));
        Self { pool: Some(pool), threads }
    }

    /// The number of threads.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// The calling thread alone, if `work` is no more than `serial`.
    pub(super) fn for_work(self, work: usize, serial: usize) -> Self {
        if work <= serial { Self::serial() } else { self }
    }

    /// Calls `work` once for every number below `tasks`.
    ///
    /// The calling thread begins at once and the others join as they wake up, each taking the next number: a thread
    /// that is late or slow takes fewer. `work` must not depend on who does it.
    pub(super) fn for_each(&self, tasks: usize, work: impl Fn(usize) + Sync) {
        let next = AtomicUsize::new(0);
        let take = || {
            loop {
                // Only the numbers matter: what the tasks read is there before, what they write is read after.
                let task = next.fetch_add(1, Ordering::Relaxed);
                if task >= tasks {
                    break;
                }
                work(task);
            }
        };
        match self.pool {
            Some(pool) if self.threads > 1 && tasks > 1 => pool.in_place_scope(|scope| {
                for _ in 1..self.threads.min(tasks) {
                    scope.spawn(|_| take());
                }
                take();
            }),
            _ => take(),
        }
    }
}
