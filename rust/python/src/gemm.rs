//! Products on packed weights, on memory of Python's. The caller keeps the memory alive and to itself during the call.

use half::{bf16, f16};
use halfbyte::codebook::QuantType;
use halfbyte::dtype::DType;
use halfbyte::error::{Error, Result};
use halfbyte::gemm::{self, Compute, Floats, FloatsMut, Path, Scales, Weight, Workers};
use halfbyte::geometry::{BlockSize, NESTED_BLOCK_SIZE, packed_len, weight_count};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

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
pub struct CpuLinear {
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

/// The tensors of a packed weight: codes, absmax, absmax2, offset.
pub type WeightTensors<'a, 'py> = [Borrowed<'a, 'py, PyAny>; 4];

impl CpuLinear {
    /// The product of tensors with a weight of this kind, of whatever dtypes x and the bias are, as a new one that `empty`
    /// makes. `None`, and nothing is done, where one of them is not contiguous, on the processor, and of the size and a
    /// dtype that it should have. How many threads work is asked for large products only.
    pub fn forward_tensors<'py>(
        &self,
        x: &Bound<'py, PyAny>,
        weight: WeightTensors<'_, 'py>,
        bias: Option<&Bound<'py, PyAny>>,
        empty: &Bound<'py, PyAny>,
        get_num_threads: &Bound<'py, PyAny>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let py = x.py();
        let read = || {
            let x = dlpack::tensor(x.as_borrowed())?;
            let m = self.rows(&x)?;
            let count = m.checked_mul(self.n).filter(|&count| i64::try_from(count).is_ok())?;
            let bias = match bias {
                Some(bias) => Some(self.shift(bias)?),
                None => None,
            };
            Some((x, m, count, self.addresses(weight)?, bias))
        };
        let Some((rows, m, count, weight, bias)) = read() else {
            return Ok(None);
        };
        let (from, dtype) = (rows.address, rows.dtype);
        let [sizes, strides] = self.layout(py, rows.shape)?;
        let out = empty.call1((sizes, strides, x.getattr(intern!(py, "dtype"))?))?;
        let Some(made) = dlpack::tensor(out.as_borrowed()).filter(|made| made.is(count, dtype)) else {
            return Ok(None);
        };
        let threads = if is_small([m, self.n, self.k]) {
            1
        } else {
            let threads = get_num_threads.call0()?.extract()?;
            threads::follow(threads).map_err(to_py)?;
            threads
        };
        let kernel = Self {
            dtype,
            compute: dtype.as_str().parse().map_err(to_py)?,
            bias: bias.map(|(_, dtype)| dtype),
            ..*self
        };
        let Addresses { packed, absmax, absmax2, offset } = weight;
        let bias = bias.map_or(0, |(address, _)| address);
        kernel.forward(py, m, from, packed, absmax, absmax2, offset, bias, made.address, threads)?;
        Ok(Some(out))
    }

    /// The rows of x.
    fn rows(&self, x: &dlpack::Tensor<'_>) -> Option<usize> {
        let (&last, _) = x.shape.split_last()?;
        // Of a tensor with elements: `k` is not 0.
        (usize::try_from(last) == Ok(self.k) && x.is_float()).then(|| x.count / self.k)
    }

    /// Address and dtype of a bias.
    fn shift(&self, bias: &Bound<'_, PyAny>) -> Option<(usize, DType)> {
        let bias = dlpack::tensor(bias.as_borrowed())?;
        (bias.shape.len() == 1 && bias.count == self.n && bias.is_float()).then_some((bias.address, bias.dtype))
    }

    fn addresses(&self, [codes, absmax, absmax2, offset]: WeightTensors<'_, '_>) -> Option<Addresses> {
        let of = |object: Borrowed<'_, '_, PyAny>, count: usize, dtype: DType| {
            let tensor = dlpack::tensor(object)?;
            tensor.is(count, dtype).then_some(tensor.address)
        };
        let blocks = self.blocksize.absmax_len(self.values);
        let codes = dlpack::tensor(codes)?;
        if codes.count.checked_mul(codes.dtype.size())? != packed_len(self.values) {
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
        Some(Addresses { packed: codes.address, absmax, absmax2, offset })
    }

    /// Sizes and strides of the result, whose last dimension has `n` elements in place of that of x.
    fn layout<'py>(&self, py: Python<'py>, x: &[i64]) -> PyResult<[Bound<'py, PyTuple>; 2]> {
        let size = |dim: usize| if dim + 1 == x.len() { self.n as i64 } else { x[dim] };
        let sizes = (0..x.len()).map(size);
        let strides = (0..x.len()).map(|dim| (dim + 1..x.len()).map(size).product::<i64>());
        Ok([PyTuple::new(py, sizes)?, PyTuple::new(py, strides)?])
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

/// Whether the work is done before others could help.
fn is_small(multiplications: [usize; 3]) -> bool {
    multiplications.into_iter().fold(1usize, usize::saturating_mul) <= SMALL_WORK
}

/// Runs `work` with its threads; small work on this one, and without letting go of the GIL.
pub(super) fn run(
    py: Python<'_>,
    multiplications: [usize; 3],
    threads: usize,
    work: impl FnOnce(Workers<'_>) -> Result<()> + Send,
) -> PyResult<()> {
    if is_small(multiplications) {
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
