//! The state-dict form of one 4-bit weight: its keys and the JSON beside it.
//!
//! | key | dtype, shape |
//! |---|---|
//! | `W` | packed codes, storage dtype, `[.., 1]` |
//! | `W.absmax` | float32, or uint8 when nested |
//! | `W.quant_map` | float32 `[16]` |
//! | `W.nested_absmax`, `W.nested_quant_map` | float32, when nested |
//! | `W.quant_state.bitsandbytes__nf4` (or `__fp4`) | the bytes of a JSON object |

use std::fmt::Write as _;

use safetensors::Dtype;
use serde::Deserialize;

use super::dtype::{item_size, torch_name, weight_dtype};
use crate::codebook::QuantType;
use crate::geometry::{BlockSize, NESTED_BLOCK_SIZE, element_count, packed_len};

/// What stands between a weight's name and its quantization type in the name of its JSON.
pub const STATE_INFIX: &str = ".quant_state.bitsandbytes__";
/// Suffix of the scales.
pub const ABSMAX: &str = ".absmax";
/// Suffix of the codebook.
pub const QUANT_MAP: &str = ".quant_map";
/// Suffix of the scales' scales.
pub const NESTED_ABSMAX: &str = ".nested_absmax";
/// Suffix of the scales' codebook.
pub const NESTED_QUANT_MAP: &str = ".nested_quant_map";

/// The longest JSON of a state: two shapes' worth of digits would fit many times over.
const MAX_STATE_LEN: usize = 1 << 16;

/// What the JSON of a weight says.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    /// The codebook.
    pub quant_type: QuantType,
    /// Values per scale.
    pub blocksize: BlockSize,
    /// The dtype of the weight before it was quantized: float32, float16 or bfloat16.
    pub dtype: Dtype,
    /// The weight's shape.
    pub shape: Vec<usize>,
    /// Mean of the scales, when they are quantized themselves.
    pub nested_offset: Option<f32>,
}

/// The shape of packed codes of `n` values in storage of `dtype`: a last element that the codes do not fill is
/// padded with zero bytes.
pub fn packed_shape(n: usize, dtype: Dtype) -> [usize; 2] {
    [packed_len(n).div_ceil(item_size(dtype)), 1]
}

impl State {
    /// The number of weights.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The JSON as bitsandbytes writes it: its keys in its order, Python's separators and numbers.
    pub fn to_json(&self) -> String {
        let dtype = torch_name(self.dtype).unwrap_or("float32");
        let dims: Vec<String> = self.shape.iter().map(usize::to_string).collect();
        let mut text = format!(
            r#"{{"quant_type": "{}", "blocksize": {}, "dtype": "{dtype}", "shape": [{}]"#,
            self.quant_type.as_str(),
            self.blocksize.get(),
            dims.join(", ")
        );
        if let Some(offset) = self.nested_offset {
            let _ = write!(
                text,
                r#", "nested_blocksize": {NESTED_BLOCK_SIZE}, "nested_dtype": "float32", "nested_offset": {}"#,
                python_float(f64::from(offset))
            );
        }
        text.push('}');
        text
    }

    /// An upper bound of the length of [`State::to_json`] over all offsets.
    pub fn max_json_len(&self) -> usize {
        // The longest float that Python prints: sign, 17 digits, point, "e-308".
        let spare = if self.nested_offset.is_some() { 24 } else { 0 };
        self.to_json().len() + spare
    }

    /// Reads and checks the JSON of a state. Keys come in any order; unknown ones are ignored. The problem of a bad
    /// one is told without the file and tensor, which the caller knows.
    pub fn parse(bytes: &[u8]) -> std::result::Result<Self, String> {
        #[derive(Deserialize)]
        struct Raw {
            quant_type: String,
            blocksize: u64,
            dtype: String,
            shape: Vec<u64>,
            nested_blocksize: Option<u64>,
            nested_dtype: Option<String>,
            nested_offset: Option<serde_json::Value>,
        }
        if bytes.len() > MAX_STATE_LEN {
            return Err(format!("is {} bytes long: expected at most {MAX_STATE_LEN}", bytes.len()));
        }
        // Python writes an offset that is not finite as a bare NaN or Infinity, which JSON does not have.
        let mut text = String::from_utf8_lossy(bytes).into_owned();
        for word in ["NaN", "Infinity", "-Infinity"] {
            text = text.replace(&format!(": {word}"), &format!(": \"{word}\""));
        }
        let raw: Raw = serde_json::from_str(&text).map_err(|e| format!("is no valid quantization state: {e}"))?;
        let quant_type: QuantType = raw
            .quant_type
            .parse()
            .map_err(|_| format!("has the quant_type {:?}: expected nf4 or fp4", raw.quant_type))?;
        let blocksize = usize::try_from(raw.blocksize).ok().and_then(|b| BlockSize::new(b).ok()).ok_or_else(|| {
            format!("has the blocksize {}: expected one of {:?}", raw.blocksize, crate::geometry::BLOCK_SIZES)
        })?;
        let dtype = weight_dtype("dtype", &raw.dtype)
            .map_err(|_| format!("has the dtype {:?}: expected float32, float16 or bfloat16", raw.dtype))?;
        let shape: Option<Vec<usize>> = raw.shape.iter().map(|&d| usize::try_from(d).ok()).collect();
        let shape = shape
            .filter(|s| s.len() <= 64 && element_count(s).and_then(|n| n.checked_mul(64)).is_some())
            .ok_or_else(|| format!("has a shape {:?} whose size overflows", raw.shape))?;
        let nested_offset = match (raw.nested_blocksize, raw.nested_offset) {
            (None, None) => None,
            (Some(b), Some(offset)) => {
                if b != NESTED_BLOCK_SIZE as u64 {
                    return Err(format!("has the nested_blocksize {b}: expected {NESTED_BLOCK_SIZE}"));
                }
                if raw.nested_dtype.as_deref().is_some_and(|d| d != "float32") {
                    return Err(format!(
                        "has the nested_dtype {:?}: expected float32",
                        raw.nested_dtype.unwrap_or_default()
                    ));
                }
                let number = match &offset {
                    serde_json::Value::String(word) => word.replace("Infinity", "inf").parse().ok(),
                    other => other.as_f64(),
                };
                let Some(number) = number else {
                    return Err(format!("has the nested_offset {offset}: expected a number"));
                };
                Some(number as f32)
            }
            _ => return Err("has one of nested_blocksize and nested_offset: expected both or neither".to_owned()),
        };
        Ok(Self { quant_type, blocksize, dtype, shape, nested_offset })
    }
}

