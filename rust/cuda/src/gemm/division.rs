//! How the products by warpgroups with 4-bit weights (kernels/gemm/tile_sm90a and dgrad_sm90a) are divided: the form of the
//! kernel, tiles for blocks and clusters of blocks, and the time that this takes.

use halfbyte::dtype::DType;
use halfbyte::error::Result;

use crate::capability::Capability;
use crate::driver::{TensorMap, TileType};
use crate::gemm::workspace;
use crate::kernels::{Kernel, gemm_4bit_tile_sm90a_bf16_64 as bf16_64};

// The same in every form.
pub(super) const ROWS: usize = bf16_64::ROWS;
const K_TILE: usize = bf16_64::K_TILE;
const CODES_ROW_BYTES: usize = bf16_64::CODES_ROW_BYTES;
pub(super) const SCALES_K: usize = bf16_64::SCALES_K;
const SCALES_K_TILES: usize = bf16_64::SCALES_K_TILES;
pub(super) const MAX_SPLIT_K: usize = bf16_64::MAX_SPLIT_K;
/// Of what the copy engine reads, in bytes; and what columns of `W` are a multiple of.
pub(super) const ALIGNMENT: u64 = 16;
pub(super) const COLUMNS: usize = 32;
/// Blocks that share a tile through memory, at most.
const MAX_PARTS: usize = 8;

/// Stages of scales that a range is a multiple of, by the consumers of a block: two teams go on with a tile after whole rounds of
/// their main loop (kernels/gemm/tile_sm90a/rounds.cuh).
pub(super) const ONE_TILE: usize = 0;
pub(super) const ONE_TEAM: usize = 1;
pub(super) const TWO_TEAMS: usize = 2;

/// A form of a kernel.
#[derive(Debug, Clone, Copy)]
pub(super) struct Form {
    /// Rows of `x` in a tile.
    pub tokens: usize,
    /// Where a block may go on with another tile, so that all blocks can share all tiles evenly: the stages of scales of which it
    /// takes a multiple, [`ONE_TEAM`] or [`TWO_TEAMS`]. [`ONE_TILE`] where it may not.
    pub range_unit: usize,
    /// Microseconds of a wave of tiles besides its steps, and of a step: 64 columns of a tile, all multiprocessors being busy.
    /// Measured on an H200.
    pub wave: f64,
    pub step: f64,
    /// The dynamic shared memory of a block.
    pub shared: usize,
    pub bf16: &'static Kernel,
    pub f16: &'static Kernel,
}

impl Form {
    pub(super) fn kernel(&self, dtype: DType) -> &'static Kernel {
        if dtype == DType::F16 { self.f16 } else { self.bf16 }
    }
}

/// What `LaunchConfig` is to the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Config {
    pub token_tiles: i32,
    pub scales_stages: i32,
    pub split_k: i32,
    pub ranges: i32,
    pub range_unit: i32,
}

// Measured on an H200 (132 multiprocessors).
/// Microseconds of a launch.
const LAUNCH: f64 = 1.3;
/// Of adding up the parts of K.
const ADDING: f64 = 1.0;
/// Of ranges: what each tile takes besides its steps, and what sums take that go through memory.
const TILE: f64 = 1.0;
const SHARING: f64 = 7.0;
/// The latter with two teams, besides collecting; and what every further tile of a range takes, whose `x` waits for the epilogue
/// of the one before.
const SHARING_TEAMS: f64 = 3.0;
const FURTHER_TILE: f64 = 3.0;
const FURTHER_TILE_ROW: f64 = 10.0 / 128.0;
/// Of parts of a tile in ranges: what it takes to leave sums in memory, to add those of one part, and each row of `x` of them.
const LEAVING: f64 = 1.3;
const COLLECTING: f64 = 0.25;
const COLLECTING_ROW: f64 = 1.08 / 128.0;
/// What is more than so many microseconds takes longer by so much: then power limits the clock.
const LONG: f64 = 60.0;
const LONGER: f64 = 1.2;
/// Of a dense copy for a million values, and the values that a microsecond brings from memory to cuBLAS's matrix units.
const COPY: f64 = 0.63;
const DENSE_VALUES: f64 = 2.15e6;
/// Products that the matrix units of a multiprocessor make in a microsecond, in cuBLAS.
const PRODUCTS: f64 = 400e6 / 132.0;
/// Microseconds of both launches, besides; and what they take at least, on the device or the host.
const DENSE_LAUNCHES: f64 = 4.0;
const DENSE_LEAST: f64 = 12.0;

