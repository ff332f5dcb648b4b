//! Products with a 4-bit weight that is not unpacked before.

use halfbyte::codebook::QuantType;
use halfbyte::dtype::DType;
use halfbyte::error::{Error, Result};
use halfbyte::geometry::{BlockSize, packed_len};

use crate::blockwise4::quant_type_parameter;
use crate::driver::{Device, Stream};
use crate::launch::parameters;
use crate::memory::{Memory, Scales, block_shift, elements};

mod dgrad_sm90a;
mod division;
mod gemv;
mod simt;
mod small_m;
mod tile;
mod tile_sm90a;
pub(crate) mod workspace;

pub use dgrad_sm90a::{Dgrad4bit, dgrad_4bit, dgrad_workspace};
pub use gemv::{Gemv, gemv};
pub use small_m::rows_at_once;

use small_m::{AnyConfig, FEW_ROWS, Family, SmallM, suits_sm90};

/// `y[m][n] = x[m][k] · W[n][k]ᵀ + bias[n]`, row-major.
#[derive(Debug, Clone, Copy)]
pub struct Gemm4bit<'a> {
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
    /// As many bytes as [`tile_pays`] says, or none: then the product may take longer.
    pub workspace: Option<&'a Memory>,
}

/// The kernel that [`gemm_4bit`] used: its name begins with `gemm_4bit_small_m`, `gemm_4bit_tile` or `gemm_4bit_simt`.
pub type KernelName = &'static str;

impl Gemm4bit<'_> {
    /// `count` rows of `x` from `begin` on, and of `y`.
    fn rows(&self, begin: usize, count: usize) -> (Memory, Memory) {
        (self.x.part(begin * self.k, count * self.k), self.y.part(begin * self.n, count * self.n))
    }

    /// A launch for `m` rows.
    fn small_m(&self, device: &Device, family: Family, m: usize) -> Option<SmallM> {
        let sm90 = family == Family::Sm90;
        let suits = small_m::takes(self.k, self.blocksize)
            && self.x.is_aligned(16)
            && self.packed.is_aligned(if sm90 { 16 } else { 8 })
            && (!sm90 || self.suits_sm90());
        if !suits {
            return None;
        }
        SmallM::new(device, family, self.x.dtype(), self.scales.is_nested(), (m, self.n, self.k))
    }

    /// Of the workspace the bytes that can be used.
    fn workspace_bytes(&self) -> usize {
        self.workspace.filter(|workspace| workspace.is_aligned(16)).map_or(0, Memory::count)
    }

    /// The launch of a kernel for more than a few rows by warpgroups, when it takes the arguments; `always`, or where none for few
    /// rows is better.
    fn tile_sm90a(&self, device: &Device, always: bool) -> Option<tile_sm90a::Tile> {
        if !tile_sm90a::Tile::reaches(self.x.address(), self.packed.address()) {
            return None;
        }
        let few = !always && self.m <= FEW_ROWS && small_m::takes(self.k, self.blocksize);
        if few && self.m < tile_sm90a::FEWEST_ROWS {
            return None;
        }
        let shape = (self.m, self.n, self.k);
        let tile = tile_sm90a::Tile::new(device, self.x.dtype(), self.blocksize, shape, self.workspace_bytes())?;
        (!few || tile.beats_few(shape, self.scales.is_nested())).then_some(tile)
    }

    /// The same without warpgroups: by the kernels chosen, or those that the device prefers.
    fn tile(&self, device: &Device, choice: Choice) -> Option<tile::Tile> {
        if !tile::Tile::reaches(self.x.address(), self.packed.address()) {
            return None;
        }
        let weight = (self.x.dtype(), self.blocksize, self.scales.is_nested());
        let (shape, workspace) = ((self.m, self.n, self.k), self.workspace_bytes());
        match choice {
            Choice::Best => tile::Tile::preferred(device, weight, shape, workspace),
            Choice::TileSm80 => tile::Tile::new(device, tile::SM80, weight, shape, workspace),
            Choice::TileSm75 => tile::Tile::new(device, tile::SM75, weight, shape, workspace),
            _ => None,
        }
    }

    fn suits_sm90(&self) -> bool {
        let (aligned, codes) = match self.scales {
            Scales::Plain(_) => (true, None),
            Scales::Nested { codes, .. } => (codes.is_aligned(4), Some(codes.count())),
        };
        aligned && suits_sm90(self.n, self.k, codes)
    }

    fn check(&self) -> Result<usize> {
        let floats = [DType::F16, DType::Bf16, DType::F32];
        let dtype = self.x.of(&floats)?.dtype();
        self.x.long(elements("x", self.m, self.k)?, "m x k")?;
        self.y.of(&[dtype])?.long(elements("y", self.m, self.n)?, "m x n")?;
        let values = elements("packed", self.n, self.k)?;
        self.packed.of(&[DType::U8])?.long(packed_len(values), "two codes to a byte")?;
        if let Some(workspace) = self.workspace {
            workspace.of(&[DType::U8])?;
        }
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
    /// For few rows, the weight by way of shared memory: compute capability 9.0 and 10.0.
    SmallMSm90,
    /// For few rows, the weight by way of registers: compute capability 8.0 and later.
    SmallMSm80,
    /// The same in float16, without a table in shared memory: compute capability 7.5 and later.
    SmallMSm75,
    /// For more than a few rows, by warpgroups: compute capability 9.0.
    TileSm90a,
    /// For more than a few rows: compute capability 8.0 and later.
    TileSm80,
    /// The same in float16: compute capability 7.5 and later.
    TileSm75,
    /// The plain one.
    Simt,
}

