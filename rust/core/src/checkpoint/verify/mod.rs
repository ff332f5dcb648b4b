//! Comparing two checkpoints tensor by tensor: is this quantized weight what a fresh quantization of that one gives, and
//! if not, how far apart are the values?

mod report;
mod rows;
mod scales;
mod sides;
mod values;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Mutex, PoisonError};

use safetensors::Dtype;
use serde_json::Value;

pub use self::report::{Comparison, Status, VerifyReport};
use self::scales::Scales;
use self::sides::{Found, Sides};
use self::values::{ScaleCache, count_differing, dense, distance, raw, to_floats, weight_values};
use super::cast::{cast_to_vec, transposed};
use super::dtype::{config_dtype, is_float, with_element};
use super::fused::FusedExperts;
use super::job::Progress;
use super::matrix::Matrix;
use super::odd_scales::{self, Which};
use super::plan::groups::dtype_of as weight_dtype;
use super::reader::{Checkpoint, TensorRef};
use super::rows::RowsSource;
use super::selection::{self, TensorFacts};
use super::weight_type::WeightType;
use super::weights::{Quantized, WeightSource, find_quantized};
use super::workers::{self, PIECE_BYTES};
use crate::dtype::Element;
use crate::error::Result;
use crate::geometry::packed_len;
use crate::quant::blockwise4;

/// Values per piece when both sides are read as float32.
const PIECE_VALUES: usize = PIECE_BYTES / 4;

/// What stands on the two sides of one name.
enum Pair {
    /// A dense weight and its 4-bit form.
    Fresh { a: Matrix, b: WeightSource, transpose: bool },
    /// A dense weight, which a loader would have in `dtype`, and its 8-bit form.
    FreshRows { a: Matrix, b: RowsSource, dtype: Dtype, transpose: bool },
    /// Two 4-bit weights.
    Weights { a: WeightSource, b: WeightSource },
    /// Two 8-bit weights.
    Rows { a: RowsSource, b: RowsSource },
    /// Two tensors that are not quantized.
    Dense { a: Matrix, b: TensorRef },
}

struct Task {
    name: String,
    pair: Pair,
    values: usize,
    comparable: bool,
}

