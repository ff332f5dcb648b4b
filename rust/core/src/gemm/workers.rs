//! The threads that share one product.

use std::any::Any;
use std::ffi::{c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use rayon::ThreadPool;

/// `GOMP_parallel` of OpenMP's runtime: calls `work(data)` on the calling thread and on up to `threads - 1` others, and
/// returns when all have.
pub type Parallel =
    unsafe extern "C" fn(work: unsafe extern "C" fn(*mut c_void), data: *mut c_void, threads: c_uint, flags: c_uint);

/// Where other threads come from.
#[derive(Debug, Clone, Copy)]
enum Source<'a> {
    Nowhere,
    Pool(&'a ThreadPool),
    OpenMp(Parallel),
}

/// How many threads work on a product, and whose they are.
#[derive(Debug, Clone, Copy)]
pub struct Workers<'a> {
    source: Source<'a>,
    threads: usize,
}

impl<'a> Workers<'a> {
    /// The calling thread alone.
    pub const fn serial() -> Self {
        Self { source: Source::Nowhere, threads: 1 }
    }

    /// The calling thread and up to `threads - 1` of `pool`.
    pub fn new(pool: &'a ThreadPool, threads: usize) -> Self {
        let threads = threads.clamp(1, pool.current_num_threads().max(1));
        Self { source: Source::Pool(pool), threads }
    }

    /// The calling thread and up to `threads - 1` of an OpenMP runtime: the one that the rest of the program computes
    /// with. Its threads stay awake for a while after their work, so they begin at once; and a pool of other threads
    /// would have to share the processors with them.
    ///
    /// # Safety
    /// `parallel` does what [`Parallel`] says.
    pub unsafe fn open_mp(parallel: Parallel, threads: usize) -> Self {
        Self { source: Source::OpenMp(parallel), threads: threads.clamp(1, c_uint::MAX as usize) }
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
    /// Every thread has a range of consecutive numbers, and goes on with those of others when it has done its own: a
    /// thread that is late or slow does fewer. The calling thread begins at once, the others join as they wake up.
    /// `work` must not depend on who does it.
    pub(super) fn for_each(&self, tasks: usize, work: impl Fn(usize) + Sync) {
        let threads = self.threads.min(tasks);
        if threads <= 1 {
            return (0..tasks).for_each(work);
        }
        // Only the numbers matter: what the tasks read is there before, what they write is read after.
        let next: Vec<OwnLine> = (0..threads).map(|i| OwnLine(AtomicUsize::new(i * tasks / threads))).collect();
        let arrived = AtomicUsize::new(0);
        let take = || {
            let own = arrived.fetch_add(1, Ordering::Relaxed);
            for range in (own..own + threads).map(|i| i % threads) {
                let end = (range + 1) * tasks / threads;
                loop {
                    let task = next[range].0.fetch_add(1, Ordering::Relaxed);
                    if task >= end {
                        break;
                    }
                    work(task);
                }
            }
        };
        match self.source {
            Source::Pool(pool) => pool.in_place_scope(|scope| {
                for _ in 1..threads {
                    scope.spawn(|_| take());
                }
                take();
            }),
            Source::OpenMp(parallel) => run_team(parallel, threads, &take),
            Source::Nowhere => take(),
        }
    }
}

/// A counter that does not share its cache line.
#[repr(align(128))]
struct OwnLine(AtomicUsize);

/// Calls `work` on every thread of a team.
fn run_team(parallel: Parallel, threads: usize, work: &(dyn Fn() + Sync)) {
    struct Team<'a> {
        work: &'a (dyn Fn() + Sync),
        panic: Mutex<Option<Box<dyn Any + Send>>>,
    }

    /// A panic must not get into the runtime's own frames.
    unsafe extern "C" fn member(team: *mut c_void) {
        // SAFETY: `parallel` passes what it was given, which lives until it returns and is only shared.
        let team = unsafe { &*team.cast::<Team<'_>>() };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(team.work)) {
            *team.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
    }

    let team = Team { work, panic: Mutex::new(None) };
    // SAFETY: `open_mp`'s caller vouches for `parallel`; a `Team` may be shared by threads.
    unsafe { parallel(member, (&raw const team).cast_mut().cast(), threads as c_uint, 0) }
    if let Some(panic) = team.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
        resume_unwind(panic);
    }
}
