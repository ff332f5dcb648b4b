//! Products of more than a few rows with a 4-bit weight by `mma.sync` (kernels/gemm/tile_sm80 and tile_sm75), for devices without
//! warpgroup products: which shapes they take, how the work is divided, and up to how many rows they are preferred to a dense copy.

use halfbyte::dtype::DType;
use halfbyte::geometry::BlockSize;

use crate::capability::Capability;
use crate::driver::Device;
use crate::gemm::small_m::{FEW_ROWS, FEW_ROWS_SM75};
use crate::gemm::workspace::{self, Workspace};
use crate::kernels::{self, Kernel, gemm_4bit_tile_sm75 as sm75, gemm_4bit_tile_sm80 as sm80};

const ROWS: usize = sm80::ROWS;
const K_TILE: usize = sm80::K_TILE;
const MAX_SPLIT_K: usize = sm80::MAX_SPLIT_K;
const _: () = assert!(sm75::ROWS == ROWS && sm75::K_TILE == K_TILE && sm75::MAX_SPLIT_K == MAX_SPLIT_K);
/// What the addresses of `x` and the codes are multiples of.
const ALIGNMENT: u64 = 16;

/// A form of a kernel.
#[derive(Debug, Clone, Copy)]
struct Form {
    /// Rows of `x` in a tile.
    tokens: usize,
    /// What a k-tile takes, beside that of 64 rows of x: by the operations of the matrix units and of dequantizing.
    step: f64,
    /// Blocks that are on a multiprocessor at a time.
    blocks: usize,
    /// The dynamic shared memory of a block.
    shared: usize,
    /// By the type of `x`, and whether scales are nested.
    kernel: fn(DType, bool) -> Option<&'static Kernel>,
}

/// Kernels that divide products in the same way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Family {
    forms: [Form; 2],
    smallest_block: usize,
    most_k: usize,
}

/// For compute capability 8.0 and later.
pub(super) const SM80: Family = Family {
    forms: [
        Form {
            tokens: 64,
            step: 1.0,
            blocks: 1,
            shared: sm80::SHAPE_64_BYTES,
            kernel: |dtype, _| match dtype {
                DType::Bf16 => Some(&kernels::GEMM_4BIT_TILE_SM80_BF16_64),
                DType::F16 => Some(&kernels::GEMM_4BIT_TILE_SM80_F16_64),
                _ => None,
            },
        },
        Form {
            tokens: 128,
            step: 1.4,
            blocks: 1,
            shared: sm80::SHAPE_128_BYTES,
            kernel: |dtype, _| match dtype {
                DType::Bf16 => Some(&kernels::GEMM_4BIT_TILE_SM80_BF16_128),
                DType::F16 => Some(&kernels::GEMM_4BIT_TILE_SM80_F16_128),
                _ => None,
            },
        },
    ],
    smallest_block: 0,
    most_k: usize::MAX,
};

/// For compute capability 7.5.
pub(super) const SM75: Family = Family {
    forms: [
        Form {
            tokens: 32,
            step: 0.6,
            blocks: sm75::SHAPE_32_BLOCKS,
            shared: sm75::SHAPE_32_BYTES,
            kernel: |dtype, nested| match (dtype, nested) {
                (DType::F16, false) => Some(&kernels::GEMM_4BIT_TILE_SM75_F16_32),
                (DType::F16, true) => Some(&kernels::GEMM_4BIT_TILE_SM75_F16_32_NESTED),
                _ => None,
            },
        },
        Form {
            tokens: 64,
            step: 1.0,
            blocks: sm75::SHAPE_64_BLOCKS,
            shared: sm75::SHAPE_64_BYTES,
            kernel: |dtype, nested| match (dtype, nested) {
                (DType::F16, false) => Some(&kernels::GEMM_4BIT_TILE_SM75_F16_64),
                (DType::F16, true) => Some(&kernels::GEMM_4BIT_TILE_SM75_F16_64_NESTED),
                _ => None,
            },
        },
    ],
    // Scales are for sums of so many columns.
    smallest_block: K_TILE,
    // Bytes of a tile are counted in 32 bits.
    most_k: 1 << 24,
};

// In steps of 64 rows of x, estimated: they have to rank divisions, not to foretell times.
/// Of a wave of tiles besides its steps: the first copies, and y.
const WAVE: f64 = 8.0;
/// Of the sums of one other block.
const ADDING: f64 = 2.0;

/// What `LaunchConfig` is to the kernel.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Config {
    token_tiles: i32,
    k_tiles: i32,
    split_k: i32,
}

/// A launch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tile {
    pub kernel: &'static Kernel,
    pub config: Config,
    pub blocks: u64,
    pub shared: u32,
    /// Bytes of the workspace, of them those of the sums.
    pub workspace: usize,
    sums: usize,
}

