//! LLM.int8(): activations to codes, products of codes with an 8-bit weight, and what becomes of the sums.
//!
//! The arithmetic is that of the processor's `linear`: exact int32 sums, then float32 operations in a fixed order. Without
//! outliers the bits are the same.

mod activations;
mod few;
mod plain;
mod tile;

use halfbyte::dtype::DType;
use halfbyte::error::{Error, Result};

use super::driver::{Device, Stream};
use super::memory::Memory;

use few::Few;
use tile::Tile;

pub use activations::quantize_rows_outliers;

/// Sums of more products of two codes may leave int32.
pub const MOST_COLUMNS: usize = (i32::MAX / (127 * 127)) as usize;

/// Rows of codes in the workspace begin at multiples of this, which the kernels' wide loads want.
const PITCH: usize = 16;

/// Where each part of the workspace begins.
const PART: usize = 256;

/// The kernel that made a product: its name begins with `int8_`.
pub type KernelName = &'static str;

/// What lies where in the workspace of a call: offsets in bytes, from an address that is a multiple of 256.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Workspace {
    /// Bytes from one row of codes to the next: int8 `[m][pitch]`, zeros behind the last column.
    pub pitch: usize,
    /// float32 `[m]`.
    pub scales: usize,
    /// int32: how many columns have outliers.
    pub count: usize,
    /// int32 `[k]`, of which the first `count` are those columns, ascending.
    pub columns: usize,
    /// u32 `[groups][ceil(k / 32)]`: columns with outliers in the rows of each group.
    pub masks: usize,
    /// Of rows.
    pub groups: usize,
    /// In all.
    pub bytes: usize,
}

/// The codes of a product, and where they are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operands {
    /// int8 `[m][pitch]`.
    pub a: u64,
    pub pitch: usize,
    /// int8 `[n][k]`.
    pub b: u64,
    pub m: usize,
    pub n: usize,
    pub k: usize,
}

/// What kernels take for what becomes of the sums: `Epilogue` of `kernels/int8/int8_epilogue.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Epilogue {
    pub row_scales: u64,
    pub column_scales: u64,
    pub bias: u64,
    pub y: u64,
    pub count: u64,
    pub columns: u64,
    pub x: u64,
    pub kind: u32,
    pub bias_kind: u32,
}

/// A 16-bit, float32 or int32 type, as kernels know it.
fn kind(dtype: DType) -> u32 {
    match dtype {
        DType::Bf16 => 0,
        DType::F16 => 1,
        DType::F32 => 2,
        _ => 3,
    }
}

fn size(argument: &'static str, a: usize, b: usize) -> Result<usize> {
    a.checked_mul(b)
        .filter(|&count| i64::try_from(count).is_ok())
        .ok_or_else(|| Error::argument(argument, format!("{a} x {b}"), "less than 2^63 elements"))
}

/// That rows are not so long that their sums leave int32.
fn check_columns(k: usize) -> Result<()> {
    if k <= MOST_COLUMNS {
        return Ok(());
    }
    Err(Error::argument("k", k, format!("at most {MOST_COLUMNS}, so that int32 holds every sum")))
}

impl Workspace {
    /// For `m` rows of `k` columns.
    ///
    /// # Errors
    /// [`Error::Argument`] for sizes that no memory has.
    pub(super) fn new(device: &Device, m: usize, k: usize) -> Result<Self> {
        let most = || Error::argument("m", format!("{m} x {k}"), "less than 2^63 elements");
        let pitch = k.checked_next_multiple_of(PITCH).ok_or_else(most)?;
        let groups = activations::groups(device, m);
        let mut end = 0usize;
        let mut part = |items: usize, each: usize| {
            let begin = end;
            end = items
                .checked_mul(each)
                .and_then(|bytes| begin.checked_add(bytes))
                .and_then(|bytes| bytes.checked_next_multiple_of(PART))
                .filter(|&bytes| isize::try_from(bytes).is_ok())
                .ok_or_else(most)?;
            Ok::<_, Error>(begin)
        };
        let _codes = part(m, pitch)?;
        let scales = part(m, size_of::<f32>())?;
        let count = part(1, size_of::<i32>())?;
        let columns = part(k, size_of::<i32>())?;
        let masks = part(groups, k.div_ceil(32) * size_of::<u32>())?;
        Ok(Self { pitch, scales, count, columns, masks, groups, bytes: end })
    }
}

/// Bytes of the workspace of [`linear`] and [`quantize_rows_outliers`] for `m` rows of `k` columns.
///
/// # Errors
/// [`Error::Argument`] for sizes that no memory has.
pub fn workspace_bytes(device: &Device, m: usize, k: usize) -> Result<usize> {
    Workspace::new(device, m, k).map(|workspace| workspace.bytes)
}

