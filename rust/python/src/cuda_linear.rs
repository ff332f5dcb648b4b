//! Products with weights of one kind on one device, and their gradients: what does not change from call to call is checked once.

use halfbyte::codebook::QuantType;
use halfbyte::dtype::DType;
use halfbyte::error::{Error, Result};
use halfbyte::geometry::{BlockSize, NESTED_BLOCK_SIZE, packed_len, weight_count};
use halfbyte_cuda::{self as cuda, Choice, Device, Dgrad4bit, Gemm4bit, Memory, Scales, Stream};
use pyo3::prelude::*;

use super::cuda::open;
use super::error::to_py;

/// Products `x · Wᵀ + bias` with weights of one shape and kind.
#[pyclass(frozen, module = "halfbyte._native")]
pub struct CudaLinear {
    device: &'static Device,
    dtype: DType,
    n: usize,
    k: usize,
    values: usize,
    quant_type: QuantType,
    blocksize: BlockSize,
    nested: bool,
}

#[pymethods]
impl CudaLinear {
    /// Check the kind. Kernels are loaded when one is first launched: each is compiled then, and few are needed.
    #[new]
    #[allow(clippy::too_many_arguments)] // Python's arguments
    fn new(
        py: Python<'_>,
        device: usize,
        dtype: &str,
        n: usize,
        k: usize,
        quant_type: &str,
        blocksize: usize,
        nested: bool,
    ) -> PyResult<Self> {
        let check = || {
            let floats = DType::FLOATS;
            let dtype = floats.into_iter().find(|d| d.as_str() == dtype).ok_or_else(|| {
                let legal = floats.map(DType::as_str);
                Error::argument("dtype", format!("{dtype:?}"), format!("one of {legal:?}"))
            })?;
            Ok((dtype, weight_count(n, k)?, quant_type.parse()?, BlockSize::new(blocksize)?))
        };
        let (dtype, values, quant_type, blocksize) = check().map_err(to_py)?;
        let device = open(py, device)?;
        Ok(Self { device, dtype, n, k, values, quant_type, blocksize, nested })
    }

    /// Rows of `x` that one launch takes at most, where the kind is one for the matrix units.
    #[getter]
    fn rows_at_once(&self) -> usize {
        let codes = self.nested.then(|| self.blocksize.absmax_len(self.values));
        cuda::rows_at_once(self.device, self.n, self.k, codes)
    }

    /// Rows of `x` up to which `launch` wants no workspace.
    #[getter]
    fn rows_without_workspace(&self) -> usize {
        cuda::rows_without_workspace(self.device)
    }

    /// If `launch` makes a product of `m` rows of `x` in less time than a dense copy of the weight and a product with that, rows
    /// beyond those of `rows_at_once` being meant: the bytes of the workspace that it wants. `x` and the codes begin at
    /// multiples of 16 bytes.
    fn workspace(&self, m: usize) -> Option<usize> {
        self.workspace_of(m)
    }

    /// Make one product on `stream`, with `m` rows of `x`. All others are addresses of memory of the device: of `x` and
    /// `y` in the dtype, of the codes, the scales (two levels and the offset when nested), and the bias or 0; `workspace` has
    /// the bytes that the method of that name tells, or is 0.
    #[allow(clippy::too_many_arguments)] // Python's arguments
    fn launch(
        &self,
        py: Python<'_>,
        stream: usize,
        m: usize,
        x: usize,
        packed: usize,
        absmax: usize,
        absmax2: usize,
        offset: usize,
        bias: usize,
        y: usize,
        workspace: usize,
    ) -> PyResult<()> {
        let call = || -> Result<()> {
            let (n, k, dtype) = (self.n, self.k, self.dtype);
            let (packed, scales) = self.weight(packed, absmax, absmax2, offset)?;
            let (x, y) = (rows("x", x, m, k, dtype)?, rows("y", y, m, n, dtype)?);
            let bias = if bias == 0 { None } else { Some(Memory::new("bias", bias, n, dtype)?) };
            let bytes = if workspace == 0 { None } else { self.workspace_of(m) };
            let workspace = memory_of("workspace", workspace, bytes)?;
            let product = Gemm4bit {
                x: &x,
                packed: &packed,
                scales: &scales,
                bias: bias.as_ref(),
                y: &y,
                m,
                n,
                k,
                quant_type: self.quant_type,
                blocksize: self.blocksize,
                workspace: workspace.as_ref(),
            };
            // SAFETY: the Python caller's to keep.
            unsafe { cuda::gemm_4bit(self.device, Stream(stream), &product, Choice::Best) }.map(|_| ())
        };
        py.detach(call).map_err(to_py)
    }

