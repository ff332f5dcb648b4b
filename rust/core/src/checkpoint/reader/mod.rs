//! A checkpoint folder: its weight files, found and checked, and the small files around them.

pub mod header;
mod surroundings;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use serde::de::Deserializer;

use self::header::{SourceFile, TensorEntry, UniqueStrings};
use self::surroundings::Surroundings;
use super::file;
use super::file_names::{CONFIG_FILE, INDEX_FILE, SINGLE_FILE};
use super::selection::{Code, TensorFacts};
use crate::error::{Error, Result};

/// The entry of `__metadata__` that names the weights which were transposed, where the architecture does not tell.
pub const CONV1D_KEY: &str = "halfbyte.conv1d";
/// What is said of an adapter.
pub const ADAPTER: &str = "holds an adapter (LoRA or its kin), not a model: expected a model's weights; quantize the \
                           base model and load the adapter on it, or merge the two first (PEFT's merge_and_unload)";
/// The configuration of an adapter.
const ADAPTER_CONFIG: &str = "adapter_config.json";

/// The largest index file that is read: 1.5 million tensors at 200 bytes each.
const MAX_INDEX_LEN: u64 = 300_000_000;
/// Bytes of all weight files together, at most: so large that only files with holes get there, so small that no sum
/// of lengths (eight times as long when 4-bit weights become float32) overflows.
const MAX_TOTAL_LEN: u64 = 1 << 59;

/// A checkpoint: open weight files and the table of their tensors.
#[derive(Debug)]
pub struct Checkpoint {
    /// The folder, or the folder of the single file that was named; absolute, without links.
    pub folder: PathBuf,
    /// The weight files, in the order of the index.
    pub files: Vec<SourceFile>,
    /// Every tensor as (file, position in that file), in the order of files and data.
    pub order: Vec<TensorRef>,
    /// Small files to copy: path relative to the folder, and length.
    pub small_files: Vec<(PathBuf, u64)>,
    /// What is not copied, weights in another form above all: relative path and why.
    pub left_out: Vec<(PathBuf, String)>,
    /// Remarks for the reader of a plan.
    pub notes: Vec<String>,
    /// Whether it is a folder: a file that was named by itself may be one of several.
    pub whole: bool,
    by_name: HashMap<String, usize>,
}

/// Where a tensor stands: index into [`Checkpoint::files`] and into that file's tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TensorRef {
    /// Index into [`Checkpoint::files`].
    pub file: usize,
    /// Index into [`SourceFile::tensors`].
    pub tensor: usize,
}

/// `model.safetensors.index.json`.
#[derive(Debug)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// An index with its place, and the shards that it names in the order in which they are opened.
struct Listed {
    path: PathBuf,
    index: Index,
    shards: Vec<String>,
}

impl<'de> Deserialize<'de> for Index {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Raw {
            #[serde(deserialize_with = "unique_strings")]
            weight_map: BTreeMap<String, String>,
        }
        fn unique_strings<'de, D: Deserializer<'de>>(d: D) -> std::result::Result<BTreeMap<String, String>, D::Error> {
            d.deserialize_map(UniqueStrings)
        }
        Raw::deserialize(deserializer).map(|r| Self { weight_map: r.weight_map })
    }
}

