//! LLM.int8(): activations to codes, products of codes with an 8-bit weight, and what becomes of the sums.
//!
//! The arithmetic is that of the processor's `linear`: exact int32 sums, then float32 operations in a fixed order. Without
//! outliers the bits are the same.

mod activations;
mod few;
mod operands;
mod plain;
mod tile;
mod workspace;

use halfbyte::dtype::DType;
use halfbyte::error::{Error, Result};

use crate::driver::{Device, Stream};
use crate::memory::Memory;

use few::Few;
use operands::{Epilogue, Operands, check_columns, kind, size};
use tile::Tile;
use workspace::place;

pub use activations::quantize_rows_outliers;
pub use operands::{KernelName, MOST_COLUMNS};
pub use workspace::workspace_bytes;

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
    // The kernels for many rows take columns with outliers out of W, the others have codes of x that are 0 there.
    let takes_out = has_outliers && matches!(product, Product::Tile(_));
    let mut found = None;
    if takes_out {
        (epilogue.mask, epilogue.panel) = (base + parts.mask as u64, base + parts.panel as u64);
        found = Some(activations::Parts {
            threshold,
            masks: base + parts.masks as u64,
            found: [epilogue.count, epilogue.columns, epilogue.mask],
            panel: epilogue.panel,
        });
    }
    // SAFETY: lengths were checked, the rest is the caller's.
    unsafe {
        if has_outliers && !takes_out {
            activations.code_below(device, stream, threshold, base, &parts, 0)
        } else {
            activations.code(device, stream, found)
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
            Choice::Best if Few::is_best(operands.m, operands.n) => few().or_else(tile),
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
