//! Products of 8-bit codes for more than a few rows (kernels/int8/int8_tile_sm90a.cuh): which shapes they take, and how the work is
//! divided.

use halfbyte::error::Result;

use super::operands::{Epilogue, Operands};
use crate::capability::Capability;
use crate::driver::{Device, Stream, TensorMap, TileType};
use crate::kernels::int8_activations::PANEL_COLUMNS;
use crate::kernels::{self, Kernel, int8_tile_sm90a_64, int8_tile_sm90a_128, int8_tile_sm90a_256};
use crate::launch::parameters;

// The same in every form.
const ROWS: usize = int8_tile_sm90a_64::ROWS;
const STEP: usize = int8_tile_sm90a_64::STEP;
const MOST_PARTS: usize = int8_tile_sm90a_64::MOST_PARTS;
/// Columns with outliers that are copied together.
const CHUNK: usize = int8_tile_sm90a_64::CHUNK;
/// Blocks that share rows of `x`, when any do.
const SHARING: usize = 2;
/// What `k` is a multiple of, and the addresses of the codes: so the copy engine wants it.
const ALIGNMENT: u64 = 16;

/// The forms of the kernel.
#[derive(Debug, Clone, Copy)]
struct Form {
    /// Rows of `x` in a tile.
    tokens: usize,
    /// Microseconds of a step, 128 columns of a tile, and of a tile besides, all multiprocessors being busy. Measured on an
    /// H200.
    step: f64,
    wave: f64,
    /// Whether blocks can divide K of a tile.
    divides: bool,
    /// The dynamic shared memory of a block.
    shared: usize,
    kernel: &'static Kernel,
}

const FORMS: [Form; 3] = [
    Form {
        tokens: 64,
        step: 0.205,
        wave: 1.0,
        divides: true,
        shared: int8_tile_sm90a_64::SHAPE_64_BYTES,
        kernel: &kernels::INT8_TILE_SM90A_64,
    },
    Form {
        tokens: 128,
        step: 0.30,
        wave: 2.2,
        divides: true,
        shared: int8_tile_sm90a_128::SHAPE_128_BYTES,
        kernel: &kernels::INT8_TILE_SM90A_128,
    },
    Form {
        tokens: 256,
        step: 0.60,
        wave: 3.4,
        divides: false,
        shared: int8_tile_sm90a_256::SHAPE_256_BYTES,
        kernel: &kernels::INT8_TILE_SM90A_256,
    },
];

// Measured on an H200 (132 multiprocessors), where they decide.
/// Microseconds of a launch, and of adding up parts of K.
const LAUNCH: f64 = 2.0;
const ADDING: f64 = 1.5;
/// Of W, bytes that a microsecond brings from memory, and what passes until they come.
const MEMORY: f64 = 3.9e6;
const LATENCY: f64 = 3.0;
/// The part of the multiprocessors' time that is not hidden behind the memory's.
const SEEN: f64 = 0.1;
/// Tiles of `x` by narrower forms than the widest, when there are more tiles than multiprocessors: more would read W from the
/// second-level cache too often.
const NARROW_TILES: usize = 4;
/// Tiles for each multiprocessor from which on blocks share rows of `x`: so long a launch is bound by that cache.
const LONG: usize = 6;

/// What `TilePlan` is to the kernel.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan {
    token_tiles: i32,
    tiles: i32,
    workers: i32,
    steps: i32,
    parts: i32,
    sharing: i32,
}

/// A launch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tile {
    pub kernel: &'static Kernel,
    plan: Plan,
    tokens: usize,
    shared: u32,
}

/// Clusters of so many blocks that a device runs at a time: they do not lie across its groups of multiprocessors, of which
/// some are smaller.
fn resident(multiprocessors: usize, blocks: usize) -> usize {
    let of_132 = match blocks {
        1 => 132,
        2 => 66,
        3 => 40,
        _ => 30,
    };
    (multiprocessors * of_132 / 132).max(1)
}

