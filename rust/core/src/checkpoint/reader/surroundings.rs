//! The files around a checkpoint's weights: those to copy, and those to leave out with a reason.
//!
//! Beside the weights lie small files and, sometimes, weights in another form (a pickle, an export for another
//! runtime): those are not copied beside quantized ones. A subfolder may hold either: a further model that belongs to
//! this one (the dense layers of an embedding model, a tokenizer of sounds), which is copied; or this very model in
//! another form or at another time, which is not.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::header::SourceFile;
use crate::checkpoint::file_names::CONFIG_FILE;
use crate::error::{Error, Result};

/// How deep folders of small files are followed.
const MAX_DEPTH: usize = 8;

/// Endings of files that hold weights which PyTorch reads.
const OWN_ENDINGS: [&str; 7] = [".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".pkl"];

/// Endings of files that hold weights for other runtimes.
const OTHER_ENDINGS: [&str; 10] =
    [".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack", ".ot", ".pb", ".tflite", ".mlmodel"];

/// Folders of exports and of vendors' own layouts of the same weights.
const OTHER_FORMS: [&str; 15] = [
    "onnx",
    "openvino",
    "original",
    "coreml",
    "gguf",
    "ggml",
    "mlx",
    "tflite",
    "tensorrt",
    "trt",
    "flax",
    "jax",
    "tf",
    "consolidated",
    "ctranslate2",
];

/// Starts of the names of folders and files that a training run leaves.
const TRAINING_FOLDERS: [&str; 3] = ["checkpoint-", "global_step", "step_"];
const TRAINING_FILES: [&str; 6] =
    ["optimizer", "scheduler", "rng_state", "training_args", "scaler", "pytorch_model_fsdp"];

const ANOTHER_FILE: &str = "weights in another file";
const ANOTHER_FORM: &str = "another form of this model";
const TRAINING: &str = "the state of a training run";

/// What lies around the weights.
#[derive(Debug, Default)]
pub struct Surroundings {
    /// Files to copy: path relative to the folder, and length.
    pub copied: Vec<(PathBuf, u64)>,
    /// What is not copied: relative path and why.
    pub left_out: Vec<(PathBuf, String)>,
    /// Weights in subfolders that PyTorch reads, not judged yet.
    candidates: Vec<(PathBuf, u64)>,
    /// Indices of weights in subfolders.
    indices: Vec<(PathBuf, u64)>,
}

impl Surroundings {
    /// Walks through a folder.
    pub fn find(folder: &Path) -> Result<Self> {
        let mut found = Self::default();
        let mut open = vec![(folder.to_path_buf(), 0usize)];
        while let Some((place, depth)) = open.pop() {
            for entry in fs::read_dir(&place).map_err(Error::io(&place, "list"))? {
                let entry = entry.map_err(Error::io(&place, "list"))?;
                let name = entry.file_name();
                // Hidden files are other tools' housekeeping: .git, .cache, .gitattributes.
                if name.to_string_lossy().starts_with('.') {
                    continue;
                }
                let path = entry.path();
                let kind = entry.file_type().map_err(Error::io(&path, "list"))?;
                let relative = path.strip_prefix(folder).unwrap_or(&path).to_path_buf();
                if kind.is_dir() {
                    if depth < MAX_DEPTH {
                        open.push((path, depth + 1));
                    } else {
                        found.left_out.push((relative, format!("a folder {MAX_DEPTH} folders deep")));
                    }
                    continue;
                }
                // Follows links to files (a hub cache is made of them), never links to folders.
                let Ok(facts) = fs::metadata(&path) else {
                    found.left_out.push((relative, "a link that leads nowhere".to_owned()));
                    continue;
                };
                if facts.is_file() {
                    found.sort_in(relative, facts.len(), depth);
                }
            }
        }
        found.copied.sort();
        found.left_out.sort();
        found.candidates.sort();
        Ok(found)
    }

    fn sort_in(&mut self, relative: PathBuf, len: u64, depth: usize) {
        let name = relative.file_name().map_or_else(String::new, |name| name.to_string_lossy().to_lowercase());
        let ends = |endings: &[&str]| endings.iter().any(|ending| name.ends_with(ending));
        if ends(&OWN_ENDINGS) && depth > 0 {
            match other_form(&relative, &name) {
                Some(reason) => self.left_out.push((relative, reason.to_owned())),
                None => self.candidates.push((relative, len)),
            }
        } else if ends(&OWN_ENDINGS) || ends(&OTHER_ENDINGS) {
            let reason = if depth > 0 { other_form(&relative, &name).unwrap_or(ANOTHER_FORM) } else { ANOTHER_FILE };
            self.left_out.push((relative, reason.to_owned()));
        } else if name.ends_with(".index.json") {
            // That of the weights themselves is written anew.
            if depth > 0 {
                self.indices.push((relative, len));
            }
        } else if depth > 0 || name != CONFIG_FILE {
            // config.json comes last, by another way.
            self.copied.push((relative, len));
        }
    }

    /// Decides what the weights in subfolders are, now that the checkpoint's own are known: `read` are its files, `names`
    /// its tensors. Gives a note where other models' weights are copied.
    pub fn judge(&mut self, folder: &Path, read: &BTreeSet<PathBuf>, names: &HashSet<&str>) -> Option<String> {
        self.left_out.retain(|(name, _)| !read.contains(name));
        let candidates = std::mem::take(&mut self.candidates);
        let (dense, pickled): (Vec<_>, Vec<_>) = candidates
            .into_iter()
            .filter(|(name, _)| !read.contains(name))
            .partition(|(name, _)| name.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("safetensors")));
        let mut taken = Vec::new();
        let mut beside: HashSet<PathBuf> = HashSet::new();
        for (name, len) in dense {
            beside.extend(name.parent().map(Path::to_path_buf));
            if is_same_model(&folder.join(&name), names) {
                self.left_out.push((name, format!("{ANOTHER_FORM}: its tensors have the same names")));
            } else {
                taken.push((name, len));
            }
        }
        for (name, len) in pickled {
            if name.parent().is_some_and(|place| beside.contains(place)) {
                self.left_out.push((name, ANOTHER_FILE.to_owned()));
            } else {
                taken.push((name, len));
            }
        }
        let places: HashSet<&Path> = taken.iter().filter_map(|(name, _)| name.parent()).collect();
        let indices = std::mem::take(&mut self.indices);
        self.copied.extend(indices.into_iter().filter(|(name, _)| name.parent().is_some_and(|p| places.contains(p))));
        self.left_out.sort();
        taken.sort();
        let note = note(&taken);
        self.copied.extend(taken);
        self.copied.sort();
        note
    }

    /// The weights that could be meant where the folder itself has none.
    pub fn other_weights(&self) -> impl Iterator<Item = &Path> {
        let left = self.left_out.iter().map(|(name, _)| name.as_path());
        left.chain(self.candidates.iter().map(|(name, _)| name.as_path()))
    }
}

