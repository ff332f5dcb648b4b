//! The products of LoRA adapters (kernels/lora): a matrix by one of the two small factors, with the casts and the addition around it.

use std::sync::LazyLock;

use halfbyte::dtype::DType;
use halfbyte::error::{Error, Result};

use super::driver::{Device, Stream};
use super::kernels::{self, Kernel, lora_down as down, lora_up as up};
use super::launch::parameters;
use super::memory::{Memory, elements};

/// The largest rank that there are kernels for.
const MOST_RANK: usize = 64;
/// What columns are a multiple of: of 16-bit values so many are 16 bytes.
const COLUMNS: usize = 8;
/// Of everything with columns, in bytes.
const ALIGNMENT: u64 = 16;
/// Blocks of threads of `lora_up` for each multiprocessor: as many as it takes at once, since each reads the factor anew.
const UP_BLOCKS: u64 = 3;
/// The same where a thread has more registers: with more than 32 ranks, or twice as many columns.
const UP_BLOCKS_LARGE: u64 = 2;

/// A factor of an adapter, by which `[rows][columns]` becomes `[rows][rank]`, or the other way round.
#[derive(Debug, Clone, Copy)]
pub struct Factor<'a> {
    /// `[rank][columns]`, or with `transposed` `[columns][rank]`, which [`lora_up`] alone takes: float32, or of the products' type.
    pub values: &'a Memory,
    /// 1 to 64.
    pub rank: usize,
    /// A multiple of 8.
    pub columns: usize,
    /// Whether the columns are the first dimension.
    pub transposed: bool,
}

/// What kernels take for [`Factor`].
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct FactorParameter {
    values: u64,
    rank_stride: i32,
    column_stride: i32,
    rank: i32,
    is_float: i32,
}

impl Factor<'_> {
    fn parameter(&self, dtype: DType) -> Result<FactorParameter> {
        let Self { values, rank, columns, transposed } = *self;
        if !(1..=MOST_RANK).contains(&rank) {
            return Err(Error::argument("rank", rank, format!("1 to {MOST_RANK}")));
        }
        if columns == 0 || !columns.is_multiple_of(COLUMNS) || i32::try_from(columns * MOST_RANK).is_err() {
            let expected = format!("a multiple of {COLUMNS}, less than 2^31 / {MOST_RANK}");
            return Err(Error::argument("columns", columns, expected));
        }
        values.of(&[DType::F32, dtype])?.long(rank * columns, "rank x columns")?;
        let (rank_stride, column_stride) = if transposed { (1, rank) } else { (columns, 1) };
        Ok(FactorParameter {
            values: values.address(),
            rank_stride: rank_stride as i32,
            column_stride: column_stride as i32,
            rank: rank as i32,
            is_float: i32::from(values.dtype() == DType::F32),
        })
    }
}

/// `[rows][columns]` in float32 or the products' type, where the kernels can read and write it.
fn matrix(memory: &Memory, argument: &'static str, dtype: DType, rows: usize, columns: usize) -> Result<u64> {
    memory.of(&[DType::F32, dtype])?.long(elements(argument, rows, columns)?, "rows x columns")?;
    if !memory.is_aligned(ALIGNMENT) {
        let expected = format!("at an address that is a multiple of {ALIGNMENT}");
        return Err(Error::argument(argument, format!("{:#x}", memory.address()), expected));
    }
    Ok(memory.address())
}

/// Tiles of ranks and of rows in the kernels of lora_down, for each of the types of the products, of `x` and of the factor.
const DOWN: [(usize, usize); 4] = [(2, 1), (2, 2), (4, 2), (8, 2)];
/// Tiles of ranks in those of lora_up, for each of the types of the products, and of `y` and `out` together.
const UP: [usize; 3] = [1, 2, 4];

const PRODUCTS: [&str; 2] = ["bf16", "f16"];

static DOWN_KERNELS: LazyLock<Vec<&'static Kernel>> = LazyLock::new(|| {
    let types = PRODUCTS.into_iter().flat_map(|t| [t, "f32"].map(|x| (t, x)));
    let types = types.flat_map(|(t, x)| [t, "f32"].map(|factor| format!("{t}_{x}_{factor}")));
    types.flat_map(|types| DOWN.map(|(ranks, rows)| named(&format!("lora_down_{types}_{ranks}_{rows}")))).collect()
});
static UP_KERNELS: LazyLock<Vec<&'static Kernel>> = LazyLock::new(|| {
    let types = PRODUCTS
        .into_iter()
        .flat_map(|t| [[t, t], [t, "f32"], ["f32", "f32"]].map(|[y, out]| format!("{t}_{y}_{out}")));
    types.flat_map(|types| UP.map(|steps| named(&format!("lora_up_{types}_{steps}")))).collect()
});

fn named(name: &str) -> &'static Kernel {
    kernels::ALL.iter().find(|kernel| kernel.name == name).expect("a kernel of the source")
}

fn is_float(dtype: DType) -> usize {
    usize::from(dtype == DType::F32)
}

