//! The options of a conversion. Each struct has the fields of the Python dataclass of the same name
//! (`halfbyte/offline/options.py`), with their names: that is how options cross from one language to the other.

use std::borrow::Cow;
use std::collections::BTreeSet;

use safetensors::Dtype;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::dtype::{storage_dtype, torch_name, weight_dtype};
use super::selection::rules::Rule;
use super::weight_type::WeightType;
use crate::error::Error;
use crate::geometry::BlockSize;

/// Largest output file when none is asked for: that of the hub's own tools.
pub const DEFAULT_SHARD_SIZE: u64 = 5_000_000_000;

/// transformers' `llm_int8_threshold` when none is asked for.
pub const DEFAULT_THRESHOLD: f64 = 6.0;

/// How to quantize a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuantizeOptions {
    /// What weights that no rule names become.
    pub quant_type: WeightType,
    /// Whether the scales of 4-bit weights are quantized too.
    pub double_quant: bool,
    /// Values per scale of 4-bit weights.
    pub blocksize: BlockSize,
    /// The dtype that packed 4-bit codes are stored as.
    #[serde(serialize_with = "dtype_name", deserialize_with = "storage_by_name")]
    pub storage: Dtype,
    /// The dtype that loaders multiply in, as torch calls it; none for that of the model. Only config.json has it.
    pub compute_dtype: Option<String>,
    /// Inputs of 8-bit layers of at least this size are multiplied in 16 bits; 0 for none. Only config.json has it.
    #[serde(deserialize_with = "threshold")]
    pub threshold: f64,
    /// The dtype that weights are cast to before they are quantized or kept; none for that of config.json.
    #[serde(serialize_with = "float_name", deserialize_with = "float_by_name")]
    pub dtype: Option<Dtype>,
    /// Largest output file in bytes; one weight alone may exceed it.
    pub max_shard_size: u64,
    /// Exceptions; the first that matches a tensor decides.
    pub rules: Vec<Rule>,
    /// Names of modules to keep besides the defaults, matched as transformers matches `llm_int8_skip_modules`.
    pub skip: Vec<String>,
    /// Who decides which weights are linear layers.
    pub selection: Selector,
    /// Whether code that comes with the checkpoint may be run to decide that.
    pub trust_remote_code: bool,
    /// Whether weights may hold NaN or infinities.
    pub allow_nonfinite: bool,
}

impl Default for QuantizeOptions {
    /// NF4 in blocks of 64 with double quantization, and no exceptions.
    fn default() -> Self {
        Self {
            quant_type: WeightType::default(),
            double_quant: true,
            blocksize: BlockSize::DEFAULT,
            storage: Dtype::U8,
            compute_dtype: None,
            threshold: DEFAULT_THRESHOLD,
            dtype: None,
            max_shard_size: DEFAULT_SHARD_SIZE,
            rules: Vec::new(),
            skip: Vec::new(),
            selection: Selector::Rules,
            trust_remote_code: false,
            allow_nonfinite: false,
        }
    }
}

/// Who decides which weights are linear layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Selector {
    /// [`select`](super::selection::select), from config.json, names and shapes.
    Rules,
    /// The installed transformers, whose answer is a [`Selected`].
    Transformers,
}

/// Weights that [`Selector::Transformers`] has chosen. Rules and skip names still apply.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Selected {
    /// The names of the tensors to quantize.
    pub tensors: BTreeSet<String>,
    /// Which of them are stored `[in, out]`, where that is known.
    pub conv1d: Option<BTreeSet<String>>,
}

/// How to dequantize a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DequantizeOptions {
    /// The dtype to write; none for the one that each weight had.
    #[serde(serialize_with = "float_name", deserialize_with = "float_by_name")]
    pub dtype: Option<Dtype>,
    /// Largest output file in bytes; one weight alone may exceed it.
    pub max_shard_size: u64,
}

impl Default for DequantizeOptions {
    fn default() -> Self {
        Self { dtype: None, max_shard_size: DEFAULT_SHARD_SIZE }
    }
}

