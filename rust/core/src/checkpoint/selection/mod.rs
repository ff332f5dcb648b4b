//! Which tensors of a checkpoint are quantized.
//!
//! By default exactly those that transformers 5 with bitsandbytes would convert while loading: the weights of
//! `nn.Linear` and `Conv1D` modules, without output embeddings, tied weights, modules that the architecture keeps in
//! float32, and the module that holds the last parameter; and the matrices of experts (Mixture-of-Experts), which
//! transformers leaves alone and halfbyte's loaders take. The decision needs the `config.json`, and the names, shapes
//! and dtypes of the tensors: nothing is imported and no weight is read. Of a model with code of its own, that code is
//! searched for the classes that it names.

mod architectures;
mod evidence;
mod experts;
mod facts;
mod known;
mod matching;
mod model;
mod modules;
mod names;
mod prefixes;
pub mod rules;
mod select;
#[cfg(test)]
mod tests;

pub use self::evidence::Code;
pub use self::experts::{Experts, Projections, check_experts, experts_of, merges_experts, split_expert};
pub use self::facts::TensorFacts;
pub use self::modules::{Match, match_components, match_names, named_as_output, skip_modules};
pub use self::rules::Rule;
pub use self::select::{Decision, Selection, Treatment, conv1d_names, conv1d_of, is_conv1d, select};
