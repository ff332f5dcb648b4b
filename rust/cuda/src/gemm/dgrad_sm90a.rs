//! Gradients of `x` of products with a 4-bit weight by warpgroups (kernels/gemm/dgrad_sm90a): which shapes the kernel takes, and
//! how long it takes beside a dense copy of the weight.

use halfbyte::codebook::QuantType;
use halfbyte::dtype::DType;
use halfbyte::error::{Error, Result};
use halfbyte::geometry::{BlockSize, packed_len};

use crate::capability::Capability;
use crate::driver::{Device, Stream};
use crate::gemm::division::{ALIGNMENT, COLUMNS, Division, Form, ONE_TILE, counts, dense_time, has, reaches};
use crate::gemm::workspace::Workspace;
use crate::kernels::{
    self, gemm_4bit_dgrad_sm90a_bf16_64 as bf16_64, gemm_4bit_dgrad_sm90a_bf16_128 as bf16_128,
    gemm_4bit_dgrad_sm90a_bf16_256 as bf16_256,
};
use crate::launch::parameters;
use crate::memory::{Memory, Scales, block_shift, elements};

/// `dx[m][k] = dy[m][n] · W[n][k]`, row-major.
#[derive(Debug, Clone, Copy)]
pub struct Dgrad4bit<'a> {
    /// `[m][n]`, of the type in which the product is made.
    pub dy: &'a Memory,
    /// The codes of `W`, uint8.
    pub packed: &'a Memory,
    /// The scales of `W`.
    pub scales: &'a Scales,
    /// `[m][k]`, of the type of `dy`.
    pub dx: &'a Memory,
    /// Rows of `dy`.
    pub m: usize,
    /// Rows of `W`.
    pub n: usize,
    /// Columns of `W`.
    pub k: usize,
    /// The codebook of `W`.
    pub quant_type: QuantType,
    /// Values of `W` that share a scale.
    pub blocksize: BlockSize,
    /// As many bytes as [`dgrad_workspace`] says, or none: then the product may take longer.
    pub workspace: Option<&'a Memory>,
}

/// What `n` is a multiple of: the rows of `dy` begin at multiples of 16 bytes.
const ROW_MULTIPLE: usize = 8;

/// The forms of the kernel; times of a step measured on an H200.
const FORMS: [Form; 3] = [
    Form {
        tokens: 64,
        range_unit: ONE_TILE,
        wave: 5.5,
        step: 0.428,
        shared: bf16_64::SHAPE_64_1_BYTES,
        bf16: &kernels::GEMM_4BIT_DGRAD_SM90A_BF16_64,
        f16: &kernels::GEMM_4BIT_DGRAD_SM90A_F16_64,
    },
    Form {
        tokens: 128,
        range_unit: ONE_TILE,
        wave: 5.5,
        step: 0.525,
        shared: bf16_128::SHAPE_128_1_BYTES,
        bf16: &kernels::GEMM_4BIT_DGRAD_SM90A_BF16_128,
        f16: &kernels::GEMM_4BIT_DGRAD_SM90A_F16_128,
    },
    Form {
        tokens: 256,
        range_unit: ONE_TILE,
        wave: 5.5,
        step: 0.766,
        shared: bf16_256::SHAPE_256_1_BYTES,
        bf16: &kernels::GEMM_4BIT_DGRAD_SM90A_BF16_256,
        f16: &kernels::GEMM_4BIT_DGRAD_SM90A_F16_256,
    },
];

/// Rows up to which the kernel was faster. For more, power limits the clock, and dequantizing takes some of it for each tile of
/// rows anew.
const MOST_ROWS: usize = 768;

/// Whether a shape and a type are for the kernel at all.
fn takes(capability: Capability, shared_per_block: u32, dtype: DType, (m, n, k): (usize, usize, usize)) -> bool {
    has(&FORMS, capability, shared_per_block)
        && counts(dtype, (m, k, n))
        && n.is_multiple_of(ROW_MULTIPLE)
        && k.is_multiple_of(COLUMNS)
}