/// A float as Python's `repr` (and so its `json`) writes it: the fewest digits that read back the same, of those the
/// nearest and in a tie the even ones, as a plain number for exponents from -4 to 15.
fn python_float(x: f64) -> String {
    if x.is_nan() {
        return "NaN".to_owned();
    }
    if x.is_infinite() {
        return if x > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let shortest = format!("{x:e}");
    let places = shortest.split_once('e').and_then(|(digits, _)| digits.split_once('.')).map_or(0, |(_, f)| f.len());
    // Rust's shortest form takes the upper one of two that are equally near; so many digits given, it rounds to even.
    let even = format!("{x:.places$e}");
    let scientific = if even.parse() == Ok(x) { even } else { shortest };
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if !(-4..16).contains(&exponent) {
        return format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs());
    }
    let (sign, digits) = digits.strip_prefix('-').map_or(("", digits), |rest| ("-", rest));
    let digits = digits.replace('.', "");
    if exponent < 0 {
        return format!("{sign}0.{}{digits}", "0".repeat((-exponent - 1) as usize));
    }
    let (whole, fraction) = digits.split_at(digits.len().min(exponent as usize + 1));
    let zeros = "0".repeat(exponent as usize + 1 - whole.len());
    format!("{sign}{whole}{zeros}.{}", if fraction.is_empty() { "0" } else { fraction })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_read_as_in_python() {
        // Left as Rust reads them, right as Python 3 prints them.
        for (x, text) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.5e-7, "1.5e-07"),
            (1e16, "1e+16"),
            (123_456_789_012_345.0, "123456789012345.0"),
            (f64::from(0.03125001_f32), "0.031250011175870895"),
            (f64::from(1e-8_f32), "9.99999993922529e-09"),
            (f64::from(0.1_f32), "0.10000000149011612"),
            // Between two shortest forms that are equally near: …03203125 lies in the middle of …0320312 and …0320313.
            (f64::from(0.085_193_634_f32), "0.08519363403320312"),
            (257.5 / 524_288.0, "0.0004911422729492188"),
            (f64::from(-8_388_607.5_f32), "-8388607.5"),
            (1e15, "1000000000000000.0"),
            (1.5e15, "1500000000000000.0"),
            (-2.5e-3, "-0.0025"),
            (f64::from(f32::MAX), "3.4028234663852886e+38"),
            (f64::NEG_INFINITY, "-Infinity"),
        ] {
            assert_eq!(python_float(x), text);
        }
    }

    #[test]
    fn json_is_that_of_bitsandbytes() {
        let state = State {
            quant_type: QuantType::Nf4,
            blocksize: BlockSize::DEFAULT,
            dtype: Dtype::BF16,
            shape: vec![8, 16],
            nested_offset: Some(0.5),
        };
        assert_eq!(
            state.to_json(),
            r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 16], "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}"#
        );
        assert_eq!(State::parse(state.to_json().as_bytes()).unwrap(), state);
    }

    #[test]
    fn bad_states_are_named() {
        for (text, word) in [
            ("[]", "valid"),
            (r#"{"quant_type":"nf5","blocksize":64,"dtype":"float32","shape":[1]}"#, "quant_type"),
            (r#"{"quant_type":"nf4","blocksize":65,"dtype":"float32","shape":[1]}"#, "blocksize"),
            (r#"{"quant_type":"nf4","blocksize":64,"dtype":"float64","shape":[1]}"#, "dtype"),
            (r#"{"quant_type":"nf4","blocksize":64,"dtype":"float32","shape":[-1]}"#, "valid"),
            (r#"{"quant_type":"nf4","blocksize":64,"dtype":"float32","shape":[4294967296,4294967296]}"#, "overflows"),
            (r#"{"quant_type":"nf4","blocksize":64,"dtype":"float32","shape":[1],"nested_offset":1.0}"#, "both"),
            (
                r#"{"quant_type":"nf4","blocksize":64,"dtype":"float32","shape":[1],"nested_offset":1.0,"nested_blocksize":64}"#,
                "nested_blocksize",
            ),
        ] {
            let problem = State::parse(text.as_bytes()).unwrap_err();
            assert!(problem.contains(word), "{text}: {problem}");
        }
    }
}
