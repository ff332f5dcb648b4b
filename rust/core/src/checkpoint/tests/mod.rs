//! The checkpoint engine against broken, hostile and unlucky input.

mod bare;
mod fused;
mod fuzz;
mod headers;
mod indices;
mod interruptions;
mod overlap;
mod packing;
mod parts;
mod rows;
mod states;
mod unsuitable;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::execute::{self, RunOptions, RunReport};
use super::job::Progress;
use super::options::{DequantizeOptions, QuantizeOptions};
use super::plan::Plan;
use super::reader::Checkpoint;
use super::stage::Mode;
use crate::error::{Error, Result};

/// A safetensors file of this header and so many bytes of data.
fn file_bytes(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// Some finite bfloat16 values, the same for the same seed.
fn weights(count: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            half::bf16::from_f32((state >> 40) as f32 / (1 << 23) as f32 - 1.0).to_le_bytes()
        })
        .collect()
}

type Named<'a> = (&'a str, &'a str, Vec<usize>, Vec<u8>);

/// Writes tensors one after the other.
fn write_tensors(path: &Path, tensors: &[Named<'_>]) {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, dtype, shape, bytes) in tensors {
        let from = data.len();
        data.extend_from_slice(bytes);
        header.insert((*name).to_owned(), json!({"dtype": dtype, "shape": shape, "data_offsets": [from, data.len()]}));
    }
    fs::write(path, file_bytes(&Value::Object(header).to_string(), &data)).unwrap();
}

/// A checkpoint of three shards with small files around it.
fn write_checkpoint(folder: &Path, seed: u64) {
    fs::create_dir_all(folder.join("sub/deep")).unwrap();
    let mut weight_map = BTreeMap::new();
    for layer in 0..3 {
        let shard = format!("part-{layer}.safetensors");
        let names = [format!("model.layers.{layer}.mlp.up_proj.weight"), format!("model.layers.{layer}.norm.weight")];
        let tensors = [
            (names[0].as_str(), "BF16", vec![16, 64], weights(16 * 64, seed + layer)),
            (names[1].as_str(), "BF16", vec![64], weights(64, seed + layer + 100)),
        ];
        write_tensors(&folder.join(&shard), &tensors);
        weight_map.extend(names.map(|n| (n, shard.clone())));
    }
    fs::write(folder.join("model.safetensors.index.json"), json!({"weight_map": weight_map}).to_string()).unwrap();
    fs::write(folder.join("config.json"), "{}").unwrap();
    fs::write(folder.join("tokenizer.json"), format!("tokens of {seed}")).unwrap();
    fs::write(folder.join("sub/deep/note.txt"), "note").unwrap();
}

fn quantize_options(max_shard_size: u64) -> QuantizeOptions {
    QuantizeOptions { max_shard_size, ..QuantizeOptions::default() }
}

fn dequantize_options(max_shard_size: u64) -> DequantizeOptions {
    DequantizeOptions { max_shard_size, ..DequantizeOptions::default() }
}

fn plan(source: &Path, max_shard_size: u64) -> Result<Plan> {
    Plan::quantize(Checkpoint::open(source)?, None, &quantize_options(max_shard_size), None)
}

/// Quantizes in one thread, without waiting for the disk, to shards of one layer each: the middle one in 8 bits.
fn quantize(source: &Path, destination: &Path, mode: Mode) -> Result<RunReport> {
    let rules = vec![r"layers\.1\.mlp=int8".parse()?];
    let options = QuantizeOptions { rules, ..quantize_options(2200) };
    let plan = Plan::quantize(Checkpoint::open(source)?, None, &options, None)?;
    let options = RunOptions { mode, config_text: Some("{\"new\": 1}".to_owned()), threads: 1, durable: false };
    execute::run(&plan, destination, &options, &Progress::default())
}

/// Every file below `folder` with its bytes.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let Ok(entries) = fs::read_dir(folder) else { return found };
    for entry in entries.map(|e| e.unwrap()) {
        let path = entry.path();
        if path.is_dir() {
            let below = files(&path).into_iter().map(|(name, bytes)| (Path::new(&entry.file_name()).join(name), bytes));
            found.extend(below);
        } else {
            found.insert(entry.file_name().into(), fs::read(&path).unwrap());
        }
    }
    found
}

/// The message of an error, which is one line that names the file.
fn message<T>(outcome: Result<T>, file: &str) -> String {
    let Err(error) = outcome else { panic!("accepted: expected an error about {file}") };
    let text = error.to_string();
    assert!(!text.contains('\n'), "{text:?}");
    assert!(text.contains(file), "{text:?} does not name {file}");
    assert!(!matches!(error, Error::Bug { .. }), "{text}");
    text
}
