//! Products of 8-bit codes for few rows of x (kernels/int8/int8_product.cuh): how they divide the work.

use halfbyte::error::Result;

use super::operands::{Epilogue, Operands};
use crate::driver::{Device, Stream};
use crate::kernels::{self, Kernel, int8_product as source};
use crate::launch::parameters;

/// Rows of x that one launch takes at most; more take several.
pub(super) const MOST_ROWS: usize = 64;
/// Rows up to which these kernels are the fastest where that for more rows takes them too.
const BEST_ROWS: usize = 16;
/// Twice as many are, where W has fewer rows: that other has few tiles then. Measured on an H200.
const NARROW: usize = 8192;

/// What codes, weight and their rows begin at multiples of.
const ALIGNMENT: u64 = source::PIECE as u64;
/// Sums of a tile for eight columns, in bytes.
const SUMS: usize = source::SUMS * size_of::<i32>();
/// Of a stage of all warps.
const STAGE: usize = source::WARPS * source::STAGE_BYTES;
/// More than this on the way to a multiprocessor is not faster.
const STAGES: usize = 4;
/// The part of shared memory that sums may take: what is left is for stages.
const SUMS_PART: usize = 3;
/// Columns with outliers that have room, 1 % of 12800, and the part of shared memory for their x.
const KEPT: usize = 128;
const KEPT_PART: usize = 8;
/// Those that a warp looks at together.
const KEPT_UNIT: usize = 32;
/// Bytes of W that a block of threads has fetched while the kernel before still runs, at most, and the part of its rows.
const AHEAD: usize = 128 << 10;
const AHEAD_PART: usize = 4;

/// What `ProductPlan` is to the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan {
    rows: i32,
    log2_slots: i32,
    chunks: i32,
    stages: i32,
    kept: i32,
    ahead: i32,
}

/// A launch for so many rows of x, and as many again.
#[derive(Debug, Clone, Copy)]
pub(super) struct Few {
    pub kernel: &'static Kernel,
    plan: Plan,
    blocks: u64,
    shared: u32,
}

/// Of eight columns each, of the kernel for `m` rows of x: 1, 2, 4 or 8.
fn fragments_of(m: usize) -> usize {
    m.div_ceil(source::COLUMNS).next_power_of_two()
}

/// How the work is divided, or `None` when shared memory has no room: the plan, the blocks of threads, and the shared memory
/// of each.
fn divide(
    (m, n, k): (usize, usize, usize),
    multiprocessors: usize,
    shared_per_block: usize,
    outliers: bool,
) -> Option<(Plan, u64, u32)> {
    let fragments = fragments_of(m);
    // As few slots as leave no more chunks than the most do.
    let mut slots = source::WARPS;
    while slots > 1 && k <= slots / 2 * source::SLOT {
        slots /= 2;
    }
    // Of each column that is kept: its number, and x.
    let of_kept = size_of::<i32>() + fragments * source::COLUMNS * size_of::<f32>();
    let most = KEPT.min(shared_per_block / KEPT_PART / of_kept / KEPT_UNIT * KEPT_UNIT);
    let kept = if outliers { most.min(k.next_multiple_of(KEPT_UNIT)) } else { 0 };
    let fixed = kept * of_kept;
    let of_tile = fragments * SUMS + kept * source::ROWS;
    // Several waves of blocks where sums would leave too little room for stages; more slots, some of them with nothing, where
    // not even a tile for each group has room.
    let room = (shared_per_block / SUMS_PART).min(shared_per_block.checked_sub(STAGE + fixed)?);
    while slots < source::WARPS && source::WARPS / slots * of_tile > room {
        slots *= 2;
    }
    let unit = source::ROWS * (source::WARPS / slots);
    let of_tiles = |rows: usize| rows.div_ceil(unit) * unit / source::ROWS * of_tile;
    let mut rows = n.div_ceil(multiprocessors);
    let mut waves = 1;
    while of_tiles(rows) > room {
        if rows <= unit {
            return None;
        }
        waves += 1;
        rows = n.div_ceil(multiprocessors * waves);
    }
    let stages = ((shared_per_block - fixed - of_tiles(rows)) / STAGE).min(STAGES);
    let plan = Plan {
        rows: i32::try_from(rows).ok()?,
        log2_slots: slots.ilog2() as i32,
        chunks: i32::try_from(k.div_ceil(slots * source::SLOT)).ok()?,
        stages: stages as i32,
        kept: kept as i32,
        ahead: ((rows * k / AHEAD_PART).min(AHEAD) / k) as i32,
    };
    let shared = of_tiles(rows) + fixed + stages * STAGE;
    Some((plan, n.div_ceil(rows) as u64, u32::try_from(shared).ok()?))
}

impl Few {
    /// Whether these kernels are the fastest for `m` rows of `x` and `n` of `W`, where that for more rows takes them too.
    pub(super) fn is_best(m: usize, n: usize) -> bool {
        m <= if n < NARROW { 2 * BEST_ROWS } else { BEST_ROWS }
    }

