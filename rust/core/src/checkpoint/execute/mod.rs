//! A plan carried out: files made in the stage, then moved into the destination together.

mod flush;
mod join;
mod joining;
mod rows;
mod rows_weight;
mod shard;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;
use serde_json::{Value, json};

use self::shard::ShardJob;
use super::file;
use super::file_names::{CONFIG_FILE, INDEX_FILE};
use super::job::Progress;
use super::plan::{Plan, ShardPlan};
use super::reader::header::SourceFile;
use super::stage::{self, Mode, Opened, Stage};
use crate::error::{Error, Result};

/// How to carry a plan out.
#[derive(Debug, Clone)]
pub struct RunOptions {
    /// What to do about a destination that holds something.
    pub mode: Mode,
    /// The text of the new config.json.
    pub config_text: Option<String>,
    /// How many threads; at least one.
    pub threads: usize,
    /// Whether to wait until files are on disk before they are taken as complete.
    pub durable: bool,
}

/// What a run wrote.
#[derive(Debug, Clone, Serialize)]
pub struct RunReport {
    /// The destination folder, without links.
    pub destination: String,
    /// The files of weights.
    pub shards: Vec<Written>,
    /// How many of them an earlier run had completed.
    pub resumed_shards: usize,
    /// Whether there was nothing left to do.
    pub already_complete: bool,
    /// Wall time.
    pub seconds: f64,
}

/// One file of weights.
#[derive(Debug, Clone, Serialize)]
pub struct Written {
    /// Its name.
    pub file: String,
    /// Its size.
    pub bytes: u64,
}

/// Carries out `plan` into `destination` and gives a report.
pub fn run(plan: &Plan, destination: &Path, options: &RunOptions, progress: &Progress) -> Result<RunReport> {
    let start = Instant::now();
    progress.set_total(plan.bytes_in());
    let identity = identity(plan, options);
    let names = output_names(plan, options);
    let places = plan.source.places();
    let complete = |folder: &Path| is_complete(plan, folder, options);
    let opened = Stage::open(destination, &places, names, options.mode, &identity, options.durable, complete)?;
    let stage = match opened {
        Opened::Complete => return report(plan, &file::resolve(destination)?, start, plan.shards.len(), true),
        Opened::Write(stage) => stage,
    };
    let mut resumed = 0;
    if !stage.committing() {
        let mut done = 0;
        let outcome = write_all(plan, &stage, options, progress, &mut done, &mut resumed);
        if let Err(error) = outcome {
            return Err(settle(stage, error, done, plan.shards.len()));
        }
    } else {
        resumed = plan.shards.len();
    }
    let destination = stage.destination().to_path_buf();
    stage.commit()?;
    report(plan, &destination, start, resumed, false)
}

/// Decides what a failed run leaves. Finished shards are kept where another try can succeed as it is; a broken input
/// leaves nothing.
fn settle(stage: Stage, error: Error, done: usize, total: usize) -> Error {
    match error {
        Error::Interrupted { .. } => {
            stage.keep();
            Error::Interrupted { shards: Some((done, total)) }
        }
        Error::Io { .. } | Error::NoSpace { .. } if done > 0 => {
            stage.keep();
            error
        }
        _ => error,
    }
}

fn write_all(
    plan: &Plan,
    stage: &Stage,
    options: &RunOptions,
    progress: &Progress,
    done: &mut usize,
    resumed: &mut usize,
) -> Result<()> {
    let todo: Vec<&ShardPlan> = plan.shards.iter().filter(|s| !stage.has(Path::new(&s.name))).collect();
    *resumed = plan.shards.len() - todo.len();
    *done = *resumed;
    check_space(plan, stage, &todo)?;
    let finished: Vec<bool> = plan.shards.iter().map(|s| stage.has(Path::new(&s.name))).collect();
    let finished: u64 = plan.tensors.iter().filter(|t| finished[t.shard]).map(|t| t.bytes_in).sum();
    progress.add(finished);
    for shard in todo {
        write_shard(plan, shard, stage, options, progress)?;
        *done += 1;
    }
    for (name, len) in &plan.source.small_files {
        progress.check()?;
        copy(&plan.source.folder.join(name), stage, name, *len, progress)?;
    }
    if plan.sharded() {
        stage.write(Path::new(INDEX_FILE), index_text(plan, stage)?.as_bytes())?;
    }
    if let Some(text) = &options.config_text {
        stage.write(Path::new(CONFIG_FILE), text.as_bytes())?;
    }
    Ok(())
}

fn check_space(plan: &Plan, stage: &Stage, todo: &[&ShardPlan]) -> Result<()> {
    let shards: u64 = todo.iter().map(|s| s.layout.max_len).sum();
    let copies: u64 = plan.source.small_files.iter().filter(|(n, _)| !stage.has(n)).map(|f| f.1).sum();
    let needed = shards + copies;
    match file::free_space(stage.destination()) {
        Some(available) if available < needed => {
            Err(Error::NoSpace { path: stage.destination().to_path_buf(), needed, available })
        }
        _ => Ok(()),
    }
}

fn write_shard(plan: &Plan, shard: &ShardPlan, stage: &Stage, options: &RunOptions, progress: &Progress) -> Result<()> {
    let name = Path::new(&shard.name);
    let partial = stage.partial(name)?;
    let outcome = (|| {
        let out = file::create(&partial)?;
        file::reserve(&out, &partial, shard.layout.max_len)?;
        let job = ShardJob::new(&plan.source, shard, &out, &partial, plan.allow_nonfinite, progress);
        job.run(options.threads, options.durable)?;
        for file in &plan.source.files {
            file.check_unchanged()?;
        }
        stage.accept(name, &partial, &out)
    })();
    if outcome.is_err() {
        let _ = file::remove_if_present(&partial);
    }
    outcome
}

