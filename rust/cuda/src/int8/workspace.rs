//! The memory of a call with activations: their codes and scales, and which columns have outliers.

use halfbyte::dtype::DType;
use halfbyte::error::{Error, Result};

use super::operands::mask_words;
use crate::driver::Device;
use crate::kernels::int8_activations::PANEL_COLUMNS;
use crate::memory::Memory;

/// Rows of codes in the workspace begin at multiples of this, which the kernels' wide loads want.
const PITCH: usize = 16;

/// Where each part of the workspace begins.
const PART: usize = 256;

/// Groups of rows with a mask each, for each multiprocessor: as many blocks of threads as it takes at once.
pub(super) const GROUPS: usize = 3;

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
    /// u32 `[groups][mask_words(k)]`: columns with outliers in the rows of each group.
    pub masks: usize,
    /// u32 `[mask_words(k)]`: in any.
    pub mask: usize,
    /// `[m][PANEL_COLUMNS]`, of the type of `x`: its first columns with outliers.
    pub panel: usize,
    /// Of rows.
    pub groups: usize,
    /// In all.
    pub bytes: usize,
}

impl Workspace {
    /// For `m` rows of `k` columns.
    ///
    /// # Errors
    /// [`Error::Argument`] for sizes that no memory has.
    pub(super) fn new(device: &Device, m: usize, k: usize) -> Result<Self> {
        let most = || Error::argument("m", format!("{m} x {k}"), "less than 2^63 elements");
        let pitch = k.checked_next_multiple_of(PITCH).ok_or_else(most)?;
        let groups = m.min(device.multiprocessors() as usize * GROUPS);
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
        let masks = part(groups, mask_words(k) * size_of::<u32>())?;
        let mask = part(1, mask_words(k) * size_of::<u32>())?;
        let panel = part(m, PANEL_COLUMNS * size_of::<f32>())?;
        Ok(Self { pitch, scales, count, columns, masks, mask, panel, groups, bytes: end })
    }
}

/// Bytes of the workspace of a call with `m` rows of `k` columns.
///
/// # Errors
/// [`Error::Argument`] for sizes that no memory has.
pub fn workspace_bytes(device: &Device, m: usize, k: usize) -> Result<usize> {
    Workspace::new(device, m, k).map(|workspace| workspace.bytes)
}

/// Checks the workspace; gives the address and what lies where.
pub(super) fn place(device: &Device, memory: &Memory, m: usize, k: usize) -> Result<(u64, Workspace)> {
    let workspace = Workspace::new(device, m, k)?;
    memory.of(&[DType::U8])?.long(workspace.bytes, "as workspace_bytes says")?;
    if !memory.is_aligned(PART as u64) {
        let found = format!("at address {:#x}", memory.address());
        return Err(Error::argument("workspace", found, format!("at a multiple of {PART} bytes")));
    }
    Ok((memory.address(), workspace))
}
