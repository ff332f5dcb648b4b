//! Fused products with a 4-bit weight (kernels/decode.cuh): which kernel takes which shape, and how it divides the work.

use halfbyte::dtype::DType;

use super::driver::Device;
use super::kernels::{self, Kernel, decode, decode_ring_long as ring};

pub(super) const DECODE_BLOCK: usize = decode::BLOCK;
const DECODE_ROWS: usize = decode::ROWS;
const DECODE_COLUMNS: usize = decode::COLUMNS;
const DECODE_FRAGMENTS: usize = 2;
const DECODE_WARPS: usize = decode::SIZES_1_WARPS;
const DECODE_CHUNK: usize = decode::SIZES_1_CHUNK;
const DECODE_TABLE: usize = decode::LANE_TABLE_BYTES;
const DECODE_MAP: usize = decode::MAP_BYTES;
/// Partial sums of one column of a tile.
const DECODE_COLUMN: usize = DECODE_ROWS * size_of::<f32>();
const RING_WARPS: usize = ring::RING_WARPS;
const RING_FRAGMENTS: usize = 4;
/// Sums of eight columns of a warp for a step.
const RING_SUMS: usize = ring::SUMS * size_of::<f32>();
const RING_BARRIER: usize = 8;
/// What is on the way, of all warps.
const RING_AHEAD: usize = 64 * 1024;
/// Shared memory of the kernel that takes most: a device has all of them, or none.
const RING_SHARED: usize = 2 * DECODE_TABLE + RING_AHEAD + 32 * 1024;
/// Shared memory that the device keeps for itself, before the block's: the table of `decode_ring` begins at a multiple of
/// its size, whether or not there is such a part.
const RESERVED_SHARED: usize = 1024;

/// What `DecodePlan` is to `decode`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Plan {
    rows: i32,
    slots: i32,
    per_pass: i32,
}

/// What `RingPlan` is to `decode_ring`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RingPlan {
    rows: i32,
    log2_slots: i32,
    chunks: i32,
    per_pass: i32,
    log2_sharing: i32,
    ahead: i32,
}

/// What goes with a [`RingPlan`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct RingLaunch {
    plan: RingPlan,
    /// Whether it is one for several rounds.
    long: bool,
    blocks: u64,
    shared: u32,
}

/// The last parameter of a kernel.
#[derive(Debug, Clone, Copy)]
pub(super) enum AnyPlan {
    Registers(Plan),
    Ring(RingPlan),
}

/// A launch of a fused product.
#[derive(Debug, Clone, Copy)]
pub(super) struct Decode {
    pub kernel: &'static Kernel,
    pub plan: AnyPlan,
    pub blocks: u64,
    pub shared: u32,
}

/// Of 8 columns each, of the kernel for `m` rows of x: 1, 2 or 4.
fn fragments_of(m: usize) -> usize {
    m.div_ceil(DECODE_COLUMNS).next_power_of_two()
}

/// As many parts of K, a power of two, as leave each warp most of a chunk.
fn parts_of_k(k: usize, warps: usize, chunk: usize) -> usize {
    let mut slots = warps;
    while slots > 1 && k / DECODE_BLOCK < slots * chunk * 3 / 4 {
        slots /= 2;
    }
    slots
}

/// How the work is divided, or `None` when shared memory has no room for one tile: the plan, the blocks of threads, and the
/// shared memory of each.
fn decode_plan(
    (m, n, k): (usize, usize, usize),
    multiprocessors: usize,
    shared_per_block: usize,
) -> Option<(Plan, u64, u32)> {
    let fragments = fragments_of(m);
    let slots = parts_of_k(k, DECODE_WARPS / fragments, DECODE_CHUNK * fragments);
    let rows = n.div_ceil(multiprocessors);
    let tiles = rows.div_ceil(DECODE_ROWS);
    let partial = slots * m * DECODE_COLUMN;
    let room = shared_per_block.checked_sub(DECODE_TABLE + DECODE_MAP)? / partial;
    if room == 0 {
        return None;
    }
    // Passes of equal length.
    let per_pass = tiles.div_ceil(tiles.div_ceil(room));
    let plan = Plan {
        rows: i32::try_from(rows).ok()?,
        slots: i32::try_from(slots).ok()?,
        per_pass: i32::try_from(per_pass).ok()?,
    };
    let shared = DECODE_TABLE + DECODE_MAP + per_pass * partial;
    Some((plan, n.div_ceil(rows) as u64, u32::try_from(shared).ok()?))
}

