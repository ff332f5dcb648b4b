//! The quantized weights of a checkpoint of any origin: 4-bit ones found by their JSON, 8-bit ones by their scales, with
//! all that belongs to them.

use std::collections::{HashMap, HashSet};

use safetensors::Dtype;
use serde_json::Value;

use super::bare::{Bare, find_bare};
use super::cast::floats;
use super::dtype::{item_size, torch_name};
use super::reader::{Checkpoint, TensorRef};
use super::rows::{RowsSource, find_rows};
use super::state::{self, State, packed_shape};
use super::weight_type::WeightType;
use crate::error::{Error, Result};
use crate::geometry::{BlockSize, NESTED_BLOCK_SIZE, packed_len};
use crate::quant::blockwise8::dequantize_8bit_serial;

/// A 4-bit weight of a source.
#[derive(Debug, Clone)]
pub struct WeightSource {
    /// Its name.
    pub name: String,
    /// What its JSON says.
    pub state: State,
    /// Packed codes.
    pub packed: TensorRef,
    /// Scales.
    pub absmax: TensorRef,
    /// The codebook, where the checkpoint has it.
    pub quant_map: Option<TensorRef>,
    /// The scales' scales and codebook.
    pub nested: Option<(TensorRef, TensorRef)>,
    /// All tensors that belong to it.
    pub parts: Vec<TensorRef>,
}

/// A quantized weight of a source.
#[derive(Debug, Clone)]
pub enum Quantized {
    /// In 4 bits.
    FourBit(WeightSource),
    /// In 8 bits.
    Int8(RowsSource),
}

impl Quantized {
    /// Its name.
    pub fn name(&self) -> &str {
        match self {
            Self::FourBit(weight) => &weight.name,
            Self::Int8(weight) => &weight.name,
        }
    }

    /// Its shape, as a loader sees it.
    pub fn shape(&self) -> &[usize] {
        match self {
            Self::FourBit(weight) => &weight.state.shape,
            Self::Int8(weight) => &weight.shape,
        }
    }

    /// The number of its values.
    pub fn elements(&self) -> usize {
        match self {
            Self::FourBit(weight) => weight.state.elements(),
            Self::Int8(weight) => weight.elements(),
        }
    }

    /// What it is quantized to.
    pub fn weight_type(&self) -> WeightType {
        match self {
            Self::FourBit(weight) => WeightType::FourBit(weight.state.quant_type),
            Self::Int8(_) => WeightType::Int8,
        }
    }

    /// Its codes.
    pub fn codes(&self) -> TensorRef {
        match self {
            Self::FourBit(weight) => weight.packed,
            Self::Int8(weight) => weight.codes,
        }
    }

    /// All tensors that belong to it.
    pub fn parts(&self) -> &[TensorRef] {
        match self {
            Self::FourBit(weight) => &weight.parts,
            Self::Int8(weight) => &weight.parts,
        }
    }
}

/// The quantized weights of a checkpoint, each checked; `config` is its config.json, which tells of those that do not
/// say themselves what they are.
pub fn find_quantized(source: &Checkpoint, config: Option<&Value>) -> Result<Vec<Quantized>> {
    let mut four_bit = find_weights(source)?;
    let rows = find_rows(source)?;
    let owned: HashSet<TensorRef> = four_bit.iter().flat_map(|weight| weight.parts.iter().copied()).collect();
    for part in rows.iter().flat_map(|weight| &weight.parts) {
        if owned.contains(part) {
            return Err(Error::tensor(
                &source.file(*part).path,
                &source.tensor(*part).name,
                "belongs to a 4-bit weight and to an 8-bit one: expected one of them",
            ));
        }
    }
    four_bit.extend(find_bare(source, config, &owned)?.into_iter().map(|Bare { name, state, packed, absmax }| {
        WeightSource { name, state, packed, absmax, quant_map: None, nested: None, parts: vec![packed, absmax] }
    }));
    Ok(four_bit.into_iter().map(Quantized::FourBit).chain(rows.into_iter().map(Quantized::Int8)).collect())
}