fn copy(from: &Path, stage: &Stage, name: &Path, len: u64, progress: &Progress) -> Result<()> {
    /// Bytes between two looks at whether to stop: a fraction of a second of a slow disk.
    const STEP: u64 = 32 << 20;
    if stage.has(name) && fs::metadata(stage.files().join(name)).is_ok_and(|f| f.len() == len) {
        return Ok(());
    }
    let partial = stage.partial(name)?;
    let (mut source, facts) = file::open_regular(from)?;
    let mut out = file::create(&partial)?;
    let mut left = len;
    while left > 0 {
        progress.check()?;
        let count =
            io::copy(&mut (&mut source).take(left.min(STEP)), &mut out).map_err(Error::io(&partial, "copy to"))?;
        if count == 0 {
            break;
        }
        left -= count;
    }
    if left > 0 || facts.len() != len {
        return Err(Error::file(from, "was changed while it was being read"));
    }
    stage.accept(name, &partial, &out)
}

/// The index, from the headers of the finished files.
fn index_text(plan: &Plan, stage: &Stage) -> Result<String> {
    let mut weight_map = BTreeMap::new();
    let mut total_size = 0;
    for shard in &plan.shards {
        let file = SourceFile::open(&stage.files().join(&shard.name))?;
        for tensor in file.tensors {
            total_size += tensor.len;
            weight_map.insert(tensor.name, shard.name.clone());
        }
    }
    let parameters: u64 = plan.tensors.iter().map(|t| t.shape.iter().map(|&d| d as u64).product::<u64>()).sum();
    let index =
        json!({"metadata": {"total_parameters": parameters, "total_size": total_size}, "weight_map": weight_map});
    Ok(serde_json::to_string_pretty(&index).expect("an index is JSON") + "\n")
}

/// All files of the output in the order in which they appear: weights, index, small files, config.json last.
fn output_names(plan: &Plan, options: &RunOptions) -> Vec<PathBuf> {
    let mut names: Vec<PathBuf> = plan.shards.iter().map(|s| PathBuf::from(&s.name)).collect();
    if plan.sharded() {
        names.push(INDEX_FILE.into());
    }
    names.extend(plan.source.small_files.iter().map(|f| f.0.clone()));
    if options.config_text.is_some() {
        names.push(CONFIG_FILE.into());
    }
    names
}

/// What must be the same for an interrupted run to go on.
fn identity(plan: &Plan, options: &RunOptions) -> Value {
    json!({
        "halfbyte version": env!("CARGO_PKG_VERSION"),
        "source files": plan.source.files.iter().map(|f| {
            json!([f.path.file_name().map(|n| n.to_string_lossy().into_owned()), f.len, f.modified_ns])
        }).collect::<Vec<_>>(),
        "options": plan.options,
        "output files": plan.shards.iter().map(|s| json!([s.name, s.layout.max_len])).collect::<Vec<_>>(),
        "copied files": plan.source.small_files.iter().map(|(n, l)| {
            let modified = fs::metadata(plan.source.folder.join(n)).as_ref().map_or(0, file::modified_ns);
            json!([n.to_string_lossy(), l, modified])
        }).collect::<Vec<_>>(),
        "config.json": options.config_text,
    })
}

/// Whether `folder` holds the finished output of `plan`: its config, its tensors, nothing older than the source.
fn is_complete(plan: &Plan, folder: &Path, options: &RunOptions) -> bool {
    let config = match &options.config_text {
        Some(text) => fs::read_to_string(folder.join(CONFIG_FILE)).is_ok_and(|found| found == *text),
        None => true,
    };
    config
        && (!plan.sharded() || folder.join(INDEX_FILE).is_file())
        && plan.shards.iter().all(|shard| {
            let Ok(file) = SourceFile::open(&folder.join(&shard.name)) else { return false };
            // The same layout with other values, when the model was trained on.
            plan.source.files.iter().all(|source| source.modified_ns <= file.modified_ns)
                && file.tensors.len() == shard.layout.tensors.len()
                && file.tensors.iter().zip(&shard.layout.tensors).all(|(found, planned)| {
                    found.name == planned.name
                        && found.dtype == planned.dtype
                        && (planned.text || found.shape == planned.shape)
                })
        })
}

fn report(
    plan: &Plan,
    destination: &Path,
    start: Instant,
    resumed_shards: usize,
    already_complete: bool,
) -> Result<RunReport> {
    let written = |shard: &ShardPlan| -> Result<Written> {
        let path = destination.join(&shard.name);
        let bytes = fs::metadata(&path).map_err(Error::io(&path, "read"))?.len();
        Ok(Written { file: shard.name.clone(), bytes })
    };
    Ok(RunReport {
        destination: destination.to_string_lossy().into_owned(),
        shards: plan.shards.iter().map(written).collect::<Result<_>>()?,
        resumed_shards,
        already_complete,
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// Whether a run into `destination` that has not ended, or was interrupted, has completed the output file `name`.
pub fn is_staged(destination: &Path, name: &str) -> bool {
    stage::files_in(destination).join(name).is_file()
}
