//! `_native.select`: the selection alone, JSON in and JSON out, for tests and tools.

use std::collections::HashSet;

use halfbyte::checkpoint::selection::{self, SelectionOptions, TensorFacts, Treatment};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use safetensors::Dtype;
use serde::Deserialize;
use serde_json::{Value, json};

/// The fields of `SelectionOptions`, as JSON.
#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
struct Options {
    quant_type: Option<String>,
    rules: Vec<String>,
    skip: Vec<String>,
    explicit: Option<HashSet<String>>,
    explicit_conv1d: Option<HashSet<String>>,
}

impl Options {
    fn parse(self) -> halfbyte::Result<SelectionOptions> {
        let default = SelectionOptions::default();
        Ok(SelectionOptions {
            quant_type: self.quant_type.map_or(Ok(default.quant_type), |name| name.parse())?,
            rules: self.rules.iter().map(|rule| rule.parse()).collect::<halfbyte::Result<_>>()?,
            skip: self.skip,
            explicit: self.explicit,
            explicit_conv1d: self.explicit_conv1d,
        })
    }
}

fn value_error(error: impl ToString) -> PyErr {
    PyValueError::new_err(error.to_string())
}

/// Decides which tensors of a checkpoint are quantized.
///
/// `config_json`: the text of `config.json`, or None. `tensors_json`: `[[name, shape, dtype], …]`, dtypes named as in
/// safetensors headers. `options_json`: an object with any of `quant_type`, `rules`, `skip`, `explicit`,
/// `explicit_conv1d`.
/// Returns an object with `decisions` (`[quant_type or null, transpose, reason]` each), `architecture`, `known`,
/// `notes` and `skip_modules`. Raises ValueError.
#[pyfunction]
#[pyo3(signature = (config_json, tensors_json, options_json = "{}"))]
fn select(py: Python<'_>, config_json: Option<&str>, tensors_json: &str, options_json: &str) -> PyResult<String> {
    py.detach(|| {
        let config: Option<Value> = config_json.map(serde_json::from_str).transpose().map_err(value_error)?;
        let tensors: Vec<(String, Vec<usize>, Dtype)> = serde_json::from_str(tensors_json).map_err(value_error)?;
        let options: Options = serde_json::from_str(options_json).map_err(value_error)?;
        let facts: Vec<TensorFacts<'_>> =
            tensors.iter().map(|(name, shape, dtype)| TensorFacts { name, shape, dtype: *dtype }).collect();
        let options = options.parse().map_err(value_error)?;
        let selection = selection::select(config.as_ref(), &facts, &options).map_err(value_error)?;
        let decisions: Vec<Value> = selection
            .decisions
            .iter()
            .map(|decision| match decision.treatment {
                Treatment::Quantize { quant_type, transpose } => {
                    json!([quant_type.as_str(), transpose, decision.reason])
                }
                Treatment::Keep => json!([null, false, decision.reason]),
            })
            .collect();
        Ok(json!({
            "decisions": decisions,
            "architecture": selection.architecture,
            "known": selection.known,
            "notes": selection.notes,
            "skip_modules": selection.skip_modules,
        })
        .to_string())
    })
}

/// Is this tensor stored `[in, out]`, as the weights of `Conv1D` modules are?
#[pyfunction]
fn is_conv1d(config_json: &str, name: &str) -> PyResult<bool> {
    let config: Value = serde_json::from_str(config_json).map_err(value_error)?;
    Ok(selection::is_conv1d(Some(&config), name))
}

/// Adds the functions of this file to the extension module.
pub(super) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(select, m)?)?;
    m.add_function(wrap_pyfunction!(is_conv1d, m)?)
}
