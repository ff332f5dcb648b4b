//! Products of more than a few rows with a 4-bit weight by `mma.sync` (kernels/gemm/tile_sm80), for devices without warpgroup
//! products: which shapes they take, how the work is divided, and up to how many rows they are preferred to a dense copy.

use halfbyte::dtype::DType;

use crate::capability::Capability;
use crate::driver::Device;
use crate::gemm::small_m::FEW_ROWS;
use crate::gemm::workspace::{self, Workspace};
use crate::kernels::{self, Kernel, gemm_4bit_tile_sm80 as sm80};

const ROWS: usize = sm80::ROWS;
const K_TILE: usize = sm80::K_TILE;
const MAX_SPLIT_K: usize = sm80::MAX_SPLIT_K;
/// What the addresses of `x` and the codes are multiples of.
const ALIGNMENT: u64 = 16;

/// The forms of the kernel.
#[derive(Debug, Clone, Copy)]
struct Form {
    /// Rows of `x` in a tile.
    tokens: usize,
    /// What a k-tile takes, beside that of the first form: by the operations of the matrix units and of dequantizing.
    step: f64,
    /// The dynamic shared memory of a block.
    shared: usize,
    bf16: &'static Kernel,
    f16: &'static Kernel,
}

const FORMS: [Form; 2] = [
    Form {
        tokens: 64,
        step: 1.0,
        shared: sm80::SHAPE_64_BYTES,
        bf16: &kernels::GEMM_4BIT_TILE_SM80_BF16_64,
        f16: &kernels::GEMM_4BIT_TILE_SM80_F16_64,
    },
    Form {
        tokens: 128,
        step: 1.4,
        shared: sm80::SHAPE_128_BYTES,
        bf16: &kernels::GEMM_4BIT_TILE_SM80_BF16_128,
        f16: &kernels::GEMM_4BIT_TILE_SM80_F16_128,
    },
];

// In steps of the first form, estimated: they have to rank divisions, not to foretell times.
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
fn divide((m, n, k): (usize, usize, usize), multiprocessors: usize, split: bool) -> (Form, Config, usize) {
    let all = k / K_TILE;
    let mut best: Option<(Form, Config, usize, f64)> = None;
    for form in FORMS {
        let token_tiles = m.div_ceil(form.tokens);
        let tiles = token_tiles * n.div_ceil(ROWS);
        for split_k in 1..=if split { MAX_SPLIT_K } else { 1 } {
            let k_tiles = all.div_ceil(split_k);
            // The last part has something to do.
            if k_tiles * (split_k - 1) >= all {
                continue;
            }
            let waves = (tiles * split_k).div_ceil(multiprocessors.max(1)) as f64;
            let time = waves * (WAVE + k_tiles as f64 * form.step) + (split_k - 1) as f64 * ADDING;
            if best.is_none_or(|(.., least)| time < least) {
                let config =
                    Config { token_tiles: token_tiles as i32, k_tiles: k_tiles as i32, split_k: split_k as i32 };
                best = Some((form, config, tiles, time));
            }
        }
    }
    // One part is always possible, but for no columns at all, which nobody asks for.
    best.map_or((FORMS[0], Config { token_tiles: 1, k_tiles: 0, split_k: 1 }, 0), |(form, config, tiles, _)| {
        (form, config, tiles)
    })
}

/// Whether a shape and a type are for the kernel at all.
fn takes(capability: Capability, shared_per_block: u32, dtype: DType, (m, n, k): (usize, usize, usize)) -> bool {
    kernels::GEMM_4BIT_TILE_SM80_BF16_64.suits(capability)
        && FORMS.iter().all(|form| form.shared <= shared_per_block as usize)
        && matches!(dtype, DType::Bf16 | DType::F16)
        && m >= 1
        && n >= 1
        && k >= K_TILE
        && k.is_multiple_of(K_TILE)
        && [m, n, k].iter().all(|&size| i32::try_from(size).is_ok())
        // Blocks are counted in 32 bits.
        && i32::try_from(m.div_ceil(64) * n.div_ceil(ROWS) * MAX_SPLIT_K).is_ok()
}

/// Rows up to which the kernel is preferred to a dense copy: by the clocks that it takes on an H200, the bytes that the copy
/// moves and the rates of memory and matrix units, not measured on these devices. The copy costs least where memory is fast.
/// Devices of 9.0 have another kernel.
fn most_rows(capability: Capability) -> usize {
    match (capability.0, capability.1) {
        (8, 0) => 128,
        (8 | 12, _) => 512,
        (10 | 11, _) => 64,
        _ => 0,
    }
}