/// How a product is divided, K in one part unless `split` allows more: the form, the config and the tiles.
fn divide(
    forms: [Form; 2],
    (m, n, k): (usize, usize, usize),
    multiprocessors: usize,
    split: bool,
) -> (Form, Config, usize) {
    let all = k / K_TILE;
    let multiprocessors = multiprocessors.max(1);
    let mut best: Option<(Form, Config, usize, f64)> = None;
    for form in forms {
        let token_tiles = m.div_ceil(form.tokens);
        let tiles = token_tiles * n.div_ceil(ROWS);
        for split_k in 1..=if split { MAX_SPLIT_K } else { 1 } {
            let k_tiles = all.div_ceil(split_k);
            // The last part has something to do.
            if k_tiles * (split_k - 1) >= all {
                continue;
            }
            let blocks = tiles * split_k;
            let waves = blocks.div_ceil(multiprocessors * form.blocks) as f64;
            // Blocks that are on a multiprocessor together share its units.
            let together = blocks.div_ceil(multiprocessors) as f64 / waves;
            let time = waves * (WAVE + k_tiles as f64 * form.step * together) + (split_k - 1) as f64 * ADDING;
            if best.is_none_or(|(.., least)| time < least) {
                let config =
                    Config { token_tiles: token_tiles as i32, k_tiles: k_tiles as i32, split_k: split_k as i32 };
                best = Some((form, config, tiles, time));
            }
        }
    }
    // One part is always possible, but for no columns at all, which nobody asks for.
    best.map_or((forms[0], Config { token_tiles: 1, k_tiles: 0, split_k: 1 }, 0), |(form, config, tiles, _)| {
        (form, config, tiles)
    })
}

impl Family {
    /// That for a device, as far as it has one.
    fn of(capability: Capability) -> Self {
        if capability < Capability(8, 0) { SM75 } else { SM80 }
    }

    /// Whether a shape and types are for these kernels at all.
    fn takes(
        &self,
        capability: Capability,
        shared_per_block: u32,
        (dtype, blocksize, nested): (DType, BlockSize, bool),
        (m, n, k): (usize, usize, usize),
    ) -> bool {
        self.forms.iter().all(|form| {
            (form.kernel)(dtype, nested).is_some_and(|kernel| kernel.suits(capability))
                && form.shared <= shared_per_block as usize
        }) && blocksize.get() >= self.smallest_block
            && m >= 1
            && n >= 1
            && k >= K_TILE
            && k <= self.most_k
            && k.is_multiple_of(K_TILE)
            && [m, n, k].iter().all(|&size| i32::try_from(size).is_ok())
            // Blocks are counted in 32 bits.
            && i32::try_from(m.div_ceil(32) * n.div_ceil(ROWS) * MAX_SPLIT_K).is_ok()
    }
}

/// Rows up to which a kernel is preferred to a dense copy: by the clocks that it takes on an H200, for 7.5 those of all units
/// together, the bytes that the copy moves and the rates of memory and matrix units, not measured on these devices. The copy costs
/// least where memory is fast. Devices of 9.0 have another kernel.
fn most_rows(capability: Capability) -> usize {
    match (capability.0, capability.1) {
        (7, _) => 192,
        (8, 0) => 128,
        (8 | 12, _) => 512,
        (10 | 11, _) => 64,
        _ => 0,
    }
}

impl Tile {
    /// The launch for a product of this shape with so many bytes of workspace at most, or `None` when the kernels of `family` do
    /// not take it on this device; `weight`: the type of `x`, the block size, and whether scales are nested.
    pub(super) fn new(
        device: &Device,
        family: Family,
        weight: (DType, BlockSize, bool),
        shape: (usize, usize, usize),
        workspace: usize,
    ) -> Option<Self> {
        if !family.takes(device.capability(), device.shared_per_block(), weight, shape) {
            return None;
        }
        let multiprocessors = device.multiprocessors() as usize;
        let bytes = |(form, config, tiles): &(Form, Config, usize)| {
            let left = tiles * (config.split_k as usize - 1);
            let sums = left * form.tokens * ROWS * size_of::<f32>();
            (sums, workspace::bytes(sums, left))
        };
        let mut best = divide(family.forms, shape, multiprocessors, workspace > 0);
        if bytes(&best).1 > workspace {
            best = divide(family.forms, shape, multiprocessors, false);
        }
        let (sums, workspace) = bytes(&best);
        let (form, config, tiles) = best;
        let (dtype, _, nested) = weight;
        Some(Self {
            kernel: (form.kernel)(dtype, nested)?,
            config,
            blocks: (tiles * config.split_k as usize) as u64,
            shared: form.shared as u32,
            workspace,
            sums,
        })
    }

    /// The same by the kernels that are preferred on this device.
    pub(super) fn preferred(
        device: &Device,
        weight: (DType, BlockSize, bool),
        shape: (usize, usize, usize),
        workspace: usize,
    ) -> Option<Self> {
        let capability = device.capability();
        let rows = few_rows(capability) + 1..=most_rows(capability);
        if !rows.contains(&shape.0) {
            return None;
        }
        Self::new(device, Family::of(capability), weight, shape, workspace)
    }

    /// Whether `x` and the codes are where the kernel can copy them from.
    pub(super) fn reaches(x: u64, codes: u64) -> bool {
        x.is_multiple_of(ALIGNMENT) && codes.is_multiple_of(ALIGNMENT)
    }