impl Checkpoint {
    /// Opens the checkpoint in `path`: a folder with [`SINGLE_FILE`] or [`INDEX_FILE`], or one `.safetensors` file.
    ///
    /// Reads headers and the index alone.
    pub fn open(path: &Path) -> Result<Self> {
        let facts = fs::metadata(path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => {
                Error::file(path, "does not exist: expected a folder that holds a checkpoint")
            }
            _ => Error::io(path, "open")(e),
        })?;
        let resolved = file::resolve(path)?;
        if facts.is_file() {
            let folder = resolved.parent().unwrap_or(Path::new("/")).to_path_buf();
            // The name as given: in a cache of linked blobs the resolved name says nothing.
            let found = Self::collect(folder, vec![SourceFile::open(path)?], None, Vec::new(), Vec::new())?;
            return Ok(Self { whole: false, ..found });
        }
        if !facts.is_dir() {
            return Err(Error::file(path, "is neither a folder nor a file"));
        }
        let mut around = Surroundings::find(&resolved)?;
        let single = path.join(SINGLE_FILE);
        let index_path = path.join(INDEX_FILE);
        let (files, index) = if exists(&single)? {
            (vec![SourceFile::open(&single)?], None)
        } else if exists(&index_path)? {
            let index = read_index(&index_path)?;
            let shards: BTreeSet<String> = index.weight_map.values().cloned().collect();
            let shards = Vec::from_iter(shards);
            let mut files = Vec::with_capacity(shards.len());
            for name in &shards {
                let path = path.join(name);
                if !exists(&path)? {
                    let first = index.weight_map.iter().find(|(_, f)| *f == name).map_or("", |(t, _)| t);
                    return Err(Error::file(
                        &index_path,
                        format!(
                            "names the shard {name:?} (for the tensor {first:?}), which does not exist; save, or download, it again"
                        ),
                    ));
                }
                files.push(SourceFile::open(&path)?);
            }
            (files, Some(Listed { path: index_path, index, shards }))
        } else {
            return Err(nothing_here(path, &around));
        };
        let read: BTreeSet<PathBuf> =
            files.iter().filter_map(|f| f.path.strip_prefix(path).ok().map(Path::to_path_buf)).collect();
        let names: HashSet<&str> = files.iter().flat_map(|f| &f.tensors).map(|t| t.name.as_str()).collect();
        let note = around.judge(&resolved, &read, &names);
        let mut found = Self::collect(resolved, files, index, around.copied, around.left_out)?;
        found.notes.extend(note);
        Ok(found)
    }

    fn collect(
        folder: PathBuf,
        files: Vec<SourceFile>,
        index: Option<Listed>,
        small_files: Vec<(PathBuf, u64)>,
        left_out: Vec<(PathBuf, String)>,
    ) -> Result<Self> {
        let total = files.iter().fold(0u64, |n, f| n.saturating_add(f.len));
        if total > MAX_TOTAL_LEN {
            return Err(Error::file(
                &folder,
                format!("has weight files of {total} bytes together: expected at most {MAX_TOTAL_LEN}"),
            ));
        }
        let mut order = Vec::new();
        let mut by_name: HashMap<String, usize> = HashMap::new();
        let mut unlisted = 0usize;
        for (f, source) in files.iter().enumerate() {
            for (t, tensor) in source.tensors.iter().enumerate() {
                if let Some(listed) = &index {
                    match listed.index.weight_map.get(&tensor.name) {
                        Some(shard) if *shard != listed.shards[f] => continue,
                        Some(_) => {}
                        None => unlisted += 1,
                    }
                }
                if let Some(&other) = by_name.get(&tensor.name) {
                    let first: TensorRef = order[other];
                    return Err(Error::tensor(
                        &source.path,
                        &tensor.name,
                        format!(
                            "is in {} too, and nothing says which is meant; save, or download, the checkpoint again",
                            files[first.file].path.display()
                        ),
                    ));
                }
                by_name.insert(tensor.name.clone(), order.len());
                order.push(TensorRef { file: f, tensor: t });
            }
        }
        let mut notes = Vec::new();
        if let Some(Listed { path, index, .. }) = &index {
            if let Some((tensor, shard)) = index.weight_map.iter().find(|(t, _)| !by_name.contains_key(*t)) {
                return Err(Error::tensor(
                    path,
                    tensor,
                    format!(
                        "should be in the shard {shard:?}, which does not hold it; save, or download, that file again"
                    ),
                ));
            }
            if unlisted > 0 {
                notes.push(format!(
                    "{unlisted} tensors stand in the shards and not in {INDEX_FILE}; they are taken along"
                ));
            }
        }
        if order.is_empty() {
            let path = files.first().map_or(folder.as_path(), |f| f.path.as_path());
            return Err(Error::file(path, "holds no tensor"));
        }
        Ok(Self { folder, files, order, small_files, left_out, notes, whole: true, by_name })
    }

    /// What a run must never write to: the folder, and the places outside it that files of the checkpoint are links to.
    pub fn places(&self) -> Vec<PathBuf> {
        let names = self.small_files.iter().map(|f| self.folder.join(&f.0));
        let others = [CONFIG_FILE, INDEX_FILE].iter().map(|n| self.folder.join(n));
        let weights = self.files.iter().map(|f| f.path.clone());
        let mut places = BTreeSet::new();
        for path in names.chain(others).chain(weights) {
            places.extend(path.canonicalize());
            // The folder of a single file as it was named, which may be a link to elsewhere.
            places.extend(path.parent().and_then(|folder| file::resolve(folder).ok()));
        }
        places.retain(|place| !place.starts_with(&self.folder));
        [self.folder.clone()].into_iter().chain(places).collect()
    }

    /// The tensor at `at`.
    pub fn tensor(&self, at: TensorRef) -> &TensorEntry {
        &self.files[at.file].tensors[at.tensor]
    }

    /// What the header says of the tensor at `at`.
    pub fn facts(&self, at: TensorRef) -> TensorFacts<'_> {
        let tensor = self.tensor(at);
        TensorFacts { name: &tensor.name, shape: &tensor.shape, dtype: tensor.dtype }
    }

    /// The 4-bit weights that were transposed when they were quantized, where the checkpoint says it itself.
    pub fn conv1d_names(&self) -> Option<HashSet<String>> {
        let texts = self.files.iter().filter_map(|file| file.metadata.get(CONV1D_KEY));
        let mut names: Option<HashSet<String>> = None;
        for listed in texts.filter_map(|text| serde_json::from_str::<Vec<String>>(text).ok()) {
            names.get_or_insert_default().extend(listed);
        }
        names
    }

    /// What the Python files in the folder show. One that cannot be read, or is larger than 4 MiB, shows nothing.
    pub fn code(&self) -> Code {
        const LARGEST: u64 = 4 << 20;
        let is_code = |path: &Path, len: u64| len <= LARGEST && path.extension().is_some_and(|end| end == "py");
        let files = self.small_files.iter().filter(|(path, len)| is_code(path, *len));
        Code::of(files.filter_map(|(path, _)| std::fs::read_to_string(self.folder.join(path)).ok()))
    }

    /// The file that holds `at`.
    pub fn file(&self, at: TensorRef) -> &SourceFile {
        &self.files[at.file]
    }

    /// Where the tensor `name` stands.
    pub fn find(&self, name: &str) -> Option<TensorRef> {
        self.by_name.get(name).map(|&i| self.order[i])
    }

    /// Reads a whole tensor.
    pub fn read(&self, at: TensorRef) -> Result<Vec<u8>> {
        let (source, entry) = (self.file(at), self.tensor(at));
        let mut bytes = vec![0; entry.len as usize];
        file::read_exact_at(&source.file, &source.path, &mut bytes, entry.offset)?;
        Ok(bytes)
    }

    /// The `__metadata__` of all files; where they disagree the first file wins.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        let mut all = BTreeMap::new();
        for file in self.files.iter().rev() {
            all.extend(file.metadata.clone());
        }
        all
    }
}

