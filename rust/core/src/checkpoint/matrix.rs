//! A dense matrix of a source: a tensor of its own, or a part of one that holds the matrices of many experts.

use safetensors::Dtype;

use super::dtype::item_size;
use super::file::read_exact_at;
use super::reader::{Checkpoint, TensorRef};
use super::scratch::bytes;
use crate::error::Result;

/// Values that share a scale in MXFP4.
pub const MXFP4_GROUP: usize = 32;

/// Bytes of a strip of a transposed matrix: rows of the result are columns of the tensor, and a strip that is wide takes
/// few, long reads. Tests have small matrices, and want strips of them too.
const STRIP_BYTES: usize = if cfg!(test) { 4 << 10 } else { 4 << 20 };

/// Columns of a transposed matrix that are read together: the values of a row that they give fill a cache line.
const GROUP: usize = 32;

/// Where the values of a matrix lie in a tensor that is not it alone: the value in row `r` and column `c` is number
/// `first + r * row_step + c * column_step`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Number of the first value.
    pub first: usize,
    /// From one row to the next.
    pub row_step: usize,
    /// From one column to the next.
    pub column_step: usize,
    /// The scales of MXFP4 codes; the numbers are then those of decoded values.
    pub scales: Option<TensorRef>,
}

/// A dense matrix of a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Matrix {
    /// The tensor.
    pub at: TensorRef,
    /// The dtype of its values as they are read.
    pub dtype: Dtype,
    /// Rows of a part.
    pub rows: usize,
    /// Length of a row of a part.
    pub columns: usize,
    /// Which part of the tensor; none for all of it.
    pub part: Option<Part>,
}

impl Matrix {
    /// All of a tensor.
    pub fn whole(source: &Checkpoint, at: TensorRef) -> Self {
        Self { at, dtype: source.tensor(at).dtype, rows: 0, columns: 0, part: None }
    }

    /// Bytes in the source of so many values.
    pub fn stored_len(&self, values: usize) -> u64 {
        match self.part {
            Some(Part { scales: Some(_), .. }) => (values / 2 + values / MXFP4_GROUP) as u64,
            _ => (values * item_size(self.dtype)) as u64,
        }
    }

    /// How many values to take at a time where `usual` is right for values that lie one after the other: whole rows
    /// where they do not, and always a multiple of `multiple` values.
    pub fn step(&self, usual: usize, multiple: usize) -> usize {
        let columns = self.columns.max(1);
        let Some(part) = self.part else { return usual };
        if part.scales.is_none() && part.column_step == 1 && part.row_step == columns {
            return usual;
        }
        if part.column_step > 1 {
            return strip_rows(columns, item_size(self.dtype), multiple) * columns;
        }
        let unit = multiple / gcd(multiple, columns);
        (usual / columns / unit).max(1) * unit * columns
    }

    /// Reads values from number `start` of the matrix on, as many as fill `into`; of parts that do not lie together
    /// whole rows only. `room` is memory to work in.
    pub fn read(&self, source: &Checkpoint, start: usize, into: &mut [u8], room: &mut Vec<u64>) -> Result<()> {
        let (file, entry) = (source.file(self.at), source.tensor(self.at));
        let size = item_size(self.dtype);
        let read = |value: usize, into: &mut [u8]| {
            read_exact_at(&file.file, &file.path, into, entry.offset + (value * size) as u64)
        };
        let Some(part) = self.part else { return read(start, into) };
        let columns = self.columns.max(1);
        if let Some(scales) = part.scales {
            return self.read_mxfp4(source, part, scales, start, into, room);
        }
        if part.column_step == 1 && part.row_step == columns {
            return read(part.first + start, into);
        }
        let first = part.first + start / columns * part.row_step;
        if part.column_step == 1 {
            let rows = into.chunks_mut(columns * size).enumerate();
            return rows.into_iter().try_for_each(|(row, into)| read(first + row * part.row_step, into));
        }
        let rows = into.len() / size / columns;
        if rows == 0 {
            return Ok(());
        }
        let run = (rows - 1) * part.row_step + 1;
        // A few columns at a time, whose values are spread over the rows while a cache has them.
        for column in (0..columns).step_by(GROUP) {
            let group = GROUP.min(columns - column);
            let room = bytes(room, group * run * size);
            for (number, into) in room.chunks_mut(run * size).enumerate() {
                read(first + (column + number) * part.column_step, into)?;
            }
            match size {
                2 => spread::<2>(room, into, run, part.row_step, columns, column),
                _ => spread::<4>(room, into, run, part.row_step, columns, column),
            }
        }
        Ok(())
    }

