//! Memory that a thread uses again for each piece.

/// A thread's own memory, aligned for every element type.
#[derive(Default)]
pub struct Scratch {
    /// Weights.
    pub dense: Vec<u64>,
    /// Codes.
    pub packed: Vec<u64>,
    /// Weights as they are stored, when they are cast before they are quantized.
    pub stored: Vec<u64>,
    /// Weights as a loader has them, when they are cast once more.
    pub loaded: Vec<u64>,
}

/// The first `len` bytes of a buffer that grows as needed.
pub fn bytes(buffer: &mut Vec<u64>, len: usize) -> &mut [u8] {
    let words = len.div_ceil(8);
    if buffer.len() < words {
        buffer.resize(words, 0);
    }
    &mut bytemuck::cast_slice_mut(buffer)[..len]
}
