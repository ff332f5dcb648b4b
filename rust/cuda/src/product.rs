//! Products with a 4-bit weight that is not unpacked before.

use halfbyte::codebook::QuantType;
use halfbyte::dtype::DType;
use halfbyte::error::{Error, Result};
use halfbyte::geometry::{BlockSize, packed_len};

use super::blockwise4::quant_type_parameter;
use super::decode::{AnyPlan, DECODE_BLOCK, Decode, suits_ring};
use super::driver::{Device, Stream};
use super::gemm::{Gemm, beats_few, codebook};
use super::kernels::{self, Kernel};
use super::launch::parameters;
use super::memory::{Memory, Scales, block_shift};

/// `y[m][n] = x[m][k] · W[n][k]ᵀ + bias[n]`, row-major.
#[derive(Debug, Clone, Copy)]
pub struct Product<'a> {
    /// `[m][k]`, of the type in which the product is made.
    pub x: &'a Memory,
    /// The codes of `W`, uint8.
    pub packed: &'a Memory,
    /// The scales of `W`.
    pub scales: &'a Scales,
    /// `[n]`, of the type of `x`.
    pub bias: Option<&'a Memory>,
    /// `[m][n]`, of the type of `x`.
    pub y: &'a Memory,
    /// Rows of `x`.
    pub m: usize,
    /// Rows of `W`.
    pub n: usize,
    /// Columns of both.
    pub k: usize,
    /// The codebook of `W`.
    pub quant_type: QuantType,
    /// Values of `W` that share a scale.
    pub blocksize: BlockSize,
}

/// The kernel that [`product`] used: its name begins with `decode`, `gemm` or `product`.
pub type KernelName = &'static str;

/// Elements of `y` that a block of threads makes: one for each warp.
const PRODUCT_ELEMENTS: usize = kernels::product::WARPS;

fn product_kernel(dtype: DType, nested: bool) -> &'static Kernel {
    match (dtype, nested) {
        (DType::Bf16, false) => &kernels::PRODUCT_BF16,
        (DType::Bf16, true) => &kernels::PRODUCT_BF16_NESTED,
        (DType::F16, false) => &kernels::PRODUCT_F16,
        (DType::F16, true) => &kernels::PRODUCT_F16_NESTED,
        (_, false) => &kernels::PRODUCT_F32,
        (_, true) => &kernels::PRODUCT_F32_NESTED,
    }
}

impl Product<'_> {
    /// `count` rows of `x` from `begin` on, and of `y`.
    fn rows(&self, begin: usize, count: usize) -> (Memory, Memory) {
        (self.x.part(begin * self.k, count * self.k), self.y.part(begin * self.n, count * self.n))
    }

    /// A launch for `m` rows.
    fn decode(&self, device: &Device, ring: bool, m: usize) -> Option<Decode> {
        let suits = self.blocksize.get() >= DECODE_BLOCK
            && self.x.is_aligned(16)
            && self.packed.is_aligned(if ring { 16 } else { 8 })
            && (!ring || self.suits_ring());
        if !suits {
            return None;
        }
        Decode::new(device, ring, self.x.dtype(), self.scales.is_nested(), (m, self.n, self.k))
    }

    /// The launch of the kernel for more than a few rows, when it takes the arguments.
    fn gemm(&self, device: &Device) -> Option<Gemm> {
        if !Gemm::reaches(self.x.address(), self.packed.address()) {
            return None;
        }
        Gemm::new(device, self.x.dtype(), (self.m, self.n, self.k))
    }

    fn suits_ring(&self) -> bool {
        let (aligned, codes) = match self.scales {
            Scales::Plain(_) => (true, None),
            Scales::Nested { codes, .. } => (codes.is_aligned(4), Some(codes.count())),
        };
        aligned && suits_ring(self.n, self.k, codes)
    }

    fn check(&self) -> Result<usize> {
        let floats = [DType::F16, DType::Bf16, DType::F32];
        let dtype = self.x.of(&floats)?.dtype();
        let size = |argument, a: usize, b: usize| {
            a.checked_mul(b)
                .filter(|&count| i64::try_from(count).is_ok())
                .ok_or_else(|| Error::argument(argument, format!("{a} x {b}"), "of less than 2^63 elements"))
        };
        self.x.long(size("x", self.m, self.k)?, "m x k")?;
        self.y.of(&[dtype])?.long(size("y", self.m, self.n)?, "m x n")?;
        let values = size("packed", self.n, self.k)?;
        self.packed.of(&[DType::U8])?.long(packed_len(values), "two codes to a byte")?;
        if let Some(bias) = self.bias {
            bias.of(&[dtype])?.long(self.n, "one per row of the weight")?;
        }
        Ok(values)
    }
}

/// Which kernel makes a product.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Choice {
    /// The fastest that takes the arguments.
    #[default]
    Best,
    /// With the matrix units, the weight by way of shared memory.
    DecodeRing,
    /// With the matrix units, the weight by way of registers.
    Decode,
    /// With the matrix units of a warpgroup, for more than a few rows.
    Gemm,
    /// The plain one.
    Plain,
}

impl Choice {
    const NAMES: [(&'static str, Self); 5] = [
        ("best", Self::Best),
        ("decode_ring", Self::DecodeRing),
        ("decode", Self::Decode),
        ("gemm", Self::Gemm),
        ("plain", Self::Plain),
    ];

    /// The kernels to try, best first.
    fn decoders(self) -> &'static [bool] {
        match self {
            Self::Best => &[true, false],
            Self::DecodeRing => &[true],
            Self::Decode => &[false],
            Self::Gemm | Self::Plain => &[],
        }
    }
}

