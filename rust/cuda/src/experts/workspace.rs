//! The memory of a call.

use super::chunks::{CHUNK_BYTES, most_chunks};
use super::layer::Experts;

/// Where each part begins.
const PART: usize = 256;

/// What lies where in the workspace: offsets in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Workspace {
    /// int32 `[experts + 1]`: where an expert's slots begin in the order.
    pub offsets: usize,
    /// int32 `[slots]`: sorted by expert.
    pub order: usize,
    /// int32: how many chunks there are.
    pub chunk_count: usize,
    /// Chunks of an expert's slots, of which the first are there.
    pub chunks: usize,
    /// 16-bit `[slots][intermediate]`: what goes into the last matrices.
    pub hidden: usize,
    /// 16-bit `[slots][hidden]`: what comes out of them.
    pub out: usize,
    /// What blocks of products for many slots leave each other.
    pub sums: usize,
    /// In all.
    pub bytes: usize,
}

impl Workspace {
    /// For so many slots, which are few enough for these numbers, with so many bytes of sums.
    pub(super) fn new(experts: &Experts, slots: usize, sums: usize) -> Self {
        let mut end = 0;
        let mut part = |bytes: usize| {
            let begin = end;
            end += bytes.next_multiple_of(PART);
            begin
        };
        let offsets = part((experts.experts + 1) * size_of::<i32>());
        let order = part(slots * size_of::<i32>());
        let chunk_count = part(size_of::<i32>());
        let chunks = part(most_chunks(experts.experts, slots) * CHUNK_BYTES);
        let hidden = part(slots * experts.intermediate * 2);
        let out = part(slots * experts.hidden * 2);
        let sums = part(sums);
        Self { offsets, order, chunk_count, chunks, hidden, out, sums, bytes: end }
    }
}
