//! Products of few rows with a 4-bit weight (kernels/gemm/small_m_sm75, small_m_sm80 and small_m_sm90): which kernel takes which
//! shape, and how it divides the work.

use halfbyte::dtype::DType;
use halfbyte::geometry::BlockSize;

use crate::driver::Device;
use crate::kernels::{
    self, Kernel, gemm_4bit_small_m_sm75 as sm75, gemm_4bit_small_m_sm80 as sm80, gemm_4bit_small_m_sm90_long as sm90,
    gemm_4bit_small_m_sm90_one as sm90_one,
};

pub(super) const BLOCK: usize = sm80::BLOCK;
const ROWS: usize = sm80::ROWS;
const COLUMNS: usize = sm80::COLUMNS;
/// Fragments of 8 columns of the largest kernel for compute capability 7.5 or 8.0; that for 9.0 has more.
const SM80_FRAGMENTS: usize = 2;
const SM80_WARPS: usize = sm80::SHAPE_1_WARPS;
const SM80_K_TILE: usize = sm80::SHAPE_1_K_TILE;
const _: () = assert!(sm75::SHAPE_1_WARPS == SM80_WARPS && sm75::SHAPE_1_K_TILE == SM80_K_TILE && sm75::ROWS == ROWS);
const TABLE_BYTES: usize = sm80::LANE_TABLE_BYTES;
const MAP_BYTES: usize = sm80::MAP_BYTES;
/// Partial sums of one column of a tile.
const SM80_COLUMN: usize = ROWS * size_of::<f32>();
const SM90_WARPS: usize = sm90::WARPS;
const SM90_FRAGMENTS: usize = 4;
/// Sums of eight columns of a warp for a step.
const SM90_SUMS: usize = sm90::SUMS * size_of::<f32>();
const SM90_BARRIER: usize = 8;
/// What is on the way, of all warps.
const SM90_AHEAD: usize = 64 * 1024;
/// Of gemm_4bit_small_m_sm90_one: sums of all warps for a step, x of a k-slice, and the stages.
const ONE_STEP: usize = SM90_WARPS * sm90_one::ONE_ROW_SUMS * size_of::<f32>();
const ONE_K_SLICE: usize = COLUMNS * BLOCK;
const ONE_X: usize = ONE_K_SLICE * 2;
const ONE_STAGES: usize = 96 * 1024;
/// Shared memory of the kernel that takes most: a device has all of them, or none.
const SM90_SHARED: usize = 2 * TABLE_BYTES + ONE_STAGES;
/// Shared memory that the device keeps for itself, before the block's: the table of gemm_4bit_small_m_sm90 begins at a
/// multiple of its size, whether or not there is such a part.
const RESERVED_SHARED: usize = 1024;

/// More rows than this go to a kernel for more rather than to those for few rows, which would be launched twice.
pub(super) const FEW_ROWS: usize = 32;
/// The same on compute capability 7.5, where that kernel has a form for 32 rows: a launch.
pub(super) const FEW_ROWS_SM75: usize = COLUMNS * SM80_FRAGMENTS;

/// Microseconds of a launch for 17 to 32 rows, of a million values, and of a round of K beyond two; the columns of a round; and
/// the part by which it takes longer with nested scales.
const FEW_LAUNCH: f64 = 5.4;
const FEW_VALUES: f64 = 0.315;
const FEW_ROUND: f64 = 1.3;
const ROUND: f64 = 2048.0;
const FEW_NESTED: f64 = 1.15;

/// The kernels for few rows, by the compute capability from which on they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    /// The weight by way of registers, its values too; float16.
    Sm75,
    /// The weight by way of registers, its values in shared memory.
    Sm80,
    /// The weight by way of shared memory: 9.0 and 10.0.
    Sm90,
}

/// What `LaunchConfig` is to gemm_4bit_small_m_sm80 and gemm_4bit_small_m_sm75.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sm80Config {
    rows: i32,
    k_slices: i32,
    per_pass: i32,
}

