//! Reading the header of one safetensors file, with every way a hostile file can lie checked and named.
//!
//! The rules are those of the safetensors format: 8 bytes of little-endian header length, a JSON object of
//! name → {dtype, shape, data_offsets} with an optional `__metadata__` of strings, then the data, covered by the
//! tensors without gap or overlap. `safetensors` itself has the last word; the checks before it exist to name the
//! tensor and to refuse duplicate names, which a JSON map silently drops.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Deserialize;
use serde::de::{self, Deserializer, IgnoredAny, MapAccess, Visitor};

use crate::checkpoint::file;
use crate::error::{Error, Result};
use crate::geometry::element_count;

/// The largest header that safetensors accepts.
pub const MAX_HEADER_LEN: u64 = 100_000_000;

/// How the text file begins that Git LFS leaves where a file was not fetched.
const GIT_LFS: &[u8; 8] = b"version ";

/// Most dimensions a tensor may have: far above any real one, low enough that a shape can be printed.
const MAX_DIMENSIONS: usize = 64;

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// The tensor's name.
    pub name: String,
    /// The element type.
    pub dtype: Dtype,
    /// The shape; empty for a scalar.
    pub shape: Vec<usize>,
    /// First byte, counted from the start of the file.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

impl TensorEntry {
    /// The number of elements; the header check proved that it fits.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// An open safetensors file whose header has been checked.
#[derive(Debug)]
pub struct SourceFile {
    /// Where it is.
    pub path: PathBuf,
    /// The open file.
    pub file: File,
    /// Its length in bytes.
    pub len: u64,
    /// Its last modification, nanoseconds since the epoch.
    pub modified_ns: u64,
    /// Its tensors in the order of their data.
    pub tensors: Vec<TensorEntry>,
    /// Its `__metadata__`.
    pub metadata: BTreeMap<String, String>,
}

impl SourceFile {
    /// Opens a file and checks its header. No tensor data is read.
    pub fn open(path: &Path) -> Result<Self> {
        let (file, facts) = file::open_regular(path)?;
        let len = facts.len();
        if len < 8 {
            return Err(Error::file(
                path,
                format!("is {len} bytes long: a safetensors file starts with 8 bytes of header length"),
            ));
        }
        let mut prefix = [0; 8];
        file::read_exact_at(&file, path, &mut prefix, 0)?;
        if &prefix == GIT_LFS {
            return Err(Error::file(path, "is a Git LFS pointer and not the weights: fetch them with `git lfs pull`"));
        }
        let header_len = u64::from_le_bytes(prefix);
        if header_len > MAX_HEADER_LEN {
            return Err(Error::file(
                path,
                format!(
                    "says its header is {header_len} bytes long: expected at most {MAX_HEADER_LEN}; this is no safetensors file, or it is damaged"
                ),
            ));
        }
        if header_len > len - 8 {
            return Err(Error::file(
                path,
                format!(
                    "is cut short: its header should be {header_len} bytes long and only {} follow; save, or download, it again",
                    len - 8
                ),
            ));
        }
        let mut text = vec![0; header_len as usize];
        file::read_exact_at(&file, path, &mut text, 8)?;
        let (tensors, metadata) = parse(path, &text, len - 8 - header_len)?;
        let data_start = 8 + header_len;
        let tensors = tensors
            .into_iter()
            .map(|(name, info)| TensorEntry {
                name,
                dtype: info.dtype,
                offset: data_start + info.data_offsets.0 as u64,
                len: (info.data_offsets.1 - info.data_offsets.0) as u64,
                shape: info.shape,
            })
            .collect();
        Ok(Self { path: path.to_path_buf(), file, len, modified_ns: file::modified_ns(&facts), tensors, metadata })
    }

