//! The two checkpoints of a comparison, and what a piece of one tensor found.

use crate::checkpoint::reader::Checkpoint;

/// What one piece found.
#[derive(Debug, Clone, Default)]
pub(super) struct Found {
    /// Bytes (of codes, or of a dense tensor) that are not the same.
    pub differing: u64,
    pub squares: f64,
    pub largest: f64,
    /// Scales of a fresh 4-bit quantization.
    pub scales: Vec<f32>,
    /// Whether scales of rows are not the same.
    pub other_scales: bool,
    /// Codes of rows that are not the same because the value lies in the middle of both.
    pub ties: u64,
}

/// The two checkpoints.
pub(super) struct Sides<'a> {
    pub a: &'a Checkpoint,
    pub b: &'a Checkpoint,
}
