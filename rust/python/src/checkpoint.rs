//! Plans, runs and descriptions of checkpoints for Python. Options and reports cross as JSON text.

use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use halfbyte::checkpoint::execute::{self, RunOptions};
use halfbyte::checkpoint::inspect;
use halfbyte::checkpoint::job::Progress;
use halfbyte::checkpoint::plan::{self as plans, DEFAULT_SHARD_SIZE, QuantizeOptions};
use halfbyte::checkpoint::reader::Checkpoint;
use halfbyte::checkpoint::selection::{Rule, SelectionOptions};
use halfbyte::checkpoint::{dtype, verify as verifying};
use halfbyte::error::{Error, Result};
use halfbyte::geometry::BlockSize;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use serde::Deserialize;
use serde_json::Value;

use super::error::to_py;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct QuantizeArguments {
    quant_type: String,
    blocksize: usize,
    double_quant: bool,
    storage: String,
    dtype: Option<String>,
    max_shard_size: Option<u64>,
    rules: Vec<String>,
    skip: Vec<String>,
    explicit: Option<Vec<String>>,
    explicit_conv1d: Option<Vec<String>>,
    allow_nonfinite: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DequantizeArguments {
    dtype: Option<String>,
    max_shard_size: Option<u64>,
}

/// What a run would do, computed from headers and config.json alone.
#[pyclass(frozen, module = "halfbyte._native")]
pub struct Plan {
    inner: Arc<plans::Plan>,
}

#[pymethods]
impl Plan {
    /// The whole plan as a JSON object.
    fn to_json(&self) -> String {
        self.inner.to_json().to_string()
    }
}

/// A run on threads of its own.
#[pyclass(frozen, module = "halfbyte._native")]
pub struct Job {
    progress: Arc<Progress>,
    end: Arc<(Mutex<Option<Result<Value>>>, Condvar)>,
}

impl Job {
    fn start(work: impl FnOnce(&Progress) -> Result<Value> + Send + 'static) -> PyResult<Self> {
        let progress = Arc::new(Progress::default());
        let end = Arc::new((Mutex::new(None), Condvar::new()));
        let (theirs, finish) = (Arc::clone(&progress), Arc::clone(&end));
        thread::Builder::new().name("halfbyte".to_owned()).spawn(move || {
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(&theirs)));
            let outcome = outcome.unwrap_or_else(|panic| {
                let words = panic
                    .downcast_ref::<String>()
                    .cloned()
                    .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
                    .unwrap_or_default();
                Err(Error::Bug { words })
            });
            *finish.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
            finish.1.notify_all();
        })?;
        Ok(Self { progress, end })
    }
}

#[pymethods]
impl Job {
    /// Waits for the end, at most so many seconds; true when it has ended.
    fn wait(&self, py: Python<'_>, seconds: f64) -> PyResult<bool> {
        let limit = Duration::try_from_secs_f64(seconds)
            .map_err(|_| PyValueError::new_err(format!("seconds is {seconds}: expected a number from 0 up")))?;
        let end = Arc::clone(&self.end);
        Ok(py.detach(move || {
            let until = Instant::now() + limit.min(Duration::from_secs(1 << 20));
            let mut slot = end.0.lock().unwrap_or_else(PoisonError::into_inner);
            loop {
                if slot.is_some() {
                    return true;
                }
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return false;
                }
                slot = end.1.wait_timeout(slot, left).unwrap_or_else(PoisonError::into_inner).0;
            }
        }))
    }

    /// Bytes done, bytes in all, and the tensor that is being worked on.
    fn progress(&self) -> (u64, u64, String) {
        self.progress.read()
    }

    /// Asks the run to stop soon.
    fn cancel(&self) {
        self.progress.cancel();
    }

    /// The report of a run that has ended, once; raises what went wrong.
    fn result(&self) -> PyResult<String> {
        let outcome = self.end.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        match outcome {
            Some(Ok(report)) => Ok(report.to_string()),
            Some(Err(error)) => Err(to_py(error)),
            None => Err(PyRuntimeError::new_err("the job has not ended, or its result was taken already")),
        }
    }
}

fn parse_config(text: Option<&str>) -> PyResult<Option<Value>> {
    text.map(serde_json::from_str)
        .transpose()
        .map_err(|e| super::error::CheckpointError::new_err(format!("config.json is no valid JSON: {e}")))
}

fn options<'a, T: Deserialize<'a>>(text: &'a str) -> PyResult<(T, Value)> {
    let fail = |e: serde_json::Error| PyValueError::new_err(format!("options_json is not what was expected: {e}"));
    Ok((serde_json::from_str(text).map_err(fail)?, serde_json::from_str(text).map_err(fail)?))
}

