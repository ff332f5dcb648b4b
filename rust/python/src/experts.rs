//! The experts of a Mixture-of-Experts layer on memory of Python's: packed weights are reached by a table of addresses.

use halfbyte::codebook::QuantType;
use halfbyte::dtype::DType;
use halfbyte::error::Result;
use halfbyte::gemm::experts::{Activation, Choice, Expert, Layer, experts};
use halfbyte::gemm::{Path, Scales, Weight};
use halfbyte::geometry::{BlockSize, NESTED_BLOCK_SIZE, packed_len, weight_count};
use pyo3::prelude::*;

use super::buffer::{Buffer, check_disjoint};
use super::error::to_py;
use super::gemm::{float, floats, floats_mut, matrix, run};

/// Adds this room's functions to the module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<CpuExperts>()?;
    m.add_class::<Unchanged>()
}

/// Layers of experts of one shape and kind: what does not change from call to call is checked once.
#[pyclass(frozen, module = "halfbyte._native")]
struct CpuExperts {
    dtype: DType,
    experts: usize,
    hidden: usize,
    intermediate: usize,
    gated: bool,
    values: usize,
    quant_type: QuantType,
    blocksize: BlockSize,
    nested: bool,
}

impl CpuExperts {
    /// The weight that four addresses of the table name: of codes, scales, and of nested ones their scales and offset.
    ///
    /// # Safety
    /// They are addresses of such memory, which nobody writes to while the weight lives.
    unsafe fn weight<'a>(&self, at: &[usize], n: usize, k: usize) -> Result<Weight<'a>> {
        let blocks = self.blocksize.absmax_len(self.values);
        // SAFETY: the caller's.
        unsafe {
            let packed = Buffer::of("packed", at[0], packed_len(self.values), DType::U8)?.slice()?;
            let scales = if self.nested {
                let codes = Buffer::of("absmax", at[1], blocks, DType::U8)?.slice()?;
                let absmax = Buffer::of("absmax2", at[2], blocks.div_ceil(NESTED_BLOCK_SIZE), DType::F32)?.slice()?;
                let offset = Buffer::of("offset", at[3], 1, DType::F32)?.slice::<f32>()?[0];
                Scales::Nested { codes, absmax, offset }
            } else {
                Scales::Plain(Buffer::of("absmax", at[1], blocks, DType::F32)?.slice()?)
            };
            Weight::new(packed, scales, self.quant_type, self.blocksize, n, k)
        }
    }
}

#[pymethods]
impl CpuExperts {
    /// Check the kind.
    #[new]
    #[allow(clippy::too_many_arguments, reason = "a layer of experts has that many properties")]
    fn new(
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
            Ok(Self {
                dtype: float("dtype", dtype)?,
                experts,
                hidden,
                intermediate,
                gated,
                values: weight_count(intermediate, hidden)?,
                quant_type: quant_type.parse()?,
                blocksize: BlockSize::new(blocksize)?,
                nested,
            })
        };
        check().map_err(to_py)
    }

    /// `y[tokens, hidden]` of `x[tokens, hidden]`, whose experts are `ids[tokens, k]` and count `weights[tokens, k]`.
    ///
    /// `table` holds `[projections, experts, 4]` addresses: of gates where there are such, up and down projections. All
    /// others but numbers and names are addresses; those of biases are 0 where there are none.
    #[allow(clippy::too_many_arguments, reason = "a layer of experts has that many")]
    fn forward(
        &self,
        py: Python<'_>,
        tokens: usize,
        k: usize,
        x: usize,
        ids: usize,
        weights: usize,
        weights_dtype: &str,
        table: usize,
        up_bias: usize,
        down_bias: usize,
        activation: &str,
        y: usize,
        threads: usize,
    ) -> PyResult<()> {
        let (weights_dtype, activation) = float("weights_dtype", weights_dtype)
            .and_then(|dtype| Ok((dtype, activation.parse::<Activation>()?)))
            .map_err(to_py)?;
        let slots = tokens.saturating_mul(k);
        run(py, [slots, self.intermediate, self.hidden], threads, |workers| {
            let projections = 2 + usize::from(self.gated);
            let width = self.intermediate.saturating_mul(projections - 1);
            let x = matrix("x", x, tokens, self.hidden, self.dtype)?;
            let y = matrix("y", y, tokens, self.hidden, self.dtype)?;
            let ids = matrix("ids", ids, tokens, k, DType::I64)?;
            let weights = matrix("weights", weights, tokens, k, weights_dtype)?;
            let table = matrix("table", table, projections.saturating_mul(self.experts), 4, DType::I64)?;
            let bias = |argument, address, width| match address {
                0 => Ok(None),
                address => matrix(argument, address, self.experts, width, self.dtype).map(Some),
            };
            let up_bias = bias("up_bias", up_bias, width)?;
            let down_bias = bias("down_bias", down_bias, self.hidden)?;
            check_disjoint(&[&x, &ids, &weights, &table], &[&y])?;
            check_disjoint(&[up_bias.as_ref().unwrap_or(&x), down_bias.as_ref().unwrap_or(&x)], &[&y])?;
            // SAFETY: `y` is apart from all others, and all are the Python caller's to keep for the call, with what the
            // table names.
            unsafe {
                let table = table.slice::<i64>()?;
                let layer = Layer {
                    experts: self.experts,
                    hidden: self.hidden,
                    intermediate: self.intermediate,
                    gated: self.gated,
                    activation,
                    up_bias: up_bias.as_ref().map(|bias| floats(bias)).transpose()?,
                    down_bias: down_bias.as_ref().map(|bias| floats(bias)).transpose()?,
                };
                let choice = Choice { tokens, k, ids: ids.slice()?, weights: floats(&weights)? };
                let expert = |id: usize| {
                    let weight = |projection: usize, n, k| {
                        let at = (projection * self.experts + id) * 4;
                        let at: Vec<usize> = table[at..at + 4].iter().map(|&address| address as usize).collect();
                        self.weight(&at, n, k)
                    };
                    let (n, k) = (self.intermediate, self.hidden);
                    let gate = self.gated.then(|| weight(0, n, k)).transpose()?;
                    Ok(Expert { gate, up: weight(projections - 2, n, k)?, down: weight(projections - 1, k, n)? })
                };
                experts(Path::active()?, workers, &layer, &choice, floats(&x)?, expert, floats_mut(&y)?)
            }
        })
    }
}

