//! Products of 8-bit codes for more than a few rows, on devices that have a kernel for them.

use halfbyte::error::Result;

use super::operands::{Epilogue, Operands};
use crate::driver::{Device, Stream};
use crate::kernels::Kernel;

/// A launch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tile {
    pub kernel: &'static Kernel,
}

impl Tile {
    /// The launch of a product, or `None` when the kernels do not take it on this device.
    pub(super) fn new(_device: &Device, _operands: &Operands, _epilogue: &Epilogue) -> Option<Self> {
        None
    }

    /// # Safety
    /// As [`super::product`].
    pub(super) unsafe fn launch(
        &self,
        _device: &Device,
        _stream: Stream,
        _operands: &Operands,
        _epilogue: &Epilogue,
    ) -> Result<()> {
        Ok(())
    }
}