impl std::str::FromStr for Choice {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let legal = Self::NAMES.map(|(name, _)| name);
        let found = Self::NAMES.into_iter().find(|(n, _)| *n == name);
        found.map(|(_, c)| c).ok_or_else(|| Error::argument("kernel", format!("{name:?}"), format!("one of {legal:?}")))
    }
}

/// Makes the product; gives the name of the kernel that it used (first).
///
/// The matrix units take float16 and bfloat16 on devices of compute capability 8.0 and later, when `k` is a multiple of 64,
/// the block size at least 64, and `x` and `packed` aligned to 16 bytes; with [`rows_at_once`](super::rows_at_once) rows of
/// `x` in a launch, of which there are as many as it takes. There each weight is its codebook value rounded to the type of
/// `x`, and the scale is applied in float32 to the sums of a block. On devices of compute capability 9.0 more than 32 rows
/// go to a kernel with warpgroup products, when `k` is a multiple of 32: there each weight is what
/// dequantizing gives. Everything else goes to a plain kernel: correct, and slow for many rows.
///
/// The result is the same from run to run on one device; sums are float32.
///
/// # Errors
/// [`Error::Argument`] for a dtype or a length that does not fit, and when the kernel chosen does not take the arguments;
/// [`Error::Cuda`] when the launch fails.
///
/// # Safety
/// The memory is of this device, stays valid until the kernel has ended on `stream`, and is not written by others; `y` is
/// neither read nor written by others, and shares nothing with the inputs. The stream is of this device.
pub unsafe fn product(device: &Device, stream: Stream, product: &Product<'_>, choice: Choice) -> Result<KernelName> {
    let values = product.check()?;
    let scales = product.scales.parameter(values, product.blocksize)?;
    let bias = product.bias.map_or(0, Memory::address);
    let shift = block_shift(product.blocksize);
    let quant_type = quant_type_parameter(product.quant_type);
    let packed = product.packed.address();
    let (m, n, k) = (product.m, product.n, product.k);
    let gemm = match choice {
        Choice::Gemm => product.gemm(device),
        Choice::Best if beats_few(m) => product.gemm(device),
        Choice::Best | Choice::DecodeRing | Choice::Decode | Choice::Plain => None,
    };
    if let Some(gemm) = gemm {
        let (x, y) = (product.x.address(), product.y.address());
        let (x, codes) = gemm.maps(product.x.dtype(), (m, n, k), x, packed)?;
        let (codebook, plan) = (codebook(product.quant_type), gemm.plan);
        let (m, n, k) = (m as i32, n as i32, k as i32);
        let parameters = parameters![x, codes, scales, codebook, bias, y, m, n, k, shift, plan];
        let blocks = (gemm.blocks, gemm.cluster);
        // SAFETY: the kernel's parameters in its order; lengths and alignment were checked, it waits before it touches what
        // earlier ones write, the rest is the caller's.
        unsafe { device.launch_early_in_clusters(stream, gemm.kernel, blocks, gemm.shared, parameters) }?;
        return Ok(gemm.kernel.name);
    }
    for &ring in choice.decoders() {
        let at_once = Decode::rows_at_once(ring);
        let Some(first) = product.decode(device, ring, m.min(at_once)) else {
            continue;
        };
        for begin in (0..m).step_by(at_once) {
            let count = at_once.min(m - begin);
            // All launches are like the first, but the last may have fewer rows; what suits some rows suits fewer.
            let decode = if count == at_once.min(m) { Some(first) } else { product.decode(device, ring, count) };
            let Some(Decode { kernel, plan, blocks, shared }) = decode else {
                return Err(Error::argument("m", m, format!("a number of rows that {} takes", first.kernel.name)));
            };
            let (x, y) = product.rows(begin, count);
            let (x, y) = (x.address(), y.address());
            let (m, n, k) = (count as i32, n as i32, k as i32);
            // SAFETY: the kernel's parameters in its order; lengths and alignment were checked, the one that starts early
            // waits, the rest is the caller's.
            unsafe {
                match plan {
                    AnyPlan::Registers(plan) => {
                        let parameters = parameters![x, packed, scales, bias, y, m, n, k, shift, quant_type, plan];
                        device.launch(stream, kernel, blocks, shared, parameters)
                    }
                    AnyPlan::Ring(plan) => {
                        let parameters = parameters![x, packed, scales, bias, y, m, n, k, shift, quant_type, plan];
                        device.launch_early(stream, kernel, blocks, shared, parameters)
                    }
                }
            }?;
        }
        return Ok(first.kernel.name);
    }
    if matches!(choice, Choice::Decode | Choice::DecodeRing | Choice::Gemm) {
        let expected = "\"best\", because this kernel does not take these arguments on this device";
        return Err(Error::argument("kernel", format!("{choice:?}"), expected));
    }
    let kernel = product_kernel(product.x.dtype(), product.scales.is_nested());
    let blocks = (m * n).div_ceil(PRODUCT_ELEMENTS) as u64;
    let (x, y) = (product.x.address(), product.y.address());
    let (m, n, k) = (m as i64, n as i64, k as i64);
    let parameters = parameters![x, packed, scales, bias, y, m, n, k, shift, quant_type];
    // SAFETY: as above.
    unsafe { device.launch(stream, kernel, blocks, 0, parameters) }?;
    Ok(kernel.name)
}