    /// If `dgrad` makes the gradient of `m` rows of `x` in less time than a dense copy of the weight and a product with that, the
    /// bytes of the workspace that it wants. The gradient of `y` and the codes begin at multiples of 16 bytes.
    fn dgrad_workspace(&self, m: usize) -> Option<usize> {
        cuda::dgrad_workspace(self.device, self.dtype, (m, self.n, self.k))
    }

    /// Make the gradient of `m` rows of `x` on `stream`, `dx = dy · W`. All others are addresses, as those of `launch`.
    #[allow(clippy::too_many_arguments)] // Python's arguments
    fn dgrad(
        &self,
        py: Python<'_>,
        stream: usize,
        m: usize,
        dy: usize,
        packed: usize,
        absmax: usize,
        absmax2: usize,
        offset: usize,
        dx: usize,
        workspace: usize,
    ) -> PyResult<()> {
        let call = || -> Result<()> {
            let (n, k, dtype) = (self.n, self.k, self.dtype);
            let (packed, scales) = self.weight(packed, absmax, absmax2, offset)?;
            let (dy, dx) = (rows("dy", dy, m, n, dtype)?, rows("dx", dx, m, k, dtype)?);
            let bytes = if workspace == 0 { None } else { cuda::dgrad_workspace(self.device, dtype, (m, n, k)) };
            let workspace = memory_of("workspace", workspace, bytes)?;
            let product = Dgrad4bit {
                dy: &dy,
                packed: &packed,
                scales: &scales,
                dx: &dx,
                m,
                n,
                k,
                quant_type: self.quant_type,
                blocksize: self.blocksize,
                workspace: workspace.as_ref(),
            };
            // SAFETY: the Python caller's to keep.
            unsafe { cuda::dgrad_4bit(self.device, Stream(stream), &product) }
        };
        py.detach(call).map_err(to_py)
    }
}

impl CudaLinear {
    fn workspace_of(&self, m: usize) -> Option<usize> {
        cuda::tile_pays(self.device, self.dtype, self.blocksize, self.nested, (m, self.n, self.k))
    }

    /// The codes and the scales at these addresses.
    fn weight(&self, packed: usize, absmax: usize, absmax2: usize, offset: usize) -> Result<(Memory, Scales)> {
        let blocks = self.blocksize.absmax_len(self.values);
        let scales = if self.nested {
            Scales::Nested {
                codes: Memory::new("absmax", absmax, blocks, DType::U8)?,
                absmax2: Memory::new("absmax2", absmax2, blocks.div_ceil(NESTED_BLOCK_SIZE), DType::F32)?,
                offset: Memory::new("offset", offset, 1, DType::F32)?,
            }
        } else {
            Scales::Plain(Memory::new("absmax", absmax, blocks, DType::F32)?)
        };
        Ok((Memory::new("packed", packed, packed_len(self.values), DType::U8)?, scales))
    }
}

/// `m` rows of so many columns at an address.
pub(super) fn rows(argument: &'static str, address: usize, m: usize, columns: usize, dtype: DType) -> Result<Memory> {
    let count =
        m.checked_mul(columns).ok_or_else(|| Error::argument("m", m, "a number of rows of less than 2^63 elements"))?;
    Memory::new(argument, address, count, dtype)
}

/// Memory of so many bytes, if it is more than none.
fn memory_of(argument: &'static str, address: usize, bytes: Option<usize>) -> Result<Option<Memory>> {
    bytes.filter(|&bytes| bytes > 0).map(|bytes| Memory::new(argument, address, bytes, DType::U8)).transpose()
}