/// If the kernel makes the gradient of `m` rows of `x`, of a weight `[n][k]`, in less time than a dense copy and a product with
/// that, the bytes of the workspace with which it does. `dy` and the codes have to begin at multiples of 16 bytes.
pub fn dgrad_workspace(device: &Device, dtype: DType, (m, n, k): (usize, usize, usize)) -> Option<usize> {
    if m > MOST_ROWS || !takes(device.capability(), device.shared_per_block(), dtype, (m, n, k)) {
        return None;
    }
    let multiprocessors = device.multiprocessors() as usize;
    let division = Division::new(&FORMS, (m, k, n), multiprocessors, usize::MAX);
    (division.time < dense_time((m, n, k), multiprocessors)).then(|| division.workspace())
}

impl Dgrad4bit<'_> {
    fn check(&self, device: &Device) -> Result<usize> {
        let dtype = self.dy.of(&[DType::F16, DType::Bf16])?.dtype();
        self.dy.long(elements("dy", self.m, self.n)?, "m x n")?;
        self.dx.of(&[dtype])?.long(elements("dx", self.m, self.k)?, "m x k")?;
        let values = elements("packed", self.n, self.k)?;
        self.packed.of(&[DType::U8])?.long(packed_len(values), "two codes to a byte")?;
        if let Some(workspace) = self.workspace {
            workspace.of(&[DType::U8])?;
        }
        let shape = (self.m, self.n, self.k);
        if !takes(device.capability(), device.shared_per_block(), dtype, shape) {
            let expected = "at least 1 x 8 x 32, n a multiple of 8 and k of 32, on a device of compute capability 9.0";
            return Err(Error::argument("m x n x k", format!("{shape:?}"), expected));
        }
        for (argument, memory) in [("dy", self.dy), ("packed", self.packed)] {
            if !reaches(memory.address()) {
                let expected = format!("a multiple of {ALIGNMENT} bytes");
                return Err(Error::argument(argument, format!("{:#x}", memory.address()), expected));
            }
        }
        Ok(values)
    }
}