/// What `LaunchConfig` is to gemm_4bit_small_m_sm90.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sm90Config {
    rows: i32,
    log2_k_slices: i32,
    k_tiles: i32,
    per_pass: i32,
    log2_sharing: i32,
    ahead: i32,
}

/// Which kernel for compute capability 9.0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sm90Form {
    /// For one row of x.
    One,
    /// For one round of K.
    Short,
    /// For several.
    Long,
}

/// What goes with a [`Sm90Config`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sm90Launch {
    config: Sm90Config,
    form: Sm90Form,
    blocks: u64,
    shared: u32,
}

/// The last parameter of a kernel.
#[derive(Debug, Clone, Copy)]
pub(super) enum AnyConfig {
    Sm80(Sm80Config),
    Sm90(Sm90Config),
}

/// A launch of a fused product.
#[derive(Debug, Clone, Copy)]
pub(super) struct SmallM {
    pub kernel: &'static Kernel,
    pub config: AnyConfig,
    pub blocks: u64,
    pub shared: u32,
}

/// Of 8 columns each, of the kernel for `m` rows of x: 1, 2 or 4.
fn fragments_of(m: usize) -> usize {
    m.div_ceil(COLUMNS).next_power_of_two()
}

/// As many parts of K, a power of two, as leave each warp most of a k-tile.
fn parts_of_k(k: usize, warps: usize, k_tile: usize) -> usize {
    let mut k_slices = warps;
    while k_slices > 1 && k / BLOCK < k_slices * k_tile * 3 / 4 {
        k_slices /= 2;
    }
    k_slices
}

/// How the work is divided, or `None` when shared memory has no room for one tile: the config, the blocks of threads, and the
/// shared memory of each. `table`: bytes of a table of values.
fn sm80_config(
    table: usize,
    (m, n, k): (usize, usize, usize),
    multiprocessors: usize,
    shared_per_block: usize,
) -> Option<(Sm80Config, u64, u32)> {
    let fragments = fragments_of(m);
    let k_slices = parts_of_k(k, SM80_WARPS / fragments, SM80_K_TILE * fragments);
    let rows = n.div_ceil(multiprocessors);
    let tiles = rows.div_ceil(ROWS);
    let partial = k_slices * m * SM80_COLUMN;
    let room = shared_per_block.checked_sub(table + MAP_BYTES)? / partial;
    if room == 0 {
        return None;
    }
    // Passes of equal length.
    let per_pass = tiles.div_ceil(tiles.div_ceil(room));
    let config = Sm80Config {
        rows: i32::try_from(rows).ok()?,
        k_slices: i32::try_from(k_slices).ok()?,
        per_pass: i32::try_from(per_pass).ok()?,
    };
    let shared = table + MAP_BYTES + per_pass * partial;
    Some((config, n.div_ceil(rows) as u64, u32::try_from(shared).ok()?))
}

