//! Checkpoints: what to quantize, and turning one folder into another.

pub mod selection;