impl Choice {
    const NAMES: [(&'static str, Self); 8] = [
        ("best", Self::Best),
        ("small_m_sm90", Self::SmallMSm90),
        ("small_m_sm80", Self::SmallMSm80),
        ("small_m_sm75", Self::SmallMSm75),
        ("tile_sm90a", Self::TileSm90a),
        ("tile_sm80", Self::TileSm80),
        ("tile_sm75", Self::TileSm75),
        ("simt", Self::Simt),
    ];

    fn as_str(self) -> &'static str {
        Self::NAMES.iter().find(|(_, choice)| *choice == self).map_or("best", |(name, _)| name)
    }

    /// The kernels for few rows to try, best first.
    fn small_m(self) -> &'static [Family] {
        match self {
            Self::Best => &[Family::Sm90, Family::Sm80, Family::Sm75],
            Self::SmallMSm90 => &[Family::Sm90],
            Self::SmallMSm80 => &[Family::Sm80],
            Self::SmallMSm75 => &[Family::Sm75],
            Self::TileSm90a | Self::TileSm80 | Self::TileSm75 | Self::Simt => &[],
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
/// The matrix units take float16 and bfloat16 on devices of compute capability 8.0 and later, and float16 on 7.5. Up to 32 rows
/// of `x`, on 7.5 up to 192 and on 9.0 up to 64, when `k` is a multiple of 64, the block size at least 64, and `x` and `packed`
/// aligned to 16 bytes: there each weight is its codebook value rounded to the type of `x`, and the scale is applied in float32
/// to the sums of a block; with [`rows_at_once`](super::rows_at_once) rows in a launch, of which there are as many as it takes.
/// More rows, and on 9.0 other weights whose `k` is a multiple of 32, go to kernels that multiply what dequantizing gives: on
/// 9.0 with warpgroup products; from 8.0 on some hundred rows with the products of warps, when `k` is a multiple of 64.
/// Everything else goes to a plain kernel: correct, and slow for many rows.
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
pub unsafe fn gemm_4bit(device: &Device, stream: Stream, product: &Gemm4bit<'_>, choice: Choice) -> Result<KernelName> {
    let values = product.check()?;
    let scales = product.scales.parameter(values, product.blocksize)?;
    let bias = product.bias.map_or(0, Memory::address);
    let shift = block_shift(product.blocksize);
    let quant_type = quant_type_parameter(product.quant_type);
    let packed = product.packed.address();
    let (m, n, k) = (product.m, product.n, product.k);
    if matches!(choice, Choice::TileSm90a | Choice::Best)
        && let Some(tile) = product.tile_sm90a(device, choice == Choice::TileSm90a)
    {
        let (x, y) = (product.x.address(), product.y.address());
        let (x, codes) = tile.maps(product.x.dtype(), (m, n, k), x, packed)?;
        let (codebook, config) = (codebook(product.quant_type), tile.config());
        let workspace = tile.workspace(product.workspace.map_or(0, Memory::address));
        let (m, n, k) = (m as i32, n as i32, k as i32);
        let parameters = parameters![x, codes, scales, codebook, bias, y, m, n, k, shift, config, workspace];
        let (blocks, shared) = tile.grid();
        // SAFETY: the kernel's parameters in its order; lengths and alignment were checked, it waits before it touches
        // what earlier ones write, the rest is the caller's.
        unsafe { device.launch_early_in_clusters(stream, tile.kernel, blocks, shared, parameters) }?;
        return Ok(tile.kernel.name);
    }
    if let Some(tile) = product.tile(device, choice) {
        let (x, y) = (product.x.address(), product.y.address());
        let (codebook, config) = (codebook(product.quant_type), tile.config);
        let workspace = tile.workspace(product.workspace.map_or(0, Memory::address));
        let (m, n, k) = (m as i32, n as i32, k as i32);
        let parameters = parameters![x, packed, scales, codebook, bias, y, m, n, k, shift, config, workspace];
        // SAFETY: the kernel's parameters in its order; lengths and alignment were checked, the rest is the caller's.
        unsafe { device.launch(stream, tile.kernel, tile.blocks, tile.shared, parameters) }?;
        return Ok(tile.kernel.name);
    }
    for &family in choice.small_m() {
        let at_once = SmallM::rows_at_once(family);
        let Some(first) = product.small_m(device, family, m.min(at_once)) else {
            continue;
        };
        for begin in (0..m).step_by(at_once) {
            let count = at_once.min(m - begin);
            // All launches are like the first, but the last may have fewer rows; what suits some rows suits fewer.
            let launch = if count == at_once.min(m) { Some(first) } else { product.small_m(device, family, count) };
            let Some(SmallM { kernel, config, blocks, shared }) = launch else {
                return Err(Error::argument("m", m, format!("a number of rows that {} takes", first.kernel.name)));
            };
            let (x, y) = product.rows(begin, count);
            let (x, y) = (x.address(), y.address());
            let (m, n, k) = (count as i32, n as i32, k as i32);
            // SAFETY: the kernel's parameters in its order; lengths and alignment were checked, the one that starts early
            // waits, the rest is the caller's.
            unsafe {
                match config {
                    AnyConfig::Sm80(config) => {
                        let parameters = parameters![x, packed, scales, bias, y, m, n, k, shift, quant_type, config];
                        device.launch(stream, kernel, blocks, shared, parameters)
                    }
                    AnyConfig::Sm90(config) => {
                        let parameters = parameters![x, packed, scales, bias, y, m, n, k, shift, quant_type, config];
                        device.launch_early(stream, kernel, blocks, shared, parameters)
                    }
                }
            }?;
        }
        return Ok(first.kernel.name);
    }
    if !matches!(choice, Choice::Best | Choice::Simt) {
        let expected = "\"best\", because this kernel does not take these arguments on this device";
        return Err(Error::argument("kernel", format!("{:?}", choice.as_str()), expected));
    }
    let kernel = simt::kernel(product.x.dtype(), product.scales.is_nested());
    let blocks = (m * n).div_ceil(simt::ELEMENTS) as u64;
    let (x, y) = (product.x.address(), product.y.address());
    let (m, n, k) = (m as i64, n as i64, k as i64);
    let parameters = parameters![x, packed, scales, bias, y, m, n, k, shift, quant_type];
    // SAFETY: as above.
    unsafe { device.launch(stream, kernel, blocks, 0, parameters) }?;
    Ok(kernel.name)
}

/// The codebook as the kernels for more than a few rows take it.
fn codebook(quant_type: QuantType) -> [f32; 16] {
    *quant_type.values()
}

/// If a kernel that reads the packed weight `[n][k]` is better than a dense copy of it and a product with that, for `m` rows of
/// `x`, the bytes of the workspace with which it is. `x` and the codes have to begin at multiples of 16 bytes; `nested`: the
/// scales. Up to [`rows_without_workspace`] only weights are meant that the kernels for few rows do not take.
pub fn tile_pays(
    device: &Device,
    dtype: DType,
    blocksize: BlockSize,
    nested: bool,
    shape: (usize, usize, usize),
) -> Option<usize> {
    let few = small_m::takes(shape.2, blocksize);
    let by_mma = || tile::Tile::preferred(device, (dtype, blocksize, nested), shape, usize::MAX);
    tile_sm90a::pays(device, dtype, (blocksize, nested), shape, few).or_else(|| by_mma().map(|tile| tile.workspace))
}

/// Rows of `x` up to which no kernel wants a workspace, if those for few rows take the weight.
pub fn rows_without_workspace(device: &Device) -> usize {
    if tile_sm90a::suits(device) {
        tile_sm90a::FEWEST_ROWS - 1
    } else {
        tile::rows_without(device).unwrap_or(usize::MAX)
    }
}