/// The same for `decode_ring`.
fn ring_plan(
    (m, n, k): (usize, usize, usize),
    nested: bool,
    multiprocessors: usize,
    shared_per_block: usize,
) -> Option<RingLaunch> {
    if shared_per_block < RING_SHARED {
        return None;
    }
    let fragments = fragments_of(m);
    // Blocks of a slot, and chunks of a round.
    let (slot, round) = match fragments {
        1 => (ring::RING_1_1_SLOT, ring::RING_1_1_ROUND),
        2 => (ring::RING_2_1_SLOT, ring::RING_2_1_ROUND),
        _ => (ring::RING_4_1_SLOT, ring::RING_4_1_ROUND),
    };
    let values = slot * DECODE_BLOCK;
    // As few slots as leave no more chunks than the most do.
    let mut slots = RING_WARPS;
    while slots > 1 && k <= slots / 2 * values {
        slots /= 2;
    }
    let chunks = k.div_ceil(slots * values);
    let long = chunks > round || fragments > DECODE_FRAGMENTS;
    // With several rounds there is one stage more. What is before the table fits in front of the first place for it,
    // whichever that is.
    let stage = RING_WARPS * DECODE_ROWS * values / 2;
    let shared = 2 * DECODE_TABLE + RING_AHEAD + if long { stage } else { 0 };
    let room = DECODE_TABLE - RESERVED_SHARED - DECODE_MAP;
    let steps_of = |rows: usize| rows.div_ceil(DECODE_ROWS * (RING_WARPS / slots));
    let step_sums = RING_WARPS * fragments * RING_SUMS;
    let mut rows = n.div_ceil(multiprocessors);
    // Whole tiles where that leaves few multiprocessors without work: fewer of them fetch x.
    let tiled = rows.next_multiple_of(DECODE_ROWS * (RING_WARPS / slots));
    if n.div_ceil(tiled) * 16 >= n.div_ceil(rows) * 15 {
        rows = tiled;
    }
    let mut sharing = 1;
    let per_pass = if long {
        // The sums of all steps have to fit: warps share places, then more blocks have fewer rows each.
        while steps_of(rows) * (RING_WARPS * RING_BARRIER + step_sums / sharing) > room {
            if sharing < slots {
                sharing *= 2;
            } else {
                rows = rows.div_ceil(2);
            }
        }
        steps_of(rows)
    } else {
        // Passes of equal length.
        let steps = steps_of(rows);
        steps.div_ceil(steps.div_ceil(room / step_sums))
    };
    // More would hold up x; measured on an H100, as were the parts.
    let (part, most) = if nested { (7, 64 << 10) } else { (5, 96 << 10) };
    let plan = RingPlan {
        rows: i32::try_from(rows).ok()?,
        log2_slots: slots.ilog2() as i32,
        chunks: i32::try_from(chunks).ok()?,
        per_pass: i32::try_from(per_pass).ok()?,
        log2_sharing: sharing.ilog2() as i32,
        ahead: ((rows * (k / 2) / part).min(most) / (k / 2)) as i32,
    };
    Some(RingLaunch { plan, long, blocks: n.div_ceil(rows) as u64, shared: u32::try_from(shared).ok()? })
}

impl Decode {
    /// Rows of `x` that one launch takes at most: with `ring`, that of decode_ring.cuh.
    pub(super) const fn rows_at_once(ring: bool) -> usize {
        DECODE_COLUMNS * if ring { RING_FRAGMENTS } else { DECODE_FRAGMENTS }
    }

