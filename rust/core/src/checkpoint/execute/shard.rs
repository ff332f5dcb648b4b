//! Doing what a plan says, one output file at a time, in little memory.
//!
//! A file is cut into pieces of [`PIECE_BYTES`] of input that fit in a core's cache. Threads take pieces in order:
//! positioned read, arithmetic in cache, positioned write. Nothing of a tensor stays in memory but the scales of a 4-bit
//! weight, which the thread that ends its last piece writes out.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use safetensors::Dtype;

use super::flush::Flusher;
use super::joining::{Joining, join_step};
use super::rows_weight::Rows;
use crate::checkpoint::cast::{cast, first_overflow, transposed};
use crate::checkpoint::dtype::{item_size, torch_name, with_element};
use crate::checkpoint::file::{read_exact_at, write_all_at};
use crate::checkpoint::job::Progress;
use crate::checkpoint::matrix::Matrix;
use crate::checkpoint::plan::layout::Layout;
use crate::checkpoint::plan::{Action, ShardPlan, WeightOutputs};
use crate::checkpoint::reader::{Checkpoint, TensorRef};
use crate::checkpoint::scratch::{Scratch, bytes};
use crate::checkpoint::state::State;
use crate::checkpoint::weights::{WeightSource, read_scales};
use crate::checkpoint::workers::{self, PIECE_BYTES};
use crate::codebook::dynamic_map;
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::geometry::packed_len;
use crate::quant::absmax::quantize_absmax;
use crate::quant::blockwise4;
use crate::quant::{Finite, first_nonfinite};

/// A part of one action.
pub(super) struct Piece {
    pub action: usize,
    /// First element of a weight, or first byte of a copy.
    pub start: usize,
    /// How many.
    pub len: usize,
    /// Position among the pieces of its action.
    pub number: usize,
}

/// Elements of as many whole rows as fit in a piece; of one row at least.
fn whole_rows(columns: usize, item_size: usize) -> usize {
    (PIECE_BYTES / item_size / columns.max(1)).max(1) * columns.max(1)
}

/// One value of a tensor's bytes.
pub(super) fn value_at(dtype: Dtype, bytes: &[u8], index: usize) -> f32 {
    let size = item_size(dtype);
    with_element!(dtype, T => bytemuck::pod_read_unaligned::<T>(&bytes[index * size..][..size]).to_f32())
}

/// What the pieces of one weight share.
struct Shared {
    left: AtomicUsize,
    /// Scales that were found, by piece; or the scales to read with.
    scales: Mutex<Scales>,
}

enum Scales {
    Found(Vec<Vec<f32>>),
    Known(Option<Arc<Vec<f32>>>),
}

/// Everything that the threads look at.
pub struct ShardJob<'a> {
    pub(super) source: &'a Checkpoint,
    shard: &'a ShardPlan,
    out: &'a File,
    path: &'a Path,
    pub(super) progress: &'a Progress,
    pub(super) allow_nonfinite: bool,
    pieces: Vec<Piece>,
    shared: Vec<Shared>,
    texts: Mutex<HashMap<usize, Vec<u8>>>,
}

