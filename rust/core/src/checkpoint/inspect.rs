//! Describing a checkpoint of any origin: what is quantized, how, and how much room it takes.

use std::collections::{BTreeMap, HashSet};

use serde_json::{Value, json};

use super::dtype::torch_name;
use super::reader::{Checkpoint, TensorRef};
use super::weights::find_weights;
use crate::error::Result;

/// A description for programs: files, each 4-bit weight with its state, every other tensor, totals.
pub fn inspect(checkpoint: &Checkpoint) -> Result<Value> {
    let weights = find_weights(checkpoint)?;
    let parts: HashSet<TensorRef> = weights.iter().flat_map(|w| w.parts.iter().copied()).collect();
    let mut rows = Vec::new();
    let mut groups: BTreeMap<String, (u64, u64, u64)> = BTreeMap::new();
    let (mut values, mut bytes) = (0u64, 0u64);
    let mut count = |group: String, elements: u64, len: u64| {
        let entry = groups.entry(group).or_default();
        *entry = (entry.0 + 1, entry.1 + elements, entry.2 + len);
        values += elements;
        bytes += len;
    };
    for weight in &weights {
        let len: u64 = weight.parts.iter().map(|&p| checkpoint.tensor(p).len).sum();
        let state = &weight.state;
        let kind = state.quant_type.as_str();
        count(
            format!("{kind}{}", if weight.nested.is_some() { " double-quantized" } else { "" }),
            state.elements() as u64,
            len,
        );
        rows.push(json!({
            "name": weight.name, "quant_type": kind, "blocksize": state.blocksize.get(),
            "nested": weight.nested.is_some(), "dtype": torch_name(state.dtype), "shape": state.shape,
            "storage": torch_name(checkpoint.tensor(weight.packed).dtype), "bytes": len,
            "bits_per_weight": if state.elements() == 0 { 0.0 } else { len as f64 * 8.0 / state.elements() as f64 },
            "file": file_name(checkpoint, weight.packed),
        }));
    }
    let mut others = Vec::new();
    for &at in &checkpoint.order {
        if parts.contains(&at) {
            continue;
        }
        let t = checkpoint.tensor(at);
        count(t.dtype.to_string(), t.elements() as u64, t.len);
        others.push(json!({
            "name": t.name, "dtype": t.dtype.to_string(), "shape": t.shape, "bytes": t.len, "file": file_name(checkpoint, at),
        }));
    }
    Ok(json!({
        "path": checkpoint.folder.to_string_lossy(),
        "files": checkpoint.files.iter().map(|f| json!({
            "file": f.path.file_name().map(|n| n.to_string_lossy().into_owned()), "bytes": f.len,
            "tensors": f.tensors.len(), "metadata": f.metadata,
        })).collect::<Vec<_>>(),
        "weights": rows,
        "tensors": others,
        "groups": groups.iter().map(|(k, (n, e, b))| json!({"kind": k, "tensors": n, "weights": e, "bytes": b})).collect::<Vec<_>>(),
        "totals": {
            "weights": values, "bytes": bytes, "quantized_tensors": weights.len(),
            "bits_per_weight": if values == 0 { 0.0 } else { bytes as f64 * 8.0 / values as f64 },
        },
        "notes": checkpoint.notes,
    }))
}

fn file_name(checkpoint: &Checkpoint, at: TensorRef) -> Option<String> {
    checkpoint.file(at).path.file_name().map(|n| n.to_string_lossy().into_owned())
}