/// The fastest way to divide a product, and its microseconds.
fn divide((m, n, k): (usize, usize, usize), multiprocessors: usize) -> (Form, Plan, f64) {
    let steps = k.div_ceil(STEP);
    let ranges = n.div_ceil(ROWS);
    let memory = LATENCY + (n * k) as f64 / MEMORY;
    let mut best: Option<(Form, Plan, f64)> = None;
    for form in FORMS {
        let token_tiles = m.div_ceil(form.tokens);
        let tiles = token_tiles * ranges;
        if form.tokens < FORMS[FORMS.len() - 1].tokens && token_tiles > NARROW_TILES && tiles > multiprocessors {
            continue;
        }
        for parts in 1..=if form.divides { MOST_PARTS } else { 1 } {
            let of_part = steps.div_ceil(parts);
            // The last part has something to do.
            if of_part * (parts - 1) >= steps {
                continue;
            }
            let adding = if parts > 1 { ADDING } else { 0.0 };
            let waves = tiles.div_ceil(resident(multiprocessors, parts));
            let busy = LAUNCH + adding + waves as f64 * (form.wave + of_part as f64 * form.step);
            let time = busy.max(memory) + SEEN * busy;
            if best.is_some_and(|(.., least)| time >= least) {
                continue;
            }
            let sharing = if tiles >= LONG * multiprocessors { SHARING } else { 1 };
            let tiles = token_tiles * ranges.div_ceil(sharing);
            // With parts each cluster has one tile: its memory takes the sums of the others.
            let workers = if parts > 1 { tiles } else { tiles.min(resident(multiprocessors, sharing)) };
            let plan = Plan {
                token_tiles: token_tiles as i32,
                tiles: tiles as i32,
                workers: workers as i32,
                steps: of_part as i32,
                parts: parts as i32,
                sharing: sharing as i32,
            };
            best = Some((form, plan, time));
        }
    }
    // The widest form takes every shape in one part, but for no columns at all, which nobody asks for.
    let none = Plan { token_tiles: 1, tiles: 0, workers: 0, steps: 0, parts: 1, sharing: 1 };
    best.unwrap_or((FORMS[0], none, f64::INFINITY))
}

/// Whether a device and a shape are for the kernel at all.
fn takes(capability: Capability, shared_per_block: u32, (m, n, k): (usize, usize, usize)) -> bool {
    kernels::INT8_TILE_SM90A_64.suits(capability)
        && FORMS.iter().all(|form| form.shared <= shared_per_block as usize)
        && m >= 1
        && n >= 1
        && k >= 1
        && (k as u64).is_multiple_of(ALIGNMENT)
        && [m, n, k].iter().all(|&size| i32::try_from(size).is_ok())
        // Tiles and blocks are counted in 32 bits, and tokens behind the last are.
        && i32::try_from(m.next_multiple_of(256)).is_ok()
        && i32::try_from(n.next_multiple_of(SHARING * ROWS)).is_ok()
        && m.div_ceil(64).checked_mul(n.div_ceil(ROWS) * MOST_PARTS).is_some_and(|tiles| i32::try_from(tiles).is_ok())
}

impl Tile {
    /// The launch of a product, or `None` when the kernels do not take it on this device.
    pub(super) fn new(device: &Device, operands: &Operands, epilogue: &Epilogue) -> Option<Self> {
        let &Operands { a, pitch, b, m, n, k } = operands;
        debug_assert!(epilogue.row_scales != 0 || epilogue.count == 0, "sums alone have no outliers");
        let there = pitch == k && a.is_multiple_of(ALIGNMENT) && b.is_multiple_of(ALIGNMENT);
        if !there || !takes(device.capability(), device.shared_per_block(), (m, n, k)) {
            return None;
        }
        let (form, plan, _) = divide((m, n, k), device.multiprocessors() as usize);
        Some(Self { kernel: form.kernel, plan, tokens: form.tokens, shared: form.shared as u32 })
    }

