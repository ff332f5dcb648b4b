//! Weights of one floating-point type as another.

use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::Value;

use super::convert::with_element;
use super::state::{item_size, weight_dtype};
use crate::blockwise::Element;

/// Whether tensors of this type are weights that can be cast and quantized.
pub fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

/// The dtype that a config.json gives the model: `dtype`, or `torch_dtype` as it was called before.
pub fn config_dtype(config: Option<&Value>) -> Option<Dtype> {
    let config = config?;
    let name = ["dtype", "torch_dtype"].iter().find_map(|key| config.get(key)?.as_str())?;
    weight_dtype("dtype", name.trim_start_matches("torch.")).ok()
}

/// Casts every value of `input` from one type to another, by way of float32 and with one rounding to the nearest, ties
/// to even; what is too large becomes infinite. `output` is as long as the values take.
pub fn cast(from: Dtype, to: Dtype, input: &[u8], output: &mut [u8]) {
    if from == to {
        output.copy_from_slice(input);
        return;
    }
    with_element!(from, F => with_element!(to, T => cast_elements::<F, T>(input, output)));
}

fn cast_elements<F: Element + bytemuck::Pod, T: Element + bytemuck::Pod>(input: &[u8], output: &mut [u8]) {
    debug_assert_eq!(input.len() / size_of::<F>(), output.len() / size_of::<T>());
    for (value, place) in input.chunks_exact(size_of::<F>()).zip(output.chunks_exact_mut(size_of::<T>())) {
        let value = T::from_f32(bytemuck::pod_read_unaligned::<F>(value).to_f32());
        place.copy_from_slice(bytemuck::bytes_of(&value));
    }
}

/// [`cast`] into a list of its own.
pub fn cast_to_vec(from: Dtype, to: Dtype, input: &[u8]) -> Vec<u8> {
    let mut output = vec![0; input.len() / item_size(from) * item_size(to)];
    cast(from, to, input, &mut output);
    output
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_are_rounded_once_to_the_nearest() {
        let values = [1.0f32, -0.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, 70000.0, f32::INFINITY, f32::NAN, 1e-41];
        for to in [Dtype::BF16, Dtype::F16, Dtype::F32] {
            let got = cast_to_vec(Dtype::F32, to, bytemuck::cast_slice(&values));
            let back = cast_to_vec(to, Dtype::F32, &got);
            let back: Vec<f32> = back.chunks_exact(4).map(bytemuck::pod_read_unaligned).collect();
            let expected: Vec<f32> = values
                .iter()
                .map(|&v| match to {
                    Dtype::BF16 => bf16::from_f32(v).to_f32(),
                    Dtype::F16 => f16::from_f32(v).to_f32(),
                    _ => v,
                })
                .collect();
            for (b, e) in back.iter().zip(&expected) {
                assert!(b.to_bits() == e.to_bits() || (b.is_nan() && e.is_nan()), "{to}: {b} {e}");
            }
        }
    }

    #[test]
    fn the_dtype_of_a_config_is_found_under_both_names() {
        for (config, dtype) in [
            (json!({"dtype": "bfloat16"}), Some(Dtype::BF16)),
            (json!({"torch_dtype": "torch.float16"}), Some(Dtype::F16)),
            (json!({"dtype": "float32", "torch_dtype": "float16"}), Some(Dtype::F32)),
            (json!({"dtype": null, "torch_dtype": "float16"}), Some(Dtype::F16)),
            (json!({"dtype": "float64"}), None),
            (json!({"dtype": 16}), None),
            (json!({}), None),
        ] {
            assert_eq!(config_dtype(Some(&config)), dtype, "{config}");
        }
        assert_eq!(config_dtype(None), None);
    }
}
