//! Whether a call may go straight to a device's kernels: the questions before each call, asked without Python in between.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PySet, PyString, PyTuple};

use super::gemm::{CpuLinear, WeightTensors};

/// Where a `Packing` of Python's has these.
const ABSMAX: usize = 0;
const ABSMAX2: usize = 1;
const OFFSET: usize = 2;
const MEMO: usize = 6;

/// What decides about direct calls. None of the answers is remembered: they change from one call to the next.
#[pyclass(frozen, module = "halfbyte._native")]
pub struct DirectCalls {
    plain_types: Py<PySet>,
    kernels: Py<PyDict>,
    transforms: Vec<Py<PyAny>>,
    function_modes: Py<PyAny>,
    forward_ad_level: (Py<PyAny>, Py<PyString>),
    is_grad_enabled: Py<PyAny>,
    empty: Py<PyAny>,
    get_num_threads: Py<PyAny>,
    packed_weight: Py<PyAny>,
}

#[pymethods]
impl DirectCalls {
    /// Keep the questions.
    #[new]
    #[pyo3(signature = (
        *,
        plain_types, kernels, transforms, function_modes, forward_ad_level, is_grad_enabled,
        empty, get_num_threads, packed_weight
    ))]
    #[allow(clippy::too_many_arguments, reason = "keyword arguments of Python, each with a name")]
    fn new(
        plain_types: Py<PySet>,
        kernels: Py<PyDict>,
        transforms: Vec<Py<PyAny>>,
        function_modes: Py<PyAny>,
        forward_ad_level: (Py<PyAny>, Py<PyString>),
        is_grad_enabled: Py<PyAny>,
        empty: Py<PyAny>,
        get_num_threads: Py<PyAny>,
        packed_weight: Py<PyAny>,
    ) -> Self {
        Self {
            plain_types,
            kernels,
            transforms,
            function_modes,
            forward_ad_level,
            is_grad_enabled,
            empty,
            get_num_threads,
            packed_weight,
        }
    }

    /// Whether something traces or transforms what is called now, or listens to its operations.
    fn transformed(&self, py: Python<'_>) -> PyResult<bool> {
        for question in &self.transforms {
            if yes(question.bind(py))? {
                return Ok(true);
            }
        }
        let (owner, name) = &self.forward_ad_level;
        Ok(owner.bind(py).getattr(name)?.extract::<i64>()? >= 0)
    }

    /// The kernels for a call with these tensors, or `None` where only torch's dispatcher does right.
    #[pyo3(signature = (x, factor = None, *constants))]
    fn kernels<'py>(
        &self,
        x: &Bound<'py, PyAny>,
        factor: Option<&Bound<'py, PyAny>>,
        constants: &Bound<'py, PyTuple>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let may = self.may(x, factor)? && self.are_plain(constants.iter_borrowed())?;
        if may { self.kernels_for(x) } else { Ok(None) }
    }

    /// The same for a call with a packed weight.
    fn kernels_of<'py>(
        &self,
        x: &Bound<'py, PyAny>,
        factor: Option<&Bound<'py, PyAny>>,
        codes: &Bound<'py, PyAny>,
        packing: &Bound<'py, PyTuple>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let may = self.may(x, factor)? && self.are_plain(tensors(codes, packing)?)?;
        if may { self.kernels_for(x) } else { Ok(None) }
    }

    /// The product with a packed weight, or `None` where only torch's dispatcher does right. What the weight's memo has as
    /// `linear` makes it where it takes these tensors, else the kernels of their device.
    fn linear_4bit<'py>(
        &self,
        x: &Bound<'py, PyAny>,
        codes: &Bound<'py, PyAny>,
        packing: &Bound<'py, PyTuple>,
        bias: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let py = x.py();
        let weight = tensors(codes, packing)?;
        if !self.may(x, bias)? || !self.are_plain(weight)? {
            return Ok(None);
        }
        let memo = packing.get_borrowed_item(MEMO)?;
        if !memo.is_none()
            && let Ok(kernel) = memo.getattr(intern!(py, "linear"))?.cast_into::<CpuLinear>()
        {
            let (empty, threads) = (self.empty.bind(py), self.get_num_threads.bind(py));
            let done = kernel.get().forward_tensors(x, weight, bias, empty, threads)?;
            if done.is_some() {
                return Ok(done);
            }
        }
        let Some(kernels) = self.kernels_for(x)? else {
            return Ok(None);
        };
        let weight = self.packed_weight.bind(py).call1(((codes, packing),))?;
        kernels.call_method1(intern!(py, "linear_4bit"), (x, weight, bias)).map(Some)
    }
}

impl DirectCalls {
    /// Whether kernels may be called directly, as far as these two decide; derivatives could be taken with regard to them.
    fn may(&self, x: &Bound<'_, PyAny>, factor: Option<&Bound<'_, PyAny>>) -> PyResult<bool> {
        let py = x.py();
        Ok(!self.transformed(py)?
            && !yes(self.function_modes.bind(py))?
            && self.takes(x)?
            && factor.map_or(Ok(true), |factor| self.takes(factor))?)
    }

    /// The kernels of the device of `x`.
    fn kernels_for<'py>(&self, x: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let py = x.py();
        let kernels = self.kernels.bind(py);
        // The device's name takes longer than this question.
        if x.getattr(intern!(py, "is_cpu"))?.is_truthy()? {
            return kernels.get_item(intern!(py, "cpu"));
        }
        kernels.get_item(x.getattr(intern!(py, "device"))?.getattr(intern!(py, "type"))?)
    }

    /// Whether kernels may read a tensor that a derivative could be taken with regard to.
    fn takes(&self, tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
        let py = tensor.py();
        Ok(self.is_plain(tensor.as_borrowed())?
            && !tensor.call_method0(intern!(py, "is_neg"))?.is_truthy()?
            && !(tensor.getattr(intern!(py, "requires_grad"))?.is_truthy()? && yes(self.is_grad_enabled.bind(py))?))
    }

    fn are_plain<'a, 'py: 'a>(&self, tensors: impl IntoIterator<Item = Borrowed<'a, 'py, PyAny>>) -> PyResult<bool> {
        for tensor in tensors {
            if !self.is_plain(tensor)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn is_plain(&self, object: Borrowed<'_, '_, PyAny>) -> PyResult<bool> {
        self.plain_types.bind(object.py()).contains(object.get_type())
    }
}

/// The tensors of a packed weight.
fn tensors<'a, 'py>(
    codes: &'a Bound<'py, PyAny>,
    packing: &'a Bound<'py, PyTuple>,
) -> PyResult<WeightTensors<'a, 'py>> {
    let part = |index| packing.get_borrowed_item(index);
    Ok([codes.as_borrowed(), part(ABSMAX)?, part(ABSMAX2)?, part(OFFSET)?])
}

/// The answer: no is False, None or 0.
fn yes(question: &Bound<'_, PyAny>) -> PyResult<bool> {
    question.call0()?.is_truthy()
}
