//! Errors of the core as Python exceptions.

use halfbyte::error::{Error, ErrorKind};
use pyo3::create_exception;
use pyo3::exceptions::{PyKeyboardInterrupt, PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;

create_exception!(
    halfbyte,
    CheckpointError,
    PyValueError,
    "A checkpoint that cannot be used: broken, hostile, or not of the expected kind. The message names file and tensor."
);

create_exception!(halfbyte, NoCudaDriverError, PyRuntimeError, "The machine has no NVIDIA driver.");

/// The exception for an error: `ValueError` for a wrong call, `CheckpointError` for wrong input, `OSError` (with its
/// number, so that Python picks `PermissionError` and the like) for what the machine refuses, `RuntimeError` for what the
/// GPU refuses, `KeyboardInterrupt`.
pub fn to_py(error: Error) -> PyErr {
    let text = error.to_string();
    match (error.kind(), &error) {
        (ErrorKind::Usage, _) => PyValueError::new_err(text),
        (ErrorKind::Input, _) => CheckpointError::new_err(text),
        (_, Error::NoCudaDriver) => NoCudaDriverError::new_err(text),
        (ErrorKind::Gpu | ErrorKind::Bug, _) => PyRuntimeError::new_err(text),
        (ErrorKind::Interrupted, _) => PyKeyboardInterrupt::new_err(text),
        (ErrorKind::System, Error::Io { source, .. }) => match source.raw_os_error() {
            Some(number) => PyOSError::new_err((number, text)),
            None => PyOSError::new_err(text),
        },
        (ErrorKind::System, _) => PyOSError::new_err((NO_SPACE, text)),
    }
}

/// ENOSPC, the same on Linux, macOS and the BSDs; Python's name for it on Windows too.
const NO_SPACE: i32 = 28;
