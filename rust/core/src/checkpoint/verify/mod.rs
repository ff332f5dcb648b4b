//! Comparing two checkpoints tensor by tensor: is this 4-bit weight what a fresh quantization of that one gives, and
//! if not, how far apart are the values?

mod report;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::cast_slice;
use safetensors::Dtype;
use serde_json::Value;

pub use self::report::{Comparison, Status, VerifyReport};
use super::cast::{cast_to_vec, floats, transposed};
use super::dtype::{is_float, item_size, with_element};
use super::file::read_exact_at;
use super::job::Progress;
use super::reader::{Checkpoint, TensorRef};
use super::selection::{self, TensorFacts};
use super::weights::{WeightSource, find_weights, read_scales};
use super::workers::{self, PIECE_BYTES};
use crate::codebook::dynamic_map;
use crate::dtype::Element;
use crate::error::Result;
use crate::geometry::{NESTED_BLOCK_SIZE, packed_len};
use crate::quant::absmax::{self, Nested};
use crate::quant::blockwise4;

/// How far from the nearest 8-bit code a scale's code may lie, as a share of the block's largest: bitsandbytes looks the
/// code up in a table of 2^16 steps on a CPU.
const CODE_SLACK: f32 = 1.0 / 16384.0;

/// How far two means of the same scales may lie apart, relative to them: the order of the sum is up to the writer.
const MEAN_SLACK: f32 = 1.0 / 1_048_576.0;

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

/// How the scales of a 4-bit weight stand to what they should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scales {
    /// The same bytes.
    Same,
    /// Doubly quantized by the same rule, rounded another way.
    Rounded,
    /// Neither.
    Different,
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

