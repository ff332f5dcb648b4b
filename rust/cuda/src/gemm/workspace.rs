//! Memory in which blocks of a launch leave their sums for others (kernels/gemm/tile_sm90a/ranges.cuh, tile.cuh and
//! kernels/experts/tile_sm90a/shared_tiles.cuh). It may hold anything before.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// What `Workspace` is to the kernels: addresses, and the number that a signal has once sums are there.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Workspace {
    sums: u64,
    signals: u64,
    token: u64,
}

impl Workspace {
    /// For one launch: so many bytes of sums at `address`, and the signals behind them.
    pub(crate) fn new(address: u64, sums: usize) -> Self {
        Self { sums: address, signals: address + sums as u64, token: token() }
    }
}

/// The bytes of a workspace.
pub(crate) fn bytes(sums: usize, signals: usize) -> usize {
    sums + signals * size_of::<u64>()
}

/// A number that no launch of this process had, and that memory does not hold by chance.
fn token() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    static SEED: LazyLock<u64> = LazyLock::new(|| RandomState::new().hash_one(std::process::id()));
    // Even steps from an odd number: all different for 2^63 launches, and none 0.
    let count = NEXT.fetch_add(1, Ordering::Relaxed);
    (*SEED | 1).wrapping_add(count.wrapping_mul(2 * 0x4f1b_bcdc_bfa5_3e0b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_differ() {
        let tokens: Vec<u64> = (0..1000).map(|_| token()).collect();
        assert!(tokens.iter().all(|&token| token != 0));
        let mut distinct = tokens.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), tokens.len());
    }

    #[test]
    fn signals_lie_behind_the_sums() {
        let workspace = Workspace::new(4096, 512);
        assert_eq!((workspace.sums, workspace.signals), (4096, 4608));
        assert_eq!(bytes(512, 3), 536);
    }
}
