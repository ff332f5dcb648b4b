//! The dtypes of a checkpoint's tensors: names, sizes, and which are weights.

use safetensors::Dtype;
use serde_json::Value;

use crate::error::{Error, Result};

/// The name that PyTorch gives a dtype.
pub fn torch_name(dtype: Dtype) -> Option<&'static str> {
    Some(match dtype {
        Dtype::F32 => "float32",
        Dtype::F16 => "float16",
        Dtype::BF16 => "bfloat16",
        Dtype::F64 => "float64",
        Dtype::U8 => "uint8",
        Dtype::I8 => "int8",
        _ => return None,
    })
}

/// The dtype of packed codes that PyTorch calls `name`.
pub fn storage_dtype(name: &str) -> Result<Dtype> {
    Ok(match name {
        "uint8" => Dtype::U8,
        "int8" => Dtype::I8,
        "float16" => Dtype::F16,
        "bfloat16" => Dtype::BF16,
        "float32" => Dtype::F32,
        "float64" => Dtype::F64,
        _ => {
            return Err(Error::argument(
                "storage",
                format!("{name:?}"),
                "uint8, int8, float16, bfloat16, float32 or float64",
            ));
        }
    })
}

/// The dtype of weights that PyTorch calls `name`.
pub fn weight_dtype(argument: &'static str, name: &str) -> Result<Dtype> {
    Ok(match name {
        "float32" => Dtype::F32,
        "float16" => Dtype::F16,
        "bfloat16" => Dtype::BF16,
        _ => return Err(Error::argument(argument, format!("{name:?}"), "float32, float16 or bfloat16")),
    })
}

/// Bytes of one element of a dtype that is made of whole bytes.
pub fn item_size(dtype: Dtype) -> usize {
    dtype.bitsize().div_ceil(8)
}

/// Whether tensors of this type are weights that can be cast and quantized.
pub fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

/// The dtype that a config.json gives the model: `dtype`, or `torch_dtype` as it was called before.
pub fn config_dtype(config: Option<&Value>) -> Option<Dtype> {
    let config = config?;
    let name = ["dtype", "torch_dtype"].iter().find_map(|key| config.get(key)?.as_str())?;
    let name = match name.trim_start_matches("torch.") {
        // torch's other names.
        "half" => "float16",
        "float" => "float32",
        name => name,
    };
    weight_dtype("dtype", name).ok()
}

/// Calls a generic function with the element type of a weight's dtype.
macro_rules! with_element {
    ($dtype:expr, $name:ident => $body:expr) => {
        match $dtype {
            safetensors::Dtype::F32 => {
                type $name = f32;
                $body
            }
            safetensors::Dtype::F16 => {
                type $name = half::f16;
                $body
            }
            safetensors::Dtype::BF16 => {
                type $name = half::bf16;
                $body
            }
            other => unreachable!("a plan holds no weight of {other}"),
        }
    };
}
pub(super) use with_element;

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_dtype_of_a_config_is_found_under_both_names() {
        for (config, dtype) in [
            (json!({"dtype": "bfloat16"}), Some(Dtype::BF16)),
            (json!({"torch_dtype": "torch.float16"}), Some(Dtype::F16)),
            (json!({"dtype": "float32", "torch_dtype": "float16"}), Some(Dtype::F32)),
            (json!({"dtype": null, "torch_dtype": "float16"}), Some(Dtype::F16)),
            (json!({"dtype": "half"}), Some(Dtype::F16)),
            (json!({"torch_dtype": "torch.half"}), Some(Dtype::F16)),
            (json!({"torch_dtype": "float"}), Some(Dtype::F32)),
            (json!({"dtype": "double"}), None),
            (json!({"dtype": "float64"}), None),
            (json!({"dtype": 16}), None),
            (json!({}), None),
        ] {
            assert_eq!(config_dtype(Some(&config)), dtype, "{config}");
        }
        assert_eq!(config_dtype(None), None);
    }
}