/// Compares every tensor of `b` with `a`; `config` is the config.json of `a`, which tells of weights that are stored
/// transposed, and `config_b` that of `b`, which tells the dtype that 8-bit weights were taken in. Values are compared
/// as a loader would see them.
pub fn verify(
    a: &Checkpoint,
    b: &Checkpoint,
    config: Option<&Value>,
    config_b: Option<&Value>,
    threads: usize,
    progress: &Progress,
) -> Result<VerifyReport> {
    let mut notes = Vec::new();
    let mut weights =
        |c: &Checkpoint, config: Option<&Value>| -> Result<(HashMap<String, Quantized>, HashSet<TensorRef>)> {
            let found = find_quantized(c, config)?;
            let odd = odd_scales::note(c, &found, Which::All)?;
            notes.extend(odd.map(|note| format!("{}: {note}", c.folder.display())));
            let parts = found.iter().flat_map(|w| w.parts().iter().copied()).collect();
            Ok((found.into_iter().map(|w| (w.name().to_owned(), w)).collect(), parts))
        };
    let (mut weights_a, parts_a) = weights(a, config)?;
    let (mut weights_b, parts_b) = weights(b, config_b)?;
    let plain = |c: &Checkpoint, parts: &HashSet<TensorRef>| -> HashMap<String, TensorRef> {
        c.order.iter().filter(|r| !parts.contains(r)).map(|&r| (c.tensor(r).name.clone(), r)).collect()
    };
    let facts: Vec<TensorFacts<'_>> = a.order.iter().map(|&at| a.facts(at)).collect();
    let conv1d = b.conv1d_names().unwrap_or_else(|| selection::conv1d_names(config, a.code(), &facts));
    let plain_b = plain(b, &parts_b);
    let mut plain_a: HashMap<String, (Matrix, Vec<usize>)> = plain(a, &parts_a)
        .into_iter()
        .map(|(name, at)| (name, (Matrix::whole(a, at), a.tensor(at).shape.clone())))
        .collect();
    // What one side holds as one tensor and the other as a weight for each expert is compared weight by weight.
    let fused = FusedExperts::find(a, config)?;
    for (at, tensor) in &fused.tensors {
        if tensor.parts.iter().any(|part| weights_b.contains_key(&part.name) || plain_b.contains_key(&part.name)) {
            plain_a.remove(&a.tensor(*at).name);
            let scales = tensor.parts.first().and_then(|part| part.matrix.part?.scales);
            scales.map(|scales| plain_a.remove(&a.tensor(scales).name));
            plain_a.extend(tensor.parts.iter().map(|part| (part.name.clone(), (part.matrix, part.shape.to_vec()))));
        }
    }
    let names: BTreeSet<&String> =
        weights_a.keys().chain(weights_b.keys()).chain(plain_a.keys()).chain(plain_b.keys()).collect();
    let names: Vec<String> = names.into_iter().cloned().collect();

    let mut rows: Vec<Comparison> = Vec::new();
    let mut tasks = Vec::new();
    for name in names {
        match (weights_a.remove(&name), plain_a.get(&name), weights_b.remove(&name), plain_b.get(&name)) {
            (_, Some((dense, shape)), Some(quantized), _) => {
                let dense = *dense;
                let turned: Vec<usize> = shape.iter().rev().copied().collect();
                let transpose = shape != quantized.shape() || conv1d.contains(&name);
                let fits = !transpose || turned == quantized.shape() && turned.len() == 2;
                let values = quantized.elements();
                let comparable = fits && is_float(dense.dtype);
                let pair = match quantized {
                    Quantized::FourBit(b) => Pair::Fresh { a: dense, b, transpose },
                    Quantized::Int8(b) => {
                        let dtype = weight_dtype(&name, dense.dtype, config_dtype(config_b));
                        Pair::FreshRows { a: dense, b, dtype, transpose }
                    }
                };
                tasks.push(Task { name, values, comparable, pair });
            }
            (Some(x), _, Some(y), _) => {
                let comparable = x.shape() == y.shape();
                let values = y.elements();
                let (first, second) = (x.weight_type(), y.weight_type());
                let pair = match (x, y) {
                    (Quantized::FourBit(a), Quantized::FourBit(b)) => Pair::Weights { a, b },
                    (Quantized::Int8(a), Quantized::Int8(b)) => Pair::Rows { a, b },
                    (_, y) => {
                        let (kind, shape) = (second.to_string(), y.shape().to_vec());
                        let detail = format!("{first} in the first, {second} in the second");
                        rows.push(Comparison {
                            name,
                            status: Status::Shape,
                            kind,
                            shape,
                            detail,
                            ..Default::default()
                        });
                        continue;
                    }
                };
                tasks.push(Task { name, values, comparable, pair });
            }
            (None, Some((da, shape)), None, Some(&db)) => {
                let (da, tb) = (*da, b.tensor(db));
                let same = *shape == tb.shape && (da.dtype == tb.dtype || (is_float(da.dtype) && is_float(tb.dtype)));
                tasks.push(Task { name, values: tb.elements(), comparable: same, pair: Pair::Dense { a: da, b: db } });
            }
            (Some(x), _, None, Some(_)) => {
                let detail = format!("{} in the first, not quantized in the second", x.weight_type());
                rows.push(Comparison { name, status: Status::Shape, detail, ..Comparison::default() });
            }
            (a4, da, None, None) if a4.is_some() || da.is_some() => {
                rows.push(Comparison { name, status: Status::Missing, ..Comparison::default() });
            }
            _ => rows.push(Comparison { name, status: Status::Extra, ..Comparison::default() }),
        }
    }

    let mut pieces: Vec<(usize, usize, usize)> = Vec::new();
    for (number, task) in tasks.iter().enumerate().filter(|(_, t)| t.comparable) {
        let step = match &task.pair {
            Pair::Fresh { transpose: true, .. } | Pair::FreshRows { transpose: true, .. } => usize::MAX,
            Pair::Fresh { a, b, .. } => a.step(PIECE_VALUES, b.state.blocksize.get()),
            Pair::FreshRows { a, b, .. } => {
                let columns = b.shape[1].max(1);
                a.step((PIECE_VALUES / columns).max(1) * columns, columns)
            }
            Pair::Rows { b, .. } => (PIECE_VALUES / b.shape[1].max(1)).max(1) * b.shape[1].max(1),
            Pair::Dense { a, .. } => a.step(PIECE_VALUES, 1),
            _ => PIECE_VALUES,
        };
        let mut start = 0;
        while start < task.values {
            let len = step.min(task.values - start);
            pieces.push((number, start, len));
            start += len;
        }
    }
    progress.set_total(pieces.iter().map(|p| p.2 as u64).sum());
    let found: Vec<Mutex<Found>> = pieces.iter().map(|_| Mutex::default()).collect();
    let cache = ScaleCache::default();
    let sides = Sides { a, b };
    workers::run(
        threads,
        pieces.len(),
        progress,
        || (),
        |(), piece| {
            let (task, start, len) = pieces[piece];
            progress.set_label(&tasks[task].name);
            let result = sides.piece(&tasks[task].pair, task, start, len, &cache)?;
            *found[piece].lock().unwrap_or_else(PoisonError::into_inner) = result;
            progress.add(len as u64);
            if start + len == tasks[task].values {
                // Pieces are taken in order: what stands two tasks back is done with.
                cache.lock().unwrap_or_else(PoisonError::into_inner).retain(|(t, _), _| *t + 2 > task);
            }
            Ok(())
        },
    )?;

    let mut by_task: Vec<Vec<Found>> = tasks.iter().map(|_| Vec::new()).collect();
    for ((task, ..), result) in pieces.iter().zip(found) {
        by_task[*task].push(result.into_inner().unwrap_or_else(PoisonError::into_inner));
    }
    for (task, found) in tasks.iter().zip(by_task) {
        rows.push(sides.row(task, found)?);
    }
    rows.sort_by(|x, y| x.name.cmp(&y.name));
    Ok(VerifyReport {
        a: a.folder.to_string_lossy().into_owned(),
        b: b.folder.to_string_lossy().into_owned(),
        tensors: rows,
        notes,
    })
}

