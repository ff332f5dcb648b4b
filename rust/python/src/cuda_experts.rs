//! Blocks of experts on device memory of Python's.

use halfbyte::dtype::DType;
use halfbyte::error::{Error, Result};
use halfbyte_cuda::Stream;
use halfbyte_cuda::experts::{Choices, Experts, Matrices, Weights, maps};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::cuda::open;
use super::error::to_py;

/// Adds this room's class to the module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(cuda_expert_maps, m)?)?;
    m.add_class::<CudaExperts>()
}

/// What the copy engine has to know of matrices of `rows` by `columns`, their codes and their scales, if these are float32 of
/// blocks of 64: 256 bytes for each.
#[pyfunction]
fn cuda_expert_maps<'py>(
    py: Python<'py>,
    device: usize,
    codes: Vec<u64>,
    scales: Option<Vec<u64>>,
    rows: usize,
    columns: usize,
) -> PyResult<Bound<'py, PyBytes>> {
    // The driver's library is open when a device is.
    open(py, device)?;
    maps(&codes, scales.as_deref(), rows, columns).map(|bytes| PyBytes::new(py, &bytes)).map_err(to_py)
}

fn float(argument: &'static str, dtype: &str) -> Result<DType> {
    DType::FLOATS.into_iter().find(|d| d.as_str() == dtype).ok_or_else(|| Error::dtype(argument, dtype, &DType::FLOATS))
}

/// Experts with 4-bit weights, of one shape.
#[pyclass(frozen, module = "halfbyte._native")]
struct CudaExperts {
    experts: Experts,
}

#[pymethods]
impl CudaExperts {
    #[new]
    #[allow(clippy::too_many_arguments)] // Python's arguments
    fn new(
        py: Python<'_>,
        device: usize,
        dtype: &str,
        experts: usize,
        hidden: usize,
        intermediate: usize,
        gated: bool,
        quant_type: &str,
        blocksize: usize,
        nested: bool,
    ) -> PyResult<Self> {
        let check = || {
            let blocksize = halfbyte::geometry::BlockSize::new(blocksize)?;
            Ok((float("dtype", dtype)?, quant_type.parse()?, blocksize))
        };
        let (dtype, quant_type, blocksize) = check().map_err(to_py)?;
        let device = open(py, device)?;
        Experts::new(device, dtype, experts, (hidden, intermediate), gated, quant_type, blocksize, nested)
            .map(|experts| Self { experts })
            .map_err(to_py)
    }

    /// Whether the other methods take so many tokens with so many choices each.
    fn takes(&self, tokens: usize, k: usize) -> bool {
        self.experts.takes(tokens, k)
    }

    /// Bytes of the workspace, which begins at a multiple of 256.
    fn workspace(&self, tokens: usize, k: usize) -> PyResult<usize> {
        self.experts.workspace(tokens, k).map_err(to_py)
    }

    /// Make `y` of `x` on `stream`; gives the names of the two products' kernels.
    #[allow(clippy::too_many_arguments)] // Python's arguments
    fn launch(
        &self,
        py: Python<'_>,
        stream: usize,
        tokens: usize,
        k: usize,
        x: u64,
        ids: u64,
        weights: u64,
        weights_dtype: &str,
        table: u64,
        maps: u64,
        up_bias: u64,
        down_bias: u64,
        activation: &str,
        workspace: u64,
        y: u64,
    ) -> PyResult<String> {
        let call = || {
            let weights = Weights { address: weights, dtype: float("weights_dtype", weights_dtype)? };
            let choices = Choices { tokens, top_k: k, ids };
            let matrices = Matrices { table, maps, up_bias, down_bias };
            let activation = activation.parse()?;
            // SAFETY: the Python caller's to keep.
            unsafe { self.experts.launch(Stream(stream), &choices, weights, &matrices, activation, x, workspace, y) }
        };
        py.detach(call).map(|names| names.join(" ")).map_err(to_py)
    }

    /// Make the products of gate and up, or of up alone; gives the name of the kernel.
    #[allow(clippy::too_many_arguments)] // Python's arguments
    fn up(
        &self,
        py: Python<'_>,
        stream: usize,
        tokens: usize,
        k: usize,
        x: u64,
        ids: u64,
        table: u64,
        maps: u64,
        up_bias: u64,
        workspace: u64,
        products: u64,
    ) -> PyResult<&'static str> {
        let call = || {
            let choices = Choices { tokens, top_k: k, ids };
            let matrices = Matrices { table, maps, up_bias, down_bias: 0 };
            // SAFETY: the Python caller's to keep.
            unsafe { self.experts.up(Stream(stream), &choices, &matrices, x, workspace, products) }
        };
        py.detach(call).map_err(to_py)
    }

    /// Make `y` of what an activation made of the products of `up`; gives the name of the kernel.
    #[allow(clippy::too_many_arguments)] // Python's arguments
    fn down(
        &self,
        py: Python<'_>,
        stream: usize,
        tokens: usize,
        k: usize,
        hidden: u64,
        ids: u64,
        weights: u64,
        weights_dtype: &str,
        table: u64,
        maps: u64,
        down_bias: u64,
        workspace: u64,
        y: u64,
    ) -> PyResult<&'static str> {
        let call = || {
            let weights = Weights { address: weights, dtype: float("weights_dtype", weights_dtype)? };
            let choices = Choices { tokens, top_k: k, ids };
            let matrices = Matrices { table, maps, up_bias: 0, down_bias };
            // SAFETY: the Python caller's to keep.
            unsafe { self.experts.down(Stream(stream), &choices, weights, &matrices, hidden, workspace, y) }
        };
        py.detach(call).map_err(to_py)
    }

    /// Make the values of matrices of one projection, of those experts that have slots.
    fn dequantize(
        &self,
        py: Python<'_>,
        stream: usize,
        table: u64,
        projection: usize,
        ends: u64,
        out: u64,
    ) -> PyResult<()> {
        let call = || {
            let matrices = Matrices { table, maps: 0, up_bias: 0, down_bias: 0 };
            // SAFETY: the Python caller's to keep.
            unsafe { self.experts.dequantize(Stream(stream), &matrices, projection, ends, out) }
        };
        py.detach(call).map_err(to_py)
    }
}
