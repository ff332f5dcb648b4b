//! 8-bit weights beside the dense ones that they were made from, and beside each other.

use half::f16;
use safetensors::Dtype;

use super::sides::{Found, Sides};
use super::values::{count_differing, dense, distance, raw, to_floats};
use crate::checkpoint::cast::{cast_to_vec, floats, transposed};
use crate::checkpoint::matrix::Matrix;
use crate::checkpoint::reader::Checkpoint;
use crate::checkpoint::rows::RowsSource;
use crate::error::Result;
use crate::quant::int8_rowwise::{dequantize_rows, quantize_rows};

/// How far from the middle of two codes a value may lie to get the one of another order of the same float32 arithmetic:
/// four roundings of 127.
const TIE_SLACK: f64 = 1.0 / 16384.0;

/// The rows of an 8-bit weight from element `start` on: codes, scales and values.
struct Rows {
    codes: Vec<i8>,
    scales: Vec<f32>,
    values: Vec<f32>,
}

fn read(side: &Checkpoint, weight: &RowsSource, start: usize, len: usize) -> Result<Rows> {
    let columns = weight.shape[1];
    let codes = bytemuck::cast_vec(raw(side, weight.codes, start, len)?);
    let scales = floats(&raw(side, weight.scales, start / columns, len / columns)?);
    let mut values = vec![0.0; len];
    dequantize_rows(&codes, &scales, scales.len(), columns, &mut values)?;
    Ok(Rows { codes, scales, values })
}

impl Sides<'_> {
    /// A dense weight, as a loader has it in `dtype`, beside its 8-bit form. A piece is made of whole rows.
    pub(super) fn fresh_rows(
        &self,
        a: Matrix,
        b: &RowsSource,
        dtype: Dtype,
        transpose: bool,
        (start, len): (usize, usize),
    ) -> Result<Found> {
        let [rows, columns] = b.shape;
        let loaded = cast_to_vec(a.dtype, dtype, &dense(self.a, &a, start, len)?);
        let halves = cast_to_vec(dtype, Dtype::F16, &loaded);
        let (mut exact, mut halves) = (to_floats(dtype, &loaded), bytemuck::pod_collect_to_vec::<u8, f16>(&halves));
        if transpose {
            (exact, halves) = (transposed(&exact, columns, rows), transposed(&halves, columns, rows));
        }
        let (mut codes, mut scales) = (vec![0; len], vec![0.0; len / columns]);
        quantize_rows(&halves, scales.len(), columns, &mut codes, &mut scales)?;
        let stored = read(self.b, b, start, len)?;
        let mut found = distance(&exact, &stored.values);
        found.differing = count_differing(bytemuck::cast_slice(&codes), bytemuck::cast_slice(&stored.codes));
        found.other_scales = !same_bits(&scales, &stored.scales);
        let differ = codes.iter().zip(&stored.codes).enumerate().filter(|(_, (fresh, stored))| fresh != stored);
        found.ties = differ
            .filter(|&(at, (&fresh, &stored))| {
                let exact = f64::from(halves[at].to_f32()) * 127.0 / f64::from(scales[at / columns]);
                let middle = (f64::from(fresh) + f64::from(stored)) / 2.0;
                fresh.abs_diff(stored) == 1 && (exact - middle).abs() <= TIE_SLACK
            })
            .count() as u64;
        Ok(found)
    }

    /// Two 8-bit weights.
    pub(super) fn both_rows(&self, a: &RowsSource, b: &RowsSource, (start, len): (usize, usize)) -> Result<Found> {
        let (x, y) = (read(self.a, a, start, len)?, read(self.b, b, start, len)?);
        let mut found = distance(&x.values, &y.values);
        found.differing = count_differing(bytemuck::cast_slice(&x.codes), bytemuck::cast_slice(&y.codes));
        found.other_scales = !same_bits(&x.scales, &y.scales);
        Ok(found)
    }
}

fn same_bits(x: &[f32], y: &[f32]) -> bool {
    bytemuck::cast_slice::<f32, u8>(x) == bytemuck::cast_slice::<f32, u8>(y)
}