    /// Fails when the file is no longer the one whose header was read.
    pub fn check_unchanged(&self) -> Result<()> {
        let facts = self.file.metadata().map_err(Error::io(&self.path, "read"))?;
        if facts.len() != self.len || file::modified_ns(&facts) != self.modified_ns {
            return Err(Error::file(&self.path, "was changed while it was being read"));
        }
        Ok(())
    }
}

type Tensors = Vec<(String, TensorInfo)>;

/// Parses and checks the JSON header of a file with `data_len` bytes of data.
pub fn parse(path: &Path, text: &[u8], data_len: u64) -> Result<(Tensors, BTreeMap<String, String>)> {
    let text = std::str::from_utf8(text)
        .map_err(|e| Error::file(path, format!("has a header that is not UTF-8 (byte {})", e.valid_up_to())))?;
    if !text.starts_with('{') {
        return Err(Error::file(
            path,
            "has a header that does not start with '{': this is no safetensors file, or it is damaged",
        ));
    }
    let raw: RawHeader = serde_json::from_str(text)
        .map_err(|e| Error::file(path, format!("has a header that is no valid safetensors header: {e}")))?;
    let mut tensors = Vec::with_capacity(raw.tensors.len());
    for (name, value) in raw.tensors {
        let info = value.check(path, &name, data_len)?;
        tensors.push((name, info));
    }
    tensors.sort_by(|a, b| (a.1.data_offsets, &a.0).cmp(&(b.1.data_offsets, &b.0)));
    let mut end = 0;
    for (name, info) in &tensors {
        let (from, to) = info.data_offsets;
        if from < end {
            return Err(Error::tensor(
                path,
                name,
                format!("data_offsets [{from}, {to}] overlap the tensor before it, which ends at {end}"),
            ));
        }
        if from > end {
            return Err(Error::tensor(
                path,
                name,
                format!("data_offsets [{from}, {to}] leave a hole: the tensor before it ends at {end}"),
            ));
        }
        end = to;
    }
    if end as u64 != data_len {
        let (less, why) = if (end as u64) < data_len {
            ("more", "the file has bytes that no tensor owns")
        } else {
            ("fewer", "the file is cut short; save, or download, it again")
        };
        return Err(Error::file(
            path,
            format!("has {data_len} bytes of data, {less} than the {end} of its header: {why}"),
        ));
    }
    // The library's own validation has the last word.
    Metadata::new(None::<HashMap<String, String>>, tensors.clone())
        .map_err(|e| Error::file(path, format!("has a header that safetensors refuses: {e}")))?;
    Ok((tensors, raw.metadata))
}

/// The header as written, before any check.
struct RawHeader {
    tensors: Vec<(String, RawTensor)>,
    metadata: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl RawTensor {
    fn check(self, path: &Path, name: &str, data_len: u64) -> Result<TensorInfo> {
        let fail = |problem: String| Error::tensor(path, name, problem);
        let dtype: Dtype = serde_json::from_value(serde_json::Value::String(self.dtype.clone()))
            .map_err(|_| fail(format!("has the unknown dtype {:?}: expected one of {DTYPE_NAMES}", self.dtype)))?;
        if self.shape.len() > MAX_DIMENSIONS {
            return Err(fail(format!("has {} dimensions: expected at most {MAX_DIMENSIONS}", self.shape.len())));
        }
        let shape: Option<Vec<usize>> = self.shape.iter().map(|&d| usize::try_from(d).ok()).collect();
        let bits = shape.as_deref().and_then(element_count).and_then(|n| n.checked_mul(dtype.bitsize()));
        let (Some(shape), Some(bits)) = (shape, bits) else {
            return Err(fail(format!("has a shape {:?} whose size overflows", self.shape)));
        };
        if bits % 8 != 0 {
            return Err(fail(format!("has the shape {shape:?} of {dtype}, which is no whole number of bytes")));
        }
        let (from, to) = self.data_offsets;
        if from > to {
            return Err(fail(format!("has reversed data_offsets [{from}, {to}]")));
        }
        if to > data_len {
            return Err(fail(format!(
                "has data_offsets [{from}, {to}] beyond the file's {data_len} bytes of data: the file is cut short or damaged"
            )));
        }
        if to - from != bits as u64 / 8 {
            return Err(fail(format!(
                "has {} bytes of data where {dtype} of shape {shape:?} takes {}",
                to - from,
                bits / 8
            )));
        }
        Ok(TensorInfo { dtype, shape, data_offsets: (from as usize, to as usize) })
    }
}

const DTYPE_NAMES: &str = "BOOL, U8, I8, I16, U16, F16, BF16, I32, U32, F32, I64, U64, F64, C64, F8_E4M3, F8_E5M2, F8_E8M0, F6_E2M3, F6_E3M2, F4";

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<RawHeader, A::Error> {
        let mut tensors = Vec::new();
        let mut names = HashSet::new();
        let mut metadata = None;
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                let strings = map.next_value::<Option<Strings>>()?.map_or_else(BTreeMap::new, |s| s.0);
                if metadata.replace(strings).is_some() {
                    return Err(de::Error::custom("two entries named \"__metadata__\""));
                }
                continue;
            }
            if !names.insert(name.clone()) {
                map.next_value::<IgnoredAny>()?;
                return Err(de::Error::custom(format_args!("two tensors named {name:?}")));
            }
            let tensor = map.next_value().map_err(|e| de::Error::custom(format_args!("tensor {name:?}: {e}")))?;
            tensors.push((name, tensor));
        }
        Ok(RawHeader { tensors, metadata: metadata.unwrap_or_default() })
    }
}

/// A JSON object of strings in which no key stands twice.
struct Strings(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Strings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(UniqueStrings).map(Strings)
    }
}

/// Visits an object of strings and refuses duplicate keys.
pub struct UniqueStrings;

impl<'de> Visitor<'de> for UniqueStrings {
    type Value = BTreeMap<String, String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of strings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
        let mut out = BTreeMap::new();
        while let Some((key, value)) = map.next_entry::<String, String>()? {
            if let Some(_twice) = out.get(&key) {
                return Err(de::Error::custom(format_args!("two entries named {key:?}")));
            }
            out.insert(key, value);
        }
        Ok(out)
    }
}