    /// The launch of a product, or of its first rows, or `None` when the kernels do not take it on this device.
    pub(super) fn new(device: &Device, operands: &Operands, outliers: bool) -> Option<Self> {
        let &Operands { a, pitch, b, m, n, k } = operands;
        let suits = m >= 1
            && n >= 1
            && k >= source::PIECE
            && (k as u64).is_multiple_of(ALIGNMENT)
            && (pitch as u64).is_multiple_of(ALIGNMENT)
            && a.is_multiple_of(ALIGNMENT)
            && b.is_multiple_of(ALIGNMENT)
            && i32::try_from(n).is_ok()
            && i32::try_from(k).is_ok();
        if !suits {
            return None;
        }
        let at_once = m.min(MOST_ROWS);
        let kernel = match fragments_of(at_once) {
            1 => &kernels::INT8_PRODUCT_8,
            2 => &kernels::INT8_PRODUCT_16,
            4 => &kernels::INT8_PRODUCT_32,
            _ => &kernels::INT8_PRODUCT_64,
        };
        let (multiprocessors, shared) = (device.multiprocessors() as usize, device.shared_per_block() as usize);
        let (plan, blocks, shared) = divide((at_once, n, k), multiprocessors, shared, outliers)?;
        Some(Self { kernel, plan, blocks, shared })
    }

    /// # Safety
    /// As [`super::scaled`].
    pub(super) unsafe fn launch(
        &self,
        device: &Device,
        stream: Stream,
        operands: &Operands,
        epilogue: &Epilogue,
    ) -> Result<()> {
        let &Operands { pitch, b, n, k, .. } = operands;
        let item = if epilogue.kind < 2 { 2 } else { 4 };
        for begin in (0..operands.m).step_by(MOST_ROWS) {
            // What suits some rows suits fewer.
            let m = MOST_ROWS.min(operands.m - begin) as i32;
            let a = operands.a + (begin * pitch) as u64;
            let mut epilogue = *epilogue;
            epilogue.y += (begin * n * item) as u64;
            if epilogue.row_scales != 0 {
                epilogue.row_scales += (begin * size_of::<f32>()) as u64;
            }
            if epilogue.x != 0 {
                epilogue.x += (begin * k * item) as u64;
            }
            let (pitch, n, k, plan) = (pitch as i64, n as i32, k as i32, self.plan);
            let parameters = parameters![a, pitch, b, epilogue, m, n, k, plan];
            // SAFETY: the kernel's parameters in its order; alignment was checked, it waits before it touches memory, the
            // rest is the caller's.
            unsafe { device.launch_early(stream, self.kernel, self.blocks, self.shared, parameters) }?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_has_a_warp_and_every_column_a_slot() {
        // T4, A100, RTX 3090, H100.
        for (multiprocessors, memory) in [(40, 65_536), (108, 166_912), (82, 101_376), (132, 232_448)] {
            for m in [1, 8, 9, 16, 17, 33, 64] {
                for n in [1, 7, 100, 4096, 14_336, 28_672, 128_256, 262_144] {
                    for k in [16, 64, 320, 4096, 28_672, 133_136] {
                        check((m, n, k), multiprocessors, memory, (m + n) % 2 == 0);
                    }
                }
            }
        }
    }

    fn check((m, n, k): (usize, usize, usize), multiprocessors: usize, memory: usize, outliers: bool) {
        let (plan, blocks, shared) = divide((m, n, k), multiprocessors, memory, outliers).unwrap();
        let (rows, slots) = (plan.rows as usize, 1usize << plan.log2_slots);
        let words = format!("{m} {n} {k} {plan:?}");
        assert!(blocks as usize * rows >= n && (blocks as usize - 1) * rows < n, "{words}");
        assert!(plan.chunks as usize * slots * source::SLOT >= k, "{words}");
        assert!((plan.chunks as usize - 1) * slots * source::SLOT < k, "{words}");
        assert!(slots <= source::WARPS && (1..=source::MOST_STAGES).contains(&(plan.stages as usize)), "{words}");
        assert!((0..=plan.rows).contains(&plan.ahead) && plan.ahead as usize * k <= AHEAD, "{words}");
        let kept = plan.kept as usize;
        assert!(kept.is_multiple_of(KEPT_UNIT) && (outliers || kept == 0), "{words}");
        assert!(!outliers || kept > 0 || memory < 100_000, "{words}");
        // As the kernel lays it out.
        let groups = source::WARPS / slots;
        let tiles = rows.div_ceil(groups * source::ROWS) * groups;
        let of_tiles = tiles * (fragments_of(m) * SUMS + kept * source::ROWS);
        let of_kept = kept * (4 + fragments_of(m) * source::COLUMNS * 4);
        assert_eq!(shared as usize, of_tiles + of_kept + plan.stages as usize * STAGE, "{words}");
        assert!(shared as usize <= memory, "{words}");
    }

    #[test]
    fn a_device_of_too_little_memory_has_no_such_product() {
        assert_eq!(divide((8, 4096, 4096), 40, STAGE, false), None);
    }
}
