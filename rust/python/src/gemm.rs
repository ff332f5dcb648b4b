//! Products on packed weights, on memory of Python's. The caller keeps the memory alive and to itself during the call.

use half::{bf16, f16};
use halfbyte::codebook::QuantType;
use halfbyte::dtype::DType;
use halfbyte::error::{Error, Result};
use halfbyte::gemm::{self, Compute, Floats, FloatsMut, Path, Scales, Weight, Workers};
use halfbyte::geometry::{BlockSize, NESTED_BLOCK_SIZE, packed_len, weight_count};
use pyo3::prelude::*;

use super::buffer::{Buffer, check_disjoint};
use super::dlpack;
use super::error::to_py;
use super::{openmp, threads};

/// Multiplications that take less time than it may take to get the GIL back.
const SMALL_WORK: usize = 1 << 18;

/// Adds this room's functions to the module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<CpuLinear>()?;
    m.add_function(wrap_pyfunction!(matmul_path, m)?)
}

/// Products with weights of one shape and kind: what does not change from call to call is checked once.
#[pyclass(frozen, module = "halfbyte._native")]
struct CpuLinear {
    dtype: DType,
    compute: Compute,
    n: usize,
    k: usize,
    values: usize,
    quant_type: QuantType,
    blocksize: BlockSize,
    nested: bool,
    bias: Option<DType>,
}

/// Where the parts of a packed weight are; the last two are of nested scales.
#[derive(Clone, Copy)]
struct Addresses {
    packed: usize,
    absmax: usize,
    absmax2: usize,
    offset: usize,
}

impl CpuLinear {
    /// Checks the weight's memory and calls `work` with it; `out` must be apart from it and from `inputs`.
    fn with<R>(
        &self,
        at: Addresses,
        inputs: &[&Buffer],
        out: &Buffer,
        work: impl FnOnce(&Weight<'_>) -> Result<R>,
    ) -> Result<R> {
        let blocks = self.blocksize.absmax_len(self.values);
        let packed = Buffer::of("packed", at.packed, packed_len(self.values), DType::U8)?;
        let absmax = Buffer::of("absmax", at.absmax, blocks, if self.nested { DType::U8 } else { DType::F32 })?;
        check_disjoint(inputs, &[out])?;
        check_disjoint(&[&packed, &absmax], &[out])?;
        // SAFETY: not written to, and the Python caller's to keep for the call.
        let (packed, scales) = unsafe {
            let scales = if self.nested {
                let absmax2 = Buffer::of("absmax2", at.absmax2, blocks.div_ceil(NESTED_BLOCK_SIZE), DType::F32)?;
                let offset = Buffer::of("offset", at.offset, 1, DType::F32)?;
                check_disjoint(&[&absmax2, &offset], &[out])?;
                let offset = offset.slice::<f32>()?[0];
                Scales::Nested { codes: absmax.slice()?, absmax: absmax2.slice()?, offset }
            } else {
                Scales::Plain(absmax.slice()?)
            };
            (packed.slice()?, scales)
        };
        work(&Weight::new(packed, scales, self.quant_type, self.blocksize, self.n, self.k)?)
    }
}

/// The tensors of a product: x, packed, absmax, absmax2, offset, bias, out.
type Tensors<'a, 'py> = [&'a Bound<'py, PyAny>; 7];

impl CpuLinear {
    /// The rows of x, and the addresses of all tensors, 0 for those that are None; or `None` if one is not as it should be.
    fn addresses(
        &self,
        [x, packed, absmax, absmax2, offset, bias, out]: Tensors<'_, '_>,
    ) -> Option<(usize, [usize; 7])> {
        let x = dlpack::tensor(x)?;
        let m = x.count / self.k;
        if x.last != self.k || x.dtype != Some(self.dtype) {
            return None;
        }
        let of = |object: &Bound<'_, PyAny>, count: usize, dtype: DType| {
            let tensor = dlpack::tensor(object)?;
            tensor.is(count, dtype).then_some(tensor.address)
        };
        let blocks = self.blocksize.absmax_len(self.values);
        let packed = dlpack::tensor(packed)?;
        if packed.count.checked_mul(packed.size)? != packed_len(self.values) {
            return None;
        }
        let (absmax, absmax2, offset) = if self.nested {
            (
                of(absmax, blocks, DType::U8)?,
                of(absmax2, blocks.div_ceil(NESTED_BLOCK_SIZE), DType::F32)?,
                of(offset, 1, DType::F32)?,
            )
        } else {
            (of(absmax, blocks, DType::F32)?, 0, 0)
        };
        let bias = match self.bias {
            Some(dtype) => of(bias, self.n, dtype)?,
            None => 0,
        };
        let out = of(out, m.checked_mul(self.n)?, self.dtype)?;
        Some((m, [x.address, packed.address, absmax, absmax2, offset, bias, out]))
    }
}

