//! The pieces of 8-bit weights: whole rows, which share nothing with other rows.

use half::f16;
use safetensors::Dtype;

use super::rows_weight::Rows;
use super::shard::{Piece, ShardJob, value_at};
use crate::checkpoint::cast::{cast, floats, transposed};
use crate::checkpoint::dtype::{item_size, torch_name};
use crate::checkpoint::matrix::Matrix;
use crate::checkpoint::plan::RowsOutputs;
use crate::checkpoint::rows::{ROW_MAJOR, RowsSource};
use crate::checkpoint::scratch::{Scratch, bytes};
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::quant::blockwise4::TASK;
use crate::quant::first_nonfinite;
use crate::quant::int8_rowwise::{dequantize_rows, quantize_rows};

/// Elements of the rows that are done in one call: so few that the core keeps to the calling thread, of which there are
/// enough.
fn elements_per_call(columns: usize) -> usize {
    TASK.div_ceil(columns.max(1)) * columns.max(1)
}

impl ShardJob<'_> {
    /// Quantizes the rows of one piece and writes their codes and scales; gives the bytes of the codes.
    pub(super) fn quantize_rows(
        &self,
        scratch: &mut Scratch,
        piece: &Piece,
        weight: &Rows,
        outputs: &RowsOutputs,
    ) -> Result<u64> {
        let from = weight.source.dtype;
        let [rows, columns] = weight.shape;
        let Scratch { dense, packed, stored, loaded } = scratch;
        let stored = bytes(stored, piece.len * item_size(from));
        weight.source.read(self.source, piece.start, stored, packed)?;
        // As a loader has it: in the dtype of the model, which is rounded to float16.
        let halves = bytes(dense, piece.len * size_of::<f16>());
        if weight.dtype == from {
            cast(from, Dtype::F16, stored, halves);
        } else {
            let loaded = bytes(loaded, piece.len * item_size(weight.dtype));
            cast(from, weight.dtype, stored, loaded);
            cast(weight.dtype, Dtype::F16, loaded, halves);
        }
        let values: &[f16] = bytemuck::cast_slice(halves);
        if !self.allow_nonfinite
            && let Some((index, value)) = first_nonfinite(values)
        {
            return Err(self.not_in_float16(
                &weight.source,
                self.label(piece.action),
                piece.start,
                index,
                stored,
                value,
            ));
        }
        let turned;
        let values = if weight.transpose {
            turned = transposed::<f16>(values, columns, rows);
            &turned
        } else {
            values
        };
        let codes: &mut [i8] = bytemuck::cast_slice_mut(bytes(packed, piece.len));
        let mut scales = vec![0.0; piece.len / columns.max(1)];
        let step = elements_per_call(columns);
        let calls = values.chunks(step).zip(codes.chunks_mut(step)).zip(scales.chunks_mut(step / columns.max(1)));
        for ((values, codes), scales) in calls {
            quantize_rows(values, scales.len(), columns, codes, scales)?;
        }
        self.write(outputs.codes, piece.start, bytemuck::cast_slice(codes))?;
        self.write(outputs.scales, piece.start / columns.max(1) * size_of::<f32>(), bytemuck::cast_slice(&scales))?;
        if piece.number == 0 {
            self.write(outputs.format, 0, &[ROW_MAJOR])?;
        }
        self.progress.add(weight.source.stored_len(piece.len));
        Ok(piece.len as u64)
    }

    /// The error of a value, the one at `index` of a piece, that float16 does not hold as a finite one.
    fn not_in_float16(
        &self,
        source: &Matrix,
        name: &str,
        start: usize,
        index: usize,
        stored: &[u8],
        value: f32,
    ) -> Error {
        let was = value_at(source.dtype, stored, index);
        if !was.is_finite() {
            return self.nonfinite(source, name, start + index, value);
        }
        let (tensor, shape) = self.named(source, name);
        Error::tensor(
            &self.source.file(source.at).path,
            &tensor,
            format!(
                "element {} (row-major; shape {shape:?}) is {was:e}, which is too large for float16, and 8-bit weights \
                 are rounded to that first: keep this tensor, or make it 4-bit, with a rule",
                start + index
            ),
        )
    }

    /// Reads the rows of one piece back and writes their values; gives the bytes of these.
    pub(super) fn dequantize_rows<T: Element>(
        &self,
        scratch: &mut Scratch,
        piece: &Piece,
        weight: &RowsSource,
        transpose: bool,
        output: usize,
    ) -> Result<u64> {
        let [rows, columns] = weight.shape;
        let read = bytes(&mut scratch.packed, piece.len);
        self.read(weight.codes, piece.start, read)?;
        let codes: &[i8] = bytemuck::cast_slice(read);
        let first = piece.start / columns.max(1);
        let mut stored = vec![0; piece.len / columns.max(1) * size_of::<f32>()];
        self.read(weight.scales, first * size_of::<f32>(), &mut stored)?;
        let scales = floats(&stored);
        let values: &mut [T] = bytemuck::cast_slice_mut(bytes(&mut scratch.dense, piece.len * size_of::<T>()));
        let step = elements_per_call(columns);
        let calls = codes.chunks(step).zip(values.chunks_mut(step)).zip(scales.chunks(step / columns.max(1)));
        for ((codes, values), scales) in calls {
            dequantize_rows(codes, scales, scales.len(), columns, values)?;
        }
        // A scale may be larger than what this dtype holds; an infinite one is the weight's own.
        let too_large =
            values.iter().position(|v| v.to_f32().is_infinite()).filter(|at| scales[at / columns].is_finite());
        if let Some(at) = too_large {
            let value = f32::from(codes[at]) * scales[at / columns] * (1.0 / 127.0);
            return Err(Error::TooLarge {
                path: self.source.file(weight.codes).path.clone(),
                tensor: weight.name.clone(),
                index: (piece.start + at) as u64,
                shape: weight.shape.to_vec(),
                value,
                dtype: torch_name(self.layout().tensors[output].dtype).unwrap_or("this dtype"),
            });
        }
        let len = size_of_val(values) as u64;
        if transpose {
            self.write(output, 0, bytemuck::cast_slice(&transposed::<T>(values, rows, columns)))?;
        } else {
            self.write(output, piece.start * size_of::<T>(), bytemuck::cast_slice(values))?;
        }
        self.progress.add((codes.len() + stored.len()) as u64);
        if piece.number == 0 {
            let beside = weight.parts.iter().filter(|&&p| p != weight.codes && p != weight.scales);
            self.progress.add(beside.map(|&p| self.source.tensor(p).len).sum());
        }
        Ok(len)
    }
}