impl<'a> ShardJob<'a> {
    /// Cuts the work on `shard`, whose new file is `out` at `path`.
    pub fn new(
        source: &'a Checkpoint,
        shard: &'a ShardPlan,
        out: &'a File,
        path: &'a Path,
        allow_nonfinite: bool,
        progress: &'a Progress,
    ) -> Self {
        let mut pieces = Vec::new();
        let mut shared = Vec::with_capacity(shard.actions.len());
        for (action, what) in shard.actions.iter().enumerate() {
            let (total, step) = match what {
                Action::Copy { source: Matrix { at, part: None, .. }, .. } => {
                    (source.tensor(*at).len as usize, PIECE_BYTES)
                }
                Action::Copy { source: matrix, output } => {
                    let values: usize = shard.layout.tensors[*output].shape.iter().product();
                    let size = item_size(matrix.dtype);
                    (values * size, matrix.step(PIECE_BYTES / size, 1) * size)
                }
                Action::Join { sources, fusion, output, .. } => {
                    let widest = item_size(shard.layout.tensors[*output].dtype);
                    (fusion.matrix_shape().iter().product(), join_step(fusion, sources, widest))
                }
                // A transposed weight is taken whole: its pieces would be strided reads.
                Action::Quantize { state, transpose: true, .. } => (state.elements(), usize::MAX),
                Action::Quantize { source: matrix, state, .. } => {
                    let widest = item_size(state.dtype).max(item_size(matrix.dtype));
                    (state.elements(), matrix.step(PIECE_BYTES / widest, state.blocksize.get()))
                }
                Action::QuantizeRows { shape: [rows, columns], transpose: true, .. } => (rows * columns, usize::MAX),
                Action::QuantizeRows { source: matrix, dtype, shape: [rows, columns], .. } => {
                    let widest = item_size(*dtype).max(item_size(matrix.dtype));
                    (rows * columns, matrix.step(whole_rows(*columns, widest), *columns))
                }
                Action::DequantizeRows { source, transpose: true, .. } => (source.elements(), usize::MAX),
                Action::DequantizeRows { source, output, .. } => {
                    let widest = item_size(shard.layout.tensors[*output].dtype);
                    (source.elements(), whole_rows(source.shape[1], widest))
                }
                Action::Dequantize { source, transpose: true, .. } => (source.state.elements(), usize::MAX),
                Action::Dequantize { source, output, .. } => {
                    (source.state.elements(), PIECE_BYTES / item_size(shard.layout.tensors[*output].dtype))
                }
            };
            let first = pieces.len();
            let mut start = 0;
            loop {
                let len = step.min(total - start);
                pieces.push(Piece { action, start, len, number: pieces.len() - first });
                start += len;
                if start >= total {
                    break;
                }
            }
            let count = pieces.len() - first;
            let scales = match what {
                Action::Dequantize { .. } => Scales::Known(None),
                Action::Quantize { .. } => Scales::Found(vec![Vec::new(); count]),
                Action::Copy { .. }
                | Action::Join { .. }
                | Action::QuantizeRows { .. }
                | Action::DequantizeRows { .. } => Scales::Found(Vec::new()),
            };
            shared.push(Shared { left: AtomicUsize::new(count), scales: Mutex::new(scales) });
        }
        Self { source, shard, out, path, progress, allow_nonfinite, pieces, shared, texts: Mutex::default() }
    }

    /// Writes the whole file on `threads` threads; gives its length. When it is to be `durable`, what is there is
    /// synced along the way; the last sync is left to the caller.
    pub fn run(&self, threads: usize, durable: bool) -> Result<u64> {
        if !durable {
            return self.write_all(threads, &Flusher::idle());
        }
        let (outcome, synced) = Flusher::scope(self.out, |flusher| self.write_all(threads, flusher));
        synced.map_err(Error::io(self.path, "sync"))?;
        outcome
    }

    fn write_all(&self, threads: usize, flusher: &Flusher) -> Result<u64> {
        workers::run(threads, self.pieces.len(), self.progress, Scratch::default, |scratch, piece| {
            flusher.add(self.piece(scratch, &self.pieces[piece])?);
            Ok(())
        })?;
        let texts = self.texts.lock().unwrap_or_else(PoisonError::into_inner);
        let (tail_start, tail, head) = self.layout().finish(&texts);
        write_all_at(self.out, self.path, &tail, tail_start)?;
        write_all_at(self.out, self.path, &head, 0)?;
        let len = tail_start + tail.len() as u64;
        self.out.set_len(len).map_err(Error::io(self.path, "set the length of"))?;
        Ok(len)
    }

    pub(super) fn layout(&self) -> &Layout {
        &self.shard.layout
    }

    pub(super) fn write(&self, tensor: usize, skip: usize, bytes: &[u8]) -> Result<()> {
        write_all_at(self.out, self.path, bytes, self.layout().offsets[tensor] + skip as u64)
    }

    pub(super) fn read(&self, at: TensorRef, skip: usize, into: &mut [u8]) -> Result<()> {
        let (file, entry) = (self.source.file(at), self.source.tensor(at));
        read_exact_at(&file.file, &file.path, into, entry.offset + skip as u64)
    }

