//! Scales that no finite weight has: NaN, infinite or negative ones.
//!
//! A weight that held a NaN or an infinity when it was quantized has them, and a damaged file may. Loaders take them as
//! they are, so they are told and not refused.

use super::file::read_exact_at;
use super::reader::{Checkpoint, TensorRef};
use super::weights::Quantized;
use super::workers::PIECE_BYTES;
use crate::error::Result;

/// How many tensors a note names.
const NAMED: usize = 3;

/// Which scales are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// Those that are few beside the codes: of rows, of doubly quantized scales, and the mean of these.
    Few,
    /// All: of 4-bit weights with single scales another ninth of their bytes.
    All,
}

/// One line on the weights with such scales, which names the first tensors; nothing where there are none.
pub fn note(source: &Checkpoint, weights: &[Quantized], which: Which) -> Result<Option<String>> {
    let mut buffer = Vec::new();
    let mut found = Vec::new();
    for weight in weights {
        found.extend(find(source, weight, which, &mut buffer)?);
    }
    if found.is_empty() {
        return Ok(None);
    }
    let named = found[..found.len().min(NAMED)].join(", ");
    let more = if found.len() > NAMED { format!(" and {} more", found.len() - NAMED) } else { String::new() };
    let (count, all) = (found.len(), weights.len());
    Ok(Some(format!(
        "{count} of {all} quantized weights have scales that no finite weight has (NaN, infinite or negative): {named}{more}"
    )))
}

/// The first tensor of a weight with such scales, and what is wrong.
fn find(source: &Checkpoint, weight: &Quantized, which: Which, buffer: &mut Vec<u8>) -> Result<Option<String>> {
    let scales = match weight {
        Quantized::Int8(weight) => weight.scales,
        Quantized::FourBit(weight) => {
            if let Some(offset) = weight.state.nested_offset.filter(|&offset| is_odd(offset)) {
                // The text of the state is the second part of every weight that has one.
                let name = &source.tensor(weight.parts[1]).name;
                return Ok(Some(format!("{name:?} (nested_offset is {offset})")));
            }
            match weight.nested {
                Some((absmax, _)) => absmax,
                None if which == Which::All => weight.absmax,
                None => return Ok(None),
            }
        }
    };
    let odd = count_odd(source, scales, buffer)?;
    let entry = source.tensor(scales);
    Ok((odd > 0).then(|| format!("{:?} ({odd} of {})", entry.name, entry.elements())))
}

/// How many of the float32 scales in a tensor are odd.
fn count_odd(source: &Checkpoint, at: TensorRef, buffer: &mut Vec<u8>) -> Result<usize> {
    let (file, entry) = (source.file(at), source.tensor(at));
    let mut odd = 0;
    let mut start = 0;
    while start < entry.len {
        let len = (entry.len - start).min(PIECE_BYTES as u64);
        buffer.resize(len as usize, 0);
        read_exact_at(&file.file, &file.path, buffer, entry.offset + start)?;
        let scales = buffer.chunks_exact(4).map(bytemuck::pod_read_unaligned::<f32>);
        odd += scales.filter(|&scale| is_odd(scale)).count();
        start += len;
    }
    Ok(odd)
}

fn is_odd(scale: f32) -> bool {
    !(0.0..=f32::MAX).contains(&scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_scales_are_those_that_no_finite_weight_has() {
        for scale in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1.0, -f32::MIN_POSITIVE] {
            assert!(is_odd(scale), "{scale}");
        }
        for scale in [0.0, -0.0, f32::MIN_POSITIVE, 1.0, f32::MAX] {
            assert!(!is_odd(scale), "{scale}");
        }
    }
}
