//! Launching kernels on a stream of the caller's.

use std::ffi::c_void;

use cudarc::driver::sys;
use halfbyte::error::{Error, Result};

use super::device::Device;
use super::library::driver_error;
use crate::kernels::Kernel;

/// A stream of the current process: the number that torch gives as `cuda_stream`, 0 being the legacy default stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream(pub usize);

impl Device {
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
    /// As [`Device::launch`]; and every thread of the kernel calls `wait_for_previous` (of `kernels/common/ptx.cuh`) before it
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
}