/// The same for gemm_4bit_small_m_sm90.
fn sm90_launch(
    (m, n, k): (usize, usize, usize),
    nested: bool,
    multiprocessors: usize,
    shared_per_block: usize,
) -> Option<Sm90Launch> {
    if shared_per_block < SM90_SHARED {
        return None;
    }
    let fragments = fragments_of(m);
    // Blocks of a k-slice, and k-tiles of a round.
    let (k_slice, round) = match fragments {
        1 => (sm90::SHAPE_1_1_K_SLICE, sm90::SHAPE_1_1_X_K_TILES),
        2 => (sm90::SHAPE_2_1_K_SLICE, sm90::SHAPE_2_1_X_K_TILES),
        _ => (sm90::SHAPE_4_1_K_SLICE, sm90::SHAPE_4_1_X_K_TILES),
    };
    if m == 1
        && let Some(launch) = sm90_one_launch((n, k), nested, multiprocessors)
    {
        return Some(launch);
    }
    let values = k_slice * BLOCK;
    // As few k-slices as leave no more k-tiles than the most do.
    let mut k_slices = SM90_WARPS;
    while k_slices > 1 && k <= k_slices / 2 * values {
        k_slices /= 2;
    }
    let k_tiles = k.div_ceil(k_slices * values);
    let long = k_tiles > round || fragments > SM80_FRAGMENTS;
    // With several rounds there is one stage more. What is before the table fits in front of the first place for it,
    // whichever that is.
    let stage = SM90_WARPS * ROWS * values / 2;
    let shared = 2 * TABLE_BYTES + SM90_AHEAD + if long { stage } else { 0 };
    let room = TABLE_BYTES - RESERVED_SHARED - MAP_BYTES;
    let steps_of = |rows: usize| rows.div_ceil(ROWS * (SM90_WARPS / k_slices));
    let step_sums = SM90_WARPS * fragments * SM90_SUMS;
    let mut rows = sm90_rows(n, k_slices, multiprocessors);
    let mut sharing = 1;
    let per_pass = if long {
        // The sums of all steps have to fit: warps share places, then more blocks have fewer rows each.
        while steps_of(rows) * (SM90_WARPS * SM90_BARRIER + step_sums / sharing) > room {
            if sharing < k_slices {
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
    let config = Sm90Config {
        rows: i32::try_from(rows).ok()?,
        log2_k_slices: k_slices.ilog2() as i32,
        k_tiles: i32::try_from(k_tiles).ok()?,
        per_pass: i32::try_from(per_pass).ok()?,
        log2_sharing: sharing.ilog2() as i32,
        ahead: rows_ahead(rows, k, nested),
    };
    let form = if long { Sm90Form::Long } else { Sm90Form::Short };
    Some(Sm90Launch { config, form, blocks: n.div_ceil(rows) as u64, shared: u32::try_from(shared).ok()? })
}

/// Rows of W of a block of threads: whole tiles where that leaves few multiprocessors without work, so that fewer of them
/// fetch x.
fn sm90_rows(n: usize, k_slices: usize, multiprocessors: usize) -> usize {
    let rows = n.div_ceil(multiprocessors);
    let tiled = rows.next_multiple_of(ROWS * (SM90_WARPS / k_slices));
    if n.div_ceil(tiled) * 16 >= n.div_ceil(rows) * 15 { tiled } else { rows }
}

/// Rows that are fetched while the kernel before still runs. More would hold up x; measured on an H100, as were the parts.
fn rows_ahead(rows: usize, k: usize, nested: bool) -> i32 {
    let (part, most) = if nested { (7, 64 << 10) } else { (5, 96 << 10) };
    ((rows * (k / 2) / part).min(most) / (k / 2)) as i32
}

/// The launch of gemm_4bit_small_m_sm90_one, or `None` when x is too long.
fn sm90_one_launch((n, k): (usize, usize), nested: bool, multiprocessors: usize) -> Option<Sm90Launch> {
    let tiles = |k_slices: usize| k.div_ceil(k_slices * ONE_K_SLICE);
    let steps = |k_slices: usize| sm90_rows(n, k_slices, multiprocessors).div_ceil(ROWS * (SM90_WARPS / k_slices));
    // The fewest work items for a warp: of the divisions that have them one with a single k-tile, else that with the fewest
    // k-slices.
    let k_slices = [8, 4, 2, 1].into_iter().min_by_key(|&s| (tiles(s) * steps(s), tiles(s) > 1, s))?;
    let (rows, k_tiles, steps) = (sm90_rows(n, k_slices, multiprocessors), tiles(k_slices), steps(k_slices));
    // A long walk with x of one round in registers is faster: 28672 x 8192 took 37.4 us here and 36.3 there, on an H200.
    if k_tiles > 1 && k <= sm90::SHAPE_1_1_X_K_TILES * SM90_WARPS * ONE_K_SLICE && k_tiles * steps > 16 {
        return None;
    }
    let x = if k_tiles > 1 { k_tiles * k_slices * ONE_X } else { 0 };
    // What is before the table fits in front of the first place for it, whichever that is.
    let room = (TABLE_BYTES - RESERVED_SHARED - MAP_BYTES).checked_sub(x)? / ONE_STEP;
    if room == 0 {
        return None;
    }
    let config = Sm90Config {
        rows: i32::try_from(rows).ok()?,
        log2_k_slices: k_slices.ilog2() as i32,
        k_tiles: i32::try_from(k_tiles).ok()?,
        // Passes of equal length.
        per_pass: i32::try_from(steps.div_ceil(steps.div_ceil(room))).ok()?,
        log2_sharing: 0,
        // With several k-tiles more than half of that held up the first tiles.
        ahead: rows_ahead(rows, k, nested) / if k_tiles > 1 { 2 } else { 1 },
    };
    let shared = u32::try_from(2 * TABLE_BYTES + ONE_STAGES).ok()?;
    Some(Sm90Launch { config, form: Sm90Form::One, blocks: n.div_ceil(rows) as u64, shared })
}

impl SmallM {
    /// Rows of `x` that one launch takes at most.
    pub(super) const fn rows_at_once(family: Family) -> usize {
        COLUMNS * if matches!(family, Family::Sm90) { SM90_FRAGMENTS } else { SM80_FRAGMENTS }
    }

    /// The launch for a product of this shape, or `None` when the kernels do not take it on this device.
    pub(super) fn new(
        device: &Device,
        family: Family,
        dtype: DType,
        nested: bool,
        (m, n, k): (usize, usize, usize),
    ) -> Option<Self> {
        let smallest = match family {
            Family::Sm75 => &kernels::GEMM_4BIT_SMALL_M_SM75_F16_8,
            Family::Sm80 => &kernels::GEMM_4BIT_SMALL_M_SM80_F16_8,
            Family::Sm90 => &kernels::GEMM_4BIT_SMALL_M_SM90_F16_8,
        };
        let suits = smallest.suits(device.capability())
            && (1..=Self::rows_at_once(family)).contains(&m)
            && n >= 1
            && i32::try_from(n).is_ok()
            && k >= BLOCK
            && k.is_multiple_of(BLOCK)
            && i32::try_from(k).is_ok();
        if !suits {
            return None;
        }
        let columns = COLUMNS * fragments_of(m);
        let (multiprocessors, shared_per_block) =
            (device.multiprocessors() as usize, device.shared_per_block() as usize);
        if family == Family::Sm90 {
            let Sm90Launch { config, form, blocks, shared } =
                sm90_launch((m, n, k), nested, multiprocessors, shared_per_block)?;
            let kernel = match (form, dtype, columns, nested) {
                (Sm90Form::One, DType::Bf16, _, false) => &kernels::GEMM_4BIT_SMALL_M_SM90_ONE_BF16,
                (Sm90Form::One, DType::Bf16, _, true) => &kernels::GEMM_4BIT_SMALL_M_SM90_ONE_BF16_NESTED,
                (Sm90Form::One, DType::F16, _, false) => &kernels::GEMM_4BIT_SMALL_M_SM90_ONE_F16,
                (Sm90Form::One, DType::F16, _, true) => &kernels::GEMM_4BIT_SMALL_M_SM90_ONE_F16_NESTED,
                (Sm90Form::Long, DType::Bf16, 8, false) => &kernels::GEMM_4BIT_SMALL_M_SM90_LONG_BF16_8,
                (Sm90Form::Long, DType::Bf16, 8, true) => &kernels::GEMM_4BIT_SMALL_M_SM90_LONG_BF16_8_NESTED,
                (Sm90Form::Long, DType::Bf16, 16, false) => &kernels::GEMM_4BIT_SMALL_M_SM90_LONG_BF16_16,
                (Sm90Form::Long, DType::Bf16, 16, true) => &kernels::GEMM_4BIT_SMALL_M_SM90_LONG_BF16_16_NESTED,
                (Sm90Form::Long, DType::Bf16, 32, false) => &kernels::GEMM_4BIT_SMALL_M_SM90_LONG_BF16_32,
                (Sm90Form::Long, DType::Bf16, 32, true) => &kernels::GEMM_4BIT_SMALL_M_SM90_LONG_BF16_32_NESTED,
                (Sm90Form::Long, DType::F16, 8, false) => &kernels::GEMM_4BIT_SMALL_M_SM90_LONG_F16_8,
                (Sm90Form::Long, DType::F16, 8, true) => &kernels::GEMM_4BIT_SMALL_M_SM90_LONG_F16_8_NESTED,
                (Sm90Form::Long, DType::F16, 16, false) => &kernels::GEMM_4BIT_SMALL_M_SM90_LONG_F16_16,
                (Sm90Form::Long, DType::F16, 16, true) => &kernels::GEMM_4BIT_SMALL_M_SM90_LONG_F16_16_NESTED,
                (Sm90Form::Long, DType::F16, 32, false) => &kernels::GEMM_4BIT_SMALL_M_SM90_LONG_F16_32,
                (Sm90Form::Long, DType::F16, 32, true) => &kernels::GEMM_4BIT_SMALL_M_SM90_LONG_F16_32_NESTED,
                (Sm90Form::Short, DType::Bf16, 8, false) => &kernels::GEMM_4BIT_SMALL_M_SM90_BF16_8,
                (Sm90Form::Short, DType::Bf16, 8, true) => &kernels::GEMM_4BIT_SMALL_M_SM90_BF16_8_NESTED,
                (Sm90Form::Short, DType::Bf16, 16, false) => &kernels::GEMM_4BIT_SMALL_M_SM90_BF16_16,
                (Sm90Form::Short, DType::Bf16, 16, true) => &kernels::GEMM_4BIT_SMALL_M_SM90_BF16_16_NESTED,
                (Sm90Form::Short, DType::F16, 8, false) => &kernels::GEMM_4BIT_SMALL_M_SM90_F16_8,
                (Sm90Form::Short, DType::F16, 8, true) => &kernels::GEMM_4BIT_SMALL_M_SM90_F16_8_NESTED,
                (Sm90Form::Short, DType::F16, 16, false) => &kernels::GEMM_4BIT_SMALL_M_SM90_F16_16,
                (Sm90Form::Short, DType::F16, 16, true) => &kernels::GEMM_4BIT_SMALL_M_SM90_F16_16_NESTED,
                _ => return None,
            };
            return Some(Self { kernel, config: AnyConfig::Sm90(config), blocks, shared });
        }
        let kernel = match (family, dtype, columns, nested) {
            (Family::Sm75, DType::F16, 8, false) => &kernels::GEMM_4BIT_SMALL_M_SM75_F16_8,
            (Family::Sm75, DType::F16, 8, true) => &kernels::GEMM_4BIT_SMALL_M_SM75_F16_8_NESTED,
            (Family::Sm75, DType::F16, 16, false) => &kernels::GEMM_4BIT_SMALL_M_SM75_F16_16,
            (Family::Sm75, DType::F16, 16, true) => &kernels::GEMM_4BIT_SMALL_M_SM75_F16_16_NESTED,
            (Family::Sm80, DType::Bf16, 8, false) => &kernels::GEMM_4BIT_SMALL_M_SM80_BF16_8,
            (Family::Sm80, DType::Bf16, 8, true) => &kernels::GEMM_4BIT_SMALL_M_SM80_BF16_8_NESTED,
            (Family::Sm80, DType::Bf16, 16, false) => &kernels::GEMM_4BIT_SMALL_M_SM80_BF16_16,
            (Family::Sm80, DType::Bf16, 16, true) => &kernels::GEMM_4BIT_SMALL_M_SM80_BF16_16_NESTED,
            (Family::Sm80, DType::F16, 8, false) => &kernels::GEMM_4BIT_SMALL_M_SM80_F16_8,
            (Family::Sm80, DType::F16, 8, true) => &kernels::GEMM_4BIT_SMALL_M_SM80_F16_8_NESTED,
            (Family::Sm80, DType::F16, 16, false) => &kernels::GEMM_4BIT_SMALL_M_SM80_F16_16,
            (Family::Sm80, DType::F16, 16, true) => &kernels::GEMM_4BIT_SMALL_M_SM80_F16_16_NESTED,
            _ => return None,
        };
        let table = if family == Family::Sm80 { TABLE_BYTES } else { 0 };
        let (config, blocks, shared) = sm80_config(table, (m, n, k), multiprocessors, shared_per_block)?;
        Some(Self { kernel, config: AnyConfig::Sm80(config), blocks, shared })
    }
}

/// Whether the kernels for few rows take a weight `[n][k]`.
pub(super) fn takes(k: usize, blocksize: BlockSize) -> bool {
    k > 0 && k.is_multiple_of(BLOCK) && blocksize.get() >= BLOCK
}

/// Microseconds of 17 to 32 rows of `x` with a weight `[n][k]` by gemm_4bit_small_m_sm90: measured on an H200.
pub(super) fn time((_, n, k): (usize, usize, usize), nested: bool) -> f64 {
    let rounds = (k as f64 / ROUND - 2.0).max(0.0);
    let plain = FEW_LAUNCH + FEW_VALUES * n as f64 * k as f64 / 1e6 + FEW_ROUND * rounds;
    if nested { FEW_NESTED * plain } else { plain }
}

/// Whether the kernels of gemm_4bit_small_m_sm90 take a weight; `nested_codes`: how many codes of nested scales there are. These are
/// copied in words, the last one too: only the bytes that there are, but tools that watch memory see the word. Blocks are
/// counted in 32 bits.
pub(super) fn suits_sm90(n: usize, k: usize, nested_codes: Option<usize>) -> bool {
    nested_codes.is_none_or(|count| count.is_multiple_of(4))
        && n.checked_mul(k / BLOCK).is_some_and(|blocks| u32::try_from(blocks).is_ok())
}

/// Rows of `x` that one launch takes at most, with a weight `[n][k]` that the matrix units take at all.
pub fn rows_at_once(device: &Device, n: usize, k: usize, nested_codes: Option<usize>) -> usize {
    let sm90 = kernels::GEMM_4BIT_SMALL_M_SM90_BF16_8.suits(device.capability())
        && device.shared_per_block() as usize >= SM90_SHARED
        && suits_sm90(n, k, nested_codes);
    SmallM::rows_at_once(if sm90 { Family::Sm90 } else { Family::Sm80 })
}

#[cfg(test)]
mod tests {
    use super::*;

    const M: [usize; 7] = [1, 3, 8, 9, 16, 17, 32];
    const N: [usize; 8] = [1, 7, 16, 100, 4096, 5120, 14336, 128_256];
    const K: [usize; 9] = [64, 128, 320, 1024, 4096, 5120, 14336, 28672, 53248];

    fn shapes() -> impl Iterator<Item = (usize, usize, usize)> {
        M.into_iter().flat_map(|m| N.into_iter().flat_map(move |n| K.into_iter().map(move |k| (m, n, k))))
    }

    #[test]
    fn every_row_and_every_block_has_a_warp() {
        let devices = [
            (TABLE_BYTES, 108, 166_912),
            (TABLE_BYTES, 82, 101_376),
            (TABLE_BYTES, 1, 101_376),
            (0, 40, 65_536),
            (0, 1, 65_536),
        ];
        for (table, multiprocessors, shared) in devices {
            for (m, n, k) in shapes().filter(|&(m, ..)| m <= SmallM::rows_at_once(Family::Sm80)) {
                let (config, blocks, bytes) = sm80_config(table, (m, n, k), multiprocessors, shared).unwrap();
                let (rows, k_slices) = (config.rows as usize, config.k_slices as usize);
                assert!(blocks as usize * rows >= n && (blocks as usize - 1) * rows < n, "{m} {n} {k}");
                assert!(blocks as usize <= multiprocessors);
                assert!(k_slices.is_power_of_two() && k_slices * BLOCK <= k);
                assert!(k_slices * m.div_ceil(COLUMNS) <= SM80_WARPS);
                assert!(config.per_pass >= 1 && bytes as usize <= shared);
            }
        }
    }

    #[test]
    fn every_row_and_every_block_has_a_warp_and_a_place_in_the_ring() {
        for ((m, n, k), nested) in shapes().flat_map(|shape| [(shape, false), (shape, true)]) {
            let launch = sm90_launch((m, n, k), nested, 132, 232_448).unwrap();
            let Sm90Launch { config, form, blocks, shared } = launch;
            let long = form == Sm90Form::Long;
            let (rows, k_slices, k_tiles) = (config.rows as usize, 1 << config.log2_k_slices, config.k_tiles as usize);
            assert!(blocks as usize * rows >= n && (blocks as usize - 1) * rows < n, "{m} {n} {k}");
            assert!(blocks <= 132 || long, "{m} {n} {k}: {blocks} blocks");
            assert!(k_slices <= SM90_WARPS);
            // No k-tile is without blocks, and none are left.
            let fragments = [1, 2, 4].into_iter().find(|f| m <= f * COLUMNS).unwrap();
            let k_tile = k_slices * if fragments == 4 { 4 } else { 8 } * BLOCK;
            assert!(k_tiles * k_tile >= k && (k_tiles - 1) * k_tile < k, "{m} {n} {k}");
            if form == Sm90Form::One {
                assert_eq!(m, 1);
                let steps = rows.div_ceil(ROWS * (SM90_WARPS / k_slices));
                assert!((1..=steps).contains(&(config.per_pass as usize)) && config.log2_sharing == 0);
                let x = if k_tiles > 1 { k_tiles * k_slices * ONE_X } else { 0 };
                let before = RESERVED_SHARED + MAP_BYTES + x + config.per_pass as usize * ONE_STEP;
                assert!(before <= TABLE_BYTES && shared as usize <= 232_448, "{n} {k}");
                continue;
            }
            assert!(m > 1 || k > 28672 || (n, k) == (128_256, 5120), "{n} {k}");
            assert_eq!(long, k_tiles > if fragments == 1 { 2 } else { 1 } || fragments == 4);
            let steps = rows.div_ceil(ROWS * (SM90_WARPS / k_slices));
            let (per_pass, sharing) = (config.per_pass as usize, 1 << config.log2_sharing);
            assert!(if long {
                per_pass == steps && sharing <= k_slices
            } else {
                (1..=steps).contains(&per_pass) && sharing == 1
            });
            let barriers = if long { per_pass * SM90_WARPS * SM90_BARRIER } else { 0 };
            let sums = per_pass * SM90_WARPS / sharing * fragments * SM90_SUMS;
            assert!(RESERVED_SHARED + barriers + MAP_BYTES + sums <= TABLE_BYTES, "{m} {n} {k}");
            assert!((0..=config.rows).contains(&config.ahead));
            assert!(shared as usize <= SM90_SHARED);
        }
    }

    #[test]
    fn weights_that_the_ring_does_not_take() {
        assert!(suits_sm90(8192, 4096, None) && suits_sm90(8192, 4096, Some(8192)));
        // Codes that are no whole words, and more blocks than 32 bits count.
        assert!(!suits_sm90(8193, 4096, Some(8193)));
        assert!(!suits_sm90(1 << 26, 4096, None) && suits_sm90((1 << 26) - 1, 4096, None));
        assert!(!suits_sm90(usize::MAX, 128, None));
    }

    #[test]
    fn shared_memory_without_room() {
        assert_eq!(sm80_config(TABLE_BYTES, (16, 4096, 4096), 40, 65536), None);
        assert_eq!(sm90_launch((1, 4096, 4096), false, 108, 166_912), None);
    }
}
