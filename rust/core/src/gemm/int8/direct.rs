//! Products of codes with few rows of activations: the weight's codes go from memory to registers.

use super::codes::Codes;
use super::finish::{Finish, Outliers, SIDE};
use super::kernel::{Kernel, LANES, Pair, STEP, words};
use crate::gemm::scratch::{Scratch, Words};
use crate::gemm::weight::lead_of;
use crate::gemm::workers::Workers;

/// Rows of the weight in a task, at most.
const TASK: usize = 32;

/// `a[m, k] · b[n, k]ᵀ`. Neither is empty.
pub fn forward<K: Kernel>(a: Codes<'_>, b: Codes<'_>, finish: &Finish<'_>, workers: Workers<'_>) {
    let (m, n, k) = (a.rows, b.rows, a.cols);
    let stride = k.next_multiple_of(STEP) / K::DEPTH;
    let mut x = Words::zeroed(m * stride);
    for (row, x) in x.as_mut_slice().chunks_exact_mut(stride).take(m).enumerate() {
        words(K::DEPTH, a.row(row), &mut x[..k.div_ceil(K::DEPTH)]);
    }
    let x = x.as_slice();
    let offsets = if K::PAIR_OFFSET { a.offsets() } else { vec![0; m] };
    let outlier_lanes = finish.outliers().map_or_else(Vec::new, Outliers::lanes);
    let task_rows = n.div_ceil(8 * workers.threads()).next_multiple_of(2).min(TASK);
    workers.for_each(n.div_ceil(task_rows), |task| {
        let rows = task * task_rows..n.min((task + 1) * task_rows);
        Scratch::with(|scratch| {
            let results: &mut [i32] = bytemuck::cast_slice_mut(scratch.sums.at_least(m * TASK));
            let left_out: &mut [f32] = bytemuck::cast_slice_mut(scratch.tile.at_least(m * TASK));
            for row in rows.clone().step_by(2) {
                let both = [row, (row + 1).min(rows.end - 1)];
                for first_lane in (0..m).step_by(LANES) {
                    let count = LANES.min(m - first_lane);
                    let pair = Pair {
                        rows: both.map(|row| b.row(row).as_ptr()),
                        len: k,
                        ahead: b.row(row).as_ptr().cast::<u8>().wrapping_add(lead_of(b.pitch)),
                        x: &raw const x[first_lane * stride],
                        x_stride: stride,
                    };
                    // SAFETY: the path is available; rows and activations are as long as `k` says.
                    let sums = unsafe { (K::PAIRS[count - 1])(&pair) };
                    for (row, sums) in both.into_iter().zip(sums) {
                        for (lane, sum) in sums.into_iter().enumerate().take(count) {
                            results[(first_lane + lane) * TASK + row - rows.start] = sum;
                        }
                    }
                }
                if let Some(outliers) = finish.outliers() {
                    // Now, while the rows are in the first-level cache.
                    let codes = both.map(|row| b.row(row));
                    for (group, lanes) in outlier_lanes.chunks_exact(outliers.columns.len()).enumerate() {
                        let sums = finish.pair_sums(&outliers.columns, lanes, codes);
                        for lane in group * SIDE..m.min((group + 1) * SIDE) {
                            for (row, sums) in both.into_iter().zip(sums) {
                                left_out[lane * TASK + row - rows.start] = sums[lane % SIDE];
                            }
                        }
                    }
                }
            }
            for (row, results) in results.chunks_exact_mut(TASK).take(m).enumerate() {
                let results = &mut results[..rows.len()];
                let left_out = finish.outliers().map(|_| &left_out[row * TASK..][..rows.len()]);
                // SAFETY: this task alone has these rows of the weight, which are columns of the result.
                unsafe { finish.store(row, rows.start, results, offsets[row], left_out) }
            }
        });
    });
}