/// Compares every tensor of `b` with `a`; `config` is the config.json of `a`, which tells of weights that are stored
/// transposed. Values are compared as a loader would see them.
pub fn verify(
    a: &Checkpoint,
    b: &Checkpoint,
    config: Option<&Value>,
    threads: usize,
    progress: &Progress,
) -> Result<VerifyReport> {
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
    let facts: Vec<TensorFacts<'_>> = a.order.iter().map(|&at| a.facts(at)).collect();
    let conv1d = b.conv1d_names().unwrap_or_else(|| selection::conv1d_names(config, &facts));
    let (plain_a, plain_b) = (plain(a, &parts_a), plain(b, &parts_b));
    let names: BTreeSet<&String> =
        weights_a.keys().chain(weights_b.keys()).chain(plain_a.keys()).chain(plain_b.keys()).collect();
    let names: Vec<String> = names.into_iter().cloned().collect();

    let mut rows: Vec<Comparison> = Vec::new();
    let mut tasks = Vec::new();
    for name in names {
        match (weights_a.remove(&name), plain_a.get(&name), weights_b.remove(&name), plain_b.get(&name)) {
            (_, Some(&dense), Some(b4), _) => {
                let shape = &a.tensor(dense).shape;
                let turned: Vec<usize> = shape.iter().rev().copied().collect();
                let transpose = *shape != b4.state.shape || conv1d.contains(&name);
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
                let detail = "4-bit in the first, not in the second".to_owned();
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
    rows.sort_by(|x, y| x.name.cmp(&y.name));
    Ok(VerifyReport {
        a: a.folder.to_string_lossy().into_owned(),
        b: b.folder.to_string_lossy().into_owned(),
        tensors: rows,
    })
}

impl Sides<'_> {
    fn piece(&self, pair: &Pair, task: usize, start: usize, len: usize, cache: &ScaleCache) -> Result<Found> {
        match pair {
            Pair::Fresh { a, b, transpose } => {
                with_element!(b.state.dtype, T => self.fresh::<T>(*a, b, *transpose, task, start, len, cache))
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
        a: TensorRef,
        b: &WeightSource,
        transpose: bool,
        task: usize,
        start: usize,
        len: usize,
        cache: &ScaleCache,
    ) -> Result<Found> {
        let state = &b.state;
        // Quantized as a loader would have: cast to the dtype of the model first.
        let bytes = cast_to_vec(self.a.tensor(a).dtype, state.dtype, &raw(self.a, a, start, len)?);
        let mut values: Vec<T> = bytemuck::pod_collect_to_vec(&bytes);
        if transpose {
            values = transposed(&values, state.shape[1], state.shape[0]);
        }
        let mut codes = vec![0; packed_len(len)];
        let mut scales = vec![0.0; state.blocksize.absmax_len(len)];
        let _ = blockwise4::quantize_serial(&values, state.quant_type, state.blocksize, &mut codes, &mut scales)?;
        let (read, stored) = weight_values(self.b, b, (task, true), start, len, cache)?;
        let dense: Vec<f32> = values.iter().map(|v| v.to_f32()).collect();
        let mut found = distance(&dense, &read);
        found.differing = count_differing(&codes, &stored);
        found.scales = scales;
        Ok(found)
    }

    fn row(&self, task: &Task, found: Vec<Found>) -> Result<Comparison> {
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
            let name = task.name.clone();
            return Ok(Comparison { name, status: Status::Shape, kind, shape, detail, ..Comparison::default() });
        }
        let differing: u64 = found.iter().map(|f| f.differing).sum();
        let squares: f64 = found.iter().map(|f| f.squares).sum();
        let largest =
            found.iter().fold(0.0, |m: f64, f| if f.largest > m || f.largest.is_nan() { f.largest } else { m });
        let scales = match &task.pair {
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
            _ => Status::Differs,
        };
        let rmse = if task.values == 0 { 0.0 } else { (squares / task.values as f64).sqrt() };
        let detail = match &task.pair {
            Pair::Dense { a, b } if self.a.tensor(*a).dtype != self.b.tensor(*b).dtype => {
                format!("{} in the first, {kind} in the second", self.a.tensor(*a).dtype)
            }
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

    /// The stored scales of `b` beside those of a fresh quantization.
    fn scales_as_fresh(&self, b: &WeightSource, fresh: &[f32]) -> Result<Scales> {
        if !tables_as_defined(self.b, b)? {
            return Ok(Scales::Different);
        }
        let Some(stored) = read_nested(self.b, b)? else {
            let same = self.b.read(b.absmax)? == cast_slice::<f32, u8>(fresh);
            return Ok(if same { Scales::Same } else { Scales::Different });
        };
        Ok(nested_beside_exact(&stored, fresh))
    }

    /// The scales of two 4-bit weights beside each other.
    fn scales_of_both(&self, a: &WeightSource, b: &WeightSource) -> Result<Scales> {
        if a.state.dtype != b.state.dtype || !tables_as_defined(self.a, a)? || !tables_as_defined(self.b, b)? {
            return Ok(Scales::Different);
        }
        Ok(match (read_nested(self.a, a)?, read_nested(self.b, b)?) {
            (Some(x), Some(y)) => nested_beside_nested(&x, &y),
            // One of them is singly quantized: the other is no more than a rounding of it.
            (None, Some(y)) => nested_beside_exact(&y, &floats(&self.a.read(a.absmax)?)).at_most_rounded(),
            (Some(x), None) => nested_beside_exact(&x, &floats(&self.b.read(b.absmax)?)).at_most_rounded(),
            (None, None) if self.a.read(a.absmax)? == self.b.read(b.absmax)? => Scales::Same,
            (None, None) => Scales::Different,
        })
    }
}

impl Scales {
    fn at_most_rounded(self) -> Self {
        if self == Self::Same { Self::Rounded } else { self }
    }
}

/// Whether the tables that a weight brings along are those of the format, whatever the sign of their zeros.
fn tables_as_defined(side: &Checkpoint, weight: &WeightSource) -> Result<bool> {
    if let Some(map) = weight.quant_map
        && floats(&side.read(map)?) != weight.state.quant_type.quant_map()
    {
        return Ok(false);
    }
    match weight.nested {
        Some((_, map)) => Ok(floats(&side.read(map)?) == dynamic_map()),
        None => Ok(true),
    }
}

/// The doubly quantized scales of a weight, as stored; `None` when it has single ones.
fn read_nested(side: &Checkpoint, weight: &WeightSource) -> Result<Option<Nested>> {
    let Some((absmax, _)) = weight.nested else { return Ok(None) };
    let offset = weight.state.nested_offset.unwrap_or(0.0);
    Ok(Some(Nested { codes: side.read(weight.absmax)?, absmax: floats(&side.read(absmax)?), offset }))
}

/// Doubly quantized scales beside the scales that they stand for.
fn nested_beside_exact(stored: &Nested, exact: &[f32]) -> Scales {
    let fresh = absmax::quantize_absmax(exact);
    if same_nested(stored, &fresh) {
        return Scales::Same;
    }
    let map = dynamic_map();
    let blocks = exact.chunks(NESTED_BLOCK_SIZE).zip(stored.codes.chunks(NESTED_BLOCK_SIZE));
    let near =
        blocks.zip(fresh.codes.chunks(NESTED_BLOCK_SIZE)).zip(&fresh.absmax).all(|(((exact, at), best), &max)| {
            let slack = CODE_SLACK + MEAN_SLACK * fresh.offset.abs() / max;
            exact.iter().zip(at).zip(best).all(|((&exact, &at), &best)| {
                let scaled = (exact - fresh.offset) / max;
                let distance = |code: u8| (map[usize::from(code)] - scaled).abs();
                at == best || distance(at) <= distance(best) + slack
            })
        });
    if near && near_statistics(stored, &fresh) { Scales::Rounded } else { Scales::Different }
}

/// Two sets of doubly quantized scales, of which nobody knows what they stood for: codes next to each other may.
fn nested_beside_nested(x: &Nested, y: &Nested) -> Scales {
    if same_nested(x, y) {
        return Scales::Same;
    }
    let map = dynamic_map();
    let near =
        x.codes.iter().zip(&y.codes).all(|(&x, &y)| {
            x.abs_diff(y) <= 1 || (map[usize::from(x)] - map[usize::from(y)]).abs() <= 2.0 * CODE_SLACK
        });
    if near && x.codes.len() == y.codes.len() && near_statistics(x, y) { Scales::Rounded } else { Scales::Different }
}

fn same_nested(x: &Nested, y: &Nested) -> bool {
    x.offset.to_bits() == y.offset.to_bits()
        && x.codes == y.codes
        && cast_slice::<f32, u8>(&x.absmax) == cast_slice::<f32, u8>(&y.absmax)
}

/// Whether the means, and what is left of the largest scales without them, differ by rounding only.
fn near_statistics(x: &Nested, y: &Nested) -> bool {
    let slack = |size: f32| MEAN_SLACK * size.max(x.offset.abs());
    (x.offset - y.offset).abs() <= slack(0.0)
        && x.absmax.len() == y.absmax.len()
        && x.absmax.iter().zip(&y.absmax).all(|(&x, &y)| (x - y).abs() <= slack(x.abs()))
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
        blockwise4::dequantize_serial(&codes, scales, state.quant_type, state.blocksize, &mut values)?;
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

/// Sum of squares and maximum of the differences, in lanes that the compiler turns into vectors. Infinities of one sign
/// are equal; a NaN on one side makes both figures NaN.
fn distance(x: &[f32], y: &[f32]) -> Found {
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

fn count_differing(a: &[u8], b: &[u8]) -> u64 {
    let common = a.iter().zip(b).filter(|(x, y)| x != y).count();
    (common + a.len().abs_diff(b.len())) as u64
}
