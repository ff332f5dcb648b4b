//! The selection alone, and what rules and skip names match.

use halfbyte::checkpoint::options::{QuantizeOptions, Selected};
use halfbyte::checkpoint::quantized;
use halfbyte::checkpoint::selection::{self, Rule, TensorFacts, Treatment};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use safetensors::Dtype;
use serde::Serialize;
use serde_json::Value;

use super::error::to_py;
use super::values::{from_python, to_python};

/// A decision as Python sees it.
#[derive(Serialize)]
struct Decision {
    quant_type: Option<&'static str>,
    transpose: bool,
    reason: String,
}

/// The decisions for a whole checkpoint as Python sees them.
#[derive(Serialize)]
struct Selection {
    decisions: Vec<Decision>,
    architecture: Option<String>,
    known: bool,
    notes: Vec<String>,
    skip_modules: Option<Vec<String>>,
}

impl From<selection::Selection> for Selection {
    fn from(found: selection::Selection) -> Self {
        let decisions = found.decisions.into_iter().map(|decision| {
            let (quant_type, transpose) = match decision.treatment {
                Treatment::Quantize { quant_type, transpose } => (Some(quant_type.as_str()), transpose),
                Treatment::Keep => (None, false),
            };
            Decision { quant_type, transpose, reason: decision.reason }
        });
        Self {
            decisions: decisions.collect(),
            architecture: found.architecture,
            known: found.known,
            notes: found.notes,
            skip_modules: found.skip_modules,
        }
    }
}

fn parse(config_json: &str) -> PyResult<Value> {
    serde_json::from_str(config_json).map_err(|error| PyValueError::new_err(error.to_string()))
}

/// Decides which tensors of a checkpoint are quantized.
///
/// `config_json`: the text of `config.json`, or None. `tensors`: name, shape and dtype of each, dtypes named as in
/// safetensors headers. `selected`: as for `plan_quantize`.
#[pyfunction]
#[pyo3(signature = (config_json, tensors, options, selected = None))]
fn select<'py>(
    py: Python<'py>,
    config_json: Option<&str>,
    tensors: &Bound<'py, PyAny>,
    options: &Bound<'py, PyDict>,
    selected: Option<&Bound<'py, PyDict>>,
) -> PyResult<Bound<'py, PyAny>> {
    let config = config_json.map(parse).transpose()?;
    let tensors: Vec<(String, Vec<usize>, Dtype)> = from_python(tensors)?;
    let options: QuantizeOptions = from_python(options)?;
    let selected: Option<Selected> = selected.map(from_python).transpose()?;
    let found = py.detach(|| {
        let facts: Vec<TensorFacts<'_>> =
            tensors.iter().map(|(name, shape, dtype)| TensorFacts { name, shape, dtype: *dtype }).collect();
        selection::select(config.as_ref(), selection::Code::Unseen, &facts, &options, selected.as_ref())
    });
    to_python(py, &Selection::from(found.map_err(to_py)?))
}

/// For each tensor of a model in memory: the first rule and the first skip name that match it.
#[pyfunction]
fn match_names<'py>(
    py: Python<'py>,
    tensors: Vec<String>,
    rules: Vec<String>,
    skip: Vec<String>,
) -> PyResult<Bound<'py, PyAny>> {
    let found = py.detach(|| {
        let rules = rules.iter().map(|rule| rule.parse::<Rule>()).collect::<halfbyte::Result<Vec<_>>>()?;
        selection::match_names(&tensors, &rules, &skip)
    });
    to_python(py, &found.map_err(to_py)?)
}

/// Whether the components of each module's path hold those of a key.
#[pyfunction]
fn match_components(modules: Vec<String>, keys: Vec<String>) -> Vec<bool> {
    selection::match_components(&modules, &keys)
}

/// Whether each module is an output embedding by its name.
#[pyfunction]
fn named_as_output(modules: Vec<String>) -> Vec<bool> {
    selection::named_as_output(&modules)
}

/// The tensors that stand beside weights that are quantized already: name and method of each. `tensors`: name and dtype,
/// dtypes named as in safetensors headers.
#[pyfunction]
fn companions_of_quantized(tensors: &Bound<'_, PyAny>) -> PyResult<Vec<(String, &'static str)>> {
    let tensors: Vec<(String, Dtype)> = from_python(tensors)?;
    Ok(quantized::companions(&tensors).into_iter().map(|(name, method)| (name.to_owned(), method)).collect())
}

/// `llm_int8_skip_modules` with which a loader converts one list of modules and keeps the other; None for its defaults.
#[pyfunction]
fn skip_modules(converted: Vec<String>, kept: Vec<String>) -> PyResult<Option<Vec<String>>> {
    selection::skip_modules(&converted, &kept).map_err(to_py)
}

/// Is this tensor stored `[in, out]`, as the weights of `Conv1D` modules are?
#[pyfunction]
fn is_conv1d(config_json: &str, name: &str) -> PyResult<bool> {
    Ok(selection::is_conv1d(Some(&parse(config_json)?), name))
}

/// Adds the functions of this file to the extension module.
pub(super) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(select, m)?)?;
    m.add_function(wrap_pyfunction!(match_names, m)?)?;
    m.add_function(wrap_pyfunction!(match_components, m)?)?;
    m.add_function(wrap_pyfunction!(named_as_output, m)?)?;
    m.add_function(wrap_pyfunction!(companions_of_quantized, m)?)?;
    m.add_function(wrap_pyfunction!(skip_modules, m)?)?;
    m.add_function(wrap_pyfunction!(is_conv1d, m)?)
}
