//! A run as its caller sees it: how far it is, and a way to stop it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::error::{Error, Result};

/// Shared by a run and whoever watches it.
#[derive(Debug, Default)]
pub struct Progress {
    done: AtomicU64,
    total: AtomicU64,
    stop: AtomicBool,
    label: Mutex<String>,
}

impl Progress {
    /// Sets how many bytes there are to read.
    pub fn set_total(&self, bytes: u64) {
        self.total.store(bytes, Ordering::Relaxed);
    }

    /// Counts bytes that have been dealt with.
    pub fn add(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Says what is being worked on.
    pub fn set_label(&self, text: &str) {
        if let Ok(mut label) = self.label.lock() {
            text.clone_into(&mut label);
        }
    }

    /// Bytes done, bytes in all, what is being worked on.
    pub fn read(&self) -> (u64, u64, String) {
        let label = self.label.lock().map(|l| l.clone()).unwrap_or_default();
        (self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed), label)
    }

    /// Asks the run to stop at the next occasion.
    pub fn cancel(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Fails once [`Progress::cancel`] was called.
    pub fn check(&self) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) { Err(Error::Interrupted { shards: None }) } else { Ok(()) }
    }
}
