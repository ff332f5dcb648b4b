//! Activations to codes: kernels/int8/int8_activations.cu.

use halfbyte::dtype::DType;
use halfbyte::error::{Error, Result};

use super::operands::{check_columns, mask_words, size};
use super::workspace::{GROUPS, Workspace, place};
use crate::driver::{Device, Stream};
use crate::kernels::{self, int8_activations as source};
use crate::launch::parameters;
use crate::memory::Memory;

/// Blocks of threads for each multiprocessor: as many as it takes at once.
const RESIDENT: u64 = 8;

/// Blocks that copy x of outliers: each reads all masks.
const PANEL_BLOCKS: usize = 32;

/// What is to become codes, and where to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Activations {
    pub x: u64,
    pub dtype: DType,
    pub codes: u64,
    pub scales: u64,
    pub rows: usize,
    pub columns: usize,
    pub pitch: usize,
    /// Whether values are taken as they are, not rounded to 11 bits first.
    pub exact: bool,
}

/// Where what is found out about outliers goes, addresses: masks of groups of rows; the count, the columns and the mask of
/// all; and x of the first columns.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parts {
    pub threshold: f32,
    pub masks: u64,
    pub found: [u64; 3],
    pub panel: u64,
}

impl Activations {
    /// All of it. With a threshold values from it on do not count for scales, and what [`Parts`] names is made: codes of columns
    /// with outliers mean nothing then.
    ///
    /// # Safety
    /// As [`super::linear`].
    pub(super) unsafe fn code(&self, device: &Device, stream: Stream, outliers: Option<Parts>) -> Result<()> {
        let kernel = match self.dtype {
            DType::Bf16 => &kernels::INT8_ACTIVATIONS_BF16,
            DType::F16 => &kernels::INT8_ACTIVATIONS_F16,
            _ => &kernels::INT8_ACTIVATIONS_F32,
        };
        let at_once = if self.columns <= source::WARP_ROW { source::WARPS } else { 1 };
        let most = device.multiprocessors() as usize * GROUPS;
        let blocks = self.rows.div_ceil(at_once).min(most);
        let &Self { x, codes, scales, .. } = self;
        let (rows, columns, pitch) = (self.rows as i64, self.columns as i64, self.pitch as i64);
        let (masks, threshold) = outliers.map_or((0, 0.0), |parts| (parts.masks, parts.threshold));
        // Columns are few enough for this: `check_columns`.
        let mask = (mask_words(self.columns) * size_of::<u32>()) as u32;
        let shared = if outliers.is_some() { mask } else { 0 };
        let parameters = parameters![x, codes, scales, masks, rows, columns, pitch, threshold];
        // SAFETY: the kernels' parameters in their order; they wait before they touch memory, the rest is the caller's.
        unsafe { device.launch_early(stream, kernel, blocks as u64, shared, parameters) }?;
        let Some(Parts { found, panel, .. }) = outliers else {
            return Ok(());
        };
        let kernel = if self.dtype == DType::F32 { &kernels::INT8_PANEL_32 } else { &kernels::INT8_PANEL_16 };
        let (groups, columns) = (blocks as i32, columns as i32);
        let parameters = parameters![x, masks, groups, found, panel, rows, columns];
        // SAFETY: as above.
        unsafe { device.launch_early(stream, kernel, self.rows.min(PANEL_BLOCKS) as u64, mask, parameters) }
    }

    /// All but columns with values from the threshold on, which get codes 0 and are listed in the workspace; and, unless its
    /// address is 0, as flags.
    ///
    /// # Safety
    /// As [`super::linear`].
    pub(super) unsafe fn code_below(
        &self,
        device: &Device,
        stream: Stream,
        threshold: f32,
        workspace: u64,
        parts: &Workspace,
        flags: u64,
    ) -> Result<()> {
        let (find, code) = match self.dtype {
            DType::Bf16 => (&kernels::INT8_OUTLIERS_BF16, &kernels::INT8_CODES_BF16),
            DType::F16 => (&kernels::INT8_OUTLIERS_F16, &kernels::INT8_CODES_F16),
            _ => (&kernels::INT8_OUTLIERS_F32, &kernels::INT8_CODES_F32),
        };
        let &Self { x, codes, scales, .. } = self;
        let masks = workspace + parts.masks as u64;
        let (rows, columns, pitch) = (self.rows as i64, self.columns as i64, self.pitch as i64);
        let exact = u32::from(self.exact);
        let words = mask_words(self.columns) * size_of::<u32>();
        // Columns are few enough for this: `check_columns`.
        let shared = words as u32;
        // SAFETY: the kernels' parameters in their order; they wait before they touch memory, the rest is the caller's.
        unsafe {
            let parameters = parameters![x, scales, masks, rows, columns, threshold, exact];
            device.launch_early(stream, find, parts.groups as u64, shared, parameters)?;
            let panels = self.columns.div_ceil(source::PANEL).max(1) as u64;
            let at_a_time = (u64::from(device.multiprocessors()) * RESIDENT / panels).clamp(1, self.rows.max(1) as u64);
            let groups = parts.groups as i64;
            let outliers = [workspace + parts.count as u64, workspace + parts.columns as u64, flags];
            let parameters = parameters![x, scales, masks, groups, codes, outliers, rows, columns, pitch, exact];
            device.launch_early(stream, code, panels * at_a_time + 1, 0, parameters)
        }
    }
}

/// Quantizes each row of `input`, `[rows][columns]`, by its largest magnitude below the threshold, all but the columns with
/// values from it on: their codes are 0, and their flags in `outliers`, `[columns]` bytes, are 1.
///
/// # Errors
/// [`Error::Argument`] for a dtype, a length or a threshold that does not fit; [`Error::Cuda`] when a launch fails.
///
/// # Safety
/// The memory is of this device, stays valid until the kernels have ended on `stream`, and is not written by others; `codes`,
/// `scales`, `outliers` and the workspace are neither read nor written by others, and share nothing with each other or with
/// `input`. The stream is of this device.
#[allow(clippy::too_many_arguments)] // what the kernels need, each with a type of its own
pub unsafe fn quantize_rows_outliers(
    device: &Device,
    stream: Stream,
    input: &Memory,
    codes: &Memory,
    scales: &Memory,
    outliers: &Memory,
    workspace: &Memory,
    (rows, columns): (usize, usize),
    threshold: f32,
) -> Result<()> {
    check_columns(columns)?;
    let n = size("rows", rows, columns)?;
    input.of(&DType::FLOATS)?.long(n, "rows x columns")?;
    codes.of(&[DType::I8])?.long(n, "rows x columns")?;
    scales.of(&[DType::F32])?.long(rows, "one scale per row")?;
    outliers.of(&[DType::U8])?.long(columns, "one flag per column")?;
    if threshold.is_nan() || threshold <= 0.0 {
        return Err(Error::argument("threshold", threshold, "more than 0"));
    }
    let (base, parts) = place(device, workspace, rows, columns)?;
    let activations = Activations {
        x: input.address(),
        dtype: input.dtype(),
        codes: codes.address(),
        scales: scales.address(),
        rows,
        columns,
        pitch: columns,
        exact: true,
    };
    // SAFETY: lengths were checked, the rest is the caller's.
    unsafe { activations.code_below(device, stream, threshold, base, &parts, outliers.address()) }
}