/// `[rows][columns]` of a factor or a result.
pub(super) fn matrix(
    argument: &'static str,
    address: usize,
    rows: usize,
    columns: usize,
    dtype: DType,
) -> Result<Buffer> {
    let Some(count) = rows.checked_mul(columns) else {
        return Err(Error::argument("m", rows, "a number of rows of less than 2^64 elements"));
    };
    Buffer::of(argument, address, count, dtype)
}

/// The dtype of this name, a float.
pub(super) fn float(argument: &'static str, name: &str) -> Result<DType> {
    DType::FLOATS.into_iter().find(|d| d.as_str() == name).ok_or_else(|| {
        let legal = DType::FLOATS.map(DType::as_str);
        Error::argument(argument, format!("{name:?}"), format!("one of {legal:?}"))
    })
}

#[pymethods]
impl CpuLinear {
    /// Check the kind.
    #[new]
    #[pyo3(signature = (dtype, n, k, quant_type, blocksize, nested, bias = None))]
    #[allow(clippy::too_many_arguments, reason = "a weight has that many properties")]
    fn new(
        dtype: &str,
        n: usize,
        k: usize,
        quant_type: &str,
        blocksize: usize,
        nested: bool,
        bias: Option<&str>,
    ) -> PyResult<Self> {
        let check = || {
            Ok(Self {
                dtype: float("dtype", dtype)?,
                compute: dtype.parse()?,
                n,
                k,
                values: weight_count(n, k)?,
                quant_type: quant_type.parse()?,
                blocksize: BlockSize::new(blocksize)?,
                nested,
                bias: bias.map(|bias| float("bias", bias)).transpose()?,
            })
        };
        check().map_err(to_py)
    }

    /// `out[m, n] = x[m, k] · weight[n, k]ᵀ + bias[n]`; all but `m` and `threads` are addresses.
    #[allow(clippy::too_many_arguments, reason = "a product has that many")]
    fn forward(
        &self,
        py: Python<'_>,
        m: usize,
        x: usize,
        packed: usize,
        absmax: usize,
        absmax2: usize,
        offset: usize,
        bias: usize,
        out: usize,
        threads: usize,
    ) -> PyResult<()> {
        run(py, [m, self.n, self.k], threads, |workers| {
            let x = matrix("x", x, m, self.k, self.dtype)?;
            let out = matrix("out", out, m, self.n, self.dtype)?;
            let bias = self.bias.map(|dtype| Buffer::of("bias", bias, self.n, dtype)).transpose()?;
            let inputs = [&x, bias.as_ref().unwrap_or(&x)];
            self.with(Addresses { packed, absmax, absmax2, offset }, &inputs, &out, |weight| {
                // SAFETY: `out` is apart from all others, and all are the Python caller's to keep for the call.
                let (x, bias, out) =
                    unsafe { (floats(&x)?, bias.as_ref().map(|bias| floats(bias)).transpose()?, floats_mut(&out)?) };
                gemm::linear(Path::active()?, workers, m, x, weight, bias, out, self.compute)
            })
        })
    }