impl Sides<'_> {
    fn piece(&self, pair: &Pair, task: usize, start: usize, len: usize, cache: &ScaleCache) -> Result<Found> {
        match pair {
            Pair::Fresh { a, b, transpose } => {
                with_element!(b.state.dtype, T => self.fresh::<T>(*a, b, *transpose, task, start, len, cache))
            }
            Pair::FreshRows { a, b, dtype, transpose } => self.fresh_rows(*a, b, *dtype, *transpose, (start, len)),
            Pair::Rows { a, b } => self.both_rows(a, b, (start, len)),
            Pair::Weights { a, b } => {
                let (x, codes_a) = weight_values(self.a, a, (task, false), start, len, cache)?;
                let (y, codes_b) = weight_values(self.b, b, (task, true), start, len, cache)?;
                let mut found = distance(&x, &y);
                found.differing = count_differing(&codes_a, &codes_b);
                Ok(found)
            }
            Pair::Dense { a, b } => {
                let (raw_a, raw_b) = (dense(self.a, a, start, len)?, raw(self.b, *b, start, len)?);
                let (ta, tb) = (a.dtype, self.b.tensor(*b).dtype);
                if ta == tb && raw_a == raw_b {
                    return Ok(Found::default());
                }
                if !is_float(ta) || !is_float(tb) {
                    return Ok(Found { differing: count_differing(&raw_a, &raw_b), ..Found::default() });
                }
                // A loader casts to the dtype of the model; storing the cast values is no difference.
                let mut found = distance(&to_floats(ta, &raw_a), &to_floats(tb, &raw_b));
                found.differing = count_differing(&cast_to_vec(ta, tb, &raw_a), &raw_b);
                Ok(found)
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the pieces of one address")]
    fn fresh<T: Element>(
        &self,
        a: Matrix,
        b: &WeightSource,
        transpose: bool,
        task: usize,
        start: usize,
        len: usize,
        cache: &ScaleCache,
    ) -> Result<Found> {
        let state = &b.state;
        // Quantized as a loader would have: cast to the dtype of the model first.
        let bytes = cast_to_vec(a.dtype, state.dtype, &dense(self.a, &a, start, len)?);
        let mut values: Vec<T> = bytemuck::pod_collect_to_vec(&bytes);
        if transpose {
            values = transposed(&values, state.shape[1], state.shape[0]);
        }
        let mut codes = vec![0; packed_len(len)];
        let mut scales = vec![0.0; state.blocksize.absmax_len(len)];
        let _ = blockwise4::quantize_serial(&values, state.quant_type, state.blocksize, &mut codes, &mut scales)?;
        let (read, stored) = weight_values(self.b, b, (task, true), start, len, cache)?;
        let exact: Vec<f32> = values.iter().map(|v| v.to_f32()).collect();
        let mut found = distance(&exact, &read);
        found.differing = count_differing(&codes, &stored);
        found.scales = scales;
        Ok(found)
    }

    fn row(&self, task: &Task, found: Vec<Found>) -> Result<Comparison> {
        let (shape, kind) = match &task.pair {
            Pair::Fresh { b, .. } | Pair::Weights { b, .. } => {
                (b.state.shape.clone(), b.state.quant_type.as_str().to_owned())
            }
            Pair::FreshRows { b, .. } | Pair::Rows { b, .. } => (b.shape.to_vec(), WeightType::Int8.to_string()),
            Pair::Dense { b, .. } => (self.b.tensor(*b).shape.clone(), self.b.tensor(*b).dtype.to_string()),
        };
        if !task.comparable {
            let other = match &task.pair {
                Pair::Fresh { a, .. } | Pair::FreshRows { a, .. } | Pair::Dense { a, .. } => {
                    let shape = if a.part.is_some() { &[a.rows, a.columns][..] } else { &self.a.tensor(a.at).shape };
                    format!("{} {shape:?}", a.dtype)
                }
                Pair::Weights { a, .. } => format!("{} {:?}", a.state.quant_type.as_str(), a.state.shape),
                Pair::Rows { a, .. } => format!("int8 {:?}", a.shape),
            };
            let detail = format!("{other} in the first, {kind} {shape:?} in the second");
            let name = task.name.clone();
            return Ok(Comparison { name, status: Status::Shape, kind, shape, detail, ..Comparison::default() });
        }
        let differing: u64 = found.iter().map(|f| f.differing).sum();
        let squares: f64 = found.iter().map(|f| f.squares).sum();
        let largest =
            found.iter().fold(0.0, |m: f64, f| if f.largest > m || f.largest.is_nan() { f.largest } else { m });
        let ties: u64 = found.iter().map(|f| f.ties).sum();
        let scales = match &task.pair {
            Pair::FreshRows { .. } | Pair::Rows { .. } if found.iter().any(|f| f.other_scales) => Scales::Different,
            Pair::FreshRows { .. } | Pair::Rows { .. } => Scales::Same,
            Pair::Fresh { b, .. } => {
                let scales: Vec<f32> = found.into_iter().flat_map(|f| f.scales).collect();
                self.scales_as_fresh(b, &scales)?
            }
            Pair::Weights { a, b } => self.scales_of_both(a, b)?,
            Pair::Dense { .. } => Scales::Same,
        };
        let status = match (differing, scales) {
            (0, Scales::Same) => Status::Identical,
            (0, Scales::Rounded) => Status::EqualCodes,
            (differing, Scales::Same) if differing == ties => Status::Rounded,
            _ => Status::Differs,
        };
        let rmse = if task.values == 0 { 0.0 } else { (squares / task.values as f64).sqrt() };
        let detail = match &task.pair {
            Pair::Dense { a, b } if a.dtype != self.b.tensor(*b).dtype => {
                format!("{} in the first, {kind} in the second", a.dtype)
            }
            _ if ties > 0 && status == Status::Rounded => format!("{ties} codes of values in the middle of two"),
            _ if differing == 0 && scales == Scales::Different => "the scales differ".to_owned(),
            _ => String::new(),
        };
        Ok(Comparison {
            name: task.name.clone(),
            status,
            kind,
            shape,
            rmse: Some(rmse).filter(|rmse| rmse.is_finite()),
            max_error: Some(largest).filter(|largest| largest.is_finite()),
            differing_bytes: Some(differing),
            detail,
        })
    }
}
