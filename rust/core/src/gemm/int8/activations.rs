//! Activations as codes: what a row is quantized to, and the columns that are left out.

use std::sync::{Mutex, PoisonError};

use super::codes::Codes;
use super::finish::Outliers;
use crate::dtype::Element;
use crate::gemm::floats::Floats;
use crate::gemm::scratch::{SharedWords, Words};
use crate::gemm::workers::Workers;
use crate::quant::int8_rowwise::Precision;
use crate::quant::int8_rowwise::row;
use crate::simd::Simd;

/// Values that one task quantizes, at least.
const TASK: usize = 1 << 14;

/// Quantized rows.
pub struct Activations {
    words: Words,
    rows: usize,
    cols: usize,
    pitch: usize,
    scales: Words,
    outliers: Option<Outliers>,
}

impl Activations {
    /// Quantizes `[rows, cols]` values; with a threshold above 0 without the columns that have outliers.
    pub fn new(simd: Simd, x: Floats<'_>, [rows, cols]: [usize; 2], threshold: f32, workers: Workers<'_>) -> Self {
        match x {
            Floats::F32(x) => Self::of(simd, x, rows, cols, threshold, workers),
            Floats::F16(x) => Self::of(simd, x, rows, cols, threshold, workers),
            Floats::Bf16(x) => Self::of(simd, x, rows, cols, threshold, workers),
        }
    }

    fn of<T: Element>(simd: Simd, x: &[T], rows: usize, cols: usize, threshold: f32, workers: Workers<'_>) -> Self {
        let pitch = cols.next_multiple_of(size_of::<u32>());
        let (mut words, mut scales) = (Words::zeroed(rows * pitch / size_of::<u32>()), Words::zeroed(rows));
        let task_rows = TASK.div_ceil(cols.max(1));
        let tasks = rows.div_ceil(task_rows);
        let rows_of = |task: usize| task * task_rows..rows.min((task + 1) * task_rows);
        let values_of = |row: usize| &x[row * cols..(row + 1) * cols];
        let mut marks = Vec::new();
        {
            let (words, scales) = (SharedWords::new(&mut words), SharedWords::new(&mut scales));
            // SAFETY: every row has its own words, and is of one task.
            let scale_of = |row: usize| unsafe { &mut scales.part(row, 1)[0] };
            if threshold > 0.0 {
                let marked = Mutex::new(vec![0u8; cols]);
                workers.for_each(tasks, |task| {
                    let mut marks = vec![0; cols];
                    for row in rows_of(task) {
                        let scale = row::largest_below(simd, values_of(row), Precision::Half, threshold, &mut marks);
                        *scale_of(row) = scale.to_bits();
                    }
                    let mut all = marked.lock().unwrap_or_else(PoisonError::into_inner);
                    all.iter_mut().zip(marks).for_each(|(all, mark)| *all |= mark);
                });
                marks = marked.into_inner().unwrap_or_else(PoisonError::into_inner);
            }
            let marks = marks.contains(&1).then_some(&*marks);
            workers.for_each(tasks, |task| {
                for row in rows_of(task) {
                    let (values, scale) = (values_of(row), scale_of(row));
                    if threshold <= 0.0 {
                        *scale = row::largest(simd, values, Precision::Half).to_bits();
                    }
                    // SAFETY: every row has its own words, and is of one task.
                    let codes = unsafe { words.part(row * pitch / size_of::<u32>(), pitch / size_of::<u32>()) };
                    let codes = &mut bytemuck::cast_slice_mut(codes)[..cols];
                    row::encode(simd, values, Precision::Half, f32::from_bits(*scale), marks, codes);
                }
            });
        }
        let columns: Vec<usize> = (0..marks.len()).filter(|&c| marks[c] == 1).collect();
        let outliers = (!columns.is_empty()).then(|| {
            let values = (0..rows).flat_map(|row| columns.iter().map(move |&c| x[row * cols + c].to_f32())).collect();
            Outliers { columns, values }
        });
        Self { words, rows, cols, pitch, scales, outliers }
    }

    /// The codes, 0 in outliers' columns.
    pub fn codes(&self) -> Codes<'_> {
        let codes = &bytemuck::cast_slice(self.words.as_slice())[..self.rows * self.pitch];
        Codes { codes, rows: self.rows, cols: self.cols, pitch: self.pitch }
    }

    /// One scale per row.
    pub fn scales(&self) -> &[f32] {
        &bytemuck::cast_slice(self.scales.as_slice())[..self.rows]
    }

    /// The columns that the codes leave out, if there are any.
    pub fn outliers(&self) -> Option<&Outliers> {
        self.outliers.as_ref()
    }
}