/// Clusters of so many blocks that a device runs at a time: they do not lie across its groups of multiprocessors, of which
/// some are smaller, and which ones differs from card to card.
fn resident(multiprocessors: usize, split_k: usize) -> usize {
    let of_132 = match split_k {
        1 => 132,
        2 => 64,
        3 => 38,
        _ => 28,
    };
    (multiprocessors * of_132 / 132).max(1)
}

/// What a time becomes at the clock that power allows.
pub(super) fn heated(time: f64) -> f64 {
    time.min(LONG) + LONGER * (time - LONG).max(0.0)
}

/// Microseconds of a dense copy of the weight `[n][k]`, and a product of `m` rows with that or its transpose by cuBLAS.
pub(super) fn dense_time((m, n, k): (usize, usize, usize), multiprocessors: usize) -> f64 {
    let values = n as f64 * k as f64;
    let products = values * m as f64 / (PRODUCTS * multiprocessors as f64);
    heated(DENSE_LAUNCHES + COPY * values / 1e6 + products.max(values / DENSE_VALUES)).max(DENSE_LEAST)
}

/// Whether a device has the kernels of these forms.
pub(super) fn has(forms: &[Form], capability: Capability, shared_per_block: u32) -> bool {
    forms.iter().all(|form| form.bf16.suits(capability) && form.shared <= shared_per_block as usize)
}

/// Whether a type is for them, and a product of `m` rows by `n` over `k` can be counted in 32 bits: tiles, blocks, stages of all
/// tiles, and what lies behind the last row and column.
pub(super) fn counts(dtype: DType, (m, n, k): (usize, usize, usize)) -> bool {
    matches!(dtype, DType::Bf16 | DType::F16)
        && [m, n, k].iter().all(|&size| size >= 1 && i32::try_from(size + 8 * SCALES_K).is_ok())
        && i32::try_from(m.div_ceil(64) * n.div_ceil(ROWS) * k.div_ceil(SCALES_K).max(MAX_SPLIT_K)).is_ok()
}

/// Whether memory at an address is where the copy engine can read it.
pub(super) fn reaches(address: u64) -> bool {
    address.is_multiple_of(ALIGNMENT)
}

/// How a product is divided.
#[derive(Debug, Clone, Copy)]
pub(super) struct Division {
    pub form: Form,
    pub config: Config,
    /// Of the grid.
    pub blocks: u64,
    /// What it takes, in microseconds.
    pub time: f64,
}

impl Division {
    /// The fastest for a product of `m` rows by `n` over `k` with so many bytes of workspace at most.
    pub(super) fn new(forms: &[Form], shape: (usize, usize, usize), multiprocessors: usize, workspace: usize) -> Self {
        let best = Self::best(forms, shape, multiprocessors, workspace > 0);
        if best.workspace() <= workspace { best } else { Self::best(forms, shape, multiprocessors, false) }
    }

