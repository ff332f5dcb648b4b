//! Loading kernels: once for each device, also while a stream is being captured.

use std::ffi::{CString, c_void};

use cudarc::driver::{result, sys};
use halfbyte::error::{Error, Result};

use super::device::{Device, Handle, Loaded};
use super::library::driver_error;
use crate::kernels::{Form, Kernel};
use crate::modules::{self, Refusal};

impl Device {
    /// Loads a kernel unless it is, and gives the form in which it was: a cubin, or when there is none for the device PTX,
    /// which the driver compiles or finds in its cache on disk. Allowed while a stream is being captured.
    ///
    /// # Errors
    /// [`Error::Cuda`] when there is no code for the device, or in the driver's words.
    pub fn load(&self, kernel: &'static Kernel) -> Result<Form> {
        self.loaded(kernel).map(|loaded| loaded.form)
    }

    pub(super) fn loaded(&self, kernel: &'static Kernel) -> Result<Loaded> {
        let Some(place) = self.functions.get(kernel.index) else {
            return Err(Error::Bug { words: format!("kernel {} is none of this build's", kernel.name) });
        };
        if let Some(&loaded) = place.get() {
            return Ok(loaded);
        }
        let Ok(loading) = self.loading.lock() else {
            return Err(Error::Bug { words: "a thread panicked while it loaded a kernel".to_owned() });
        };
        if let Some(&loaded) = place.get() {
            return Ok(loaded);
        }
        let only = self.forms.only();
        let (loaded, refused) = self.bound(|| {
            let _relaxed = RelaxedCapture::begin();
            let modules::Loaded { module, form, refused } =
                modules::load(kernel, self.capability, only, &self.words(), |code| self.load_code(code))?;
            let function = self.function(module, kernel)?;
            Ok((Loaded { function: Handle(function), form }, refused))
        })?;
        let _ = place.set(loaded);
        drop(loading);
        if let Some(error) = refused {
            self.forms.refused(error);
        }
        Ok(loaded)
    }

    /// Code as the driver takes it; the context is current.
    fn load_code(&self, code: &[u8]) -> std::result::Result<sys::CUmodule, Refusal> {
        // SAFETY: a whole cubin, or PTX that ends with a zero byte; the driver copies it.
        unsafe { result::module::load_data(code.as_ptr().cast::<c_void>()) }.map_err(|error| {
            let unfit = matches!(
                error.0,
                sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
                    | sys::CUresult::CUDA_ERROR_INVALID_IMAGE
                    | sys::CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
                    | sys::CUresult::CUDA_ERROR_NOT_SUPPORTED
            );
            let error = driver_error(self.words(), "cuModuleLoadData", error);
            if unfit { Refusal::Unfit(error) } else { Refusal::Failed(error) }
        })
    }

    /// The kernel of its module, which may take all the shared memory that the device has for a block.
    fn function(&self, module: sys::CUmodule, kernel: &Kernel) -> Result<sys::CUfunction> {
        let name =
            CString::new(kernel.name).map_err(|_| Error::Bug { words: "a kernel's name has a zero".to_owned() })?;
        let failed = |what: &'static str| {
            move |error| driver_error(format!("kernel {} on {}", kernel.name, self.words()), what, error)
        };
        // SAFETY: modules are never unloaded.
        let function = unsafe { result::module::get_function(module, name) }.map_err(failed("cuModuleGetFunction"))?;
        if kernel.dynamic_shared {
            use sys::CUfunction_attribute_enum as Attribute;
            let (fixed, most) = (
                Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
                Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
            );
            // What the kernel declares itself is a part of what a block may have.
            // SAFETY: the function exists.
            let fixed = unsafe { result::function::get_function_attribute(function, fixed) }
                .map_err(failed("cuFuncGetAttribute"))?;
            // SAFETY: likewise.
            unsafe { result::function::set_function_attribute(function, most, self.shared_per_block as i32 - fixed) }
                .map_err(failed("cuFuncSetAttribute"))?;
        }
        Ok(function)
    }
}

/// While this lives, calls of this thread that a stream capture in progress would not survive are allowed.
struct RelaxedCapture(Option<sys::CUstreamCaptureMode>);

impl RelaxedCapture {
    fn begin() -> Self {
        let mut mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: exchanges a value of this thread.
        let status = unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) };
        Self(status.result().is_ok().then_some(mode))
    }
}

impl Drop for RelaxedCapture {
    fn drop(&mut self) {
        if let Some(mut mode) = self.0 {
            // SAFETY: as in `begin`. It cannot fail where the first exchange did not.
            let _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) };
        }
    }
}
