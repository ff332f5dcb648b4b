//! The driver's library: opened when first asked for, never linked. The only file that names cudarc.
//!
//! A [`Device`] holds its primary context, the one that torch uses, retained for the life of the process; modules are
//! loaded into it once and stay. Each call binds that context to its thread and puts back what was bound before
//! (in a thread that had none it leaves that of the first device, as the runtime would).

use std::ffi::{CString, c_int, c_void};
use std::sync::{Mutex, OnceLock};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use halfbyte::error::{Error, Result};

use super::capability::Capability;
use super::kernels::{ALL, BUILT, Form, Kernel};
use super::modules::{self, NO_KERNELS, Refusal};
use super::notice;

/// The least CUDA version that a driver must support: the PTX is of that version.
const LEAST_CUDA: (i32, i32) = (12, 0);

/// The least compute capability.
const LEAST_CAPABILITY: Capability = Capability(7, 5);

/// From these on kernels can start early (programmatic dependent launch), and drivers can capture such launches.
const EARLY_CAPABILITY: Capability = Capability(9, 0);
const EARLY_CUDA: (i32, i32) = (12, 3);

/// More than any machine has; bounds the table of devices.
const MOST_DEVICES: usize = 64;

/// A stream of the current process: the number that torch gives as `cuda_stream`, 0 being the legacy default stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream(pub usize);

/// A handle of the driver's that may go from thread to thread.
#[derive(Debug, Clone, Copy)]
struct Handle<T>(T);

// SAFETY: contexts, modules and functions of the driver may be used from every thread, at the same time.
unsafe impl<T> Send for Handle<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Handle<T> {}

/// A kernel that can be launched.
#[derive(Debug, Clone, Copy)]
struct Loaded {
    function: Handle<sys::CUfunction>,
    form: Form,
}

/// A GPU that this process uses.
#[derive(Debug)]
pub struct Device {
    ordinal: usize,
    name: String,
    capability: Capability,
    multiprocessors: u32,
    shared_per_block: u32,
    /// Whether it has launches that start early, in stream captures too.
    starts_early: bool,
    context: Handle<sys::CUcontext>,
    /// The form of code that is loaded, when the environment asks for one.
    only: Option<Form>,
    /// Of every kernel that was loaded, by its index.
    functions: Box<[OnceLock<Loaded>]>,
    /// Held while one is.
    loading: Mutex<()>,
    /// Why the driver takes no cubins, once it has refused one.
    refused: OnceLock<Error>,
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
            only: modules::asked_for()?,
            functions: ALL.iter().map(|_| OnceLock::new()).collect(),
            loading: Mutex::default(),
            refused: OnceLock::new(),
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

    fn words(&self) -> String {
        format!("device {} ({})", self.ordinal, self.name)
    }

    /// Loads a kernel unless it is, and gives the form in which it was: a cubin, or when there is none for the device PTX,
    /// which the driver compiles or finds in its cache on disk. Allowed while a stream is being captured.
    ///
    /// # Errors
    /// [`Error::Cuda`] when there is no code for the device, or in the driver's words.
    pub fn load(&self, kernel: &'static Kernel) -> Result<Form> {
        self.loaded(kernel).map(|loaded| loaded.form)
    }

    fn loaded(&self, kernel: &'static Kernel) -> Result<Loaded> {
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
        let only = self.only.or_else(|| self.refused.get().map(|_| Form::Ptx));
        let (loaded, refused) = self.bound(|| {
            let _relaxed = RelaxedCapture::begin();
            let modules::Loaded { module, form, refused } =
                modules::load(kernel, self.capability, only, &self.words(), |code| self.load_code(code))?;
            let function = self.function(module, kernel)?;
            Ok((Loaded { function: Handle(function), form }, refused))
        })?;
        let _ = place.set(loaded);
        drop(loading);
        if let Some(error) = refused
            && self.refused.set(error).is_ok()
            && let Some(error) = self.refused.get()
        {
            notice::tell(&format!(
                "the driver refuses the code that was built for this GPU, and compiles it anew, which takes a while when a \
                 kernel is first used: {error}"
            ));
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
            let most = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function exists.
            unsafe { result::function::set_function_attribute(function, most, self.shared_per_block as i32) }
                .map_err(failed("cuFuncSetAttribute"))?;
        }
        Ok(function)
    }

