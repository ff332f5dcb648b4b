//! Sources that cannot be quantized as they are: quantized already, in whatever way, or no model but an adapter.
//!
//! `config.json` may say so, and where it does not (people delete `quantization_config` to get past a loader) the
//! tensors still do: by what stands beside a weight, and by the weight's own dtype.

use std::collections::HashMap;

use safetensors::Dtype;
use serde_json::Value;

use super::dtype::is_float;
use super::file_names::CONFIG_FILE;
use super::fused::FusedExperts;
use super::reader::{ADAPTER, Checkpoint};
use super::rows;
use super::state;
use crate::error::{Error, Result};

const BITSANDBYTES: &str = "bitsandbytes, 4-bit";
const INT8: &str = "LLM.int8(), 8-bit";

/// Ends of the names of what stands beside a quantized weight, and whose they are.
const COMPANIONS: &[(&str, &str)] = &[
    (state::ABSMAX, BITSANDBYTES),
    (state::QUANT_MAP, BITSANDBYTES),
    (state::NESTED_ABSMAX, BITSANDBYTES),
    ("_scale_inv", "FP8 with scales of blocks"),
    ("weight_scale", "FP8, int8 or FP4 with scales"),
    ("weight_scale_2", "FP4 with scales"),
    ("weight_scales", "int8 with scales"),
    ("weight_global_scale", "compressed-tensors"),
    ("weight_packed", "compressed-tensors"),
    ("weight_zero_point", "compressed-tensors"),
    (".qweight", "GPTQ or AWQ"),
    (".qzeros", "GPTQ or AWQ"),
    (".g_idx", "GPTQ"),
    (".dqweight", "FP-Quant"),
    (".W_q", "HQQ"),
    (".Qidxs", "QuIP#"),
    (".weight._data", "quanto"),
    (".weight._scale", "quanto"),
    ("weight_qdata", "torchao"),
    (":qdata", "torchao"),
];

/// Pairs of names in one module: the first, when its tensor holds integers, belongs to a quantized weight.
const PAIRS: &[(&str, &str, &str)] = &[
    ("_blocks", "_scales", "MXFP4"),
    (".codes", ".codebooks", "AQLM"),
    (".indices", ".centroids", "VPTQ"),
    (".weight", ".scales", "MLX or EETQ"),
];

/// An error when the source cannot be quantized.
///
/// Experts in MXFP4 that are taken apart are no obstacle: their values are exact in 16 bits.
pub fn refuse(source: &Checkpoint, config: Option<&Value>, fused: &FusedExperts) -> Result<()> {
    let method = config.and_then(|c| c.get("quantization_config")).filter(|q| !q.is_null());
    let decoded = |method: &&Value| !fused.scales.is_empty() && method["quant_method"] == "mxfp4";
    if let Some(quantization) = method.filter(|method| !decoded(method)) {
        let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unnamed");
        return Err(Error::file(
            source.folder.join(CONFIG_FILE),
            format!(
                "has a quantization_config (method {method:?}): expected a checkpoint that is not quantized yet; `halfbyte dequantize` undoes one of bitsandbytes"
            ),
        ));
    }
    refuse_adapter(source)?;
    for &at in source.order.iter().filter(|at| !fused.scales.contains(at) && !fused.tensors.contains_key(at)) {
        let tensor = source.tensor(at);
        let problem = if let Some(method) = companion(&dtype_in(source), &tensor.name, tensor.dtype) {
            if method == BITSANDBYTES || method == INT8 {
                let bits = if method == INT8 { "8-bit" } else { "4-bit" };
                format!(
                    "belongs to a weight that is {bits} already: expected a checkpoint that is not quantized yet; \
                     `halfbyte dequantize` undoes it"
                )
            } else {
                format!(
                    "belongs to a weight that is quantized already ({method}): expected a checkpoint that is not; \
                     start from the original model"
                )
            }
        } else if tensor.shape.len() >= 2 && is_quantized_weight(&tensor.name, tensor.dtype) {
            format!(
                "is a weight in {}, quantized already or cut to 8 bits: expected F16, BF16 or F32; \
                 start from the original, or write it in 16 bits first",
                tensor.dtype
            )
        } else {
            continue;
        };
        return Err(Error::tensor(&source.file(at).path, &tensor.name, problem));
    }
    Ok(())
}

/// What a source without weights of bitsandbytes is instead, to be added to a message; nothing where it is not quantized
/// at all.
pub fn otherwise(source: &Checkpoint) -> String {
    let found = source.order.iter().map(|&at| source.tensor(at)).find_map(|t| {
        companion(&dtype_in(source), &t.name, t.dtype)
            .map(|method| format!("; {:?} belongs to a weight of {method}", t.name))
    });
    found.map_or_else(String::new, |found| {
        format!("{found}, which dequantize does not undo: start from the original model")
    })
}

/// The tensors that stand beside quantized weights, and whose these are, by names and dtypes alone.
pub fn companions(tensors: &[(String, Dtype)]) -> Vec<(&str, &'static str)> {
    let dtypes: HashMap<&str, Dtype> = tensors.iter().map(|(name, dtype)| (name.as_str(), *dtype)).collect();
    let dtype_of = |name: &str| dtypes.get(name).copied();
    let method = |(name, dtype): &(String, Dtype)| companion(&dtype_of, name, *dtype);
    tensors.iter().filter_map(|tensor| method(tensor).map(|method| (tensor.0.as_str(), method))).collect()
}

fn dtype_in(source: &Checkpoint) -> impl Fn(&str) -> Option<Dtype> {
    |name| source.find(name).map(|at| source.tensor(at).dtype)
}

