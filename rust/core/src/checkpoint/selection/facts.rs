//! What headers and configurations say by themselves.

use safetensors::Dtype;
use serde_json::Value;

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

/// The types of a model and of its parts, from its configuration.
pub(super) fn collect_model_types<'c>(value: &'c Value, depth: usize, found: &mut Vec<&'c str>) {
    let Value::Object(fields) = value else { return };
    if let Some(name) = fields.get("model_type").and_then(Value::as_str).filter(|name| !name.is_empty()) {
        found.push(name);
    }
    // Composite models nest the configurations of their parts two or three deep.
    if depth < 4 {
        for nested in fields.values() {
            collect_model_types(nested, depth + 1, found);
        }
    }
}