/// Why weights in a subfolder are not those of another model, as far as names tell.
fn other_form(relative: &Path, name: &str) -> Option<&'static str> {
    let folders = relative.parent()?.components().map(|part| part.as_os_str().to_string_lossy().to_lowercase());
    if TRAINING_FILES.iter().any(|start| name.starts_with(start)) {
        return Some(TRAINING);
    }
    for folder in folders {
        if OTHER_FORMS.contains(&folder.as_str()) || folder.starts_with("openvino") || folder.ends_with(".mlpackage") {
            return Some(ANOTHER_FORM);
        }
        let numbered = |start: &str| {
            let rest = folder.strip_prefix(start);
            rest.is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit()))
        };
        if TRAINING_FOLDERS.iter().any(|start| numbered(start)) {
            return Some(TRAINING);
        }
    }
    None
}

/// Whether most tensors of a file have the names of the checkpoint's own.
fn is_same_model(path: &Path, names: &HashSet<&str>) -> bool {
    let Ok(file) = SourceFile::open(path) else { return false };
    let same = file.tensors.iter().filter(|tensor| names.contains(tensor.name.as_str())).count();
    same > 0 && same * 2 > file.tensors.len()
}

fn note(taken: &[(PathBuf, u64)]) -> Option<String> {
    const SHOWN: usize = 4;
    if taken.is_empty() {
        return None;
    }
    let mut names: Vec<String> = taken.iter().take(SHOWN).map(|(name, _)| name.display().to_string()).collect();
    if taken.len() > SHOWN {
        names.push(format!("{} more", taken.len() - SHOWN));
    }
    Some(format!("weights of other models in subfolders are copied as they are: {}", names.join(", ")))
}
