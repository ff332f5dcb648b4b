//! The extension module `halfbyte._native`: converts, validates, adds context, calls.

mod buffer;
mod c_abi;
mod checkpoint;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
mod cuda_experts;
#[cfg(feature = "cuda")]
mod cuda_int8;
#[cfg(feature = "cuda")]
mod cuda_linear;
#[cfg(feature = "cuda")]
mod cuda_lora;
mod direct;
mod dlpack;
mod error;
mod experts;
mod gemm;
mod int8;
mod int8_rowwise;
mod openmp;
mod quant;
mod selection;
mod threads;
mod values;

use pyo3::prelude::*;

/// The compiled core of halfbyte.
#[pymodule]
fn _native(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    quant::register(m)?;
    #[cfg(feature = "cuda")]
    cuda::register(m)?;
    #[cfg(feature = "cuda")]
    m.add_class::<cuda_linear::CudaLinear>()?;
    #[cfg(feature = "cuda")]
    cuda_experts::register(m)?;
    #[cfg(feature = "cuda")]
    cuda_int8::register(m)?;
    #[cfg(feature = "cuda")]
    cuda_lora::register(m)?;
    checkpoint::register(m)?;
    m.add_function(wrap_pyfunction!(dlpack::read_tensors_of, m)?)?;
    m.add_class::<direct::DirectCalls>()?;
    gemm::register(m)?;
    experts::register(m)?;
    int8::register(m)?;
    int8_rowwise::register(m)?;
    selection::register(m)
}