/// Checks the workspace; gives the address and what lies where.
fn place(device: &Device, memory: &Memory, m: usize, k: usize) -> Result<(u64, Workspace)> {
    let workspace = Workspace::new(device, m, k)?;
    memory.of(&[DType::U8])?.long(workspace.bytes, "as workspace_bytes says")?;
    if !memory.is_aligned(PART as u64) {
        let found = format!("at address {:#x}", memory.address());
        return Err(Error::argument("workspace", found, format!("at a multiple of {PART} bytes")));
    }
    Ok((memory.address(), workspace))
}

/// `y[m][n] = x[m][k] · W[n][k]ᵀ + bias[n]`, `x` quantized on the way, row-major.
#[derive(Debug, Clone, Copy)]
pub struct Linear<'a> {
    /// `[m][k]`, float.
    pub x: &'a Memory,
    /// int8 `[n][k]`.
    pub codes: &'a Memory,
    /// float32 `[n]`.
    pub scales: &'a Memory,
    /// `[n]`, float.
    pub bias: Option<&'a Memory>,
    /// Values from here on are outliers; 0 for none.
    pub threshold: f32,
    /// uint8, of [`workspace_bytes`].
    pub workspace: &'a Memory,
    /// `[m][n]`, of the type of `x`.
    pub y: &'a Memory,
    /// Rows of `x`.
    pub m: usize,
    /// Rows of `W`.
    pub n: usize,
    /// Columns of both.
    pub k: usize,
}

/// Quantizes `x` and makes the product: the processor's `linear`, bit for bit where there are no outliers. Gives the name of
/// the kernel of the product.
///
/// # Errors
/// [`Error::Argument`] for a dtype or a length that does not fit, and when the kernel chosen does not take the arguments;
/// [`Error::Cuda`] when a launch fails.
///
/// # Safety
/// The memory is of this device, stays valid until the kernels have ended on `stream`, and is not written by others; `y` and
/// the workspace are neither read nor written by others, and share nothing with each other or the inputs. The stream is of
/// this device.
pub unsafe fn linear(device: &Device, stream: Stream, linear: &Linear<'_>, choice: Choice) -> Result<KernelName> {
    let &Linear { x, codes, scales, bias, threshold, workspace, y, m, n, k } = linear;
    check_columns(k)?;
    x.of(&DType::FLOATS)?.long(size("x", m, k)?, "m x k")?;
    codes.of(&[DType::I8])?.long(size("codes", n, k)?, "n x k")?;
    scales.of(&[DType::F32])?.long(n, "one scale per row of the weight")?;
    y.of(&[x.dtype()])?.long(size("y", m, n)?, "m x n")?;
    if let Some(bias) = bias {
        bias.of(&DType::FLOATS)?.long(n, "one per row of the weight")?;
    }
    if threshold.is_nan() || threshold < 0.0 {
        return Err(Error::argument("threshold", threshold, "0 or more"));
    }
    let (base, parts) = place(device, workspace, m, k)?;
    let activations = activations::Activations {
        x: x.address(),
        dtype: x.dtype(),
        codes: base,
        scales: base + parts.scales as u64,
        rows: m,
        columns: k,
        pitch: parts.pitch,
        exact: false,
    };
    let has_outliers = threshold > 0.0;
    let mut epilogue = Epilogue {
        row_scales: activations.scales,
        column_scales: scales.address(),
        bias: bias.map_or(0, Memory::address),
        y: y.address(),
        kind: kind(y.dtype()),
        bias_kind: bias.map_or(0, |bias| kind(bias.dtype())),
        ..Epilogue::default()
    };
    if has_outliers {
        epilogue.count = base + parts.count as u64;
        epilogue.columns = base + parts.columns as u64;
        epilogue.x = x.address();
    }
    let operands = Operands { a: base, pitch: parts.pitch, b: codes.address(), m, n, k };
    let product = Product::choose(device, &operands, &epilogue, choice)?;
    // SAFETY: lengths were checked, the rest is the caller's.
    unsafe {
        if has_outliers {
            activations.code_below(device, stream, threshold, base, &parts, 0)
        } else {
            activations.code(device, stream)
        }?;
        product.launch(device, stream, &operands, &epilogue)
    }
}

