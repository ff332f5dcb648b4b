//! Quantized matrices of experts that go back to a tensor for all experts, in strips of a few rows.

use super::joining::Joining;
use super::shard::{Piece, ShardJob};
use crate::checkpoint::cast::{floats, transposed};
use crate::checkpoint::dtype::torch_name;
use crate::checkpoint::scratch::{Scratch, bytes};
use crate::checkpoint::weights::{Quantized, read_scales};
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::geometry::packed_len;
use crate::quant::blockwise4;
use crate::quant::int8_rowwise::dequantize_rows;

impl ShardJob<'_> {
    /// Writes a strip of the matrices of one expert to their places.
    pub(super) fn join<T: Element>(&self, scratch: &mut Scratch, piece: &Piece, joining: &Joining<'_>) -> Result<()> {
        let Joining { sources, fusion, expert, output } = *joining;
        let [_, columns] = fusion.matrix_shape();
        let rows = piece.len / columns;
        let mut strips = Vec::with_capacity(sources.len());
        for weight in sources {
            strips.push(self.values::<T>(scratch, piece, weight, output)?);
            let codes = match weight {
                Quantized::FourBit(_) => packed_len(piece.len),
                Quantized::Int8(_) => piece.len,
            };
            self.progress.add(codes as u64);
        }
        if fusion.interleaved {
            let mut merged = Vec::with_capacity(piece.len * strips.len());
            for row in 0..rows {
                for strip in &strips {
                    merged.extend_from_slice(&strip[row * columns..][..columns]);
                }
            }
            strips = vec![merged];
        }
        let first_row = piece.start / columns;
        for (projection, strip) in strips.iter().enumerate() {
            let part = fusion.part(expert, projection);
            let size = size_of::<T>();
            let begin = part.first + first_row * part.row_step;
            if part.column_step == 1 {
                self.write(output, begin * size, bytemuck::cast_slice(strip))?;
                continue;
            }
            let height = strip.len() / columns;
            for (column, run) in transposed(strip, height, columns).chunks(height).enumerate() {
                self.write(output, (begin + column * part.column_step) * size, bytemuck::cast_slice(run))?;
            }
        }
        Ok(())
    }

    /// The values of one piece of a quantized matrix.
    fn values<T: Element>(
        &self,
        scratch: &mut Scratch,
        piece: &Piece,
        weight: &Quantized,
        output: usize,
    ) -> Result<Vec<T>> {
        let mut values = vec![T::from_f32(0.0); piece.len];
        match weight {
            Quantized::FourBit(weight) => {
                let block = weight.state.blocksize;
                let scales = read_scales(self.source, weight)?;
                let first = piece.start / block.get();
                let scales = &scales[first..first + block.absmax_len(piece.len)];
                let packed = bytes(&mut scratch.packed, packed_len(piece.len));
                self.read(weight.packed, piece.start / 2, packed)?;
                blockwise4::dequantize_serial(packed, scales, weight.state.quant_type, block, &mut values)?;
                self.refuse_overflow(weight, piece, packed, scales, &values, output)?;
            }
            Quantized::Int8(weight) => {
                let columns = weight.shape[1].max(1);
                let read = bytes(&mut scratch.packed, piece.len);
                self.read(weight.codes, piece.start, read)?;
                let (first, rows) = (piece.start / columns, piece.len / columns);
                let mut stored = vec![0; rows * size_of::<f32>()];
                self.read(weight.scales, first * size_of::<f32>(), &mut stored)?;
                let scales = floats(&stored);
                let codes: &[i8] = bytemuck::cast_slice(read);
                dequantize_rows(codes, &scales, rows, columns, &mut values)?;
                let at = values.iter().position(|v| v.to_f32().is_infinite());
                if let Some(at) = at.filter(|at| scales[at / columns].is_finite()) {
                    return Err(Error::TooLarge {
                        path: self.source.file(weight.codes).path.clone(),
                        tensor: weight.name.clone(),
                        index: (piece.start + at) as u64,
                        shape: weight.shape.to_vec(),
                        value: f32::from(codes[at]) * scales[at / columns] * (1.0 / 127.0),
                        dtype: torch_name(self.layout().tensors[output].dtype).unwrap_or("this dtype"),
                    });
                }
            }
        }
        Ok(values)
    }
}
