//! Comparing two checkpoints tensor by tensor: is this 4-bit weight what a fresh quantization of that one gives, and
//! if not, how far apart are the values?

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::cast_slice;
use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::{Value, json};

use super::convert::{PIECE_BYTES, read_scales, transposed, with_element};
use super::file::read_exact_at;
use super::job::Progress;
use super::plan::{WeightSource, find_weights};
use super::selection;
use super::source::{Checkpoint, TensorRef};
use super::state::item_size;
use super::workers;
use crate::blockwise::{self, Element};
use crate::error::Result;
use crate::geometry::packed_len;
use crate::nested;

/// Values per piece when both sides are read as float32.
const PIECE_VALUES: usize = PIECE_BYTES / 4;

/// What stands on the two sides of one name.
enum Pair {
    /// A dense weight and its quantization.
    Fresh { a: TensorRef, b: WeightSource, transpose: bool },
    /// Two 4-bit weights.
    Weights { a: WeightSource, b: WeightSource },
    /// Two tensors that are not quantized.
    Dense { a: TensorRef, b: TensorRef },
}

/// What one piece found.
#[derive(Debug, Clone, Default)]
struct Found {
    /// Bytes (of codes, or of a dense tensor) that are not the same.
    differing: u64,
    squares: f64,
    largest: f64,
    /// Scales of a fresh quantization.
    scales: Vec<f32>,
}

struct Task {
    name: String,
    pair: Pair,
    values: usize,
    comparable: bool,
}

struct Sides<'a> {
    a: &'a Checkpoint,
    b: &'a Checkpoint,
}

/// A weight's scales, read by the first piece that needs them.
type ScaleCache = Mutex<HashMap<(usize, bool), Arc<Vec<f32>>>>;