    /// The workspace at this address, for one launch.
    pub(super) fn workspace(&self, address: u64) -> Workspace {
        Workspace::new(address, self.sums)
    }
}

/// Rows that the kernels for few rows are preferred for.
fn few_rows(capability: Capability) -> usize {
    if capability < Capability(8, 0) { FEW_ROWS_SM75 } else { FEW_ROWS }
}

/// Rows of `x` up to which a device does without these kernels; `None` where it never uses them.
pub(super) fn rows_without(device: &Device) -> Option<usize> {
    let few = few_rows(device.capability());
    (most_rows(device.capability()) > few).then_some(few)
}

#[cfg(test)]
mod tests {
    use super::*;

    const AMPERE: Capability = Capability(8, 0);
    const TURING: Capability = Capability(7, 5);

    fn weight(dtype: DType, blocksize: usize, nested: bool) -> (DType, BlockSize, bool) {
        (dtype, BlockSize::new(blocksize).unwrap(), nested)
    }

    #[test]
    fn every_column_and_every_row_is_in_a_tile() {
        for (forms, multiprocessors) in [(SM80.forms, 108), (SM75.forms, 40)] {
            for m in [1, 17, 33, 64, 65, 128, 129, 500] {
                for n in [1, 8, 128, 129, 4096, 14336, 128_256] {
                    for k in [64, 128, 576, 1024, 4096, 14336] {
                        for split in [false, true] {
                            let (form, config, tiles) = divide(forms, (m, n, k), multiprocessors, split);
                            let (token_tiles, k_tiles, split_k) =
                                (config.token_tiles as usize, config.k_tiles as usize, config.split_k as usize);
                            assert_eq!(tiles, m.div_ceil(form.tokens) * n.div_ceil(ROWS), "{m} {n} {k}");
                            assert!(
                                token_tiles * form.tokens >= m && (token_tiles - 1) * form.tokens < m,
                                "{m} {n} {k}"
                            );
                            assert!((1..=if split { MAX_SPLIT_K } else { 1 }).contains(&split_k));
                            assert!(k_tiles * split_k * K_TILE >= k, "{m} {n} {k}");
                            assert!(k_tiles * (split_k - 1) * K_TILE < k, "{m} {n} {k}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn few_tiles_share_the_multiprocessors() {
        let split_k = |m, n, k| divide(SM80.forms, (m, n, k), 108, true).1.split_k;
        assert!(split_k(64, 4096, 4096) >= 3);
        // A tile for each multiprocessor.
        assert_eq!(split_k(128, 13824, 4096), 1);
        assert!(split_k(40, 128, 14336) >= 6);
        // A T4: a tile for each place, and fewer.
        let split_k = |m, n, k| divide(SM75.forms, (m, n, k), 40, true).1.split_k;
        assert_eq!(split_k(64, 10240, 4096), 1);
        assert!(split_k(64, 1024, 4096) >= 5);
    }

    #[test]
    fn forms_by_rows() {
        let tokens = |m| divide(SM75.forms, (m, 14336, 4096), 40, true).0.tokens;
        assert_eq!([17, 32, 33, 64, 80, 128, 256].map(tokens), [32, 32, 64, 64, 32, 64, 64]);
    }

    #[test]
    fn shapes_and_devices_that_are_not_for_it() {
        let most = 101_376;
        let bf16 = weight(DType::Bf16, 32, false);
        assert!(SM80.takes(AMPERE, most, bf16, (33, 1, 64)));
        assert!(SM80.takes(Capability(12, 0), most, weight(DType::F16, 64, true), (512, 4096, 4096)));
        assert!(!SM80.takes(TURING, most, weight(DType::F16, 64, false), (64, 64, 64)));
        assert!(!SM80.takes(AMPERE, 65_536, bf16, (64, 64, 64)));
        assert!(!SM80.takes(AMPERE, most, weight(DType::F32, 64, false), (64, 64, 64)));
        assert!(!SM80.takes(AMPERE, most, bf16, (64, 64, 96)));
        assert!(!SM80.takes(AMPERE, most, bf16, (0, 64, 64)));

        let f16 = weight(DType::F16, 64, true);
        assert!(SM75.takes(TURING, 65_536, f16, (17, 1, 64)));
        assert!(SM75.takes(AMPERE, most, f16, (17, 1, 64)));
        assert!(!SM75.takes(TURING, 65_536, weight(DType::Bf16, 64, true), (17, 1, 64)));
        assert!(!SM75.takes(TURING, 65_536, weight(DType::F16, 32, true), (17, 1, 64)));
        assert!(!SM75.takes(TURING, 65_536, f16, (17, 1, 96)));
        assert!(!SM75.takes(TURING, 65_536, f16, (17, 1, 1 << 25)));
    }

    #[test]
    fn rows_by_capability() {
        assert_eq!(most_rows(Capability(8, 0)), 128);
        assert_eq!(most_rows(Capability(8, 9)), 512);
        assert_eq!(most_rows(Capability(9, 0)), 0);
        assert_eq!(most_rows(TURING), 192);
        assert_eq!((few_rows(TURING), few_rows(AMPERE)), (16, 32));
    }
}