/// The kernel for products of a type, of `x` and a factor of theirs; and its tiles of rows, `wide` being whether many are wanted.
fn down_kernel(dtype: DType, x: DType, factor: DType, rank: usize, wide: bool) -> (&'static Kernel, usize) {
    let tiles = match rank.div_ceil(down::RANKS) {
        1 | 2 => usize::from(wide),
        3 | 4 => 2,
        _ => 3,
    };
    let types = 4 * usize::from(dtype == DType::F16) + 2 * is_float(x) + is_float(factor);
    (DOWN_KERNELS[types * DOWN.len() + tiles], DOWN[tiles].1)
}

/// The kernel for products of a type, and `y` and `out` of theirs.
fn up_kernel(dtype: DType, y: DType, out: DType, rank: usize) -> &'static Kernel {
    let steps = match rank.div_ceil(up::RANKS) {
        1 => 0,
        2 => 1,
        _ => 2,
    };
    let types = 3 * usize::from(dtype == DType::F16) + is_float(y) + is_float(out);
    UP_KERNELS[types * UP.len() + steps]
}

/// The largest rank that there are kernels for on a device; 0 if there are none.
pub fn lora_ranks(device: &Device) -> usize {
    if kernels::LORA_UP_BF16_F32_F32_1.suits(device.capability()) { MOST_RANK } else { 0 }
}

/// `h[rows][rank] = x · factorᵀ`.
#[derive(Debug, Clone, Copy)]
pub struct LoraDown<'a> {
    /// `[rows][columns]`: float32, or of the type of `h`.
    pub x: &'a Memory,
    /// By which it is multiplied.
    pub factor: &'a Factor<'a>,
    /// `[rows][columns]`, where `x` is float32: becomes `x` in the type of `h`.
    pub cast: Option<&'a Memory>,
    /// `[rows][rank]`: float16 or bfloat16, the type of the product.
    pub h: &'a Memory,
    /// Rows of `x`.
    pub rows: usize,
}

/// `out[rows][columns] = y + scaling · h · factor`.
#[derive(Debug, Clone, Copy)]
pub struct LoraUp<'a> {
    /// `[rows][columns]`: float32, or of the type of `h`; zeros if there is none.
    pub y: Option<&'a Memory>,
    /// `[rows][rank]`: float16 or bfloat16, the type of the product.
    pub h: &'a Memory,
    /// By which it is multiplied; of an even rank.
    pub factor: &'a Factor<'a>,
    /// The adapter's.
    pub scaling: f32,
    /// `[rows][columns]`: float32, or of the type of `h` where `y` is. It may be `y`.
    pub out: &'a Memory,
    /// `[rank][columns]`, of the type of `h`: becomes the factor, as [`lora_down`] takes it.
    pub turned: Option<&'a Memory>,
    /// Rows of `y`.
    pub rows: usize,
}

/// Launches the first product of an adapter.
///
/// # Errors
/// [`Error::Argument`] for a dtype, a length or an alignment that does not fit; [`Error::Cuda`] when the launch fails.
///
/// # Safety
/// The memory is of this device, stays valid until the kernel has ended on `stream`, and is not written by others; `cast` and `h`
/// are neither read nor written by others, and share nothing with each other or the inputs. The stream is of this device.
pub unsafe fn lora_down(device: &Device, stream: Stream, product: &LoraDown<'_>) -> Result<()> {
    let LoraDown { x, factor, cast, h, rows } = *product;
    let dtype = h.of(&[DType::F16, DType::Bf16])?.dtype();
    let parameter = factor.parameter(dtype)?;
    if factor.transposed || !factor.values.is_aligned(ALIGNMENT) {
        let expected = format!("[rank][columns], at an address that is a multiple of {ALIGNMENT}");
        return Err(Error::argument("factor", format!("{:#x}", factor.values.address()), expected));
    }
    let columns = factor.columns;
    let x_address = matrix(x, "x", dtype, rows, columns)?;
    let cast = cast.map_or(Ok(0), |cast| matrix(cast.of(&[dtype])?, "cast", dtype, rows, columns))?;
    h.long(rows * factor.rank, "rows x rank")?;
    if rows == 0 {
        return Ok(());
    }
    if cast == 0 && x.dtype() == DType::F32 {
        return Err(Error::argument("cast", "none", "given where x is float32"));
    }
    // Larger tiles read the factor less often, if there are enough for all multiprocessors.
    let wide = rows >= down::ROWS * device.multiprocessors() as usize;
    let (kernel, row_tiles) = down_kernel(dtype, x.dtype(), factor.values.dtype(), factor.rank, wide);
    let blocks = rows.div_ceil(down::ROWS * row_tiles) as u64;
    let (h, m, columns) = (h.address(), rows as i64, columns as i32);
    // SAFETY: the kernel's parameters in its order; lengths were checked, the rest is the caller's.
    unsafe { device.launch(stream, kernel, blocks, 0, parameters![x_address, parameter, cast, h, m, columns]) }
}

