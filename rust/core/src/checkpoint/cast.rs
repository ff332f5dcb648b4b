//! Weights of one floating-point type, or in one order, as another.

use half::f16;
use half::slice::HalfFloatSliceExt;
use safetensors::Dtype;

use super::dtype::{item_size, with_element};
use crate::dtype::Element;

/// Casts every value of `input` from one type to another, by way of float32 and with one rounding to the nearest, ties
/// to even; what is too large becomes infinite. `output` is as long as the values take.
pub fn cast(from: Dtype, to: Dtype, input: &[u8], output: &mut [u8]) {
    if from == to {
        output.copy_from_slice(input);
        return;
    }
    if to == Dtype::F16 {
        return with_element!(from, F => cast_to_float16::<F>(input, output));
    }
    with_element!(from, F => with_element!(to, T => cast_elements::<F, T>(input, output)));
}

/// The same to float16, for which processors have an instruction that takes many values.
fn cast_to_float16<F: Element>(input: &[u8], output: &mut [u8]) {
    /// A few cache lines.
    const CHUNK: usize = 256;
    let (mut wide, mut halves) = ([0f32; CHUNK], [f16::ZERO; CHUNK]);
    let chunks = input.chunks(CHUNK * size_of::<F>()).zip(output.chunks_mut(CHUNK * size_of::<f16>()));
    for (input, output) in chunks {
        let count = output.len() / size_of::<f16>();
        let (wide, halves) = (&mut wide[..count], &mut halves[..count]);
        for (value, place) in input.chunks_exact(size_of::<F>()).zip(&mut *wide) {
            *place = bytemuck::pod_read_unaligned::<F>(value).to_f32();
        }
        halves.convert_from_f32_slice(wide);
        output.copy_from_slice(bytemuck::cast_slice(halves));
    }
}

fn cast_elements<F: Element, T: Element>(input: &[u8], output: &mut [u8]) {
    debug_assert_eq!(input.len() / size_of::<F>(), output.len() / size_of::<T>());
    for (value, place) in input.chunks_exact(size_of::<F>()).zip(output.chunks_exact_mut(size_of::<T>())) {
        let value = T::from_f32(bytemuck::pod_read_unaligned::<F>(value).to_f32());
        place.copy_from_slice(bytemuck::bytes_of(&value));
    }
}

/// The first finite value of `input` that [`cast`] made infinite, and its position.
pub fn first_overflow(from: Dtype, to: Dtype, input: &[u8], output: &[u8]) -> Option<(usize, f32)> {
    if from == to || to == Dtype::F32 {
        return None;
    }
    let overflows = with_element!(to, T => {
        let is_infinite = |b: &[u8]| bytemuck::pod_read_unaligned::<T>(b).to_f32().is_infinite();
        output.chunks_exact(size_of::<T>()).enumerate().filter(move |(_, b)| is_infinite(b)).map(|(i, _)| i).collect::<Vec<_>>()
    });
    with_element!(from, F => {
        let size = size_of::<F>();
        let value = |i: usize| bytemuck::pod_read_unaligned::<F>(&input[i * size..][..size]).to_f32();
        overflows.into_iter().map(|i| (i, value(i))).find(|(_, value)| value.is_finite())
    })
}

/// [`cast`] into a list of its own.
pub fn cast_to_vec(from: Dtype, to: Dtype, input: &[u8]) -> Vec<u8> {
    let mut output = vec![0; input.len() / item_size(from) * item_size(to)];
    cast(from, to, input, &mut output);
    output
}

/// Little-endian float32 values.
pub fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// The transpose of a row-major `[rows, columns]` matrix, in square tiles that stay in cache.
pub fn transposed<T: bytemuck::Pod>(values: &[T], rows: usize, columns: usize) -> Vec<T> {
    /// 32 rows of 32 four-byte elements: two tiles fill a quarter of a 32 KiB cache.
    const TILE: usize = 32;
    let mut out = vec![T::zeroed(); values.len()];
    for row in (0..rows).step_by(TILE) {
        for column in (0..columns).step_by(TILE) {
            for r in row..(row + TILE).min(rows) {
                for c in column..(column + TILE).min(columns) {
                    out[c * rows + r] = values[r * columns + c];
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    #[test]
    fn values_are_rounded_once_to_the_nearest() {
        let values = [1.0f32, -0.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, 70000.0, f32::INFINITY, f32::NAN, 1e-41];
        for to in [Dtype::BF16, Dtype::F16, Dtype::F32] {
            let got = cast_to_vec(Dtype::F32, to, bytemuck::cast_slice(&values));
            let back = cast_to_vec(to, Dtype::F32, &got);
            let back: Vec<f32> = back.chunks_exact(4).map(bytemuck::pod_read_unaligned).collect();
            let expected: Vec<f32> = values
                .iter()
                .map(|&v| match to {
                    Dtype::BF16 => bf16::from_f32(v).to_f32(),
                    Dtype::F16 => f16::from_f32(v).to_f32(),
                    _ => v,
                })
                .collect();
            for (b, e) in back.iter().zip(&expected) {
                assert!(b.to_bits() == e.to_bits() || (b.is_nan() && e.is_nan()), "{to}: {b} {e}");
            }
        }
    }

    #[test]
    fn only_finite_values_overflow() {
        let find = |from, to, bytes: &[u8]| {
            let cast = cast_to_vec(from, to, bytes);
            first_overflow(from, to, bytes, &cast)
        };
        let values = [f32::INFINITY, f32::NAN, 65519.0, -65520.0, 1e30];
        let bytes: &[u8] = bytemuck::cast_slice(&values);
        assert_eq!(find(Dtype::F32, Dtype::F16, bytes), Some((3, -65520.0)));
        assert_eq!(find(Dtype::F32, Dtype::BF16, bytes), None);
        assert_eq!(find(Dtype::F32, Dtype::BF16, bytemuck::cast_slice(&[0.0, f32::MAX])), Some((1, f32::MAX)));
        let wide = cast_to_vec(Dtype::F32, Dtype::BF16, bytes);
        assert_eq!(find(Dtype::BF16, Dtype::F16, &wide), Some((2, 65536.0)), "65519 is 65536 in bfloat16");
        assert_eq!(find(Dtype::BF16, Dtype::F32, &wide), None);
        assert_eq!(find(Dtype::F16, Dtype::F16, &[0, 0x7c]), None);
    }
}
