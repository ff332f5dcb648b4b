//! Products of more than a few rows with a 4-bit weight by warpgroups (kernels/gemm/tile_sm90a): which shapes they take, how
//! the work is divided, and how long it takes beside the kernels for few rows and a dense copy of the weight.

use halfbyte::dtype::DType;
use halfbyte::error::Result;
use halfbyte::geometry::BlockSize;

use crate::capability::Capability;
use crate::driver::{Device, TensorMap};
use crate::gemm::division::{COLUMNS, Config, Division, Form, ONE_TEAM, TWO_TEAMS, counts, dense_time, has, reaches};
use crate::gemm::small_m::{self, BLOCK, FEW_ROWS};
use crate::gemm::workspace::Workspace;
use crate::kernels::{
    self, Kernel, gemm_4bit_block_sums_sm90a_bf16_32 as sums_32, gemm_4bit_block_sums_sm90a_bf16_48 as sums_48,
    gemm_4bit_block_sums_sm90a_bf16_64 as sums_64, gemm_4bit_tile_sm90a_bf16_64 as bf16_64,
    gemm_4bit_tile_sm90a_bf16_96 as bf16_96, gemm_4bit_tile_sm90a_bf16_128 as bf16_128,
    gemm_4bit_tile_sm90a_bf16_192 as bf16_192, gemm_4bit_tile_sm90a_bf16_256 as bf16_256,
};

/// For up to 64 rows, of weights of which a k-tile of a row is within a block: scales are for the sums of a block.
const BLOCK_SUMS: [Form; 3] = [
    Form {
        tokens: 32,
        range_unit: TWO_TEAMS,
        wave: 3.2,
        step: 0.227,
        shared: sums_32::SHAPE_32_0_BYTES,
        bf16: &kernels::GEMM_4BIT_BLOCK_SUMS_SM90A_BF16_32,
        f16: &kernels::GEMM_4BIT_BLOCK_SUMS_SM90A_F16_32,
    },
    Form {
        tokens: 48,
        range_unit: TWO_TEAMS,
        wave: 3.2,
        step: 0.255,
        shared: sums_48::SHAPE_48_0_BYTES,
        bf16: &kernels::GEMM_4BIT_BLOCK_SUMS_SM90A_BF16_48,
        f16: &kernels::GEMM_4BIT_BLOCK_SUMS_SM90A_F16_48,
    },
    Form {
        tokens: 64,
        range_unit: TWO_TEAMS,
        wave: 3.2,
        step: 0.2875,
        shared: sums_64::SHAPE_64_0_BYTES,
        bf16: &kernels::GEMM_4BIT_BLOCK_SUMS_SM90A_BF16_64,
        f16: &kernels::GEMM_4BIT_BLOCK_SUMS_SM90A_F16_64,
    },
];
/// For any number of rows: what dequantizing gives is multiplied.
const FORMS: [Form; 5] = [
    Form {
        tokens: 64,
        range_unit: TWO_TEAMS,
        wave: 5.5,
        step: 0.31,
        shared: bf16_64::SHAPE_64_0_BYTES,
        bf16: &kernels::GEMM_4BIT_TILE_SM90A_BF16_64,
        f16: &kernels::GEMM_4BIT_TILE_SM90A_F16_64,
    },
    Form {
        tokens: 96,
        range_unit: TWO_TEAMS,
        wave: 5.5,
        step: 0.37,
        shared: bf16_96::SHAPE_96_0_BYTES,
        bf16: &kernels::GEMM_4BIT_TILE_SM90A_BF16_96,
        f16: &kernels::GEMM_4BIT_TILE_SM90A_F16_96,
    },
    Form {
        tokens: 128,
        range_unit: TWO_TEAMS,
        wave: 5.5,
        step: 0.43,
        shared: bf16_128::SHAPE_128_0_BYTES,
        bf16: &kernels::GEMM_4BIT_TILE_SM90A_BF16_128,
        f16: &kernels::GEMM_4BIT_TILE_SM90A_F16_128,
    },
    Form {
        tokens: 192,
        range_unit: ONE_TEAM,
        wave: 5.5,
        step: 0.58,
        shared: bf16_192::SHAPE_192_0_BYTES,
        bf16: &kernels::GEMM_4BIT_TILE_SM90A_BF16_192,
        f16: &kernels::GEMM_4BIT_TILE_SM90A_F16_192,
    },
    Form {
        tokens: 256,
        range_unit: ONE_TEAM,
        wave: 5.5,
        step: 0.675,
        shared: bf16_256::SHAPE_256_0_BYTES,
        bf16: &kernels::GEMM_4BIT_TILE_SM90A_BF16_256,
        f16: &kernels::GEMM_4BIT_TILE_SM90A_F16_256,
    },
];