fn exists(path: &Path) -> Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => Ok(false),
        Err(e) => Err(Error::io(path, "open")(e)),
    }
}

fn read_index(path: &Path) -> Result<Index> {
    let (file, facts) = file::open_regular(path)?;
    if facts.len() > MAX_INDEX_LEN {
        return Err(Error::file(path, format!("is {} bytes long: expected at most {MAX_INDEX_LEN}", facts.len())));
    }
    let mut text = Vec::new();
    file.take(MAX_INDEX_LEN).read_to_end(&mut text).map_err(Error::io(path, "read"))?;
    parse_index(path, &text)
}

fn parse_index(path: &Path, text: &[u8]) -> Result<Index> {
    let index: Index = serde_json::from_slice(text).map_err(|e| {
        Error::file(path, format!("is no valid index (an object with \"weight_map\": tensor name → file name): {e}"))
    })?;
    if index.weight_map.is_empty() {
        return Err(Error::file(path, "has an empty \"weight_map\""));
    }
    for (tensor, shard) in &index.weight_map {
        let inside = !shard.is_empty() && Path::new(shard).components().all(|c| matches!(c, Component::Normal(_)));
        if !inside || shard.contains(['\\', '\0']) || !shard.ends_with(".safetensors") {
            return Err(Error::tensor(
                path,
                tensor,
                format!("is said to be in {shard:?}: expected the name of a .safetensors file inside the folder"),
            ));
        }
    }
    Ok(index)
}

/// Checks the text of an index and gives the number of tensors and files that it names. For fuzzing.
pub fn check_index(path: &Path, text: &[u8]) -> Result<(usize, usize)> {
    let index = parse_index(path, text)?;
    let files: BTreeSet<&String> = index.weight_map.values().collect();
    Ok((index.weight_map.len(), files.len()))
}

fn nothing_here(path: &Path, around: &Surroundings) -> Error {
    if exists(&path.join(ADAPTER_CONFIG)).unwrap_or(false) {
        return Error::file(path, ADAPTER);
    }
    let ends = |p: &Path, endings: &[&str]| p.extension().is_some_and(|e| endings.iter().any(|ending| e == *ending));
    let pickles = around.other_weights().any(|p| ends(p, &["bin", "pt", "pth"]));
    let others: Vec<String> =
        around.other_weights().filter(|p| ends(p, &["safetensors"])).map(|p| p.display().to_string()).take(4).collect();
    let hint = if !others.is_empty() {
        format!("; there is {}, which can be named itself", others.join(", "))
    } else if pickles {
        "; the pickled weights (.bin, .pt) that it has can run code when read and are not supported: \
         save the model once with save_pretrained, which writes safetensors"
            .to_owned()
    } else {
        String::new()
    };
    Error::file(path, format!("holds no checkpoint: expected {SINGLE_FILE} or {INDEX_FILE}{hint}"))
}