fn shard_size(given: Option<u64>) -> Result<u64> {
    match given {
        Some(0) => Err(Error::argument("max_shard_size", 0, "a size in bytes of at least 1")),
        Some(size) => Ok(size),
        None => Ok(DEFAULT_SHARD_SIZE),
    }
}

/// Plans the quantization of the checkpoint in `source`.
#[pyfunction]
pub fn plan_quantize(py: Python<'_>, source: PathBuf, config_json: Option<&str>, options_json: &str) -> PyResult<Plan> {
    let config = parse_config(config_json)?;
    let (given, record) = options::<QuantizeArguments>(options_json)?;
    py.detach(move || {
        let options = QuantizeOptions {
            blocksize: BlockSize::new(given.blocksize)?,
            double_quant: given.double_quant,
            storage: dtype::storage_dtype(&given.storage)?,
            dtype: given.dtype.as_deref().map(|d| dtype::weight_dtype("dtype", d)).transpose()?,
            max_shard_size: shard_size(given.max_shard_size)?,
            allow_nonfinite: given.allow_nonfinite,
            selection: SelectionOptions {
                quant_type: given.quant_type.parse()?,
                rules: given.rules.iter().map(|r| r.parse::<Rule>()).collect::<Result<_>>()?,
                skip: given.skip,
                explicit: given.explicit.map(|names| names.into_iter().collect()),
                explicit_conv1d: given.explicit_conv1d.map(|names| names.into_iter().collect()),
            },
        };
        let source = Checkpoint::open(&source)?;
        plans::Plan::quantize(source, config.as_ref(), &options, record)
    })
    .map(|inner| Plan { inner: Arc::new(inner) })
    .map_err(to_py)
}

/// Plans the reverse.
#[pyfunction]
pub fn plan_dequantize(
    py: Python<'_>,
    source: PathBuf,
    config_json: Option<&str>,
    options_json: &str,
) -> PyResult<Plan> {
    let config = parse_config(config_json)?;
    let (given, record) = options::<DequantizeArguments>(options_json)?;
    py.detach(move || {
        let dtype = given.dtype.as_deref().map(|d| dtype::weight_dtype("dtype", d)).transpose()?;
        let size = shard_size(given.max_shard_size)?;
        plans::Plan::dequantize(Checkpoint::open(&source)?, config.as_ref(), dtype, size, record)
    })
    .map(|inner| Plan { inner: Arc::new(inner) })
    .map_err(to_py)
}

/// Starts to carry out a plan.
#[pyfunction]
#[pyo3(signature = (plan, destination, mode, config_text, threads, fsync))]
pub fn run_plan(
    plan: &Plan,
    destination: PathBuf,
    mode: &str,
    config_text: Option<String>,
    threads: usize,
    fsync: bool,
) -> PyResult<Job> {
    let mode = mode.parse().map_err(to_py)?;
    let plan = Arc::clone(&plan.inner);
    let options = RunOptions { mode, config_text, threads: threads.max(1), durable: fsync };
    Job::start(move |progress| execute::run(&plan, &destination, &options, progress))
}

/// Starts to compare two checkpoints; `config_json` is the config.json of `a`.
#[pyfunction]
pub fn verify(a: PathBuf, b: PathBuf, config_json: Option<&str>, threads: usize) -> PyResult<Job> {
    let config = parse_config(config_json)?;
    Job::start(move |progress| {
        let (a, b) = (Checkpoint::open(&a)?, Checkpoint::open(&b)?);
        verifying::verify(&a, &b, config.as_ref(), threads.max(1), progress)
    })
}

/// Describes a checkpoint, as JSON.
#[pyfunction]
#[pyo3(name = "inspect")]
pub fn inspect_path(py: Python<'_>, path: PathBuf) -> PyResult<String> {
    py.detach(|| inspect::inspect(&Checkpoint::open(&path)?)).map(|v| v.to_string()).map_err(to_py)
}

/// Adds this file's names to the module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("CheckpointError", m.py().get_type::<super::error::CheckpointError>())?;
    m.add_class::<Plan>()?;
    m.add_class::<Job>()?;
    m.add_function(wrap_pyfunction!(plan_quantize, m)?)?;
    m.add_function(wrap_pyfunction!(plan_dequantize, m)?)?;
    m.add_function(wrap_pyfunction!(run_plan, m)?)?;
    m.add_function(wrap_pyfunction!(verify, m)?)?;
    m.add_function(wrap_pyfunction!(inspect_path, m)?)?;
    Ok(())
}