/// A launch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tile {
    pub kernel: &'static Kernel,
    division: Division,
}

/// The part of the dense copy's time that the kernel has to stay below: what is computed is a few percent off.
const MARGIN: f64 = 0.96;
/// Rows up to which the times were measured: for more the dense copy stays.
const MEASURED_ROWS: usize = 1024;

/// Rows of `x` from which on these kernels may be faster than those for few rows, if these take the weight.
pub(super) const FEWEST_ROWS: usize = 17;

/// Whether a device has the kernels.
pub(super) fn suits(device: &Device) -> bool {
    has(&FORMS, device.capability(), device.shared_per_block())
}

/// Whether a shape and a type are for the kernels at all.
fn takes(capability: Capability, shared_per_block: u32, dtype: DType, shape: (usize, usize, usize)) -> bool {
    has(&FORMS, capability, shared_per_block) && counts(dtype, shape) && shape.2.is_multiple_of(COLUMNS)
}

/// Of the kernels those for so many rows with such a weight.
fn forms(m: usize, k: usize, blocksize: BlockSize) -> &'static [Form] {
    let most = BLOCK_SUMS[BLOCK_SUMS.len() - 1].tokens;
    if m <= most && k.is_multiple_of(BLOCK) && blocksize.get() >= BLOCK { &BLOCK_SUMS } else { &FORMS }
}

impl Tile {
    /// The launch for a product of this shape with so many bytes of workspace at most, or `None` when the kernel does not take
    /// it on this device.
    pub(super) fn new(
        device: &Device,
        dtype: DType,
        blocksize: BlockSize,
        shape: (usize, usize, usize),
        workspace: usize,
    ) -> Option<Self> {
        if !takes(device.capability(), device.shared_per_block(), dtype, shape) {
            return None;
        }
        let forms = forms(shape.0, shape.2, blocksize);
        let division = Division::new(forms, shape, device.multiprocessors() as usize, workspace);
        Some(Self { kernel: division.form.kernel(dtype), division })
    }

    /// What `LaunchConfig` is.
    pub(super) fn config(&self) -> Config {
        self.division.config
    }

    /// Blocks of the grid and of a cluster, and the dynamic shared memory of one.
    pub(super) fn grid(&self) -> ((u64, u32), u32) {
        ((self.division.blocks, self.division.config.split_k as u32), self.division.form.shared as u32)
    }

    /// Whether memory at these addresses is where the copy engine can read it.
    pub(super) fn reaches(x: u64, codes: u64) -> bool {
        reaches(x) && reaches(codes)
    }

    /// The workspace at this address, for one launch.
    pub(super) fn workspace(&self, address: u64) -> Workspace {
        Workspace::new(address, self.division.sums())
    }

    /// What the copy engine has to know: of `x [m][k]` and of the codes of `W [n][k]`.
    pub(super) fn maps(
        &self,
        dtype: DType,
        (m, n, k): (usize, usize, usize),
        x: u64,
        codes: u64,
    ) -> Result<(TensorMap, TensorMap)> {
        self.division.maps(dtype, (x, m, k), (codes, n, k))
    }