/// Launches the second product of an adapter.
///
/// # Errors
/// [`Error::Argument`] for a dtype, a length or an alignment that does not fit, and for an odd rank; [`Error::Cuda`] when the launch
/// fails.
///
/// # Safety
/// As [`lora_down`]; but `out` may be `y`, if they are of one type.
pub unsafe fn lora_up(device: &Device, stream: Stream, product: &LoraUp<'_>) -> Result<()> {
    let LoraUp { y, h, factor, scaling, out, turned, rows } = *product;
    let dtype = h.of(&[DType::F16, DType::Bf16])?.dtype();
    let parameter = factor.parameter(dtype)?;
    if !factor.rank.is_multiple_of(2) {
        return Err(Error::argument("rank", factor.rank, "even"));
    }
    let columns = factor.columns;
    let y_address = y.map_or(Ok(0), |y| matrix(y, "y", dtype, rows, columns))?;
    let out_address = matrix(out, "out", dtype, rows, columns)?;
    let y_dtype = y.map_or(out.dtype(), Memory::dtype);
    if is_float(y_dtype) > is_float(out.dtype()) {
        return Err(Error::argument("out", out.dtype().as_str(), "float32 where y is"));
    }
    let turned = match turned {
        None => 0,
        Some(turned) => turned.of(&[dtype])?.long(factor.rank * columns, "rank x columns")?.address(),
    };
    h.long(rows * factor.rank, "rows x rank")?;
    if rows == 0 {
        return Ok(());
    }
    let twice = if out.dtype() == DType::F32 || factor.rank > 32 { 1 } else { 2 };
    let across = columns.div_ceil(up::WARPS * up::COLUMNS * twice);
    let large = factor.rank > 32 || out.dtype() != DType::F32;
    let resident = u64::from(device.multiprocessors()) * if large { UP_BLOCKS_LARGE } else { UP_BLOCKS };
    let parts = (resident / across as u64).max(1) as usize;
    let of_block = rows.div_ceil(parts).next_multiple_of(up::ROWS);
    let blocks = (rows.div_ceil(of_block) * across) as u64;
    let kernel = up_kernel(dtype, y_dtype, out.dtype(), factor.rank);
    let (h, m, columns, of_block) = (h.address(), rows as i64, columns as i32, of_block as i32);
    let parameters = parameters![y_address, h, parameter, scaling, out_address, turned, m, columns, of_block];
    // SAFETY: the kernel's parameters in its order; lengths were checked, the rest is the caller's.
    unsafe { device.launch(stream, kernel, blocks, 0, parameters) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(count: usize, dtype: DType) -> Memory {
        Memory::new("factor", 256, count, dtype).unwrap()
    }

    #[test]
    fn factors_that_kernels_take() {
        let of = |rank, columns, transposed, dtype| {
            let values = values(rank * columns, dtype);
            let factor = Factor { values: &values, rank, columns, transposed };
            factor.parameter(DType::Bf16).map(|p| (p.rank_stride, p.column_stride, p.is_float))
        };
        assert_eq!(of(16, 64, false, DType::F32).unwrap(), (64, 1, 1));
        assert_eq!(of(16, 64, true, DType::Bf16).unwrap(), (1, 16, 0));
        for (rank, columns, dtype) in
            [(0, 64, DType::F32), (65, 64, DType::F32), (16, 60, DType::F32), (16, 0, DType::F32)]
        {
            assert!(of(rank, columns, false, dtype).is_err(), "{rank} {columns}");
        }
        assert!(of(16, 64, false, DType::F16).is_err());
        let short = values(100, DType::F32);
        let factor = Factor { values: &short, rank: 16, columns: 64, transposed: false };
        assert!(factor.parameter(DType::Bf16).is_err());
    }

    #[test]
    fn every_rank_has_kernels() {
        let name = |dtype| match dtype {
            DType::F16 => "f16",
            DType::Bf16 => "bf16",
            _ => "f32",
        };
        for rank in 1..=MOST_RANK {
            for dtype in [DType::Bf16, DType::F16] {
                for (first, second) in
                    [(dtype, dtype), (dtype, DType::F32), (DType::F32, DType::F32), (DType::F32, dtype)]
                {
                    let types = format!("{}_{}_{}", name(dtype), name(first), name(second));
                    for wide in [false, true] {
                        let (kernel, rows) = down_kernel(dtype, first, second, rank, wide);
                        let tiles = kernel.name.strip_prefix(&format!("lora_down_{types}_")).unwrap();
                        let (ranks, of_rows) = tiles.split_once('_').unwrap();
                        assert!(ranks.parse::<usize>().unwrap() * down::RANKS >= rank && of_rows == rows.to_string());
                    }
                    if first == dtype || second == DType::F32 {
                        let kernel = up_kernel(dtype, first, second, rank);
                        let steps = kernel.name.strip_prefix(&format!("lora_up_{types}_")).unwrap();
                        assert!(steps.parse::<usize>().unwrap() * up::RANKS >= rank, "{rank}");
                    }
                }
            }
        }
    }
}