/// The method whose weight a tensor stands beside. `dtype_of`: the dtype of the tensor of a name.
fn companion(dtype_of: &impl Fn(&str) -> Option<Dtype>, name: &str, dtype: Dtype) -> Option<&'static str> {
    if name.contains(state::STATE_INFIX) {
        return Some(BITSANDBYTES);
    }
    if rows::is_beside_rows(name, dtype_of) {
        return Some(INT8);
    }
    // A dense model may have tensors of its own under such a name: they tell something beside packed codes only.
    let has_codes = |end: &str| name.strip_suffix(end).and_then(dtype_of).is_some_and(is_packed);
    let known =
        COMPANIONS.iter().find(|(end, method)| name.ends_with(end) && (*method != BITSANDBYTES || has_codes(end)));
    known.map(|(_, method)| *method).or_else(|| {
        PAIRS.iter().find_map(|(end, other, method)| {
            let module = name.strip_suffix(end).filter(|_| is_packed(dtype))?;
            dtype_of(&format!("{module}{other}")).map(|_| *method)
        })
    })
}

/// Whether this is the weight of a layer in a dtype that weights have after quantization only. Buffers of integers
/// (tables of positions, masks) are not called `weight`, or have 64 bits.
fn is_quantized_weight(name: &str, dtype: Dtype) -> bool {
    let leaf = name.rsplit('.').next().unwrap_or(name);
    let is_weight = leaf == "weight" || leaf.ends_with("_proj") || leaf.ends_with("_weight");
    is_weight && (is_packed(dtype) || is_eight_bit_float(dtype))
}

fn is_packed(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::I8 | Dtype::U8 | Dtype::I16 | Dtype::U16 | Dtype::I32 | Dtype::U32)
}

fn is_eight_bit_float(dtype: Dtype) -> bool {
    !is_float(dtype) && dtype.bitsize() <= 8 && !is_packed(dtype) && dtype != Dtype::BOOL
}

/// An error when the tensors are those of an adapter: small matrices that mean something beside their model only.
fn refuse_adapter(source: &Checkpoint) -> Result<()> {
    let mut names = source.order.iter().map(|&at| source.tensor(at).name.as_str());
    if !names.all(is_adapter) {
        return Ok(());
    }
    let path = source.files.first().map_or(source.folder.as_path(), |file| file.path.as_path());
    Err(Error::file(path, ADAPTER))
}

/// Whether a tensor's name is one that PEFT, diffusers or kohya's scripts give to a part of an adapter.
fn is_adapter(name: &str) -> bool {
    const STARTS: [&str; 12] = [
        "lora_",
        "lokr_",
        "loha_",
        "hada_",
        "ia3_",
        "oft_",
        "boft_",
        "vera_",
        "dora_",
        "adalora_",
        "randlora_",
        "fourierft_",
    ];
    name.starts_with("base_model.model.")
        || name.ends_with(".alpha")
        || name.split('.').any(|part| STARTS.iter().any(|start| part.starts_with(start)))
        || name.contains(".prompt_encoder.")
        || name == "prompt_embeddings"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn companions_are_known_by_names_and_dtypes() {
        let tensors = [
            ("a.weight", Dtype::BF16),
            ("a.weight_scale_inv", Dtype::F32),
            ("b.qweight", Dtype::I32),
            ("c.codes", Dtype::I16),
            ("c.codebooks", Dtype::F16),
            ("d.codes", Dtype::I16),
            ("e.bias", Dtype::F16),
            ("f.weight", Dtype::I8),
            ("f.SCB", Dtype::F32),
            ("g.weight", Dtype::U8),
            ("g.weight.absmax", Dtype::F32),
            ("h.SCB", Dtype::F32),
            ("h.weight_format", Dtype::U8),
        ];
        let found = companions(&tensors.map(|(name, dtype)| (name.to_owned(), dtype)))
            .into_iter()
            .map(|(name, _)| name.to_owned())
            .collect::<Vec<_>>();
        let expected =
            ["a.weight_scale_inv", "b.qweight", "c.codes", "f.SCB", "g.weight.absmax", "h.SCB", "h.weight_format"];
        assert_eq!(found, expected);
    }

    #[test]
    fn adapters_are_known_by_their_names() {
        for name in [
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
            "unet.down_blocks.0.attn1.to_q.lora_B.weight",
            "lora_unet_down_blocks_0_attn1_to_q.lora_down.weight",
            "lora_unet_down_blocks_0_attn1_to_q.alpha",
            "transformer.h.0.attn.c_attn.lokr_w1",
            "prompt_embeddings",
        ] {
            assert!(is_adapter(name), "{name}");
        }
        for name in ["model.layers.0.self_attn.q_proj.weight", "flora.weight", "model.alpha_proj.weight"] {
            assert!(!is_adapter(name), "{name}");
        }
    }

    #[test]
    fn weights_of_quantized_layers_are_known_by_their_dtype() {
        for (name, dtype, expected) in [
            ("a.q_proj.weight", Dtype::F8_E4M3, true),
            ("a.q_proj.weight", Dtype::F8_E5M2, true),
            ("a.q_proj.weight", Dtype::I8, true),
            ("a.q_proj.weight", Dtype::U8, true),
            ("a.q_proj.weight", Dtype::U32, true),
            ("a.experts.gate_up_proj", Dtype::F8_E4M3, true),
            ("a.experts.gate_up_proj", Dtype::I8, true),
            ("a.q_proj.weight", Dtype::BF16, false),
            ("steps.weight", Dtype::I64, false),
            ("a.position_ids", Dtype::I32, false),
            ("a.mask", Dtype::BOOL, false),
            ("a.relative_position_index", Dtype::U8, false),
        ] {
            assert_eq!(is_quantized_weight(name, dtype), expected, "{name} {dtype}");
        }
    }
}