    fn read_mxfp4(
        &self,
        source: &Checkpoint,
        part: Part,
        scales: TensorRef,
        start: usize,
        into: &mut [u8],
        room: &mut Vec<u64>,
    ) -> Result<()> {
        let columns = self.columns.max(MXFP4_GROUP);
        let (codes_len, scales_len) = (columns / 2, columns / MXFP4_GROUP);
        let room = bytes(room, codes_len + scales_len);
        let (codes, exponents) = room.split_at_mut(codes_len);
        let read = |at: TensorRef, into: &mut [u8], skip: usize| {
            let (file, entry) = (source.file(at), source.tensor(at));
            read_exact_at(&file.file, &file.path, into, entry.offset + skip as u64)
        };
        for (row, into) in into.chunks_mut(columns * 2).enumerate() {
            let first = part.first + (start / columns + row) * part.row_step;
            read(self.at, codes, first / 2)?;
            read(scales, exponents, first / MXFP4_GROUP)?;
            decode_mxfp4(codes, exponents, into);
        }
        Ok(())
    }
}

/// How many rows of a matrix, whose values have `size` bytes, make a strip that holds a multiple of so many values.
pub fn strip_rows(columns: usize, size: usize, multiple: usize) -> usize {
    let columns = columns.max(1);
    let unit = multiple / gcd(multiple, columns);
    (STRIP_BYTES / size / columns / unit).max(1) * unit
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Writes columns, from number `first` on, to the rows of a matrix. They lie one after the other in `from`, `run` values
/// each, of which every `step`-th counts.
fn spread<const SIZE: usize>(from: &[u8], into: &mut [u8], run: usize, step: usize, columns: usize, first: usize) {
    let (from, _) = from.as_chunks::<SIZE>();
    let (into, _) = into.as_chunks_mut::<SIZE>();
    let group = from.len() / run;
    for (row, into) in into.chunks_mut(columns).enumerate() {
        for (column, place) in into[first..first + group].iter_mut().enumerate() {
            *place = from[column * run + row * step];
        }
    }
}

/// The values of MXFP4 codes (two to a byte, the earlier one in the low half; the format of OCP's MX specification) as
/// bfloat16, which holds them exactly: sign, two bits of exponent and one of mantissa, times 2 to the power of the
/// group's scale less 127. A scale of 255 stands for NaN.
pub fn decode_mxfp4(codes: &[u8], exponents: &[u8], into: &mut [u8]) {
    const MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let groups = codes.chunks(MXFP4_GROUP / 2).zip(exponents).zip(into.chunks_mut(MXFP4_GROUP * 2));
    for ((codes, &exponent), into) in groups {
        // In float64, which holds all powers of two that there are.
        let scale = if exponent == 255 { f64::NAN } else { 2f64.powi(i32::from(exponent) - 127) };
        let value = |code: u8| {
            let magnitude = f64::from(MAGNITUDES[usize::from(code & 7)]) * scale;
            half::bf16::from_f64(if code & 8 == 0 { magnitude } else { -magnitude }).to_le_bytes()
        };
        let table: [[u8; 2]; 16] = std::array::from_fn(|code| value(code as u8));
        for (byte, pair) in codes.iter().zip(into.chunks_mut(4)) {
            pair[..2].copy_from_slice(&table[usize::from(byte & 15)]);
            pair[2..].copy_from_slice(&table[usize::from(byte >> 4)]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mxfp4_codes_are_exact_in_bfloat16() {
        let codes: Vec<u8> = (0..16).map(|i| ((i % 8) * 2) | (((i % 8) * 2 + 1) << 4)).collect();
        let magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
        for exponent in [0u8, 1, 100, 127, 130, 250] {
            let mut out = vec![0; 64];
            decode_mxfp4(&codes, &[exponent], &mut out);
            let got: Vec<f64> = out.chunks(2).map(|b| f64::from(half::bf16::from_le_bytes([b[0], b[1]]))).collect();
            for (index, value) in got.iter().enumerate() {
                let code = index % 16;
                let sign = if code >= 8 { -1.0 } else { 1.0 };
                let expected = sign * magnitudes[code % 8] * 2f64.powi(i32::from(exponent) - 127);
                assert_eq!(*value, expected, "code {code}, scale {exponent}");
            }
        }
        let mut out = vec![0; 64];
        decode_mxfp4(&codes, &[255], &mut out);
        assert!(half::bf16::from_le_bytes([out[2], out[3]]).is_nan());
    }
}