    /// The same, into ranges only where that is wanted.
    fn best(forms: &[Form], (m, n, k): (usize, usize, usize), multiprocessors: usize, with_ranges: bool) -> Self {
        let units = k.div_ceil(SCALES_K);
        let no_config = Config { token_tiles: 1, scales_stages: 0, split_k: 1, ranges: 0, range_unit: 1 };
        // One part is always possible, but for no columns at all, which nobody asks for.
        let mut best = Self { form: forms[0], config: no_config, blocks: 0, time: f64::INFINITY };
        for &form in forms {
            let token_tiles = m.div_ceil(form.tokens);
            let tiles = token_tiles * n.div_ceil(ROWS);
            let mut consider =
                |scales_stages: usize, split_k: usize, (ranges, range_unit): (usize, usize), time: f64| {
                    let time = heated(time);
                    if time < best.time {
                        let config = Config {
                            token_tiles: token_tiles as i32,
                            scales_stages: scales_stages as i32,
                            split_k: split_k as i32,
                            ranges: ranges as i32,
                            range_unit: range_unit as i32,
                        };
                        let blocks = if ranges > 0 { ranges } else { tiles * split_k } as u64;
                        best = Self { form, config, blocks, time };
                    }
                };
            for split_k in 1..=MAX_SPLIT_K {
                let of_split = units.div_ceil(split_k);
                // The last part has something to do.
                if of_split * (split_k - 1) >= units {
                    continue;
                }
                let waves = tiles.div_ceil(resident(multiprocessors, split_k));
                let adding = if split_k > 1 { ADDING } else { 0.0 };
                let steps = (of_split * SCALES_K_TILES) as f64;
                consider(of_split, split_k, (0, 1), LAUNCH + waves as f64 * (form.wave + steps * form.step + adding));
            }
            if !with_ranges {
                continue;
            }
            let unit = form.range_unit;
            if unit != ONE_TILE && units.is_multiple_of(unit) {
                let all = tiles * units / unit;
                let ranges = multiprocessors.min(all);
                let steps = (all.div_ceil(ranges.max(1)) * unit * SCALES_K_TILES) as f64;
                let (of_each, rows) = (tiles as f64 / ranges.max(1) as f64, form.tokens as f64);
                let further = (of_each - 1.0).max(0.0) * (FURTHER_TILE + FURTHER_TILE_ROW * rows);
                let parts = (1.0 / of_each).max(1.0);
                let of_teams = SHARING_TEAMS + parts * (COLLECTING + COLLECTING_ROW * rows) + further;
                let sharing = if unit == ONE_TEAM { SHARING } else { of_teams };
                consider(0, 1, (ranges, unit), LAUNCH + form.wave + sharing + steps * form.step + of_each * TILE);
            }
            if unit == ONE_TEAM {
                continue;
            }
            for parts in 2..=MAX_PARTS.min(units) {
                // All at a time, or it is no better than clusters.
                if tiles * parts <= multiprocessors {
                    let steps = (units.div_ceil(parts) * SCALES_K_TILES) as f64;
                    let of_part = COLLECTING + COLLECTING_ROW * form.tokens as f64;
                    let leaving = LEAVING + (parts - 1) as f64 * of_part;
                    consider(0, 1, (tiles * parts, 1), LAUNCH + form.wave + leaving + steps * form.step);
                }
            }
        }
        best
    }

    /// What the copy engine has to know: of a matrix `[rows][columns]` of this type, whose columns are added over, and of the codes
    /// of `W [n][k]`. Each comes with its address.
    pub(super) fn maps(
        &self,
        dtype: DType,
        (x, rows, columns): (u64, usize, usize),
        (codes, n, k): (u64, usize, usize),
    ) -> Result<(TensorMap, TensorMap)> {
        let kind = if dtype == DType::F16 { TileType::F16 } else { TileType::Bf16 };
        let x = TensorMap::new(kind, x, (rows, columns), (self.form.tokens, K_TILE))?;
        let codes = TensorMap::new(TileType::U8, codes, (n, k / 2), (ROWS, CODES_ROW_BYTES))?;
        Ok((x, codes))
    }

    /// Bytes of the sums that blocks leave; there are as many signals as ranges.
    pub(super) fn sums(&self) -> usize {
        self.config.ranges as usize * self.form.tokens * ROWS * size_of::<f32>()
    }

    /// Bytes of the workspace.
    pub(super) fn workspace(&self) -> usize {
        if self.config.ranges == 0 { 0 } else { workspace::bytes(self.sums(), self.config.ranges as usize) }
    }
}