/// The 4-bit weights of a checkpoint, each checked: its parts are there and have the shapes that its JSON asks for.
pub fn find_weights(source: &Checkpoint) -> Result<Vec<WeightSource>> {
    let mut weights = Vec::new();
    let mut owners: HashMap<TensorRef, String> = HashMap::new();
    for &at in &source.order {
        let name = &source.tensor(at).name;
        if let Some((weight, suffix)) = name.split_once(state::STATE_INFIX) {
            let weight = read_weight(source, at, weight, suffix)?;
            for &part in &weight.parts {
                if let Some(other) = owners.insert(part, name.clone()) {
                    return Err(Error::tensor(
                        &source.file(part).path,
                        &source.tensor(part).name,
                        format!("belongs to two quantization states, {other:?} and {name:?}: expected one"),
                    ));
                }
            }
            weights.push(weight);
        }
    }
    Ok(weights)
}

fn read_weight(source: &Checkpoint, at: TensorRef, name: &str, suffix: &str) -> Result<WeightSource> {
    let (file, entry) = (source.file(at), source.tensor(at));
    let fail = |tensor: &str, problem: String| Error::tensor(&file.path, tensor, problem);
    if entry.dtype != Dtype::U8 || entry.len > 1 << 16 {
        return Err(fail(
            &entry.name,
            format!("is {} of {} bytes: expected the uint8 text of a quantization state", entry.dtype, entry.len),
        ));
    }
    let state = State::parse(&source.read(at)?).map_err(|problem| fail(&entry.name, problem))?;
    if state.quant_type.as_str() != suffix {
        return Err(fail(
            &entry.name,
            format!("says quant_type {:?}: expected {suffix:?}, as in its name", state.quant_type.as_str()),
        ));
    }
    let part = |suffix: &str| {
        let wanted = format!("{name}{suffix}");
        source.find(&wanted).ok_or_else(|| fail(name, format!("has a quantization state and no {wanted:?} beside it")))
    };
    let n = state.elements();
    let packed = part("")?;
    let codes = source.tensor(packed);
    let itemsize = item_size(codes.dtype);
    if torch_name(codes.dtype).is_none() || codes.len != (packed_shape(n, codes.dtype)[0] * itemsize) as u64 {
        return Err(fail(
            name,
            format!(
                "holds {} bytes of {}: expected {} packed bytes for the shape {:?}",
                codes.len,
                codes.dtype,
                packed_len(n),
                state.shape
            ),
        ));
    }
    let expect = |at: TensorRef, dtype: Dtype, len: usize| {
        let t = source.tensor(at);
        if t.dtype == dtype && t.elements() == len {
            Ok(at)
        } else {
            Err(fail(&t.name, format!("is {} of shape {:?}: expected {dtype} of shape [{len}]", t.dtype, t.shape)))
        }
    };
    let scales = state.blocksize.absmax_len(n);
    let mut parts = vec![packed, at];
    let quant_map = source.find(&format!("{name}{}", state::QUANT_MAP));
    parts.extend(quant_map);
    let nested = if state.nested_offset.is_some() {
        let absmax = expect(part(state::NESTED_ABSMAX)?, Dtype::F32, scales.div_ceil(NESTED_BLOCK_SIZE))?;
        let map = expect(part(state::NESTED_QUANT_MAP)?, Dtype::F32, 256)?;
        parts.extend([absmax, map]);
        Some((absmax, map))
    } else {
        None
    };
    let absmax = expect(part(state::ABSMAX)?, if nested.is_some() { Dtype::U8 } else { Dtype::F32 }, scales)?;
    parts.push(absmax);
    Ok(WeightSource { name: name.to_owned(), state, packed, absmax, quant_map, nested, parts })
}

/// The float32 scales of a 4-bit weight, whether they are stored so or quantized themselves.
pub fn read_scales(source: &Checkpoint, weight: &WeightSource) -> Result<Vec<f32>> {
    let codes = source.read(weight.absmax)?;
    let Some((nested_absmax, nested_map)) = weight.nested else {
        return Ok(floats(&codes));
    };
    let offset = weight.state.nested_offset.unwrap_or(0.0);
    let map: [f32; 256] = floats(&source.read(nested_map)?).try_into().map_err(|_| {
        Error::tensor(&source.file(nested_map).path, &source.tensor(nested_map).name, "is not 256 float32 values long")
    })?;
    let mut scales = vec![0.0; codes.len()];
    dequantize_8bit_serial(&codes, &floats(&source.read(nested_absmax)?), &map, BlockSize::NESTED, &mut scales)?;
    for scale in &mut scales {
        *scale += offset;
    }
    Ok(scales)
}
