//! Dealing tensors out to output files.

use std::collections::{BTreeMap, HashMap};

use super::layout::{Layout, OutputTensor};
use super::types::{Action, Group, Joined, Kind, RowsOutputs, ShardPlan, TensorPlan, WeightOutputs};
use crate::checkpoint::file_names::SINGLE_FILE;
use crate::checkpoint::reader::Checkpoint;
use crate::checkpoint::reader::header::MAX_HEADER_LEN;
use crate::error::{Error, Result};

/// A bound of the bytes that an entry of this name takes in a header, but for its shape: the name, each byte of which
/// JSON may spell in six, and its dtype and offsets.
fn header_room(name: &str) -> u64 {
    let escaped: usize = name
        .bytes()
        .map(|b| {
            if b < 0x20 || b == 0x7f {
                6
            } else if b == b'"' || b == b'\\' {
                2
            } else {
                1
            }
        })
        .sum();
    escaped as u64 + 100
}

/// Fails when two tensors of the output have one name.
fn refuse_duplicates(source: &Checkpoint, groups: &[Group]) -> Result<()> {
    let mut owners: HashMap<&str, &str> = HashMap::new();
    for group in groups {
        for output in &group.outputs {
            if let Some(other) = owners.insert(&output.name, &group.line.name) {
                let weight = if other == output.name { &group.line.name } else { other };
                return Err(Error::tensor(
                    &source.folder,
                    &output.name,
                    format!(
                        "would stand twice in the output: it has the name of a part of the quantized weight {weight:?}"
                    ),
                ));
            }
        }
    }
    Ok(())
}

/// Deals groups out to files of at most `max_shard_size` bytes, in order; a weight and its state stay together.
pub(super) fn pack(
    source: &Checkpoint,
    groups: Vec<Group>,
    max_shard_size: u64,
    mut metadata: BTreeMap<String, String>,
) -> Result<(Vec<ShardPlan>, Vec<TensorPlan>)> {
    refuse_duplicates(source, &groups)?;
    // transformers asks for it and writes it itself.
    metadata.entry("format".to_owned()).or_insert_with(|| "pt".to_owned());
    let metadata_len: u64 = metadata.iter().map(|(k, v)| header_room(k) + header_room(v)).sum();
    let mut bins: Vec<Vec<Group>> = Vec::new();
    let (mut filled, mut header) = (0, 0);
    for group in groups {
        let len = group.line.bytes_out;
        let room: u64 = group.outputs.iter().map(|o| header_room(&o.name) + 24 * o.shape.len() as u64).sum();
        // A quantized weight has up to six entries in a header where the weight itself had one.
        let full = filled > 0 && filled + len > max_shard_size || header + room > MAX_HEADER_LEN;
        if bins.last().is_none_or(|bin| full && !bin.is_empty()) {
            bins.push(Vec::new());
            (filled, header) = (0, metadata_len);
        }
        filled += len;
        header += room;
        if let Some(bin) = bins.last_mut() {
            bin.push(group);
        }
    }
    let count = bins.len();
    let mut shards = Vec::with_capacity(count);
    let mut lines = Vec::new();
    for (number, bin) in bins.into_iter().enumerate() {
        let outputs: Vec<OutputTensor> = bin.iter().flat_map(|g| g.outputs.iter().cloned()).collect();
        let layout = Layout::new(outputs, metadata.clone());
        if layout.header_len > MAX_HEADER_LEN {
            return Err(Error::file(
                &source.folder,
                format!(
                    "has so long names or so much metadata that a header of the output would have {} bytes: \
                     safetensors allows {MAX_HEADER_LEN}",
                    layout.header_len
                ),
            ));
        }
        let place = |o: &OutputTensor| layout.index(o).expect("a layout holds what it was made of");
        let mut actions = Vec::with_capacity(bin.len());
        for mut group in bin {
            let at: Vec<usize> = group.outputs.iter().map(place).collect();
            actions.push(match group.kind {
                Kind::Join(experts) => {
                    let output = at[0];
                    actions.extend(experts.into_iter().map(|Joined { sources, fusion, expert }| Action::Join {
                        sources,
                        fusion,
                        expert,
                        output,
                    }));
                    group.line.shard = number;
                    lines.push(group.line);
                    continue;
                }
                Kind::Copy(source) => Action::Copy { source, output: at[0] },
                Kind::Dequantize { source, transpose } => Action::Dequantize { source, transpose, output: at[0] },
                Kind::DequantizeRows { source, transpose } => {
                    Action::DequantizeRows { source, transpose, output: at[0] }
                }
                Kind::QuantizeRows { source, dtype, shape, transpose } => {
                    let outputs = RowsOutputs { codes: at[0], scales: at[1], format: at[2] };
                    Action::QuantizeRows { source, dtype, shape, transpose, outputs }
                }
                Kind::Quantize { source, state, transpose } => Action::Quantize {
                    source,
                    transpose,
                    outputs: WeightOutputs {
                        packed: at[0],
                        absmax: at[1],
                        quant_map: at[2],
                        state: at[3],
                        nested: state.nested_offset.map(|_| (at[4], at[5])),
                    },
                    state,
                },
            });
            group.line.shard = number;
            lines.push(group.line);
        }
        let name = if count == 1 {
            SINGLE_FILE.to_owned()
        } else {
            format!("model-{:05}-of-{count:05}.safetensors", number + 1)
        };
        shards.push(ShardPlan { name, layout, actions });
    }
    Ok((shards, lines))
}