    /// Launches `blocks` blocks on `stream`; with no blocks, nothing.
    ///
    /// # Errors
    /// [`Error::Cuda`] with the kernel's name, the launch's shape and the driver's words. What an earlier launch did
    /// wrong may also come to light here.
    ///
    /// # Safety
    /// `parameters` points to the values that the kernel takes, in order and of its types. The memory that these point
    /// to is of this device and stays valid, and is not written by others, until the kernel has ended. The stream is one
    /// of this device's primary context.
    pub unsafe fn launch(
        &self,
        stream: Stream,
        kernel: &'static Kernel,
        blocks: u64,
        shared: u32,
        parameters: &mut [*mut c_void],
    ) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { self.start(stream, kernel, blocks, shared, parameters, &mut []) }
    }

    /// As [`Device::launch`]; on devices that can, blocks of the kernel start while the last
    /// ones of the kernel before it on the stream still run.
    ///
    /// # Errors
    /// As [`Device::launch`].
    ///
    /// # Safety
    /// As [`Device::launch`]; and every thread of the kernel calls `wait_for_previous` (of `kernels/ptx.cuh`) before it
    /// touches memory that an earlier one writes, or writes what an earlier one touches.
    pub unsafe fn launch_early(
        &self,
        stream: Stream,
        kernel: &'static Kernel,
        blocks: u64,
        shared: u32,
        parameters: &mut [*mut c_void],
    ) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { self.launch_early_in_clusters(stream, kernel, (blocks, 1), shared, parameters) }
    }

    /// As [`Device::launch_early`], `cluster` blocks after another forming a cluster, on a device that has clusters; 1 for
    /// none.
    ///
    /// # Errors
    /// As [`Device::launch`].
    ///
    /// # Safety
    /// As [`Device::launch_early`].
    pub unsafe fn launch_early_in_clusters(
        &self,
        stream: Stream,
        kernel: &'static Kernel,
        (blocks, cluster): (u64, u32),
        shared: u32,
        parameters: &mut [*mut c_void],
    ) -> Result<()> {
        let early = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: i32::from(self.starts_early) },
        };
        let mut clusters = early;
        clusters.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
        clusters.value.clusterDim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: cluster, y: 1, z: 1 };
        let mut both = [early, clusters];
        let attributes = match (self.starts_early, cluster > 1) {
            (true, true) => &mut both[..],
            (true, false) => &mut both[..1],
            (false, true) => &mut both[1..],
            (false, false) => &mut [],
        };
        // SAFETY: the caller's.
        unsafe { self.start(stream, kernel, blocks, shared, parameters, attributes) }
    }

    /// # Safety
    /// As [`Device::launch`]; the attributes are such that the kernel keeps to its contract.
    unsafe fn start(
        &self,
        stream: Stream,
        kernel: &'static Kernel,
        blocks: u64,
        shared: u32,
        parameters: &mut [*mut c_void],
        attributes: &mut [sys::CUlaunchAttribute],
    ) -> Result<()> {
        if blocks == 0 {
            return Ok(());
        }
        let describe = || {
            let threads = kernel.threads;
            format!(
                "kernel {} ({blocks} blocks of {threads} threads, {shared} bytes of dynamic shared memory) on {}",
                kernel.name,
                self.words()
            )
        };
        // The driver's limit for the first dimension of a grid.
        let Some(grid) = u32::try_from(blocks).ok().filter(|&grid| grid <= i32::MAX as u32) else {
            return Err(Error::cuda(describe(), "the tensor is too large for one launch".to_owned()));
        };
        let function = self.loaded(kernel)?.function.0;
        let config = sys::CUlaunchConfig {
            gridDimX: grid,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: kernel.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared,
            hStream: std::ptr::with_exposed_provenance_mut(stream.0),
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        self.bound(|| {
            // SAFETY: the function is of this context, which is current; the rest is the caller's.
            unsafe { sys::cuLaunchKernelEx(&raw const config, function, parameters.as_mut_ptr(), std::ptr::null_mut()) }
                .result()
                .map_err(|error| driver_error(describe(), "cuLaunchKernelEx", error))
        })
    }

    /// Calls with this device's context bound to the thread, and binds again what was bound before, if anything was or the
    /// device is not the first.
    fn bound<T>(&self, call: impl FnOnce() -> Result<T>) -> Result<T> {
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

/// The elements of a matrix that the copy engine reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TileType {
    /// Bytes.
    U8,
    /// Half precision.
    F16,
    /// The upper half of a float32.
    Bf16,
}

/// A matrix in device memory as the copy engine knows it, and the boxes that it copies: `TensorMap` of `kernels/wgmma.cuh`.
#[repr(transparent)]
#[derive(Debug, Clone, Copy)]
pub struct TensorMap(sys::CUtensorMap);

impl TensorMap {
    /// Of a row-major matrix at `address`, a multiple of 16 as are the bytes of a row; `size` and `tile` are rows and
    /// columns. A row of a box is of 64 or 128 bytes; its 16-byte pieces are swizzled within so many bytes.
    ///
    /// # Errors
    /// [`Error::Cuda`] in the driver's words.
    pub fn new(kind: TileType, address: u64, size: (usize, usize), tile: (usize, usize)) -> Result<Self> {
        let (data, bytes) = match kind {
            TileType::U8 => (sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8, 1),
            TileType::F16 => (sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2),
            TileType::Bf16 => (sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2),
        };
        let swizzle = if tile.1 * bytes == 128 {
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B
        } else {
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B
        };
        let dimensions = [size.1 as u64, size.0 as u64];
        let pitches = [(size.1 * bytes) as u64];
        let (tile, strides) = ([tile.1 as u32, tile.0 as u32], [1_u32; 2]);
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // SAFETY: writes the map, and reads arrays of as many elements as it has dimensions, and one less; the address is
        // kept, not followed.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                data,
                2,
                std::ptr::with_exposed_provenance_mut(address as usize),
                dimensions.as_ptr(),
                pitches.as_ptr(),
                tile.as_ptr(),
                strides.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(|error| {
            driver_error(format!("a matrix of {} x {}", size.0, size.1), "cuTensorMapEncodeTiled", error)
        })?;
        Ok(Self(map))
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

fn check_not_forked() -> Result<()> {
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

fn slot(ordinal: usize) -> Result<&'static OnceLock<Device>> {
    static DEVICES: [OnceLock<Device>; MOST_DEVICES] = [const { OnceLock::new() }; MOST_DEVICES];
    DEVICES.get(ordinal).ok_or_else(|| Error::argument("device", ordinal, format!("less than {MOST_DEVICES}")))
}

fn driver_error(subject: String, call: &str, error: DriverError) -> Error {
    let text = |words: std::result::Result<&std::ffi::CStr, DriverError>| {
        words.map(|w| w.to_string_lossy().into_owned()).unwrap_or_else(|_| format!("error {}", error.0 as u32))
    };
    Error::cuda(subject, format!("{call}: {} ({})", text(error.error_string()), text(error.error_name())))
}