    /// The launch for a product of this shape, or `None` when the kernels do not take it on this device.
    pub(super) fn new(
        device: &Device,
        ring: bool,
        dtype: DType,
        nested: bool,
        (m, n, k): (usize, usize, usize),
    ) -> Option<Self> {
        let smallest = if ring { &kernels::DECODE_RING_BF16_8 } else { &kernels::DECODE_BF16_8 };
        let suits = smallest.suits(device.capability())
            && (1..=Self::rows_at_once(ring)).contains(&m)
            && n >= 1
            && i32::try_from(n).is_ok()
            && k >= DECODE_BLOCK
            && k.is_multiple_of(DECODE_BLOCK)
            && i32::try_from(k).is_ok();
        if !suits {
            return None;
        }
        let columns = DECODE_COLUMNS * fragments_of(m);
        let (multiprocessors, shared_per_block) =
            (device.multiprocessors() as usize, device.shared_per_block() as usize);
        if ring {
            let RingLaunch { plan, long, blocks, shared } =
                ring_plan((m, n, k), nested, multiprocessors, shared_per_block)?;
            let kernel = if long {
                match (dtype, columns, nested) {
                    (DType::Bf16, 8, false) => &kernels::DECODE_RING_LONG_BF16_8,
                    (DType::Bf16, 8, true) => &kernels::DECODE_RING_LONG_BF16_8_NESTED,
                    (DType::Bf16, 16, false) => &kernels::DECODE_RING_LONG_BF16_16,
                    (DType::Bf16, 16, true) => &kernels::DECODE_RING_LONG_BF16_16_NESTED,
                    (DType::Bf16, 32, false) => &kernels::DECODE_RING_LONG_BF16_32,
                    (DType::Bf16, 32, true) => &kernels::DECODE_RING_LONG_BF16_32_NESTED,
                    (DType::F16, 8, false) => &kernels::DECODE_RING_LONG_F16_8,
                    (DType::F16, 8, true) => &kernels::DECODE_RING_LONG_F16_8_NESTED,
                    (DType::F16, 16, false) => &kernels::DECODE_RING_LONG_F16_16,
                    (DType::F16, 16, true) => &kernels::DECODE_RING_LONG_F16_16_NESTED,
                    (DType::F16, 32, false) => &kernels::DECODE_RING_LONG_F16_32,
                    (DType::F16, 32, true) => &kernels::DECODE_RING_LONG_F16_32_NESTED,
                    _ => return None,
                }
            } else {
                match (dtype, columns, nested) {
                    (DType::Bf16, 8, false) => &kernels::DECODE_RING_BF16_8,
                    (DType::Bf16, 8, true) => &kernels::DECODE_RING_BF16_8_NESTED,
                    (DType::Bf16, 16, false) => &kernels::DECODE_RING_BF16_16,
                    (DType::Bf16, 16, true) => &kernels::DECODE_RING_BF16_16_NESTED,
                    (DType::F16, 8, false) => &kernels::DECODE_RING_F16_8,
                    (DType::F16, 8, true) => &kernels::DECODE_RING_F16_8_NESTED,
                    (DType::F16, 16, false) => &kernels::DECODE_RING_F16_16,
                    (DType::F16, 16, true) => &kernels::DECODE_RING_F16_16_NESTED,
                    _ => return None,
                }
            };
            return Some(Self { kernel, plan: AnyPlan::Ring(plan), blocks, shared });
        }
        let kernel = match (dtype, columns, nested) {
            (DType::Bf16, 8, false) => &kernels::DECODE_BF16_8,
            (DType::Bf16, 8, true) => &kernels::DECODE_BF16_8_NESTED,
            (DType::Bf16, 16, false) => &kernels::DECODE_BF16_16,
            (DType::Bf16, 16, true) => &kernels::DECODE_BF16_16_NESTED,
            (DType::F16, 8, false) => &kernels::DECODE_F16_8,
            (DType::F16, 8, true) => &kernels::DECODE_F16_8_NESTED,
            (DType::F16, 16, false) => &kernels::DECODE_F16_16,
            (DType::F16, 16, true) => &kernels::DECODE_F16_16_NESTED,
            _ => return None,
        };
        let (plan, blocks, shared) = decode_plan((m, n, k), multiprocessors, shared_per_block)?;
        Some(Self { kernel, plan: AnyPlan::Registers(plan), blocks, shared })
    }
}

/// Whether the kernels of decode_ring.cuh take a weight; `nested_codes`: how many codes of nested scales there are. These are
/// copied in words, the last one too: only the bytes that there are, but tools that watch memory see the word. Blocks are
/// counted in 32 bits.
pub(super) fn suits_ring(n: usize, k: usize, nested_codes: Option<usize>) -> bool {
    nested_codes.is_none_or(|count| count.is_multiple_of(4))
        && n.checked_mul(k / DECODE_BLOCK).is_some_and(|blocks| u32::try_from(blocks).is_ok())
}

/// Rows of `x` that one launch takes at most, with a weight `[n][k]` that the matrix units take at all.
pub fn rows_at_once(device: &Device, n: usize, k: usize, nested_codes: Option<usize>) -> usize {
    let ring = kernels::DECODE_RING_BF16_8.suits(device.capability())
        && device.shared_per_block() as usize >= RING_SHARED
        && suits_ring(n, k, nested_codes);
    Decode::rows_at_once(ring)
}

