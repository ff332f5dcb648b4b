//! Chunks: so many slots of an expert as a block of the kernels for few slots takes at once.

use crate::kernels::experts_few as source;

/// Slots of a chunk at most.
pub(super) const COLUMNS: usize = source::COLUMNS;
/// int32 `[4]`.
pub(super) const CHUNK_BYTES: usize = 16;

/// Chunks that `slots` have at most.
pub(super) fn most_chunks(experts: usize, slots: usize) -> usize {
    slots.min(experts + slots / COLUMNS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_counted() {
        // One for each slot; one for each expert, and one more for each that is full.
        assert_eq!(most_chunks(128, 8), 8);
        assert_eq!(most_chunks(8, 64), 16);
    }
}
