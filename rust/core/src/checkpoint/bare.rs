//! Packed experts of bitsandbytes' `Experts4bit`: 4-bit weights that have codes and scales, and no text of a state.
//!
//! | key | dtype, shape |
//! |---|---|
//! | `experts.gate_up_proj`, `experts.down_proj` | uint8 `[experts, bytes]` |
//! | `experts.gate_up_absmax`, `experts.down_absmax` | float32 `[experts, blocks]` |
//!
//! What codes mean and how long a row is, config.json says: `bnb_4bit_quant_type` and `hidden_size`. The dtype of the
//! weights is that of the other tensors.

use std::collections::HashSet;

use safetensors::Dtype;
use serde_json::Value;

use super::dtype::is_float;
use super::reader::{Checkpoint, TensorRef};
use super::state::State;
use crate::codebook::QuantType;
use crate::error::{Error, Result};
use crate::geometry::{BLOCK_SIZES, BlockSize};

/// Packed experts of a layer.
pub struct Bare {
    /// Name of the tensor with the codes.
    pub name: String,
    /// What the text of a state would say.
    pub state: State,
    /// Codes.
    pub packed: TensorRef,
    /// Scales.
    pub absmax: TensorRef,
}

const PAIRS: [(&str, &str); 2] = [(".gate_up_proj", ".gate_up_absmax"), (".down_proj", ".down_absmax")];

/// The packed experts of a checkpoint in this form, each checked; none where `config` does not say what codes mean.
///
/// `owned` are the tensors that belong to other quantized weights.
pub fn find_bare(source: &Checkpoint, config: Option<&Value>, owned: &HashSet<TensorRef>) -> Result<Vec<Bare>> {
    let Some(quant_type) = quant_type(config) else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for &at in &source.order {
        if let Some(absmax) = scales_of(source, at) {
            found.push(read(source, config, owned, quant_type, at, absmax)?);
        }
    }
    Ok(found)
}

/// An error when a tensor that belongs to no quantized weight holds the codes of such experts.
pub fn refuse_codes_alone(source: &Checkpoint, at: TensorRef) -> Result<()> {
    if scales_of(source, at).is_none() {
        return Ok(());
    }
    let problem = "holds 4-bit codes of experts: expected a quantization_config in config.json with \
                   bnb_4bit_quant_type nf4 or fp4, which says what they mean";
    Err(Error::tensor(&source.file(at).path, &source.tensor(at).name, problem))
}

/// The scales of a tensor that holds codes of all experts of a layer.
fn scales_of(source: &Checkpoint, at: TensorRef) -> Option<TensorRef> {
    let entry = source.tensor(at);
    let (path, end) = PAIRS.iter().find_map(|(codes, scales)| Some((entry.name.strip_suffix(codes)?, scales)))?;
    source.find(&format!("{path}{end}")).filter(|_| entry.dtype == Dtype::U8)
}

fn quant_type(config: Option<&Value>) -> Option<QuantType> {
    let quantization = config?.get("quantization_config")?;
    quantization.get("bnb_4bit_quant_type")?.as_str()?.parse().ok()
}

fn hidden_size(config: Option<&Value>) -> Option<usize> {
    let config = config?;
    let said = config.get("hidden_size").or_else(|| config.get("text_config")?.get("hidden_size"))?;
    said.as_u64().and_then(|size| usize::try_from(size).ok()).filter(|&size| size > 0)
}

fn read(
    source: &Checkpoint,
    config: Option<&Value>,
    owned: &HashSet<TensorRef>,
    quant_type: QuantType,
    at: TensorRef,
    absmax: TensorRef,
) -> Result<Bare> {
    let fail = |at: TensorRef, problem: String| Error::tensor(&source.file(at).path, &source.tensor(at).name, problem);
    let (codes, scales) = (source.tensor(at), source.tensor(absmax));
    let &[experts, bytes] = &codes.shape[..] else {
        return Err(fail(
            at,
            format!("is U8 of shape {:?}: expected [experts, bytes], since its scales are beside it", codes.shape),
        ));
    };
    // Twice the bytes of a row of a file that is there.
    let values = bytes * 2;
    let blocksize = match scales.shape[..] {
        [count, blocks] if scales.dtype == Dtype::F32 && count == experts && blocks > 0 && values % blocks == 0 => {
            BlockSize::new(values / blocks).ok()
        }
        _ => None,
    };
    let Some(blocksize) = blocksize else {
        return Err(fail(
            absmax,
            format!(
                "is {} of shape {:?}: expected F32 of shape [{experts}, blocks] with {values} values in blocks of one \
                 of {BLOCK_SIZES:?}",
                scales.dtype, scales.shape
            ),
        ));
    };
    let hidden = hidden_size(config).filter(|hidden| values % hidden == 0);
    let Some(hidden) = hidden else {
        return Err(fail(
            at,
            format!("holds {values} values of each expert: expected a hidden_size in config.json that divides them"),
        ));
    };
    let shape = if codes.name.ends_with(PAIRS[1].0) {
        vec![experts, hidden, values / hidden]
    } else {
        vec![experts, values / hidden, hidden]
    };
    let beside = |other: &&TensorRef| {
        let entry = source.tensor(**other);
        is_float(entry.dtype) && !owned.contains(*other) && !entry.name.ends_with("_absmax")
    };
    let dtype = source.order.iter().find(beside).map_or(Dtype::F32, |&other| source.tensor(other).dtype);
    let state = State { quant_type, blocksize, dtype, shape, nested_offset: None };
    Ok(Bare { name: codes.name.clone(), state, packed: at, absmax })
}
