//! Values that cross between Rust and Python as what they are: structs as dicts, options by the names of their fields.

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pythonize::{depythonize, pythonize};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The Python value of a report.
pub fn to_python<'py>(py: Python<'py>, value: &impl Serialize) -> PyResult<Bound<'py, PyAny>> {
    pythonize(py, value).map_err(|error| PyRuntimeError::new_err(error.to_string()))
}

/// Options from the dict of their fields. ValueError for a field that is missing, unknown, or not what it must be.
pub fn from_python<T: DeserializeOwned>(value: &Bound<'_, impl Sized>) -> PyResult<T> {
    depythonize(value.as_any()).map_err(|error| PyValueError::new_err(error.to_string()))
}
