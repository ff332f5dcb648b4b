//! A packed weight, and the parts of it that a product reads.

use std::ops::Range;

use crate::codebook::QuantType;
use crate::error::{Error, Result};
use crate::geometry::{BlockSize, NESTED_BLOCK_SIZE, check_length, packed_len};
use crate::quant::absmax::dequantize_group;

/// Bytes of a cache line.
const LINE: usize = 64;

/// The scales of a weight, one per block.
#[derive(Debug, Clone, Copy)]
pub enum Scales<'a> {
    /// As float32.
    Plain(&'a [f32]),
    /// Doubly quantized: `map[code] * absmax[block / 256] + offset` with the dynamic map, two roundings.
    Nested {
        /// One 8-bit code per block of the weight.
        codes: &'a [u8],
        /// One scale per 256 codes.
        absmax: &'a [f32],
        /// What was subtracted from every scale.
        offset: f32,
    },
}

/// A weight of shape `[rows, cols]` in the format's bytes: one row-major list, blocks and bytes run on across rows.
#[derive(Debug, Clone, Copy)]
pub struct Weight<'a> {
    packed: &'a [u8],
    scales: Scales<'a>,
    quant_type: QuantType,
    blocksize: BlockSize,
    rows: usize,
    cols: usize,
}

impl<'a> Weight<'a> {
    /// Checks the lengths.
    ///
    /// # Errors
    /// [`Error::Argument`] unless `packed` has `ceil(rows * cols / 2)` bytes and there is one scale per block.
    pub fn new(
        packed: &'a [u8],
        scales: Scales<'a>,
        quant_type: QuantType,
        blocksize: BlockSize,
        rows: usize,
        cols: usize,
    ) -> Result<Self> {
        let values = rows.checked_mul(cols).ok_or_else(|| {
            Error::argument("shape", format!("[{rows}, {cols}]"), "of a number of values that fits in memory")
        })?;
        check_length("packed", packed.len(), packed_len(values), "two codes to a byte")?;
        let blocks = blocksize.absmax_len(values);
        match scales {
            Scales::Plain(absmax) => check_length("absmax", absmax.len(), blocks, "one scale per block")?,
            Scales::Nested { codes, absmax, .. } => {
                check_length("absmax", codes.len(), blocks, "one code per block")?;
                let expected = BlockSize::NESTED.absmax_len(blocks);
                check_length("absmax2", absmax.len(), expected, "one scale per 256 codes")?;
            }
        }
        Ok(Self { packed, scales, quant_type, blocksize, rows, cols })
    }

    /// Rows: output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    pub(super) fn packed(&self) -> &'a [u8] {
        self.packed
    }

    pub(super) fn blocksize(&self) -> usize {
        self.blocksize.get()
    }

    pub(super) fn values(&self) -> &'static [f32; 16] {
        self.quant_type.values()
    }

    /// The blocks that hold the values `flat` of the row-major list.
    pub(super) fn blocks_of(&self, flat: Range<usize>) -> Range<usize> {
        flat.start / self.blocksize()..flat.end.div_ceil(self.blocksize())
    }

    /// The float32 scales of `blocks`; nested ones are read into `buffer`.
    pub(super) fn scales<'s>(&'s self, blocks: Range<usize>, buffer: &'s mut Vec<f32>) -> &'s [f32] {
        match self.scales {
            Scales::Plain(absmax) => &absmax[blocks],
            Scales::Nested { codes, absmax, offset } => {
                if buffer.len() < blocks.len() {
                    buffer.resize(blocks.len(), 0.0);
                }
                let mut at = blocks.start;
                while at < blocks.end {
                    let stop = ((at / NESTED_BLOCK_SIZE + 1) * NESTED_BLOCK_SIZE).min(blocks.end);
                    let out = &mut buffer[at - blocks.start..stop - blocks.start];
                    dequantize_group(&codes[at..stop], absmax[at / NESTED_BLOCK_SIZE], offset, out);
                    at = stop;
                }
                &buffer[..blocks.len()]
            }
        }
    }

    /// The float32 scales of the values `flat`, one for each `piece` of them, all of which are within a block.
    pub(super) fn scales_of_pieces<'s>(
        &'s self,
        flat: Range<usize>,
        piece: usize,
        [expanded, pieces]: &'s mut [Vec<f32>; 2],
    ) -> &'s [f32] {
        let blocks = self.blocks_of(flat.clone());
        let origin = blocks.start * self.blocksize();
        let scales = self.scales(blocks, expanded);
        if self.blocksize() == piece {
            return scales;
        }
        pieces.clear();
        pieces.extend(flat.step_by(piece).map(|at| scales[(at - origin) / self.blocksize()]));
        pieces
    }

    /// Asks for the codes and scales of columns `cols` of some rows, which are needed soon: they are a few cache lines
    /// each, too far apart for the processor to foresee.
    pub(super) fn prefetch(&self, rows: Range<usize>, cols: Range<usize>) {
        for row in rows.start..rows.end.min(self.rows) {
            let flat = row * self.cols + cols.start..row * self.cols + cols.end.min(self.cols);
            for at in (flat.start / 2..flat.end / 2).step_by(LINE) {
                prefetch(self.packed.as_ptr().wrapping_add(at));
            }
            self.prefetch_scales(flat);
        }
    }

    /// Prefetches the scales of the values `flat`.
    pub(super) fn prefetch_scales(&self, flat: Range<usize>) {
        let (scales, size) = match self.scales {
            Scales::Plain(absmax) => (absmax.as_ptr().cast(), size_of::<f32>()),
            Scales::Nested { codes, .. } => (codes.as_ptr(), 1),
        };
        let shift = self.blocksize().trailing_zeros();
        for at in ((flat.start >> shift) * size..(flat.end >> shift) * size).step_by(LINE) {
            prefetch(scales.wrapping_add(at));
        }
    }

    /// Columns `cols` of one row, ready to be decoded.
    pub(super) fn run<'s>(&'s self, row: usize, cols: Range<usize>, buffer: &'s mut Vec<f32>) -> Run<'s> {
        let flat = row * self.cols + cols.start..row * self.cols + cols.end;
        Run {
            packed: self.packed,
            values: self.values(),
            blocksize: self.blocksize(),
            start: flat.start,
            len: cols.len(),
            scales: self.scales(self.blocks_of(flat), buffer),
        }
    }
}

/// Consecutive values of the row-major list.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run<'a> {
    /// All bytes of the weight.
    pub packed: &'a [u8],
    /// The codebook.
    pub values: &'static [f32; 16],
    /// A power of two, at least 32.
    pub blocksize: usize,
    /// The first value's place in the list.
    pub start: usize,
    /// How many values.
    pub len: usize,
    /// The scales of the blocks they are in.
    pub scales: &'a [f32],
}

/// Asks for a cache line. Any address will do.
#[inline(always)]
pub(super) fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: an address that cannot be read is passed over; every x86-64 processor has the instruction.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Prefetches a cache line into the second-level cache, and not into the first. Any address will do.
#[inline(always)]
pub(super) fn prefetch_to_second_level(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as above.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// How many bytes ahead of the codes in use to prefetch. Of the rows that are multiplied together, the last begins `span` bytes
/// after the first. Prefetching follows the order of memory: a processor reads one long stream at full speed, but several short
/// ones, the rows of a band, at a third of it.
pub(super) fn lead_of(span: usize) -> usize {
    (16 << 10).max(span + (8 << 10))
}
