//! Plans, runs and descriptions of checkpoints for Python.

use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use halfbyte::checkpoint::execute::{self, RunOptions, RunReport};
use halfbyte::checkpoint::inspect;
use halfbyte::checkpoint::job::Progress;
use halfbyte::checkpoint::options::{DequantizeOptions, QuantizeOptions, Selected};
use halfbyte::checkpoint::plan as plans;
use halfbyte::checkpoint::reader::Checkpoint;
use halfbyte::checkpoint::verify::{self as verifying, VerifyReport};
use halfbyte::error::{Error, Result};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde::Serialize;
use serde_json::Value;

use super::error::to_py;
use super::values::{from_python, to_python};

/// What a run would do, computed from headers and config.json alone.
#[pyclass(frozen, module = "halfbyte._native")]
pub struct Plan {
    inner: Arc<plans::Plan>,
}

#[pymethods]
impl Plan {
    /// The whole plan.
    fn report<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_python(py, &self.inner.report())
    }

    /// All that decided about it, as the core has read it.
    fn options<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_python(py, &self.inner.options)
    }
}

/// What a job gives.
#[derive(Serialize)]
#[serde(untagged)]
enum Report {
    Run(RunReport),
    Verify(VerifyReport),
}

/// A run on threads of its own.
#[pyclass(frozen, module = "halfbyte._native")]
pub struct Job {
    progress: Arc<Progress>,
    end: Arc<(Mutex<Option<Result<Report>>>, Condvar)>,
}

impl Job {
    fn start(work: impl FnOnce(&Progress) -> Result<Report> + Send + 'static) -> PyResult<Self> {
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
            .map_err(|_| PyValueError::new_err(format!("seconds must be a number from 0 up, got {seconds}")))?;
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
    fn result<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let outcome = self.end.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        match outcome {
            Some(Ok(report)) => to_python(py, &report),
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

/// Plans the quantization of the checkpoint in `source`.
#[pyfunction]
#[pyo3(signature = (source, config_json, options, selected = None))]
pub fn plan_quantize(
    py: Python<'_>,
    source: PathBuf,
    config_json: Option<&str>,
    options: &Bound<'_, PyDict>,
    selected: Option<&Bound<'_, PyDict>>,
) -> PyResult<Plan> {
    let config = parse_config(config_json)?;
    let options: QuantizeOptions = from_python(options)?;
    let selected: Option<Selected> = selected.map(from_python).transpose()?;
    py.detach(move || plans::Plan::quantize(Checkpoint::open(&source)?, config.as_ref(), &options, selected.as_ref()))
        .map(|inner| Plan { inner: Arc::new(inner) })
        .map_err(to_py)
}

/// Plans the reverse.
#[pyfunction]
pub fn plan_dequantize(
    py: Python<'_>,
    source: PathBuf,
    config_json: Option<&str>,
    options: &Bound<'_, PyDict>,
) -> PyResult<Plan> {
    let config = parse_config(config_json)?;
    let options: DequantizeOptions = from_python(options)?;
    py.detach(move || plans::Plan::dequantize(Checkpoint::open(&source)?, config.as_ref(), &options))
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
    Job::start(move |progress| execute::run(&plan, &destination, &options, progress).map(Report::Run))
}

/// Whether a run into `destination` that has not ended, or was interrupted, has completed an output file.
#[pyfunction]
pub fn is_staged(destination: PathBuf, file: &str) -> bool {
    execute::is_staged(&destination, file)
}

/// Starts to compare two checkpoints; `config_a` and `config_b` are the texts of their config.json.
#[pyfunction]
pub fn verify(a: PathBuf, b: PathBuf, config_a: Option<&str>, config_b: Option<&str>, threads: usize) -> PyResult<Job> {
    let (config_a, config_b) = (parse_config(config_a)?, parse_config(config_b)?);
    Job::start(move |progress| {
        let (a, b) = (Checkpoint::open(&a)?, Checkpoint::open(&b)?);
        verifying::verify(&a, &b, config_a.as_ref(), config_b.as_ref(), threads.max(1), progress).map(Report::Verify)
    })
}

/// Describes a checkpoint; `config` is the text of its config.json.
#[pyfunction]
#[pyo3(name = "inspect")]
pub fn inspect_path<'py>(py: Python<'py>, path: PathBuf, config: Option<&str>) -> PyResult<Bound<'py, PyAny>> {
    let config = parse_config(config)?;
    let checkpoint = py.detach(|| Checkpoint::open(&path)).map_err(to_py)?;
    let report = py.detach(|| inspect::inspect(&checkpoint, config.as_ref())).map_err(to_py)?;
    to_python(py, &report)
}

/// Adds this file's names to the module.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("CheckpointError", m.py().get_type::<super::error::CheckpointError>())?;
    m.add("NoCudaDriverError", m.py().get_type::<super::error::NoCudaDriverError>())?;
    m.add_class::<Plan>()?;
    m.add_class::<Job>()?;
    m.add_function(wrap_pyfunction!(plan_quantize, m)?)?;
    m.add_function(wrap_pyfunction!(plan_dequantize, m)?)?;
    m.add_function(wrap_pyfunction!(run_plan, m)?)?;
    m.add_function(wrap_pyfunction!(is_staged, m)?)?;
    m.add_function(wrap_pyfunction!(verify, m)?)?;
    m.add_function(wrap_pyfunction!(inspect_path, m)?)?;
    Ok(())
}
