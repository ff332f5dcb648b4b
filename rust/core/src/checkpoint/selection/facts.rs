//! What is known of a tensor.

use safetensors::Dtype;

/// What a header says of one tensor.
#[derive(Debug, Clone, Copy)]
pub struct TensorFacts<'a> {
    /// The tensor's name.
    pub name: &'a str,
    /// Its shape, row-major.
    pub shape: &'a [usize],
    /// The type of its elements.
    pub dtype: Dtype,
}

/// The module that holds a tensor: its name without the last component.
pub(super) fn module_of(name: &str) -> &str {
    name.rsplit_once('.').map_or("", |(module, _)| module)
}
