//! Checkpoints: what to quantize, and turning one folder into another.
//!
//! [`source`] opens a folder and checks its headers; [`selection`] decides which tensors; [`plan`] lays the output out
//! to the byte; [`run`] carries a plan out (threads in [`workers`], pieces in [`convert`]) into a [`stage`] whose files
//! appear together; [`verify`](mod@verify) and [`inspect`](mod@inspect) look at the result.

pub mod cast;
pub mod convert;
pub mod file;
pub mod flush;
pub mod header;
pub mod inspect;
pub mod job;
pub mod layout;
pub mod plan;
pub mod quantized;
pub mod run;
pub mod selection;
pub mod source;
pub mod stage;
pub mod state;
pub mod surroundings;
pub mod verify;
pub mod weights;
pub mod workers;

#[cfg(test)]
mod tests;