/// Compares every tensor of `b` with `a` and gives a report; `config` is the config.json of `a`, which tells of
/// weights that are stored transposed.
///
/// Each tensor's `status` is `identical` (same bytes; for a 4-bit weight beside a dense one: the same bytes as a fresh
/// quantization), `equal-codes` (4-bit codes alike, scales not), `differs`, `shape` (not comparable), `missing` (not
/// in b) or `extra` (not in a). `rmse` and `max_error` compare the values that a loader would see.
pub fn verify(
    a: &Checkpoint,
    b: &Checkpoint,
    config: Option<&Value>,
    threads: usize,
    progress: &Progress,
) -> Result<Value> {
    let weights = |c: &Checkpoint| -> Result<(HashMap<String, WeightSource>, HashSet<TensorRef>)> {
        let found = find_weights(c)?;
        let parts = found.iter().flat_map(|w| w.parts.iter().copied()).collect();
        Ok((found.into_iter().map(|w| (w.name.clone(), w)).collect(), parts))
    };
    let (mut weights_a, parts_a) = weights(a)?;
    let (mut weights_b, parts_b) = weights(b)?;
    let plain = |c: &Checkpoint, parts: &HashSet<TensorRef>| -> HashMap<String, TensorRef> {
        c.order.iter().filter(|r| !parts.contains(r)).map(|&r| (c.tensor(r).name.clone(), r)).collect()
    };
    let (plain_a, plain_b) = (plain(a, &parts_a), plain(b, &parts_b));
    let names: BTreeSet<&String> =
        weights_a.keys().chain(weights_b.keys()).chain(plain_a.keys()).chain(plain_b.keys()).collect();
    let names: Vec<String> = names.into_iter().cloned().collect();

    let mut rows: Vec<Value> = Vec::new();
    let mut tasks = Vec::new();
    for name in names {
        match (weights_a.remove(&name), plain_a.get(&name), weights_b.remove(&name), plain_b.get(&name)) {
            (_, Some(&dense), Some(b4), _) => {
                let shape = &a.tensor(dense).shape;
                let turned: Vec<usize> = shape.iter().rev().copied().collect();
                let transpose = *shape != b4.state.shape || selection::is_conv1d(config, &name);
                let fits = if transpose { turned == b4.state.shape && shape.len() == 2 } else { true };
                let float = matches!(a.tensor(dense).dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
                let values = b4.state.elements();
                tasks.push(Task {
                    name,
                    values,
                    comparable: fits && float,
                    pair: Pair::Fresh { a: dense, b: b4, transpose },
                });
            }
            (Some(a4), _, Some(b4), _) => {
                let comparable = a4.state.shape == b4.state.shape;
                tasks.push(Task {
                    name,
                    values: b4.state.elements(),
                    comparable,
                    pair: Pair::Weights { a: a4, b: b4 },
                });
            }
            (None, Some(&da), None, Some(&db)) => {
                let (ta, tb) = (a.tensor(da), b.tensor(db));
                let same = ta.shape == tb.shape && (ta.dtype == tb.dtype || (is_float(ta.dtype) && is_float(tb.dtype)));
                tasks.push(Task { name, values: tb.elements(), comparable: same, pair: Pair::Dense { a: da, b: db } });
            }
            (Some(_), _, None, Some(_)) => {
                rows.push(json!({"name": name, "status": "shape", "detail": "4-bit in the first, not in the second"}));
            }
            (a4, da, None, None) if a4.is_some() || da.is_some() => {
                rows.push(json!({"name": name, "status": "missing"}))
            }
            _ => rows.push(json!({"name": name, "status": "extra"})),
        }
    }

    let mut pieces: Vec<(usize, usize, usize)> = Vec::new();
    for (number, task) in tasks.iter().enumerate().filter(|(_, t)| t.comparable) {
        let step = if matches!(task.pair, Pair::Fresh { transpose: true, .. }) { usize::MAX } else { PIECE_VALUES };
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
    rows.sort_by(|x, y| x["name"].as_str().cmp(&y["name"].as_str()));
    let count = |status: &str| rows.iter().filter(|r| r["status"] == status).count();
    Ok(json!({
        "a": a.folder.to_string_lossy(),
        "b": b.folder.to_string_lossy(),
        "identical": count("identical"),
        "equal_codes": count("equal-codes"),
        "different": count("differs") + count("shape"),
        "missing": count("missing"),
        "extra": count("extra"),
        "quantized": tasks.iter().filter(|t| !matches!(t.pair, Pair::Dense { .. })).count(),
        "tensors": rows,
    }))
}

fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

impl Sides<'_> {
    fn piece(&self, pair: &Pair, task: usize, start: usize, len: usize, cache: &ScaleCache) -> Result<Found> {
        match pair {
            Pair::Fresh { a, b, transpose } => {
                let dtype = self.a.tensor(*a).dtype;
                with_element!(dtype, T => self.fresh::<T>(*a, b, *transpose, task, start, len, cache))
            }
            Pair::Weights { a, b } => {
                let (x, codes_a) = weight_values(self.a, a, (task, false), start, len, cache)?;
                let (y, codes_b) = weight_values(self.b, b, (task, true), start, len, cache)?;
                let mut found = distance(&x, &y);
                found.differing = count_differing(&codes_a, &codes_b);
                Ok(found)
            }
            Pair::Dense { a, b } => {
                let (raw_a, raw_b) = (raw(self.a, *a, start, len)?, raw(self.b, *b, start, len)?);
                let (ta, tb) = (self.a.tensor(*a).dtype, self.b.tensor(*b).dtype);
                if ta == tb && raw_a == raw_b {
                    return Ok(Found::default());
                }
                let mut found = if is_float(ta) && is_float(tb) {
                    distance(&to_floats(ta, &raw_a), &to_floats(tb, &raw_b))
                } else {
                    Found::default()
                };
                found.differing = count_differing(&raw_a, &raw_b);
                Ok(found)
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the pieces of one address")]
    fn fresh<T: Element + bytemuck::Pod>(
        &self,
        a: TensorRef,
        b: &WeightSource,
        transpose: bool,
        task: usize,
        start: usize,
        len: usize,
        cache: &ScaleCache,
    ) -> Result<Found> {
        let state = &b.state;
        let size = size_of::<T>();
        let (file, entry) = (self.a.file(a), self.a.tensor(a));
        let mut values = vec![T::default(); len];
        read_exact_at(
            &file.file,
            &file.path,
            bytemuck::cast_slice_mut(&mut values),
            entry.offset + (start * size) as u64,
        )?;
        if transpose {
            values = transposed(&values, state.shape[1], state.shape[0]);
        }
        let mut codes = vec![0; packed_len(len)];
        let mut scales = vec![0.0; state.blocksize.absmax_len(len)];
        let _ = blockwise::quantize_serial(&values, state.quant_type, state.blocksize, &mut codes, &mut scales)?;
        let (read, stored) = weight_values(self.b, b, (task, true), start, len, cache)?;
        let dense: Vec<f32> = values.iter().map(|v| v.to_f32()).collect();
        let mut found = distance(&dense, &read);
        found.differing = count_differing(&codes, &stored);
        found.scales = scales;
        Ok(found)
    }

    fn row(&self, task: &Task, found: Vec<Found>) -> Result<Value> {
        let (shape, kind) = match &task.pair {
            Pair::Fresh { b, .. } | Pair::Weights { b, .. } => {
                (b.state.shape.clone(), b.state.quant_type.as_str().to_owned())
            }
            Pair::Dense { b, .. } => (self.b.tensor(*b).shape.clone(), self.b.tensor(*b).dtype.to_string()),
        };
        if !task.comparable {
            let other = match &task.pair {
                Pair::Fresh { a, .. } | Pair::Dense { a, .. } => {
                    format!("{} {:?}", self.a.tensor(*a).dtype, self.a.tensor(*a).shape)
                }
                Pair::Weights { a, .. } => format!("{} {:?}", a.state.quant_type.as_str(), a.state.shape),
            };
            let detail = format!("{other} in the first, {kind} {shape:?} in the second");
            return Ok(json!({"name": task.name, "status": "shape", "kind": kind, "shape": shape, "detail": detail}));
        }
        let differing: u64 = found.iter().map(|f| f.differing).sum();
        let squares: f64 = found.iter().map(|f| f.squares).sum();
        let largest =
            found.iter().fold(0.0, |m: f64, f| if f.largest > m || f.largest.is_nan() { f.largest } else { m });
        let scales_equal = match &task.pair {
            Pair::Fresh { b, .. } => {
                let scales: Vec<f32> = found.into_iter().flat_map(|f| f.scales).collect();
                self.scales_as_fresh(b, &scales)?
            }
            Pair::Weights { a, b } => {
                let part = |c: &Checkpoint, w: &WeightSource| -> Result<_> {
                    let nested = w.nested.map(|(absmax, _)| c.read(absmax)).transpose()?;
                    Ok((c.read(w.absmax)?, nested, w.state.clone()))
                };
                part(self.a, a)? == part(self.b, b)?
            }
            Pair::Dense { a, b } => self.a.tensor(*a).dtype == self.b.tensor(*b).dtype,
        };
        let status = match (differing, scales_equal) {
            (0, true) => "identical",
            (0, false) if !matches!(task.pair, Pair::Dense { .. }) => "equal-codes",
            _ => "differs",
        };
        let rmse = if task.values == 0 { 0.0 } else { (squares / task.values as f64).sqrt() };
        Ok(json!({
            "name": task.name, "status": status, "kind": kind, "shape": shape, "rmse": rmse, "max_error": largest,
            "differing_bytes": differing,
        }))
    }

    /// Whether the stored scales of `b` are those of a fresh quantization, to the bit.
    fn scales_as_fresh(&self, b: &WeightSource, fresh: &[f32]) -> Result<bool> {
        let stored = self.b.read(b.absmax)?;
        let Some((nested_absmax, _)) = b.nested else {
            return Ok(stored == cast_slice::<f32, u8>(fresh));
        };
        let fresh = nested::compress(fresh);
        Ok(stored == fresh.codes
            && self.b.read(nested_absmax)? == cast_slice::<f32, u8>(&fresh.absmax)
            && b.state.nested_offset.map(f32::to_bits) == Some(fresh.offset.to_bits()))
    }
}

/// Values of a 4-bit weight as a loader sees them (rounded to the weight's own dtype), and their packed codes.
fn weight_values(
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
        blockwise::dequantize_serial(&codes, scales, state.quant_type, state.blocksize, &mut values)?;
        values.into_iter().map(Element::to_f32).collect()
    });
    Ok((values, codes))
}

fn raw(side: &Checkpoint, at: TensorRef, start: usize, len: usize) -> Result<Vec<u8>> {
    let (file, entry) = (side.file(at), side.tensor(at));
    // Elements of less than a byte are read with the whole tensor's last piece.
    let bits = entry.dtype.bitsize();
    let (from, to) = ((start * bits / 8) as u64, ((start + len) * bits).div_ceil(8) as u64);
    let mut bytes = vec![0; (to - from) as usize];
    read_exact_at(&file.file, &file.path, &mut bytes, entry.offset + from)?;
    Ok(bytes)
}

fn to_floats(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    let size = item_size(dtype);
    with_element!(dtype, T => bytes.chunks_exact(size).map(|b| bytemuck::pod_read_unaligned::<T>(b).to_f32()).collect())
}

fn distance(x: &[f32], y: &[f32]) -> Found {
    let mut found = Found::default();
    for (x, y) in x.iter().zip(y) {
        if x == y {
            continue;
        }
        let d = (f64::from(*x) - f64::from(*y)).abs();
        found.squares += d * d;
        if d > found.largest || d.is_nan() {
            found.largest = d;
        }
    }
    found
}

fn count_differing(a: &[u8], b: &[u8]) -> u64 {
    let common = a.iter().zip(b).filter(|(x, y)| x != y).count();
    (common + a.len().abs_diff(b.len())) as u64
}