    /// Does one piece; gives the bytes that it wrote, but for scales and the like.
    fn piece(&self, scratch: &mut Scratch, piece: &Piece) -> Result<u64> {
        let shared = &self.shared[piece.action];
        if piece.number == 0 {
            self.progress.set_label(self.label(piece.action));
        }
        match &self.shard.actions[piece.action] {
            Action::Copy { source, output } => {
                let Scratch { dense, stored, packed, .. } = scratch;
                let buffer = bytes(dense, piece.len);
                if source.part.is_none() {
                    self.read(source.at, piece.start, buffer)?;
                    self.progress.add(piece.len as u64);
                } else {
                    let size = item_size(source.dtype);
                    source.read(self.source, piece.start / size, buffer, stored)?;
                    self.progress.add(source.stored_len(piece.len / size));
                }
                let (from, to) = (source.dtype, self.layout().tensors[*output].dtype);
                if from == to {
                    self.write(*output, piece.start, buffer)?;
                    return Ok(piece.len as u64);
                }
                let (before, after) = (item_size(from), item_size(to));
                let other = bytes(packed, piece.len / before * after);
                cast(from, to, buffer, other);
                if !self.allow_nonfinite
                    && let Some((index, value)) = first_overflow(from, to, buffer, other)
                {
                    return Err(self.too_large(
                        source,
                        self.label(piece.action),
                        piece.start / before + index,
                        value,
                        to,
                    ));
                }
                self.write(*output, piece.start / before * after, other)?;
                Ok(other.len() as u64)
            }
            Action::Quantize { source, state, transpose, outputs } => {
                let found = with_element!(state.dtype, T => self.quantize::<T>(scratch, piece, source, state, *transpose, outputs))?;
                if let Scales::Found(all) = &mut *shared.scales.lock().unwrap_or_else(PoisonError::into_inner) {
                    all[piece.number] = found;
                }
                if shared.left.fetch_sub(1, Ordering::AcqRel) == 1 {
                    self.finish_weight(shared, state, outputs)?;
                }
                Ok(packed_len(piece.len) as u64)
            }
            Action::QuantizeRows { source, dtype, shape, transpose, outputs } => {
                let rows = Rows { source: *source, dtype: *dtype, shape: *shape, transpose: *transpose };
                self.quantize_rows(scratch, piece, &rows, outputs)
            }
            Action::DequantizeRows { source, transpose, output } => {
                let dtype = self.layout().tensors[*output].dtype;
                with_element!(dtype, T => self.dequantize_rows::<T>(scratch, piece, source, *transpose, *output))
            }
            Action::Join { sources, fusion, expert, output } => {
                let dtype = self.layout().tensors[*output].dtype;
                let joined = Joining { sources, fusion, expert: *expert, output: *output };
                with_element!(dtype, T => self.join::<T>(scratch, piece, &joined))?;
                if shared.left.fetch_sub(1, Ordering::AcqRel) == 1 {
                    let parts =
                        sources.iter().flat_map(|weight| weight.parts().iter().filter(|&&p| p != weight.codes()));
                    self.progress.add(parts.map(|&p| self.source.tensor(p).len).sum());
                }
                Ok((piece.len * sources.len() * item_size(dtype)) as u64)
            }
            Action::Dequantize { source, transpose, output } => {
                let scales = self.scales(shared, source)?;
                let dtype = self.layout().tensors[*output].dtype;
                with_element!(dtype, T => self.dequantize::<T>(scratch, piece, source, &scales, *transpose, *output))?;
                if shared.left.fetch_sub(1, Ordering::AcqRel) == 1 {
                    *shared.scales.lock().unwrap_or_else(PoisonError::into_inner) = Scales::Known(None);
                    let rest: u64 =
                        source.parts.iter().filter(|&&p| p != source.packed).map(|&p| self.source.tensor(p).len).sum();
                    self.progress.add(rest);
                }
                Ok((piece.len * item_size(dtype)) as u64)
            }
        }
    }