/// What was there when this was made, and is asked for again and again: entries of dictionaries, and how many they have. Some
/// of it belongs to one expert, the rest to all.
#[pyclass(frozen, module = "halfbyte._native")]
pub struct Unchanged {
    entries: Vec<(Py<pyo3::types::PyDict>, Py<pyo3::types::PyString>, Py<PyAny>)>,
    sizes: Vec<(Py<pyo3::types::PyDict>, usize)>,
    /// Where in both lists each expert begins, and where the last one ends.
    bounds: Vec<(usize, usize)>,
}

#[pymethods]
impl Unchanged {
    /// Remember that each dictionary has this object under this name; and how many entries others have now. Expert `i` has the
    /// part of both lists from `bounds[i]` to `bounds[i + 1]`, what is before and behind belongs to all.
    #[new]
    fn new(
        py: Python<'_>,
        entries: Vec<(Py<pyo3::types::PyDict>, Py<pyo3::types::PyString>, Py<PyAny>)>,
        sizes: Vec<Py<pyo3::types::PyDict>>,
        bounds: Vec<(usize, usize)>,
    ) -> PyResult<Self> {
        let ends = std::iter::once((0, 0)).chain(bounds.iter().copied()).chain([(entries.len(), sizes.len())]);
        if !ends.is_sorted_by(|a, b| a.0 <= b.0 && a.1 <= b.1) {
            let message = format!("bounds must ascend up to ({}, {}), got {bounds:?}", entries.len(), sizes.len());
            return Err(pyo3::exceptions::PyValueError::new_err(message));
        }
        let sizes = sizes.into_iter().map(|dict| {
            let len = dict.bind(py).len();
            (dict, len)
        });
        Ok(Self { sizes: sizes.collect(), entries, bounds })
    }

    /// What is remembered refers back to who remembers it: a model that is deleted would otherwise never be freed.
    #[allow(clippy::needless_pass_by_value)] // as Python's collector calls it
    fn __traverse__(&self, visit: pyo3::PyVisit<'_>) -> Result<(), pyo3::PyTraverseError> {
        for (dict, name, value) in &self.entries {
            visit.call(dict)?;
            visit.call(name)?;
            visit.call(value)?;
        }
        for (dict, _) in &self.sizes {
            visit.call(dict)?;
        }
        Ok(())
    }

    /// Whether all is as it was; with `experts`, what belongs to these and to all.
    #[pyo3(signature = (experts=None))]
    fn holds(&self, py: Python<'_>, experts: Option<Vec<usize>>) -> PyResult<bool> {
        let whole = ((0, 0), (self.entries.len(), self.sizes.len()));
        let part = |from: (usize, usize), to: (usize, usize)| self.part_holds(py, from, to);
        let (Some(experts), [first, .., last]) = (experts, &self.bounds[..]) else {
            return Ok(part(whole.0, whole.1));
        };
        for expert in experts {
            let Some(&[from, to]) = self.bounds.get(expert..expert + 2) else {
                let message = format!("experts must be below {}, got {expert}", self.bounds.len() - 1);
                return Err(pyo3::exceptions::PyValueError::new_err(message));
            };
            if !part(from, to) {
                return Ok(false);
            }
        }
        Ok(part(whole.0, *first) && part(*last, whole.1))
    }
}

impl Unchanged {
    /// Whether a part of both lists is as it was.
    fn part_holds(&self, py: Python<'_>, from: (usize, usize), to: (usize, usize)) -> bool {
        self.sizes[from.1..to.1].iter().all(|(dict, len)| dict.bind(py).len() == *len)
            && self.entries[from.0..to.0].iter().all(|(dict, name, value)| {
                // SAFETY: all are objects of these types, and what is borrowed is only compared.
                let found = unsafe { pyo3::ffi::PyDict_GetItemWithError(dict.as_ptr(), name.as_ptr()) };
                found == value.as_ptr()
            })
    }
}