    /// The same of tensors; false, and nothing is done, where one of them is not contiguous, on the processor, and of the
    /// dtype and size that it should have.
    #[allow(clippy::too_many_arguments, reason = "a product has that many")]
    fn forward_tensors(
        &self,
        py: Python<'_>,
        x: &Bound<'_, PyAny>,
        packed: &Bound<'_, PyAny>,
        absmax: &Bound<'_, PyAny>,
        absmax2: &Bound<'_, PyAny>,
        offset: &Bound<'_, PyAny>,
        bias: &Bound<'_, PyAny>,
        out: &Bound<'_, PyAny>,
        threads: usize,
    ) -> PyResult<bool> {
        match self.addresses([x, packed, absmax, absmax2, offset, bias, out]) {
            Some((m, [x, packed, absmax, absmax2, offset, bias, out])) => {
                self.forward(py, m, x, packed, absmax, absmax2, offset, bias, out, threads)?;
                Ok(true)
            }
            None => Ok(false),
        }
    }

    /// `out[m, k] = grad[m, n] · weight[n, k]`; all but `m` and `threads` are addresses.
    #[allow(clippy::too_many_arguments, reason = "a product has that many")]
    fn backward(
        &self,
        py: Python<'_>,
        m: usize,
        grad: usize,
        packed: usize,
        absmax: usize,
        absmax2: usize,
        offset: usize,
        out: usize,
        threads: usize,
    ) -> PyResult<()> {
        run(py, [m, self.n, self.k], threads, |workers| {
            let grad = matrix("grad", grad, m, self.n, self.dtype)?;
            let out = matrix("out", out, m, self.k, self.dtype)?;
            self.with(Addresses { packed, absmax, absmax2, offset }, &[&grad], &out, |weight| {
                // SAFETY: `out` is apart from all others, and all are the Python caller's to keep for the call.
                let (grad, out) = unsafe { (floats(&grad)?, floats_mut(&out)?) };
                gemm::linear_backward(Path::active()?, workers, m, grad, weight, out, self.compute)
            })
        })
    }
}

/// # Safety
/// As [`Buffer::slice`].
pub(super) unsafe fn floats<'a>(buffer: &Buffer) -> Result<Floats<'a>> {
    // SAFETY: the caller's.
    unsafe {
        Ok(match buffer.dtype() {
            DType::F32 => Floats::F32(buffer.slice()?),
            DType::F16 => Floats::F16(buffer.slice::<f16>()?),
            DType::Bf16 => Floats::Bf16(buffer.slice::<bf16>()?),
            _ => return Err(buffer.wrong_dtype(&DType::FLOATS)),
        })
    }
}

/// # Safety
/// As [`Buffer::slice_mut`].
pub(super) unsafe fn floats_mut<'a>(buffer: &Buffer) -> Result<FloatsMut<'a>> {
    // SAFETY: the caller's.
    unsafe {
        Ok(match buffer.dtype() {
            DType::F32 => FloatsMut::F32(buffer.slice_mut()?),
            DType::F16 => FloatsMut::F16(buffer.slice_mut::<f16>()?),
            DType::Bf16 => FloatsMut::Bf16(buffer.slice_mut::<bf16>()?),
            _ => return Err(buffer.wrong_dtype(&DType::FLOATS)),
        })
    }
}

/// Runs `work` with its threads; small work on this one, and without letting go of the GIL.
pub(super) fn run(
    py: Python<'_>,
    multiplications: [usize; 3],
    threads: usize,
    work: impl FnOnce(Workers<'_>) -> Result<()> + Send,
) -> PyResult<()> {
    let amount = multiplications.into_iter().fold(1usize, usize::saturating_mul);
    if amount <= SMALL_WORK {
        return work(Workers::serial()).map_err(to_py);
    }
    py.detach(|| {
        if threads <= 1 {
            return work(Workers::serial());
        }
        match openmp::parallel() {
            // SAFETY: the runtime's own function.
            Some(parallel) => work(unsafe { Workers::open_mp(parallel, threads) }),
            None => work(Workers::new(&*threads::pool()?, threads)),
        }
    })
    .map_err(to_py)
}

/// The instructions that products use.
#[pyfunction]
fn matmul_path() -> PyResult<&'static str> {
    Path::active().map(Path::as_str).map_err(to_py)
}