    pub(super) fn label(&self, action: usize) -> &str {
        match &self.shard.actions[action] {
            Action::Copy { output, .. }
            | Action::Join { output, .. }
            | Action::Dequantize { output, .. }
            | Action::DequantizeRows { output, .. } => &self.layout().tensors[*output].name,
            Action::QuantizeRows { outputs, .. } => &self.layout().tensors[outputs.codes].name,
            Action::Quantize { outputs, .. } => &self.layout().tensors[outputs.packed].name,
        }
    }

    /// Quantizes one piece and writes its codes; gives its scales.
    fn quantize<T: Element>(
        &self,
        scratch: &mut Scratch,
        piece: &Piece,
        source: &Matrix,
        state: &State,
        transpose: bool,
        outputs: &WeightOutputs,
    ) -> Result<Vec<f32>> {
        let from = source.dtype;
        let size = item_size(from);
        let dense = bytes(&mut scratch.dense, piece.len * size_of::<T>());
        if from == state.dtype {
            source.read(self.source, piece.start, dense, &mut scratch.loaded)?;
        } else {
            let stored = bytes(&mut scratch.stored, piece.len * size);
            source.read(self.source, piece.start, stored, &mut scratch.loaded)?;
            cast(from, state.dtype, stored, dense);
        }
        let turned;
        let values: &[T] = if transpose {
            // The state's shape is that of the result: [columns, rows] of what was read.
            turned = transposed::<T>(bytemuck::cast_slice(dense), state.shape[1], state.shape[0]);
            &turned
        } else {
            bytemuck::cast_slice(dense)
        };
        let mut scales = vec![0.0; state.blocksize.absmax_len(values.len())];
        // Storage of wide elements may end in padding: zero bytes.
        let stored = if piece.start + piece.len == state.elements() {
            self.layout().tensors[outputs.packed].len as usize - piece.start / 2
        } else {
            packed_len(values.len())
        };
        let packed = bytes(&mut scratch.packed, stored);
        let (codes, padding) = packed.split_at_mut(packed_len(values.len()));
        padding.fill(0);
        let finite = blockwise4::quantize_serial(values, state.quant_type, state.blocksize, codes, &mut scales)?;
        if finite == Finite::HasNonFinite
            && !self.allow_nonfinite
            && let Some((index, value)) = first_nonfinite(values)
        {
            // Where it stood before it was transposed.
            let (rows, columns) = (state.shape[0], state.shape.get(1).copied().unwrap_or(1));
            let at = if transpose { (index % columns) * rows + index / columns } else { index };
            if from != state.dtype {
                let stored = value_at(from, bytes(&mut scratch.stored, piece.len * size), at);
                if stored.is_finite() {
                    return Err(self.too_large(
                        source,
                        self.label(piece.action),
                        piece.start + at,
                        stored,
                        state.dtype,
                    ));
                }
            }
            return Err(self.nonfinite(source, self.label(piece.action), piece.start + at, value));
        }
        self.write(outputs.packed, piece.start / 2, packed)?;
        self.progress.add(source.stored_len(piece.len));
        Ok(scales)
    }

    /// Writes what a weight has beside its codes.
    fn finish_weight(&self, shared: &Shared, state: &State, outputs: &WeightOutputs) -> Result<()> {
        let mut slot = shared.scales.lock().unwrap_or_else(PoisonError::into_inner);
        let Scales::Found(found) = &mut *slot else { unreachable!("a weight that is quantized finds scales") };
        let scales = std::mem::take(found).concat();
        drop(slot);
        self.write(outputs.quant_map, 0, bytemuck::cast_slice(&state.quant_type.quant_map()))?;
        let mut state = state.clone();
        if let Some((nested_absmax, nested_map)) = outputs.nested {
            let nested = quantize_absmax(&scales);
            self.write(outputs.absmax, 0, &nested.codes)?;
            self.write(nested_absmax, 0, bytemuck::cast_slice(&nested.absmax))?;
            self.write(nested_map, 0, bytemuck::cast_slice(dynamic_map()))?;
            state.nested_offset = Some(nested.offset);
        } else {
            self.write(outputs.absmax, 0, bytemuck::cast_slice(&scales))?;
        }
        let text = state.to_json().into_bytes();
        self.texts.lock().unwrap_or_else(PoisonError::into_inner).insert(outputs.state, text);
        Ok(())
    }

