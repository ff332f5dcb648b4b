//! The extension module `halfbyte._native`: converts, validates, adds context, calls.

use pyo3::prelude::*;

mod selection;

/// The compiled core of halfbyte.
#[pymodule]
fn _native(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    selection::register(m)?;
    Ok(())
}
