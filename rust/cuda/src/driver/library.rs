//! The driver's library: opened when first asked for, never linked. What it says without a device, and its errors.

use std::ffi::{c_int, c_void};
use std::sync::OnceLock;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use halfbyte::error::{Error, Result};

use crate::kernels::BUILT;
use crate::modules::NO_KERNELS;

/// The least CUDA version that a driver must support: the PTX is of that version.
const LEAST_CUDA: (i32, i32) = (12, 0);

/// The CUDA version that the driver supports: major, minor. Does not start CUDA.
///
/// # Errors
/// [`Error::NoCudaDriver`] when there is no driver.
pub fn supported_cuda() -> Result<(i32, i32)> {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: opens the driver's library, which has no preconditions.
    if !PRESENT.get_or_init(|| unsafe { sys::is_culib_present() }) {
        return Err(Error::NoCudaDriver);
    }
    let mut version = 0;
    // SAFETY: writes one integer; may be called before everything else.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }
        .result()
        .map_err(|error| driver_error("CUDA".to_owned(), "cuDriverGetVersion", error))?;
    Ok((version / 1000, version % 1000 / 10))
}

/// The number of visible devices; starts CUDA.
///
/// # Errors
/// [`Error::Cuda`] when this build has no kernels, when there is no driver, one that is too old, or none that works in this
/// process.
pub fn device_count() -> Result<usize> {
    if !BUILT {
        return Err(no_cuda(NO_KERNELS.to_owned()));
    }
    let (major, minor) = supported_cuda()?;
    if (major, minor) < LEAST_CUDA {
        let (least_major, least_minor) = LEAST_CUDA;
        return Err(no_cuda(format!(
            "the NVIDIA driver supports CUDA {major}.{minor}: the kernels need a driver for CUDA \
             {least_major}.{least_minor} or later (525.60 on Linux)"
        )));
    }
    check_not_forked()?;
    result::init().map_err(|error| match error.0 {
        sys::CUresult::CUDA_ERROR_NOT_INITIALIZED => forked(),
        sys::CUresult::CUDA_ERROR_NO_DEVICE => {
            no_cuda("the driver finds no device (CUDA_VISIBLE_DEVICES may hide them)".to_owned())
        }
        _ => driver_error("CUDA".to_owned(), "cuInit", error),
    })?;
    STARTED_BY.get_or_init(std::process::id);
    let count =
        result::device::get_count().map_err(|error| driver_error("CUDA".to_owned(), "cuDeviceGetCount", error))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Bytes of memory that a device has, of any compute capability.
///
/// # Errors
/// As [`device_count`]; [`Error::Argument`] for an ordinal that is not there.
pub fn device_memory(ordinal: usize) -> Result<usize> {
    let count = device_count()?;
    if ordinal >= count {
        return Err(Error::argument("device", ordinal, format!("an ordinal below {count}")));
    }
    let failed = |what: &'static str| move |error| driver_error(format!("device {ordinal}"), what, error);
    let handle = result::device::get(ordinal as c_int).map_err(failed("cuDeviceGet"))?;
    // SAFETY: `handle` is a device that the driver gave.
    unsafe { result::device::total_mem(handle) }.map_err(failed("cuDeviceTotalMem"))
}

/// The device that has the memory at this address; `None` for memory of the processor, of which CUDA need not know.
///
/// # Errors
/// [`Error::Cuda`] when the driver cannot tell.
pub fn device_of(address: usize) -> Result<Option<usize>> {
    if supported_cuda().is_err() {
        return Ok(None);
    }
    let ask = |attribute| {
        let mut answer = 0;
        // SAFETY: both attributes asked for are one integer; the address is a number to the driver.
        let status =
            unsafe { sys::cuPointerGetAttribute((&raw mut answer).cast::<c_void>(), attribute, address as u64) };
        match status {
            sys::CUresult::CUDA_SUCCESS => Ok(Some(answer)),
            // Not of CUDA; or there is no CUDA, or it was not started.
            sys::CUresult::CUDA_ERROR_INVALID_VALUE
            | sys::CUresult::CUDA_ERROR_NOT_INITIALIZED
            | sys::CUresult::CUDA_ERROR_NO_DEVICE => Ok(None),
            _ => Err(driver_error(format!("the memory at {address:#x}"), "cuPointerGetAttribute", DriverError(status))),
        }
    };
    let kind: Option<c_int> = ask(sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE)?;
    match kind {
        None => Ok(None),
        // Pinned memory is the processor's; a kernel could read it, but who has it counts on the processor.
        Some(kind) if kind == sys::CUmemorytype::CU_MEMORYTYPE_HOST as c_int => Ok(None),
        Some(_) => {
            let ordinal = ask(sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL)?;
            Ok(ordinal.and_then(|ordinal| usize::try_from(ordinal).ok()))
        }
    }
}

/// The process that started CUDA: its children by `fork` have this module's memory, and no CUDA.
static STARTED_BY: OnceLock<u32> = OnceLock::new();

pub(super) fn check_not_forked() -> Result<()> {
    match STARTED_BY.get() {
        Some(&process) if process != std::process::id() => Err(forked()),
        _ => Ok(()),
    }
}

fn forked() -> Error {
    no_cuda(
        "this process was forked from one that uses CUDA, and cannot use it itself: start processes with the \
         \"spawn\" method"
            .to_owned(),
    )
}

fn no_cuda(problem: String) -> Error {
    Error::cuda("CUDA is not available".to_owned(), problem)
}

pub(super) fn driver_error(subject: String, call: &str, error: DriverError) -> Error {
    let text = |words: std::result::Result<&std::ffi::CStr, DriverError>| {
        words.map(|w| w.to_string_lossy().into_owned()).unwrap_or_else(|_| format!("error {}", error.0 as u32))
    };
    Error::cuda(subject, format!("{call}: {} ({})", text(error.error_string()), text(error.error_name())))
}