#[cfg(test)]
mod tests {
    use super::*;

    const M: [usize; 7] = [1, 3, 8, 9, 16, 17, 32];
    const N: [usize; 8] = [1, 7, 16, 100, 4096, 5120, 14336, 128_256];
    const K: [usize; 8] = [64, 128, 320, 1024, 4096, 5120, 14336, 28672];

    fn shapes() -> impl Iterator<Item = (usize, usize, usize)> {
        M.into_iter().flat_map(|m| N.into_iter().flat_map(move |n| K.into_iter().map(move |k| (m, n, k))))
    }

    #[test]
    fn every_row_and_every_block_has_a_warp() {
        for (multiprocessors, shared) in [(108, 166_912), (82, 101_376), (1, 101_376)] {
            for (m, n, k) in shapes().filter(|&(m, ..)| m <= Decode::rows_at_once(false)) {
                let (plan, blocks, bytes) = decode_plan((m, n, k), multiprocessors, shared).unwrap();
                let (rows, slots) = (plan.rows as usize, plan.slots as usize);
                assert!(blocks as usize * rows >= n && (blocks as usize - 1) * rows < n, "{m} {n} {k}");
                assert!(blocks as usize <= multiprocessors);
                assert!(slots.is_power_of_two() && slots * DECODE_BLOCK <= k);
                assert!(slots * m.div_ceil(DECODE_COLUMNS) <= DECODE_WARPS);
                assert!(plan.per_pass >= 1 && bytes as usize <= shared);
            }
        }
    }

    #[test]
    fn every_row_and_every_block_has_a_warp_and_a_place_in_the_ring() {
        for ((m, n, k), nested) in shapes().flat_map(|shape| [(shape, false), (shape, true)]) {
            let RingLaunch { plan, long, blocks, shared } = ring_plan((m, n, k), nested, 132, 232_448).unwrap();
            let (rows, slots, chunks) = (plan.rows as usize, 1 << plan.log2_slots, plan.chunks as usize);
            assert!(blocks as usize * rows >= n && (blocks as usize - 1) * rows < n, "{m} {n} {k}");
            assert!(blocks <= 132 || long, "{m} {n} {k}: {blocks} blocks");
            assert!(slots <= RING_WARPS);
            // No chunk is without blocks, and none are left.
            let fragments = [1, 2, 4].into_iter().find(|f| m <= f * DECODE_COLUMNS).unwrap();
            let chunk = slots * if fragments == 4 { 4 } else { 8 } * DECODE_BLOCK;
            assert!(chunks * chunk >= k && (chunks - 1) * chunk < k, "{m} {n} {k}");
            assert_eq!(long, chunks > if fragments == 1 { 2 } else { 1 } || fragments == 4);
            let steps = rows.div_ceil(DECODE_ROWS * (RING_WARPS / slots));
            let (per_pass, sharing) = (plan.per_pass as usize, 1 << plan.log2_sharing);
            assert!(if long {
                per_pass == steps && sharing <= slots
            } else {
                (1..=steps).contains(&per_pass) && sharing == 1
            });
            let barriers = if long { per_pass * RING_WARPS * RING_BARRIER } else { 0 };
            let sums = per_pass * RING_WARPS / sharing * fragments * RING_SUMS;
            assert!(RESERVED_SHARED + barriers + DECODE_MAP + sums <= DECODE_TABLE, "{m} {n} {k}");
            assert!((0..=plan.rows).contains(&plan.ahead));
            assert!(shared as usize <= RING_SHARED);
        }
    }

    #[test]
    fn weights_that_the_ring_does_not_take() {
        assert!(suits_ring(8192, 4096, None) && suits_ring(8192, 4096, Some(8192)));
        // Codes that are no whole words, and more blocks than 32 bits count.
        assert!(!suits_ring(8193, 4096, Some(8193)));
        assert!(!suits_ring(1 << 26, 4096, None) && suits_ring((1 << 26) - 1, 4096, None));
        assert!(!suits_ring(usize::MAX, 128, None));
    }

    #[test]
    fn shared_memory_without_room() {
        assert_eq!(decode_plan((16, 4096, 4096), 40, 65536), None);
        assert_eq!(ring_plan((1, 4096, 4096), false, 108, 166_912), None);
    }
}