/// Makes the gradient of `x`.
///
/// The weight is what dequantizing gives; sums are float32, in an order that does not change from run to run on one device.
///
/// # Errors
/// [`Error::Argument`] for a dtype, a length or an address that does not fit, and for a device or a shape that the kernel does
/// not take; [`Error::Cuda`] when the launch fails.
///
/// # Safety
/// The memory is of this device, stays valid until the kernel has ended on `stream`, and is not written by others; `dx` is
/// neither read nor written by others, and shares nothing with the inputs. The stream is of this device.
pub unsafe fn dgrad_4bit(device: &Device, stream: Stream, product: &Dgrad4bit<'_>) -> Result<()> {
    let values = product.check(device)?;
    let scales = product.scales.parameter(values, product.blocksize)?;
    let (m, n, k, dtype) = (product.m, product.n, product.k, product.dy.dtype());
    let available = product.workspace.filter(|workspace| workspace.is_aligned(16)).map_or(0, Memory::count);
    let division = Division::new(&FORMS, (m, k, n), device.multiprocessors() as usize, available);
    let Division { form, config, blocks, .. } = division;
    let (dy, codes) = division.maps(dtype, (product.dy.address(), m, n), (product.packed.address(), n, k))?;
    let (codebook, shift, dx) = (*product.quant_type.values(), block_shift(product.blocksize), product.dx.address());
    let (m, n, k) = (m as i32, n as i32, k as i32);
    let workspace = Workspace::new(product.workspace.map_or(0, Memory::address), division.sums());
    let parameters = parameters![dy, codes, scales, codebook, dx, m, n, k, shift, config, workspace];
    let blocks = (blocks, config.split_k as u32);
    // SAFETY: the kernel's parameters in its order; lengths and alignment were checked, it waits before it touches what
    // earlier ones write, the rest is the caller's.
    unsafe { device.launch_early_in_clusters(stream, form.kernel(dtype), blocks, form.shared as u32, parameters) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::division::{ROWS, SCALES_K};

    const HOPPER: Capability = Capability(9, 0);

    #[test]
    fn shapes_and_devices_that_are_not_for_it() {
        let most = 232_448;
        assert!(takes(HOPPER, most, DType::Bf16, (1, 8, 32)) && takes(HOPPER, most, DType::F16, (4096, 4096, 4096)));
        assert!(!takes(HOPPER, most, DType::F32, (64, 64, 64)));
        assert!(!takes(HOPPER, most, DType::Bf16, (64, 60, 64)) && !takes(HOPPER, most, DType::Bf16, (64, 64, 48)));
        assert!(!takes(HOPPER, most, DType::Bf16, (0, 64, 64)) && !takes(HOPPER, most, DType::Bf16, (64, 0, 64)));
        assert!(!takes(HOPPER, 101_376, DType::Bf16, (64, 64, 64)));
        // Its code is for one capability alone.
        for other in [Capability(8, 9), Capability(10, 0), Capability(12, 0)] {
            assert!(!takes(other, most, DType::Bf16, (64, 64, 64)));
        }
    }

    #[test]
    fn times_agree_with_what_was_measured() {
        // Microseconds on an H200 with bfloat16 and blocks of 64: this kernel, and a dense copy with cuBLAS.
        for (m, n, k, ours, dense) in [
            (64, 4096, 4096, 16.6, 21.0),
            (128, 4096, 4096, 20.9, 24.8),
            (256, 4096, 4096, 25.2, 26.4),
            (512, 4096, 4096, 34.1, 35.7),
            (16, 14336, 4096, 34.3, 75.0),
            (64, 14336, 4096, 34.5, 77.1),
            (128, 14336, 4096, 41.7, 80.1),
            (256, 14336, 4096, 58.9, 89.5),
            (512, 14336, 4096, 104.8, 118.1),
            (64, 4096, 14336, 33.6, 75.3),
            (128, 4096, 14336, 40.3, 76.1),
            (256, 4096, 14336, 55.7, 85.9),
            (512, 4096, 14336, 119.2, 126.9),
        ] {
            let Division { time, .. } = Division::new(&FORMS, (m, k, n), 132, usize::MAX);
            assert!((time / ours - 1.0_f64).abs() < 0.12, "{m} {n} {k}: {time}");
            let other = dense_time((m, n, k), 132);
            assert!((other / dense - 1.0_f64).abs() < 0.15, "{m} {n} {k}: {other}");
            assert!(time < other, "{m} {n} {k}");
        }
        // A few columns of very many rows: a dense copy is made faster.
        assert!(Division::new(&FORMS, (64, 32, 65536), 132, usize::MAX).time > dense_time((64, 65536, 32), 132));
    }

    #[test]
    fn every_row_of_the_weight_is_in_a_part() {
        for (m, n, k) in [(1, 8, 32), (64, 14336, 4096), (256, 4096, 14336), (300, 1032, 96), (4096, 264, 4096)] {
            let Division { form, config, blocks, time } = Division::new(&FORMS, (m, k, n), 132, 0);
            let (tiles, units, parts) =
                (config.token_tiles as usize, config.scales_stages as usize, config.split_k as usize);
            assert!(tiles * form.tokens >= m && (tiles - 1) * form.tokens < m, "{m} {n} {k}");
            assert_eq!(blocks as usize, tiles * k.div_ceil(ROWS) * parts);
            assert!(units * parts * SCALES_K >= n && units * (parts - 1) * SCALES_K < n, "{m} {n} {k}");
            assert!(config.ranges == 0 && time > 0.0 && time.is_finite());
        }
    }

    #[test]
    fn shared_memory_is_what_a_block_may_have() {
        let bytes = FORMS.map(|form| form.shared);
        assert!(bytes.iter().all(|&bytes| bytes <= 232_448), "{bytes:?}");
        assert_eq!(bytes[2], 4 * 32768 + 65536 + 3 * 8192 + 2 * 4096 + 1024 + 144);
    }
}
