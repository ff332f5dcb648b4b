//! What every product of 8-bit codes is given.

use halfbyte::dtype::DType;
use halfbyte::error::{Error, Result};

use crate::driver::TileType;

/// Sums of more products of two codes may leave int32.
pub const MOST_COLUMNS: usize = (i32::MAX / (127 * 127)) as usize;

/// The kernel that made a product: its name begins with `int8_`.
pub type KernelName = &'static str;

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
    pub mask: u64,
    pub panel: u64,
    pub kind: u32,
    pub bias_kind: u32,
}

impl Epilogue {
    /// The panel's address and type of elements, if it has 16-bit ones.
    pub(super) fn sixteen_bit_panel(&self) -> Option<(TileType, u64)> {
        match self.kind {
            _ if self.panel == 0 => None,
            0 => Some((TileType::Bf16, self.panel)),
            1 => Some((TileType::F16, self.panel)),
            _ => None,
        }
    }
}

/// Words of a mask of `k` columns, which are read four at a time.
pub(super) fn mask_words(k: usize) -> usize {
    k.div_ceil(128) * 4
}

/// A 16-bit, float32 or int32 type, as kernels know it.
pub(super) fn kind(dtype: DType) -> u32 {
    match dtype {
        DType::Bf16 => 0,
        DType::F16 => 1,
        DType::F32 => 2,
        _ => 3,
    }
}

pub(super) fn size(argument: &'static str, a: usize, b: usize) -> Result<usize> {
    a.checked_mul(b)
        .filter(|&count| i64::try_from(count).is_ok())
        .ok_or_else(|| Error::argument(argument, format!("{a} x {b}"), "less than 2^63 elements"))
}

/// That rows are not so long that their sums leave int32.
pub(super) fn check_columns(k: usize) -> Result<()> {
    if k <= MOST_COLUMNS {
        return Ok(());
    }
    Err(Error::argument("k", k, format!("at most {MOST_COLUMNS}, so that int32 holds every sum")))
}
