//! A device of this process, with the context that torch uses too.

use std::ffi::c_int;
use std::sync::{Mutex, OnceLock};

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use halfbyte::error::{Error, Result};

use super::library::{check_not_forked, device_count, driver_error, supported_cuda};
use crate::capability::Capability;
use crate::kernels::{ALL, Form};
use crate::modules::{self, Forms};

/// The least compute capability.
const LEAST_CAPABILITY: Capability = Capability(7, 5);

/// From these on kernels can start early (programmatic dependent launch), and drivers can capture such launches.
const EARLY_CAPABILITY: Capability = Capability(9, 0);
const EARLY_CUDA: (i32, i32) = (12, 3);

/// More than any machine has; bounds the table of devices.
const MOST_DEVICES: usize = 64;

/// A handle of the driver's that may go from thread to thread.
#[derive(Debug, Clone, Copy)]
pub(super) struct Handle<T>(pub(super) T);

// SAFETY: contexts, modules and functions of the driver may be used from every thread, at the same time.
unsafe impl<T> Send for Handle<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Handle<T> {}

/// A kernel that can be launched.
#[derive(Debug, Clone, Copy)]
pub(super) struct Loaded {
    pub(super) function: Handle<sys::CUfunction>,
    pub(super) form: Form,
}

/// A GPU that this process uses.
#[derive(Debug)]
pub struct Device {
    ordinal: usize,
    name: String,
    pub(super) capability: Capability,
    multiprocessors: u32,
    pub(super) shared_per_block: u32,
    /// Whether it has launches that start early, in stream captures too.
    pub(super) starts_early: bool,
    context: Handle<sys::CUcontext>,
    pub(super) forms: Forms,
    /// Of every kernel that was loaded, by its index.
    pub(super) functions: Box<[OnceLock<Loaded>]>,
    /// Held while one is.
    pub(super) loading: Mutex<()>,
}

impl Device {
    /// The device of this ordinal, in the numbering of the driver (and of torch).
    ///
    /// The first call for a device takes a while: keep no lock that others wait for.
    ///
    /// # Errors
    /// [`Error::Cuda`] when this build has no kernels, when there is no driver, one older than CUDA 12.0, no such device, a
    /// device of compute capability below 7.5, and in a process that was forked from one that used CUDA.
    pub fn get(ordinal: usize) -> Result<&'static Self> {
        let slot = slot(ordinal)?;
        if let Some(device) = slot.get() {
            check_not_forked()?;
            return Ok(device);
        }
        let device = Self::open(ordinal)?;
        Ok(slot.get_or_init(|| device))
    }

    /// The device, when it has been asked for before.
    pub fn ready(ordinal: usize) -> Option<&'static Self> {
        slot(ordinal).ok()?.get().filter(|_| check_not_forked().is_ok())
    }

    fn open(ordinal: usize) -> Result<Self> {
        let count = device_count()?;
        if ordinal >= count {
            let expected = match count {
                0 => "a visible device, and none is (CUDA_VISIBLE_DEVICES decides)".to_owned(),
                _ => format!("an ordinal below {count}, the number of visible devices"),
            };
            return Err(Error::argument("device", ordinal, expected));
        }
        let failed = |what: &'static str| move |error| driver_error(format!("device {ordinal}"), what, error);
        let handle = result::device::get(ordinal as c_int).map_err(failed("cuDeviceGet"))?;
        let name = result::device::get_name(handle).map_err(failed("cuDeviceGetName"))?;
        let attribute = |attribute| {
            // SAFETY: `handle` is a device that the driver gave.
            unsafe { result::device::get_attribute(handle, attribute) }.map_err(failed("cuDeviceGetAttribute"))
        };
        let capability = Capability(
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if capability < LEAST_CAPABILITY {
            return Err(Error::cuda(
                format!("device {ordinal} ({name})"),
                format!("compute capability {capability}: the kernels need {LEAST_CAPABILITY} or later"),
            ));
        }
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let shared_per_block = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        // SAFETY: as above. Never released: the context lives as long as the process.
        let context = unsafe { result::primary_ctx::retain(handle) }.map_err(failed("cuDevicePrimaryCtxRetain"))?;
        Ok(Self {
            ordinal,
            name,
            capability,
            multiprocessors: u32::try_from(multiprocessors).unwrap_or(1).max(1),
            shared_per_block: u32::try_from(shared_per_block).unwrap_or(0),
            starts_early: capability >= EARLY_CAPABILITY && supported_cuda()? >= EARLY_CUDA,
            context: Handle(context),
            forms: Forms::new(modules::asked_for()?),
            functions: ALL.iter().map(|_| OnceLock::new()).collect(),
            loading: Mutex::default(),
        })
    }

    /// What the driver calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its compute capability.
    pub fn capability(&self) -> Capability {
        self.capability
    }

    /// Its multiprocessors.
    pub fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// Bytes of shared memory that one block may have.
    pub fn shared_per_block(&self) -> u32 {
        self.shared_per_block
    }

    pub(super) fn words(&self) -> String {
        format!("device {} ({})", self.ordinal, self.name)
    }

    /// Calls with this device's context bound to the thread, and binds again what was bound before, if anything was or the
    /// device is not the first.
    pub(super) fn bound<T>(&self, call: impl FnOnce() -> Result<T>) -> Result<T> {
        let failed = |what: &'static str| move |error| driver_error(self.words(), what, error);
        let before = result::ctx::get_current().map_err(failed("cuCtxGetCurrent"))?;
        if before == Some(self.context.0) {
            return call();
        }
        // SAFETY: a primary context that stays retained.
        unsafe { result::ctx::set_current(self.context.0) }.map_err(failed("cuCtxSetCurrent"))?;
        let answer = call();
        if before.is_none() && self.ordinal == 0 {
            // What the runtime would do too: a thread without a context gets that of the first device. Torch warns when it
            // comes to a matrix product without one, as after a kernel of ours in the thread of a backward pass.
            return answer;
        }
        // SAFETY: what was current before; null for none.
        let restored = unsafe { result::ctx::set_current(before.unwrap_or(std::ptr::null_mut())) };
        let answer = answer?;
        restored.map_err(failed("cuCtxSetCurrent")).map(|()| answer)
    }
}

fn slot(ordinal: usize) -> Result<&'static OnceLock<Device>> {
    static DEVICES: [OnceLock<Device>; MOST_DEVICES] = [const { OnceLock::new() }; MOST_DEVICES];
    DEVICES.get(ordinal).ok_or_else(|| Error::argument("device", ordinal, format!("less than {MOST_DEVICES}")))
}
