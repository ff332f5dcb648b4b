//! The extension module `halfbyte._native`: converts, validates, adds context, calls.

mod checkpoint;
mod error;
mod selection;

use pyo3::prelude::*;

/// The compiled core of halfbyte.
#[pymodule]
fn _native(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    checkpoint::register(m)?;
    selection::register(m)
}
