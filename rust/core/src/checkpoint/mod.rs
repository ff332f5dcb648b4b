//! Checkpoints: what to quantize, and turning one folder into another.
//!
//! [`reader`] opens a folder and checks its headers; [`selection`] decides which tensors; [`plan`] lays the output out
//! to the byte; [`execute`] carries a plan out into a [`stage`] whose files appear together; [`verify`](mod@verify) and
//! [`inspect`](mod@inspect) look at the result.

pub mod bare;
pub mod cast;
pub mod dtype;
pub mod execute;
pub mod file;
pub mod file_names;
pub mod fused;
pub mod inspect;
pub mod job;
pub mod matrix;
pub mod odd_scales;
pub mod options;
pub mod plan;
pub mod quantized;
pub mod reader;
pub mod rows;
pub mod scratch;
pub mod selection;
pub mod stage;
pub mod state;
pub mod verify;
pub mod weight_type;
pub mod weights;
pub mod workers;

#[cfg(test)]
mod tests;
