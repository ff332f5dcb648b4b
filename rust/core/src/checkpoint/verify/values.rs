//! Values and bytes of both sides.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use safetensors::Dtype;

use super::sides::Found;
use crate::checkpoint::dtype::{item_size, with_element};
use crate::checkpoint::file::read_exact_at;
use crate::checkpoint::matrix::Matrix;
use crate::checkpoint::reader::{Checkpoint, TensorRef};
use crate::checkpoint::weights::{WeightSource, read_scales};
use crate::dtype::Element;
use crate::error::Result;
use crate::geometry::packed_len;
use crate::quant::blockwise4;

/// A weight's scales, read by the first piece that needs them.
pub(super) type ScaleCache = Mutex<HashMap<(usize, bool), Arc<Vec<f32>>>>;

/// Values of a 4-bit weight as a loader sees them (rounded to the weight's own dtype), and their packed codes.
pub(super) fn weight_values(
    side: &Checkpoint,
    weight: &WeightSource,
    key: (usize, bool),
    start: usize,
    len: usize,
    cache: &ScaleCache,
) -> Result<(Vec<f32>, Vec<u8>)> {
    let scales = {
        let mut cache = cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(scales) = cache.get(&key) {
            Arc::clone(scales)
        } else {
            let scales = Arc::new(read_scales(side, weight)?);
            cache.insert(key, Arc::clone(&scales));
            scales
        }
    };
    let state = &weight.state;
    let (file, entry) = (side.file(weight.packed), side.tensor(weight.packed));
    let mut codes = vec![0; packed_len(len)];
    read_exact_at(&file.file, &file.path, &mut codes, entry.offset + start as u64 / 2)?;
    let first = start / state.blocksize.get();
    let scales = &scales[first..first + state.blocksize.absmax_len(len)];
    let values = with_element!(state.dtype, T => {
        let mut values = vec![T::default(); len];
        blockwise4::dequantize_serial(&codes, scales, state.quant_type, state.blocksize, &mut values)?;
        values.into_iter().map(Element::to_f32).collect()
    });
    Ok((values, codes))
}

/// Bytes of a dense matrix.
pub(super) fn dense(side: &Checkpoint, matrix: &Matrix, start: usize, len: usize) -> Result<Vec<u8>> {
    if matrix.part.is_none() {
        return raw(side, matrix.at, start, len);
    }
    let mut bytes = vec![0; len * item_size(matrix.dtype)];
    matrix.read(side, start, &mut bytes, &mut Vec::new())?;
    Ok(bytes)
}

pub(super) fn raw(side: &Checkpoint, at: TensorRef, start: usize, len: usize) -> Result<Vec<u8>> {
    let (file, entry) = (side.file(at), side.tensor(at));
    // Elements of less than a byte are read with the whole tensor's last piece.
    let bits = entry.dtype.bitsize();
    let (from, to) = ((start * bits / 8) as u64, ((start + len) * bits).div_ceil(8) as u64);
    let mut bytes = vec![0; (to - from) as usize];
    read_exact_at(&file.file, &file.path, &mut bytes, entry.offset + from)?;
    Ok(bytes)
}

pub(super) fn to_floats(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    let size = item_size(dtype);
    with_element!(dtype, T => bytes.chunks_exact(size).map(|b| bytemuck::pod_read_unaligned::<T>(b).to_f32()).collect())
}

/// Sum of squares and maximum of the differences, in lanes that the compiler turns into vectors. Infinities of one sign
/// are equal; a NaN on one side makes both figures NaN.
pub(super) fn distance(x: &[f32], y: &[f32]) -> Found {
    const LANES: usize = 8;
    let mut squares = [0f64; LANES];
    let mut largest = [0f64; LANES];
    let mut add = |lane: usize, x: f32, y: f32| {
        let d = if x == y { 0.0 } else { (f64::from(x) - f64::from(y)).abs() };
        squares[lane] += d * d;
        largest[lane] = if d > largest[lane] { d } else { largest[lane] };
    };
    let (whole_x, rest_x) = x.as_chunks::<LANES>();
    let (whole_y, rest_y) = y.as_chunks::<LANES>();
    for (x, y) in whole_x.iter().zip(whole_y) {
        for lane in 0..LANES {
            add(lane, x[lane], y[lane]);
        }
    }
    for (lane, (x, y)) in rest_x.iter().zip(rest_y).enumerate() {
        add(lane, *x, *y);
    }
    let squares: f64 = squares.iter().sum();
    let largest = if squares.is_nan() { f64::NAN } else { largest.iter().fold(0.0, |m: f64, &d| m.max(d)) };
    Found { squares, largest, ..Found::default() }
}

pub(super) fn count_differing(a: &[u8], b: &[u8]) -> u64 {
    let common = a.iter().zip(b).filter(|(x, y)| x != y).count();
    (common + a.len().abs_diff(b.len())) as u64
}
