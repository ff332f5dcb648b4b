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
const STRIP_BYTES: usize = if cfg!(test) { 4 << 10 } else { 8 << 20 };

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
    let rows = into.len() / columns;
    // Squares are transposed in registers, and what is left over is copied value by value.
    let mut done = 0;
    if SIZE == 2 && group.is_multiple_of(SQUARE) && (1..=2).contains(&step) {
        let (from, into) =
            (bytemuck::cast_slice(from.as_flattened()), bytemuck::cast_slice_mut(into.as_flattened_mut()));
        // With a step of 2, a square also reads the value after its last one. The last rows have none.
        let whole = if step == 1 { rows } else { rows.saturating_sub(1) } / SQUARE * SQUARE;
        for row in (0..whole).step_by(SQUARE) {
            for column in (0..group).step_by(SQUARE) {
                let from: &[[u8; 2]] = &from[column * run + row * step..];
                let into: &mut [[u8; 2]] = &mut into[row * columns + first + column..];
                transpose_square(from, run, step, into, columns);
            }
        }
        done = whole;
    }
    for (row, into) in into.chunks_mut(columns).enumerate().skip(done) {
        for (column, place) in into[first..first + group].iter_mut().enumerate() {
            *place = from[column * run + row * step];
        }
    }
}

/// Rows and columns of a square: values of 16 bits that fill a register of 128.
const SQUARE: usize = 8;

/// Writes eight columns to eight rows. Columns begin `run` values apart and have every `step`-th one (1 or 2); rows begin `columns`
/// values apart.
fn transpose_square(from: &[[u8; 2]], run: usize, step: usize, into: &mut [[u8; 2]], columns: usize) {
    // The lengths that the intrinsics rely on, checked once.
    let (from, into) = (&from[..(SQUARE - 1) * run + SQUARE * step], &mut into[..(SQUARE - 1) * columns + SQUARE]);
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;
        // SAFETY: every x86-64 processor has SSE2; lengths are checked above.
        unsafe {
            let load = |column: usize| {
                let at = from.as_ptr().add(column * run).cast::<__m128i>();
                let low = _mm_loadu_si128(at);
                if step == 1 {
                    return low;
                }
                // Every other value, sign-extended to 32 bits: then packing, which saturates, does not change it.
                let even = |v| _mm_srai_epi32::<16>(_mm_slli_epi32::<16>(v));
                _mm_packs_epi32(even(low), even(_mm_loadu_si128(at.add(1))))
            };
            let into = into.as_mut_ptr();
            let v: [__m128i; SQUARE] = std::array::from_fn(load);
            // Pairs of columns, then four, then all eight.
            let two = |i: usize, j: usize| [_mm_unpacklo_epi16(v[i], v[j]), _mm_unpackhi_epi16(v[i], v[j])];
            let (a, b, c, d) = (two(0, 1), two(2, 3), two(4, 5), two(6, 7));
            for half in 0..2 {
                let four = |p: [__m128i; 2], q: [__m128i; 2]| {
                    [_mm_unpacklo_epi32(p[half], q[half]), _mm_unpackhi_epi32(p[half], q[half])]
                };
                let (left, right) = (four(a, b), four(c, d));
                for pair in 0..2 {
                    let row = 4 * half + 2 * pair;
                    let at = |row: usize| into.add(row * columns).cast::<__m128i>();
                    _mm_storeu_si128(at(row), _mm_unpacklo_epi64(left[pair], right[pair]));
                    _mm_storeu_si128(at(row + 1), _mm_unpackhi_epi64(left[pair], right[pair]));
                }
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    for (row, into) in into.chunks_mut(columns).enumerate() {
        for (column, place) in into[..SQUARE].iter_mut().enumerate() {
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
    fn columns_become_rows_whatever_their_number() {
        fn check<const SIZE: usize>(rows: usize, columns: usize, first: usize, group: usize, step: usize) {
            let run = (rows - 1) * step + 1;
            let from: Vec<u8> = (0..group * run * SIZE).map(|i| (i * 7 + i / 251) as u8).collect();
            let mut into = vec![0xa5u8; rows * columns * SIZE];
            spread::<SIZE>(&from, &mut into, run, step, columns, first);
            for (place, found) in into.chunks(SIZE).enumerate() {
                let (row, column) = (place / columns, place % columns);
                let expected = match column.checked_sub(first).filter(|column| *column < group) {
                    Some(column) => &from[(column * run + row * step) * SIZE..][..SIZE],
                    None => &[0xa5; SIZE][..],
                };
                assert_eq!(found, expected, "{row} {column} of {rows} {columns} {first} {group} {step}");
            }
        }
        for rows in [1, 2, 7, 8, 9, 16, 17, 40] {
            for (columns, first, group) in [(8, 0, 8), (40, 3, 32), (33, 1, 32), (64, 32, 32), (9, 0, 9), (5, 2, 3)] {
                for step in [1, 2, 3] {
                    check::<2>(rows, columns, first, group, step);
                    check::<4>(rows, columns, first, group, step);
                }
            }
        }
    }

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
