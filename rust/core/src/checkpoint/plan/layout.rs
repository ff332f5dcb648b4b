//! Where every tensor of an output file will stand, before its data exists.
//!
//! Offsets must be known before the first byte is written, but the JSON of a double-quantized weight holds the mean
//! of its scales, whose text has a length that only the data tells. So these JSONs stand last in the file, and the
//! header is padded with spaces (which the format allows) to the length that it can have at most.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};

use safetensors::Dtype;
use serde::Serialize;

/// One tensor of an output file.
#[derive(Debug, Clone)]
pub struct OutputTensor {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: Dtype,
    /// Its shape; for a text the longest that it can have.
    pub shape: Vec<usize>,
    /// Its length in bytes; for a text at most.
    pub len: u64,
    /// Whether its length is known only when its data is.
    pub text: bool,
}

impl OutputTensor {
    /// A tensor of known shape.
    pub fn fixed(name: String, dtype: Dtype, shape: Vec<usize>) -> Self {
        let len = (shape.iter().product::<usize>() * dtype.bitsize()) as u64 / 8;
        Self { name, dtype, shape, len, text: false }
    }

    /// Bytes of at most `max_len`.
    pub fn text(name: String, max_len: usize) -> Self {
        Self { name, dtype: Dtype::U8, shape: vec![max_len], len: max_len as u64, text: true }
    }

    /// What the order of a file's tensors is by.
    fn place(&self) -> (bool, Reverse<Dtype>, &str) {
        (self.text, Reverse(self.dtype), &self.name)
    }
}

/// An output file's header and the place of every tensor in it.
#[derive(Debug)]
pub struct Layout {
    /// The tensors, in the order of their data.
    pub tensors: Vec<OutputTensor>,
    /// First byte of each, counted from the start of the file; for texts only a bound.
    pub offsets: Vec<u64>,
    /// Length of the padded header, without the 8 bytes of length before it.
    pub header_len: u64,
    /// Length of the file at most.
    pub max_len: u64,
    metadata: BTreeMap<String, String>,
    first_text: usize,
}

impl Layout {
    /// Lays out `tensors`: the widest element type first and then by name, as the safetensors library does, texts last.
    pub fn new(mut tensors: Vec<OutputTensor>, metadata: BTreeMap<String, String>) -> Self {
        tensors.sort_by(|a, b| a.place().cmp(&b.place()));
        let first_text = tensors.iter().position(|t| t.text).unwrap_or(tensors.len());
        let lens: Vec<u64> = tensors.iter().map(|t| t.len).collect();
        let mut layout = Self { offsets: Vec::new(), header_len: 0, max_len: 0, tensors, metadata, first_text };
        // With every text at its longest all numbers have the most digits that they can have.
        layout.header_len = (layout.header_json(&lens).len() as u64).next_multiple_of(8);
        let mut at = 8 + layout.header_len;
        for len in lens {
            layout.offsets.push(at);
            at += len;
        }
        layout.max_len = at;
        layout
    }

    /// The position of a tensor in [`Layout::tensors`].
    pub fn index(&self, tensor: &OutputTensor) -> Option<usize> {
        self.tensors.binary_search_by(|t| t.place().cmp(&tensor.place())).ok()
    }

    /// The bytes that end the file, where they start, and the bytes that begin it, once the texts are known.
    pub fn finish(&self, texts: &HashMap<usize, Vec<u8>>) -> (u64, Vec<u8>, Vec<u8>) {
        let mut tail = Vec::new();
        let mut lens: Vec<u64> = self.tensors.iter().map(|t| t.len).collect();
        for (i, len) in lens.iter_mut().enumerate().skip(self.first_text) {
            let text = texts.get(&i).map(Vec::as_slice).unwrap_or_default();
            *len = text.len() as u64;
            tail.extend_from_slice(text);
        }
        let tail_start = self.offsets.get(self.first_text).copied().unwrap_or(self.max_len);
        let mut head = self.header_len.to_le_bytes().to_vec();
        head.extend_from_slice(&self.header_json(&lens));
        head.resize(8 + self.header_len as usize, b' ');
        (tail_start, tail, head)
    }

    fn header_json(&self, lens: &[u64]) -> Vec<u8> {
        /// As `safetensors::tensor::TensorInfo` is written, without a copy of the shape.
        #[derive(Serialize)]
        struct Entry<'a> {
            dtype: Dtype,
            shape: &'a [usize],
            data_offsets: (u64, u64),
        }
        let mut at = 0;
        let mut text = Vec::from(b"{");
        // A map of more than one key would be written in an order that differs from run to run.
        if !self.metadata.is_empty() {
            text.extend(b"\"__metadata__\":");
            write_json(&mut text, &self.metadata);
        }
        for (t, &len) in self.tensors.iter().zip(lens) {
            if text.len() > 1 {
                text.push(b',');
            }
            let data_offsets = (at, at + len);
            at += len;
            write_json(&mut text, &t.name);
            text.push(b':');
            let length = [len as usize];
            let shape: &[usize] = if t.text { &length } else { &t.shape };
            write_json(&mut text, &Entry { dtype: t.dtype, shape, data_offsets });
        }
        text.push(b'}');
        text
    }
}

fn write_json(text: &mut Vec<u8>, value: &impl Serialize) {
    serde_json::to_writer(text, value).expect("names, numbers and lists are JSON");
}