impl Tile {
    /// The launch for a product of this shape with so many bytes of workspace at most, or `None` when the kernel does not take
    /// it on this device.
    pub(super) fn new(device: &Device, dtype: DType, shape: (usize, usize, usize), workspace: usize) -> Option<Self> {
        if !takes(device.capability(), device.shared_per_block(), dtype, shape) {
            return None;
        }
        let multiprocessors = device.multiprocessors() as usize;
        let bytes = |(form, config, tiles): &(Form, Config, usize)| {
            let left = tiles * (config.split_k as usize - 1);
            let sums = left * form.tokens * ROWS * size_of::<f32>();
            (sums, workspace::bytes(sums, left))
        };
        let mut best = divide(shape, multiprocessors, workspace > 0);
        if bytes(&best).1 > workspace {
            best = divide(shape, multiprocessors, false);
        }
        let (sums, workspace) = bytes(&best);
        let (form, config, tiles) = best;
        Some(Self {
            kernel: if dtype == DType::F16 { form.f16 } else { form.bf16 },
            config,
            blocks: (tiles * config.split_k as usize) as u64,
            shared: form.shared as u32,
            workspace,
            sums,
        })
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

/// Whether this device makes so many rows by this kernel, if it takes the product.
pub(super) fn prefers(device: &Device, m: usize) -> bool {
    (FEW_ROWS + 1..=most_rows(device.capability())).contains(&m)
}

/// If the kernel is preferred to a dense copy for a product of `m` rows of `x` with a weight `[n][k]`, the bytes of the
/// workspace that it wants.
pub(super) fn pays(device: &Device, dtype: DType, shape: (usize, usize, usize)) -> Option<usize> {
    if !prefers(device, shape.0) {
        return None;
    }
    Tile::new(device, dtype, shape, usize::MAX).map(|tile| tile.workspace)
}

#[cfg(test)]
mod tests {
    use super::*;

    const AMPERE: Capability = Capability(8, 0);

    #[test]
    fn every_column_and_every_row_is_in_a_tile() {
        for m in [1, 33, 64, 65, 128, 129, 500] {
            for n in [1, 8, 128, 129, 4096, 14336, 128_256] {
                for k in [64, 128, 576, 1024, 4096, 14336] {
                    for split in [false, true] {
                        let (form, config, tiles) = divide((m, n, k), 108, split);
                        let (token_tiles, k_tiles, split_k) =
                            (config.token_tiles as usize, config.k_tiles as usize, config.split_k as usize);
                        assert_eq!(tiles, m.div_ceil(form.tokens) * n.div_ceil(ROWS), "{m} {n} {k}");
                        assert!(token_tiles * form.tokens >= m && (token_tiles - 1) * form.tokens < m, "{m} {n} {k}");
                        assert!((1..=if split { MAX_SPLIT_K } else { 1 }).contains(&split_k));
                        assert!(k_tiles * split_k * K_TILE >= k && k_tiles * (split_k - 1) * K_TILE < k, "{m} {n} {k}");
                    }
                }
            }
        }
    }

    #[test]
    fn few_tiles_share_the_multiprocessors() {
        let split_k = |m, n, k| divide((m, n, k), 108, true).1.split_k;
        assert!(split_k(64, 4096, 4096) >= 3);
        // A tile for each multiprocessor.
        assert_eq!(split_k(128, 13824, 4096), 1);
        assert!(split_k(40, 128, 14336) >= 6);
    }

    #[test]
    fn shapes_and_devices_that_are_not_for_it() {
        let most = 101_376;
        assert!(takes(AMPERE, most, DType::Bf16, (33, 1, 64)));
        assert!(takes(Capability(12, 0), most, DType::F16, (512, 4096, 4096)));
        assert!(!takes(Capability(7, 5), most, DType::F16, (64, 64, 64)));
        assert!(!takes(AMPERE, 65_536, DType::Bf16, (64, 64, 64)));
        assert!(!takes(AMPERE, most, DType::F32, (64, 64, 64)));
        assert!(!takes(AMPERE, most, DType::Bf16, (64, 64, 96)));
        assert!(!takes(AMPERE, most, DType::Bf16, (0, 64, 64)));
    }

    #[test]
    fn rows_by_capability() {
        assert_eq!(most_rows(Capability(8, 0)), 128);
        assert_eq!(most_rows(Capability(8, 9)), 512);
        assert_eq!(most_rows(Capability(9, 0)), 0);
        assert_eq!(most_rows(Capability(7, 5)), 0);
    }
}