/// Codes times codes: `y[m][n]` from `a[m][k]` and `b[n][k]`.
#[derive(Debug, Clone, Copy)]
pub struct Scaled<'a> {
    /// int8 `[m][k]`.
    pub a: &'a Memory,
    /// int8 `[n][k]`.
    pub b: &'a Memory,
    /// float32 `[m]` and `[n]`; none when `y` is to have the sums.
    pub scales: Option<(&'a Memory, &'a Memory)>,
    /// `[n]`, float.
    pub bias: Option<&'a Memory>,
    /// `[m][n]`, float with scales, else int32.
    pub y: &'a Memory,
    /// Rows of `a`.
    pub m: usize,
    /// Rows of `b`.
    pub n: usize,
    /// Columns of both.
    pub k: usize,
}

/// Makes the product of codes. Gives the name of its kernel.
///
/// # Errors
/// As [`linear`].
///
/// # Safety
/// As [`linear`].
pub unsafe fn scaled(device: &Device, stream: Stream, scaled: &Scaled<'_>, choice: Choice) -> Result<KernelName> {
    let &Scaled { a, b, scales, bias, y, m, n, k } = scaled;
    check_columns(k)?;
    a.of(&[DType::I8])?.long(size("a", m, k)?, "m x k")?;
    b.of(&[DType::I8])?.long(size("b", n, k)?, "n x k")?;
    let mut epilogue = Epilogue { y: y.address(), kind: kind(y.dtype()), ..Epilogue::default() };
    if let Some((rows, columns)) = scales {
        rows.of(&[DType::F32])?.long(m, "one scale per row")?;
        columns.of(&[DType::F32])?.long(n, "one scale per row of b")?;
        (epilogue.row_scales, epilogue.column_scales) = (rows.address(), columns.address());
    }
    y.of(if scales.is_some() { &DType::FLOATS } else { &[DType::I32] })?.long(size("y", m, n)?, "m x n")?;
    if let Some(bias) = bias {
        bias.of(&DType::FLOATS)?.long(n, "one per row of b")?;
        (epilogue.bias, epilogue.bias_kind) = (bias.address(), kind(bias.dtype()));
    }
    let operands = Operands { a: a.address(), pitch: k, b: b.address(), m, n, k };
    // SAFETY: lengths were checked, the rest is the caller's.
    unsafe { Product::choose(device, &operands, &epilogue, choice)?.launch(device, stream, &operands, &epilogue) }
}

/// Which kernel makes a product.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Choice {
    /// The fastest that takes the arguments.
    #[default]
    Best,
    /// That for few rows, or several passes of it.
    Few,
    /// That for more rows.
    Tile,
    /// The plain one.
    Plain,
}

impl Choice {
    const NAMES: [(&'static str, Self); 4] =
        [("best", Self::Best), ("few", Self::Few), ("tile", Self::Tile), ("plain", Self::Plain)];
}

impl std::str::FromStr for Choice {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let legal = Self::NAMES.map(|(name, _)| name);
        let found = Self::NAMES.into_iter().find(|(n, _)| *n == name);
        found.map(|(_, c)| c).ok_or_else(|| Error::argument("kernel", format!("{name:?}"), format!("one of {legal:?}")))
    }
}

/// A product's kernel and how it divides the work.
#[derive(Debug, Clone, Copy)]
enum Product {
    Few(Few),
    Tile(Tile),
    Plain,
}

impl Product {
    fn choose(device: &Device, operands: &Operands, epilogue: &Epilogue, choice: Choice) -> Result<Self> {
        let few = || Few::new(device, operands, epilogue.count != 0).map(Self::Few);
        let tile = || Tile::new(device, operands, epilogue).map(Self::Tile);
        let found = match choice {
            Choice::Best if operands.m <= few::MOST_ROWS => few().or_else(tile),
            Choice::Best => tile().or_else(few),
            Choice::Few => few(),
            Choice::Tile => tile(),
            Choice::Plain => None,
        };
        if found.is_none() && matches!(choice, Choice::Few | Choice::Tile) {
            let expected = "\"best\", because this kernel does not take these arguments on this device";
            return Err(Error::argument("kernel", format!("{choice:?}"), expected));
        }
        Ok(found.unwrap_or(Self::Plain))
    }

    /// # Safety
    /// As [`scaled`].
    unsafe fn launch(
        &self,
        device: &Device,
        stream: Stream,
        operands: &Operands,
        epilogue: &Epilogue,
    ) -> Result<KernelName> {
        // SAFETY: the caller's.
        unsafe {
            match self {
                Self::Few(few) => few.launch(device, stream, operands, epilogue).map(|()| few.kernel.name),
                Self::Tile(tile) => tile.launch(device, stream, operands, epilogue).map(|()| tile.kernel.name),
                Self::Plain => plain::launch(device, stream, operands, epilogue),
            }
        }
    }
}