/// A type that is written as its name.
macro_rules! by_name {
    ($($name:ty),*) => {$(
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let name = Cow::<'de, str>::deserialize(deserializer)?;
                name.parse().map_err(|error: Error| D::Error::custom(error))
            }
        }
    )*};
}

by_name!(WeightType, Rule);

impl Serialize for BlockSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.get() as u64)
    }
}

impl<'de> Deserialize<'de> for BlockSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(usize::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

fn threshold<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    let threshold = f64::deserialize(deserializer)?;
    if threshold.is_finite() && threshold >= 0.0 {
        return Ok(threshold);
    }
    Err(D::Error::custom(Error::argument("threshold", threshold, "a finite number of at least 0")))
}

fn dtype_name<S: Serializer>(dtype: &Dtype, serializer: S) -> Result<S::Ok, S::Error> {
    torch_name(*dtype).serialize(serializer)
}

fn storage_by_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Dtype, D::Error> {
    storage_dtype(&Cow::deserialize(deserializer)?).map_err(D::Error::custom)
}

fn float_name<S: Serializer>(dtype: &Option<Dtype>, serializer: S) -> Result<S::Ok, S::Error> {
    dtype.and_then(torch_name).serialize(serializer)
}

fn float_by_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Dtype>, D::Error> {
    let name = Option::<Cow<'de, str>>::deserialize(deserializer)?;
    name.map(|name| weight_dtype("dtype", &name)).transpose().map_err(D::Error::custom)
}

#[cfg(test)]
mod tests {
    use serde_json::{json, to_value};

    use super::*;
    use crate::codebook::QuantType;

    #[test]
    fn options_survive_a_crossing() {
        let options = QuantizeOptions {
            quant_type: WeightType::FourBit(QuantType::Fp4),
            double_quant: false,
            blocksize: BlockSize::new(128).unwrap(),
            storage: Dtype::BF16,
            compute_dtype: Some("float32".to_owned()),
            threshold: 0.5,
            dtype: Some(Dtype::F16),
            max_shard_size: 1,
            rules: vec!["a=b=keep".parse().unwrap()],
            skip: vec!["lm_head".to_owned()],
            selection: Selector::Transformers,
            trust_remote_code: true,
            allow_nonfinite: true,
        };
        let value = to_value(&options).unwrap();
        assert_eq!(value["rules"], json!(["a=b=keep"]));
        assert_eq!((&value["storage"], &value["blocksize"]), (&json!("bfloat16"), &json!(128)));
        let int8 = QuantizeOptions { quant_type: WeightType::Int8, ..QuantizeOptions::default() };
        for options in [options, int8, QuantizeOptions::default()] {
            let back: QuantizeOptions = serde_json::from_value(to_value(&options).unwrap()).unwrap();
            assert_eq!(back, options);
        }
    }

    #[test]
    fn options_name_what_is_wrong_with_them() {
        for (field, bad, message) in [
            ("blocksize", json!(63), "blocksize is 63: expected one of [32, 64"),
            ("quant_type", json!("int4"), r#"quant_type is "int4": expected "nf4", "fp4" or "int8""#),
            ("threshold", json!(-1.0), "threshold is -1: expected a finite number of at least 0"),
            ("threshold", json!("six"), "invalid type"),
            ("storage", json!("int4"), r#"storage is "int4": expected uint8"#),
            ("dtype", json!("float64"), r#"dtype is "float64": expected float32"#),
            ("rules", json!(["mlp"]), r#"rule is "mlp": expected REGEX=nf4"#),
            ("selection", json!("me"), "unknown variant `me`"),
            ("colour", json!("red"), "unknown field `colour`"),
        ] {
            let mut value = to_value(QuantizeOptions::default()).unwrap();
            value[field] = bad;
            let error = serde_json::from_value::<QuantizeOptions>(value).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
        let mut value = to_value(QuantizeOptions::default()).unwrap();
        value.as_object_mut().unwrap().remove("skip");
        let error = serde_json::from_value::<QuantizeOptions>(value).unwrap_err().to_string();
        assert!(error.contains("missing field `skip`"), "{error}");
    }
}