    /// The scales of a 4-bit weight, read once and dropped after its last piece.
    fn scales(&self, shared: &Shared, weight: &WeightSource) -> Result<Arc<Vec<f32>>> {
        let mut slot = shared.scales.lock().unwrap_or_else(PoisonError::into_inner);
        if let Scales::Known(Some(scales)) = &*slot {
            return Ok(Arc::clone(scales));
        }
        let scales = Arc::new(read_scales(self.source, weight)?);
        *slot = Scales::Known(Some(Arc::clone(&scales)));
        Ok(scales)
    }

    /// The error of a value that is not finite: `name` is the weight's where it is one of many in a tensor.
    pub(super) fn nonfinite(&self, source: &Matrix, name: &str, index: usize, value: f32) -> Error {
        let (tensor, shape) = self.named(source, name);
        let path = self.source.file(source.at).path.clone();
        Error::NonFinite { path, tensor, index: index as u64, shape, value }
    }

    fn too_large(&self, source: &Matrix, name: &str, index: usize, value: f32, dtype: Dtype) -> Error {
        let (tensor, shape) = self.named(source, name);
        let path = self.source.file(source.at).path.clone();
        let dtype = torch_name(dtype).unwrap_or("this dtype");
        Error::TooLarge { path, tensor, index: index as u64, shape, value, dtype }
    }

    /// The name and the shape of a matrix of the source, for messages.
    pub(super) fn named(&self, source: &Matrix, name: &str) -> (String, Vec<usize>) {
        let entry = self.source.tensor(source.at);
        match source.part {
            None => (entry.name.clone(), entry.shape.clone()),
            Some(_) => (name.to_owned(), vec![source.rows, source.columns]),
        }
    }

    /// Fails where a dtype that the weight did not have makes infinities of finite values.
    pub(super) fn refuse_overflow<T: Element>(
        &self,
        weight: &WeightSource,
        piece: &Piece,
        packed: &[u8],
        scales: &[f32],
        values: &[T],
        output: usize,
    ) -> Result<()> {
        let (state, to) = (&weight.state, &self.layout().tensors[output]);
        if to.dtype == state.dtype || to.dtype == Dtype::F32 || !values.iter().any(|v| v.to_f32().is_infinite()) {
            return Ok(());
        }
        let mut exact = vec![0f32; piece.len];
        blockwise4::dequantize_serial(packed, scales, state.quant_type, state.blocksize, &mut exact)?;
        let both = values.iter().zip(&exact).enumerate();
        let found = both.map(|(i, (v, e))| (i, v.to_f32(), *e)).find(|(_, v, e)| v.is_infinite() && e.is_finite());
        found.map_or(Ok(()), |(index, _, value)| {
            Err(Error::TooLarge {
                path: self.source.file(weight.packed).path.clone(),
                tensor: weight.name.clone(),
                index: (piece.start + index) as u64,
                shape: state.shape.clone(),
                value,
                dtype: torch_name(to.dtype).unwrap_or("this dtype"),
            })
        })
    }

    fn dequantize<T: Element>(
        &self,
        scratch: &mut Scratch,
        piece: &Piece,
        weight: &WeightSource,
        scales: &[f32],
        transpose: bool,
        output: usize,
    ) -> Result<()> {
        let state = &weight.state;
        let packed = bytes(&mut scratch.packed, packed_len(piece.len));
        self.read(weight.packed, piece.start / 2, packed)?;
        let size = size_of::<T>();
        let values: &mut [T] = bytemuck::cast_slice_mut(bytes(&mut scratch.dense, piece.len * size));
        let block = state.blocksize;
        let first = piece.start / block.get();
        let scales = &scales[first..first + block.absmax_len(piece.len)];
        blockwise4::dequantize_serial(packed, scales, state.quant_type, block, values)?;
        self.refuse_overflow(weight, piece, packed, scales, values, output)?;
        if transpose {
            let turned = transposed::<T>(values, state.shape[0], state.shape[1]);
            self.write(output, 0, bytemuck::cast_slice(&turned))?;
        } else {
            self.write(output, piece.start * size, bytemuck::cast_slice(values))?;
        }
        self.progress.add(packed.len() as u64);
        Ok(())
    }
}