    /// # Safety
    /// As [`super::product`].
    pub(super) unsafe fn launch(
        &self,
        device: &Device,
        stream: Stream,
        operands: &Operands,
        epilogue: &Epilogue,
    ) -> Result<()> {
        let &Operands { a, b, m, n, k, .. } = operands;
        let &Self { kernel, plan, tokens, shared } = self;
        let w = TensorMap::new(TileType::U8, b, (n, k), (ROWS, STEP))?;
        let x = TensorMap::new(TileType::U8, a, (m, k), (tokens / plan.sharing as usize, STEP))?;
        let panel = match epilogue.sixteen_bit_panel() {
            Some((kind, address)) => TensorMap::new(kind, address, (m, PANEL_COLUMNS), (tokens, CHUNK))?,
            None => x,
        };
        let epilogue = *epilogue;
        let (m, n, k) = (m as i32, n as i32, k as i32);
        let cluster = (plan.parts * plan.sharing) as u32;
        let blocks = plan.workers as u64 * u64::from(cluster);
        let parameters = parameters![w, x, panel, b, epilogue, m, n, k, plan];
        // SAFETY: as the kernel takes them; it waits for the one before where it has to. The rest is the caller's.
        unsafe { device.launch_early_in_clusters(stream, kernel, (blocks, cluster), shared, parameters) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOPPER: Capability = Capability(9, 0);
    const SHARED: u32 = 232_448;

    #[test]
    fn every_column_and_every_row_is_in_a_tile() {
        for m in [1, 33, 64, 65, 129, 256, 1000, 4096, 100_000] {
            for n in [1, 128, 129, 4096, 14336, 128_256] {
                for k in [16, 128, 144, 4096, 14336] {
                    let (form, plan, time) = divide((m, n, k), 132);
                    let sizes = [plan.token_tiles, plan.tiles, plan.workers, plan.steps, plan.parts, plan.sharing];
                    let [token_tiles, tiles, workers, steps, parts, sharing] = sizes.map(|size| size as usize);
                    assert!(token_tiles * form.tokens >= m && (token_tiles - 1) * form.tokens < m, "{m} {n} {k}");
                    assert_eq!(tiles, token_tiles * n.div_ceil(ROWS * sharing));
                    assert!(steps * parts * STEP >= k && steps * (parts - 1) * STEP < k, "{m} {n} {k}");
                    assert!((1..=MOST_PARTS).contains(&parts) && (parts == 1 || sharing == 1));
                    assert!(if parts > 1 { workers == tiles } else { (1..=tiles).contains(&workers) });
                    assert!(workers * parts * sharing <= 132 || parts > 1);
                    assert!(form.divides || parts == 1);
                    assert!(time > 0.0 && time.is_finite());
                }
            }
        }
    }

    #[test]
    fn shapes_and_devices_that_are_not_for_it() {
        assert!(takes(HOPPER, SHARED, (33, 1, 16)) && takes(HOPPER, SHARED, (4096, 14336, 4096)));
        assert!(!takes(HOPPER, SHARED, (64, 64, 24)) && !takes(HOPPER, SHARED, (64, 64, 0)));
        assert!(!takes(HOPPER, SHARED, (0, 64, 64)) && !takes(HOPPER, SHARED, (64, 0, 64)));
        assert!(!takes(HOPPER, SHARED, (1 << 31, 64, 64)) && !takes(HOPPER, SHARED, (1 << 24, 1 << 24, 64)));
        assert!(!takes(HOPPER, 101_376, (64, 64, 64)));
        // Its code is for one capability alone.
        for other in [Capability(8, 9), Capability(10, 0), Capability(12, 0)] {
            assert!(!takes(other, SHARED, (64, 64, 64)));
        }
    }

    #[test]
    fn times_agree_with_what_was_measured() {
        // Microseconds on an H200, and the form and the sharing of the fastest way.
        for (m, n, k, measured, tokens, sharing) in [
            (64, 14336, 4096, 18.2, 64, 1),
            (128, 14336, 4096, 20.1, 128, 1),
            (256, 14336, 4096, 26.4, 256, 1),
            (512, 14336, 4096, 46.8, 256, 1),
            (1024, 14336, 4096, 91.5, 256, 1),
            (2048, 14336, 4096, 190.3, 256, 2),
            (4096, 14336, 4096, 346.2, 256, 2),
            (64, 4096, 4096, 7.9, 64, 1),
            (128, 4096, 4096, 9.3, 64, 1),
            (256, 4096, 4096, 10.2, 64, 1),
            (512, 4096, 4096, 14.7, 128, 1),
            (1024, 4096, 4096, 24.5, 256, 1),
            (4096, 4096, 4096, 102.2, 256, 1),
            (64, 4096, 14336, 19.3, 64, 1),
            (256, 4096, 14336, 27.5, 128, 1),
            (1024, 4096, 14336, 72.3, 256, 1),
        ] {
            let (form, plan, time) = divide((m, n, k), 132);
            assert!((time / measured - 1.0_f64).abs() < 0.14, "{m} {n} {k}: {time}");
            assert_eq!((form.tokens, plan.sharing), (tokens, sharing), "{m} {n} {k}");
        }
    }

    #[test]
    fn shared_memory_is_what_a_block_may_have() {
        assert!(FORMS.iter().all(|form| form.shared <= SHARED as usize));
        assert_eq!(FORMS[2].shared, 4 * (16384 + 32768) + 2 * 16384 + 2048 + 14 * 8);
    }
}
