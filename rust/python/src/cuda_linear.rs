//! Products with weights of one kind on one device: what does not change from call to call is checked once.

use halfbyte::codebook::QuantType;
use halfbyte::dtype::DType;
use halfbyte::error::{Error, Result};
use halfbyte::geometry::{BlockSize, NESTED_BLOCK_SIZE, packed_len, weight_count};
use halfbyte_cuda::{self as cuda, Choice, Device, Gemm4bit, Memory, Scales, Stream};
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
        cuda::tile_pays(self.device, self.dtype, (m, self.n, self.k))
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
            let memory = |argument, address, count: Option<usize>, dtype| {
                let Some(count) = count else {
                    return Err(Error::argument("m", m, "a number of rows of less than 2^63 elements"));
                };
                Memory::new(argument, address, count, dtype)
            };
            let blocks = self.blocksize.absmax_len(self.values);
            let scales = if self.nested {
                Scales::Nested {
                    codes: memory("absmax", absmax, Some(blocks), DType::U8)?,
                    absmax2: memory("absmax2", absmax2, Some(blocks.div_ceil(NESTED_BLOCK_SIZE)), DType::F32)?,
                    offset: memory("offset", offset, Some(1), DType::F32)?,
                }
            } else {
                Scales::Plain(memory("absmax", absmax, Some(blocks), DType::F32)?)
            };
            let x = memory("x", x, m.checked_mul(k), dtype)?;
            let y = memory("y", y, m.checked_mul(n), dtype)?;
            let packed = memory("packed", packed, Some(packed_len(self.values)), DType::U8)?;
            let bias = if bias == 0 { None } else { Some(memory("bias", bias, Some(n), dtype)?) };
            let bytes = if workspace == 0 { None } else { cuda::tile_pays(self.device, dtype, (m, n, k)) };
            let workspace = match bytes {
                Some(bytes) if bytes > 0 => Some(memory("workspace", workspace, Some(bytes), DType::U8)?),
                _ => None,
            };
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
}