    /// Whether it takes less time than a kernel for few rows, which takes the product as well.
    pub(super) fn beats_few(&self, shape: (usize, usize, usize), nested: bool) -> bool {
        shape.0 >= FEWEST_ROWS && self.division.time < small_m::time(shape, nested)
    }
}

/// If a kernel takes a product of `m` rows of `x` with a weight `[n][k]` in less time than a dense copy and a product with
/// that, the bytes of the workspace with which it does: none where it is a kernel for few rows, which there is as well if
/// `small_m`. `x` and the codes have to begin at multiples of 16 bytes.
pub(super) fn pays(
    device: &Device,
    dtype: DType,
    (blocksize, nested): (BlockSize, bool),
    shape: (usize, usize, usize),
    small_m: bool,
) -> Option<usize> {
    if shape.0 > MEASURED_ROWS {
        return None;
    }
    let tile = Tile::new(device, dtype, blocksize, shape, usize::MAX)?;
    if small_m && shape.0 <= FEW_ROWS {
        return Some(if tile.beats_few(shape, nested) { tile.division.workspace() } else { 0 });
    }
    let dense = dense_time(shape, device.multiprocessors() as usize);
    (tile.division.time < MARGIN * dense).then(|| tile.division.workspace())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::division::{MAX_SPLIT_K, ROWS, SCALES_K};

    const HOPPER: Capability = Capability(9, 0);

    #[test]
    fn every_column_and_every_row_is_in_a_tile() {
        for m in [1, 33, 64, 65, 128, 129, 200, 256, 1000, 4096] {
            for n in [1, 8, 128, 129, 4096, 14336, 128_256] {
                for k in [32, 64, 256, 288, 1024, 4096, 14336] {
                    let Division { form, config, blocks, time } = Division::new(&FORMS, (m, n, k), 132, 0);
                    let (tiles, units, split_k) =
                        (config.token_tiles as usize, config.scales_stages as usize, config.split_k as usize);
                    assert!(tiles * form.tokens >= m && (tiles - 1) * form.tokens < m, "{m} {n} {k}");
                    assert_eq!(blocks as usize, tiles * n.div_ceil(ROWS) * split_k);
                    assert!((1..=MAX_SPLIT_K).contains(&split_k));
                    assert!(units * split_k * SCALES_K >= k && units * (split_k - 1) * SCALES_K < k, "{m} {n} {k}");
                    assert!(time > 0.0 && time.is_finite());
                }
            }
        }
    }

    #[test]
    fn few_tiles_share_the_multiprocessors() {
        let split_k = |m, n, k| Division::new(&FORMS, (m, n, k), 132, 0).config.split_k;
        assert_eq!(split_k(65, 4096, 4096), 3);
        assert_eq!(split_k(256, 14336, 4096), 1);
        // Thirty-two clusters of four would run one after another.
        assert_eq!(split_k(128, 4096, 14336), 3);
    }

    #[test]
    fn ranges_cover_all_stages_and_fit_in_their_workspace() {
        for (m, n, k) in [
            (256, 14336, 4096),
            (512, 14336, 4096),
            (1024, 4096, 14336),
            (200, 128, 256),
            (128, 18944, 3584),
            (64, 9, 256),
        ] {
            let division @ Division { form, config, blocks, time } = Division::new(&FORMS, (m, n, k), 132, usize::MAX);
            let stages = m.div_ceil(form.tokens) * n.div_ceil(ROWS) * k.div_ceil(SCALES_K);
            assert!(time <= Division::new(&FORMS, (m, n, k), 132, 0).time);
            if config.ranges > 0 {
                assert!(k.div_ceil(SCALES_K).is_multiple_of(config.range_unit as usize), "{m} {n} {k}");
                assert_eq!(blocks, config.ranges as u64);
                assert!((1..=stages.min(132)).contains(&(config.ranges as usize)), "{m} {n} {k}");
                assert!(division.sums().is_multiple_of(256));
            }
        }
        assert!(Division::new(&FORMS, (512, 14336, 4096), 132, usize::MAX).config.ranges == 132);
        // Two teams: a few more tiles than multiprocessors, which have whole rounds of the main loop or no ranges.
        for (m, n, k, ranges) in [
            (128, 18944, 3584, 132),
            (32, 18944, 3584, 132),
            (128, 11008, 4096, 132),
            (32, 18944, 3840, 0),
            (64, 14336, 4096, 0),
        ] {
            let forms = forms(m, k, BlockSize::new(64).unwrap());
            let Config { ranges: found, range_unit, .. } = Division::new(forms, (m, n, k), 132, usize::MAX).config;
            assert_eq!((found, found > 0 && range_unit != 2), (ranges, false), "{m} {n} {k}");
        }
        // No more memory than there is.
        assert!(Division::new(&FORMS, (512, 14336, 4096), 132, 1000).config.ranges == 0);
    }

    #[test]
    fn shapes_and_devices_that_are_not_for_it() {
        let most = 232_448;
        assert!(takes(HOPPER, most, DType::Bf16, (33, 1, 32)) && takes(HOPPER, most, DType::F16, (4096, 4096, 4096)));
        assert!(!takes(HOPPER, most, DType::F32, (64, 64, 64)));
        assert!(!takes(HOPPER, most, DType::Bf16, (64, 64, 48)) && !takes(HOPPER, most, DType::Bf16, (64, 64, 0)));
        assert!(!takes(HOPPER, most, DType::Bf16, (0, 64, 64)) && !takes(HOPPER, most, DType::Bf16, (64, 0, 64)));
        assert!(!takes(HOPPER, 101_376, DType::Bf16, (64, 64, 64)));
        // Its code is for one capability alone.
        for other in [Capability(8, 9), Capability(10, 0), Capability(12, 0)] {
            assert!(!takes(other, most, DType::Bf16, (64, 64, 64)));
        }
    }

    #[test]
    fn times_agree_with_what_was_measured() {
        // Microseconds on an H200 with bfloat16 and blocks of 64: this kernel, and a dense copy with cuBLAS, 0 for not asked.
        for (m, n, k, ours, dense) in [
            (64, 4096, 4096, 13.9, 0.0),
            (96, 4096, 4096, 15.8, 0.0),
            (128, 4096, 4096, 17.0, 0.0),
            (192, 4096, 4096, 19.3, 0.0),
            (256, 4096, 4096, 21.9, 28.1),
            (512, 4096, 4096, 30.6, 36.6),
            (1024, 4096, 4096, 51.3, 57.4),
            (64, 14336, 4096, 26.4, 0.0),
            (96, 14336, 4096, 30.5, 0.0),
            (128, 14336, 4096, 34.0, 0.0),
            (192, 14336, 4096, 46.0, 0.0),
            (256, 14336, 4096, 52.0, 82.4),
            (512, 14336, 4096, 104.0, 127.7),
            (1024, 14336, 4096, 187.1, 207.1),
            (64, 4096, 14336, 27.7, 0.0),
            (96, 4096, 14336, 31.5, 0.0),
            (128, 4096, 14336, 36.6, 0.0),
            (256, 4096, 14336, 60.3, 90.6),
            (512, 4096, 14336, 99.0, 117.6),
            (1024, 4096, 14336, 195.3, 208.3),
            (96, 18944, 3584, 34.5, 0.0),
            (128, 18944, 3584, 39.3, 0.0),
            (96, 28672, 8192, 111.4, 0.0),
            (128, 28672, 8192, 128.9, 0.0),
            (128, 27648, 5120, 81.6, 0.0),
            (128, 11008, 4096, 32.9, 0.0),
            (256, 28672, 8192, 205.0, 345.4),
        ] {
            let Division { time, .. } = Division::new(&FORMS, (m, n, k), 132, usize::MAX);
            assert!((time / ours - 1.0_f64).abs() < 0.16, "{m} {n} {k}: {time}");
            if dense > 0.0 {
                let other = dense_time((m, n, k), 132);
                assert!((other / dense - 1.0_f64).abs() < 0.12, "{m} {n} {k}: {other}");
                // Whichever was faster is the one that is taken.
                assert_eq!(time < MARGIN * other, ours < dense, "{m} {n} {k}");
            }
        }
    }

    #[test]
    fn times_of_block_sums_agree_with_what_was_measured() {
        // Microseconds on an H200 with bfloat16 and blocks of 64: this kernel, and that for few rows, 0 for more than it takes.
        for (m, n, k, ours, few) in [
            (32, 14336, 4096, 19.0, 21.7),
            (48, 14336, 4096, 20.8, 0.0),
            (64, 14336, 4096, 22.9, 0.0),
            (32, 4096, 14336, 20.2, 27.6),
            (48, 4096, 14336, 22.2, 0.0),
            (64, 4096, 14336, 24.8, 0.0),
            (32, 4096, 4096, 11.0, 9.9),
            (64, 4096, 4096, 12.5, 0.0),
            (32, 28672, 8192, 62.3, 71.5),
            (64, 28672, 8192, 86.3, 0.0),
            (32, 18944, 3584, 23.0, 0.0),
            (48, 18944, 3584, 25.0, 0.0),
            (64, 18944, 3584, 27.3, 0.0),
            (32, 27648, 5120, 39.5, 0.0),
            (64, 27648, 5120, 51.5, 0.0),
            (32, 8192, 28672, 58.7, 86.6),
            (32, 3072, 8192, 12.2, 17.2),
            (32, 8192, 3072, 10.7, 13.2),
            (32, 11008, 4096, 18.1, 19.7),
            (32, 4096, 11008, 18.3, 22.5),
            (32, 8192, 8192, 19.8, 25.9),
            (64, 8192, 8192, 24.1, 0.0),
            (32, 3072, 3072, 7.5, 8.6),
            (32, 128_256, 4096, 146.9, 177.2),
        ] {
            let blocksize = BlockSize::new(64).unwrap();
            let time = Division::new(forms(m, k, blocksize), (m, n, k), 132, usize::MAX).time;
            assert!((time / ours - 1.0_f64).abs() < 0.2, "{m} {n} {k}: {time}");
            if few > 0.0 {
                let other = small_m::time((m, n, k), false);
                assert!((other / few - 1.0_f64).abs() < 0.2, "{m} {n} {k}: {other}");
                // Whichever was faster is the one that is taken.
                assert_eq!(time < other, ours < few, "{m} {n} {k}: {time} {other}");
            }
        }
    }

    #[test]
    fn which_kernels_take_a_weight() {
        let blocksize = |values| BlockSize::new(values).unwrap();
        let most = |m, k, values| forms(m, k, blocksize(values)).last().unwrap().tokens;
        assert_eq!([most(17, 4096, 64), most(64, 64, 4096)], [64, 64]);
        // More rows; blocks that end inside of a k-tile.
        assert_eq!([most(65, 4096, 64), most(64, 4096, 32), most(64, 4128, 64)], [256, 256, 256]);
    }

    #[test]
    fn small_layers_are_the_kernels() {
        // A dense copy is two launches more: on the host they take longer than either way on the device.
        for (n, k) in [(64, 64), (256, 1024), (1024, 1024)] {
            for m in [FEW_ROWS + 1, 64, 128] {
                assert!(Division::new(&FORMS, (m, n, k), 132, usize::MAX).time < MARGIN * dense_time((m, n, k), 132));
            }
        }
    }

    #[test]
    fn shared_memory_is_what_a_block_may_have() {
        let bytes = FORMS.map(|form| form.shared);
        assert!(bytes.iter().all(|&bytes| bytes <= 232_448), "{bytes:?}");
        assert_eq!(bytes[2], 4 * 16384 + 65536 + 4 * 8192 + 2 * 4096 + 1024 + 168);
        // y in place of the table, planes in that of scales.
        assert_eq!(bytes[4], 4 * 32768 + 32768 + 3 * 8192 + 4 * 8192 + 1024 + 176);
    }
}
